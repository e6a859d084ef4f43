"""AdamW's parameter groups and the learning-rate schedule."""

import math

import torch


def make_optimizer(model, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW over the trainable parameters; weight decay only on matrices.

    Decaying a LayerNorm's gain or a bias pulls it towards 0 for no reason; embeddings and linear
    weights, the tensors with two dimensions, are what decay is meant for (as in GPT-2 and GPT-3
    training codes).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]  # each shared tensor once
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def lr_at(step, num_steps, lr, warmup=0, final=0.0, shape="cosine"):
    """Learning rate of `step` (counted from 0): a linear warmup, then a fall to final * lr.

    The first step has lr / warmup, not 0, so it is not lost; the last of num_steps comes within
    one step of the final value. shape: "cosine", "linear" or "constant" (no fall).
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)  # 0 .. just under 1
    if shape == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    elif shape == "linear":
        left = 1 - progress
    elif shape == "constant":
        left = 1.0
    else:
        raise ValueError(f"schedule is {shape!r}; expected 'cosine', 'linear' or 'constant'")
    return lr * (final + (1 - final) * left)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
