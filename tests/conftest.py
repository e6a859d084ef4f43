"""What all tests share: one thread, a comparison without hidden tolerances, tiny awake models."""

import math
import fcntl
import os
import shutil

import pytest
import torch

from minirlhf.model import GPT, ModelConfig
from minirlhf.plumbing.checkpoints import frozen

# Two threads that wait for each other on a shared machine were measured 19 times slower than one.
torch.set_num_threads(1)

FLAVOURS = {
    "gpt2": {},
    "llama": dict(norm="rmsnorm", mlp="swiglu", positions="rope", bias=False, tied=False),
}


def close(actual, expected, rtol=1e-9, atol=1e-14):
    """Equal up to rounding; the absolute part is far below every number that is compared."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def tiny_config(**options):
    return ModelConfig(**{**dict(vocab_size=17, block_size=16, n_layer=2, n_head=4, n_embd=16,
                                 n_hidden=24), **options})


def wake(model, seed=1, std=0.5):
    """Move every parameter far from where it starts: at initialisation biases are 0, gains are 1
    and all logits are alike, so a forgotten bias or a wrong mask would hardly show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(gain + std * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def awake_gpt(**options):
    """A tiny GPT in float64 with large random weights."""
    return wake(GPT(tiny_config(**options)).double()).eval()


def softplus(x):
    """log(1 + e^x), by Python: -log sigmoid(d) is softplus(-d)."""
    return math.log1p(math.exp(x))


# A policy over so few responses that every expectation is a sum.
END, PROMPT, TEMPERATURE = 0, [3, 1], 0.7
RESPONSES = [[END], *([i, j] for i in range(1, 5) for j in range(5))]  # all of up to two tokens


def next_logprobs(model, prefix):
    """(5,) nats, of the token after the prompt and this beginning of a response."""
    return (model(torch.tensor([PROMPT + prefix]))[0, -1] / TEMPERATURE).log_softmax(-1)


def response_logprobs(model):
    """(21, 2) nats, token by token from the prefixes alone; 0 where there is no second token."""
    return torch.stack([
        torch.stack([next_logprobs(model, response[:i])[response[i]] if i < len(response)
                     else torch.zeros(()).double() for i in range(2)]) for response in RESPONSES])


def policy_and_reference():
    policy, reference = awake_gpt(vocab_size=5), GPT(tiny_config(vocab_size=5)).double()
    return policy, frozen(wake(reference, seed=2))


def gradients(loss, module):
    """d loss / d parameter, for each parameter of the module; zeros where there is no path."""
    params = list(module.parameters())
    assert loss.requires_grad
    found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found)]


def same_gradients(mine, exact, rtol=1e-9):
    """Whether each parameter's gradient agrees, up to rounding of its own size."""
    return all((a - b).norm() <= rtol * b.norm() for a, b in zip(mine, exact, strict=True))


@pytest.fixture(autouse=True)
def same_random_numbers():
    """No test depends on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` chooses
def pytest_collection_modifyitems(items):
    """Tests that share something which takes long to make run one after the other in one process;
    a browser and a quick road take so long that their tests are slow ones."""
    for item in items:
        if {"browser", "quick_road"} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
        if {"browser", "quick_road", "runs"} & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    """Data files and the run folders of a tiny base, SFT and reward model, made once.

    Of several processes of one pytest, the first walks it and the others copy it.
    """
    from tiny_road import Road  # it imports every script: leave the library's tests without them

    kept = os.environ.get("MINIRLHF_ROAD")  # `mutants.py` walks it once for many runs of pytest
    if kept or "PYTEST_XDIST_WORKER" not in os.environ:
        return Road(kept or tmp_path_factory.mktemp("road")).walk()
    common = tmp_path_factory.getbasetemp().parent / "road"
    with open(f"{common}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Road(common).walk()
        mine = shutil.copytree(common, tmp_path_factory.mktemp("road"), dirs_exist_ok=True)
    return Road(mine).walk()


@pytest.fixture
def double():
    """Run in float64: Adam divides by the gradient's size, so a rounding error of a gradient that
    is nearly zero would show in the weights as a whole step."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64(double, monkeypatch):
    """float64 all the way: the scripts' `.float()` is there to widen bf16, not to narrow this."""
    narrow = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float",
                        lambda x: x if x.dtype == torch.float64 else narrow(x))


@pytest.fixture
def dropouts(road, tmp_path):
    """PPO's options for an SFT and a reward model that have dropout."""
    from tiny_road import with_dropout

    return {"init": with_dropout(road.folder / "sft", tmp_path / "dropout_sft"),
            "reward_model": with_dropout(road.folder / "rm", tmp_path / "dropout_rm")}
