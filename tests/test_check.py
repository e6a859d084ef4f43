"""`python -m minirlhf.look.check`: what a folder claims, verified."""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from test_checkpoints import flip
from tiny_road import SCRIPTS

from minirlhf.look import check
from minirlhf.plumbing.config import parse_config


@pytest.fixture
def told(road, tmp_path, capsys):
    """told(change) -> (exit code, text) after the change was made to a finished run's folder."""
    shutil.copy(road.preferences, tmp_path / "preferences.jsonl")
    folder = tmp_path / "rm"
    road.run("rm", folder, data=str(tmp_path / "preferences.jsonl"), save_every=2, ledger_every=2)

    def tell(change=None):
        if change:
            change(folder)
        capsys.readouterr()
        try:
            check.main([str(folder)])
            return 0, capsys.readouterr().out
        except SystemExit as stop:
            captured = capsys.readouterr()
            return stop.code, captured.out + captured.err

    return tell


def test_a_whole_run_and_the_command_that_repeats_it(told, tmp_path):
    code, text = told()
    assert code == 0 and text.endswith(f"{tmp_path / 'rm'} holds what it claims\n")
    assert "ckpt.pt: whole, step 5 of 5, finished" in text and "ckpt_previous.pt: whole" in text
    assert "metrics.jsonl: 3 rows, up to step 5" in text and "ledger: 3 records" in text
    assert f"torch {torch.__version__}" in text and "commit" in text
    line = next(line for line in text.splitlines() if line.startswith("to repeat it: "))
    python, script, *words = shlex.split(line.removeprefix("to repeat it: "))
    settings = json.loads((tmp_path / "rm" / "config.json").read_text(encoding="utf-8"))
    assert vars(parse_config(SCRIPTS["rm"].Config, words)) == {**settings, "overwrite": True}


CHANGES = {
    "ckpt.pt cannot be read": lambda folder: flip(folder / "ckpt.pt"),
    "holds no whole checkpoint": lambda folder: [path.unlink() for path in folder.glob("ckpt*")],
    "config.json says lr 0.5, the checkpoint 0.001": lambda folder: edit(folder, lr=0.5),
    "metrics.jsonl is shorter": lambda folder: cut(folder / "metrics.jsonl"),
    "its steps don't rise": lambda folder: (folder / "metrics.jsonl").write_text(
        (folder / "metrics.jsonl").read_text(encoding="utf-8") * 2, encoding="utf-8"),
    "metrics.jsonl, line 1: expected": lambda folder: (folder / "metrics.jsonl").write_text(
        "{]\n" * 99, encoding="utf-8"),
    "--data": lambda folder: cut(folder.parent / "preferences.jsonl"),
    "preferences.jsonl: no such file": lambda folder: (
        folder.parent / "preferences.jsonl").unlink(),
    "holds no run": lambda folder: (folder / "config.json").unlink(),
    "config.json: expected the options": lambda folder: cut(folder / "config.json"),
    "run.json: expected what a run says": lambda folder: (folder / "run.json").write_text("{}", encoding="utf-8"),
    "run.json: no such file": lambda folder: (folder / "run.json").unlink(),
}


def edit(folder, **changes):
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**settings, **changes}), encoding="utf-8")


def cut(path):
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")


@pytest.mark.parametrize("words", CHANGES)
def test_each_fault_is_named(words, told):
    code, text = told(CHANGES[words])
    assert code == 2 and words in text and "error: " in text
    assert "holds what it claims" not in text


def test_a_damaged_ledger_is_named(told, tmp_path):
    path = tmp_path / "rm" / "ledger" / "step_000002.npz"
    with np.load(path) as arrays:
        assert arrays.files
    code, text = told(lambda _: path.write_bytes(path.read_bytes()[:100]))
    assert code == 2 and "step_000002" in text
