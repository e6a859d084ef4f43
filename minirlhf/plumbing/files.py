"""Whole files, read and written: plain or gzip, UTF-8, and never half of one.

Whoever reads gets a UserError that names the file, and the command that makes a missing one.
Whoever writes does so through `write_atomically`.
"""

import gzip
import json
import os
import re
import zlib
from contextlib import contextmanager
from pathlib import Path

from minirlhf.plumbing.errors import UserError

MADE_BY = {  # which command makes which stage's run folder, and which of the default inputs
    **{stage: f"python train_{stage}.py" for stage in ("pretrain", "sft", "rm", "ppo", "dpo")},
    "data/toy/tokenizer.json": "python -m minirlhf.tokenizer data/toy/pretrain.txt --vocab_size "
                               "1280 --out data/toy/tokenizer.json",
    "out/samples.jsonl": "python sample.py --prompts data/toy/prompts.jsonl --num_samples 6 --save "
                         "out/samples.jsonl",
    "out/preferences.jsonl": "python data/toy/annotate.py out/samples.jsonl --out "
                             "out/preferences.jsonl",
    **{f"data/toy/{name}": "python data/toy/prepare.py" for name in (
        "pretrain.txt", "demonstrations.jsonl", "prompts.jsonl", "heldout.jsonl")},
}


def how_to_make(what):
    """The end of a message about something missing: the command that makes it, if there is one.

    what: a path as the user wrote it, or a stage such as "sft".
    """
    made_by = MADE_BY.get(str(what))
    return f"; make it with: {made_by}" if made_by else "; check the path"


# ---------------------------------------------------------------- reading

@contextmanager
def naming(path, line=lambda: 0):
    """Turn whatever goes wrong while `path` is read into a UserError that names it.

    line: a function that tells the number of the last line read, for the message.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{how_to_make(path)}") from None
    except UnicodeDecodeError:
        where = f", line {line()}" if line() else ""
        raise UserError(f"{path}{where}: expected UTF-8 text, found other bytes; save the file as "
                        "UTF-8 (a compressed file has to end in .gz)") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = f", after line {line()}" if line() else ""
        raise UserError(f"{path}{where}: expected a whole gzip file, found one that breaks off or "
                        f"isn't gzip ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, found an error ({error.strerror}); "
                        "check the path") from None


def open_bytes(path):
    """A file opened for reading bytes, unzipped if its name ends in .gz."""
    return (gzip.open if str(path).endswith(".gz") else open)(path, "rb")


def read_file(path):
    """All of a plain or gzip UTF-8 file as one str, its line ends as they are."""
    with naming(path), open_bytes(path) as file:
        return file.read().decode("utf-8")


def read_lines(path):
    """Yield (line number from 1, text without its line end) of a plain or gzip UTF-8 file."""
    number = 0
    with naming(path, lambda: number), open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            yield number, line.decode("utf-8").rstrip("\r\n")
    if number == 0:
        raise UserError(f"{path}: expected text, found an empty file; write it again")


# ---------------------------------------------------------------- writing

@contextmanager
def writing(path):
    """Turn whatever the system answers while `path` is written into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); make room or give "
                        "another place") from None


def write_atomically(path, write):
    """Call write(a path beside `path`), then rename: readers see the old file or the new, never
    half of one, and a write that fails leaves nothing behind. Missing folders are made.

    File and folder are flushed to the disk, so that this holds when the power fails, too. Raises
    UserError naming `path` on a full disk, a read-only folder, a folder in its place.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(part)
            flush(part)
            os.replace(part, path)
            flush(path.parent)
        finally:
            part.unlink(missing_ok=True)


def flush(path):
    """Wait until a file's or a folder's content is on the disk. Windows can't flush a folder."""
    if os.name == "nt" and Path(path).is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_output(path, ours):
    """Refuse, before any work is done, a file that can't be written at its end, or that would
    replace one which this project did not write.

    ours: a function of the text of a file that exists; true where this project wrote it.
    """
    path = Path(path)
    if not path.name or path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    check_writable(path.parent)
    if path.exists():
        if not os.access(path, os.W_OK):
            raise UserError(f"{path} is write-protected; give another name")
        if not ours(read_file(path)):
            raise UserError(f"{path} exists, and minirlhf did not write it; give another name, or "
                            "move it away")


def check_writable(folder):
    """Refuse a folder in which nothing can be written, or that can't be made. It is not made."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{folder} can't be a folder, since {place} is a file; give another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{folder} can't be written; give another place")


def write_text(path, text):
    """Write a str as UTF-8, its line ends as they are, all or nothing."""
    write_atomically(path, lambda part: part.write_bytes(text.encode("utf-8")))


def write_lines(path, lines):
    """Write strings, one a line (gzip where `path` ends in .gz), all or nothing; returns how many.

    lines: any iterable; they are written one by one, so they need not fit into memory.
    """
    number = 0

    def write(part):
        nonlocal number
        with (gzip.open if str(path).endswith(".gz") else open)(part, "wt", encoding="utf-8",
                                                                newline="\n") as file:
            for number, line in enumerate(lines, start=1):
                file.write(line + "\n")

    write_atomically(path, write)
    return number


def write_jsonl(path, rows):
    """Write dicts as JSON, one a line, all or nothing; returns how many."""
    return write_lines(path, map(json_line, rows))


def json_line(row):
    """A dict as one line of JSON, in plain UTF-8 but where text holds half a character."""
    line = json.dumps(row, ensure_ascii=False)
    return json.dumps(row) if re.search("[\ud800-\udfff]", line) else line


def lock(path):
    """Open `path` and hold it for this process; UserError where another one holds it.

    The system frees it when the process ends, however it ends. Keep the file that is returned.
    """
    file = open(path, "ab")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{path.parent} is in use by another run, which is still at work; wait for "
                        "it, or give another --out") from None
    return file
