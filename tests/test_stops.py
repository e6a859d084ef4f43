"""How a run ends before its end: by a signal, a number that is none, a judge, a full disk. What was
trained is kept, the message names the cause, and the run can go on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from crash_test import fingerprints, run_script, wait, words
from tiny_road import SCRIPTS, begin

import train_rm
from minirlhf.plumbing import devices, signals
from minirlhf.plumbing.checkpoints import load_checkpoint
from minirlhf.plumbing.devices import memory_of, pick_device, pick_dtype, set_threads
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.runs import Run, start_run

ROOT = Path(__file__).resolve().parents[1]
OFTEN = dict(dtype="float32", eval_every=1, save_every=1000)


# ---------------------------------------------------------------- signals

def signalled(stage, road, out, numbers, **options):
    """Exit code of a run that gets each signal once it has logged another step."""
    child = run_script(stage, words(road.config(stage, out, **{**OFTEN, **options})))
    for count, number in enumerate(numbers, start=1):
        while not (out / "metrics.jsonl").exists() or (
                (out / "metrics.jsonl").read_bytes().count(b"\n") < count):
            time.sleep(0.01)
        os.kill(child, number)
    return wait(child)


@pytest.mark.parametrize("stage, number, code", [
    *((stage, signal.SIGTERM, 143) for stage in SCRIPTS), ("sft", signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_and_nothing_is_lost(stage, number, code, road, tmp_path):
    """Bug: Ctrl-C lost all steps since the last checkpoint, with a traceback."""
    length = {"pretrain": "num_steps", "ppo": "num_steps"}.get(stage, "num_epochs")
    options = {length: 60}
    assert signalled(stage, road, tmp_path / "run", [number], **options) == code
    ckpt = load_checkpoint(tmp_path / "run")
    rows = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert 1 <= ckpt["step"] == json.loads(rows[-1])["step"] < ckpt["num_steps"]
    assert not ckpt["done"]
    assert wait(run_script(stage, ["--resume", "--out", str(tmp_path / "run"), f"--{length}=60"])) == 0
    assert wait(run_script(stage, words(road.config(stage, tmp_path / "whole",
                                                    **OFTEN, **options)))) == 0
    assert fingerprints(tmp_path / "run") == fingerprints(tmp_path / "whole")


def test_a_second_signal_leaves_at_once(road, tmp_path, monkeypatch):
    log = Run.log

    def log_slowly(self, *args, **metrics):
        log(self, *args, **metrics)
        time.sleep(0.5)
        if self.step == 1:  # the second signal comes within this step
            time.sleep(60)

    monkeypatch.setattr(Run, "log", log_slowly)
    child = run_script("sft", words(road.config("sft", tmp_path / "run", num_epochs=50, **OFTEN)))
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (
            tmp_path / "run" / "metrics.jsonl").read_bytes():
        time.sleep(0.01)
    for _ in range(2):
        os.kill(child, signal.SIGINT)
        time.sleep(0.3)
    assert wait(child, seconds=20) == 130
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_the_command_line_says_how_to_go_on(road, tmp_path):
    argv = [sys.executable, "train_sft.py",
            *words(road.config("sft", tmp_path / "run", num_epochs=500, **OFTEN))]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               encoding="utf-8")
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err
    assert "stopping after this step" in err
    assert f"saved; go on with: python train_sft.py --resume --out {tmp_path / 'run'}" in err


def test_a_signal_before_the_loop_ends_it_at_once(monkeypatch):
    monkeypatch.setattr(signals, "received", None)
    with pytest.raises(signals.Stopped):
        signals.on_signal(signal.SIGTERM, None)
    monkeypatch.setattr(signals, "patient", True)
    signals.on_signal(signal.SIGTERM, None)
    assert signals.received == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):  # by whoever catches that one
        signals.on_signal(signal.SIGTERM, None)


def test_a_signal_that_comes_too_late_for_a_steps_checkpoint_ends_the_run_a_step_later(
        road, tmp_path, monkeypatch):
    """Bug: between the question whether to save and the end of the step, it left with the words
    "which is saved", and the step was lost."""
    monkeypatch.setattr(signals, "received", None)
    ask, asked = Run.save_due, []

    def ask_and_signal(self):
        answer = ask(self)
        asked.append((self.step, answer))
        if self.step == 2:
            signals.received = signal.SIGTERM
        return answer

    monkeypatch.setattr(Run, "save_due", ask_and_signal)
    with pytest.raises(signals.Stopped, match="stopped after step 3 of"):
        road.run("sft", tmp_path, num_epochs=9, **OFTEN)
    assert asked == [(1, False), (2, False), (3, True)] and load_checkpoint(tmp_path)["step"] == 3


# ---------------------------------------------------------------- numbers that are none

@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_run_whose_numbers_become_nan_ends_and_keeps_its_last_good_checkpoint(stage, road,
                                                                                tmp_path):
    """Bug: with --lr 1e4 it trained on to the end, and saved what was left, exit code 0."""
    length = {"pretrain": "num_steps", "ppo": "num_steps"}.get(stage, "num_epochs")
    options = {**OFTEN, "save_every": 1, length: 40, "grad_clip": 1e30, "lr": 1e30}
    if stage == "ppo":
        options.update(stop_kl=0.0)
    with pytest.raises(UserError) as stop:
        road.run(stage, tmp_path, **options)
    message = str(stop.value)
    assert message.startswith("step ") and "NaN or infinite" in message and "Lower --lr" in message
    assert any(word in message for word in ("the weights ", "the output of ", "the loss",
                                            "the gradient of ", "the batch's"))
    if (tmp_path / "ckpt.pt").exists():
        state = load_checkpoint(tmp_path)["model"]
        assert all(value.isfinite().all() for value in state.values())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(math.isfinite(value) for row in rows for value in row.values())


def broken_run(road, tmp_path, dtype="float32"):
    run = start_run(road.config("sft", tmp_path, dtype=dtype), {"init": "pretrain"})
    run.step, model = 7, run.model("init")
    return run, model, {"tokens": torch.tensor([[1, 2, 3]]), "scores": torch.ones(1)}


def test_the_first_tensor_that_went_bad_is_named(road, tmp_path):
    nan = float("nan")
    run, model, batch = broken_run(road, tmp_path)
    run.check_finite(model, batch, loss=torch.tensor(1.0), grad_norm=2.0)
    with pytest.raises(UserError, match="step 7: the loss became NaN or infinite"):
        run.check_finite(model, batch, loss=torch.tensor(nan))
    assert torch.load(tmp_path / "bad_batch.pt")["tokens"].tolist() == [[1, 2, 3]]
    with pytest.raises(UserError, match="step 7: the batch's scores became"):
        run.check_finite(model, {**batch, "scores": torch.tensor([math.inf])}, loss=nan)
    weight = model.trunk.blocks[1].mlp.up.weight
    weight.grad = torch.full_like(weight, nan)
    with pytest.raises(UserError, match="the gradient of trunk.blocks.1.mlp.up.weight became"):
        run.check_finite(model, batch, grad_norm=nan)
    with torch.no_grad():
        weight[0, 0] = 1e38  # finite, and too large to multiply
        model.trunk.blocks[1].norm2.weight.fill_(1e30)
    with pytest.raises(UserError, match="the output of trunk.blocks.1"):
        run.check_finite(model, batch, loss=nan)
    with torch.no_grad():
        weight[0, 0] = nan
    with pytest.raises(UserError, match="the weights trunk.blocks.1.mlp.up.weight became"):
        run.check_finite(model, batch, loss=nan)
    run.restore(9)
    with pytest.raises(UserError, match="the weights trunk.blocks.1.mlp.up.weight became NaN"):
        run.save(model)
    assert not (tmp_path / "ckpt.pt").exists()


def test_float16_may_skip_a_step_but_not_all_of_them(road, tmp_path):
    """Its gradients overflow now and then; the scaler then halves the scale and skips the step."""
    run, model, batch = broken_run(road, tmp_path, "float16")
    run.check_finite(model, batch, grad_norm=math.inf)
    run.restore(9)
    run.log(1, loss=1.0, grad_norm=math.inf, critic_grad_norm=math.inf)
    assert set(run.history[-1]) == {"step", "loss", "tok_per_s"}
    run.scaler.scale(torch.ones(1))  # it begins with the first loss
    run.scaler.update(2.0**-12)
    with pytest.raises(UserError, match="became NaN or infinite"):
        run.check_finite(model, batch, grad_norm=math.inf)
    with pytest.raises(UserError, match="step 7: val_loss is nan, so the run ends"):
        run.log(1, loss=1.0, val_loss=math.nan)


def test_nothing_is_sampled_from_nan(road):
    from minirlhf.generate import pick

    with pytest.raises(UserError, match="the model's logits are NaN"):
        pick(torch.full((1, 3), math.nan), 1.0, 0, 1.0, None)


# ---------------------------------------------------------------- what can fail at the end

def test_too_few_answers_that_end_are_known_before_the_training(road, tmp_path, monkeypatch):
    """Bug: the reward model was trained to its last step, then thrown away."""
    monkeypatch.setattr(Run, "log", lambda *_, **__: pytest.fail("it was trained first"))
    with pytest.raises(UserError, match="fewer than 2 of 16 sampled answers ended within"):
        road.run("rm", tmp_path / "rm", max_new_tokens=1)
    assert not (tmp_path / "rm").exists()


def test_a_reward_model_without_an_opinion_is_saved_before_it_is_refused(road, tmp_path):
    with pytest.raises(UserError, match="every answer got the same score.* the weights are saved"):
        road.run("rm", tmp_path, lr=0.0, dtype="float32")
    ckpt = load_checkpoint(tmp_path)
    assert ckpt["step"] == ckpt["num_steps"] and not ckpt["done"]
    with pytest.raises(UserError, match="stands at step 5 of 5; finish it with --resume"):
        road.run("ppo", tmp_path / "ppo", reward_model=str(tmp_path))


def test_a_reward_model_killed_while_its_scores_are_measured_measures_them_again(
        road, tmp_path, monkeypatch):
    options = dict(dtype="float32")
    road.run("rm", tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(train_rm, "measure_scores", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            road.run("rm", tmp_path / "run", **options)
    road.run("rm", tmp_path / "run", resume=True, **options)
    assert fingerprints(tmp_path / "run") == fingerprints(tmp_path / "whole")


BAD = """
calls = 0
def judge(row, response, ended):
    global calls
    calls += 1
    if calls > %d:
        %s
    return {"score": 1.0}
"""


@pytest.mark.parametrize("fault", ["raise ValueError('no')", "import sys; sys.exit(0)",
                                   "return {'score': float('nan')}", "return None"])
def test_a_judge_that_fails_on_the_way_loses_no_step(fault, road, tmp_path):
    """Bug: sys.exit(0) in it ended PPO with exit code 0 and no model."""
    tools = tmp_path / "tools.py"
    tools.write_text(BAD % (1 + 8 + 2, fault), encoding="utf-8")  # one call at loading, eight a step
    options = dict(**OFTEN, num_steps=4, judge=f"{tools}:judge")
    with pytest.raises(UserError, match="tools.py.*judge"):
        road.run("ppo", tmp_path / "ppo", **options)
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [("gold" in row) for row in rows] == [True, False]
    assert load_checkpoint(tmp_path / "ppo")["step"] == 2  # the one that it failed in


# ---------------------------------------------------------------- disks

@pytest.fixture
def small_disk(tmp_path):
    """A disk of 600 kB, where this process may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)],
                          capture_output=True)
    if made.returncode:
        pytest.skip("no right to make a small disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_what_was_saved_before(small_disk, road, tmp_path):
    options = dict(dtype="float32", num_epochs=4, eval_every=1, save_every=2)
    with pytest.raises(UserError, match="disk/run/.* cannot be written .No space left on device."):
        road.run("sft", small_disk / "run", **options)
    ckpt = load_checkpoint(small_disk / "run")
    assert ckpt["step"] == 2 and not list((small_disk / "run").glob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    road.run("sft", small_disk / "run", resume=True, **options)
    road.run("sft", tmp_path / "whole", **options)
    assert fingerprints(small_disk / "run") == fingerprints(tmp_path / "whole")


def test_a_read_only_disk_is_found_before_the_training(small_disk, road, monkeypatch):
    road.run("sft", small_disk / "run", save_every=1000)
    before = fingerprints(small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    monkeypatch.setattr(Run, "log", lambda *_, **__: pytest.fail("it was trained first"))
    for out, options in ((small_disk / "run", {"overwrite": True}), (small_disk / "other", {})):
        with pytest.raises(UserError, match="can't be written; give another place"):
            road.run("sft", out, **options)
    assert fingerprints(small_disk / "run") == before


# ---------------------------------------------------------------- while it runs

def test_where_a_run_is_shows_within_seconds(road, tmp_path, capsys, monkeypatch):
    """Bug: the first line came at step 150 of 238."""
    run = begin("sft", road, tmp_path)
    run.restore(100)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("minirlhf.plumbing.runs.time.time", lambda: clock.now)
    capsys.readouterr()
    for _ in run.steps():
        clock.now += 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines[:2] == ["step 1/100 | 2 s a step | about 3 min left",
                         "step 17/100 | 2 s a step | about 3 min left"]
    assert lines[-1] == "step 97/100 | 2 s a step | about 6 s left"


def test_the_same_numbers_go_to_tensorboard(road, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(str(folder))

        def add_scalar(self, *values):
            written.append(values)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=SummaryWriter))
    history = road.run("sft", tmp_path / "run", tensorboard=True)
    assert written[0] == str(tmp_path / "run" / "tensorboard") and written[-1] == "closed"
    assert written[1:-1] == [(name, value, row["step"]) for row in history
                             for name, value in row.items() if name not in ("step", "tok_per_s")]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs a package: pip install tensorboard"):
        road.run("sft", tmp_path / "other", tensorboard=True)


# ---------------------------------------------------------------- devices and sizes

def test_devices_are_accepted_where_they_are_and_refused_where_not(monkeypatch):
    for name in ("banana", "meta", "xla", "vulkan", "cuda:x", "cpu:-2"):
        with pytest.raises(UserError, match=f"--device {name}: no such device; expected cpu, cuda"):
            pick_device(name)
    with pytest.raises(UserError, match="--device cpu:3: there is one such device; use --device cpu"):
        pick_device("cpu:3")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU of Apple's; use --device cpu"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == torch.device("mps")
    assert pick_dtype("auto", torch.device("mps")) == torch.float32  # bf16 is asked for there
    assert pick_dtype("bfloat16", torch.device("mps")) == torch.bfloat16


def test_more_threads_than_any_machine_has_are_refused():
    """Bug: --threads 100000 ended in a segmentation fault."""
    with pytest.raises(UserError, match="--threads 100000: expected at most"):
        set_threads(100_000)
    set_threads(1)


def test_models_that_no_machine_holds_are_refused_before_they_are_built(road, tmp_path, monkeypatch):
    assert memory_of(torch.device("cpu")) > 1e8
    for options in (dict(n_layer=10**6), dict(n_embd=10**6, n_head=2), dict(n_hidden=10**8)):
        with pytest.raises(UserError, match="parameters takes .* GB to train, and cpu has"):
            road.run("pretrain", tmp_path / "run", **{**options, "block_size": 64})
    monkeypatch.setattr(devices.os, "sysconf_names", {})
    assert memory_of(torch.device("cpu")) is None  # a system that doesn't tell

