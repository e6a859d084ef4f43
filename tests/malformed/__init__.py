"""Malformed input of every kind, as a table: what a user may type, feed or break.

Each file of this folder holds CASES; `test_malformed.py` walks them all. Whatever is put in has to
end with exit code 2 and one line that names the file or option and says how to mend it: no
traceback, no hang, no run folder left behind, nothing replaced.
"""

import json
from dataclasses import dataclass
from typing import Callable


@dataclass
class Case:
    name: str  # says what is wrong, unique in its file
    argv: Callable  # (road, folder) -> words: the script's path from the root, then its options;
    #                 it may write files into the empty folder first
    words: str  # what the message has to contain; "{folder}" stands for the folder


def write(folder, name, content):
    """Put bytes, a text, or rows (as JSON lines) into folder/name; returns the path as a str."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def command(road, stage, out, **changes):
    """The words that start a quick run of a training script on the road's files, into `out`."""
    options = {**vars(road.config(stage, out)), **changes}
    words = [f"train_{stage}.py"]
    for name, value in options.items():
        if isinstance(value, bool):
            words += [f"--{name}"] if value else []
        else:
            words.append(f"--{name}={value}")
    return words
