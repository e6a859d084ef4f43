r"""Direct preference optimisation (DPO): learn from preferences without a reward model.

The policy's own log-ratio to the reference, beta * (log pi - log pi_ref), is the reward; a pair's
loss is -log sigmoid of the difference of the two rewards (arXiv 2305.18290). The reference's
log-probs never change, so they are computed once, before training.

Left out on purpose: its many relatives, a reference that moves, mixing in an SFT loss.

On CPU:  python train_dpo.py          (0.6 CPU-minutes; 85% of held-out pairs of best and worst)
On GPU:  python train_dpo.py --init out/my_sft --data my_preferences.jsonl --lr 5e-7 \
             --too_long cut          (not timed)
"""

import sys
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

from minirlhf.batches import (encode_answer, fit, micro_batches, pad_right, plan_batches,
                              shifted_mask, split_by_prompt, what_was_cut)
from minirlhf.losses import dpo_loss
from minirlhf.masked import sequence_logprobs, token_logprobs
from minirlhf.plumbing.checkpoints import frozen
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.formats import read_preferences
from minirlhf.plumbing.optim import lr_at, make_optimizer, set_lr
from minirlhf.plumbing.runs import due, start_run
from minirlhf.look.ledger import Ledger
from minirlhf.look.plot import draw_curves


@dataclass
class Config:
    init: str = "out/sft"  # run folder of the SFT model: the policy's start, and the reference
    data: str = "out/preferences.jsonl"  # pairs or ranked lists, any accepted format
    out: str = "out/dpo"  # the run's folder
    num_epochs: int = 1  # passes over the pairs; above 0
    batch_size: int = 32  # pairs per optimizer step; above 0
    micro_batch_size: int = 0  # pairs per forward pass (0: the whole batch)
    pairs: str = "best_worst"  # of a ranked list take: best_worst | all
    lr: float = 2e-4  # peak learning rate
    warmup: int = 20  # steps until the peak
    final_lr: float = 0.05  # last learning rate, as a share of the peak
    weight_decay: float = 0.0  # of matrices
    grad_clip: float = 1.0  # largest norm of the gradient; above 0
    beta: float = 0.3  # scale of the implicit reward; smaller lets the policy move further
    label_smoothing: float = 0.0  # share of labels believed to be flipped; up to 1
    too_long: str = "refuse"  # rows longer than the context: refuse | drop | cut (oldest turns)
    held_out: float = 0.1  # share of the prompts kept for evaluation; up to 1
    eval_every: int = 20  # steps between evaluations; above 0
    save_every: int = 100  # steps between checkpoints; above 0
    ledger_every: int = 10  # steps between records of every tensor (0: none)
    seed: int = 0  # of the data order
    device: str = ""  # cuda, cpu or mps (default: cuda where there is one)
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16, of the matrix products
    threads: int = 1  # CPU threads; one is the most efficient at this size
    tensorboard: bool = False  # write the log for TensorBoard, too (pip install tensorboard)
    resume: bool = False  # go on with the run in out, with its options
    overwrite: bool = False  # start anew where out holds a run


def encode(rows, tokenizer, max_len, cfg):
    """Rows -> [{"chosen": (ids, mask), "rejected": (ids, mask), "prompt": text}], one per pair.

    Ties and pairs of identical answers carry no preference: dropped and counted.
    """
    if cfg.pairs not in ("best_worst", "all"):
        raise UserError(f"--pairs {cfg.pairs}: expected best_worst or all")
    pairs, same, too_long, ties, cuts = [], 0, 0, 0, Counter()
    for number, row in enumerate(rows):
        messages, texts, lost = fit(tokenizer, row["messages"], row["answers"], max_len,
                                    cfg.too_long, f"{cfg.data}, row {number + 1}")
        answers = [None if text is None else encode_answer(tokenizer, messages, text)
                   for text in texts]
        K, ranks = len(answers), row["ranks"]
        couples = [(i, j) for i in range(K) for j in range(i + 1, K)]
        if cfg.pairs == "best_worst":
            couples = [(0, K - 1)]
        num_before = len(pairs)
        for i, j in couples:
            if ranks[i] == ranks[j]:
                ties += 1
            elif answers[i] is None or answers[j] is None:
                too_long += 1
            elif answers[i][0] == answers[j][0]:
                same += 1
            else:
                prompt = "\n".join(m["content"] for m in row["messages"])
                pairs.append({"chosen": answers[i], "rejected": answers[j], "prompt": prompt})
        cuts[lost] += len(pairs) > num_before
    print(f"data   | {len(pairs):,} pairs of {cfg.data}; left out: {ties:,} ties, {same:,} "
          f"identical, {too_long:,} longer than {max_len} tokens{what_was_cut(cuts)}")
    return pairs


def make_batch(pairs, device):
    """-> tokens (2B, T), lengths (2B,), mask (2B, T-1): the B chosen answers, then the B rejected;
    and where add_reference has been, ref_chosen_logps (B,), ref_rejected_logps (B,)."""
    both = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    tokens, lengths = pad_right([ids for ids, _ in both], device)
    mask = shifted_mask([mask for _, mask in both], tokens.shape[1], device)
    return {"tokens": tokens, "lengths": lengths, "mask": mask,
            **{f"ref_{side}_logps": torch.tensor([pair[f"ref_{side}_logp"] for pair in pairs],
                                                 device=device)
               for side in ("chosen", "rejected") if f"ref_{side}_logp" in pairs[0]}}


def pair_logps(model, batch):
    """Summed response log-probs in nats: (chosen_logps (B,), rejected_logps (B,)).

    One forward pass for both halves has half the overhead of two.
    """
    tokens = batch["tokens"]  # (2B, T)
    logits = model(tokens)  # (2B, T, V)
    logprobs = token_logprobs(logits[:, :-1], tokens[:, 1:])  # (2B, T-1)
    return sequence_logprobs(logprobs, batch["mask"]).chunk(2)


@torch.no_grad()
def add_reference(reference, pairs, cfg, run):
    """Store each pair's two reference log-probs in it, once and for all."""
    order = sorted(pairs, key=lambda pair: len(pair["chosen"][0]))  # like lengths: less filler
    parts = micro_batches(order, cfg.micro_batch_size or cfg.batch_size)
    for part in tqdm(parts, desc="reference", disable=not sys.stderr.isatty()):
        with run.autocast():
            chosen, rejected = pair_logps(reference, make_batch(part, run.device))
        for pair, c, r in zip(part, chosen.tolist(), rejected.tolist()):
            pair["ref_chosen_logp"], pair["ref_rejected_logp"] = c, r


def loss_of(model, batch, cfg):
    """Per-pair losses (B,) in nats, and what is logged of them, each (B,)."""
    chosen_logps, rejected_logps = pair_logps(model, batch)  # (B,), (B,)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen_logps, rejected_logps, batch["ref_chosen_logps"], batch["ref_rejected_logps"],
        cfg.beta, cfg.label_smoothing)  # each (B,)
    margin = chosen_rewards - rejected_rewards  # (B,)
    return losses, {"chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards,
                    "margin": margin, "accuracy": (margin > 0).float() + 0.5 * (margin == 0),
                    "chosen_logp": chosen_logps.detach(), "rejected_logp": rejected_logps.detach()}


@torch.no_grad()
def evaluate(model, pairs, cfg, run):
    """Mean held-out loss and statistics over all pairs."""
    model.eval()
    totals = {}
    for part in micro_batches(pairs, cfg.micro_batch_size or cfg.batch_size):
        batch = make_batch(part, run.device)
        with run.autocast():
            losses, stats = loss_of(model, batch, cfg)
        for name, values in {"val_loss": losses, **stats}.items():
            totals[name] = totals.get(name, 0) + values.sum().item()
    model.train()
    return {name: total / len(pairs) for name, total in totals.items()}


@torch.no_grad()
def tensors_of(model, reference, batch, cfg, run):
    """For the ledger: each token's log-ratio to the reference, each answer's implicit reward.

    Forward passes of its own, in evaluation mode: the step's random numbers stay the same.
    """
    model.eval()
    tokens, mask = batch["tokens"], batch["mask"]  # (2B, T), (2B, T-1)
    logprobs = []
    for one in (model, reference):
        with run.autocast():
            logits = one(tokens)  # (2B, T, V)
        values = token_logprobs(logits[:, :-1], tokens[:, 1:])  # (2B, T-1)
        logprobs.append(torch.where(mask, values, torch.zeros_like(values)))
    model.train()
    log_ratios = logprobs[0] - logprobs[1]  # (2B, T-1)
    rewards = cfg.beta * sequence_logprobs(log_ratios, mask)  # (2B,)
    B, place = len(tokens) // 2, torch.arange(len(tokens), device=run.device)
    return {"tokens": tokens, "lengths": batch["lengths"], "response_mask": mask,
            "logprobs": logprobs[0], "ref_logprobs": logprobs[1], "log_ratios": log_ratios,
            "implicit_rewards": rewards, "example": place % B, "rank": place // B}


def main(cfg):
    # 1. Set-up: the folder, the SFT model's checkpoint and tokenizer.
    run = start_run(cfg, needs={"init": "sft"}, reads=["data"])

    # 2. Data: encode, hold some prompts out, plan the batches of all epochs.
    rows = read_preferences(cfg.data)
    model = run.model("init")
    encoded = encode(rows, run.tokenizer, model.cfg.block_size, cfg)
    texts = [pair["prompt"] for pair in encoded]
    train, held_out = ([encoded[i] for i in side] for side in
                       split_by_prompt(texts, cfg.held_out, run.data_order))
    if not train or not held_out:
        raise UserError(f"{cfg.data}: {len(encoded)} pairs are too few to train on")
    lengths = [max(len(pair["chosen"][0]), len(pair["rejected"][0])) for pair in train]
    plan = plan_batches(lengths, cfg.num_epochs, cfg.batch_size, run.data_order)
    num_steps, micro = len(plan), cfg.micro_batch_size or cfg.batch_size

    # 3. Model, reference and optimizer. The reference is a distinct copy: it must not move.
    reference = frozen(run.model("init"))
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    print(f"model  | {sum(p.numel() for p in model.parameters()):,} parameters, {num_steps} steps")

    longest = max(encoded, key=lambda pair: max(len(pair["chosen"][0]), len(pair["rejected"][0])))
    longest = [{**longest, "ref_chosen_logp": 0.0, "ref_rejected_logp": 0.0}]
    longest *= min(micro, cfg.batch_size, len(train))
    run.preflight(model, lambda: loss_of(model, make_batch(longest, run.device), cfg)[0],
                  [lambda: tensors_of(model, reference, make_batch(longest, run.device), cfg, run)],
                  options="--micro_batch_size or --batch_size")
    add_reference(reference, encoded, cfg, run)
    run.restore(num_steps, model=model, optimizer=optimizer)

    # 4. The loop.
    ledger = Ledger(run.folder, run.tokenizer, cfg.ledger_every)
    model.train()
    num_tokens = 0
    for step in run.steps():
        examples = [train[i] for i in plan[step - 1]]
        set_lr(optimizer, lr_at(step - 1, num_steps, cfg.lr, cfg.warmup, cfg.final_lr))
        denominator = len(examples)  # however the batch is split, each pair weighs the same
        loss = 0.0
        for part in micro_batches(examples, micro):
            batch = make_batch(part, run.device)
            ledger.record(step, lambda: tensors_of(model, reference, batch, cfg, run))
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
            run.save(model=model, optimizer=optimizer)
    draw_curves(run.folder)
    return run.history


if __name__ == "__main__":
    command_line(main, Config, __doc__)
