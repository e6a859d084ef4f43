"""Reductions over real tokens only, and the log-probs that every later stage is built from.

Every sum or mean of a per-token tensor in this project goes through `masked_sum` or `masked_mean`,
because the commonest silent bug of RLHF code is a filler token that enters an average. Masks are
bool, True counts.
"""

import torch
import torch.nn.functional as F


def masked_sum(x, mask, dim=None):
    """Sum of x where mask is True.

    x: (...) float; mask: same shape, bool. Returns a scalar, or x summed over `dim`.
    `torch.where` instead of `x * mask`: NaN times 0 is NaN, so a product would let a bad filler
    value poison the sum.
    """
    assert x.shape == mask.shape, f"x is {tuple(x.shape)}, mask is {tuple(mask.shape)}"
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x, mask, denominator=None, dim=None):
    """Mean of x over the True positions of mask (over all of them at once, or along `dim`).

    denominator: the number to divide by instead of this mask's own count. Under gradient
    accumulation pass the token count of the *whole* optimizer batch: a mean of micro-batch means
    would weigh tokens of short micro-batches more.
    Raises ValueError on an empty mask, since a silent 0 or NaN would hide a wrong mask.
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    if bool((count == 0).any()):
        raise ValueError(f"masked_mean over an empty mask of shape {tuple(mask.shape)}: "
                         "no token counts, so there is no mean")
    return masked_sum(x, mask, dim) / (count if denominator is None else denominator)


def masked_var(x, mask):
    """Biased variance (divided by the count) of x over the True positions of mask; a scalar."""
    # Filler is cut out before the square: 0 times the slope of a NaN would be a NaN gradient.
    centred = torch.where(mask, x - masked_mean(x, mask), torch.zeros_like(x))
    return masked_mean(centred**2, mask)


def masked_whiten(x, mask, shift_mean=True):
    """Scale x to variance 1 over the True positions, and to mean 0 unless shift_mean is False.

    x: (B, T); mask: (B, T) bool. Returns (B, T), exactly 0 outside the mask.
    The variance is biased and 1e-8 is added to it, as in lm-human-preferences (arXiv 1909.08593).
    With shift_mean=False the mean is kept: rewards are sometimes whitened so, since moving their
    mean would change what is good and what is bad.
    """
    mean = masked_mean(x, mask)
    centred = torch.where(mask, x - mean, torch.zeros_like(x))
    whitened = centred * torch.rsqrt(masked_var(x, mask) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))


def token_logprobs(logits, targets):
    """Log-prob, in nats, that `logits` give to each target token.

    logits: (B, T, V), where logits[:, t] predicts targets[:, t]; targets: (B, T) int64.
    Returns (B, T), float32 or wider. The caller makes the shift, always in the same words:
    token_logprobs(logits[:, :-1], tokens[:, 1:]).
    """
    assert logits.shape[:-1] == targets.shape, (
        f"logits are {tuple(logits.shape)}, targets {tuple(targets.shape)}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # cross_entropy is the same arithmetic as log_softmax + gather, without a second (B, T, V).
    V = logits.shape[-1]
    nats = F.cross_entropy(logits.reshape(-1, V), targets.reshape(-1), reduction="none")  # (B*T,)
    return -nats.view(targets.shape)  # (B, T)


def sequence_logprobs(logprobs, mask, average=False):
    """Log-prob of each row's masked tokens: their sum, or their mean per token if `average`.

    logprobs: (B, T) nats; mask: (B, T) bool. Returns (B,).
    DPO needs the sum (arXiv 2305.18290, Eq. 7); the length average is another objective (SimPO).
    """
    return masked_mean(logprobs, mask, dim=1) if average else masked_sum(logprobs, mask, dim=1)


def entropy(logits):
    """Entropy in nats of the distribution at each position: (..., V) -> (...), float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logp = F.log_softmax(logits, dim=-1)  # (B, T, V)
    return -(logp.exp() * logp).sum(-1)
