"""Run folders that are resumed after something in them, or around them, was changed."""

import json

import torch
from malformed import Case, command, write

def resumed(name, change, words, stage="sft", **options):
    """A case: a finished run's folder, copied and changed by change(folder), is resumed."""
    def argv(road, folder):
        run = road.finished(stage, folder / "run")
        change(run)
        return [f"train_{stage}.py", "--resume", "--out", str(run),
                *(f"--{name}={value}" for name, value in options.items())]
    return Case(name, argv, words)


def edited(**changes):
    """Change the checkpoint's entries; None removes one."""
    def change(run):
        ckpt = torch.load(run / "ckpt.pt", weights_only=True)
        ckpt.update(changes)
        torch.save({k: v for k, v in ckpt.items() if v is not None}, run / "ckpt.pt")
    return change


def config(text):
    return lambda run: write(run, "config.json", text)


def option(**changes):
    def change(run):
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
        write(run, "config.json", json.dumps({**settings, **changes}))
    return change


CANT = "its checkpoint can't be resumed from"
CASES = [
    resumed("metrics gone", lambda run: (run / "metrics.jsonl").unlink(),
            "metrics.jsonl is shorter than when the checkpoint was written"),
    resumed("metrics emptied", lambda run: write(run, "metrics.jsonl", ""),
            "metrics.jsonl is shorter than when the checkpoint was written"),
    resumed("metrics that are a folder", lambda run: (
        (run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()), "metrics.jsonl"),
    resumed("a folder in the place of the curves", lambda run: (
        (run / "curves.png").unlink(missing_ok=True), (run / "curves.png").mkdir()),
        "curves.png is a folder, where a run writes a file; move it away"),
    resumed("metrics of zeros", lambda run: write(run, "metrics.jsonl", b"\0" * 5000 + b"\n" * 999),
            "metrics.jsonl is not as the run wrote it"),
    resumed("samples gone", lambda run: (run / "samples.txt").unlink(), "samples.txt is shorter"),
    resumed("config gone", lambda run: (run / "config.json").unlink(), "holds no run to go on with"),
    resumed("config cut", config('{"lr": 0.0'), "config.json: expected the options of a run"),
    resumed("config a list", config("[]"), "config.json: expected the options of a run"),
    resumed("config of another program", config('{"model_type": "llama"}'),
            "holds no run to go on with"),
    resumed("config that is no text", config(b"\xff\xfe\x00"), "config.json"),
    resumed("a rate of text", option(lr="fast"), "config.json: lr is 'fast', expected a float"),
    resumed("a count with a point", option(batch_size=8.5), "batch_size is 8.5, expected a int"),
    resumed("another rate in the config", option(lr=0.5), "lr was 0.001, is 0.5"),
    resumed("another rate on the command line", lambda run: None, "lr was 0.001, is 0.5", lr=0.5),
    resumed("fewer epochs", lambda run: None, "expected a number above 0", num_epochs=0),
    resumed("another seed", lambda run: None, "seed was 0, is 1", seed=1),
    *(resumed(f"a checkpoint without its {key}", edited(**{key: None}), CANT) for key in (
        "optimizer", "generator", "scaler", "random_states", "sizes", "step", "done")),
    resumed("a checkpoint without its options", edited(config=None), "these options differ"),
    resumed("a checkpoint without its inputs", edited(inputs=None), "is not what the run in"),
    resumed("a step of text", edited(step="three"), CANT),
    resumed("a step beyond the end", edited(step=10**6), CANT),
    resumed("a negative step", edited(step=-1), CANT),
    resumed("an optimizer of text", edited(optimizer="adam"), CANT),
    resumed("an optimizer of nothing", edited(optimizer={}), CANT),
    resumed("an optimizer of another model", edited(optimizer={
        "state": {}, "param_groups": [{"params": [0]}, {"params": [1]}]}), CANT),
    resumed("a random state too short", edited(generator=torch.zeros(3, dtype=torch.uint8)),
            "sampled on another kind of device"),
    resumed("a random state of floats", edited(generator=torch.zeros(5056)), CANT),
    resumed("sizes of text", edited(sizes={"metrics.jsonl": "long"}), CANT),
    resumed("a size of a file elsewhere", edited(sizes={"../data.jsonl": 0}), CANT),
    resumed("weights of NaN in both", lambda run: [edited(model={
        name: value * float("nan") for name, value in torch.load(
            run / "ckpt.pt", weights_only=True)["model"].items()})(run)],
        "no whole checkpoint is left"),
    resumed("both checkpoints empty", lambda run: [write(run, name, b"") for name in (
        "ckpt.pt", "ckpt_previous.pt")], "no whole checkpoint is left"),
    resumed("a PPO run without its critic", edited(actor=None), CANT, stage="ppo"),
    resumed("a PPO run without one of its optimizers", edited(optimizer_1=None), CANT, stage="ppo"),
]


def another_script(road, folder):
    run = road.finished("sft", folder / "run")
    return ["train_dpo.py", "--resume", "--out", str(run)]


CASES += [
    Case("a run of another script", another_script, "these options differ from the run"),
    Case("a folder of somebody's samples", lambda road, folder: command(
        road, "sft", str(folder), overwrite=write(folder, "samples.txt", "mine") and True),
        "which no run wrote there"),
    Case("a folder of somebody's metrics", lambda road, folder: command(
        road, "ppo", str(folder), overwrite=write(folder, "metrics.jsonl", "{}") and True),
        "which no run wrote there"),
    Case("a folder of a model from elsewhere", lambda road, folder: command(
        road, "dpo", str(folder), overwrite=write(folder, "config.json", "{}") and True),
        "which no run wrote there"),
    Case("a finished run, without a word on what to do", lambda road, folder: command(
        road, "sft", road.finished("sft", folder / "run")), "already holds a run; give --resume"),
]
