"""Pictures of runs, drawn from their metrics.jsonl.

    python -m minirlhf.plot out/ppo out/dpo --save out/curves.png
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draw into files; no display is needed
import matplotlib.pyplot as plt  # noqa: E402

from minirlhf.config import UserError  # noqa: E402

# What is worth drawing, with its unit; a run has some of these.
UNITS = {
    "loss": "nats", "val_loss": "nats", "accuracy": "share of pairs", "margin": "implicit reward",
    "score": "normalised score", "gold": "gold score", "kl": "nats per response",
    "entropy": "nats per token", "length": "tokens", "explained_variance": "share",
    "clip_frac": "share of tokens",
}
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # colour-blind safe


def read_metrics(folder):
    """A run's logged rows; UserError where the folder holds none."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists() or not path.read_text().strip():
        raise UserError(f"{path} holds no metrics; give the folder of a run that has logged a step")
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def save(fig, path):
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
    print(f"drawn: {path}")


def draw_runs(folders, path):
    """Every known metric that any of the runs has, one panel each, all runs together."""
    runs = {str(folder): read_metrics(folder) for folder in folders}
    keys = [key for key in UNITS if any(key in rows[-1] for rows in runs.values())]
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3 * lines), squeeze=False)
    for ax, key in zip(axes.flat, keys):
        for colour, (name, rows) in zip(COLOURS, runs.items()):
            if key in rows[-1]:
                draw(ax, rows, key, Path(name).name, colour)
        ax.set(title=key.replace("_", " "), xlabel="step", ylabel=UNITS[key])
        ax.legend(frameon=False)
    for ax in axes.flat[len(keys) :]:
        ax.axis("off")
    save(fig, path)


def draw_road(out, path, ceiling=None):
    """The learning curves of all five stages of one road, each with what it should reach."""
    fig, axes = plt.subplots(2, 3, figsize=(13, 7))
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
        rows = read_metrics(Path(out) / stage)
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
    fig, ax = plt.subplots(figsize=(9, 4.2))
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
    plt.setp(ax.get_xticklabels(), rotation=20, ha="right")
    save(fig, path)


def draw_reward_against_kl(runs, path):
    """Reward and gold along each PPO run against the square root of its KL (arXiv 2210.10760)."""
    fig, axes = plt.subplots(1, len(runs), figsize=(6 * len(runs), 4.2), squeeze=False)
    for ax, (name, folder) in zip(axes.flat, runs.items()):
        rows = [{**row, "distance": max(row["kl"], 0) ** 0.5} for row in read_metrics(folder)]
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
    parser = argparse.ArgumentParser(prog="python -m minirlhf.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--save", default="curves.png", help="the picture to write")
    args = parser.parse_args(argv)
    try:
        draw_runs(args.runs, args.save)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
