"""The microscope: a run's ledger as one page of HTML, to look at each token of each recorded step.

    python -m minirlhf.look.microscope out/ppo          (writes out/ppo/microscope.html)

The page needs no server and no network: it is microscope.html, which lies beside this file, with
the run's numbers put in as JSON. What a model wrote is text from a stranger. Three locks keep it
from becoming markup: the JSON holds no `<`, `>` or `&`; the script inserts text as text nodes only;
and the page's content security policy runs no other script than the one whose hash it names.
"""

import argparse
import base64
import hashlib
import json
import math
import re
from pathlib import Path

from minirlhf.plumbing.commands import run_command
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import check_output, read_file, write_text
from minirlhf.plumbing.folders import read_metrics
from minirlhf.look.ledger import load, recorded_steps

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_STEPS, MOST_ROWS, MOST_BYTES = 60, 400, 1_300_000  # of steps, of metrics, of the JSON
# A tensor that only this stage records names the stage.
STAGES = {"advantages": "ppo", "log_ratios": "dpo", "raw_scores": "rm", "token_losses": "sft"}
# The options that the arithmetic needs. The others stay out: a page that is shown around need not
# tell which folders its maker's machine has.
OPTIONS = ("kl_kind", "kl_target", "gamma", "lam", "clip_range", "value_clip", "whiten", "beta",
           "missing_end_score", "label_smoothing", "margin", "num_steps")
CURVES = ("score", "gold", "kl", "length", "entropy", "explained_variance", "clip_frac", "loss",
          "val_loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "grad_norm")


def short(x):
    """A number for JSON, to 7 digits, which is what float32 holds; JSON knows no infinity or NaN,
    so these become the names by which JavaScript's Number() knows them."""
    if isinstance(x, (bool, int)):
        return int(x)
    if math.isfinite(x):
        return float(f"{x:.7g}")
    return "NaN" if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"


def evenly(items, count):
    """At most `count` (2 or more) of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def step_data(record):
    """What the page shows of one recorded step (from `ledger.load`), as plain lists and numbers.

    Rows lose their filler: a row of n tokens keeps n entries of `tokens` and n - 1 of each
    per-token tensor, aligned as on the grid.
    """
    rows, batch, squares = record["rows"], record["batch"], record["squares"]
    num_tokens = [len(pieces) for pieces in record["pieces"]]
    out = {}
    for name, values in rows.items():
        if values.ndim == 1:
            out[name] = [short(x) for x in values.tolist()]
        else:
            ends = [n if name == "tokens" else n - 1 for n in num_tokens]
            out[name] = [[short(x) for x in row[:end]] for row, end in zip(values.tolist(), ends)]
    # Sums keep all their digits: the variance is the small difference of two large numbers.
    sums = {name: {"sum": float(batch[name].sum()), "squares": float(squares[name].sum())}
            for name in ("advantages", "token_losses") if name in batch}
    sums = {name: {key: x if math.isfinite(x) else short(x) for key, x in both.items()}
            for name, both in sums.items()}
    return {"step": record["step"], "batch_size": record["batch_size"], "pieces": record["pieces"],
            "rows": out, "batch": {"num_tokens": int(batch["num_tokens"].sum()), **sums}}


def read_options(path):
    """Those of a run's options that the page needs; UserError where its config.json is damaged."""
    text = read_file(path)
    try:
        found = json.loads(text)
        found = {name: found[name] for name in OPTIONS if name in found.keys()}
        json.dumps(found, allow_nan=False)  # an option is no NaN, and neither is one in the page
        whole = all(isinstance(value, (bool, int, float, str)) for value in found.values())
        whole = whole and isinstance(found.get("beta", 0), (int, float))
    except (ValueError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged, expected a run's options as JSON; train again, or "
                        "give another run")
    return found


def run_data(folder):
    """All that the page of one run shows. UserError where the folder holds no ledger."""
    folder = Path(folder)
    steps = recorded_steps(folder)
    stage = next((STAGES[name] for name in load(folder, steps[0])["rows"] if name in STAGES), None)
    if stage is None:
        raise UserError(f"{folder}/ledger holds none of {', '.join(STAGES)}: the microscope knows "
                        "PPO, DPO, reward models and SFT")
    config, metrics = read_options(folder / "config.json"), read_metrics(folder)
    betas = {row["step"]: row["beta"] for row in metrics if "beta" in row}
    if stage == "ppo":  # a step is recorded before it is logged, beta with it: leave out the last
        steps = [step for step in steps if step in betas]
        if not steps:
            raise UserError(f"{folder} has no step that is both recorded and logged; wait for one")
    num_recorded = len(steps)
    steps = evenly(steps, MOST_STEPS)
    kept = [step_data(load(folder, step)) for step in steps]
    for step in kept:
        step["beta"] = short(betas.get(step["step"], config.get("beta", 0)))
    size = sum(len(json.dumps(step)) for step in kept)
    kept = evenly(kept, max(2, int(len(kept) * min(1, MOST_BYTES / size))))
    logged = [{key: short(row[key]) for key in ("step", *CURVES) if key in row}
              for row in evenly(metrics, MOST_ROWS)]
    return {"run": folder.resolve().name, "stage": stage, "num_recorded": num_recorded,
            "config": config, "metrics": logged,
            "steps": kept}


def page(data):
    """The page's text. data: what `run_data` returns; any string in it may be hostile."""
    template = TEMPLATE.read_text(encoding="utf-8")
    for tag in ("style", "script"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        template = template.replace(f"@{tag}-hash@", f"sha256-{digest}", 1)
    # json.dumps writes every character beyond ASCII as \uXXXX, U+2028 and U+2029 among them. No
    # bare `<` is left, so neither `</script>` nor `<!--` can end or change the block.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return template.replace("@data@", text, 1)  # last: nothing is replaced inside the data


def write_page(folder):
    """Write folder/microscope.html, and return its path."""
    path = Path(folder) / "microscope.html"
    begin = TEMPLATE.read_text(encoding="utf-8").partition("@")[0]  # where the first hash is put in
    if Path(folder).is_dir():
        check_output(path, lambda text: text.startswith(begin))
    text = page(run_data(folder))
    write_text(path, text)
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m minirlhf.look.microscope",
                    description="Write a run's ledger as one page.")
    parser.add_argument("run", help="a run's folder; the page is RUN/microscope.html")
    run_command(parser, argv, lambda args: print(f"written: {write_page(args.run)}"))


if __name__ == "__main__":
    main()
