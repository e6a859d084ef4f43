r"""Reward model (RM): learn from rankings which answers people prefer.

The SFT model's trunk gets a new head that gives one number per position; the number at an answer's
last real token is its score. Bradley-Terry: P(i beats j) = sigmoid(score_i - score_j). A pair is
the smallest ranking; of K ranked answers all strict pairs count, and each answer is forwarded once.

Left out on purpose: ensembles, a separate safety model, regression on absolute ratings.

On CPU:  python train_rm.py          (1.6 CPU-minutes; 73% of held-out pairs, the ceiling is 80%)
On GPU:  python train_rm.py --init out/my_sft --data my_preferences.jsonl --num_epochs 1 --lr 1e-5 \
             --too_long cut          (not timed)
"""

from collections import Counter
from dataclasses import dataclass

import torch

from minirlhf.batches import (encode_answer, fit, micro_batches, pad_right, plan_batches,
                              response_mask, split_by_prompt, what_was_cut)
from minirlhf.generate import generate
from minirlhf.losses import reward_model_loss
from minirlhf.model import ScalarModel
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.formats import read_preferences
from minirlhf.plumbing.optim import lr_at, make_optimizer, set_lr
from minirlhf.plumbing.runs import due, start_run
from minirlhf.look.ledger import Ledger
from minirlhf.look.plot import draw_curves


@dataclass
class Config:
    init: str = "out/sft"  # run folder of the SFT model
    data: str = "out/preferences.jsonl"  # pairs or ranked lists, any accepted format
    out: str = "out/rm"  # the run's folder
    num_epochs: int = 2  # passes over the preferences; on real data a second one overfits; above 0
    batch_size: int = 32  # prompts per optimizer step; above 0
    micro_batch_size: int = 8  # prompts per forward pass, all their answers at once (0: the batch)
    lr: float = 1e-3  # peak learning rate
    warmup: int = 20  # steps until the peak
    final_lr: float = 0.05  # last learning rate, as a share of the peak
    weight_decay: float = 0.1  # of matrices
    grad_clip: float = 1.0  # largest norm of the gradient; above 0
    margin: float = 0.0  # score margin of a "significantly better" pair; lower grades get less
    too_long: str = "refuse"  # rows longer than the context: refuse | drop | cut (oldest turns)
    held_out: float = 0.1  # share of the prompts kept for evaluation; up to 1
    num_normalize: int = 512  # SFT answers sampled to set the scores' mean and deviation
    max_new_tokens: int = 48  # longest of those answers in tokens; above 0
    eval_every: int = 50  # steps between evaluations; above 0
    save_every: int = 100  # steps between checkpoints; above 0
    ledger_every: int = 20  # steps between records of every tensor (0: none)
    seed: int = 0  # of the data order and of sampling
    device: str = ""  # cuda, cpu or mps (default: cuda where there is one)
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16, of the matrix products
    threads: int = 1  # CPU threads; one is the most efficient at this size
    tensorboard: bool = False  # write the log for TensorBoard, too (pip install tensorboard)
    resume: bool = False  # go on with the run in out, with its options
    overwrite: bool = False  # start anew where out holds a run


def encode(rows, tokenizer, max_len, cfg):
    """Rows -> [{"ids": K lists, "ranks": K ints, "grades": K x K or None, "row": number,
    "prompt_len": tokens before the answers}].

    Answers that are the same make no pair, so the second of them is left out; ties make none.
    """
    examples, same, too_long, ties, cuts = [], 0, 0, 0, Counter()
    for number, row in enumerate(rows):
        messages, answers, lost = fit(tokenizer, row["messages"], row["answers"], max_len,
                                      cfg.too_long, f"{cfg.data}, row {number + 1}")
        ties += len(set(row["ranks"])) < 2
        kept, seen = [], set()
        for k, answer in enumerate(answers):
            if answer is None:
                too_long += 1
                continue
            example = encode_answer(tokenizer, messages, answer)
            if tuple(example[0]) in seen:
                same += 1
            else:
                seen.add(tuple(example[0]))
                kept.append((k, example[0]))
                prompt_len = example[1].index(True)
        ranks = [row["ranks"][k] for k, _ in kept]
        if len(set(ranks)) < 2:
            continue  # no strict pair is left
        cuts[lost] += 1
        grades = row["grades"] and [[row["grades"][i][j] for j, _ in kept] for i, _ in kept]
        examples.append({"ids": [ids for _, ids in kept], "ranks": ranks, "grades": grades,
                         "row": number, "prompt_len": prompt_len})
    print(f"data   | {len(examples):,} prompts of {cfg.data}, {len(rows) - len(examples):,} left "
          f"out, {ties:,} of them ties; answers left out: {same:,} identical, {too_long:,} longer "
          f"than {max_len} tokens{what_was_cut(cuts)}")
    return examples


def make_batch(examples, device):
    """-> tokens (N, T) and lengths (N,) of all answers, mask (N, T-1) of their own tokens; places
    (N, 2); ranks (B, K); grades (B, K, K).

    N is the number of answers of all B prompts; answer n stands at [places[n, 0], places[n, 1]] of
    the (B, K) tables, whose absent entries have rank -1.
    """
    tokens, lengths = pad_right([ids for e in examples for ids in e["ids"]], device)
    B, K = len(examples), max(len(e["ids"]) for e in examples)
    places = torch.tensor([(b, k) for b, e in enumerate(examples) for k in range(len(e["ids"]))])
    prompt_lens = torch.tensor([e["prompt_len"] for e in examples for _ in e["ids"]])  # (N,)
    ranks = torch.full((B, K), -1)  # (B, K)
    grades = torch.zeros(B, K, K, dtype=torch.int64)
    for b, e in enumerate(examples):
        k = len(e["ranks"])
        ranks[b, :k] = torch.tensor(e["ranks"])
        if e["grades"]:
            grades[b, :k, :k] = torch.tensor(e["grades"])
    return {"tokens": tokens, "lengths": lengths,
            "mask": response_mask(prompt_lens.to(device), lengths, tokens.shape[1]),
            "places": places.to(device), "ranks": ranks.to(device), "grades": grades.to(device)}


def loss_of(model, batch, cfg):
    """Per-prompt losses (B,): the mean over the prompt's strict pairs, in nats; scores (B, K)."""
    scores = model.score(batch["tokens"], batch["lengths"])  # (N,), each answer scored once
    prompt, answer = batch["places"].unbind(1)  # (N,), (N,)
    scores = scores.new_zeros(batch["ranks"].shape).index_put((prompt, answer), scores)  # (B, K)
    margins = batch["grades"] * cfg.margin / 3  # (B, K, K), grade 3 gets it all
    losses = reward_model_loss(scores, batch["ranks"], margins)  # (B,)
    return losses, {"scores": scores.detach()}


@torch.no_grad()
def evaluate(model, examples, cfg, run):
    """Held-out loss (nats, no margins) and accuracy over all strict pairs, over each grade too."""
    model.eval()
    losses, right, grades = [], [], []
    for part in micro_batches(examples, cfg.micro_batch_size or cfg.batch_size):
        batch = make_batch(part, run.device)
        with run.autocast():
            _, stats = loss_of(model, batch, cfg)
        scores = stats["scores"]  # (B, K)
        losses.append(reward_model_loss(scores, batch["ranks"]))
        for b, e in enumerate(part):
            for i in range(len(e["ranks"])):
                for j in range(len(e["ranks"])):
                    if e["ranks"][i] < e["ranks"][j]:
                        gap = (scores[b, i] - scores[b, j]).item()
                        right.append(0.5 if gap == 0 else float(gap > 0))
                        grades.append(e["grades"][i][j] if e["grades"] else None)
    model.train()
    by_grade = {}
    for grade in sorted({g for g in grades if g is not None}):
        hits = [r for r, g in zip(right, grades) if g == grade]
        by_grade[f"grade_{grade}"] = sum(hits) / len(hits)
    return {"val_loss": torch.cat(losses).mean().item(), "accuracy": sum(right) / len(right),
            **by_grade}


@torch.no_grad()
def tensors_of(model, batch, cfg, run):
    """For the ledger: the score after each token (the last one's counts), and each prompt's loss.

    Forward passes of its own, in evaluation mode: the step's random numbers stay the same.
    """
    model.eval()
    tokens, lengths, mask = batch["tokens"], batch["lengths"], batch["mask"]
    prompt, answer = batch["places"].unbind(1)  # (N,), (N,)
    with run.autocast():
        losses, _ = loss_of(model, batch, cfg)  # (B,)
        raw = model.raw(tokens)[:, 1:]  # (N, T-1), after reading tokens[:, 1:]
    model.train()
    return {"tokens": tokens, "lengths": lengths, "response_mask": mask,
            "raw_scores": torch.where(mask, raw, torch.zeros_like(raw)),
            "scores": raw.gather(1, (lengths - 2)[:, None]).squeeze(1),
            "losses": losses[prompt], "example": prompt,
            "rank": batch["ranks"][prompt, answer]}  # each (N,)


@torch.no_grad()
def sample_answers(policy, prompts, cfg, run):
    """The SFT model's own answers, those that ended: a list of prompt + answer ids."""
    answers = []
    for part in micro_batches(prompts, cfg.batch_size):
        with run.autocast():
            rollout = generate(policy, part, cfg.max_new_tokens, [run.tokenizer.end_id],
                               generator=run.generator)
        answers += [prompt + ids for prompt, ids, ended in zip(
            part, rollout.responses(), rollout.ended.tolist()) if ended]
    return answers


@torch.no_grad()
def measure_scores(model, answers, cfg, run):
    """Mean and deviation of the raw scores of answers (lists of ids)."""
    model.eval()
    scores = []
    for part in micro_batches(answers, cfg.batch_size):
        tokens, lengths = pad_right(part, run.device)  # (B, T), (B,)
        with run.autocast():
            scores.append(model.score(tokens, lengths))
    scores = torch.cat(scores)
    return scores.mean(), scores.std()


def main(cfg):
    # 1. Set-up: the folder, the SFT model's checkpoint and tokenizer.
    run = start_run(cfg, needs={"init": "sft"}, reads=["data"])

    # 2. Data: encode, hold some prompts out, plan the batches of all epochs.
    rows = read_preferences(cfg.data)
    policy = run.model("init")
    encoded = encode(rows, run.tokenizer, policy.cfg.block_size, cfg)
    texts = ["\n".join(m["content"] for m in rows[e["row"]]["messages"]) for e in encoded]
    train, held_out = ([encoded[i] for i in side] for side in
                       split_by_prompt(texts, cfg.held_out, run.data_order))
    if not train or not held_out:
        raise UserError(f"{cfg.data}: {len(encoded)} prompts with a strict pair are too few")
    # The SFT model will answer these to set the scores' scale; a cut row's prompt may have no room.
    prompts = [run.tokenizer.encode_prompt(rows[e["row"]]["messages"]) for e in train]
    prompts = [ids for ids in prompts if len(ids) < policy.cfg.block_size][: cfg.num_normalize]
    if len(prompts) < 2:
        raise UserError(f"--num_normalize {cfg.num_normalize} with {len(train)} prompts to train "
                        "on: at least 2 prompts are needed to measure the scores' deviation")
    lengths = [max(map(len, e["ids"])) for e in train]
    plan = plan_batches(lengths, cfg.num_epochs, cfg.batch_size, run.data_order)
    num_steps, micro = len(plan), cfg.micro_batch_size or cfg.batch_size

    # 3. Model and optimizer.
    model = ScalarModel(policy.cfg, policy.trunk).to(run.device)
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    print(f"model  | {sum(p.numel() for p in model.parameters()):,} parameters, {num_steps} steps")

    longest = [max(encoded, key=lambda e: len(e["ids"]) * max(map(len, e["ids"])))]
    longest *= min(micro, cfg.batch_size, len(train))
    asked = [max(prompts, key=len)] * min(cfg.batch_size, len(prompts))
    run.preflight(model, lambda: loss_of(model, make_batch(longest, run.device), cfg)[0],
                  [lambda: tensors_of(model, make_batch(longest, run.device), cfg, run),
                   lambda: sample_answers(policy, asked, cfg, run)],
                  options="--micro_batch_size or --batch_size")
    # Sampled now, scored at the end: that too few answers end is better known before the training.
    answers = sample_answers(policy, prompts, cfg, run)
    if len(answers) < 2:
        raise UserError(f"fewer than 2 of {len(prompts)} sampled answers ended within "
                        f"--max_new_tokens {cfg.max_new_tokens}; raise it, or train SFT longer")
    run.restore(num_steps, model=model, optimizer=optimizer)

    # 4. The loop.
    ledger = Ledger(run.folder, run.tokenizer, cfg.ledger_every)
    model.train()
    num_tokens = 0
    for step in run.steps():
        examples = [train[i] for i in plan[step - 1]]
        set_lr(optimizer, lr_at(step - 1, num_steps, cfg.lr, cfg.warmup, cfg.final_lr))
        denominator = len(examples)  # however the batch is split, each prompt weighs the same
        loss = 0.0
        for part in micro_batches(examples, micro):
            batch = make_batch(part, run.device)
            ledger.record(step, lambda: tensors_of(model, batch, cfg, run))
            with run.autocast():
                losses, _ = loss_of(model, batch, cfg)
            micro_loss = losses.sum() / denominator
            run.check_finite(model, batch, loss=micro_loss)
            run.scaler.scale(micro_loss).backward()
            loss += micro_loss.item()
            num_tokens += batch["lengths"].sum().item()
        run.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        run.check_finite(model, batch, grad_norm=grad_norm)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)

        if due(step, cfg.eval_every, num_steps):
            run.log(num_tokens, loss=loss, **evaluate(model, held_out, cfg, run),
                    grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])
            num_tokens = 0
        if run.save_due():
            run.save(model=model, optimizer=optimizer, done=False)

    # 5. Normalisation: scores of the SFT model's answers get mean 0 and deviation 1.
    if not run.done:
        mean, std = measure_scores(model, answers, cfg, run)
        if not std > 1e-6:
            raise UserError("every answer got the same score, so there is nothing to maximise; the "
                            f"weights are saved: go on with --resume --out {cfg.out} --num_epochs "
                            f"{cfg.num_epochs + 1}, or start anew with a higher --lr")
        model.score_mean.copy_(mean)
        model.score_std.copy_(std)
        print(f"scores | raw mean {mean:.3f}, deviation {std:.3f} on the SFT model's answers")
        run.save(model=model, optimizer=optimizer)
    draw_curves(run.folder)
    return run.history


if __name__ == "__main__":
    command_line(main, Config, __doc__)
