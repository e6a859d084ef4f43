"""Bugs to plant into minirlhf/tokenizer.py."""

from bugs import Bug

FILE = "minirlhf/tokenizer.py"
BUGS = [
    Bug("Tokenizer.encode_chat", "[trained] * (len(content) + 1)",
        "[trained] * len(content) + [False]", "test_check_08",
        "the template leaves the end token untrained"),
    Bug("Tokenizer.encode_chat", '== "assistant"', '== "assistant" and message is messages[-1]',
        "test_check_14", "only the last answer of a dialogue is trained"),
    Bug("Tokenizer.encode_chat", ' and message.get("train", True)', "", "test_check_14",
        "the template trains a turn that is marked as not to be trained"),
    Bug("Tokenizer.encode", "encode_ordinary(text)", 'encode(text, allowed_special="all")',
        "test_check_14", "the words <|end|> in a text become the end token"),
]
