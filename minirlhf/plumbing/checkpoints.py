"""Checkpoints: one file with all that anyone needs to go on from a model, written so that neither a
crash nor a full disk can take the one before.

The last two are kept: ckpt.pt and ckpt_previous.pt. A file is PyTorch's own (a zip of plain
values and tensors), whose checksums are verified before anything is believed. It holds "kind" (gpt
or scalar), "model", "model_config", "tokenizer", and what a resumed run needs beside them.
"""

import dataclasses
import hashlib
import os
import zipfile
from pathlib import Path

import torch

from minirlhf.model import GPT, ModelConfig, ScalarModel
from minirlhf.tokenizer import Tokenizer
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import flush, how_to_make, write_atomically, writing

FORMAT = 2  # of the file; 1 had no such number, no inputs and no random states of the device
KEYS = {"kind", "model", "model_config", "tokenizer"}  # what a next stage needs at least
NAMES = ("ckpt.pt", "ckpt_previous.pt")  # the newest first


def verify(path):
    """Raise BadZipFile where a file's content doesn't have the checksums that stand beside it."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def read_checkpoint(path):
    """Read a checkpoint file as a dict; UserError where it is damaged or holds anything else.

    PyTorch reads a flipped bit without a word, so the checksums of the zip are verified first.
    `weights_only=True`: a checkpoint from a stranger can hold tensors and plain values, no code.
    """
    try:
        verify(path)
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file the loader may trip over anything
        reason = str(error).partition("\n")[0][:80] or "it ends too early"
        raise UserError(f"{path} cannot be read, it is damaged or cut short ({reason})") from None
    if not isinstance(ckpt, dict) or not KEYS <= set(ckpt):
        raise UserError(f"{path} is no checkpoint of minirlhf: it lacks one of "
                        f"{', '.join(sorted(KEYS))}")
    if ckpt.get("format", 1) not in (1, FORMAT):
        raise UserError(f"{path} has format {ckpt['format']!r}, this version reads up to {FORMAT}; "
                        "use a newer minirlhf")
    return ckpt


def load_checkpoint(folder, stage=None, kind=None):
    """Read folder/ckpt.pt (or a path to a .pt file) as a dict, checked: a model can be built of it.

    stage: the one that makes it, such as "sft", for the message where it is missing; without it the
    folder's name tells the stage, if it is one. kind: "gpt" or "scalar", what the caller needs.
    """
    path = Path(folder) if str(folder).endswith(".pt") else Path(folder) / "ckpt.pt"
    how = how_to_make(stage or path.parent.name)
    if not path.exists():
        raise UserError(f"{path} does not exist{how}")
    try:
        ckpt = read_checkpoint(path)
        if kind and ckpt["kind"] != kind:
            raise UserError(f"{path} holds a {ckpt['kind']} model, a {kind} model is needed")
        check_model(ckpt, path)
    except UserError as error:
        raise UserError(f"{error}{how}") from None
    return ckpt


def check_model(ckpt, path):
    """Refuse a checkpoint whose weights don't fit its own config, or are no numbers."""
    state = ckpt["model"]
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"{path}: expected a dict of tensors under model")
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite numbers")
    fields = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    config = ckpt["model_config"]
    if not isinstance(config, dict) or not config.keys() <= fields.keys():
        raise UserError(f"{path}: model_config is no config of this version's model")
    for name, value in config.items():
        good = type(value) in (fields[name], int) and (fields[name] is not int or value >= 0)
        if not good or (name == "n_layer" and value > len(state)):  # each layer has its tensors
            raise UserError(f"{path}: model_config has {name} {value!r}")
    try:
        with torch.device("meta"):  # shapes without memory: the config may name any size
            expected = empty_model(ckpt).state_dict()
    except (UserError, RuntimeError, ZeroDivisionError, KeyError) as error:
        raise UserError(f"{path}: no model can be built of its model_config ({error})") from None
    for name in sorted(expected.keys() | state.keys()):
        shapes = [tuple(d[name].shape) if name in d else "missing" for d in (expected, state)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path}: {name} is {shapes[1]}, its model_config makes it {shapes[0]}")
    n_vocab = open_tokenizer(ckpt, path).n_vocab
    if n_vocab != expected["trunk.wte.weight"].shape[0]:
        raise UserError(f"{path}: its tokenizer has {n_vocab} tokens, its embedding "
                        f"{expected['trunk.wte.weight'].shape[0]}")


def open_tokenizer(ckpt, path="the checkpoint"):
    """The tokenizer in a checkpoint."""
    try:
        return Tokenizer.from_dict(ckpt["tokenizer"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def empty_model(ckpt):
    """A model of the checkpoint's kind and shape, untrained."""
    cfg = ModelConfig(**ckpt["model_config"])
    return {"gpt": GPT, "scalar": ScalarModel}[ckpt["kind"]](cfg)


def build_model(ckpt):
    """The model in a checkpoint: a GPT or a ScalarModel."""
    model = empty_model(ckpt)
    model.load_state_dict(ckpt["model"])
    return model


def load_model(folder, kind="gpt", device="cpu"):
    """(model, tokenizer) of a run's folder, ready to evaluate."""
    ckpt = load_checkpoint(folder, kind=kind)
    return build_model(ckpt).to(device).eval(), open_tokenizer(ckpt)


def frozen(model):
    """Switch gradients and dropout off for good: for a reference or a reward model."""
    return model.eval().requires_grad_(False)


def weights_hash(ckpt):
    """SHA-256 of what a next stage reads of a checkpoint: weights, their names, the tokenizer.

    Not of the file: that a run was resumed on the way stands in it, and changes nothing.
    """
    digest = hashlib.sha256(repr(sorted(ckpt["model_config"].items())).encode())
    digest.update(open_tokenizer(ckpt).fingerprint().encode())
    for name, value in sorted(ckpt["model"].items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(value, path):
    """torch.save, but with an OSError where the disk is full."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # "unexpected pos", says PyTorch's writer of a failed write
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else OSError(str(error)) from None


def save_checkpoint(folder, ckpt):
    """Write folder/ckpt.pt; the one before becomes ckpt_previous.pt.

    The new one is whole and on the disk before anything is renamed, and at any moment one of the
    two names holds a whole checkpoint.
    """
    newest, previous = (Path(folder) / name for name in NAMES)
    fresh = newest.with_name("ckpt_new.pt")

    def write(part):
        save_tensors({"format": FORMAT, **ckpt}, part)
        try:
            verify(part)
        except zipfile.BadZipFile as error:
            raise OSError(f"it did not reach the disk as it was: {error}") from None

    write_atomically(fresh, write)
    with writing(newest):
        if newest.exists():
            os.replace(newest, previous)
        os.replace(fresh, newest)
        flush(folder)


def newest_whole(folder):
    """(checkpoint, note): the newest of a run's that can be read; note says what is wrong with a
    newer one, or is "". (None, "") where there is none at all."""
    notes = []
    for name in NAMES:
        path = Path(folder) / name
        if not path.exists():
            continue
        try:
            ckpt = read_checkpoint(path)
            check_model(ckpt, path)
            return ckpt, "; ".join(notes)
        except UserError as error:
            notes.append(str(error))
    if notes:
        raise UserError(f"{'; '.join(notes)}; no whole checkpoint is left, start anew with "
                        "--overwrite")
    return None, ""
