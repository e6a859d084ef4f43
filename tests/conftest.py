"""What all tests share: one thread, a comparison without hidden tolerances, a tiny awake model."""

import os

import pytest
import torch

from minirlhf.model import GPT, ModelConfig

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


@pytest.fixture(autouse=True)
def same_random_numbers():
    """No test depends on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    """Data files and the run folders of a tiny base, SFT and reward model, made once."""
    from tiny_road import Road  # it imports every script: leave the library's tests without them

    kept = os.environ.get("MINIRLHF_ROAD")  # `mutants.py` walks it once for many runs of pytest
    return Road(kept or tmp_path_factory.mktemp("road")).walk()


@pytest.fixture
def double():
    """Run in float64: Adam divides by the gradient's size, so a rounding error of a gradient that
    is nearly zero would show in the weights as a whole step."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
