"""Checkpoints that survive: two of them, checksums, and nothing believed that isn't checked."""

import os
import shutil
import zipfile

import pytest
import torch
from crash_test import fingerprints
from tiny_road import SCRIPTS

from minirlhf.plumbing import checkpoints
from minirlhf.plumbing.checkpoints import (load_checkpoint, newest_whole, read_checkpoint,
                                           save_checkpoint, weights_hash)
from minirlhf.plumbing.errors import UserError


def flip(path, where=0.5):
    """Turn one bit of a tensor in a checkpoint; where: how far into the largest one."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    start = largest.header_offset
    name, extra = (int.from_bytes(content[start + at : start + at + 2], "little") for at in (26, 28))
    content[start + 30 + name + extra + int(where * (largest.file_size - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_bit_is_found(where, road, tmp_path):
    """Bug: PyTorch loads it without a word, and the model is another one."""
    shutil.copy(road.folder / "sft" / "ckpt.pt", tmp_path)
    load_checkpoint(tmp_path)
    flip(tmp_path / "ckpt.pt", where)
    torch.load(tmp_path / "ckpt.pt", weights_only=True)  # no word
    with pytest.raises(UserError, match="cannot be read, it is damaged .* Bad CRC|checksum"):
        load_checkpoint(tmp_path)


def test_the_last_two_are_kept_and_a_name_always_holds_a_whole_one(road, tmp_path, monkeypatch):
    ckpt = load_checkpoint(road.folder / "sft")
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {**ckpt, "step": step})
    assert [read_checkpoint(tmp_path / name)["step"] for name in checkpoints.NAMES] == [3, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "ckpt_previous.pt"]

    replaced, replace = [], os.replace

    def stop_before(nth):
        def dying(source, target):
            replaced.append(target)
            if len(replaced) == nth:
                raise KeyboardInterrupt
            replace(source, target)
        return dying

    for nth in (1, 2, 3):  # the new one to its own name, the old one aside, the new one in place
        replaced.clear()
        monkeypatch.setattr(os, "replace", stop_before(nth))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, {**ckpt, "step": 10 * nth})
        monkeypatch.undo()
        assert newest_whole(tmp_path)[0]["step"] == 3


def test_a_run_takes_the_older_one_where_the_newest_is_damaged(road, tmp_path, capsys):
    """... and ends like one that was never stopped."""
    options = dict(dtype="float32", num_epochs=4, eval_every=1, save_every=2, ledger_every=1)
    road.run("sft", tmp_path / "whole", **options)
    road.run("sft", tmp_path / "run", **options)
    flip(tmp_path / "run" / "ckpt.pt")
    capsys.readouterr()
    road.run("sft", tmp_path / "run", resume=True, **options)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("resume"))
    assert "ckpt.pt cannot be read" in line and "going on from the older one, of step" in line
    assert fingerprints(tmp_path / "run") == fingerprints(tmp_path / "whole")
    for name in checkpoints.NAMES:
        (tmp_path / "run" / name).write_bytes(b"")
    with pytest.raises(UserError, match="no whole checkpoint is left, start anew with --overwrite"):
        road.run("sft", tmp_path / "run", resume=True, **options)


def test_a_next_stage_takes_no_older_one(road, tmp_path):
    """Bug: the reward model of a step before its scores were measured."""
    shutil.copytree(road.folder / "rm", tmp_path / "rm")
    shutil.copy(tmp_path / "rm" / "ckpt.pt", tmp_path / "rm" / "ckpt_previous.pt")
    flip(tmp_path / "rm" / "ckpt.pt")
    with pytest.raises(UserError, match="rm/ckpt.pt cannot be read"):
        road.run("ppo", tmp_path / "ppo", reward_model=str(tmp_path / "rm"))


def test_an_unfinished_run_is_no_input(road, tmp_path):
    shutil.copytree(road.folder / "rm", tmp_path / "rm")
    ckpt = load_checkpoint(road.folder / "rm")
    save_checkpoint(tmp_path / "rm", {**ckpt, "done": False, "step": 7})
    with pytest.raises(UserError, match="--reward_model .*stands at step 7 of 12; finish it with"):
        road.run("ppo", tmp_path / "ppo", reward_model=str(tmp_path / "rm"))


def test_the_hash_of_weights_is_that_of_what_a_next_stage_reads(road):
    ckpt = load_checkpoint(road.folder / "sft")
    assert weights_hash({**ckpt, "step": 0, "config": {}}) == weights_hash(ckpt)
    for name in ckpt["model"]:
        other = {**ckpt["model"], name: ckpt["model"][name] + 1e-3}
        assert weights_hash({**ckpt, "model": other}) != weights_hash(ckpt)
    assert weights_hash({**ckpt, "model_config": {**ckpt["model_config"], "n_head": 1}}) != (
        weights_hash(ckpt))


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_finished_runs_weights_stand_in_safetensors_too(stage, road, tmp_path):
    from safetensors.torch import load_file

    road.run(stage, tmp_path)
    model, weights = load_checkpoint(tmp_path)["model"], load_file(tmp_path / "model.safetensors")
    assert set(model) - set(weights) <= {"lm_head.weight", "trunk.wte.weight"}  # tied: stored once
    assert weights and all(torch.equal(model[name], weights[name]) for name in weights)


def test_a_checkpoint_of_nan_is_refused(road, tmp_path):
    """Bug: DPO started from one, and trained NaN to its end."""
    ckpt = load_checkpoint(road.folder / "sft")
    ckpt["model"]["trunk.norm_f.weight"][3] = float("nan")
    torch.save(ckpt, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="trunk.norm_f.weight holds NaN or infinite numbers"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [lambda ranks: ranks[:-4], lambda ranks: [*ranks, "abcdefgh"]])
def test_a_tokenizer_of_another_size_than_the_embedding_is_refused(change, road, tmp_path):
    """Bug: with too few tokens, the model samples ids that are no text."""
    ckpt = load_checkpoint(road.folder / "sft")
    ckpt["tokenizer"]["ranks"] = change(ckpt["tokenizer"]["ranks"])
    torch.save(ckpt, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"its tokenizer has \d+ tokens, its embedding 350"):
        load_checkpoint(tmp_path)


def test_a_disk_that_changes_what_is_written_leaves_the_checkpoint_before(road, tmp_path,
                                                                          monkeypatch):
    ckpt, save = load_checkpoint(road.folder / "sft"), checkpoints.save_tensors
    save_checkpoint(tmp_path, {**ckpt, "step": 1})

    def spoil(value, path):
        save(value, path)
        flip(path)

    monkeypatch.setattr(checkpoints, "save_tensors", spoil)
    with pytest.raises(UserError, match="cannot be written .it did not reach the disk as it was"):
        save_checkpoint(tmp_path, {**ckpt, "step": 2})
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
