"""Bugs to plant into minirlhf/plumbing/optim.py."""

from bugs import Bug

FILE = "minirlhf/plumbing/optim.py"
BUGS = [
    Bug("make_optimizer", "0.95", "0.9", "test_check_21", "two equal betas"),
    Bug("lr_at", "(step + 1) / warmup", "step / warmup", "test_the_schedule_meets",
        "the warmup's first step has a rate of 0"),
    Bug("lr_at", "max(1, num_steps - warmup)", "max(1, num_steps)", "test_the_schedule_meets",
        "the fall forgets the warmup and does not reach its end"),
]
