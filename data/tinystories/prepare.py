"""TinyStories -> train.txt and valid.txt, stories separated by blank lines.

Short stories in the words of a four-year-old (Eldan and Li 2023, arXiv 2305.07759): the kind of
text whose grammar a model of a few million parameters can learn, hence a good first pretraining.

    python data/tinystories/prepare.py                       # download (about 2 GB)
    python data/tinystories/prepare.py --source DIR          # a folder with train.txt and valid.txt
    python data/tinystories/prepare.py --source stories.txt  # one file: every 50th story held out

The files may be compressed (.gz). In them "<|endoftext|>" stands between two stories.
"""
import os
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.download import download
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import check_writable, write_lines
from minirlhf.plumbing.formats import END_OF_TEXT, marked_documents

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
NAMES = {"train": "TinyStories-train.txt", "valid": "TinyStories-valid.txt"}  # upstream's
VALID_EVERY = 50  # where the source is one file


@dataclass
class Config:
    source: str = ""  # local folder with train.txt and valid.txt, or one file; empty: download
    out: str = "data/tinystories"  # folder to write to
    url: str = URL  # where to download from


def download_all(url, out):
    """Fetch both of upstream's files into `out`/raw, which is then a source like any other."""
    for name in NAMES.values():
        digest = download(f"{url}/{name}", os.path.join(out, "raw", name))
        print(f"SHA-256 {digest}  {name}")
    return os.path.join(out, "raw")


def find_file(source, side):
    """The file of one side, "train" or "valid", in the folder `source`, or `source` itself."""
    if not os.path.isdir(source):
        return source
    for name in (f"{side}.txt", NAMES[side]):
        for path in (os.path.join(source, name), os.path.join(source, name + ".gz")):
            if os.path.exists(path):
                return path
    raise UserError(f"{source}: expected {side}.txt or {NAMES[side]}, perhaps with .gz, found "
                    "neither; check --source, or name one file of stories")


def read_stories(path):
    """Yield the stories one by one, so that 2 GB never stand in memory."""
    pieces = marked_documents(path)
    first, second = next(pieces), next(pieces, None)
    if second is None:
        raise UserError(f"{path}: expected {END_OF_TEXT} between stories, found none; "
                        "give the original file")
    yield from (first, second)
    yield from pieces  # what follows the last mark is often nothing


def new_stories(stories, seen, counts):
    """Yield the stories that are not empty and not in `seen`; adds to `seen`, fills `counts`.

    `seen` holds hashes: all the stories themselves would not fit into a laptop's memory.
    """
    for story in stories:
        if not story:
            continue
        if hash(story) in seen:
            counts["dropped, seen before"] += 1
            continue
        seen.add(hash(story))
        counts["stories"] += 1
        counts["characters"] += len(story)
        yield story


def main(cfg):
    check_writable(cfg.out)
    source = cfg.source or download_all(cfg.url, cfg.out)
    one_file = not os.path.isdir(source)
    # Held-out stories first: training then leaves them out.
    paths = {side: find_file(source, side) for side in ("valid", "train")}
    targets = {side: os.path.join(cfg.out, f"{side}.txt") for side in paths}
    for path in paths.values():
        next(read_stories(path))  # whatever is wrong with one shows before the other is written
        for target in targets.values():
            if os.path.exists(target) and os.path.samefile(path, target):
                raise UserError(f"{target}: source and result are one file; choose another --out")
    seen = set()
    for side, target in targets.items():
        path, stories = paths[side], read_stories(paths[side])
        if one_file:
            stories = (story for number, story in enumerate(stories, start=1)
                       if (number % VALID_EVERY == 0) == (side == "valid"))
        counts = {"stories": 0, "characters": 0, "dropped, seen before": 0}
        stories = new_stories(stories, seen, counts)
        first = next(stories, None)
        if first is None:
            raise UserError(f"{path}: expected stories for {side}.txt, found none; give a file "
                            f"with at least {VALID_EVERY} stories")
        # A blank line after each story: that is where the next document begins.
        write_lines(target, (story + "\n" for story in chain([first], stories)))
        print(f"{target} | " + " | ".join(f"{name} {n:,}" for name, n in counts.items()))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
