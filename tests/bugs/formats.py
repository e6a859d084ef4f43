"""Bugs to plant into minirlhf/plumbing/formats.py."""

from bugs import Bug

FILE = "minirlhf/plumbing/formats.py"
BUGS = [
    Bug("grade_table", '"rating" in row', 'row.get("rating")', "test_check_29",
        "a rating of 0 is taken for no rating"),
    Bug("parse_preference", 'row["chosen"], row["rejected"]', 'row["rejected"], row["chosen"]',
        "test_check_38", "chosen and rejected are swapped in the reader"),
]
