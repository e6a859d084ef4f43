"""A road of tiny models for the tests of the scripts: ten animals, and what they say.

Half of the demonstrations are polite, half are rude; annotators prefer politeness. So each stage has
something to learn within seconds, and every test can run a script's real `main`.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_dpo
import train_pretrain
import train_ppo
import train_rm
import train_sft
from conftest import softplus
from minirlhf.generate import Rollout, generate
from minirlhf.model import ActorCritic
from minirlhf.tokenizer import Tokenizer
from minirlhf.plumbing.checkpoints import build_model, frozen, load_checkpoint, load_model
from minirlhf.plumbing.runs import Run, start_run

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
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class Road:
    """Data files and, after `walk`, the run folders of the first three stages, under one folder."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [f"Ann: {question}\nBen: {answer(sound)}" for question, sound in PROMPTS
                 for answer in (polite, rude)]
        self.text = self.folder / "text.txt"
        self.text.write_text("\n\n".join(lines * 4) + "\n", encoding="utf-8")
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
            {"prompt": question, "chosen": polite(sound), "rejected": rude(sound),
             "rating": "significantly"}
            for i, (question, sound) in enumerate(PROMPTS)])
        self.prompts = write_rows(self.folder / "prompts.jsonl",
                                  [{"prompt": question} for question, _ in PROMPTS])
        self.tools = self.folder / "tools.py"
        self.tools.write_text(TOOLS, encoding="utf-8")

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

    def finished(self, stage, out):
        """A copy, at `out`, of the folder of a short run of the stage, which is made once."""
        home = self.folder / "finished" / stage
        if not home.exists():
            self.run(stage, home, dtype="float32")
        shutil.copytree(home, out)
        settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
        (out / "config.json").write_text(json.dumps({**settings, "out": str(out)}), encoding="utf-8")
        return out

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


def places(*modules):
    """Where the modules' numbers lie in memory."""
    return {tensor.data_ptr() for module in modules for tensor in module.state_dict().values()}


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags)


def with_dropout(folder, out):
    """A copy of a run's checkpoint, only that its model has dropout."""
    ckpt = load_checkpoint(folder)
    ckpt["model_config"]["dropout"] = 0.5
    out.mkdir()
    torch.save(ckpt, out / "ckpt.pt")
    return str(out)


# ---------------------------------------------------------------- runs under way

def begin(stage, road, tmp_path, **changes):
    """A run of the stage's script on the road's files, started but not in its loop."""
    config = road.config(stage, tmp_path / "begun", **{"dtype": "float32", **changes})
    return start_run(config, {"init": "pretrain" if stage == "sft" else "sft"})


def nudge(model):
    """The model a little away from where it was: one equal to the reference would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.trunk.blocks[1].mlp.down.weight
        weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def collect(road, tmp_path, **changes):
    """One rollout of PPO, and all that made it."""
    options = {"dtype": "float32", "rollout_size": 16, **changes}
    cfg = road.config("ppo", tmp_path / "run", **options)
    run = start_run(cfg, {"init": "sft", "reward_model": "rm"})
    policy, reward_model = nudge(run.model("init")), frozen(run.model("reward_model"))
    reference = frozen(run.model("init"))
    critic = copy.deepcopy(reward_model).requires_grad_(True)
    actor = ActorCritic(policy, critic)
    prompts = [run.tokenizer.encode_prompt(row["messages"])
               for row in train_ppo.read_prompts(cfg.prompts)][:cfg.rollout_size]
    rollout = train_ppo.collect_rollout(actor, reference, reward_model, prompts, cfg.beta, cfg, run)
    return rollout, actor, reference, reward_model, cfg, run


def start(stage, road, tmp_path, **changes):
    """(model, rows, run): what the stage's main has before its first step, four rows of its data;
    of PPO the actor and a rollout."""
    if stage == "ppo":
        rollout, actor, _, _, _, run = collect(road, tmp_path, **changes)
        return actor, rollout, run
    script = SCRIPTS[stage]
    run = begin(stage, road, tmp_path, **changes)
    read = train_sft.read_demonstrations if stage == "sft" else train_dpo.read_preferences
    # Every eleventh row: another animal, another way to ask, pairs as well as lists.
    rows = script.encode(read(run.cfg.data), run.tokenizer, 64, run.cfg)[::11]
    if stage == "rm":
        return load_model(road.folder / "rm", "scalar")[0], rows, run
    model = run.model("init")
    with torch.no_grad():  # a policy that has moved: at the start DPO's pairs would all look alike
        model.trunk.blocks[1].mlp.down.weight.mul_(2)
    if stage == "dpo":
        train_dpo.add_reference(frozen(run.model("init")), rows, run.cfg, run)
    return model, rows, run


def without_preflight(monkeypatch):
    """Let runs begin without trying out their largest batches, which are no steps."""
    monkeypatch.setattr(Run, "preflight", lambda *_, **__: None)


def watch(monkeypatch, where, name):
    """Let where.name do its work, and keep (arguments, result) of every call, preflight's left out.
    """
    without_preflight(monkeypatch)
    calls, original = [], getattr(where, name)

    def watched(*args, **options):
        result = original(*args, **options)
        calls.append((args, result))
        return result

    monkeypatch.setattr(where, name, watched)
    return calls


@contextlib.contextmanager
def watched_steps():
    """Of each optimizer step: the optimizer, its parameters' gradients in a row, its rates."""
    steps = []

    def before_step(optimizer, *_):
        groups = optimizer.param_groups
        gradient = [p.grad.flatten() for group in groups for p in group["params"]]
        steps.append(SimpleNamespace(optimizer=optimizer, gradient=torch.cat(gradient),
                                     rates=[group["lr"] for group in groups]))

    handle = register_optimizer_step_pre_hook(before_step)
    try:
        yield steps
    finally:
        handle.remove()


class Scaler(torch.amp.GradScaler):
    """A loss scaler that is on whatever the dtype, so that a gradient left scaled shows."""

    def __init__(self, device, **_):
        super().__init__(device, init_scale=1024.0)


# ---------------------------------------------------------------- a batch of any stage

def loss_of(stage, model, rows, run):
    """The script's own loss of these rows, as one optimizer step would minimise it."""
    if stage == "ppo":
        everything = list(range(len(rows["lengths"])))
        return ppo_loss(model, rows, everything, rows["response_mask"].sum(), run)[0]
    batch = SCRIPTS[stage].make_batch(rows, run.device)
    cfg = dataclasses.replace(run.cfg, margin=1.0) if stage == "rm" else run.cfg
    losses, _ = SCRIPTS[stage].loss_of(model, batch, cfg)
    return losses.sum() / (batch["mask"].sum() if stage == "sft" else len(rows))


def ppo_loss(actor, rollout, rows, denominator, run, cfg=None):
    """What some rows add to the loss, and to the statistics, of a minibatch with so many tokens."""
    batch = train_ppo.make_batch(rollout, rows)
    with run.autocast():
        losses, stats = train_ppo.loss_of(actor, batch, cfg or run.cfg)
    share = batch["response_mask"].sum() / denominator
    return losses.sum() / denominator, {name: value * share for name, value in stats.items()}


def sequences(stage, rows):
    """The ids of each sequence in the stage's batch, without filler."""
    if stage == "sft":
        return [ids for ids, _ in rows]
    if stage == "rm":
        return [ids for row in rows for ids in row["ids"]]
    if stage == "dpo":
        return [pair[name][0] for name in ("chosen", "rejected") for pair in rows]
    return [ids[:n] for ids, n in zip(rows["tokens"].tolist(), rows["lengths"].tolist())]


def head_of(stage, model):
    return model.head if stage == "rm" else (model.policy if stage == "ppo" else model).lm_head


def backward(stage, model, rows, run):
    """Run the loss and its gradients; returns it and the head's outputs (N, T, .) with theirs."""
    seen = []
    handle = head_of(stage, model).register_forward_hook(
        lambda module, inputs, out: seen.append(out) or out.retain_grad())
    model.zero_grad()
    loss = loss_of(stage, model, rows, run)
    loss.backward()
    handle.remove()
    assert len(seen) == 1  # each sequence is forwarded once
    return loss, seen[0]


def results(stage, model, rows, run):
    """What filler must not touch: the outputs at real tokens, the loss, every gradient."""
    loss, outputs = backward(stage, model, rows, run)
    lengths = torch.tensor([len(ids) for ids in sequences(stage, rows)])
    real = torch.arange(outputs.shape[1]) < lengths[:, None]  # (N, T)
    return [outputs[real], loss, *[p.grad.clone() for p in model.parameters()]]


def refill(tokens, lengths, filler=0, more=0):
    """The same rows with another id as filler, and with more of it."""
    tokens = torch.nn.functional.pad(tokens, (0, more))  # (B, T + more)
    return torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens, filler)


def poison(module, lengths):
    """Let the module's outputs be NaN at filler."""
    def hook(module, inputs, out):
        filler = torch.arange(out.shape[1]) >= lengths[:, None]  # (B, T)
        filler = filler.view(*filler.shape, *[1] * (out.dim() - 2))
        return torch.where(filler, NAN, out)

    return module.register_forward_hook(hook)


# ---------------------------------------------------------------- oracles: loops over bare rows

@torch.no_grad()
def logprobs_of(model, ids, start, temperature=1.0):
    """Log-prob of each token from index `start` on, each by a forward pass of its own: (n,)."""
    rows = [model(torch.tensor([ids[:t]]))[0, -1] / temperature for t in range(start, len(ids))]
    return torch.stack([row.log_softmax(-1)[ids[t]] for t, row in enumerate(rows, start)])


def scores_alone(reward_model, rows):
    """The raw score of each row from a forward pass of its own, without filler: (N,)."""
    with torch.no_grad():
        return torch.stack([reward_model.raw(torch.tensor([ids]))[0, -1] for ids in rows])


def scored(folder):
    """The trained reward model, with a function that scores one bare answer."""
    model = build_model(load_checkpoint(folder)).eval()
    return model, lambda ids: model.raw(torch.tensor([ids]))[0, -1].item()


def answers_of(row, tokenizer):
    """The ids of each answer after its prompt, spelt out, and the prompt's length."""
    prompt = tokenizer.encode_prompt(row["messages"])
    return [prompt + tokenizer.encode(answer) + [tokenizer.end_id]
            for answer in row["answers"]], len(prompt)


def strict_pairs(ranks):
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


def ranked_loss(row, score, tokenizer, margin=0.0):
    """Mean of softplus over the strict pairs of one row, each answer scored on its own."""
    scores = [score(ids) for ids in answers_of(row, tokenizer)[0]]
    asked = lambda i, j: margin * row["grades"][i][j] / 3 if row["grades"] else 0.0
    nats = [softplus(asked(i, j) - scores[i] + scores[j]) for i, j in strict_pairs(row["ranks"])]
    return sum(nats) / len(nats)


def dpo_oracle(policy, reference, better, worse, start, beta, smoothing=0.0):
    """Loss and statistics of one pair by loops over its answers' tokens."""
    logps = [[logprobs_of(model, ids, start).sum().item() for ids in (better, worse)]
             for model in (policy, reference)]
    chosen, rejected = (beta * (p - r) for p, r in zip(*logps))
    margin = chosen - rejected
    loss = (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin)
    return {"val_loss": loss, "chosen_reward": chosen, "rejected_reward": rejected,
            "margin": margin, "accuracy": float(margin > 0), "chosen_logp": logps[0][0],
            "rejected_logp": logps[0][1]}


def template(tok, messages):
    """The chat template, spelled out: [(id, whether it is trained)]."""
    marks = {"system": tok.system_id, "user": tok.user_id, "assistant": tok.assistant_id}
    out = [(tok.begin_id, False)]
    for message in messages:
        says = message["role"] == "assistant"
        out += [(marks[message["role"]], False)]
        out += [(one, says) for one in tok.encode(message["content"]) + [tok.end_id]]
    return out


# ---------------------------------------------------------------- data with a point

NAN = float("nan")
CHAT = [{"role": "system", "content": "Be brief."}, *chat("cow?", "moo", " dog? ", " woof\n", "bye",
                                                         "<|end|> is text")]
LONG = "What does it say? " * 15  # more than the tiny models' context of 64 tokens


def longer(rows):
    """The same rows, each with a prompt that has to be cut."""
    return [{**row, "prompt": LONG + row["prompt"]} for row in rows]


TWINS = [{"prompt": "cow?", "chosen": "moo", "rejected": "moo"},
         {"prompt": "dog?", "chosen": "woof", "rejected": "meow"},
         {"prompt": "dog?", "chosen": "woof", "rejected": "meow"},  # another row, no twin
         {"prompt": "owl?", "output": ["hoot", "hoot", "moo", "baa"], "ranks": [0, 1, 2, 2],
          "grades": [[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 0], [0, 0, 0, 0]]},
         {"prompt": "pig?", "output": ["oink", "baa", "oink"], "ranks": [0, 0, 1]}]
RANKED = [
    {"prompt": "cow?", "output": ["Please: moo.", "moo", "baa", "moo, fool."],
     "ranks": [0, 1, 1, 2],
     "grades": [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 0]]},
    {"prompt": "What does a dog say?", "chosen": "woof", "rejected": "meow, meow",
     "rating": "slightly"},
    {"prompt": "owl?", "output": ["hoot", "moo", "baa, baa"], "ranks": [0, 0, 1]},
    {"prompt": "How does a pig go?", "output": ["oink, fool.", "Please: oink."]},
    {"prompt": "lion?", "output": ["roar, fool.", "Please: roar.", "roar"],
     "grades": [[0, 0, 3], [0, 0, 2], [0, 0, 0]]},
]


def apart(prompts, tokenizer):
    """A rollout of answers in single characters, for which the tokenizer has longer tokens; the
    second of them never ends. Returns it and its bare rows."""
    answers = [[tokenizer.encode(c)[0] for c in "Please: moo"[: 11 - i % 3]]
               for i in range(len(prompts))]
    assert all(tokenizer.encode(tokenizer.decode(ids)) != ids for ids in answers)
    ended = torch.arange(len(prompts)) != 1
    rows = [prompt + ids + [tokenizer.end_id] * int(end)
            for prompt, ids, end in zip(prompts, answers, ended)]
    tokens = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)
    lengths = [torch.tensor(list(map(len, ids))) for ids in (prompts, rows)]
    return Rollout(tokens, *lengths, ended), rows


def sample_apart(script, road, monkeypatch):
    """Let the script's sampling give such rollouts, and keep (rollout, rows) of each."""
    made = []

    def fake(policy, prompts, *rest, **options):
        made.append(apart(prompts, road.tokenizer))
        return made[-1][0]

    monkeypatch.setattr(script, "generate", fake)
    return made


def sampled_texts(folder, prompts, temperature, num_samples=1):
    """(text, ended) of a few answers of the model in a run's folder to each question."""
    model, tokenizer = load_model(folder)
    rollout = generate(model, [tokenizer.encode_prompt(chat(question))
                               for question in prompts for _ in range(num_samples)], 14,
                       [tokenizer.end_id], temperature,
                       generator=torch.Generator().manual_seed(0))
    return list(zip(map(tokenizer.decode_response, rollout.responses()), rollout.ended.tolist()))
