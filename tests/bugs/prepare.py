"""Bugs to plant into data/hh_rlhf/prepare.py."""

from bugs import Bug

FILE = "data/hh_rlhf/prepare.py"
BUGS = [
    Bug("clean_pairs", "max(len(chosen), len(rejected))", "len(chosen)", "test_check_33",
        "the limit on a pair's length asks only one of its answers"),
]
