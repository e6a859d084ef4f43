"""Bugs to plant into sample.py."""

from bugs import Bug

FILE = "sample.py"
BUGS = [
    Bug("chat", "decode_response", "decode", "test_check_14",
        "a chat's answers carry their end token's name into the next prompt"),
]
