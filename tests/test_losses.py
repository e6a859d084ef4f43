"""Every loss against numbers worked out by hand, loops, finite differences and identities."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close, softplus

from minirlhf.losses import dpo_loss, ppo_policy_loss, ppo_value_loss, reward_model_loss, sft_loss
from minirlhf.masked import sequence_logprobs

NAN = float("nan")


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def row_of(values):
    """A (1, n) float64 tensor that collects gradients."""
    return f64([values]).requires_grad_()


def ragged(generator, lengths=(3, 1, 5)):
    """Random (B, T-1) tensors and a mask with rows of unequal length, the filler NaN."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (B, T-1)
    draw = lambda: torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    return [torch.where(mask, draw(), NAN) for _ in range(4)], mask


# ---------------------------------------------------------------- supervised fine-tuning

def test_sft_loss_by_hand():
    logprobs = row_of([-1.0, -2.0, NAN])
    loss = sft_loss(logprobs, torch.tensor([[True, True, False]]))
    assert loss.item() == 1.5
    loss.backward()
    assert logprobs.grad.tolist() == [[-0.5, -0.5, 0.0]]


def test_check_13_the_prompt_gets_no_gradient_in_sft():
    """The bug: the model is trained to write the user's words too."""
    logprobs = row_of([-1.0, -2.0, -3.0, -4.0])
    sft_loss(logprobs, torch.tensor([[False, False, True, True]])).backward()
    assert logprobs.grad.tolist() == [[0.0, 0.0, -0.5, -0.5]]


# ---------------------------------------------------------------- reward model

def test_reward_model_loss_of_a_pair_by_hand():
    scores = f64([[1.0, 0.0], [1.0, 0.0]]).requires_grad_()
    losses = reward_model_loss(scores, torch.tensor([[0, 1], [1, 0]]))
    close(losses, [softplus(-1), softplus(1)])
    losses.sum().backward()
    wrong = 1 / (1 + math.exp(1))  # sigmoid(-1): how sure the model is of the wrong order
    close(scores.grad, [[-wrong, wrong], [1 - wrong, wrong - 1]])


def test_check_28_ranked_answers_equal_a_loop_over_strict_pairs(generator):
    """The bugs: ties that make a pair; one mean over all pairs, so that prompts with many answers
    outweigh the others."""
    scores = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    ranks = torch.tensor([[0, 1, 2, 3], [2, 0, 0, 1], [1, -1, 0, -1], [0, 0, 0, 0]])
    losses = reward_model_loss(scores, ranks)
    for b in range(4):
        pairs = [softplus(-(scores[b, i] - scores[b, j]).item())
                 for i in range(4) for j in range(4)
                 if 0 <= ranks[b, i] < ranks[b, j]]
        assert len(pairs) == (6, 5, 1, 0)[b]
        expected = sum(pairs) / len(pairs) if pairs else 0.0
        assert losses[b].item() == pytest.approx(expected, rel=1e-9)


def test_check_28_a_tie_makes_no_pair_and_no_gradient():
    """The bug: equally good answers are pushed apart (or a prompt without a pair gives 0 / 0)."""
    scores = row_of([5.0, -5.0])
    loss = reward_model_loss(scores, torch.tensor([[1, 1]]))
    loss.sum().backward()
    assert loss.tolist() == [0.0] and scores.grad.tolist() == [[0.0, 0.0]]


def test_an_absent_answers_score_changes_nothing():
    for absent in (0.0, 100.0, float("inf"), NAN):
        scores = row_of([1.0, absent, 0.0])
        loss = reward_model_loss(scores, torch.tensor([[0, -1, 1]]))
        close(loss, [softplus(-1)])
        loss.sum().backward()
        wrong = 1 / (1 + math.exp(1))
        close(scores.grad, [[-wrong, 0.0, wrong]])


def test_the_order_of_the_answers_does_not_matter(generator):
    scores = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    ranks = torch.tensor([[0, 1, 2, 3], [1, 1, 0, 2], [0, 1, -1, -1]])
    shuffle = torch.tensor([2, 0, 3, 1])
    shuffled = reward_model_loss(scores[:, shuffle], ranks[:, shuffle])
    close(shuffled, reward_model_loss(scores, ranks))


def test_a_margin_asks_for_a_larger_difference():
    scores, ranks = f64([[1.0, 0.0]]), torch.tensor([[0, 1]])
    margins = torch.zeros(1, 2, 2, dtype=torch.float64)
    margins[0, 0, 1] = 3.0  # answer 0 must beat answer 1 by 3
    close(reward_model_loss(scores, ranks, margins), [softplus(-(1 - 3))])
    close(reward_model_loss(scores, ranks, torch.zeros_like(margins)), [softplus(-1)])


def test_check_26_reward_model_loss_is_stable_at_differences_of_100():
    """The bug: log(sigmoid(x)), which is -inf in float32 at x = -100, with a NaN gradient."""
    for difference, nats, slope in ((-100.0, 100.0, -1.0), (100.0, 0.0, 0.0)):
        scores = torch.tensor([[difference, 0.0]], requires_grad=True)  # float32
        loss = reward_model_loss(scores, torch.tensor([[0, 1]]))
        loss.sum().backward()
        assert loss.item() == pytest.approx(nats, abs=1e-30)
        assert scores.grad[0, 0].item() == pytest.approx(slope, abs=1e-30)


# ---------------------------------------------------------------- PPO, policy

def policy_loss(ratios, advantages, **options):
    """The loss of one row, given its ratios; returns it, its statistics and d loss / d log-prob."""
    new_logprobs = f64([[math.log(r) - 2 for r in ratios]]).requires_grad_()
    logprobs = torch.full_like(new_logprobs, -2.0).detach()
    mask = torch.ones(logprobs.shape, dtype=torch.bool)
    loss, stats = ppo_policy_loss(new_logprobs, logprobs, f64([advantages]), mask, **options)
    loss.backward()
    return loss.item(), stats, new_logprobs.grad[0]


@pytest.mark.parametrize("ratio, advantage, expected, clipped", [
    (1.5, 1.0, -1.2, True),  # good token, already much likelier: no further push
    (0.5, 1.0, -0.5, False),  # good token that became rarer: full push back
    (1.5, -1.0, 1.5, False),  # bad token that became likelier: full push back
    (0.5, -1.0, 0.8, True),  # bad token, already much rarer: no further push
    (1.1, 1.0, -1.1, False), (0.9, -1.0, 0.9, False),  # inside the trust region
])
def test_check_24_clip_takes_the_larger_loss_on_both_sides(ratio, advantage, expected, clipped):
    """The bug: minimum instead of maximum of the losses, or a clip on one side only."""
    loss, stats, gradient = policy_loss([ratio], [advantage])
    assert loss == pytest.approx(expected, rel=1e-9)
    assert stats["clip_frac"] == float(clipped)
    # d(-A * ratio) / d log-prob = -A * ratio, or exactly nothing where the clip holds.
    close(gradient, [0.0 if clipped else -advantage * ratio])


def test_check_24_a_clip_that_changes_nothing_is_not_counted():
    """The bug: counting every token with a ratio outside the range, also where the unclipped branch
    is the one used, or where the advantage is 0."""
    loss, stats, _ = policy_loss([2.0, 0.5, 2.0, 1.0], [0.0, 1.0, -1.0, 1.0])
    assert stats["clip_frac"] == 0.0
    assert loss == pytest.approx((0.0 - 0.5 + 2.0 - 1.0) / 4, rel=1e-9)


def test_check_24_statistics_leave_the_filler_out(generator):
    """The bug: a clip fraction over all T - 1 columns: too small by the share of filler."""
    mask = torch.tensor([[True, True, False, False]])
    new_logprobs = f64([[math.log(2), math.log(1.1), math.log(9), NAN]])
    advantages = f64([[1.0, 1.0, 1.0, NAN]])
    _, stats = ppo_policy_loss(new_logprobs, torch.zeros_like(new_logprobs), advantages, mask)
    assert stats["clip_frac"] == 0.5
    close(stats["ratio_mean"], 1.55)
    close(stats["approx_kl"], (2 - 1 - math.log(2) + 1.1 - 1 - math.log(1.1)) / 2)


def test_check_04_at_ratio_one_the_gradient_is_the_plain_policy_gradient():
    """The bug: anything that makes the first minibatch's ratio differ from 1."""
    loss, stats, gradient = policy_loss([1.0, 1.0], [2.0, -3.0])
    assert stats["ratio_mean"] == 1 and stats["approx_kl"] == 0 and stats["clip_frac"] == 0
    assert loss == pytest.approx(0.5, rel=1e-9)
    close(gradient, [-1.0, 1.5])


def test_clip_range_is_used():
    assert policy_loss([1.5], [1.0], clip_range=0.3)[0] == pytest.approx(-1.3, rel=1e-9)


def test_ppo_policy_loss_equals_a_loop_and_ignores_nan_filler(generator):
    (new, old, advantages, _), mask = ragged(generator)
    new.requires_grad_()
    loss, stats = ppo_policy_loss(new, old, advantages, mask)
    terms = []
    for n, o, a in zip(new[mask].tolist(), old[mask].tolist(), advantages[mask].tolist()):
        ratio = math.exp(n - o)
        terms.append(-min(a * ratio, a * min(max(ratio, 0.8), 1.2)))
    close(loss, sum(terms) / len(terms))
    loss.backward()
    assert (new.grad[~mask] == 0).all() and torch.isfinite(new.grad).all()
    assert not any(s.requires_grad for s in stats.values())


# ---------------------------------------------------------------- PPO, critic

@pytest.mark.parametrize("new, old, target, clip_range, expected, slope, clipped", [
    (1.0, 0.0, 2.0, 0.2, 0.5 * 1.8**2, 0.0, 1.0),  # right way, already 0.2 away: no push
    (1.0, 0.0, -1.0, 0.2, 0.5 * 2.0**2, 2.0, 0.0),  # wrong way: the full push back
    (0.1, 0.0, 2.0, 0.2, 0.5 * 1.9**2, -1.9, 0.0),  # near the old value
    (1.0, 0.0, 2.0, 0.0, 0.5 * 1.0**2, -1.0, 0.0),  # clip switched off
])
def test_ppo_value_loss_by_hand(new, old, target, clip_range, expected, slope, clipped):
    new_values = row_of([new])
    loss, stats = ppo_value_loss(new_values, f64([[old]]), f64([[target]]), torch.tensor([[True]]),
                                 clip_range)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    close(new_values.grad, [[slope]])
    assert stats["value_clip_frac"] == clipped


def test_ppo_value_loss_equals_a_loop_and_ignores_nan_filler(generator):
    (new, old, returns, _), mask = ragged(generator)
    new.requires_grad_()
    loss, stats = ppo_value_loss(new, old, returns, mask)
    terms = []
    for n, o, r in zip(new[mask].tolist(), old[mask].tolist(), returns[mask].tolist()):
        near = o + min(max(n - o, -0.2), 0.2)
        terms.append(0.5 * max((n - r) ** 2, (near - r) ** 2))
    close(loss, sum(terms) / len(terms))
    loss.backward()
    assert (new.grad[~mask] == 0).all() and torch.isfinite(new.grad).all()
    assert not stats["value_clip_frac"].requires_grad


# ---------------------------------------------------------------- accumulation

def test_check_23_accumulated_token_losses_equal_the_full_batch(generator):
    """The bug: each micro-batch divided by its own token count (3, 1 and 5 here)."""
    (new, old, third, fourth), mask = ragged(generator)
    losses = {
        "sft": lambda i, x, d: sft_loss(x[i], mask[i], d),
        "policy": lambda i, x, d: ppo_policy_loss(x[i], old[i], third[i], mask[i], 0.2, d)[0],
        "value": lambda i, x, d: ppo_value_loss(x[i], third[i], fourth[i], mask[i], 0.2, d)[0],
    }
    for name, loss_of in losses.items():
        full, parts = new.clone().requires_grad_(), new.clone().requires_grad_()
        whole = loss_of(slice(None), full, None)
        whole.backward()
        total = 0.0
        for b in range(3):
            part = loss_of(slice(b, b + 1), parts, mask.sum())
            part.backward()
            total += part.item()
        assert total == pytest.approx(whole.item(), rel=1e-9), name
        close(parts.grad, full.grad)


# ---------------------------------------------------------------- DPO

def test_check_25_dpo_starts_at_log_2_with_rewards_of_zero(generator):
    """The bug: policy and reference log-probs of different things, which the first loss betrays."""
    chosen, rejected = -30 * torch.rand(2, 5, generator=generator, dtype=torch.float64)
    losses, *rewards = dpo_loss(chosen, rejected, chosen, rejected)
    close(losses, [math.log(2)] * 5)
    assert all((r == 0).all() for r in rewards)


def test_check_25_dpo_by_hand_and_its_rewards_carry_beta():
    """The bugs: logged rewards without beta; a margin with the reference on the wrong side."""
    policy_chosen, policy_rejected = f64([-10.0]).requires_grad_(), f64([-20.0]).requires_grad_()
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        policy_chosen, policy_rejected, f64([-14.0]), f64([-21.0]), beta=0.5)
    # Rewards 0.5 * (-10 + 14) = 2 and 0.5 * (-20 + 21) = 0.5: a margin of 1.5.
    assert chosen_rewards.tolist() == [2.0] and rejected_rewards.tolist() == [0.5]
    close(losses, [softplus(-1.5)])
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad
    losses.sum().backward()
    slope = 0.5 / (1 + math.exp(1.5))  # beta * sigmoid(-margin)
    close(policy_chosen.grad, [-slope])
    close(policy_rejected.grad, [slope])


def test_dpo_is_the_reward_model_loss_of_its_implicit_rewards(generator):
    logps = -30 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
    losses, chosen, rejected = dpo_loss(*logps, beta=0.3)
    ranks = torch.tensor([[0, 1]]).expand(6, 2)
    close(losses, reward_model_loss(torch.stack([chosen, rejected], 1), ranks))


def test_label_smoothing_mixes_in_the_flipped_label(generator):
    logps = -30 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
    flipped = logps[[1, 0, 3, 2]]
    plain, swapped = dpo_loss(*logps)[0], dpo_loss(*flipped)[0]
    close(dpo_loss(*logps, label_smoothing=0.1)[0], 0.9 * plain + 0.1 * swapped)


def test_check_26_dpo_is_stable_at_margins_of_100():
    """The bug: log(sigmoid(x)), which is -inf in float32 at x = -100, with a NaN gradient."""
    zero = torch.zeros(2)
    policy = torch.tensor([100.0, -100.0], requires_grad=True)
    losses = dpo_loss(policy, zero, zero, zero, beta=1.0)[0]
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.0, 100.0], abs=1e-30)
    assert policy.grad.tolist() == pytest.approx([0.0, -1.0], abs=1e-30)


def test_check_25_a_longer_response_counts_with_all_its_tokens():
    """The bug: log-probs averaged over tokens, which makes these two margins equal."""
    logprobs = torch.full((2, 4), 1.0, dtype=torch.float64)  # policy minus reference, per token
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    logps = sequence_logprobs(logprobs, mask)  # (2,): 4 and 1
    zero = torch.zeros(2, dtype=torch.float64)
    close(dpo_loss(logps, zero, zero, zero, beta=1.0)[0], [softplus(-4), softplus(-1)])


# ---------------------------------------------------------------- the tests themselves


def exam(name, loss_of):
    """Pass only a loss with the right value that also learns: a step downhill must lower the
    textbook formula, written here once more in plain PyTorch."""
    old = f64([[-1.0, -2.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    formulas = {  # name: (arguments after the first, the formula)
        "sft": ((mask,), lambda x: -x.mean()),
        "reward_model": ((torch.tensor([[0, 1]]),), lambda x: F.softplus(x[:, 1] - x[:, 0])),
        "ppo_policy": ((old, f64([[1.0, -2.0]]), mask),
                       lambda x: -(f64([[1.0, -2.0]]) * (x - old).exp()).mean()),
        "ppo_value": ((old, f64([[0.0, 3.0]]), mask, 0.0),
                      lambda x: 0.5 * ((x - f64([[0.0, 3.0]])) ** 2).mean()),
        "dpo": ((old + 1, old - 1, old - 2), lambda x: F.softplus(-0.1 * (x - old - 2))),
    }
    rest, formula = formulas[name]
    x = (old + f64([[0.1, 0.05]])).requires_grad_()
    result = loss_of(x, *rest)
    loss = result[0] if isinstance(result, tuple) else result
    close(loss, formula(x).detach())
    loss.sum().backward()
    assert formula(x - 0.01 * x.grad).sum() < formula(x).sum()


LOSSES = {"sft": sft_loss, "reward_model": reward_model_loss, "ppo_policy": ppo_policy_loss,
          "ppo_value": ppo_value_loss, "dpo": dpo_loss}


def mutate(loss, change):
    def mutant(*arguments):
        result = loss(*arguments)
        return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)
    return mutant


@pytest.mark.parametrize("name", LOSSES)
def test_check_37_zero_negated_and_detached_losses_fail_the_exam(name):
    """The bug: tests that a loss of zeros, a negated or a detached one would pass."""
    exam(name, LOSSES[name])
    for change in (lambda loss: loss * 0, lambda loss: -loss, lambda loss: loss.detach()):
        with pytest.raises((AssertionError, RuntimeError)):
            exam(name, mutate(LOSSES[name], change))


@pytest.mark.parametrize("loss", [
    lambda x, y, z, mask: sft_loss(x, mask),
    lambda x, y, z, mask: ppo_policy_loss(x, y, z, mask)[0],
    lambda x, y, z, mask: ppo_value_loss(x, y, z, mask)[0],
], ids=["sft", "policy", "value"])
def test_check_11_nan_at_filler_comes_back_as_a_gradient_of_exactly_0(loss, generator):
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    three = [torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    found = []
    for filler in (0.0, NAN):
        x, y, z = (torch.where(mask, one, filler) for one in three)
        value = loss(x.requires_grad_(), y, z, mask)
        value.backward()
        found.append((value, x.grad))
        assert (x.grad[~mask] == 0).all() and (x.grad != 0).any()
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
