"""Run folders: resuming to the bit, checkpoints that survive a crash, refusals, the log."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from tiny_road import SCRIPTS

from minirlhf.model import GPT, ScalarModel
from minirlhf.tokenizer import Tokenizer
from minirlhf.plumbing import checkpoints, runs
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import write_atomically
from minirlhf.plumbing.checkpoints import build_model, load_checkpoint, load_model
from minirlhf.plumbing.devices import pick_device, pick_dtype
from minirlhf.plumbing.folders import changed_settings
from minirlhf.plumbing.runs import Run, start_run
from minirlhf.look import plot


def same(a, b):
    """Equal to the bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def logged(folder):
    """metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k != "tok_per_s"} for row in rows]


# ---------------------------------------------------------------- resuming

def interrupt(monkeypatch, last_step):
    """Ctrl-C just after the row of `last_step` was logged, and so before its checkpoint."""
    log = Run.log

    def log_and_stop(self, *args, **metrics):
        log(self, *args, **metrics)
        if self.step == last_step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", log_and_stop)


@pytest.mark.parametrize("stage, options", [
    *((stage, dict(dtype=dtype)) for stage in SCRIPTS for dtype in ("float32", "auto")),
    ("pretrain", dict(dropout=0.2)), ("sft", dict(micro_batch_size=3)),
    ("sft", dict(dtype="float16")),  # the loss scale has to come back too
    ("ppo", dict(share_critic=True)), ("ppo", dict(kl_target=0.5)), ("ppo", dict(num_epochs=1)),
])
def test_a_resumed_run_equals_one_that_was_never_stopped(stage, options, road, tmp_path,
                                                         monkeypatch):
    """Bugs: a lost random state, optimizer or schedule; an adapted beta that starts from its old
    value; rows that stand in the log twice."""
    options = {**options, "eval_every": 1, "save_every": 2}
    options.update({"num_steps": 5} if stage in ("pretrain", "ppo") else {})
    full = road.run(stage, tmp_path / "full", **options)
    with monkeypatch.context() as patch:
        interrupt(patch, last_step=4)
        with pytest.raises(KeyboardInterrupt):
            road.run(stage, tmp_path / "cut", **options)
    assert load_checkpoint(tmp_path / "cut")["step"] == 2 and len(logged(tmp_path / "cut")) == 4
    resumed = road.run(stage, tmp_path / "cut", resume=True, **options)

    assert logged(tmp_path / "cut") == logged(tmp_path / "full")
    assert [row["step"] for row in resumed] == [row["step"] for row in full]
    a, b = load_checkpoint(tmp_path / "full"), load_checkpoint(tmp_path / "cut")
    for ckpt in (a, b):  # they differ in out and resume, and in the clock's numbers in the log
        ckpt.pop("config"), ckpt.pop("sizes")
    assert any(name.startswith("optimizer") for name in a)
    for name in a:
        assert same(a[name], b[name]), name


def test_resuming_a_finished_run_changes_nothing(road, tmp_path):
    road.run("sft", tmp_path)
    before = load_checkpoint(tmp_path)["model"], logged(tmp_path)
    road.run("sft", tmp_path, resume=True)
    assert same(before, (load_checkpoint(tmp_path)["model"], logged(tmp_path)))


def test_a_resumed_run_keeps_its_options_but_may_change_its_device(road, tmp_path):
    road.run("sft", tmp_path, dtype="float32")
    with pytest.raises(UserError, match="lr was 0.001, is 0.5"):
        road.run("sft", tmp_path, dtype="float32", resume=True, lr=0.5)
    road.run("sft", tmp_path, dtype="float32", resume=True, device="cpu", threads=0)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_no_other_option_may_change_in_a_resumed_run(stage, road, tmp_path):
    """Bug: the loss's precision, or the number of steps and so the schedule, changes on the way."""
    old = vars(road.config(stage, tmp_path))
    for name, value in old.items():
        longer = name == {"pretrain": "num_steps", "ppo": "num_steps"}.get(stage, "num_epochs")
        may_change = longer or name in ("resume", "overwrite", "device", "threads", "out",
                                        "tensorboard", "data")
        for new in (value + 1, value - 1) if isinstance(value, (int, float)) else (value + "x",):
            assert changed_settings(old, {**old, name: new}, {"data": "its hash"}) == (
                "" if may_change and (not longer or new > value) else
                f"{name} was {value!r}, is {new!r}")


def test_the_seed_reaches_sampling_shuffling_and_new_weights(road, tmp_path):
    for seed in (3, 4):
        run = start_run(road.config("sft", tmp_path / str(seed), seed=seed), {"init": "pretrain"})
        assert run.generator.initial_seed() == run.data_order.initial_seed() == seed
        assert torch.initial_seed() == seed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_matrix_products_are_in_the_dtype_that_was_asked_for(dtype, road, tmp_path):
    run = start_run(road.config("sft", tmp_path, dtype=dtype), {"init": "pretrain"})
    with run.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, dtype)
    assert run.scaler.is_enabled() == (dtype == "float16")  # its gradients would underflow
    assert run.scaler.get_scale() == (1024 if dtype == "float16" else 1)  # more would overflow


def test_tokens_per_second_are_those_since_the_last_line(road, tmp_path, monkeypatch):
    clock = iter([100.0, 104.0, 104.0, 106.0, 106.0])  # two looks for each line
    run = start_run(road.config("sft", tmp_path), {"init": "pretrain"})
    monkeypatch.setattr(runs.time, "time", lambda: next(clock))
    run._clock = runs.time.time()
    run.restore(2)
    for run.step in (1, 2):
        run.log(1000)
    assert [row["tok_per_s"] for row in run.history] == [250, 500]


def test_resume_needs_a_run(road, tmp_path):
    with pytest.raises(UserError, match="--resume: .* holds no run to go on with; leave --resume out"):
        road.run("sft", tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- folders

def test_a_folder_in_use_is_refused(road, tmp_path):
    road.run("sft", tmp_path)
    with pytest.raises(UserError, match="already holds a run; give --resume .* --overwrite"):
        road.run("sft", tmp_path)
    with pytest.raises(UserError, match="give one of them"):
        road.run("sft", tmp_path, resume=True, overwrite=True)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is a file"):
        road.run("sft", tmp_path / "file")


def test_overwrite_starts_anew_and_touches_only_the_runs_files(road, tmp_path):
    road.run("sft", tmp_path)
    first = logged(tmp_path)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "notes.txt").write_text("mine, too", encoding="utf-8")
    (tmp_path / "ledger" / "step_notes.md").write_text("mine, too", encoding="utf-8")  # this one was lost
    for stale in ("ledger/step_000099.json", "microscope.html"):  # of the run that was there
        (tmp_path / stale).write_text("old", encoding="utf-8")
    road.run("sft", tmp_path, overwrite=True)
    assert logged(tmp_path) == first  # not twice
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "config.json", "run.json", "metrics.jsonl", "samples.txt", "ckpt.pt", "curves.png", ".lock",
        "model.safetensors", "notes.txt", "ledger/notes.txt", "ledger/step_notes.md"}
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_mistake_leaves_the_folder_as_it_was(stage, road, tmp_path):
    """Bugs: a typing error in --data claimed the folder, so that the mended command was refused;
    with --overwrite it deleted the run that was there."""
    data = {"pretrain": "text", "ppo": "prompts"}.get(stage, "data")
    with pytest.raises(UserError, match="no such file"):
        road.run(stage, tmp_path / "run", **{data: str(tmp_path / "typo.jsonl")})
    assert not (tmp_path / "run").exists()
    road.run(stage, tmp_path / "run")
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    with pytest.raises(UserError, match="no such file"):
        road.run(stage, tmp_path / "run", overwrite=True, **{data: str(tmp_path / "typo.jsonl")})
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before


# ---------------------------------------------------------------- checkpoints

def test_a_checkpoint_holds_all_that_anyone_needs(road):
    ckpt = load_checkpoint(road.folder / "rm")
    assert isinstance(build_model(ckpt), ScalarModel) and ckpt["config"]["lr"] == 2e-3
    assert Tokenizer.from_dict(ckpt["tokenizer"]).fingerprint() == road.tokenizer.fingerprint()
    model, tokenizer = load_model(road.folder / "sft")
    assert isinstance(model, GPT) and not model.training
    assert tokenizer.n_vocab == model.cfg.vocab_size


def test_a_crash_while_saving_leaves_the_old_checkpoint(road, tmp_path, monkeypatch):
    """Bug: half a file where the only checkpoint was."""
    road.run("sft", tmp_path)
    before = load_checkpoint(tmp_path)["model"]

    def half(ckpt, file):
        file.write(b"PK half of a")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", half)
    message = "ckpt_new.pt cannot be written .no space left on device.; make room"
    with pytest.raises(UserError, match=message):
        road.run("sft", tmp_path / "other")
    assert not list((tmp_path / "other").glob("*.pt*"))
    run = start_run(road.config("sft", tmp_path, resume=True), {"init": "pretrain"}, ["data"])
    run.restore(9)
    with pytest.raises(UserError, match=message):
        run.save(run.model("init"))
    assert same(load_checkpoint(tmp_path)["model"], before)


def test_write_atomically_replaces_a_file_only_when_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, lambda part: part.write_text("old", encoding="utf-8"))
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda part: part.write_text("half of the new one", encoding="utf-8") / 0)
    assert path.read_text(encoding="utf-8") == "old"


class Bomb:
    """What an attacker puts into a pickle: unpickling it runs code of their choice."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [
    lambda bomb, path: torch.save({"model": bomb, "kind": "gpt"}, path),
    lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
def test_a_checkpoint_from_a_stranger_runs_no_code(write, tmp_path):
    victim = tmp_path / "harmed"
    write(Bomb(victim), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path)
    assert not victim.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(keep, road, tmp_path):
    whole = (road.folder / "sft" / "ckpt.pt").read_bytes()
    count = keep if isinstance(keep, int) else int(keep * len(whole))
    (tmp_path / "ckpt.pt").write_bytes(whole[:count])
    with pytest.raises(UserError, match="cannot be read, it is damaged or cut short"):
        load_checkpoint(tmp_path)


def test_other_files_and_other_kinds_are_refused(road, tmp_path):
    torch.save({"model": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="is no checkpoint of minirlhf"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="holds a scalar model, a gpt model is needed"):
        load_checkpoint(road.folder / "rm", kind="gpt")
    with pytest.raises(UserError, match="out/sft/ckpt.pt does not exist; make it with: python "):
        load_checkpoint(tmp_path / "out" / "sft")
    with pytest.raises(UserError, match="does not exist; check the path"):
        load_checkpoint(tmp_path / "mine")


# ---------------------------------------------------------------- preflight

def test_preflight_leaves_random_states_weights_and_gradients_as_they_were(road, tmp_path):
    """Bug: a check at the start that changes every number of the run."""
    run = start_run(road.config("sft", tmp_path), {"init": "pretrain"})
    model = run.model("init")

    def states():
        return (run.generator.get_state(), torch.get_rng_state(), run.data_order.get_state(),
                {name: p.clone() for name, p in model.state_dict().items()})

    before, seen = states(), []
    run.preflight(model, lambda: model(torch.tensor([[1, 2]])) * torch.rand(1),
                  [lambda: seen.append((torch.rand(3, generator=run.generator),
                                        torch.is_grad_enabled()))], options="--batch_size")
    assert same(before, states()) and [grad for _, grad in seen] == [False]
    assert all(p.grad is None for p in model.parameters())


def test_preflight_turns_a_lack_of_memory_into_advice(road, tmp_path):
    run = start_run(road.config("sft", tmp_path), {"init": "pretrain"})

    def fail(error):
        raise error

    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")):
        for kinds in ((lambda: fail(error),), (lambda: torch.ones(1), [lambda: fail(error)])):
            with pytest.raises(UserError, match="not fit in the memory of cpu; make --batch_size "):
                run.preflight(run.model("init"), *kinds, options="--batch_size")
    with pytest.raises(RuntimeError, match="shapes"):
        run.preflight(run.model("init"), lambda: fail(RuntimeError("shapes differ")),
                      options="--batch_size")


@pytest.mark.parametrize("stage, options", [
    ("pretrain", {}), ("sft", {}), ("rm", {}), ("dpo", {}), ("ppo", {}),
    ("ppo", {"share_critic": True})])
def test_each_script_tries_its_largest_batch_first_and_leaves_no_gradient(stage, options, road,
                                                                          tmp_path, monkeypatch):
    """A lack of memory on the longest row would otherwise show after an hour."""
    events, preflight, restore = [], Run.preflight, Run.restore

    def spy(self, model, train, also=(), *, options):
        assert all(word.startswith("--") for word in options.replace(",", "").replace(
            " or", "").split())
        preflight(self, model, train, also, options=options)
        events.append("preflight")

    def check(self, num_steps, **parts):
        events.append("restore")
        assert all(p.grad is None for part in parts.values() if isinstance(part, torch.nn.Module)
                   for p in part.parameters())
        return restore(self, num_steps, **parts)

    monkeypatch.setattr(Run, "preflight", spy)
    monkeypatch.setattr(Run, "restore", check)
    road.run(stage, tmp_path, **options)
    assert events == ["preflight", "restore"]


# ---------------------------------------------------------------- small things

def test_the_log_prints_a_line_and_keeps_the_numbers(road, tmp_path, capsys):
    run = start_run(road.config("sft", tmp_path), {"init": "pretrain"})
    run.restore(10)
    run.step = 3
    run.log(500, loss=torch.tensor(0.5), lr=1e-5, grad_norm=1234.5)
    run.show("  user: cow?\n  model: moo.")
    out = capsys.readouterr().out
    assert "step 3/10 | loss 0.500 | lr 1e-05 | grad_norm 1.23e+03 | " in out and "tok/s" in out
    assert logged(tmp_path) == [{"step": 3, "loss": 0.5, "lr": 1e-5, "grad_norm": 1234.5}]
    assert "model: moo." in (tmp_path / "samples.txt").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["batch_size"] == 8


def test_device_and_dtype_by_name():
    assert pick_device("cpu").type == "cpu"
    assert pick_dtype("float32", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(UserError, match="expected auto, float32, bfloat16, float16"):
        pick_dtype("float8", torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without CUDA")
def test_a_missing_gpu_is_named():
    with pytest.raises(UserError, match="sees no CUDA device; use --device cpu"):
        pick_device("cuda")


def test_models_of_two_vocabularies_are_not_mixed(road, tmp_path):
    """Bug: the same id means two words, and the reward model scores another text than was said."""
    tokenizer = Tokenizer.train(road.text.read_text(encoding="utf-8"), 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    road.run("pretrain", tmp_path / "pretrain", tokenizer=str(tmp_path / "tokenizer.json"))
    road.run("sft", tmp_path / "sft", init=str(tmp_path / "pretrain"))
    with pytest.raises(UserError, match="another vocabulary than --init"):
        road.run("ppo", tmp_path / "ppo", init=str(tmp_path / "sft"))


def test_pictures_of_runs(road, tmp_path, capsys):
    road.run("sft", tmp_path / "sft")
    plot.main([str(road.folder / "rm"), str(tmp_path / "sft"), "--save", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path / "nothing")])
    assert stop.value.code == 2 and "holds no metrics" in capsys.readouterr().err


def test_a_picture_without_a_name_lies_where_one_stands(road, tmp_path, monkeypatch):
    road.run("sft", tmp_path / "sft", ledger_every=1)
    monkeypatch.chdir(tmp_path)
    plot.main(["sft"])
    plot.main(["sft", "--step", "1"])
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["runs.png", "sequence.png"]


def test_what_is_due_comes_every_so_many_steps_and_after_the_last():
    """Bug: a run whose last step is no multiple ends without its last evaluation and checkpoint."""
    assert [step for step in range(1, 12) if runs.due(step, 4, 11)] == [4, 8, 11]
    assert [step for step in range(1, 9) if runs.due(step, 4, 8)] == [4, 8]
    assert [step for step in range(1, 4) if runs.due(step, 100, 3)] == [3]
