"""Does a run's folder hold what it claims? And which command repeats it?

    python -m minirlhf.look.check out/ppo

Checked: that both checkpoints, the log, the samples and the ledger can be read and belong together;
that all that the run read is still there, unchanged; and whether versions and commit are those of
this program. Where something is wrong, the last line says what, and the exit code is 2.
"""

import argparse
import importlib.metadata
import json
import platform
import shlex
from pathlib import Path

from minirlhf.plumbing.checkpoints import (NAMES, check_model, load_checkpoint, read_checkpoint,
                                           weights_hash)
from minirlhf.plumbing.commands import run_command
from minirlhf.plumbing.config import read_settings
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import read_file
from minirlhf.plumbing.folders import LEDGER_FILE, MAY_CHANGE, commit, hash_files, read_metrics
from minirlhf.look.ledger import load


def check(folder):
    """(facts, faults) of a run's folder: lines of text. UserError where it holds no run at all."""
    folder, facts, faults = Path(folder), [], []
    settings = read_settings(folder)
    if "out" not in settings:
        raise UserError(f"{folder} holds no run; give the folder of one")
    newest = None
    for name in NAMES:
        if not (folder / name).exists():
            continue
        try:
            ckpt = read_checkpoint(folder / name)
            check_model(ckpt, folder / name)
            facts.append(f"{name}: whole, step {ckpt['step']} of {ckpt['num_steps']}"
                         + (", finished" if ckpt["done"] else ""))
            newest = newest or ckpt
        except UserError as error:
            faults.append(str(error))
        except KeyError as error:
            faults.append(f"{folder / name} lacks {error}: it is of an older version")
    if newest is None:
        return facts, faults + [f"{folder} holds no whole checkpoint"]
    faults += check_files(folder, newest, facts)
    kept = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
    stored = {name: value for name, value in newest["config"].items() if name not in MAY_CHANGE}
    for name in sorted(kept.keys() | stored.keys()):
        if kept.get(name) != stored.get(name):
            faults.append(f"config.json says {name} {kept.get(name)!r}, the checkpoint "
                          f"{stored.get(name)!r}")
    facts.append(f"options: {len(settings)}, seed {settings.get('seed')}")
    faults += check_inputs(newest, facts)
    return facts, faults


def check_files(folder, ckpt, facts):
    """Faults of the log, the samples and the ledger, beside the newest checkpoint."""
    faults = []
    try:
        steps = [row["step"] for row in read_metrics(folder)]
        if steps != sorted(set(steps)):
            faults.append(f"{folder / 'metrics.jsonl'}: its steps don't rise: a row stands there "
                          "twice")
        facts.append(f"metrics.jsonl: {len(steps)} rows, up to step {max(steps, default=0)}")
    except UserError as error:
        faults.append(str(error))
    for name, size in ckpt["sizes"].items():
        if not (folder / name).exists() or (folder / name).stat().st_size < size:
            faults.append(f"{folder / name} is shorter than when the checkpoint was written")
    records = sorted({int(found[1]) for path in (folder / "ledger").glob("step_*")
                      for found in [LEDGER_FILE.fullmatch(path.name)] if found})
    for step in records:
        try:
            load(folder, step)
        except UserError as error:
            faults.append(str(error))
    facts.append(f"ledger: {len(records)} records")
    return faults


def check_inputs(ckpt, facts):
    """Faults of what the run read, and facts about the versions that it ran with."""
    faults = []
    for name, digest in ckpt["inputs"].items():
        value = ckpt["config"][name]
        try:
            path = Path(value)
            is_run = (path / "ckpt.pt").exists() or path.suffix == ".pt"
            now = weights_hash(load_checkpoint(value)) if is_run else hash_files(value)
        except UserError as error:
            faults.append(f"--{name}: {error}")
            continue
        if now == digest:
            facts.append(f"--{name} {value}: unchanged, {digest[:12]}")
        else:
            faults.append(f"--{name} {value} has changed: it was {digest[:12]}, is {now[:12]}")
    return faults


def check_versions(folder):
    """Facts about the versions that the run had, beside those of this program."""
    path = Path(folder) / "run.json"
    text = read_file(path)
    try:
        said = json.loads(text)
        now = {name: platform.python_version() if name == "python" else
               importlib.metadata.version(name) for name in said["versions"]}
        facts = [f"{name} {version}" + ("" if now[name] == version else f" (here {now[name]})")
                 for name, version in said["versions"].items()]
        here = commit()
        facts.append(f"commit {said['commit'][:12] or 'unknown'}"
                     + ("" if said["commit"] == here else f" (here {here[:12] or 'unknown'})"))
        return said["script"], ", ".join(facts) + f"; on {said['device']} in {said['dtype']}"
    except (ValueError, KeyError, TypeError, AttributeError,
            importlib.metadata.PackageNotFoundError):
        raise UserError(f"{path}: expected what a run says of itself, found something else; it "
                        "has been changed") from None


def command(script, settings):
    """The command line that starts the run anew."""
    words = ["python", script]
    for name, value in settings.items():
        if name in ("resume", "overwrite"):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif value != "":
            words += [f"--{name}", str(value)]
    return shlex.join([*words, "--overwrite"])


def report(args):
    """Print what was found; exit code 2 where something is wrong."""
    facts, faults = check(args.run)
    script, versions = check_versions(args.run)
    for line in [*facts, versions]:
        print(f"  {line}")
    print(f"to repeat it: {command(script, read_settings(args.run))}")
    if faults:
        raise UserError(f"{args.run} does not hold what it claims: {'; '.join(faults)}")
    print(f"{args.run} holds what it claims")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m minirlhf.look.check",
                                     description="Check what a run's folder claims.")
    parser.add_argument("run", help="a run's folder")
    run_command(parser, argv, report)


if __name__ == "__main__":
    main()
