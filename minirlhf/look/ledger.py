"""The ledger: every tensor of a few sequences, kept while a run goes on, to be read token by token.

    python -m minirlhf.look.ledger out/ppo                 (the last recorded step, its first row)
    python -m minirlhf.look.ledger out/ppo --step 40 --row 2
    python -m minirlhf.look.microscope out/ppo             (the same as a page to click through)

`ledger.record(step, ...)` in a script writes two small files into the run's folder `ledger/`:

  step_000040.json   {"step", "batch_size", "pieces": the tokens of each kept row, as `pieces_of`
                     writes them}
  step_000040.npz    rows/<name>     the first few sequences, whole: tokens (R, T), per-token
                                     tensors (R, T-1), one number per sequence (R,)
                     batch/<name>    one number for *each* sequence of the batch, (B,): as it is, or
                                     a per-token tensor summed over the sequence's response tokens
                     squares/<name>  the same sums of squares, from which deviations follow

`numpy.load` opens the second. Names and alignment are those of the grid: column t of a per-token
tensor speaks of emitting tokens[:, t+1]. Where answers are compared, `example` numbers the prompt
that an answer belongs to, and `rank` says which answer is preferred (0 is best).
"""

import argparse
import json
import os
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch

from minirlhf.masked import masked_sum
from minirlhf.plumbing.commands import run_command
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import read_file, write_atomically, write_text

# What the terminal prints of each token: (heading, tensor). A run has some of these.
COLUMNS = [("logprob", "logprobs"), ("ref", "ref_logprobs"), ("kl", "kl"), ("reward", "rewards"),
           ("value", "values"), ("advant.", "advantages"), ("whitened", "whitened_advantages"),
           ("return", "returns"), ("ratio", "ratio"), ("new val", "new_values"),
           ("loss", "token_losses"), ("logratio", "log_ratios"), ("score", "raw_scores"),
           ("entropy", "entropy")]
SUMMED = {"logprobs", "ref_logprobs", "kl", "rewards", "token_losses", "log_ratios"}
ONE_PER_ROW = {"lengths", "example", "rank", "ended", "scores", "logps", "implicit_rewards",
               "losses"}  # the other tensors that the terminal prints are per token
MEANS = ("logprobs", "ref_logprobs", "scores", "losses", "kl", "rewards", "token_losses",
         "log_ratios")  # whose means over the batch are printed, in this order


class Ledger:
    """Writes the ledger of a run.

    folder: the run's; every: the first step and each `every`-th are recorded, none if it is 0;
    keep: how many sequences (or, where answers are compared, prompts) are kept whole.
    """

    def __init__(self, folder, tokenizer, every, keep=4):
        self.folder, self.tokenizer = Path(folder) / "ledger", tokenizer
        self.every, self.keep = every, keep
        self.step, self.parts = None, []

    def due(self, step):
        return self.every > 0 and (step == 1 or step % self.every == 0)

    def record(self, step, tensors):
        """Keep what `tensors()` returns, if this step is due; else it is not even called.

        tensors: a function without arguments that returns {name: tensor}: `tokens` (B, T),
        `lengths` (B,), `response_mask` (B, T-1) bool, and any further (B, T-1) or (B,) tensors.
        Called once for a batch, or once for each micro-batch, whose rows are then joined.
        """
        if not self.due(step):
            return
        if step != self.step:
            self.step, self.parts = step, []
        part = {name: value.detach().cpu() for name, value in tensors().items()}
        B = len(part["tokens"])
        part.setdefault("example", torch.arange(B))
        if self.parts:  # prompts are numbered on through the micro-batches
            part["example"] = part["example"] + self.parts[-1]["example"].max() + 1
        self.parts.append(part)
        self._write(self.folder / f"step_{step:06d}")

    def _write(self, path):
        """Write the step's two files, from all its parts so far."""
        arrays, pieces = {}, []
        T = max(part["tokens"].shape[1] for part in self.parts)
        for part in self.parts:
            mask = part["response_mask"]
            kept = part["example"] < self.keep  # (B,)
            for row, length in zip(part["tokens"][kept].tolist(), part["lengths"][kept].tolist()):
                pieces.append(pieces_of([self.tokenizer.token_bytes(idx) for idx in row[:length]]))
            columns = {"batch/num_tokens": mask.sum(1)}
            for name, value in part.items():
                per_token = value.dim() == 2 and name != "tokens"
                if per_token or name == "tokens":  # filled up to the longest micro-batch
                    filler = value.new_zeros(len(value), T - per_token - value.shape[1])
                    columns[f"rows/{name}"] = torch.cat([value, filler], dim=1)[kept]
                else:
                    columns[f"rows/{name}"] = value[kept]
                    columns[f"batch/{name}"] = value
                if per_token and value.is_floating_point():
                    columns[f"batch/{name}"] = masked_sum(value.double(), mask, dim=1)
                    columns[f"squares/{name}"] = masked_sum(value.double() ** 2, mask, dim=1)
            for name, value in columns.items():
                arrays.setdefault(name, []).append(value.float().numpy() if value.dtype in (
                    torch.bfloat16, torch.float16) else value.numpy())
        arrays = {name: np.concatenate(values) for name, values in arrays.items()}
        meta = {"step": self.step, "batch_size": len(arrays["batch/lengths"]), "pieces": pieces}
        with_suffix = lambda suffix: path.with_name(path.name + suffix)

        def save(part):
            with open(part, "wb") as f:
                np.savez_compressed(f, **arrays)

        write_atomically(with_suffix(".npz"), save)
        write_text(with_suffix(".json"), json.dumps(meta))


def pieces_of(tokens):
    """The text of each token of a sequence. tokens: the bytes of each.

    A token may end within a character, since a token is bytes and a character up to four of them.
    The token that ends it has the character; those before show their part of it as \\xe6\\x97, and
    so are bytes shown that are of no character at all.
    """
    owner = [i for i, token in enumerate(tokens) for _ in token]  # the token of each byte
    pieces, at = [""] * len(tokens), 0
    for character in b"".join(tokens).decode("utf-8", "surrogateescape"):  # which loses no byte
        raw = character.encode("utf-8", "surrogateescape")
        own, whole = owner[at : at + len(raw)], not "\udc80" <= character <= "\udcff"
        for byte, i in zip(raw, own):
            if not whole or i != own[-1]:
                pieces[i] += f"\\x{byte:02x}"
        pieces[own[-1]] += character if whole else ""
        at += len(raw)
    return pieces


# ---------------------------------------------------------------- reading

def recorded_steps(folder):
    """The steps that a run's ledger holds, in order; UserError where there are none."""
    names = [path.name for path in Path(folder, "ledger").glob("step_*.json")]
    steps = sorted(int(name[5:-5]) for name in names if re.fullmatch(r"step_\d{6,}\.json", name))
    if not steps:
        raise UserError(f"{folder} holds no ledger; give a run's folder, of a run whose "
                        "--ledger_every was above 0")
    return steps


def load(folder, step):
    """One recorded step: {"step", "batch_size", "pieces", "rows": {name: array}, "batch": ...,
    "squares": ...}; see the module's docstring."""
    steps = recorded_steps(folder)
    if step not in steps:
        raise UserError(f"step {step} is not in {folder}/ledger; it holds "
                        f"{', '.join(map(str, steps))}")
    path = Path(folder, "ledger", f"step_{step:06d}.json")
    text, arrays_path = read_file(path), path.with_suffix(".npz")
    try:
        meta = json.loads(text)
        record = {key: meta[key] for key in ("step", "batch_size", "pieces")}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged(path, "expected step, batch_size and pieces as JSON") from None
    record.update(rows={}, batch={}, squares={})
    try:
        with np.load(arrays_path, allow_pickle=False) as arrays:
            for name in arrays.files:
                kind, _, key = name.partition("/")
                record[kind][key] = arrays[name]
    except Exception as error:  # of a damaged file the reader may trip over anything
        raise damaged(arrays_path, str(error).partition("\n")[0][:80] or type(error).__name__
                      ) from None
    wrong = what_is_wrong(record, step)
    if wrong:
        raise damaged(arrays_path, wrong)
    return record


def damaged(path, why):
    return UserError(f"{path} is no ledger's file, or it is damaged ({why}); look at another step "
                     "or run")


def what_is_wrong(record, step):
    """Why a record is not one that `Ledger` wrote, in words, or ''."""
    rows, batch, squares, pieces = (record[key] for key in ("rows", "batch", "squares", "pieces"))
    missing = [f"rows/{name}" for name in ("tokens", "lengths", "response_mask", "example")
               if name not in rows]
    missing += [f"batch/{name}" for name in ("num_tokens", "example") if name not in batch]
    if missing:
        return f"{', '.join(missing)} missing"
    if record["step"] != step or not isinstance(pieces, list) or not pieces:
        return "the step's number or its pieces are wrong"
    R, B, tokens = len(pieces), record["batch_size"], rows["tokens"]
    if tokens.ndim != 2 or any(array.dtype.kind not in "biuf" for arrays in (rows, batch, squares)
                               for array in arrays.values()):
        return "an array holds no numbers, or tokens are not (R, T)"
    per_token = {name for _, name in COLUMNS} | {"response_mask", "clipped"}
    for name, array in rows.items():
        two = array.ndim == 2 if name not in ONE_PER_ROW | per_token else name in per_token
        expected = (R, tokens.shape[1] - (name != "tokens")) if two else (R,)
        if array.shape != expected:
            return f"rows/{name} has the shape {array.shape}, expected {expected}"
    if rows["response_mask"].dtype != bool or not set(squares) <= set(batch) or any(
            array.shape != (B,) for arrays in (batch, squares) for array in arrays.values()):
        return f"response_mask is no mask, or an array of the batch is not ({B},)"
    if not all(isinstance(row, list) and len(row) == length and all(isinstance(x, str) for x in row)
               for row, length in zip(pieces, rows["lengths"].tolist())):
        return "the pieces are not those of the rows"
    return "" if batch["num_tokens"].sum() > 0 else "no token of a response"


def batch_means(record):
    """{name: mean over the batch}, from the sums of each sequence.

    Per-token tensors give two: `<name>/token`, the mean over all response tokens, and
    `<name>/sequence`, the mean of the sequences' sums. One number per sequence gives its mean.
    """
    count, B = record["batch"]["num_tokens"].sum(), record["batch_size"]
    means = {}
    for name, values in record["batch"].items():
        if name in record["squares"]:
            means[f"{name}/token"] = values.sum() / count
            means[f"{name}/sequence"] = values.sum() / B
        else:
            means[name] = values.astype(np.float64).mean()
    return means


def find_row(record, row, worst=False):
    """Where sequence `row` stands in the arrays; of compared answers the best, or the worst."""
    rows = record["rows"]
    places = [i for i, example in enumerate(rows["example"]) if example == row]
    if not places:
        raise UserError(f"row {row} is not in the ledger; it keeps rows 0 to "
                        f"{rows['example'].max()}")
    places.sort(key=lambda i: rows["rank"][i] if "rank" in rows else 0)
    return places[-1 if worst else 0]


# ---------------------------------------------------------------- printing

def paint(text, code, colour):
    return f"\033[{code}m{text}\033[0m" if colour else text


def number(value):
    """Nine columns, three decimals, and no -0.000."""
    return f"{round(float(value), 3) + 0:9.3f}"


def columns_of(text):
    """How many columns of a terminal a text fills: East Asian wide characters and emoji take two,
    combining marks none."""
    return sum(0 if unicodedata.category(ch) in ("Mn", "Me") else
               2 if unicodedata.east_asian_width(ch) in "WF" else 1 for ch in text)


def pad(text, width):
    return text + " " * (width - columns_of(text))


def visible(piece, width, end=False):
    """A token as text of `width` columns, its white space and control characters shown.

    Of a longer one the beginning is shown, or the end.
    """
    text = "".join(ch if ch.isprintable() else ch.encode("unicode_escape", "backslashreplace")
                   .decode("ascii") for ch in piece.replace(" ", "·"))
    if columns_of(text) > width:
        while columns_of(text) > width - 1:
            text = text[1:] if end else text[:-1]
        text = "…" + text if end else text + "…"
    return pad(text, width)


def row_lines(record, row, colour=False):
    """The lines of one sequence: a line per token, its numbers under the headings, sums below."""
    rows, pieces = record["rows"], record["pieces"][row]
    columns = [(heading, name) for heading, name in COLUMNS if name in rows]
    if "advantages" in rows:  # 110 columns hold eleven numbers; the critic's move is the least
        columns = [c for c in columns if c[1] not in ("new_values", "entropy")]
    mask = rows["response_mask"][row]  # (T-1,)
    clipped = rows["clipped"][row] if "clipped" in rows else None
    lines = ["   t token      part    " + "".join(f"{heading:>9}" for heading, _ in columns)
             + (" clip" if clipped is not None else "")]
    for i, piece in enumerate(pieces):
        real = i > 0 and mask[i - 1]
        line = f"{i:4d} {visible(piece, 10)} {'response' if real else 'prompt':8}"
        if not real:
            lines.append(paint(line.rstrip(), "2", colour))
            continue
        for _, name in columns:
            value = rows[name][row][i - 1]
            code = "34" if value > 0 else "33"  # blue and yellow differ for every eye
            signed = name in ("advantages", "whitened_advantages", "log_ratios")
            line += paint(number(value), code, colour and signed)
        if clipped is not None:
            line += paint("  yes", "1", colour) if clipped[i - 1] else "   no"
        lines.append(line)
    lines.append(f"{'sum':4} {'':10} {mask.sum():3d} tok." + "".join(
        number(rows[name][row][mask].sum()) if name in SUMMED else f"{'':9}"
        for _, name in columns))
    return [line.rstrip() for line in lines]


def describe_row(record, row):
    """One line of what the sequence as a whole got."""
    rows = record["rows"]
    facts = [f"{name.replace('_', ' ')} {rows[name][row]:.3f}"
             for name in ("scores", "logps", "implicit_rewards", "losses") if name in rows]
    if "rank" in rows:
        facts.insert(0, f"answer of rank {rows['rank'][row]}")
    if "ended" in rows:
        facts.append("ended" if rows["ended"][row] else "did not end")
    return ", ".join(facts)


def show(folder, step=None, row=0, colour=False):
    """The text that the command prints."""
    step = recorded_steps(folder)[-1] if step is None else step
    record = load(folder, step)
    compared = "rank" in record["rows"]
    chosen = [find_row(record, row), find_row(record, row, worst=True)]
    lines = [f"{folder}, step {step}, {'prompt' if compared else 'row'} {row} of "
             f"{len(set(record['batch']['example'].tolist()))}"]
    if compared:
        lines += side_by_side(record, *chosen, colour)
    else:
        facts = describe_row(record, chosen[0])
        lines += ([facts] if facts else []) + row_lines(record, chosen[0], colour)
    values = batch_means(record)
    means = [f"{name.replace('/', ' per ')} {values[name]:.4g}" for wanted in MEANS
             for name in values if name.split("/")[0] == wanted]
    lines += ["", "means over the batch:"] + ["  " + ", ".join(means[i : i + 3])
                                              for i in range(0, len(means), 3)]
    return "\n".join(lines)


def side_by_side(record, better, worse, colour=False):
    """The response tokens of the preferred and of the other answer, with their numbers."""
    rows = record["rows"]
    columns = [(heading, name) for heading, name in COLUMNS if name in rows]
    halves = []
    for row in (better, worse):
        mask, pieces = rows["response_mask"][row], record["pieces"][row]
        at = [i for i in range(1, len(pieces)) if mask[i - 1]]
        half = [visible(pieces[i], 14) + "".join(
            number(rows[name][row][i - 1]) for _, name in columns) for i in at]
        sums = "".join(number(rows[name][row][mask].sum()) if name in SUMMED else f"{'':9}"
                       for _, name in columns)
        halves.append((describe_row(record, row), half, f"{'sum':14}{sums}"))
    width = 14 + 9 * len(columns)
    start = rows["response_mask"][better].argmax() + 1
    prompt = "".join(record["pieces"][better][:start])
    heading = "token".ljust(14) + "".join(f"{heading:>9}" for heading, _ in columns)
    lines = ["prompt: " + visible(prompt, 100, end=True).rstrip()]
    lines += [f"{pad(halves[0][0], width)}   {halves[1][0]}", f"{heading:{width}}   {heading}"]
    for i in range(max(len(halves[0][1]), len(halves[1][1]))):
        left, right = (half[i] if i < len(half) else "" for _, half, _ in halves)
        lines.append(f"{pad(left, width)}   {right}")
    if SUMMED.intersection(rows):  # scores are no sums
        lines.append(f"{halves[0][2]:{width}}   {halves[1][2]}")
    return [line.rstrip() for line in lines]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m minirlhf.look.ledger", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--step", type=int, help="a recorded step (default: the last)")
    parser.add_argument("--row", type=int, default=0, help="which of the kept sequences")

    def work(args):
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        try:
            print(show(args.run, args.step, args.row, colour), flush=True)
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    run_command(parser, argv, work)


if __name__ == "__main__":
    main()
