"""Masked reductions and log-probs, against Python loops and numbers worked out by hand."""

import math

import pytest
import torch
from conftest import close

from minirlhf.masked import (entropy, masked_mean, masked_sum, masked_var, masked_whiten,
                             sequence_logprobs, token_logprobs)

NAN = float("nan")
# Two rows of two and three real tokens; the filler is NaN, the worst it can be.
X = torch.tensor([[1.0, 3.0, NAN, NAN], [2.0, 4.0, 10.0, NAN]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)


def test_check_11_nan_in_the_filler_does_not_leak_into_sum_mean_or_variance():
    """The bug: `(x * mask).sum()`, where NaN times 0 is NaN."""
    assert masked_sum(X, MASK) == 20
    assert masked_sum(X, MASK, dim=1).tolist() == [4, 16]
    assert masked_mean(X, MASK) == 4
    close(masked_mean(X, MASK, dim=1), [2, 16 / 3])
    assert masked_var(X, MASK) == (9 + 1 + 4 + 0 + 36) / 5


def test_check_11_nan_in_the_filler_does_not_leak_into_gradients():
    """The bug: a forward pass that masks, and a backward pass that multiplies 0 by NaN."""
    x = X.clone().requires_grad_()
    masked_mean(x, MASK).backward()
    close(x.grad, MASK.double() / 5)


def test_check_11_an_empty_mask_raises():
    """The bug: a wrong mask gives 0 / 0, or a loss of 0, and training goes on without a word."""
    nothing = torch.zeros_like(MASK)
    with pytest.raises(ValueError, match="empty mask"):
        masked_mean(X, nothing)
    with pytest.raises(ValueError, match="empty mask"):
        masked_mean(X, nothing, denominator=5)
    one_row_empty = MASK & torch.tensor([[True], [False]])
    assert masked_mean(X, one_row_empty) == 2  # over all tokens there is a mean ...
    with pytest.raises(ValueError, match="empty mask"):
        masked_mean(X, one_row_empty, dim=1)  # ... but not for each row


def test_check_11_the_token_mean_is_not_the_mean_of_sequence_means():
    """The bug: a mean per row first, so that each token of a short response weighs more."""
    assert masked_mean(X, MASK) == 4
    close(masked_mean(X, MASK, dim=1).mean(), (2 + 16 / 3) / 2)


def test_check_23_micro_batches_with_the_whole_count_add_up_to_the_full_batch():
    """The bug: the mean of micro-batch means, wrong where their token counts differ (2 and 3)."""
    count = MASK.sum()
    parts = [masked_mean(X[i : i + 1], MASK[i : i + 1], denominator=count) for i in range(2)]
    close(parts[0] + parts[1], 4.0)


def test_a_mask_of_another_shape_is_refused_rather_than_broadcast():
    with pytest.raises(AssertionError, match=r"\(2, 4\).*\(4,\)"):
        masked_sum(X, MASK[0])


# ---------------------------------------------------------------- whitening

def test_check_16_whitening_by_hand():
    """The bugs: filler in the statistics; the unbiased variance, which is 2 for these numbers."""
    x = torch.tensor([[1.0, 3.0, 50.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    # Mean 2, biased variance ((1-2)^2 + (3-2)^2) / 2 = 1. The 1e-8 lies inside the root.
    close(masked_whiten(x, mask), [[-1 / math.sqrt(1 + 1e-8), 1 / math.sqrt(1 + 1e-8), 0.0]])


def test_check_16_whitening_ignores_the_filler_and_leaves_zeros_there():
    """The bug: filler is whitened along, becomes -mean / std, and counts later."""
    white = masked_whiten(X, MASK)
    assert (white[~MASK] == 0).all()
    close(masked_mean(white, MASK), 0.0)
    close(masked_var(white, MASK), 10 / (10 + 1e-8))


def test_check_16_shift_mean_false_keeps_the_mean():
    """The bug: whitening rewards to mean 0, which turns what was good on the whole into bad."""
    white = masked_whiten(X, MASK, shift_mean=False)
    close(masked_mean(white, MASK), 4.0)
    close(masked_var(white, MASK), 10 / (10 + 1e-8))
    assert (white[~MASK] == 0).all()


def test_whitening_equal_values_gives_zeros_not_nan():
    same = torch.full((2, 4), 0.5, dtype=torch.float64)
    assert (masked_whiten(same, MASK) == 0).all()


# ---------------------------------------------------------------- log-probs

def test_check_06_token_logprobs_equal_a_loop_over_tokens(generator):
    """The bug: off by one, or the log-prob of another row's or column's token."""
    logits = 3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(7, (2, 5), generator=generator)
    result = token_logprobs(logits, targets)  # (2, 5)
    for b in range(2):
        for t in range(5):
            weights = [math.exp(z) for z in logits[b, t].tolist()]
            expected = math.log(weights[targets[b, t]] / sum(weights))
            assert result[b, t].item() == pytest.approx(expected, rel=1e-9)


def test_the_gradient_of_a_logprob_is_one_hot_minus_softmax(generator):
    logits = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[2, 0, 3]])
    token_logprobs(logits, targets).sum().backward()
    close(logits.grad, torch.eye(4, dtype=torch.float64)[targets] - logits.detach().softmax(-1))


def test_check_26_token_logprobs_are_stable_at_large_logits():
    """The bug: softmax before the logarithm, which gives log 0 = -inf here."""
    logits = torch.tensor([[[1000.0, 0.0, -1000.0]]])
    for target, nats in ((0, 0.0), (1, -1000.0), (2, -2000.0)):
        assert token_logprobs(logits, torch.tensor([[target]])).item() == nats


def test_bf16_logits_are_scored_in_float32(generator):
    """The bug: log-probs with the 8 bits of bf16, whose error is larger than a PPO update."""
    logits = torch.randn(2, 3, 50, generator=generator).bfloat16()
    targets = torch.randint(50, (2, 3), generator=generator)
    result = token_logprobs(logits, targets)
    assert result.dtype == torch.float32 and entropy(logits).dtype == torch.float32
    exact = token_logprobs(logits.double(), targets)
    close(result, exact.float(), rtol=1e-5)


def test_token_logprobs_refuse_unshifted_targets():
    with pytest.raises(AssertionError, match="targets"):
        token_logprobs(torch.zeros(2, 4, 7), torch.zeros(2, 5, dtype=torch.int64))


def test_check_25_sequence_logprobs_are_sums_and_the_average_is_asked_for():
    """The bug: DPO on length-averaged log-probs, which is another objective."""
    assert sequence_logprobs(-X, MASK).tolist() == [-4, -16]
    close(sequence_logprobs(-X, MASK, average=True), [-2, -16 / 3])


def test_entropy_by_hand():
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.0, -1e4, -1e4, -1e4],
                            [math.log(0.5), math.log(0.25), math.log(0.25), -1e4]]],
                          dtype=torch.float64)
    # Uniform over 4; certain; (1/2, 1/4, 1/4) has 1.5 bits.
    close(entropy(logits), [[math.log(4), 0.0, 1.5 * math.log(2)]])


def test_check_31_mean_entropy_leaves_the_filler_out(generator):
    """The bug: entropy, or another logged statistic, averaged over the filler too."""
    logits = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    logits[~MASK] = NAN
    rows = [entropy(logits[b : b + 1, :n]).sum() for b, n in ((0, 2), (1, 3))]
    close(masked_mean(entropy(logits), MASK), (rows[0] + rows[1]) / 5)
