"""A run's folder: what is refused, what a run remembers, how it goes on."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crash_test import fingerprints
from tiny_road import SCRIPTS

from minirlhf.plumbing.checkpoints import load_checkpoint
from minirlhf.plumbing.config import parse_config
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import lock
from minirlhf.plumbing.runs import Run

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------- files that are somebody's

@pytest.mark.parametrize("name, content", [
    ("samples.txt", "my samples"), ("metrics.jsonl", "{}\n"), ("curves.png", "a picture"),
    ("ckpt.pt", "somebody's"), ("config.json", '{"architectures": ["LlamaForCausalLM"]}'),
    ("model.safetensors", "weights"), ("run.json", "{}")])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_what_no_run_wrote_is_never_replaced(name, content, options, road, tmp_path):
    """Bug: a run into a folder of a person's own notes deleted them, without --overwrite."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="which no run wrote there|holds no run to go on with"):
        road.run("sft", tmp_path, **options)
    assert (tmp_path / name).read_text(encoding="utf-8") == content and len(list(tmp_path.iterdir())) == 1


def test_other_files_are_left_alone(road, tmp_path):
    for name in ("notes.txt", "ledger/step_notes.md", "ledger/step_000001.txt", "data.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine", encoding="utf-8")
    road.run("sft", tmp_path)
    road.run("sft", tmp_path, overwrite=True)
    for name in ("notes.txt", "ledger/step_notes.md", "ledger/step_000001.txt", "data.jsonl"):
        assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


def test_an_out_without_a_name_or_without_room_is_refused_first(road, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--out is empty; give the name of a folder"):
        road.run("sft", "")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="can't be a folder, since .*file is a file"):
        road.run("sft", tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="run can't be written; give another place"):
        road.run("sft", tmp_path / "run", init="never looked at")


@pytest.mark.parametrize("init", ["run", "run/ckpt.pt", "other/../run"])
def test_a_run_does_not_replace_what_it_starts_from(init, road, tmp_path):
    """Bug: --init X/ckpt.pt --out X --overwrite evaded the guard."""
    road.run("sft", tmp_path / "run")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="the run would replace what it starts from"):
        road.run("sft", tmp_path / "run", overwrite=True, init=str(tmp_path / init))


def test_a_run_that_is_being_replaced_never_looks_finished(road, tmp_path, monkeypatch):
    """Bug: killed while it began anew, a run had its new config and its old, finished checkpoint,
    from which --resume then went on."""
    road.run("sft", tmp_path, num_epochs=1)
    removed = []
    unlink = Path.unlink

    def die_after_the_first(path, **options):
        if removed:
            raise KeyboardInterrupt
        removed.append(path.name)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", die_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        road.run("sft", tmp_path, num_epochs=1, overwrite=True)
    assert removed == ["ckpt.pt"]


@pytest.mark.parametrize("again", [False, True])
def test_a_run_killed_while_it_claims_its_folder_can_be_started_again(again, road, tmp_path,
                                                                      monkeypatch):
    """Bug: killed between two of its first files, a run left a folder that was then taken for
    somebody's, with --overwrite too."""
    if again:
        road.run("sft", tmp_path, save_every=2)
    for method in ("unlink", "write_bytes"):
        for nth in range(1, 12):
            calls, original = [], getattr(Path, method)

            def dying(path, *args, **options):
                calls.append(path)
                if len(calls) == nth:
                    raise KeyboardInterrupt
                return original(path, *args, **options)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Path, method, dying)
                patch.setattr(Run, "steps", lambda self: pytest.fail("stop"))
                try:
                    road.run("sft", tmp_path, overwrite=True)
                except pytest.fail.Exception:  # it got through: nothing left to interrupt
                    raise KeyboardInterrupt from None
    road.run("sft", tmp_path, overwrite=True)


# ---------------------------------------------------------------- one run at a time

HOLD = """
import sys, time
from pathlib import Path
from minirlhf.plumbing.files import lock
from minirlhf.plumbing.runs import Run
held = lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_while_the_first_lives(road, tmp_path):
    """Bug: two runs into one folder mix their metrics, and one of them dies."""
    road.run("sft", tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], cwd=ROOT,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"held"
    before = fingerprints(tmp_path)
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match="is in use by another run, which is still at work"):
            road.run("sft", tmp_path, **options)
    assert fingerprints(tmp_path) == before
    process.kill()  # the system frees the lock, whatever the end
    process.wait()
    road.run("sft", tmp_path, overwrite=True)
    lock(tmp_path / ".lock")


# ---------------------------------------------------------------- what a run remembers

@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm", "dpo", "ppo"])
def test_a_run_does_not_go_on_with_other_data(stage, road, tmp_path):
    """Bug: with a data file cut from 200 to 40 rows it ran no step and ended with 0; with 90, it
    went on with other batches and another held-out split."""
    option = {"pretrain": "text", "ppo": "prompts"}.get(stage, "data")
    path = tmp_path / Path(getattr(road.config(stage, ""), option)).name
    shutil.copy(getattr(road.config(stage, ""), option), path)
    road.run(stage, tmp_path / "run", **{option: str(path)})
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("cow", "cat", 1), encoding="utf-8")
    with pytest.raises(UserError, match=f"--{option} .* is not what the run in .* began with"):
        road.run(stage, tmp_path / "run", resume=True, **{option: str(path)})
    path.write_text(text, encoding="utf-8")
    road.run(stage, tmp_path / "run", resume=True, **{option: str(path)})


def test_a_run_does_not_go_on_from_retrained_models_or_another_judge(road, tmp_path):
    """Bug: after retraining SFT, PPO went on against another reference."""
    for name in ("sft", "rm"):
        shutil.copytree(road.folder / name, tmp_path / name)
    shutil.copy(road.tools, tmp_path / "tools.py")
    options = dict(init=str(tmp_path / "sft"), reward_model=str(tmp_path / "rm"),
                   judge=f"{tmp_path / 'tools.py'}:judge")
    road.run("ppo", tmp_path / "ppo", **options)
    for name, option in (("sft", "init"), ("rm", "reward_model")):
        path = tmp_path / name / "ckpt.pt"
        whole = path.read_bytes()
        ckpt = load_checkpoint(tmp_path / name)
        ckpt["model"]["trunk.blocks.0.mlp.up.weight"][0, 0] += 1e-3
        torch.save(ckpt, path)
        with pytest.raises(UserError, match=f"--{option} .* is not what the run in .* began with"):
            road.run("ppo", tmp_path / "ppo", resume=True, **options)
        path.write_bytes(whole)
    (tmp_path / "tools.py").write_text(road.tools.read_text(encoding="utf-8") + "# kinder now\n", encoding="utf-8")
    with pytest.raises(UserError, match="--judge .* is not what the run in .* began with"):
        road.run("ppo", tmp_path / "ppo", resume=True, **options)


def test_a_run_says_what_it_read_and_with_what(road, tmp_path):
    road.run("ppo", tmp_path, judge=f"{road.tools}:judge")
    claims = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert claims["versions"]["torch"] == torch.__version__.partition("+")[0] or (
        claims["versions"]["torch"] == torch.__version__)
    assert set(claims["inputs"]) == {"init", "reward_model", "prompts", "judge"}
    assert all(len(digest) == 64 for digest in claims["inputs"].values())
    assert claims["inputs"] == load_checkpoint(tmp_path)["inputs"]


# ---------------------------------------------------------------- going on

def typed(stage, *words):
    return parse_config(SCRIPTS[stage].Config, list(map(str, words)))


def test_a_run_is_resumed_by_its_name_alone(road, tmp_path, monkeypatch):
    """Bug: each option had to be typed again; X/ with a slash was another option than X."""
    options = dict(dtype="float32", lr=3e-3, num_epochs=2, eval_every=1, save_every=1)
    road.run("sft", tmp_path / "whole", **options)
    road.run("sft", tmp_path / "run", **options)
    ckpt = load_checkpoint(tmp_path / "run")
    cfg = typed("sft", "--resume", "--out", tmp_path / "run")
    assert dataclasses.asdict(cfg) == {**ckpt["config"], "resume": True}
    monkeypatch.chdir(tmp_path)
    shutil.copy("run/ckpt_previous.pt", "run/ckpt.pt")  # as it was a step before the end
    shutil.move("run", "moved")
    for out in ("moved/", "./moved", str(tmp_path / "moved")):
        cfg = typed("sft", "--resume", "--out", out)
        assert (cfg.lr, cfg.num_epochs, cfg.out) == (3e-3, 2, out)
    SCRIPTS["sft"].main(cfg)
    assert fingerprints("moved") == fingerprints("whole")
    with pytest.raises(UserError, match="lr was 0.003, is 0.5"):
        SCRIPTS["sft"].main(typed("sft", "--resume", "--out", "moved", "--lr", "0.5"))
    # Another way of writing the same path is the same input.
    cfg = typed("sft", "--resume", "--out", "moved", "--data",
                os.path.relpath(road.demonstrations))
    assert SCRIPTS["sft"].main(cfg)


@pytest.mark.parametrize("stage, length", [("pretrain", "num_steps"), ("sft", "num_epochs"),
                                           ("rm", "num_epochs"), ("ppo", "num_steps"),
                                           ("dpo", "num_epochs")])
def test_a_run_may_be_made_longer(stage, length, road, tmp_path, capsys):
    """It has seen the batches that the longer run sees first; then it follows its schedule."""
    base = getattr(road.config(stage, tmp_path), length)
    options = dict(dtype="float32", lr=1e-3, eval_every=1)
    short = road.run(stage, tmp_path, **options)
    with pytest.raises(UserError, match=f"{length} was {base}, is {base - 1}"):
        road.run(stage, tmp_path, resume=True, **{**options, length: base - 1})
    capsys.readouterr()
    try:
        longer = road.run(stage, tmp_path, resume=True, **{**options, length: base + 1})
    except UserError as error:
        pytest.fail(f"it was refused: {error}")
    assert f"--{length} was {base}, is {base + 1}: from here on the learning rate follows" in (
        capsys.readouterr().out)
    assert longer[: len(short)] == short and len(longer) > len(short)
    ckpt = load_checkpoint(tmp_path)
    assert ckpt["done"] and ckpt["step"] == ckpt["num_steps"] == longer[-1]["step"]


def test_a_longer_runs_first_steps_are_the_same(road, tmp_path):
    """So that going on with more epochs trains on what the longer run would have trained on."""
    for stage, length in (("pretrain", "num_steps"), ("sft", "num_epochs"), ("ppo", "num_steps")):
        options = dict(dtype="float32", eval_every=1, final_lr=1.0, warmup=0)
        options = {k: v for k, v in options.items() if k in vars(road.config(stage, ""))}
        if stage == "ppo":
            options["lr"] = options["critic_lr"] = 0.0
        short = road.run(stage, tmp_path / f"{stage}_short", **options, **{length: 2})
        long = road.run(stage, tmp_path / f"{stage}_long", **options, **{length: 3})
        assert [row.get("loss", row.get("score")) for row in short] == pytest.approx(
            [row.get("loss", row.get("score")) for row in long[: len(short)]], rel=1e-6)


def test_resuming_a_finished_run_says_so(road, tmp_path, capsys):
    road.run("rm", tmp_path)
    before = fingerprints(tmp_path)
    capsys.readouterr()
    road.run("rm", tmp_path, resume=True)
    assert "is finished: all its 5 steps are done" in capsys.readouterr().out
    assert fingerprints(tmp_path) == before


@pytest.mark.parametrize("name, content, words", [
    ("metrics.jsonl", None, "metrics.jsonl is shorter than when the checkpoint was written"),
    ("metrics.jsonl", "", "metrics.jsonl is shorter than when the checkpoint was written"),
    ("samples.txt", None, "samples.txt is shorter than when the checkpoint was written"),
    ("config.json", "{", "config.json: expected the options of a run"),
    ("config.json", "[1]", "config.json: expected the options of a run"),
])
def test_a_damaged_folder_is_not_resumed(name, content, words, road, tmp_path):
    road.run("sft", tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        road.run("sft", tmp_path, resume=True)


def test_what_was_written_after_the_checkpoint_is_written_once(road, tmp_path):
    """Bug: a resumed run printed samples a second time; half a line in metrics.jsonl."""
    options = dict(dtype="float32", num_epochs=3, eval_every=1, save_every=4, ledger_every=1)
    road.run("sft", tmp_path / "whole", **options)
    road.run("sft", tmp_path / "run", **options)
    shutil.copy(tmp_path / "run" / "ckpt_previous.pt", tmp_path / "run" / "ckpt.pt")
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 99, "lo')
    with open(tmp_path / "run" / "samples.txt", "a", encoding="utf-8") as file:
        file.write("step 99\n")
    road.run("sft", tmp_path / "run", resume=True, **options)
    assert fingerprints(tmp_path / "run") == fingerprints(tmp_path / "whole")


def test_options_of_a_resumed_run_are_checked(road, tmp_path):
    road.run("sft", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**settings, "lr": "fast"}), encoding="utf-8")
    with pytest.raises(UserError, match="config.json: lr is 'fast', expected a float"):
        typed("sft", "--resume", "--out", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "batch_size": -1}), encoding="utf-8")
    with pytest.raises(UserError, match="--batch_size -1: expected a number above 0"):
        typed("sft", "--resume", "--out", tmp_path)
