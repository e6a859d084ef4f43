"""A corner of the toy world, and models of 107,840 parameters that learn it within seconds.

(`num_parameters` counts them: the embedding is also the unembedding and counts once. A reward model
or a critic has a head of 64 weights and a bias in place of the unembedding: 65 more, 107,905.)

The notebooks train their models with this file, so that what they print never depends on what lies
in `out/`. Only two skills are left of the world in `data/toy`: the sounds of animals, and deeds
that are to be refused. Everything else is the real thing: the same sentences, the same judge and
annotators, and the `main` of the same scripts, with small numbers.

    folder = small_world.make()               data files and a tokenizer, in a temporary folder
    small_world.train(folder, "sft")          trains the stage, and first those that it needs
"""

import atexit
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "toy")]

import annotate  # noqa: E402
import prepare  # noqa: E402
import world  # noqa: E402
from judge import judge  # noqa: E402

import sample  # noqa: E402
import train_dpo  # noqa: E402
import train_ppo  # noqa: E402
import train_pretrain  # noqa: E402
import train_rm  # noqa: E402
import train_sft  # noqa: E402
from minirlhf.tokenizer import Tokenizer  # noqa: E402
from minirlhf.plumbing.files import write_jsonl  # noqa: E402
from minirlhf.plumbing.formats import read_samples  # noqa: E402
from minirlhf.plumbing.stats import bootstrap, wilson  # noqa: E402

for script in (train_dpo, train_ppo, train_pretrain, train_rm, train_sft):
    script.draw_curves = lambda folder: None  # the notebooks draw for themselves
JUDGE = f"{ROOT / 'data' / 'toy' / 'judge.py'}:judge"
MODEL = dict(n_layer=2, n_head=4, n_embd=64, n_hidden=128, block_size=64)
SKILLS = {"sound": 60, "unsafe": 40}

# What a stage starts from, and the numbers that make it small. bf16 would not pay at this size.
NEEDS = {"sft": "pretrain", "samples": "sft", "preferences": "samples", "rm": "preferences",
         "dpo": "preferences", "ppo": "rm"}
SCRIPTS = {"pretrain": train_pretrain, "sft": train_sft, "rm": train_rm, "dpo": train_dpo,
           "ppo": train_ppo}
OPTIONS = {
    "pretrain": dict(num_steps=700, batch_size=8, lr=8e-3, warmup=20, eval_every=350, **MODEL),
    "sft": dict(num_epochs=2, batch_size=16, lr=3e-3, warmup=5, eval_every=50, ledger_every=0),
    "rm": dict(num_epochs=2, batch_size=16, micro_batch_size=0, lr=2e-3, warmup=5, eval_every=20,
               max_new_tokens=24, num_normalize=128, ledger_every=0),
    "dpo": dict(num_epochs=2, batch_size=16, lr=3e-4, warmup=5, eval_every=10, ledger_every=0),
    "ppo": dict(num_steps=20, rollout_size=64, minibatch_size=32, micro_batch_size=0, lr=5e-4,
                critic_lr=2e-3, max_new_tokens=24, ledger_every=0),
}


def make(num_demonstrations=2000, num_prompts=300, num_held_out=120, seed=0):
    """Write the small world's data files into a new folder, which goes when Python ends."""
    folder = Path(tempfile.mkdtemp(prefix="small_world_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    world.SKILL_WEIGHTS = SKILLS
    world.EARLIER_TURN_SHARE = 0.0  # one turn each: short sequences
    prepare.DOCUMENT_WEIGHTS = {"dialogue": 70, "exchange": 20, "facts": 10}
    prepare.DIALOGUE_TURNS = {1: 100}
    rng = random.Random(seed)
    text = prepare.pretraining_text(rng, 400_000)
    share = {skill: weight / 100 for skill, weight in SKILLS.items()}
    files = {
        "pretrain.txt": text,
        "demonstrations.jsonl": [prepare.demonstration(rng) for _ in range(num_demonstrations)],
        "prompts.jsonl": prepare.prompts_by_skill(
            rng, {skill: int(num_prompts * part) for skill, part in share.items()}),
        "heldout.jsonl": prepare.prompts_by_skill(
            rng, {skill: int(num_held_out * part) for skill, part in share.items()}, True),
    }
    for name, content in files.items():
        prepare.write_file(folder / name, content)
    Tokenizer.train(text, 400).save(folder / "tokenizer.json")
    torch.set_num_threads(1)
    return folder


def config(folder, stage, out=None, **changes):
    """The Config of a stage's script on this folder's files."""
    at = lambda name: str(folder / name)
    where = {
        "pretrain": dict(text=at("pretrain.txt"), tokenizer=at("tokenizer.json")),
        "sft": dict(init=at("pretrain"), data=at("demonstrations.jsonl")),
        "rm": dict(init=at("sft"), data=at("preferences.jsonl")),
        "dpo": dict(init=at("sft"), data=at("preferences.jsonl")),
        "ppo": dict(init=at("sft"), reward_model=at("rm"), prompts=at("prompts.jsonl"),
                    judge=JUDGE),
    }[stage]
    return SCRIPTS[stage].Config(**{**where, **OPTIONS[stage], "dtype": "float32",
                                    "out": str(out or folder / stage), **changes})


def train(folder, stage, out=None, **changes):
    """Train a stage (quietly) after the stages that it needs; returns the history of metrics.

    Stages: pretrain, sft, samples (6 answers of the SFT model to each prompt), preferences (their
    rankings), rm, dpo, ppo. What is there already is not made again, unless options change.
    """
    done = folder / {"samples": "samples.jsonl", "preferences": "preferences.jsonl"}.get(
        stage, f"{stage}/ckpt.pt")
    if stage in NEEDS:
        train(folder, NEEDS[stage])
    if out is None and not changes and done.exists():
        return None
    start, quiet = time.time(), io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        if stage == "samples":
            history = sample.main(sample.Config(
                model=str(folder / "sft"), prompts=str(folder / "prompts.jsonl"), save=str(done),
                num_samples=6, max_new_tokens=24, dtype="float32"))
        elif stage == "preferences":
            history = rank(folder / "samples.jsonl", done)
        else:
            history = SCRIPTS[stage].main(config(folder, stage, out, **changes))
    print(f"{stage}: {time.time() - start:.0f} s")
    return history


def rank(samples, out, temperature=0.3, seed=0):
    """Rank samples as `data/toy/annotate.py` does."""
    rng, dropped = random.Random(seed), annotate.Counter()
    rows = [annotate.annotate_row(row, temperature, rng, dropped) for row in
            annotate.read_samples(samples)]
    write_jsonl(out, [row for row in rows if row])


def held_out(folder):
    """The prompts that no training has seen: rows with messages, answer and task."""
    return [json.loads(line) for line in open(folder / "heldout.jsonl", encoding="utf-8")]


def answers(folder, model, rows=None, temperature=1.0, seed=0, num_samples=1):
    """What a model (a run's folder) answers to prompts, the held-out ones by default.

    Returns a verdict of the gold judge for each answer: {"user", "text", "score", "correct",
    "manners", "safe", "rude", ...}; `num_samples` in a row belong to one prompt.
    """
    path, prompts = folder / "answers.jsonl", folder / "asked.jsonl"
    rows = held_out(folder) if rows is None else rows
    write_jsonl(prompts, rows)
    with contextlib.redirect_stdout(io.StringIO()):
        sample.main(sample.Config(model=str(model), prompts=str(prompts), save=str(path), seed=seed,
                                  temperature=temperature, max_new_tokens=24, dtype="float32",
                                  num_samples=num_samples))
    return [{"user": row["messages"][-1]["content"], "text": answer["text"],
             **judge({**row, **row["meta"]}, answer["text"], answer["ended"])}
            for row in read_samples(path) for answer in row["samples"]]


def mean(verdicts, part="score"):
    """The mean of one part of the verdicts, the whole gold score by default."""
    return sum(float(verdict[part]) for verdict in verdicts) / len(verdicts)


def per_prompt(verdicts, part="score", num_samples=1):
    """The mean of one part over the `num_samples` verdicts of each prompt: a number per prompt."""
    return [mean(verdicts[i : i + num_samples], part)
            for i in range(0, len(verdicts), num_samples)]


def with_interval(values, form=".2f"):
    """The mean of one value per prompt and its 95% interval, as text: "0.36 [0.27, 0.45]".

    Wilson's interval where all values are 0 or 1, else the bootstrap's. It speaks of other prompts
    of this kind; how a model trained with another seed would do, it cannot know.
    """
    values = [float(value) for value in values]
    share = set(values) <= {0.0, 1.0}
    low, high = wilson(sum(values), len(values)) if share else bootstrap(values)
    return f"{sum(values) / len(values):{form}} [{low:{form}}, {high:{form}}]"


def num_parameters(model):
    """How many numbers a model has; a matrix with two jobs (tied) counts once."""
    return sum(p.numel() for p in model.parameters())
