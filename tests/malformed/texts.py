"""Text for the tokenizer and for pretraining, and the sources that the prepare scripts read."""

import gzip
import json

from malformed import Case, write
from malformed.rows import POINTER


def pretrain(name, file, content, words, **options):
    more = [word for option, value in options.items() for word in (f"--{option}", value)]
    return Case(f"pretrain: {name}", lambda road, folder: [
        "train_pretrain.py", "--text", write(folder, file, content), "--tokenizer",
        road.folder / "tokenizer.json", "--out", folder / "run", *more], words)


def tokenizer(name, file, content, words):
    return Case(f"tokenizer: {name}", lambda road, folder: [
        "minirlhf/tokenizer.py", write(folder, file, content), "--vocab_size", "300",
        "--out", folder / "new.json"], words)


def prepare(data, name, make, words, *more):
    """make: a function of the folder that writes a source there and returns its path."""
    def argv(road, folder):
        return [f"data/{data}/prepare.py", "--source", make(folder), "--out", folder / "out",
                *[word.format(folder=folder) for word in more]]
    return Case(f"{data}: {name}", argv, words)


TEXT = "The cow says moo. " * 50
HH = {"prompt": "\n\nHuman: cow?\n\nAssistant:", "chosen": "moo", "rejected": "baa",
      "source": "helpful-base", "split": "train"}
OTHER = {**HH, "prompt": "\n\nHuman: dog?\n\nAssistant:", "split": "test"}
BOTH = [  # what both readers of text have to refuse alike
    ("nothing", "a.txt", "", "an empty file"),
    ("white space", "a.txt", " \n\u2028\n", "white space only"),
    ("marks without text", "a.txt", "<|endoftext|>\n<|endoftext|>", "white space only"),
    ("a Git LFS pointer", "a.txt", POINTER, "git lfs pull"),
    ("UTF-16", "a.txt", TEXT.encode("utf-16"), "UTF-16"),
    ("Latin-1", "a.txt", "\ncafé".encode("latin-1"), "line 2: expected UTF-8 text"),
    ("a gzip file without its name", "a.txt", gzip.compress(TEXT.encode()), "doesn't end in .gz"),
    ("a gzip file that breaks off", "a.txt.gz", gzip.compress(TEXT.encode())[:30], "breaks off"),
    ("a name in .md", "a.md", TEXT, "expected a name in .txt or .jsonl"),
    ("a name in .csv", "a.csv", TEXT, "as a JSON object, in .jsonl"),
    ("a name in .pdf", "a.pdf", b"%PDF-1.7", "rename or convert"),
    ("a row without text", "a.jsonl", [{"text": "a"}, {"id": 7}], "line 2: "),
    ("a text that is a list", "a.jsonl", [{"text": ["a"]}], 'the key "text" to be a string'),
    ("a text of blanks", "a.jsonl", [{"text": " "}], "to have text in it"),
    ("text and messages", "a.jsonl", [{"text": "a", "messages": [{"role": "user",
                                                                  "content": "a"}]}],
     "messages beside text"),
    ("broken JSON", "a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: found broken JSON"),
    ("a list of texts", "a.jsonl", json.dumps([{"text": "a"}]), "the beginning of a list"),
    ("a text twice", "a.jsonl", '{"text": "a", "text": "b"}', '"text" twice'),
]

CASES = [
    *[pretrain(*case) for case in BOTH],
    *[tokenizer(*case) for case in BOTH],
    pretrain("dialogues for text", "a.jsonl", [{"prompt": "cow?", "chosen": "a", "rejected": "b"}],
             'the key "text"'),
    pretrain("hardly any text", "a.txt", "The cow says moo.\n", "tokens"),
    Case("pretrain: a comma after the last file", lambda road, folder: [
        "train_pretrain.py", "--text", write(folder, "a.txt", TEXT) + ",", "--tokenizer",
        road.folder / "tokenizer.json", "--out", folder / "run"], "expected a file's name before and after each comma"),
    tokenizer("a row that is no dialogue", "a.jsonl", [{"messages": [{"role": "bot",
                                                                      "content": "a"}]}],
              "found bot"),
    Case("tokenizer: no such file", lambda road, folder: [
        "minirlhf/tokenizer.py", folder / "a.txt", "--out", folder / "new.json"], "no such file"),

    prepare("tinystories", "a folder without stories", lambda folder: folder, "found neither"),
    prepare("tinystories", "no such file", lambda folder: folder / "a.txt", "no such file"),
    prepare("tinystories", "a text without marks", lambda folder: write(folder, "a.txt", TEXT),
            "between stories, found none"),
    prepare("tinystories", "a training text without marks", lambda folder: write(
        folder, "s/valid.txt", "a<|endoftext|>b") and write(folder, "s/train.txt", TEXT)
        and folder / "s", "between stories, found none"),
    prepare("tinystories", "too few stories to hold one out", lambda folder: write(
        folder, "a.txt", "a<|endoftext|>b"), "at least 50 stories"),
    prepare("tinystories", "its own result for a source", lambda folder: write(
        folder, "out/valid.txt", "a<|endoftext|>b") and write(
            folder, "out/train.txt", "a<|endoftext|>b") and folder / "out", "choose another --out"),
    prepare("tinystories", "a file for a folder", lambda folder: write(
        folder, "out", "mine") and write(folder, "a.txt", "a<|endoftext|>b"), "is a file"),

    prepare("hh_rlhf", "no such file", lambda folder: folder / "pairs.jsonl", "found neither"),
    prepare("hh_rlhf", "an unknown subset", lambda folder: write(folder, "p.jsonl", [HH, OTHER]),
            "expected rows of --subset helpfull", "--subset", "helpfull"),
    prepare("hh_rlhf", "rows without their folder", lambda folder: write(
        folder, "p.jsonl", [{"chosen": "a", "rejected": "b"}]), "the keys source and split"),
    prepare("hh_rlhf", "nothing held out", lambda folder: write(folder, "p.jsonl", [HH]),
            "hold out a fifth with --fold 0"),
    prepare("hh_rlhf", "a sixth fold", lambda folder: write(folder, "p.jsonl", [HH]),
            "expected 0 to 4", "--fold", "5"),
    prepare("hh_rlhf", "its own result for a source", lambda folder: write(
        folder, "out/train.jsonl", [HH, OTHER]), "choose another --out"),
    prepare("hh_rlhf", "a file for a folder", lambda folder: write(
        folder, "out", "mine") and write(folder, "p.jsonl", [HH, OTHER]), "is a file"),
    prepare("hh_rlhf", "checksums without a download", lambda folder: write(
        folder, "p.jsonl", [HH, OTHER]), "give it without --source",
            "--sha256", "{folder}/p.jsonl"),
    Case("hh_rlhf: no address", lambda road, folder: [
        "data/hh_rlhf/prepare.py", "--url", "huggingface", "--out", folder / "out"],
        "expected a web address"),
    Case("hh_rlhf: no checksums", lambda road, folder: [
        "data/hh_rlhf/prepare.py", "--url", "http://127.0.0.1:9", "--out", folder / "out",
        "--sha256", write(folder, "sums", "train.jsonl.gz ab\n")], "line 1: expected a SHA-256"),
    Case("hh_rlhf: checksums of other files", lambda road, folder: [
        "data/hh_rlhf/prepare.py", "--url", "http://127.0.0.1:9", "--out", folder / "out",
        "--sha256", write(folder, "sums", "ab" * 32 + "  other.gz\n")], "expected a line for"),
]
