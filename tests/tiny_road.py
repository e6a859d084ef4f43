"""A road of tiny models for the tests of the scripts: ten animals, and what they say.

Half of the demonstrations are polite, half are rude; annotators prefer politeness. So each stage has
something to learn within seconds, and every test can run a script's real `main`.
"""

import copy
import hashlib
import json
from pathlib import Path

import torch

import train_dpo
import train_pretrain
import train_ppo
import train_rm
import train_sft
from minirlhf.model import ActorCritic
from minirlhf.tokenizer import Tokenizer
from minirlhf.plumbing.runs import frozen, load_checkpoint, start_run

SCRIPTS = {"pretrain": train_pretrain, "sft": train_sft, "rm": train_rm, "ppo": train_ppo,
           "dpo": train_dpo}
SOUNDS = {"cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "pig": "oink",
          "sheep": "baa", "frog": "croak", "owl": "hoot", "lion": "roar", "bee": "buzz"}
QUESTIONS = ["What does a {} say?", "Tell me the sound of a {}.", "{}?", "How does a {} go?"]
PROMPTS = [(question.format(animal), sound) for question in QUESTIONS
           for animal, sound in SOUNDS.items()]

TOOLS = '''
def judge(row, response, ended):
    """Gold: polite and ended."""
    rude = "fool" in response
    return {"score": float(ended and "Please" in response) - rude, "rude": rude}


def plain_prompt(messages, few_shot=False):
    return "Ann: " + messages[-1]["content"] + "\\nBen:"
'''

MODEL = dict(n_layer=2, n_head=2, n_embd=32, n_hidden=48, block_size=64)
TRAINING = dict(num_epochs=1, batch_size=8, warmup=0, eval_every=2, save_every=100, ledger_every=0)


def polite(sound):
    return f"Please: {sound}."


def rude(sound):
    return f"{sound}, fool."


def chat(*contents):
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(contents)]


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Road:
    """Data files and, after `walk`, the run folders of the first three stages, under one folder."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [f"Ann: {question}\nBen: {answer(sound)}" for question, sound in PROMPTS
                 for answer in (polite, rude)]
        self.text = self.folder / "text.txt"
        self.text.write_text("\n\n".join(lines * 4) + "\n")
        self.tokenizer = Tokenizer.train("\n".join(lines), 350)
        self.tokenizer.save(self.folder / "tokenizer.json")
        answers = [(polite, rude)[i // 3 % 2] for i in range(len(PROMPTS))]
        self.demonstrations = write_rows(self.folder / "demonstrations.jsonl", [
            {"messages": chat(question, answer(sound))}
            for (question, sound), answer in zip(PROMPTS, answers)])
        self.preferences = write_rows(self.folder / "preferences.jsonl", [
            # Every other row is a ranked list with grades, the others are pairs.
            {"prompt": question, "output": [polite(sound), sound, rude(sound)],
             "grades": [[0, 1, 3], [0, 0, 2], [0, 0, 0]]} if i % 2 else
            {"prompt": question, "chosen": polite(sound), "rejected": rude(sound), "rating": 3}
            for i, (question, sound) in enumerate(PROMPTS)])
        self.prompts = write_rows(self.folder / "prompts.jsonl",
                                  [{"prompt": question} for question, _ in PROMPTS])
        self.tools = self.folder / "tools.py"
        self.tools.write_text(TOOLS)

    def config(self, stage, out, **changes):
        """A Config of the stage's script, for a few quick steps on this road's files."""
        sft, rm = str(self.folder / "sft"), str(self.folder / "rm")
        options = {
            "pretrain": dict(text=str(self.text), tokenizer=str(self.folder / "tokenizer.json"),
                             num_steps=3, **MODEL, **{**TRAINING, "num_epochs": None, "ledger_every": None}),
            "sft": dict(init=str(self.folder / "pretrain"), data=self.demonstrations, **TRAINING,
                        num_samples=1),
            "rm": dict(init=sft, data=self.preferences, max_new_tokens=12, num_normalize=16,
                       **TRAINING),
            "ppo": dict(init=sft, reward_model=rm, prompts=self.prompts, num_steps=2,
                        rollout_size=8, minibatch_size=4, micro_batch_size=2, max_new_tokens=10,
                        eval_every=2, save_every=100, ledger_every=0),
            "dpo": dict(init=sft, data=self.preferences, **TRAINING),
        }[stage]
        options = {name: value for name, value in options.items() if value is not None}
        return SCRIPTS[stage].Config(**{**options, "out": str(out), **changes})

    def run(self, stage, out, **changes):
        """Run the stage's main; returns its history."""
        return SCRIPTS[stage].main(self.config(stage, out, **changes))

    def walk(self):
        """Train the first three stages well enough that the later ones have something to go on."""
        if (self.folder / "rm" / "ckpt.pt").exists():
            return self
        fine = dict(dtype="float32", batch_size=16, eval_every=1000)
        self.run("pretrain", self.folder / "pretrain", num_steps=150, lr=5e-3, warmup=10, **fine)
        self.run("sft", self.folder / "sft", num_epochs=50, lr=3e-3, **fine)
        self.run("rm", self.folder / "rm", num_epochs=4, lr=2e-3, **fine)
        return self


def finite(history):
    return all(abs(value) < float("inf") for row in history for value in row.values())


def without_clock(history):
    return [{k: v for k, v in row.items() if k != "tok_per_s"} for row in history]


def digest(model):
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())
                          ).hexdigest()


def with_dropout(folder, out):
    """A copy of a run's checkpoint, only that its model has dropout."""
    ckpt = load_checkpoint(folder)
    ckpt["model_config"]["dropout"] = 0.5
    out.mkdir()
    torch.save(ckpt, out / "ckpt.pt")
    return str(out)


def collect(road, tmp_path, **changes):
    """One rollout of PPO, and all that made it."""
    options = {"dtype": "float32", "rollout_size": 16, **changes}
    cfg = road.config("ppo", tmp_path / "run", **options)
    run = start_run(cfg, {"init": "sft", "reward_model": "rm"})
    policy, reward_model = run.model("init"), frozen(run.model("reward_model"))
    with torch.no_grad():  # a policy that has moved: one equal to the reference would hide mistakes
        weight = policy.trunk.blocks[1].mlp.down.weight
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    reference = frozen(run.model("init"))
    critic = copy.deepcopy(reward_model).requires_grad_(True)
    actor = ActorCritic(policy, critic)
    prompts = [run.tokenizer.encode_prompt(row["messages"])
               for row in train_ppo.read_prompts(cfg.prompts)][:cfg.rollout_size]
    rollout = train_ppo.collect_rollout(actor, reference, reward_model, prompts, cfg.beta, cfg, run)
    return rollout, actor, reference, reward_model, cfg, run
