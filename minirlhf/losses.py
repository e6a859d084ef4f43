"""Every loss of the road, each a pure function of tensors.

No loss knows a model: tensors in, tensors out, so each can be checked by hand. Token losses take
the (B, T-1) tensors of the grid and a mask; preference losses take one number per sequence.
`denominator` is the count of real tokens in the whole optimizer batch, so that splitting a batch
into micro-batches changes nothing.
"""

import torch
import torch.nn.functional as F

from minirlhf.masked import masked_mean, masked_sum


def sft_loss(logprobs, mask, denominator=None):
    """Negative log-likelihood of the trained tokens: mean over all unmasked tokens of the batch.

    logprobs: (B, T-1) nats, of tokens[:, 1:]; mask: (B, T-1) bool, True on the tokens to imitate
    (the assistant's words and its end token). Returns a scalar in nats per token.
    """
    return -masked_mean(logprobs, mask, denominator)


def reward_model_loss(scores, ranks, margins=None):
    """Bradley-Terry loss of K ranked answers, mean over each prompt's strict pairs.

    scores: (B, K) the reward model's score of each answer. ranks: (B, K) int, 0 is best; equal
    ranks are a tie and make no pair; -1 marks an absent answer (prompts with fewer than K).
    margins: (B, K, K) >= 0, how much i must beat j by (Llama 2, arXiv 2307.09288, Eq. 2).
    Returns (B,): -log sigmoid(r_i - r_j - margin) averaged over the prompt's pairs, 0 for a prompt
    without a pair. All pairs of one prompt count as one example, since they are correlated
    (InstructGPT, arXiv 2203.02155, Eq. 1). A pair of answers is simply K = 2.
    """
    assert scores.shape == ranks.shape, f"scores {tuple(scores.shape)}, ranks {tuple(ranks.shape)}"
    present = ranks >= 0  # (B, K)
    better = ranks[:, :, None] < ranks[:, None, :]  # (B, K, K): True where i is ranked above j
    pairs = better & present[:, :, None] & present[:, None, :]  # (B, K, K)
    difference = scores[:, :, None] - scores[:, None, :]  # (B, K, K)
    if margins is not None:
        difference = difference - margins
    # Emptied before the logsigmoid too: a NaN or infinite score of an absent answer would leave the
    # loss alone and still come back through the gradient.
    difference = torch.where(pairs, difference, torch.zeros_like(difference))
    # logsigmoid, never log(sigmoid(x)): the latter is -inf at x = -100.
    nats = masked_sum(-F.logsigmoid(difference), pairs, dim=(1, 2))  # (B,)
    return nats / pairs.sum((1, 2)).clamp(min=1)  # (B,)


def surrogate_losses(ratio, advantages, clip_range=0.2):
    """The two losses of each token that PPO compares: (unclipped, clipped), each (B, T-1).

    ratio: (B, T-1), probability under the policy in training over that under the one that sampled.
    """
    return -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)


def ppo_policy_loss(new_logprobs, logprobs, advantages, mask, clip_range=0.2, denominator=None):
    """PPO's clipped surrogate loss (arXiv 1707.06347, Eq. 7), mean over all response tokens.

    new_logprobs: (B, T-1) nats, with gradient; logprobs: (B, T-1) nats, of the policy that sampled;
    advantages: (B, T-1), whitened by the caller; mask: (B, T-1) bool.
    Returns (loss, stats): a scalar, and detached scalars: clip_frac, the share of tokens whose
    clipped branch is strictly the larger loss, and so gets no gradient; approx_kl, the mean of
    ratio - 1 - log ratio (nats per token; the k3 estimator of KL(rollout || new)); ratio_mean.
    """
    log_ratio = torch.where(mask, new_logprobs - logprobs, torch.zeros_like(logprobs))  # (B, T-1)
    ratio = torch.exp(log_ratio)  # (B, T-1), exactly 1 outside the mask
    unclipped, clipped = surrogate_losses(ratio, advantages, clip_range)  # (B, T-1), (B, T-1)
    # The larger *loss* is the pessimistic one. Taking the minimum here, as one does for the
    # objective, would reward the policy for leaving the trust region.
    loss = masked_mean(torch.maximum(unclipped, clipped), mask, denominator)
    with torch.no_grad():
        stats = {
            "clip_frac": masked_mean((clipped > unclipped).float(), mask),
            "approx_kl": masked_mean(ratio - 1 - log_ratio, mask),
            "ratio_mean": masked_mean(ratio, mask),
        }
    return loss, stats


def ppo_value_loss(new_values, values, returns, mask, clip_range=0.2, denominator=None):
    """Half the squared error of the critic, with the new value kept near the old one.

    new_values: (B, T-1) with gradient; values: (B, T-1) at rollout; returns: (B, T-1); mask: bool.
    The larger of the clipped and the unclipped error counts, mean over all response tokens, as in
    lm-human-preferences (arXiv 1909.08593). clip_range <= 0 switches the clip off.
    Returns (loss, stats) with value_clip_frac.
    """
    # Filler is cut out here as well as in the mean, so that none of its gradient comes back either.
    new_values = torch.where(mask, new_values, torch.zeros_like(new_values))  # (B, T-1)
    unclipped = (new_values - returns) ** 2  # (B, T-1)
    near = values + (new_values - values).clamp(-clip_range, clip_range)  # (B, T-1)
    clipped = (near - returns) ** 2 if clip_range > 0 else unclipped  # (B, T-1)
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask, denominator)
    with torch.no_grad():
        # Inside the range both branches are one number, up to rounding: that is no clipping.
        bites = (clipped > unclipped) & ((new_values - values).abs() > clip_range)  # (B, T-1)
        stats = {"value_clip_frac": masked_mean(bites.float(), mask)}
    return loss, stats


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
             beta=0.1, label_smoothing=0.0):
    """Direct preference optimisation (arXiv 2305.18290, Eq. 7).

    Four (B,) tensors of *summed* response log-probs in nats; the policy's carry gradient.
    label_smoothing: the share of labels believed to be flipped (conservative DPO).
    Returns (losses, chosen_rewards, rejected_rewards), each (B,): per-pair losses and the detached
    implicit rewards beta * (log pi - log pi_ref). At the start, where policy and reference agree,
    every loss is log 2.
    """
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)  # (B,)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)  # (B,)
    margin = chosen_rewards - rejected_rewards  # (B,)
    losses = (-(1 - label_smoothing) * F.logsigmoid(margin)
              - label_smoothing * F.logsigmoid(-margin))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()
