"""Bugs to plant into train_pretrain.py."""

from bugs import Bug

FILE = "train_pretrain.py"
BUGS = [
    Bug("loss_of", "-logprobs.sum()", "-logprobs.sum().detach()", "test_check_37",
        "a detached version of the pretraining loss"),
    Bug("loss_of", "[:, :-1], tokens[:, 1:]", ", tokens", "test_check_38",
        "each position is asked for the token it can see"),
    Bug("evaluate", "part.to(run.device)", "part", "test_pretraining_on_a_gpu",
        "held-out blocks are left on the CPU"),
    Bug("main", "lr_at(step - 1,", "lr_at(step,", "test_check_38_each_step",
        "pretraining's schedule counts from 1 and is a step ahead"),
]
