"""Tokenizer files that are damaged or another program's, and the tokenizer's own command line."""

import base64
import json

from malformed import Case, write
from malformed.rows import POINTER

from minirlhf.tokenizer import SPECIAL_TOKENS

RANKS = [bytes([b]).decode("latin-1") for b in range(256)]
WHOLE = {"pattern": r"\S+|\s+", "special_tokens": list(SPECIAL_TOKENS), "ranks": RANKS}


def broken(name, content, words, file="tokenizer.json"):
    """A file for train_pretrain.py's --tokenizer; content: text, bytes, or a value to be JSON."""
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    return Case(name, lambda road, folder: [
        "train_pretrain.py", "--text", road.text, "--tokenizer", write(folder, file, text),
        "--out", folder / "run"], words)


def command(name, words, *options, file=("a.txt", "the cow says moo " * 9)):
    """The tokenizer's command line on a small text; "{folder}" in an option is the folder."""
    def argv(road, folder):
        path = write(folder, *file)
        return ["minirlhf/tokenizer.py", path, *[w.format(folder=folder) for w in options]]
    return Case(name, argv, words)


def ranks_file(*lines):
    return "".join(f"{base64.b64encode(token).decode()} {idx}\n" for token, idx in lines)


OUT = ("--out", "{folder}/new.json")

CASES = [
    broken("no JSON", "vocabulary", "found broken JSON"),
    broken("half a file", json.dumps(WHOLE)[:900], "found broken JSON"),
    broken("an empty file", "", "found broken JSON"),
    broken("a list", [WHOLE], "expected the keys pattern, special_tokens and ranks"),
    broken("Hugging Face's tokenizer.json", {"version": "1.0", "model": {"type": "BPE", "vocab": {},
                                                                        "merges": []}},
           "a tokenizer of Hugging Face's library"),
    broken("a vocab.json of words and ids", {"the": 0, "cow": 1}, "expected the keys"),
    broken("ranks that are numbers", {**WHOLE, "ranks": list(range(256))}, "expected the keys"),
    broken("ranks that are one text", {**WHOLE, "ranks": "".join(RANKS)}, "expected the keys"),
    broken("ranks with their ids", {**WHOLE, "ranks": {r: i for i, r in enumerate(RANKS)}},
           "expected the keys"),
    broken("ranks beyond a byte", {**WHOLE, "ranks": RANKS + ["海"]}, "expected the keys"),
    broken("a byte missing", {**WHOLE, "ranks": RANKS[1:]}, "all 256 single bytes"),
    broken("a token twice", {**WHOLE, "ranks": RANKS + ["ab", "ab"]}, "each token only once"),
    broken("an empty token", {**WHOLE, "ranks": RANKS + [""]}, "none of them empty"),
    broken("a key twice", json.dumps(WHOLE)[:-1] + ', "ranks": []}', '"ranks" twice'),
    broken("other special tokens", {**WHOLE, "special_tokens": ["<|im_start|>"]},
           "train the tokenizer again"),
    broken("special tokens that are a number", {**WHOLE, "special_tokens": 5}, "expected the keys"),
    broken("no pattern", {**WHOLE, "pattern": None}, "expected the keys"),
    broken("a pattern that is none", {**WHOLE, "pattern": "(" * 9}, "is no regular expression"),
    broken("a pattern that loses spaces", {**WHOLE, "pattern": r"\S+"}, "loses text"),
    broken("a pattern that tiktoken can't read", {**WHOLE, "pattern": r"[\s\S]\X?"},
           "tiktoken can't use"),
    broken("a pattern that calls itself", {**WHOLE, "pattern": "(?R)?|."}, "regular expression"),
    broken("lists nested without end", "[" * 10**5, "nested too deeply"),
    broken("a Git LFS pointer", POINTER, "git lfs pull"),
    broken("UTF-16", json.dumps(WHOLE).encode("utf-16"), "UTF-16"),
    broken("a number for a name", {"name": 5}, "expected the keys"),
    broken("a published name that is none", {"name": "gpt5000"}, "can't fetch the tokenizer"),
    broken("a ranks file of one byte", ranks_file((b"!", 0)), "all 256 single bytes",
           "ranks.tiktoken"),
    broken("a ranks file with a gap", ranks_file((b"!", 0), (b"#", 2)), "line 2: expected base64",
           "ranks.tiktoken"),
    broken("a ranks file of plain words", "the 0\ncow 1\n", "line 1: expected base64",
           "ranks.tiktoken"),

    command("a vocabulary of nothing", "choose at least that", "--vocab_size", "0", *OUT),
    command("a negative vocabulary", "choose at least that", "--vocab_size", "-5", *OUT),
    command("a vocabulary of a billion", "at most 1,000,000", "--vocab_size", "1000000000", *OUT),
    command("a vocabulary that the text does not fill", "give more text", "--vocab_size", "900000",
            *OUT),
    command("a vocabulary in words", "invalid int value", "--vocab_size", "many", *OUT),
    command("an unknown option", "unrecognized arguments: --vocab", "--vocab", "300", *OUT),
    Case("no file at all", lambda road, folder: ["minirlhf/tokenizer.py"],
         "arguments are required: files"),
    command("a folder for the result", "is a folder", "--out", "{folder}"),
    command("a file for the result's folder", "is a file", "--out", "{folder}/a.txt/new.json"),
    command("somebody's file in the result's place", "minirlhf did not write it",
            "--out", "{folder}/a.txt"),
    command("a JSON file of another program in its place", "minirlhf did not write it",
            "--out", "{folder}/rows.json", file=("rows.json", '{"text": "a"}')),
    command("a name by which nobody finds it again", "expected a name in .json",
            "--vocab_size", "262", "--out", "{folder}/new.model"),
]
