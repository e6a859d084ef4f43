"""Bugs to plant into minirlhf/plumbing/optim.py."""

from bugs import Bug

FILE = "minirlhf/plumbing/optim.py"
BUGS = [
    Bug("make_optimizer", "0.95", "0.9", "test_check_21", "two equal betas"),
]
