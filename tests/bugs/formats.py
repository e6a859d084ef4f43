"""Bugs to plant into minirlhf/plumbing/formats.py."""

from bugs import Bug

FILE = "minirlhf/plumbing/formats.py"
BUGS = [
    Bug("with_system", "messages = [system, *messages]", "pass", "test_check_14",
        "a standing instruction under a key of its own is not read"),
    Bug("is_trained", "all(marks)", "True", "test_check_14",
        "a turn that is marked as not to be trained is trained"),
    Bug("ranks_of", "[0, 0] if tie else ranks", "ranks", "test_check_28",
        "a pair whose answers have equal scores counts as a preference"),
    Bug("grade_number", "GRADES.index(value)", "GRADES.index(value) or None", "test_check_29",
        "the lowest of the grades is taken for no grade"),
    Bug("instruction_messages", 'row.get("history") or []', '(row.get("history") or [])[::-1]',
        "test_check_38", "a history of several turns is read backwards"),
    Bug("parse_preference", 'row["chosen"], row["rejected"]', 'row["rejected"], row["chosen"]',
        "test_check_38", "chosen and rejected are swapped in the reader"),
]
