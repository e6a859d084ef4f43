"""Bugs to plant into minirlhf/look/ledger.py."""

from bugs import Bug

FILE = "minirlhf/look/ledger.py"
BUGS = [
    Bug("pieces_of", "if not whole or i != own[-1]:", "if not whole:",
        "test_the_pieces_of_characters", "a ledger loses the token that begins a character"),
    Bug("pieces_of", "pieces[own[-1]] += character", "pieces[own[0]] += character",
        "test_the_pieces_of_characters", "a ledger shows a character before its last byte"),
    Bug("columns_of", 'in "WF"', 'in "F"', "test_columns_are_counted",
        "a ledger's columns break at wide characters"),
    Bug("columns_of", 'in ("Mn", "Me")', 'in ("Me",)', "test_columns_are_counted",
        "a ledger's columns break at combining marks"),
    Bug("what_is_wrong", "if array.shape != expected:", "if array.ndim != len(expected):",
        "test_a_tensor_of_another_length", "a ledger's tensor of another length is taken for its own"),
]
