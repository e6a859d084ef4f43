"""From scores to advantages, against O(T^2) loops and policies small enough to enumerate."""

import math
import statistics

import pytest
import torch
from conftest import (close, gradients, next_logprobs, policy_and_reference, response_logprobs,
                      same_gradients)

from minirlhf.batches import response_mask
from minirlhf.losses import ppo_value_loss
from minirlhf.rl import (adapt_beta, gae, group_advantages, kl_estimate, normalize_scores,
                         token_rewards)

NAN = float("nan")


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- KL

def enumerable(generator, V=5):
    """Log-probs of a policy and a reference over V actions, each (V,), the policy's with logits
    that collect gradients. An expectation over the policy is then an exact sum of V terms."""
    logits = torch.randn(V, generator=generator, dtype=torch.float64, requires_grad=True)
    ref_logits = torch.randn(V, generator=generator, dtype=torch.float64)
    return logits, logits.log_softmax(-1), ref_logits.log_softmax(-1)


def kl(logp, logq):
    """KL(p || q) by its definition, over the last dimension."""
    return (logp.exp() * (logp - logq)).sum(-1)


def test_check_17_expectations_of_the_kl_estimators_on_an_enumerable_policy(generator):
    """The bug: the KL with its sign or direction reversed, which rewards drift."""
    _, logp, logq = enumerable(generator)
    p = logp.exp()
    expectation = lambda kind: (p * kl_estimate(logp, logq, kind)).sum()
    assert abs(kl(logp, logq) - kl(logq, logp)) > 0.05  # else direction could not be told
    close(expectation("k1"), kl(logp, logq).detach())
    close(expectation("k3"), kl(logp, logq).detach())
    close(expectation("k2"), (p * (logp - logq) ** 2 / 2).sum().detach())
    assert abs(expectation("k2") - kl(logp, logq)) > 0.01  # biased, by design


def test_check_17_kl_estimates_by_hand():
    """The bug: as above, seen on single tokens."""
    logprobs, ref = f64([[-1.0, -3.0]]), f64([[-2.0, -1.0]])  # d = 1 and d = -2
    close(kl_estimate(logprobs, ref), [[1.0, -2.0]])
    close(kl_estimate(logprobs, ref, "k2"), [[0.5, 2.0]])
    close(kl_estimate(logprobs, ref, "k3"), [[1 / math.e, math.e**2 - 3]])
    assert all((kl_estimate(ref, ref, kind) == 0).all() for kind in ("k1", "k2", "k3"))
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(logprobs, ref, "k4")


def test_check_18_gradients_of_the_kl_estimators_as_losses(generator):
    """The bug: k1 as a loss, whose gradient is only noise, or k3, which descends another KL."""
    logits, logp, logq = enumerable(generator)
    p = logp.exp().detach()  # samples are drawn, not differentiated
    gradient = lambda loss: torch.autograd.grad(loss, logits, retain_graph=True)[0]
    expected = lambda kind: gradient((p * kl_estimate(logp, logq, kind)).sum())
    close(expected("k1"), torch.zeros(5))
    close(expected("k2"), gradient(kl(logp, logq)))
    close(expected("k3"), gradient(kl(logq, logp)))


def test_check_18_k2_over_sequences_needs_the_sequence_log_ratio(generator):
    """The bug: believing that per-token k2 differentiates the KL of whole sequences. It is exact
    given the prefix, and does not see that the first token chooses which prefixes come."""
    V = 3
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    first, second = draw(V).requires_grad_(), draw(V, V).requires_grad_()
    logp1, logp2 = first.log_softmax(-1), second.log_softmax(-1)  # (V,), (V, V): given the first
    logq1, logq2 = draw(V).log_softmax(-1), draw(V, V).log_softmax(-1)
    logp, logq = logp1[:, None] + logp2, logq1[:, None] + logq2  # (V, V): of whole sequences
    p = logp.exp().detach()

    def gradients(loss):
        return torch.autograd.grad(loss, (first, second), retain_graph=True)

    exact = gradients(kl(logp.flatten(), logq.flatten()))
    of_sequence = gradients((p * kl_estimate(logp, logq, "k2")).sum())
    per_token = gradients((p * (kl_estimate(logp1, logq1, "k2")[:, None]
                                + kl_estimate(logp2, logq2, "k2"))).sum())
    for mine, its in zip(of_sequence, exact):
        close(mine, its)
    given_prefix = gradients(kl(logp1, logq1) + (p.sum(1) * kl(logp2, logq2)).sum())
    for mine, its in zip(per_token, given_prefix):
        close(mine, its)
    assert (per_token[0] - exact[0]).abs().max() > 0.01


# ---------------------------------------------------------------- scores and rewards

def test_check_10_a_missing_end_replaces_the_score_after_scaling_and_clipping():
    """The bugs: a penalty that is itself scaled or clipped, or subtracted rather than put in the
    score's place, so that a long high-scoring ramble stays above an honest short answer."""
    scores = f64([10.0, 30.0, -90.0, 30.0, 10.0])
    ended = torch.tensor([True, True, True, False, False])
    result = normalize_scores(scores, mean=10.0, std=5.0, clip=2.0, ended=ended,
                              missing_end_score=-3.0)
    assert result.tolist() == [0.0, 2.0, -2.0, -3.0, -3.0]
    unclipped = normalize_scores(scores, 10.0, 5.0, 0, ended, -3.0)
    assert unclipped.tolist() == [0.0, 4.0, -20.0, -3.0, -3.0]


def test_check_29_a_score_of_exactly_zero_is_a_score():
    """The bug: `score or missing_end_score`, which takes 0.0 for a missing one."""
    result = normalize_scores(f64([0.0]), 0.0, 1.0, 5.0, torch.tensor([True]), -3.0)
    assert result.tolist() == [0.0]


def test_check_09_the_score_lands_on_the_last_response_token():
    """The bug: the reward on the first filler position, or one token early."""
    kl_per_token = f64([[NAN, 0.5, -0.25, NAN], [1.0, 2.0, 3.0, 4.0], [NAN, NAN, NAN, 0.0]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    rewards = token_rewards(f64([1.0, -2.0, 7.0]), kl_per_token, mask, beta=0.1)
    close(rewards, [[0.0, -0.05, 0.025 + 1.0, 0.0], [-0.1, -0.2, -0.3, -0.4 - 2.0],
                    [0.0, 0.0, 0.0, 7.0]])


def test_check_08_the_end_token_pays_kl_too():
    """The bug: the score *replaces* the KL term on the last token, so ending is free of charge."""
    rewards = token_rewards(f64([1.0]), f64([[2.0]]), torch.tensor([[True]]), beta=0.5)
    assert rewards.item() == 0.0


def test_a_row_without_response_is_refused():
    with pytest.raises(AssertionError, match="nowhere to put its score"):
        token_rewards(f64([1.0]), f64([[2.0]]), torch.tensor([[False]]), beta=0.5)


def test_check_30_beta_moves_with_the_sequence_sum_by_at_most_a_fifth_of_the_error():
    """The bug: a controller with the wrong sign, or fed with a mean per token."""
    assert adapt_beta(0.1, kl=6.0, target=6.0, num_episodes=100) == 0.1
    # Too far from the reference: a larger beta. The error 6.6 / 6 - 1 is 0.1; 9 / 6 is cut to 0.2.
    assert adapt_beta(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.1 * 1.01, rel=1e-9)
    assert adapt_beta(0.1, 9.0, 6.0, 100, 1000) == pytest.approx(0.1 * 1.02, rel=1e-9)
    assert adapt_beta(0.1, 1.0, 6.0, 100, 1000) == pytest.approx(0.1 * 0.98, rel=1e-9)


def test_beta_can_move_within_a_default_run():
    """Bug: the horizon of a run of two million episodes. Here 100 steps of 96 change it sevenfold."""
    low = high = 0.1
    for _ in range(100):
        low, high = (adapt_beta(beta, kl, 6.0, 96, horizon=1000)
                     for beta, kl in ((low, 0.0), (high, 60.0)))
    assert 6 < high / 0.1 < 8 and 6 < 0.1 / low < 8


@pytest.mark.parametrize("num_episodes, horizon", [(0, 1000), (1001, 1000), (96, 10), (1, 0)])
def test_beta_never_turns_negative(num_episodes, horizon):
    """Bug: a horizon of 10 and steps of 96 responses, and drift is rewarded."""
    with pytest.raises(ValueError, match="expected a horizon of at least one step's episodes"):
        adapt_beta(0.1, 0.0, 6.0, num_episodes, horizon)
    assert adapt_beta(0.1, 0.0, 6.0, 1000, 1000) == pytest.approx(0.08, rel=1e-9)


# ---------------------------------------------------------------- advantages

PROMPT_LENS, LENGTHS, T = torch.tensor([1, 3, 2, 6]), torch.tensor([8, 4, 6, 8]), 8


def ragged(generator):
    """Rewards and values (4, 7) with responses of 7, 1, 4 and 2 tokens; NaN everywhere else."""
    mask = response_mask(PROMPT_LENS, LENGTHS, T)
    rewards, values = torch.randn(2, 4, T - 1, generator=generator, dtype=torch.float64)
    return torch.where(mask, rewards, NAN), torch.where(mask, values, NAN), mask


def slow_gae(rewards, values, gamma, lam):
    """The definition, for one response given as lists: A_t = sum over l of (gamma lam)^l delta_t+l.
    The value after the last token is 0."""
    n, values = len(rewards), values + [0.0]
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (0.9, 1.0), (1, 1)])
def test_check_15_gae_equals_a_quadratic_loop_on_ragged_lengths(gamma, lam, generator):
    """The bug: the recursion starts in the filler and bootstraps from a value that nobody means,
    or runs on from one row's response into its prompt."""
    rewards, values, mask = ragged(generator)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b in range(4):
        expected = slow_gae(rewards[b][mask[b]].tolist(), values[b][mask[b]].tolist(), gamma, lam)
        close(advantages[b][mask[b]], expected)
    close(returns[mask], (advantages + values)[mask])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_check_15_lam_1_gives_reward_to_go_and_lam_0_the_one_step_error(generator):
    """The bug: gamma or lam in the wrong place of the recursion."""
    rewards, values, mask = ragged(generator)
    advantages, returns = gae(rewards, values, mask, 0.9, 1.0)
    reward_to_go = [sum(0.9 ** (k - t) * rewards[0, k].item() for k in range(t, 7))
                    for t in range(7)]
    close(returns[0], reward_to_go)  # whatever the critic believes
    one_step, _ = gae(rewards, values, mask, 0.9, 0.0)
    next_values = torch.cat([values[0, 1:], torch.zeros(1)])
    close(one_step[0], rewards[0] + 0.9 * next_values - values[0])


def test_check_15_gae_by_hand():
    """The bug: any slip in the recursion; here the reader can follow each number."""
    rewards, values = f64([[0.0, 0.0, 1.0, 9.0]]), f64([[0.5, 0.25, 0.5, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    # deltas: 0.25 - 0.5, 0.5 - 0.25, 1 + 0 - 0.5; from the end: 0.5, 0.25 + 0.25, -0.25 + 0.25.
    assert advantages.tolist() == [[0.0, 0.5, 0.5, 0.0]]
    assert returns.tolist() == [[0.5, 0.75, 1.0, 0.0]]


def test_check_15_gae_does_not_change_its_arguments(generator):
    """The bug: an in-place edit of values, which the value clip needs unchanged afterwards."""
    rewards, values, mask = ragged(generator)
    copies = rewards.clone(), values.clone()
    gae(rewards, values, mask, 1.0, 0.95)
    assert torch.equal(rewards.nan_to_num(), copies[0].nan_to_num())
    assert torch.equal(values.nan_to_num(), copies[1].nan_to_num())


def test_check_20_the_critic_learns_the_returns(generator):
    """The bug: returns that carry gradient, or a target made from the new values: the critic then
    chases itself and its explained variance does not rise."""
    rewards, values, mask = ragged(generator)
    values = torch.where(mask, values, 0.0)
    _, returns = gae(rewards, values, mask, 1.0, 0.95)
    assert not returns.requires_grad
    critic = values.clone().requires_grad_()
    optimizer = torch.optim.SGD([critic], lr=5.0)
    for _ in range(50):
        optimizer.zero_grad()
        ppo_value_loss(critic, values, returns, mask, clip_range=0.0)[0].backward()
        assert (critic.grad[mask] != 0).any()
        optimizer.step()
    error = (critic - returns)[mask].var() / returns[mask].var()
    assert 1 - error > 0.99  # explained variance


def test_check_15_gae_reads_no_filler_and_edits_no_argument():
    """Bug: an in-place edit of values, which the value clip needs unchanged afterwards."""
    rewards, values = torch.tensor([[8.0, 1.0, 2.0, 7.0]]), torch.tensor([[9.0, 3.0, 5.0, 6.0]])
    arguments = rewards.clone(), values.clone(), torch.tensor([[False, True, True, False]])
    advantages, returns = gae(*arguments, gamma=0.5, lam=0.5)
    # deltas: 1 + 5 / 2 - 3 and 2 - 5; from the end -3 and 0.5 - 3 / 4.
    assert advantages.tolist() == [[0.0, -0.25, -3.0, 0.0]]
    assert returns.tolist() == [[0.0, 2.75, 2.0, 0.0]]
    assert torch.equal(arguments[0], rewards) and torch.equal(arguments[1], values)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_check_18_gradients_of_kl_losses_over_sequences_against_enumeration(kind):
    """Bug: k1 as a loss, whose gradient is only noise, or k3, which descends another KL: what
    estimates the KL well does not for that reason have the KL's gradient.

    Curve: with k1 the KL grows alike for every coefficient; with k3 its gradient has spikes.
    Seen: huggingface/trl#2277, where Nash-MD differentiated the summed log-ratio, and
    OpenRLHF#1309; arXiv 2506.09477 collects the pitfalls.
    """
    policy, reference = policy_and_reference()
    logp, logq = response_logprobs(policy).sum(1), response_logprobs(reference).sum(1)  # (21,)
    p = logp.exp().detach()  # samples are drawn, not differentiated
    loss = (p * kl_estimate(logp[:, None], logq[:, None], kind).squeeze(1)).sum()
    kl = (logp.exp() * (logp - logq)).sum()
    reverse = (logq.exp() * (logq - logp)).sum()
    mine, forward, backward = (gradients(x, policy) for x in (loss, kl, reverse))
    assert not same_gradients(forward, backward, rtol=0.1)
    if kind == "k1":  # zero, measured by the size that it should have had
        assert all(g.norm() <= 1e-9 * size.norm() for g, size in zip(mine, forward))
    else:
        assert same_gradients(mine, forward if kind == "k2" else backward)


def test_check_18_k2_per_token_is_exact_given_the_prefix_only():
    """Bug: believing that it differentiates the KL of whole sequences too; it does not see that the
    first token chooses which prefixes come."""
    policy, reference = policy_and_reference()
    logp, logq = response_logprobs(policy), response_logprobs(reference)  # (21, 2)
    p = logp.sum(1).exp().detach()  # (21,)
    mine = gradients((p * kl_estimate(logp, logq, "k2").sum(1)).sum(), policy)

    def kl(prefix):
        new, ref = next_logprobs(policy, prefix), next_logprobs(reference, prefix)  # (5,)
        return (new.exp() * (new - ref)).sum()

    first = next_logprobs(policy, []).exp().detach()  # (5,)
    given_prefix = kl([]) + sum(first[i] * kl([i]) for i in range(1, 5))
    whole = (logp.sum(1).exp() * (logp - logq).sum(1)).sum()
    assert same_gradients(mine, gradients(given_prefix, policy))
    assert not same_gradients(mine, gradients(whole, policy), rtol=0.01)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_check_22_equal_rewards_teach_nothing_though_their_mean_is_rounded(dtype, scale):
    """Bug: equal rewards recognised by a small deviation, or by an epsilon added to it: a mean is
    rounded, and the rounding error divided by a deviation of its own size is near 1.

    Curve: rare isolated spikes of loss and gradient norm, from groups that should teach nothing.
    Seen: verl#4598, where rewards that are all 0.2 teach something; NVIDIA-NeMo/RL#4161, where such
    a residue gave a loss of -26 in one step.
    """
    rounding_errors = 0
    # Seven times 0.1 first. PyTorch adds up one row in another order than several.
    for value in (0.1, 0.2, 1 / 3, -3.0, 0.0, 1e6 + 0.1, 1e-30):
        for K in (7, 2, 3, 5, 6, 10, 11):
            for B in (1, 2):
                scores = torch.full((B, K), value, dtype=dtype)
                assert group_advantages(scores, scale).tolist() == [[0.0] * K] * B
                rounding_errors += (scores.mean(1) != scores[:, 0]).any().item()
    assert rounding_errors > 0  # else the test would show nothing


def test_check_22_a_difference_is_a_difference_however_small():
    """Bug: an epsilon that takes rewards which do differ for equal."""
    scores = torch.tensor([[1e-9, 0.0], [5.0, 5.0 + 1e-9]], dtype=torch.float64)
    root = 1 / math.sqrt(2)
    close(group_advantages(scores), [[root, -root], [-root, root]], rtol=1e-6)


@pytest.mark.parametrize("scale", [True, False])
def test_check_22_a_group_of_one_gets_zero(scale):
    """Bug: the unbiased deviation of one number, 0 / 0, or the raw score as its own advantage."""
    assert group_advantages(torch.tensor([[3.0], [-7.0]]), scale).tolist() == [[0.0], [0.0]]


def test_check_22_group_advantages_by_hand():
    """Bug: the biased deviation, which gives two responses 1 and -1; a mean over all prompts."""
    scores = torch.tensor([[3.0, 1.0], [-2.0, 5.0], [4.0, 4.0]], dtype=torch.float64)
    before, root = scores.clone(), 1 / math.sqrt(2)
    close(group_advantages(scores), [[root, -root], [-root, root], [0.0, 0.0]])
    assert group_advantages(scores, scale=False).tolist() == [[1, -1], [-3.5, 3.5], [0, 0]]
    assert torch.equal(scores, before)


def test_check_22_group_advantages_equal_a_loop_over_prompts(generator):
    """Bug: any slip; here beside the deviation of Python's own library."""
    scores = 2 + 3 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    scores[2] = 0.1
    for row, scaled, centred in zip(scores.tolist(), group_advantages(scores),
                                    group_advantages(scores, scale=False)):
        mean, deviation = statistics.fmean(row), statistics.stdev(row)
        equal = len(set(row)) == 1
        close(centred, [0.0 if equal else r - mean for r in row])
        close(scaled, [0.0 if equal else (r - mean) / deviation for r in row])
