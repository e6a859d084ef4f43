"""Anthropic's hh-rlhf -> the files that the training stages read.

A row of hh-rlhf (arXiv 2204.05862) is one conversation with two answers, and the knowledge which of
them a person preferred. That is a preference; its `chosen` side doubles as a demonstration for SFT,
the conversation without an answer is a prompt for PPO, and the demonstrations as plain text are
something to pretrain and to train a tokenizer on.

    python data/hh_rlhf/prepare.py                           # download (about 45 MB)
    python data/hh_rlhf/prepare.py --source DIR --fold 0     # a local copy of upstream's folders
    python data/hh_rlhf/prepare.py --source pairs.jsonl.gz   # one file of prompt, chosen, rejected

Rows are held out by their *first human turn*, never row by row: several rows grow out of one
opening, so a split by rows would test on conversations that training has partly seen.
"""
import hashlib
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.download import download
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import check_writable, read_lines, write_jsonl, write_lines
from minirlhf.plumbing.formats import as_document, parse_preference, read_rows

URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
NUM_FOLDS = 5


@dataclass
class Config:
    source: str = ""  # local folder in upstream's layout, or one file of pairs; empty: download
    out: str = "data/hh_rlhf"  # folder to write to
    subset: str = "helpful-base,helpful-rejection-sampled"  # which of upstream's folders
    fold: int = -1  # hold out this fifth of the rows, 0 to 4 (-1: the source's own); any sign
    max_chars: int = 0  # leave out pairs whose prompt and longer answer have more; 0: keep all
    url: str = URL  # where to download from
    sha256: str = ""  # file of checksums, as sha256sum writes it, to hold the download against


# 1. Find the raw files ----------------------------------------------------------------------------

def read_checksums(path):
    """{file name: SHA-256} of a file that `sha256sum` wrote; {} where no path is given."""
    sums = {}
    for number, line in read_lines(path) if path else ():
        found = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](\S+)", line)
        if line.strip() and not found:
            raise UserError(f"{path}, line {number}: expected a SHA-256, two spaces and a file's "
                            "name; write it with sha256sum")
        sums.update({found[2]: found[1]} if found else {})
    return sums


def download_all(url, out, subsets, sha256):
    """Fetch train and test of every subset into `out`/raw; prints the checksums of what came."""
    known = read_checksums(sha256)
    print("SHA-256 (keep these lines in a file for --sha256):")
    for subset in subsets:
        for name in (f"{subset}/train.jsonl.gz", f"{subset}/test.jsonl.gz"):
            if known and name not in known:
                raise UserError(f"{sha256}: expected a line for {name}, found none; without its "
                                "checksum the file can't be held against anything")
            digest = download(f"{url}/{name}", os.path.join(out, "raw", name), known.get(name))
            print(f"{digest}  {name}")
    return os.path.join(out, "raw")


def raw_rows(source, subsets):
    """Yield (row, subset, "train" or "heldout") of a folder in upstream's layout or of one file.

    Upstream's test files are the held-out side; a single file says so in its key "split".
    """
    if os.path.isfile(source):
        for number, row in read_rows(source):
            if not isinstance(row.get("source"), str) or not isinstance(row.get("split"), str):
                raise UserError(f"{source}, line {number}: expected the keys source and split, "
                                f"found {', '.join(row)}; or give upstream's folder")
            if row["source"] in subsets:
                yield row, row["source"], "train" if row["split"] == "train" else "heldout"
        return
    for subset in subsets:
        sides = {"train.jsonl.gz": "train", "test.jsonl.gz": "heldout"}
        paths = {os.path.join(source, subset, name): side for name, side in sides.items()}
        if not any(map(os.path.exists, paths)):
            raise UserError(f"{source}: expected {' or '.join(sides)} in its folder {subset}, "
                            "found neither; check --source and --subset")
        for path, side in paths.items():
            if os.path.exists(path):
                for _, row in read_rows(path):
                    yield row, subset, side


# 2. Clean, and hold out ---------------------------------------------------------------------------

def fold_of(first):
    """The fold, 0 to 4, of a first human turn; the same in every run, unlike Python's `hash`."""
    transcript = "\n\nHuman: " + first  # as upstream writes it, so that others get the same folds
    return int(hashlib.md5(transcript.encode("utf-8")).hexdigest(), 16) % NUM_FOLDS


def clean_pairs(rows, fold, max_chars):
    """(pairs, Counter of reasons for leaving a row out); each pair also has "first" and "side".

    `fold` >= 0 holds out that fold and puts the source's own split aside.
    `max_chars` > 0 leaves out pairs whose prompt and longer answer have more characters.
    """
    pairs, dropped = [], Counter()
    for row, subset, side in rows:
        try:
            pair = parse_preference(row)
        except UserError as error:  # counted by what was expected, whatever was found instead
            dropped[str(error).split(", found")[0]] += 1
            continue
        chosen, rejected = (answer.strip() for answer in pair["answers"])
        num_chars = sum(len(message["content"]) for message in pair["messages"])
        num_chars += max(len(chosen), len(rejected))
        if chosen == rejected:
            dropped["the two answers are identical"] += 1
        elif 0 < max_chars < num_chars:
            dropped[f"longer than {max_chars} characters"] += 1
        else:
            first = pair["messages"][0]["content"]
            if fold >= 0:
                side = "heldout" if fold_of(first) == fold else "train"
            pairs.append({"messages": pair["messages"], "chosen": chosen, "rejected": rejected,
                          "source": subset, "first": first, "side": side})
    return pairs, dropped


def split_pairs(pairs, dropped):
    """(train, heldout); train rows that open like a held-out row are left out and counted."""
    heldout = [pair for pair in pairs if pair["side"] == "heldout"]
    seen = {pair["first"] for pair in heldout}
    train = [pair for pair in pairs if pair["side"] == "train" and pair["first"] not in seen]
    num_left_out = len(pairs) - len(heldout) - len(train)
    dropped["a training row that opens like a held-out one"] = num_left_out
    return train, heldout


# 3. Write -----------------------------------------------------------------------------------------

def preference_rows(pairs):
    """What `read_preferences` reads."""
    return [{key: pair[key] for key in ("messages", "chosen", "rejected", "source")}
            for pair in pairs]


def demonstration_rows(pairs):
    """The chosen side as a demonstration."""
    return [{"messages": pair["messages"] + [{"role": "assistant", "content": pair["chosen"]}],
             "source": pair["source"]} for pair in pairs]


def prompt_rows(pairs):
    """Every conversation once, though several rows may answer it."""
    rows = {json.dumps(pair["messages"]): pair for pair in pairs}
    return [{"messages": pair["messages"], "source": pair["source"]} for pair in rows.values()]


def dialogue_text(messages):
    """A conversation as plain text, a speaker's name before each turn and no blank line inside."""
    names = {"user": "Human", "assistant": "Assistant"}
    return "\n".join(f"{names[message['role']]}: {as_document(message['content'])}"
                     for message in messages)


def longer_is_chosen(pairs):
    """Share of pairs whose chosen answer has more characters: the baseline of a reward model."""
    return sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs) / len(pairs)


def main(cfg):
    subsets = [name.strip() for name in cfg.subset.split(",")]
    if not -1 <= cfg.fold < NUM_FOLDS:
        raise UserError(f"--fold {cfg.fold}: expected 0 to {NUM_FOLDS - 1}, or -1 for the "
                        "source's own split")
    if cfg.source and cfg.sha256:
        raise UserError("--sha256 holds a download against its checksums; give it without --source")
    names = ("train.jsonl", "heldout.jsonl", "demonstrations.jsonl", "prompts.jsonl",
             "heldout_prompts.jsonl", "text.txt")
    check_writable(cfg.out)
    for target in (os.path.join(cfg.out, name) for name in names):
        if os.path.exists(target) and os.path.isfile(cfg.source) and os.path.samefile(
                cfg.source, target):
            raise UserError(f"{target}: source and result are one file; choose another --out")
    source = cfg.source or download_all(cfg.url, cfg.out, subsets, cfg.sha256)
    pairs, dropped = clean_pairs(raw_rows(source, subsets), cfg.fold, cfg.max_chars)
    num_rows = len(pairs) + dropped.total()
    if num_rows == 0:
        raise UserError(f"{source}: expected rows of --subset {cfg.subset}, found none; upstream's "
                        "folders are helpful-base, helpful-rejection-sampled, helpful-online and "
                        "harmless-base")
    train, heldout = split_pairs(pairs, dropped)
    if not train or not heldout:
        raise UserError(f"{source}: expected training and held-out rows, found {len(train)} and "
                        f"{len(heldout)}; hold out a fifth with --fold 0")

    demonstrations = demonstration_rows(train)
    written = dict(zip(names, (preference_rows(train), preference_rows(heldout), demonstrations,
                               prompt_rows(train), prompt_rows(heldout))))
    for name, rows in written.items():
        write_jsonl(os.path.join(cfg.out, name), rows)
    # A blank line after each dialogue: that is where the next document begins.
    write_lines(os.path.join(cfg.out, names[-1]),
                (dialogue_text(row["messages"]) + "\n" for row in demonstrations))

    print(f"rows read {num_rows:,} | kept {len(train) + len(heldout):,} | "
          f"dropped {dropped.total():,}")
    for reason, count in dropped.most_common():
        if count:
            print(f"  dropped {count:,}: {reason}")
    for name, rows in written.items():
        print(f"  {name} {len(rows):,} rows")
    overlap = {pair["first"] for pair in train} & {pair["first"] for pair in heldout}
    print(f"first human turns in both training and held-out rows: {len(overlap)}")
    print(f"the longer answer is the chosen one: {longer_is_chosen(train + heldout):.1%} "
          f"of the kept pairs, {longer_is_chosen(heldout):.1%} of the held-out ones")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
