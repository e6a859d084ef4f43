"""From scores to advantages: the arithmetic between sampling a response and updating on it.

All tensors follow the grid: (B, T-1), column t speaks of emitting tokens[:, t+1], and everything
outside the mask is exactly 0.
"""

import torch


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    logprobs, ref_logprobs: (B, T-1) nats. Returns (B, T-1) nats.
    With d = logprobs - ref_logprobs, the policy minus the reference (the other way round would
    *reward* drift):
      k1 = d                    unbiased, can be negative; what goes into the reward by default
      k2 = d^2 / 2              biased, never negative
      k3 = exp(-d) - 1 + d      unbiased, never negative
    Source: Schulman, "Approximating KL divergence" (2020). As a *loss* on sampled tokens they
    behave differently: in expectation k1's gradient is zero; k2's is that of the KL, of each token given
    its prefix, or of whole sequences if the summed d is squared; k3's, of the summed d, is that of
    the other direction, KL(reference || policy).
    """
    d = logprobs - ref_logprobs  # (B, T-1)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d**2
    if kind == "k3":
        return torch.exp(-d) - 1 + d
    raise ValueError(f"kl kind is {kind!r}; expected 'k1', 'k2' or 'k3'")


def normalize_scores(scores, mean, std, clip, ended, missing_end_score):
    """Bring scores to a common scale; a response that never ended gets a fixed low score.

    scores: (B,) raw; mean, std: floats, the scores of the SFT model's answers; clip: limit on
    |score| after scaling (0: none); ended: (B,) bool. Returns (B,).
    The order matters: scale, clip, and only then *replace* where not ended. Subtracting a penalty
    instead would let a long, high-scoring ramble stay above an honest short answer.
    """
    scores = (scores - mean) / std
    if clip > 0:
        scores = scores.clamp(-clip, clip)
    return torch.where(ended, scores, torch.full_like(scores, missing_end_score))


def token_rewards(scores, kl, mask, beta):
    """Reward of each token: -beta * kl everywhere, plus the score on the last response token.

    scores: (B,); kl: (B, T-1) nats; mask: (B, T-1) bool; beta: reward units per nat.
    Returns (B, T-1), 0 outside the mask. The score comes once, at the end, because the reward
    model judged the whole response (InstructGPT, arXiv 2203.02155, Eq. 2).
    """
    rewards = torch.where(mask, -beta * kl, torch.zeros_like(kl))  # (B, T-1)
    # The last True of each row: argmax over positions where the mask holds.
    positions = torch.arange(mask.shape[1], device=mask.device)  # (T-1,)
    last = torch.where(mask, positions, -1).argmax(1)  # (B,)
    has_response = mask.any(1)  # (B,)
    assert bool(has_response.all()), "a row without any response token has nowhere to put its score"
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation, a loop from the last token to the first.

    rewards, values: (B, T-1); mask: (B, T-1) bool, one unbroken run of True per row.
    Returns (advantages, returns), each (B, T-1), 0 outside the mask; returns = advantages + values.
      delta_t = r_t + gamma * V_{t+1} - V_t        A_t = delta_t + gamma * lam * A_{t+1}
    (arXiv 1506.02438, Eq. 16). V after a row's last response token is 0, whether the response
    ended or ran out of room: an episode ends there, and nothing bootstraps from filler.
    """
    real = mask.to(values.dtype)  # (B, T-1)
    values = torch.where(mask, values, torch.zeros_like(values))
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    advantages = torch.zeros_like(values)  # (B, T-1)
    next_value = torch.zeros_like(values[:, 0])  # (B,)
    next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        next_advantage = (delta + gamma * lam * next_advantage) * real[:, t]  # (B,)
        next_value = values[:, t]  # 0 on filler, so the last real token sees a next value of 0
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * real


def group_advantages(scores, scale=True):
    """How much better each of a prompt's K responses is than the others: a baseline without critic.

    scores: (B, K), the K responses to each prompt. Returns (B, K): (r - mean) / deviation over the
    group, the deviation unbiased (GRPO, arXiv 2402.03300, section 4.1.2); without the division if
    `scale` is False (Dr. GRPO, arXiv 2503.20783). A group whose scores are all equal says nothing
    about any of them, and gets exactly 0; so does a group of one. Equal is tested by max == min,
    not by a small deviation: the mean of seven times 0.1 is not 0.1, and dividing the rounding
    error by a deviation of the same size would give advantages near 1.
    """
    centred = scores - scores.mean(1, keepdim=True)  # (B, K)
    equal = scores.amax(1, keepdim=True) == scores.amin(1, keepdim=True)  # (B, 1)
    if scale and scores.shape[1] > 1:
        centred = centred / scores.std(1, keepdim=True)  # 0 / 0 where equal: replaced below
    return torch.where(equal, torch.zeros_like(centred), centred)


def adapt_beta(beta, kl, target, num_episodes, horizon=10000):
    """Move the KL coefficient so that the measured KL drifts towards a target.

    kl: the mean over responses of the *sequence sum* of the per-token KL, in nats: the number that
    is logged. Per-token means would need another target. num_episodes: responses since the last
    call; horizon: after how many responses beta would change by the whole (clipped) error, a fifth
    at most. Source: Ziegler et al., arXiv 1909.08593, Eq. 3, where num_episodes / horizon is
    K_beta = 0.1. Their 10,000 episodes are of a run of two million: in one of ten thousand beta
    would change by a fifth in all, so that a short run needs about ten steps' episodes. Raises
    ValueError where one step has more than a horizon's episodes: with a multiple of it beta could
    turn negative, which rewards drift.
    """
    if not 0 < num_episodes <= horizon:
        raise ValueError(f"{num_episodes} episodes a step with a horizon of {horizon}; expected a "
                         "horizon of at least one step's episodes")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * num_episodes / horizon)
