"""Bugs to plant into minirlhf/plumbing/stats.py."""

from bugs import Bug

FILE = "minirlhf/plumbing/stats.py"
BUGS = [
    Bug("compare", "tolerance=1e-6", "tolerance=0.1", "test_only_rounding_ties",
        "a win by less than a tenth counts as a tie"),
    Bug("compare", "map(math.isfinite, (*a, *b))", "(True,)", "test_no_interval_of_what",
        "whoever is scored with NaN loses every comparison"),
    Bug("compare", ", list(map(len, outcomes)))", ")", "test_the_comparisons_interval",
        "the interval of a win rate is that of another mean"),
    Bug("bootstrap", "(values * sizes)[picks].sum(1) / sizes[picks].sum(1)", "values[picks].mean(1)",
        "test_a_cluster_counts", "a prompt with one pair weighs as much as one with fifteen"),
]
