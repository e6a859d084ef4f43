"""Kill runs at random moments, resume them until they are finished, and compare with runs that
nobody killed: weights, optimizers, random states, metrics, samples and ledgers, by hash.

    python tests/crash_test.py --kills 100             (the five training scripts)
    python tests/crash_test.py --kills 10 --road       (the same of `speedrun.py --quick`)

Every kill is a SIGKILL: no handler runs, no buffer is flushed, nothing is tidied. Half of them come
at a random moment of the run, half at one of its file operations: just before a file is opened,
renamed, cut or removed, or within the milliseconds in which it is being written. A run is resumed
with nothing but `--resume --out FOLDER`; one that was killed before it had claimed its folder is
started again. After each kill every checkpoint in the folder has to be readable.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_road import SCRIPTS, Road  # noqa: E402

from minirlhf.plumbing.checkpoints import read_checkpoint  # noqa: E402
from minirlhf.plumbing.config import command_line  # noqa: E402

LONG = {  # a second or two of training with everything that a run writes, often
    "pretrain": dict(num_steps=40), "sft": dict(num_epochs=12), "rm": dict(num_epochs=8),
    "ppo": dict(num_steps=12), "dpo": dict(num_epochs=8)}
OFTEN = dict(dtype="float32", eval_every=2, save_every=3)


# ---------------------------------------------------------------- what a folder holds, as hashes

def digest(value, into):
    """Feed a nested value of dicts, lists, tensors and plain values into a hash."""
    if isinstance(value, torch.Tensor):
        into.update(f"{value.dtype} {tuple(value.shape)}".encode())
        into.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            into.update(str(key).encode())
            digest(value[key], into)
    elif isinstance(value, (list, tuple)):
        for item in value:
            digest(item, into)
    else:
        into.update(repr(value).encode())


def fingerprints(folder):
    """{what: hash} of all that a finished run leaves behind, the clock's numbers left out."""
    ckpt = read_checkpoint(Path(folder) / "ckpt.pt")
    parts = {name: value for name, value in ckpt.items() if name not in ("config", "sizes")}
    rows = [json.loads(line) for line in open(Path(folder) / "metrics.jsonl", encoding="utf-8")]
    parts["metrics"] = [{k: v for k, v in row.items() if k != "tok_per_s"} for row in rows]
    samples = Path(folder) / "samples.txt"
    parts["samples"] = samples.read_text(encoding="utf-8") if samples.exists() else ""
    for path in sorted(Path(folder, "ledger").glob("step_*")):
        if path.suffix == ".json":
            parts[f"ledger/{path.name}"] = path.read_text(encoding="utf-8")
        else:
            with np.load(path) as arrays:
                parts[f"ledger/{path.name}"] = {
                    name: torch.from_numpy(arrays[name].copy()) for name in arrays.files}
    out = {}
    for name, value in parts.items():
        into = hashlib.sha256()
        digest(value, into)
        out[name] = into.hexdigest()
    return out


# ---------------------------------------------------------------- killing

class Killer:
    """An audit hook that ends this process at its nth file operation below a folder."""

    EVENTS = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir"}

    def __init__(self, folder, nth, delay):
        self.folder, self.left, self.delay = str(folder), nth, delay

    def __call__(self, event, args):
        if event not in self.EVENTS or self.folder not in str(args[0]):
            return
        self.left -= 1
        if self.left != 0:
            return
        if self.delay == 0:  # just before it happens
            os.kill(os.getpid(), signal.SIGKILL)
        victim = os.getpid()
        if os.fork() == 0:  # while it happens
            time.sleep(self.delay)
            os.kill(victim, signal.SIGKILL)
            os._exit(0)


def run_script(stage, argv, killer=None):
    """Run a script in a fork of this process, which has everything imported; returns its pid."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        sys.argv = [f"train_{stage}.py", *argv]
        if killer:
            sys.addaudithook(killer)
        command_line(SCRIPTS[stage].main, SCRIPTS[stage].Config)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


def wait(child, seconds=None):
    """The exit code of a child; with `seconds`, it is killed after so long. -9: it was killed."""
    if seconds is not None:
        end = time.time() + seconds
        while time.time() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def words(cfg):
    """The command line of a config."""
    out = []
    for name, value in vars(cfg).items():
        if isinstance(value, bool):
            out += [f"--{name}"] if value else []
        else:
            out.append(f"--{name}={value}")
    return out


def check_checkpoints(folder):
    """Raise where a checkpoint can't be read."""
    for name in ("ckpt.pt", "ckpt_previous.pt"):
        if (folder / name).exists():
            read_checkpoint(folder / name)


def kill_and_resume(stage, first, folder, seconds, operations, kills, rng):
    """One run, killed `kills` times; returns how many kills really hit it before it was finished."""
    hits = 0
    while True:
        begun = (folder / "config.json").exists()
        argv = ["--resume", "--out", str(folder)] if begun else first
        if hits >= kills:
            assert wait(run_script(stage, argv)) == 0, f"{stage}: the resumed run failed"
            return hits
        if rng.random() < 0.5:
            code = wait(run_script(stage, argv), rng.uniform(0, seconds))
        else:
            killer = Killer(folder, rng.randrange(1, operations), rng.choice([0, 0, 1e-3, 4e-3]))
            code = wait(run_script(stage, argv, killer))
        assert code in (0, -9), f"{stage}: exit code {code} after {hits} kills"
        check_checkpoints(folder)
        hits += code == -9
        if code == 0:
            return hits


def training(kills, rng, folder):
    """Kill training runs of all five scripts; returns (kills, runs, equal runs)."""
    road = Road(folder / "road").walk()
    expected, seconds, operations = {}, {}, {}
    first = {}
    for stage in SCRIPTS:
        often = {**OFTEN, **LONG[stage], **({} if stage == "pretrain" else {"ledger_every": 2})}
        first[stage] = lambda out, stage=stage, often=often: words(road.config(stage, out, **often))
        started = time.time()
        whole = folder / "whole" / stage
        assert wait(run_script(stage, first[stage](whole))) == 0
        seconds[stage] = time.time() - started
        expected[stage] = fingerprints(whole)
        operations[stage] = 8 * len(expected[stage])
    done, runs, equal = 0, 0, 0
    while done < kills:
        stage = list(SCRIPTS)[runs % len(SCRIPTS)]
        out = folder / f"run_{runs}"
        hits = kill_and_resume(stage, first[stage](out), out, seconds[stage], operations[stage],
                               min(rng.randint(1, 3), kills - done), rng)
        found = fingerprints(out)
        differ = [name for name in expected[stage].keys() | found.keys()
                  if expected[stage].get(name) != found.get(name)]
        print(f"{stage:9} killed {hits} times, resumed: "
              + (f"DIFFERS in {', '.join(sorted(differ))}" if differ else "equal"), flush=True)
        done, runs, equal = done + hits, runs + 1, equal + (hits if not differ else 0)
    return done, runs, equal


def road_command(out, *argv):
    return subprocess.Popen([sys.executable, "speedrun.py", "--quick", "--out", str(out), *argv],
                            cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)


def quick_road(kills, rng, folder):
    """Kill a quick road, with its children, as often, and compare it with one that ran through."""
    started = time.time()
    assert road_command(folder / "whole").wait() == 0
    seconds, done = time.time() - started, 0
    while done < kills:
        process = road_command(folder / "killed")
        try:
            process.wait(rng.uniform(0.1, 1.5) * seconds / kills + 5)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            print(f"road killed {done} times", flush=True)
    assert road_command(folder / "killed").wait() == 0
    differ = []
    for stage in ("pretrain", "sft", "rm", "ppo", "dpo"):
        a, b = (fingerprints(folder / name / "quick" / stage) for name in ("whole", "killed"))
        differ += [f"{stage}: {name}" for name in a.keys() | b.keys() if a.get(name) != b.get(name)
                   and name != "inputs"]
    print("road: " + (f"DIFFERS in {', '.join(sorted(differ))}" if differ else "equal"))
    return done, 1, 0 if differ else done


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--road", action="store_true", help="kill a quick road instead")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        walk = quick_road if args.road else training
        done, runs, equal = walk(args.kills, random.Random(args.seed), Path(folder))
    print(f"{done} kills in {runs} runs: {equal} of {done} equal by hash, no unreadable checkpoint")
    return done, equal


if __name__ == "__main__":
    done, equal = main()
    sys.exit(done != equal)
