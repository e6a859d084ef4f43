"""What lies in a run's folder, what may be done with it, and what a run has to remember.

A run's folder holds config.json (the options), run.json (what it read and with which versions),
metrics.jsonl (an object per logged step), samples.txt, the last two checkpoints and a ledger.
Whatever else lies there is somebody's, and is never touched.
"""

import dataclasses
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from minirlhf.plumbing.checkpoints import NAMES, weights_hash
from minirlhf.plumbing.config import read_settings
from minirlhf.plumbing.download import sha256_of
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import check_writable, naming, read_file

# All that a run writes into its folder, the checkpoints first: a run that is being replaced must
# not look finished when it is killed half-way.
FILES = (*NAMES, "ckpt_new.pt", "config.json", "run.json", "metrics.jsonl", "samples.txt",
         "curves.png", "microscope.html", "bad_batch.pt", "model.safetensors")
LOGS = ("metrics.jsonl", "samples.txt")  # grow line by line; a checkpoint remembers how long
LEDGER_FILE = re.compile(r"step_(\d{6,})\.(json|npz)")
MAY_CHANGE = {"resume", "overwrite", "device", "threads", "out", "tensorboard"}  # on the way


def read_metrics(folder):
    """A run's logged rows, {"step", ...} each; a last line that was cut short is left out."""
    path = Path(folder) / "metrics.jsonl"
    lines, rows = read_file(path).split("\n"), []
    lines = lines if lines[-1].endswith("}") else lines[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"]), **{k: float(v) for k, v in row.items()
                                                      if k != "step"}})
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError, OverflowError):
            raise UserError(f'{path}, line {number}: expected {{"step": number, ...}} with a '
                            f"number under each key, found {line[:60]!r}; remove the line") from None
    return rows


def claims(run):
    """What run.json says of a run: what was read, on which device, with which versions."""
    names = ("torch", "numpy", "tiktoken")
    return {"script": Path(sys.argv[0]).name, "inputs": run.inputs, "device": str(run.device),
            "dtype": str(run.dtype).removeprefix("torch."), "commit": commit(),
            "versions": {"python": platform.python_version(),
                         **{name: importlib.metadata.version(name) for name in names}}}


def commit():
    """The commit of this code, or "" where there is no git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return ""
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True,
                          encoding="utf-8").stdout.strip()


def hash_inputs(cfg, needed, reads):
    """{option: SHA-256} of all that a run reads: weights of earlier stages, data files, a judge."""
    hashes = {name: weights_hash(ckpt) for name, ckpt in needed.items()}
    for name in reads:
        value = getattr(cfg, name)
        if not value and name != "judge":  # a run needs none
            raise UserError(f"--{name} is empty; give the name of a file")
        # A published tokenizer, such as gpt2, is no file; what no judge can be is refused later.
        if Path(value).suffix or ".py:" in value:
            hashes[name] = hash_files(value)
    return hashes


def hash_files(value):
    """SHA-256 of a file, of several with commas between, or of the file of `file.py:function`."""
    digests = []
    for path in (value[: value.index(".py:") + 3] if ".py:" in value else value).split(","):
        if not path:
            raise UserError(f"{value!r}: expected a file's name before and after each comma")
        with naming(path):
            digests.append(sha256_of(path))
    return "".join(digests)


def check_folder(cfg, out, needs):
    """Refuse an --out that can't be a run's folder, or holds what this run must not replace."""
    if not cfg.out:
        raise UserError("--out is empty; give the name of a folder")
    if cfg.resume and cfg.overwrite:
        raise UserError("--resume goes on and --overwrite starts anew; give one of them")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give the name of a folder")
    check_writable(out)
    present = [name for name in FILES if (out / name).exists()]
    is_run = (out / "config.json").exists() and "out" in read_settings(out)
    if cfg.resume and not is_run:
        raise UserError(f"--resume: {out} holds no run to go on with; leave --resume out")
    if present and not is_run:
        raise UserError(f"{out} holds {present[0]}, which no run wrote there; give another --out")
    for name in present:
        if (out / name).is_dir():
            raise UserError(f"{out / name} is a folder, where a run writes a file; move it away")
    if present and not (cfg.resume or cfg.overwrite):
        raise UserError(f"{out} already holds a run; give --resume to go on with it, --overwrite "
                        "to start anew, or another --out")
    for name in needs:
        source = Path(getattr(cfg, name))
        source = source.parent if source.suffix == ".pt" else source
        if out.resolve() == source.resolve():
            raise UserError(f"--out {out} is also --{name}: the run would replace what it "
                            "starts from; give another --out")


def check_same_run(cfg, ckpt, inputs, out):
    """Refuse to resume with other options, or with inputs that are no longer the same."""
    changed = changed_settings(ckpt.get("config", {}), dataclasses.asdict(cfg), inputs)
    if changed:
        raise UserError(f"--resume: these options differ from the run in {out}: {changed}; "
                        "a run that goes on keeps its options")
    for name, digest in inputs.items():
        before = ckpt.get("inputs", {}).get(name)
        if before != digest:
            raise UserError(f"--resume: --{name} {getattr(cfg, name)} is not what the run in {out} "
                            "began with, its content has changed; put it back, or start anew with "
                            "--overwrite")


def changed_settings(old, new, inputs=()):
    """Readable list of the settings that differ, those left out that may: MAY_CHANGE, the inputs
    (which are compared by content), and the length of the run where it grew."""
    length = "num_steps" if "num_steps" in new else "num_epochs"
    grown = length in old and type(old[length]) is int and new.get(length, 0) > old[length]
    free = MAY_CHANGE | set(inputs) | ({length} if grown else set())
    if grown:
        print(f"resume | --{length} was {old[length]}, is {new[length]}: from here on the learning "
              "rate follows the longer schedule")
    return ", ".join(f"{k} was {old.get(k)!r}, is {new[k]!r}"
                     for k in new if k not in free and old.get(k) != new[k])
