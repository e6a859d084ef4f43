"""Bugs to plant into evaluate.py."""

from bugs import Bug

FILE = "evaluate.py"
BUGS = [
    Bug("Evaluator.kl", "reference(tokens)[:, :-1]", "reference(tokens)[:, :-1] / 0.7",
        "test_check_35", "the evaluation's reference is scored at another temperature"),
    Bug("Evaluator.rewards", 'prompt + s["ids"]',
        'prompt + tokenizer.encode(tokenizer.decode_response(s["ids"])) + '
        "[tokenizer.end_id]",
        "test_check_36", "the evaluation scores text that was encoded again"),
]
