r"""Supervised fine-tuning (SFT): imitate demonstrations, so that a parrot becomes an assistant.

Each dialogue is one sequence. The loss counts on every assistant turn, the end tokens included, and
on nothing else: the prompt is what the model reads, not what it should learn to say.

Left out on purpose: packing several dialogues into one row, LoRA, NEFTune.

On CPU:  python train_sft.py          (1 CPU-minute; held-out loss about 0.35 nats per token)
On GPU:  python train_sft.py --init out/my_base --data my_demonstrations.jsonl --lr 2e-5 \
             --too_long drop          (not timed)
"""

from collections import Counter
from dataclasses import dataclass

import torch

from minirlhf.batches import (fit, micro_batches, pad_right, plan_batches, shifted_mask,
                              split_by_prompt, what_was_cut)
from minirlhf.generate import generate
from minirlhf.losses import sft_loss
from minirlhf.masked import token_logprobs
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.formats import read_demonstrations
from minirlhf.plumbing.optim import lr_at, make_optimizer, set_lr
from minirlhf.plumbing.runs import due, start_run
from minirlhf.look.ledger import Ledger
from minirlhf.look.plot import draw_curves


@dataclass
class Config:
    init: str = "out/pretrain"  # run folder of the base model
    data: str = "data/toy/demonstrations.jsonl"  # demonstrations, any accepted format
    out: str = "out/sft"  # the run's folder
    num_epochs: int = 4  # passes over the demonstrations; above 0
    batch_size: int = 32  # dialogues per optimizer step; above 0
    micro_batch_size: int = 0  # dialogues per forward pass (0: the whole batch)
    lr: float = 1e-3  # peak learning rate
    warmup: int = 20  # steps until the peak
    final_lr: float = 0.05  # last learning rate, as a share of the peak
    weight_decay: float = 0.1  # of matrices
    grad_clip: float = 1.0  # largest norm of the gradient; above 0
    too_long: str = "refuse"  # rows longer than the context: refuse | drop | cut (oldest turns)
    held_out: float = 0.05  # share of the first prompts kept for evaluation; up to 1
    eval_every: int = 150  # steps between evaluations; above 0
    save_every: int = 200  # steps between checkpoints; above 0
    ledger_every: int = 50  # steps between records of every tensor (0: none)
    num_samples: int = 3  # held-out prompts answered greedily at each evaluation; above 0
    seed: int = 0  # of the data order
    device: str = ""  # cuda, cpu or mps (default: cuda where there is one)
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16, of the matrix products
    threads: int = 1  # CPU threads; one is the most efficient at this size
    tensorboard: bool = False  # write the log for TensorBoard, too (pip install tensorboard)
    resume: bool = False  # go on with the run in out, with its options
    overwrite: bool = False  # start anew where out holds a run


def encode(rows, tokenizer, max_len, cfg):
    """Rows -> list of (ids, mask), the mask True on every assistant token and its end token."""
    examples, cuts = [], Counter()
    for number, row in enumerate(rows):
        *prompt, answer = row["messages"]
        prompt, [text], lost = fit(tokenizer, prompt, [answer["content"]], max_len, cfg.too_long,
                                   f"{cfg.data}, dialogue {number + 1}")
        ids, mask = tokenizer.encode_chat([*prompt, answer])
        if text is not None and any(mask):  # a cut may take away all turns that are trained
            examples.append((ids, mask))
            cuts[lost] += 1
    print(f"data   | {len(examples):,} dialogues of {cfg.data}, {len(rows) - len(examples):,} left "
          f"out (longer than {max_len} tokens){what_was_cut(cuts)}")
    return examples


def make_batch(examples, device):
    """[(ids, mask)] -> tokens (B, T) int64, lengths (B,), mask (B, T-1) bool on tokens[:, 1:]."""
    tokens, lengths = pad_right([ids for ids, _ in examples], device)
    mask = shifted_mask([mask for _, mask in examples], tokens.shape[1], device)
    return {"tokens": tokens, "lengths": lengths, "mask": mask}


def loss_of(model, batch, cfg):
    """Negative log-likelihood in nats, summed over the trained tokens: (); and all log-probs."""
    tokens = batch["tokens"]  # (B, T)
    logits = model(tokens)  # (B, T, V)
    logprobs = token_logprobs(logits[:, :-1], tokens[:, 1:])  # (B, T-1)
    return sft_loss(logprobs, batch["mask"], denominator=1), {"logprobs": logprobs.detach()}


@torch.no_grad()
def evaluate(model, examples, cfg, run):
    """Held-out loss in nats per trained token."""
    model.eval()
    total, count = 0.0, 0
    for part in micro_batches(examples, cfg.micro_batch_size or cfg.batch_size):
        batch = make_batch(part, run.device)
        with run.autocast():
            losses, _ = loss_of(model, batch, cfg)
        total += losses.sum().item()
        count += batch["mask"].sum().item()
    model.train()
    return {"val_loss": total / count}


@torch.no_grad()
def tensors_of(model, batch, cfg, run):
    """For the ledger: each trained token's loss in nats.

    A forward pass of its own, in evaluation mode: the step's random numbers stay the same.
    """
    model.eval()
    with run.autocast():
        _, stats = loss_of(model, batch, cfg)
    model.train()
    mask, logprobs = batch["mask"], stats["logprobs"]  # (B, T-1), (B, T-1)
    return {"tokens": batch["tokens"], "lengths": batch["lengths"], "response_mask": mask,
            "token_losses": torch.where(mask, -logprobs, torch.zeros_like(logprobs))}


def show_samples(model, examples, run):
    """Answer the last user turn of a few held-out dialogues, greedily."""
    for ids, mask in examples:
        prompt = ids[: len(mask) - mask[::-1].index(False)]  # all before the last assistant turn
        rollout = generate(model, [prompt], 40, [run.tokenizer.end_id], temperature=0)
        answer = run.tokenizer.decode_response(rollout.responses()[0])
        user = run.tokenizer.decode(prompt).split("<|user|>")[-1].split("<|end|>")[0]
        run.show(f"  user: {user}\n  model: {answer}")


def main(cfg):
    # 1. Set-up: the folder, the base model's checkpoint and tokenizer.
    run = start_run(cfg, needs={"init": "pretrain"}, reads=["data"])

    # 2. Data: encode, hold some out, plan the batches of all epochs.
    rows = read_demonstrations(cfg.data)
    model = run.model("init")
    encoded = encode(rows, run.tokenizer, model.cfg.block_size, cfg)
    # Dialogues that begin alike stay on one side, else held-out answers follow prompts seen before.
    beginnings = [tuple(ids[: ids.index(run.tokenizer.assistant_id)]) for ids, _ in encoded]
    train, held_out = ([encoded[i] for i in side] for side in
                       split_by_prompt(beginnings, cfg.held_out, run.data_order))
    if not train or not held_out:
        raise UserError(f"{cfg.data}: {len(encoded)} dialogues are too few to train on")
    lengths = [len(ids) for ids, _ in train]
    plan = plan_batches(lengths, cfg.num_epochs, cfg.batch_size, run.data_order)
    num_steps, micro = len(plan), cfg.micro_batch_size or cfg.batch_size

    # 3. Model and optimizer.
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    print(f"model  | {sum(p.numel() for p in model.parameters()):,} parameters, {num_steps} steps")

    longest = [max(encoded, key=lambda example: len(example[0]))]
    longest *= min(micro, cfg.batch_size, len(train))
    run.preflight(model, lambda: loss_of(model, make_batch(longest, run.device), cfg)[0],
                  [lambda: tensors_of(model, make_batch(longest, run.device), cfg, run)],
                  options="--micro_batch_size or --batch_size")
    run.restore(num_steps, model=model, optimizer=optimizer)

    # 4. The loop.
    ledger = Ledger(run.folder, run.tokenizer, cfg.ledger_every)
    model.train()
    num_tokens = 0
    for step in run.steps():
        examples = [train[i] for i in plan[step - 1]]
        set_lr(optimizer, lr_at(step - 1, num_steps, cfg.lr, cfg.warmup, cfg.final_lr))
        # The whole batch's token count: however it is split, each token weighs the same.
        denominator = sum(sum(mask) for _, mask in examples)
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
            show_samples(model, held_out[: cfg.num_samples], run)
        if run.save_due():
            run.save(model=model, optimizer=optimizer)
    draw_curves(run.folder)
    return run.history


if __name__ == "__main__":
    command_line(main, Config, __doc__)
