"""Checkpoints that are damaged, incomplete, of another kind, or from somewhere else."""

import pickle
import shutil
import zipfile

import torch
from malformed import Case, command, write


def changed(stage, change, words, name=None, reader="sft", option="init"):
    """A case: the stage's checkpoint, changed by change(ckpt) and saved again, is read."""
    def argv(road, folder):
        ckpt = torch.load(road.folder / stage / "ckpt.pt", weights_only=True)
        made = change(ckpt)
        ckpt = ckpt if made is None else made
        (folder / stage).mkdir()
        torch.save(ckpt, folder / stage / "ckpt.pt")
        return command(road, reader, folder / "run", **{option: folder / stage})
    return Case(name or words, argv, words)


def raw(name, content, words):
    """A case: a ckpt.pt of these bytes, or of content(road)'s bytes."""
    def argv(road, folder):
        write(folder, "init/ckpt.pt", content(road) if callable(content) else content)
        return command(road, "sft", folder / "run", init=folder / "init")
    return Case(name, argv, words)


def whole(road):
    return (road.folder / "pretrain" / "ckpt.pt").read_bytes()


def flipped(road, place):
    content = bytearray(whole(road))
    content[int(place * len(content))] ^= 16
    return bytes(content)


def without(key):
    return lambda ckpt: {k: v for k, v in ckpt.items() if k != key}


def weight(name, change):
    return lambda ckpt: ckpt["model"].update({name: change(ckpt["model"][name])})


def poke(value):
    """A tensor with one of its numbers replaced."""
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[5] = value
        return tensor
    return change


def config(**changes):
    return lambda ckpt: ckpt["model_config"].update(changes)


def zipped(road):
    import io

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("photo.jpg", "a photo")
    return file.getvalue()


UP = "trunk.blocks.0.mlp.up.weight"
CASES = [
    *(changed("pretrain", without(key), "it lacks one of", f"without {key}")
      for key in ("kind", "model", "model_config", "tokenizer")),
    changed("pretrain", weight(UP, poke(float("nan"))), f"{UP} holds NaN or infinite", "a NaN"),
    changed("pretrain", weight(UP, poke(float("inf"))), f"{UP} holds NaN or infinite", "infinity"),
    changed("sft", weight(UP, poke(float("nan"))), f"{UP} holds NaN or infinite", "a NaN, for DPO",
            reader="dpo"),
    changed("rm", lambda ckpt: ckpt["model"].update(score_std=torch.tensor(float("nan"))),
            "score_std holds NaN", "a reward model that measured NaN", reader="ppo",
            option="reward_model"),
    changed("pretrain", weight(UP, lambda w: w[:-1]), f"{UP} is (47, 32), its model_config makes it",
            "a row too few"),
    changed("pretrain", weight(UP, lambda w: w.T), f"{UP} is (32, 48)", "a matrix transposed"),
    changed("pretrain", lambda ckpt: (ckpt["model"].pop(UP), None)[1], f"{UP} is missing",
            "a matrix missing"),
    changed("pretrain", lambda ckpt: ckpt["model"].update(extra=torch.ones(2)),
            "extra is (2,), its model_config makes it missing", "a tensor too many"),
    changed("pretrain", lambda ckpt: ckpt.update(model=[1, 2]), "expected a dict of tensors"),
    changed("pretrain", lambda ckpt: ckpt["model"].update({UP: 3}), "expected a dict of tensors",
            "a number for a tensor"),
    changed("pretrain", config(n_embd=33), "no model can be built of its model_config (n_embd 33 must be",
            "a width that no head divides"),
    changed("pretrain", config(n_embd=64), "its model_config makes it", "another width"),
    changed("pretrain", config(n_layer=3), "is missing, its model_config makes it", "a layer more"),
    changed("pretrain", config(n_layer=10**9), "model_config has n_layer 1000000000"),
    changed("pretrain", config(n_layer=-1), "model_config has n_layer -1"),
    changed("pretrain", config(n_head=0), "model_config", "no heads"),
    changed("pretrain", config(n_head="two"), "model_config has n_head 'two'"),
    changed("pretrain", config(norm="batch"), "model_config (model option norm is 'batch'"),
    changed("pretrain", config(rope_scaling=2), "model_config is no config of this version's model"),
    changed("pretrain", config(vocab_size=10**15), "model_config", "a vocabulary of 10^15"),
    changed("pretrain", lambda ckpt: ckpt.update(model_config=None), "model_config is no config",
            "no config"),
    changed("pretrain", lambda ckpt: ckpt["tokenizer"].update(ranks=ckpt["tokenizer"]["ranks"][:-5]),
            "its tokenizer has", "a tokenizer smaller than the embedding"),
    changed("pretrain", lambda ckpt: ckpt["tokenizer"]["ranks"].append("abcdefgh"),
            "its tokenizer has", "a tokenizer larger than the embedding"),
    changed("pretrain", lambda ckpt: ckpt.update(tokenizer={}), "not a tokenizer"),
    changed("pretrain", lambda ckpt: ckpt.update(tokenizer=7), "not a tokenizer", "7 as tokenizer"),
    changed("pretrain", lambda ckpt: ckpt["tokenizer"].update(pattern="("), "pattern"),
    changed("pretrain", lambda ckpt: ckpt["tokenizer"].update(special_tokens=["<s>"]),
            "special tokens"),
    changed("pretrain", lambda ckpt: ckpt.update(kind="scalar"), "a gpt model is needed"),
    changed("pretrain", lambda ckpt: ckpt.update(kind="diffusion"), "a gpt model is needed",
            "a kind that there isn't"),
    changed("pretrain", lambda ckpt: ckpt.update(format=99), "has format 99, this version reads"),
    changed("pretrain", lambda ckpt: ckpt.update(done=False, step=3), "stands at step 3 of 150"),
    changed("pretrain", lambda ckpt: [ckpt], "is no checkpoint of minirlhf"),
    changed("pretrain", lambda ckpt: torch.ones(3), "is no checkpoint of minirlhf", "a bare tensor"),
    changed("rm", lambda ckpt: None, "holds a scalar model, a gpt model is needed",
            "a reward model as init"),
    changed("sft", lambda ckpt: None, "holds a gpt model, a scalar model is needed",
            "a policy as reward model", reader="ppo", option="reward_model"),
    raw("an empty file", b"", "cannot be read, it is damaged or cut short"),
    raw("a text", "hello", "cannot be read, it is damaged or cut short"),
    raw("a Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
        "cannot be read"),
    raw("a web page", "<!DOCTYPE html><html>404</html>", "cannot be read"),
    raw("a pickle", pickle.dumps({"model": 1}), "cannot be read"),
    raw("a zip of something else", zipped, "cannot be read"),
    *(raw(f"cut at {share:.0%}", lambda road, share=share: whole(road)[: int(share * len(whole(road)))],
          "cannot be read, it is damaged or cut short") for share in (0.01, 0.3, 0.6, 0.9, 0.999)),
    *(raw(f"a flipped bit at {place:.0%}", lambda road, place=place: flipped(road, place),
          "cannot be read, it is damaged") for place in (0.2, 0.35, 0.5, 0.65)),
    Case("a folder in its place", lambda road, folder: (
        (folder / "init" / "ckpt.pt").mkdir(parents=True),
        command(road, "sft", folder / "run", init=folder / "init"))[1], "cannot be read"),
    Case("none at all", lambda road, folder: command(
        road, "sft", folder / "run", init=folder / "out" / "pretrain"),
        "does not exist; make it with: python train_pretrain.py"),
    Case("another vocabulary than the policy's", lambda road, folder: command(
        road, "ppo", folder / "run", reward_model=other_vocabulary(road, folder)),
        "was trained with another vocabulary than --init"),
]


def other_vocabulary(road, folder):
    """A reward model whose last two tokens have changed places."""
    shutil.copytree(road.folder / "rm", folder / "rm")
    ckpt = torch.load(folder / "rm" / "ckpt.pt", weights_only=True)
    ranks = ckpt["tokenizer"]["ranks"]
    ranks[-1], ranks[-2] = ranks[-2], ranks[-1]
    torch.save(ckpt, folder / "rm" / "ckpt.pt")
    return folder / "rm"
