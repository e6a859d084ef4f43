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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_interval_of_what_is_no_number(bad):
    """Bug: NaN is greater than nothing, so that every comparison with it is a loss."""
    for a, b in ((bad, 1.0), (1.0, bad), (bad, bad)):
        with pytest.raises(ValueError, match="expected finite scores"):
            compare([[0.0], [a]], [[0.0], [b]])
    with pytest.raises(ValueError, match="expected finite numbers"):
        bootstrap([1.0, bad])
    for successes, count in ((bad, 10), (11, 10), (-1, 10)):
        with pytest.raises(ValueError, match="expected 0 to 10"):
            wilson(successes, count)
    with pytest.raises(ValueError, match="share of nothing"):
        wilson(0, float("nan"))


def test_a_bootstrap_of_nothing_is_refused():
    with pytest.raises(ValueError, match="expected finite numbers"):
        bootstrap([])


@pytest.mark.parametrize("gap, ties", [(0.0, 1), (9e-7, 1), (2e-6, 0), (0.01, 0), (0.09, 0)])
def test_only_rounding_ties(gap, ties):
    """Bug: a tolerance of 0.1, within which real differences of a score tie."""
    for a, b in ((1.0 + gap, 1.0), (1.0, 1.0 + gap)):
        found = compare([[a]], [[b]])
        assert (found["wins"], found["ties"], found["losses"]) == (
            (1 - ties) * (a > b), ties, (1 - ties) * (b > a))


def test_a_cluster_counts_by_its_size():
    """The mean is over samples: a prompt with nine of them weighs nine times as much."""
    rng = random.Random(4)
    values, sizes = [rng.random() for _ in range(300)], [rng.choice([1, 9]) for _ in range(300)]
    mean = sum(v * n for v, n in zip(values, sizes)) / sum(sizes)
    low, high = bootstrap(values, sizes)
    assert (low + high) / 2 == pytest.approx(mean, abs=0.1 * (high - low))
    assert bootstrap(values, [3] * 300) == pytest.approx(bootstrap(values), rel=1e-9)
    # The ratio's textbook deviation, from the residuals n * (v - mean).
    deviation = sum((n * (v - mean)) ** 2 for v, n in zip(values, sizes)) ** 0.5 / sum(sizes)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_the_comparisons_interval_is_of_its_rate():
    """Prompts with many samples win, those with one lose: the rate is over samples."""
    a, b = [[1.0] * 9, [0.0]] * 50, [[0.0] * 9, [1.0]] * 50
    found = compare(a, b)
    assert found["rate"] == 0.9 and found["low"] < 0.9 < found["high"] and found["low"] > 0.8
