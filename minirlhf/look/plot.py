"""Pictures of runs, drawn from their metrics.jsonl and their ledgers.

    python -m minirlhf.look.plot out/ppo out/dpo --save out/both.png
    python -m minirlhf.look.plot out/ppo --step 40 --row 2    (a heat map of one sequence's tensors)
"""

import argparse
import math
import os
from pathlib import Path

import numpy as np

from minirlhf.plumbing.commands import run_command
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import check_writable, naming, write_atomically
from minirlhf.plumbing.folders import read_metrics
from minirlhf.look.ledger import COLUMNS, find_row, load, recorded_steps, visible

# What is worth drawing, with its unit and what to look for; a run has some of these.
PANELS = {
    "loss": ("nats", "loss: falls, noisily"),
    "val_loss": ("nats", "val_loss: rising again is overfitting"),
    "accuracy": ("share of held-out pairs", "accuracy: which answer is preferred"),
    "margin": ("implicit reward", "margin: chosen above rejected"),
    "chosen_logp": ("nats per answer", "chosen_logp: may fall"),
    "rejected_logp": ("nats per answer", "rejected_logp: falls faster"),
    "score": ("normalised score", "score: what the reward model sees"),
    "gold": ("gold score", "gold: what is truly wanted"),
    "kl": ("nats per response", "kl: the distance paid for it"),
    "entropy": ("nats per token", "entropy: 0 is collapse"),
    "length": ("tokens", "length: steady is healthy"),
    "explained_variance": ("share of returns' variance", "explained_variance: the critic learns"),
    "clip_frac": ("share of tokens", "clip_frac: tokens held back"),
    "approx_kl": ("nats per token", "approx_kl: the size of a step"),
}
BASELINES = {"accuracy": (0.5, "guessing"), "explained_variance": (0.0, "the mean return"),
             "margin": (0.0, "no preference"), "kl": (0.0, "the reference")}
# The pictures that are written, and how such a file begins.
KINDS = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
MOST_TOKENS = 100  # of one sequence's heat map: a picture has a largest width
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # colour-blind safe


def metrics_of(folder, *keys):
    """A run's logged rows; UserError where it has logged none yet, or where a row lacks one of the
    keys."""
    rows = read_metrics(folder) if Path(folder, "metrics.jsonl").is_file() else []
    if not rows:
        raise UserError(f"{folder} holds no metrics; give the folder of a run that has logged a "
                        "step")
    for row in rows:
        missing = [key for key in keys if key not in row]
        if missing:
            raise UserError(f"{folder}/metrics.jsonl, step {row['step']}: {', '.join(missing)} is "
                            "missing; give the folder of a PPO run with a --judge")
        large = [value for value in row.values() if 1e300 < abs(value) < math.inf]
        if large:
            raise UserError(f"{folder}/metrics.jsonl, step {row['step']}: no picture has room for "
                            f"{large[0]}; remove the line")
    return rows


def smooth(values, window=9):
    """Centred moving average; the window shrinks at the ends, so no point is invented."""
    half, out = window // 2, []
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half + 1]
        out.append(sum(near) / len(near))
    return out


def draw(ax, rows, key, label, colour, x="step"):
    """One curve, raw (pale) and smoothed."""
    points = [(row[x], row[key]) for row in rows if key in row]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    if len(ys) > 20:
        ax.plot(xs, ys, color=colour, alpha=0.25, linewidth=1)
        ys = smooth(ys)
    ax.plot(xs, ys, color=colour, linewidth=2, label=label, marker="o" if len(ys) < 4 else None)


def new_figure(width, height):
    """An empty figure, in inches.

    Not by pyplot: files need no display, and notebooks keep theirs. Imported late: matplotlib takes
    a second to load, which a script that only may draw at its end should not wait for.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def plain(text):
    """A text for a picture: dollar signs stay what they are, and begin no formula."""
    return text.replace("$", r"\$")


def check_picture(path):
    """Refuse, before anything is drawn, a picture of a kind that isn't written, or in a place that
    holds something else."""
    path, begins = Path(path), KINDS.get(Path(path).suffix)
    if begins is None:
        raise UserError(f"{path}: expected a name that ends in {', '.join(KINDS)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    check_writable(path.parent)
    if path.exists():
        with naming(path), open(path, "rb") as file:
            ours = file.read(len(begins)) == begins
        if not ours or not os.access(path, os.W_OK):
            raise UserError(f"{path} exists, and is write-protected or no {path.suffix} picture; "
                            "give another name")


def save(fig, path):
    fig.tight_layout()
    kind = Path(path).suffix[1:]
    write_atomically(path, lambda part: fig.savefig(part, dpi=110, format=kind))
    print(f"drawn: {path}")


def draw_runs(folders, path):
    """Every known metric that any of the runs has, one panel each, all runs together."""
    check_picture(path)
    runs = {str(folder): metrics_of(folder) for folder in folders}
    keys = [key for key in PANELS if any(key in rows[-1] for rows in runs.values())]
    if not keys:
        raise UserError(f"{', '.join(runs)}: none of {', '.join(PANELS)} was logged")
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    fig = new_figure(4.2 * columns, 3 * lines)
    axes = fig.subplots(lines, columns, squeeze=False)
    for ax, key in zip(axes.flat, keys):
        for i, (name, rows) in enumerate(runs.items()):
            if key in rows[-1]:
                draw(ax, rows, key, plain(label(name, runs)), COLOURS[i % len(COLOURS)])
        level, meaning = BASELINES.get(key, (None, ""))
        if key in ("loss", "val_loss") and all("accuracy" in rows[-1] for rows in runs.values()):
            level, meaning = math.log(2), "guessing"  # of a preference loss
        if level is not None:
            ax.axhline(level, color="grey", linestyle=":", label=meaning)
        unit, title = PANELS[key]
        ax.set_title(title, fontsize=10)
        ax.set(xlabel="step", ylabel=unit)
        ax.legend(frameon=False, fontsize=8)
    for ax in axes.flat[len(keys) :]:
        ax.axis("off")
    save(fig, path)


def draw_curves(folder):
    """Save the curves of one whole run as its curves.png; two points or fewer are no curve."""
    if len(read_metrics(folder)) > 2:
        draw_runs([folder], Path(folder) / "curves.png")


def label(folder, folders):
    """The folder's last name, or all of it where two runs share that."""
    name = Path(folder).name
    return name if sum(Path(other).name == name for other in folders) == 1 else str(folder)


def draw_sequence(folder, path, step=None, row=0):
    """A heat map of one recorded sequence: a line for each tensor, a column for each token of the
    response, MOST_TOKENS at most.

    Each line has its own scale: orange is above 0, purple below; for the ratio, above and below 1.
    """
    check_picture(path)
    step = recorded_steps(folder)[-1] if step is None else step
    record = load(folder, step)
    row = find_row(record, row)
    mask = record["rows"]["response_mask"][row]
    at = [i for i in range(1, len(record["pieces"][row])) if mask[i - 1]]
    names = [name for _, name in COLUMNS if name in record["rows"]]
    if not at or not names:
        raise UserError(f"{folder}, step {step}: this row has no token of a response, or no tensor "
                        "was recorded; give another --row")
    cut = f", the first {MOST_TOKENS} of {len(at)} tokens" if len(at) > MOST_TOKENS else ""
    at = at[:MOST_TOKENS]
    values = np.array([[record["rows"][name][row][i - 1] for i in at] for name in names])
    shift = np.array([[1.0 if name == "ratio" else 0.0] for name in names])
    sizes = np.nan_to_num(np.abs(values - shift), posinf=0)  # NaN and infinity have no colour
    scale = sizes.max(axis=1, keepdims=True).clip(min=1e-9)  # of each tensor
    shade = (values - shift) / scale
    fig = new_figure(2.4 + 0.62 * len(at), 1.2 + 0.36 * len(names))
    ax = fig.subplots()
    ax.imshow(shade, cmap="PuOr_r", vmin=-1.4, vmax=1.4, aspect="auto")
    for y, x in np.ndindex(values.shape):
        ax.text(x, y, f"{round(values[y, x], 2) + 0:.2f}", ha="center", va="center", fontsize=7,
                color="white" if abs(shade[y, x]) > 0.9 else "black")
    pieces = [plain(visible(record["pieces"][row][i], 12).strip()) for i in at]
    ax.set_xticks(range(len(at)), pieces, rotation=45, ha="right")
    ax.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    ax.set_title(plain(f"{Path(folder).name}, step {step}, row {row}: every tensor of each "
                       f"response token{cut}\n(colours: each line by its own scale)"), fontsize=10)
    save(fig, path)


def draw_road(out, path, ceiling=None):
    """The learning curves of all five stages of one road, each with what it should reach."""
    fig = new_figure(13, 7)
    axes = fig.subplots(2, 3)
    panels = [
        (axes[0, 0], "pretrain", "val_loss", "Pretraining: the text becomes predictable",
         "held-out loss (nats per token)"),
        (axes[0, 1], "sft", "val_loss", "SFT: the assistant's turns, too",
         "held-out loss (nats per token)"),
        (axes[0, 2], "rm", "accuracy", "Reward model: near the ceiling",
         "held-out pairs right"),
        (axes[1, 0], "ppo", "gold", "PPO: gold rises with the reward", "score"),
        (axes[1, 1], "ppo", "kl", "PPO: distance to the SFT model",
         "KL (nats per response)"),
        (axes[1, 2], "dpo", "accuracy", "DPO: implicit rewards rank pairs",
         "held-out pairs right"),
    ]
    for ax, stage, key, title, unit in panels:
        rows = metrics_of(Path(out) / stage)
        draw(ax, rows, key, {"gold": "gold score (never trained on)"}.get(key), COLOURS[0])
        if key == "gold":
            draw(ax, rows, "score", "reward model's score (normalised)", COLOURS[1])
            ax.legend(frameon=False)
        if key == "accuracy":
            ax.axhline(0.5, color="grey", linestyle=":", label="guessing")
            if ceiling and stage == "rm":
                ax.axhline(ceiling, color="grey", linestyle="--", label="ceiling: the noise")
            ax.legend(frameon=False)
        ax.set(title=title, xlabel="iteration" if stage == "ppo" else "step", ylabel=unit)
    save(fig, path)


def draw_gold_by_stage(players, path, best=1.5):
    """Bars: the mean gold score of every player. players: {name: one value per seed}."""
    names = list(players)
    fig = new_figure(9, 4.2)
    ax = fig.subplots()
    means = [sum(players[name]) / len(players[name]) for name in names]
    ax.bar(names, means, color=COLOURS[0], width=0.6)
    for x, name in enumerate(names):
        ax.plot([x] * len(players[name]), players[name], "o", color="black", markersize=4)
        ax.annotate(f"{means[x]:.2f}", (x, max(0, *players[name])), textcoords="offset points",
                    xytext=(0, 6), ha="center")
    ax.axhline(best, color="grey", linestyle="--")
    ax.annotate("perfect", (-0.4, best), textcoords="offset points", xytext=(0, 4), color="grey")
    ax.set(title="Gold score on held-out prompts, stage by stage (dots: seeds)",
           ylabel="gold score", ylim=(min(0, *means) - 0.1, best + 0.2))
    ax.set_xticks(range(len(names)), names, rotation=20, ha="right")
    save(fig, path)


def draw_reward_against_kl(runs, path):
    """Reward and gold along each PPO run against the square root of its KL (arXiv 2210.10760)."""
    fig = new_figure(6 * len(runs), 4.2)
    axes = fig.subplots(1, len(runs), squeeze=False)
    for ax, (name, folder) in zip(axes.flat, runs.items()):
        rows = [{**row, "distance": max(row["kl"], 0) ** 0.5} for row in
                metrics_of(folder, "kl", "score", "gold")]
        for key, label, colour in (("score", "reward model's score (normalised)", COLOURS[1]),
                                   ("gold", "gold score", COLOURS[0])):
            xs = smooth([row["distance"] for row in rows])
            ax.plot(xs, smooth([row[key] for row in rows]), color=colour, linewidth=2, label=label)
            ax.plot([row["distance"] for row in rows], [row[key] for row in rows], ".",
                    color=colour, alpha=0.25)
        ax.set(title=name, xlabel="square root of the KL to the SFT model (nats per response)",
               ylabel="score")
        ax.legend(frameon=False)
    save(fig, path)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m minirlhf.look.plot", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--save", help="the picture to write, .png, .pdf or .svg (default: "
                        "runs.png or sequence.png)")
    parser.add_argument("--row", type=int, help="draw this sequence of the run's ledger")
    parser.add_argument("--step", type=int, help="of this recorded step (default: the last)")

    def work(args):
        if args.row is None and args.step is None:
            draw_runs(args.runs, args.save or "runs.png")
        elif len(args.runs) > 1:
            raise UserError("--row and --step draw one run's sequence; give one folder")
        else:
            draw_sequence(args.runs[0], args.save or "sequence.png", args.step, args.row or 0)

    run_command(parser, argv, work)


if __name__ == "__main__":
    main()
