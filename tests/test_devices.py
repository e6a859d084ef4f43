"""Every script on a pretended GPU: no tensor is left on the CPU, and the numbers stay the same.

Bug: a tensor made without `device=`, which is harmless on a CPU and ends the run on a GPU. Tests on
a machine without one cannot see it, unless a GPU is pretended: tensors that are asked for on `cuda`
stay in the CPU's memory, are computed there, and only say that they lie on the GPU. Whatever mixes
them with others fails, as it would there.
"""

import contextlib

import pytest
import torch
from conftest import awake_gpt
from tiny_road import SCRIPTS, without_clock
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import evaluate
import sample
from minirlhf.look.ledger import load
from minirlhf.plumbing import runs

CPU, GPU = torch.device("cpu"), torch.device("cuda")
JOINS = {torch.cat, torch.stack}  # these take no number from the CPU either
MOVES = {torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.data.__set__,
         torch._has_compatible_shallow_copy_type}
PLACE = {torch.Tensor.device.__get__: GPU, torch.Tensor.is_cuda.__get__: True}


class Generator(torch.Generator):
    """A generator that remembers which device it was asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.on = torch.device(device)

    device = property(lambda self: self.on)


def on_gpu(tensor):
    return "on_gpu" in vars(tensor)


class PretendedGpu(TorchFunctionMode):
    """Sees every call of PyTorch. Asked for a tensor on the GPU, it makes one on the CPU and marks
    it, as it marks what comes of marked ones; where a call mixes both kinds, it fails. As in
    PyTorch, a number (a CPU tensor without dimensions) goes with any tensor, and a tensor of the
    GPU may be indexed by one of the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device or func is torch._C._nn._parse_to:
            return func(*args, **kwargs)  # no work on tensors
        if func is torch.Tensor.cpu:
            func, args = torch.Tensor.to, (args[0], CPU)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if func in PLACE and on_gpu(tensors[0]):
            return PLACE[func]
        names = [*args[1:], kwargs.get("device")] if func is torch.Tensor.to else [
            kwargs.get("device")]
        asked = [torch.device(name) for name in names if isinstance(name, (str, torch.device))]
        self.check(func, args, tensors, asked, kwargs.get("generator"))
        args, kwargs = tree_map(lambda leaf: CPU if isinstance(leaf, (str, torch.device))
                                and str(leaf) == "cuda" else leaf, (args, kwargs))
        gpu = asked[0] == GPU if asked else any(map(on_gpu, tensors))
        if func == torch.Tensor.data.__set__ and on_gpu(args[1]):
            args[0].on_gpu = True  # how `module.to(device)` moves a parameter
        if func is torch.Tensor.__reduce_ex__:  # `torch.save` looks at a tensor from the GPU
            gpu, args = False, (args[0].detach(), *args[1:])
        return tree_map(lambda leaf: self.mark(leaf, gpu), func(*args, **kwargs))

    @staticmethod
    def check(func, args, tensors, asked, generator):
        if func is torch.Tensor.__getitem__ and on_gpu(args[0]):
            return
        if func is torch.Tensor.__setitem__ and on_gpu(args[0]):
            tensors = [one for one in (args[0], args[2]) if isinstance(one, torch.Tensor)]
        gpu = [one for one in tensors if on_gpu(one)]
        cpu = [one for one in tensors if not on_gpu(one) and (one.dim() > 0 or func in JOINS)]
        assert not (gpu and cpu) or func in MOVES, (
            f"{func.__name__}: all tensors should be on the same device, but they are on two")
        assert not gpu or func is not torch.Tensor.numpy, "numpy cannot read a tensor on the GPU"
        device = asked[0] if asked else GPU if gpu else CPU
        assert generator is None or generator.device == device, (
            f"a generator on {generator.device} draws a tensor on {device}")

    @staticmethod
    def mark(leaf, gpu):
        if not isinstance(leaf, torch.Tensor) or on_gpu(leaf) == gpu:
            return leaf
        leaf = leaf.view_as(leaf)  # `to` returns the tensor itself where there is nothing to do
        if gpu:
            leaf.on_gpu = True
        return leaf


@pytest.fixture
def gpu(monkeypatch):
    """The machine that `with gpu:` pretends to be, whose default device is a GPU."""
    monkeypatch.setattr(torch, "Generator", Generator)
    for module in (runs, sample, evaluate):
        monkeypatch.setattr(module, "pick_device", lambda name="": torch.device(name or "cuda"))
    monkeypatch.setattr(runs, "memory_of", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.zeros(1, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: None)
    deepcopy = torch.nn.Parameter.__deepcopy__

    def copy_there(self, memo):
        vars(copied := deepcopy(self, memo)).update(vars(self))
        return copied

    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", copy_there)
    return PretendedGpu()


# ---------------------------------------------------------------- the pretence itself

def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu):
    with gpu:
        x, y, zero = torch.arange(3.0, device=GPU), torch.arange(3.0), torch.zeros(())
        assert x.device == (x + 1).device == (x * zero).device == y.to(GPU).device == GPU
        assert y.device == x.to("cpu").device == x.cpu().device == CPU
        assert x[y.long()].tolist() == [0, 1, 2] and x.sum().item() == 3
        assert torch.multinomial(x, 1, generator=torch.Generator(GPU)).device == GPU
        for mix in (lambda: x + y, lambda: torch.where(y > 1, x, x), lambda: torch.isin(x, y),
                    lambda: y[x.long()], lambda: x.__setitem__(slice(None), y),
                    lambda: x.gather(0, y.long()), lambda: torch.stack([x.sum(), y.sum()]),
                    lambda: y * x.sum(), lambda: torch.nn.functional.linear(x, y[None]),
                    lambda: torch.multinomial(x, 1, generator=torch.Generator()),
                    lambda: torch.rand(2, generator=torch.Generator(GPU))):
            with pytest.raises(AssertionError, match="device|generator"):
                mix()
        with pytest.raises(AssertionError, match="numpy"):
            x.numpy()
    assert not vars(y) and not vars(zero)


def test_a_model_that_was_moved_learns_as_on_the_cpu(gpu):
    ids, losses = torch.arange(8)[None], []
    with gpu:
        for device in (CPU, GPU):
            model = awake_gpt().to(device)
            assert all(p.device == device and p.is_leaf for p in model.parameters())
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
            for _ in range(3):
                loss = model(ids.to(device)).logsumexp(-1).sum()
                optimizer.zero_grad()
                loss.backward()
                assert all(p.grad.device == device for p in model.parameters())
                optimizer.step()
            losses.append(loss.item())
    assert losses[0] == losses[1]


# ---------------------------------------------------------------- every script

def same_runs(gpu, stage, road, tmp_path, monkeypatch, options):
    """A run of the script on the CPU and one on the GPU, with a ledger, and resumed at its end."""
    monkeypatch.setattr(SCRIPTS[stage], "draw_curves", lambda folder: None)
    options = {"dtype": "float32", **options}
    plain = without_clock(road.run(stage, tmp_path / "cpu", device="cpu", **options))
    with gpu:
        there = without_clock(road.run(stage, tmp_path / "gpu", device="cuda", **options))
        assert without_clock(road.run(stage, tmp_path / "gpu", device="cuda", resume=True,
                                      **options)) == there
    assert there == plain
    a, b = (runs.load_checkpoint(tmp_path / name)["model"] for name in ("cpu", "gpu"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", [{}, dict(
    norm="layernorm", mlp="gelu", positions="learned", bias=True, attention="manual")])
def test_pretraining_on_a_gpu_is_that_on_the_cpu(options, road, tmp_path, gpu, monkeypatch):
    same_runs(gpu, "pretrain", road, tmp_path, monkeypatch, dict(num_steps=2, **options))


@pytest.mark.parametrize("stage, options", [
    ("sft", {}), ("rm", dict(margin=1.0)), ("dpo", dict(pairs="all"))])
def test_a_stage_on_a_gpu_is_that_on_the_cpu(stage, options, road, tmp_path, gpu, monkeypatch):
    same_runs(gpu, stage, road, tmp_path, monkeypatch,
              dict(batch_size=16, micro_batch_size=9, held_out=0.5, ledger_every=1, **options))


@pytest.mark.parametrize("options", [{}, dict(share_critic=True, kl_kind="k3", whiten=False)])
def test_ppo_on_a_gpu_is_ppo_on_the_cpu(options, road, tmp_path, gpu, monkeypatch):
    same_runs(gpu, "ppo", road, tmp_path, monkeypatch, dict(
        ledger_every=1, judge=f"{road.tools}:judge", max_new_tokens=6, **options))


def test_sampling_on_a_gpu_is_sampling_on_the_cpu(road, tmp_path, gpu, capsys):
    """Several answers to each prompt, filtered, and the ledger of their log-probs."""
    texts, rows = [], []
    for device, machine in (("cpu", contextlib.nullcontext()), ("cuda", gpu)):
        folder = tmp_path / device
        with machine:
            sample.main(sample.Config(
                model=str(road.folder / "sft"), prompts=road.prompts, limit=3, num_samples=2,
                top_k=50, top_p=0.9, save=str(folder / "samples.jsonl"), max_new_tokens=8,
                ledger=str(folder), device=device, dtype="float32"))
        texts.append((folder / "samples.jsonl").read_text(encoding="utf-8"))
        rows.append(load(folder, 1)["rows"])
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 3
    assert all((rows[0][name] == rows[1][name]).all() for name in rows[0])


def test_an_evaluation_on_a_gpu_is_that_on_the_cpu(road, tmp_path, gpu, capsys):
    """Answers, rewards, the KL to the reference, the best of two, the reward model's accuracy."""
    results = []
    for device, machine in (("cpu", contextlib.nullcontext()), ("cuda", gpu)):
        with machine:
            results.append(evaluate.main(evaluate.Config(
                models=str(road.folder / "pretrain"), against=str(road.folder / "sft"),
                reward_model=str(road.folder / "rm"), preferences=road.preferences,
                prompts=road.prompts, limit=3, best_of=2, max_new_tokens=8, show=0, device=device,
                dtype="float32", out=str(tmp_path / device))))
    assert results[0] == results[1] and results[0]["players"]["pretrain"]["kl"] > 0
