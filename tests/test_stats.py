"""Intervals, against published values and their own promise: to cover the truth 95% of the time."""

import random

import pytest

from minirlhf.plumbing.stats import bootstrap, compare, wilson


@pytest.mark.parametrize("successes, count, low, high", [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 10, 0.0179, 0.4042),
    (81, 263, 0.2553, 0.3662),  # Newcombe (1998), Table I
    (0, 300, 0.0, 0.0126)])
def test_wilson_gives_published_values(successes, count, low, high):
    assert wilson(successes, count) == pytest.approx((low, high), abs=6e-5)


def test_wilson_of_nothing_is_refused():
    with pytest.raises(ValueError, match="share of nothing"):
        wilson(0, 0)


def test_bootstrap_of_a_normal_sample_is_the_textbook_interval():
    rng = random.Random(0)
    values = [rng.gauss(5, 2) for _ in range(400)]
    mean = sum(values) / 400
    half = 1.96 * (sum((v - mean) ** 2 for v in values) / 400 / 400) ** 0.5
    low, high = bootstrap(values)
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)
    assert bootstrap(values) == (low, high)  # its own seed: the same table every time
    assert bootstrap(values, seed=1) != (low, high)


def test_bootstrap_of_equal_values_has_no_width():
    assert bootstrap([0.5] * 20) == (0.5, 0.5)


def test_bootstrap_covers_the_true_mean_about_19_times_in_20():
    rng = random.Random(1)
    hits = 0
    for _ in range(200):
        low, high = bootstrap([rng.random() for _ in range(50)], num_resamples=300)
        hits += low <= 0.5 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_compare_by_hand():
    a = [[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]]
    b = [[0.0, 2.0], [1.0, 1.0], [1.0, 1.0]]  # win, tie; loss, loss; win, tie
    result = compare(a, b)
    assert result["num_prompts"] == 3
    for key, value in (("wins", 2 / 6), ("ties", 2 / 6), ("losses", 2 / 6), ("rate", 3 / 6)):
        assert result[key] == pytest.approx(value, rel=1e-9)
    assert result["low"] <= result["rate"] <= result["high"]


def test_compare_turned_round_is_the_complement():
    rng = random.Random(2)
    a, b = ([[rng.choice([0, 1, 2]) for _ in range(2)] for _ in range(100)] for _ in range(2))
    one, other = compare(a, b), compare(b, a)
    assert one["rate"] + other["rate"] == pytest.approx(1, rel=1e-9)
    assert (one["wins"], one["ties"]) == (other["losses"], other["ties"])


def test_samples_of_one_prompt_do_not_narrow_the_interval():
    """The bug: two samples of one prompt resampled as if they were two prompts. Here a prompt's
    samples are all equal, so the others tell nothing new."""
    rng = random.Random(3)
    a, b = ([[rng.random()] for _ in range(60)] for _ in range(2))
    once, four_times = compare(a, b), compare([row * 4 for row in a], [row * 4 for row in b])
    assert four_times["low"] == pytest.approx(once["low"], rel=1e-9)
    assert four_times["high"] == pytest.approx(once["high"], rel=1e-9)


def test_rounding_noise_is_a_tie():
    assert compare([[0.1 + 0.2]], [[0.3]])["ties"] == 1.0


def test_unequal_numbers_of_prompts_or_samples_are_refused():
    with pytest.raises(AssertionError, match="2 prompts against 1"):
        compare([[1.0], [1.0]], [[1.0]])
    with pytest.raises(AssertionError, match="2 samples against 1"):
        compare([[1.0, 2.0]], [[1.0]])
