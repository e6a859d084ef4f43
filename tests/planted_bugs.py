"""The bugs that `python tests/mutants.py` plants: the field's own, in this project's code."""

from typing import NamedTuple


class Bug(NamedTuple):
    file: str
    text: str  # what stands there, exactly once
    wrong: str  # what is planted in its place
    test: str  # how the names of the tests begin that must fail
    story: str


BUGS = [
    Bug("minirlhf/losses.py", "loss = masked_mean(torch.maximum(unclipped, clipped)",
        "loss = masked_mean(torch.minimum(unclipped, clipped)", "test_check_24",
        "the smaller of the two losses, which rewards leaving the trust region"),
    Bug("train_ppo.py", "policy, reward_model = run.model(\"init\"), frozen(run.model(\"reward_model\"))",
        "policy, reward_model = run.model(\"init\"), run.model(\"reward_model\")", "test_check_19",
        "the reward model is not frozen"),
    Bug("minirlhf/masked.py", "whitened = whitened + mean", "whitened = whitened", "test_check_16",
        "the mean is lost where it should be kept"),
]
