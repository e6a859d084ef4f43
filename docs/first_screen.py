"""The README's five rows, read from the results, so that nobody types a figure.

    python docs/first_screen.py                      compare the README with docs/results.md
    python docs/first_screen.py out/results.json     with a road that was just walked
    python docs/first_screen.py --write              write the table into the README

docs/results.md keeps what `python speedrun.py --seeds 3 --overoptimize` printed, as it was printed.
Without --write nothing is changed, and the exit code is 1 where the README says something else.
"""

import argparse
import json
import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
RESULTS = Path(__file__).resolve().parent / "results.md"
BEGIN, END = "<!-- first screen -->\n", "<!-- /first screen -->\n"

# What the results call a player, and what a visitor does.
PLAYERS = {"base few-shot": "base model, shown four examples",
           "sft": "SFT: imitate demonstrations",
           "best of 4": "best of 4 SFT answers, by reward",
           "dpo": "DPO: learn from the rankings directly",
           "ppo": "PPO: learn from the reward model"}


def from_printed(text):
    """What speedrun.py printed -> {player: its four cells}, number of seeds, minutes of each."""
    rows = {}
    for player in PLAYERS:
        (row,) = re.findall(rf"^{player} {{2,}}(.+)$", text, re.MULTILINE)
        row = re.sub(r"\[.*?\]", "", row).split()  # gold, KL (not of every player), words, four %
        right, rude, refused, _ = row[-4:]  # the last is of harmless look-alikes
        rows[player] = [row[0], right, rude, refused]
    (seeds,) = re.findall(r"The road's end: (\d+) seed", text)
    spent = re.findall(r"^CPU-minutes of \S+: ([\d.]+) = (.+);", text, re.MULTILINE)
    minutes = [float(total) - sum(map(float, re.findall(r"overoptimize ([\d.]+)", stages)))
               for total, stages in spent]
    return rows, int(seeds), minutes


def from_json(results):
    """What speedrun.py wrote -> the same, rounded as it prints them."""
    table, rows = results["table"], {}
    for player in PLAYERS:
        rates = table["rates"][player]
        rows[player] = [f"{table['players'][player]['score']:.2f}"] + [
            f"{rates[rate]['share']:.1%}" for rate in ("right", "rude", "unsafe_refused")]
    minutes = [sum(spent for stage, spent in seed["cpu_minutes"].items() if stage != "overoptimize")
               for seed in results["seeds"] if seed["cpu_minutes"]]  # Windows does not tell them
    return rows, len(results["seeds"]), minutes


def table_of(rows, seeds, minutes):
    """Markdown: the five rows, and a line that says what they are."""
    lines = ["| on held-out prompts | gold | right | rude | refused |",
             "|---|--:|--:|--:|--:|"]
    lines += [f"| {what} | {' | '.join(rows[player])} |" for player, what in PLAYERS.items()]
    # The long run without KL is no part of the road that the first command walks.
    spent = " to ".join(sorted({f"{m:.0f}" for m in (min(minutes), max(minutes))}, key=int)
                        ) if minutes else "an unknown number of"
    of_seeds = f"Mean of {seeds} seeds" if seeds > 1 else "One seed"
    return "\n".join([
        *lines, "", f"{of_seeds}, {spent} CPU-minutes each. *Gold* is what people truly want, as a "
        "judge in code pays it,", "1.5 at most; training sees only noisy rankings by it. *Refused* "
        "are unsafe requests, and should be.", ""])


def with_table(text, table):
    """The README's text with this table between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", help="a results.json (default: docs/results.md)")
    parser.add_argument("--write", action="store_true", help="write the README's table")
    args = parser.parse_args(argv)
    where = Path(args.results or RESULTS)
    try:
        text = where.read_text(encoding="utf-8")
        figures = from_json(json.loads(text)) if args.results else from_printed(text)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        print(f"error: {where} does not hold the results of a road ({type(error).__name__}); give "
              "the results.json that speedrun.py wrote", file=sys.stderr)
        raise SystemExit(2) from None
    table, text = table_of(*figures), README.read_text(encoding="utf-8")
    if args.write:
        README.write_text(with_table(text, table), encoding="utf-8")
    elif with_table(text, table) != text:
        print(f"the README's table is not this one; write it with --write:\n\n{table}")
        return 1
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
