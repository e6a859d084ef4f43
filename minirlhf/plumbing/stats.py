"""Intervals for shares and win rates: how far to trust a number from a few hundred prompts."""

import math

import torch


def wilson(successes, count, z=1.96):
    """95% Wilson interval (low, high) of a share; unlike +-z*sd it works near 0 and 1.

    Source: Wilson (1927); no successes in 300 tries still allow a true rate of 1.3%.
    """
    if not count > 0:
        raise ValueError("a share of nothing has no interval")
    if not 0 <= successes <= count:  # NaN, too, is in no order with anything
        raise ValueError(f"{successes} successes among {count} tries; expected 0 to {count}")
    p, n = successes / count, count
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values, sizes=None, num_resamples=2000, seed=0):
    """95% bootstrap interval (low, high) of a mean over clusters.

    values: N floats, one per prompt (average a prompt's samples first: two samples of one prompt
    are not independent, and resampling them apart would make the interval too narrow); sizes: how
    many samples each of them is the average of, equally many if None. The mean is over samples.
    """
    if not len(values) or not all(map(math.isfinite, values)):
        raise ValueError(f"expected finite numbers, found {list(values)[:8]}")
    values = torch.tensor(values, dtype=torch.float64)  # (N,)
    sizes = torch.ones_like(values) if sizes is None else torch.tensor(sizes).double()  # (N,)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (num_resamples, len(values)), generator=generator)
    means = (values * sizes)[picks].sum(1) / sizes[picks].sum(1)  # (num_resamples,)
    return means.quantile(0.025).item(), means.quantile(0.975).item()


def compare(scores_a, scores_b, tolerance=1e-6):
    """Does A beat B? Pairs the k-th sample of each prompt of A with B's k-th, ties counting half.

    scores_a, scores_b: per prompt a list of the samples' scores, equally many for both. Returns
    {"wins", "ties", "losses"} as shares of all pairs, "rate" = wins + ties / 2, its bootstrap
    interval "low", "high" clustered by prompt, and "num_prompts". Scores have to be finite: a NaN
    would lose every comparison.
    """
    assert len(scores_a) == len(scores_b), f"{len(scores_a)} prompts against {len(scores_b)}"
    outcomes = []  # per prompt, the outcomes of its pairs: 1 win, 0.5 tie, 0 loss
    for a, b in zip(scores_a, scores_b):
        assert len(a) == len(b), f"{len(a)} samples against {len(b)} for one prompt"
        if not all(map(math.isfinite, (*a, *b))):
            raise ValueError(f"expected finite scores, found {a} against {b}")
        outcomes.append([0.5 if abs(x - y) < tolerance else float(x > y) for x, y in zip(a, b)])
    flat = [outcome for row in outcomes for outcome in row]
    low, high = bootstrap([sum(row) / len(row) for row in outcomes], list(map(len, outcomes)))
    return {"wins": flat.count(1.0) / len(flat), "ties": flat.count(0.5) / len(flat),
            "losses": flat.count(0.0) / len(flat), "rate": sum(flat) / len(flat),
            "low": low, "high": high, "num_prompts": len(outcomes)}
