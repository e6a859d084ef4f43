"""What is nobody's lesson: run folders, checkpoints, resuming, the log.

A run's folder holds config.json, metrics.jsonl (an object per logged step), samples.txt, ckpt.pt.
A checkpoint is one file with all that anyone needs: weights, optimizer, step, random states, model
config and tokenizer.
"""

import dataclasses
import importlib.util
import json
import time
from pathlib import Path

import torch

from minirlhf.model import GPT, ModelConfig, ScalarModel
from minirlhf.tokenizer import Tokenizer
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import (how_to_make, read_file, write_atomically, write_jsonl,
                                     write_text)

CKPT_KEYS = {"kind", "model", "model_config", "tokenizer"}  # what a next stage needs at least


def pick_device(name=""):
    """cuda where there is one, else cpu; a name overrides."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch sees no CUDA device; use --device cpu")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; expected cpu, cuda or cuda:0") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def pick_dtype(name, device):
    """The autocast type: 'auto' is bf16 on CUDA and on CPUs with bf16 instructions, else float32.

    A CPU without them emulates bf16 several times more slowly than float32.
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        has_bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    if name not in names:
        raise UserError(f"--dtype {name}: expected auto, {', '.join(names)}")
    return names[name]


def load_checkpoint(folder, stage=None, kind=None):
    """Read folder/ckpt.pt (or a path to a .pt file) as a dict.

    stage: the one that makes it, such as "sft", for the message where it is missing; without it the
    folder's name tells the stage, if it is one.
    kind: "gpt" or "scalar", what the caller needs. `weights_only=True`: a checkpoint from a
    stranger can hold tensors and plain values, but no code to run.
    """
    path = Path(folder) if str(folder).endswith(".pt") else Path(folder) / "ckpt.pt"
    how = how_to_make(stage or path.parent.name)
    if not path.exists():
        raise UserError(f"{path} does not exist{how}")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file the loader may trip over anything
        reason = str(error).partition("\n")[0][:80] or "it ends too early"
        raise UserError(f"{path} cannot be read, it is damaged or cut short ({reason}){how}"
                        ) from None
    if not isinstance(ckpt, dict) or not CKPT_KEYS <= set(ckpt):
        raise UserError(f"{path} is no checkpoint of minirlhf: it lacks one of "
                        f"{', '.join(sorted(CKPT_KEYS))}{how}")
    if kind and ckpt["kind"] != kind:
        raise UserError(f"{path} holds a {ckpt['kind']} model, a {kind} model is needed{how}")
    return ckpt


def build_model(ckpt):
    """The model in a checkpoint: a GPT or a ScalarModel."""
    cfg = ModelConfig(**ckpt["model_config"])
    model = GPT(cfg) if ckpt["kind"] == "gpt" else ScalarModel(cfg)
    model.load_state_dict(ckpt["model"])
    return model


def load_model(folder, kind="gpt", device="cpu"):
    """(model, tokenizer) of a run's folder, ready to evaluate."""
    ckpt = load_checkpoint(folder, kind=kind)
    return build_model(ckpt).to(device).eval(), Tokenizer.from_dict(ckpt["tokenizer"])


def load_function(spec):
    """The function that `file.py:name` points to: a judge, a verifier."""
    path, _, name = spec.partition(":")
    if not Path(path).is_file() or not name:
        raise UserError(f"{spec!r} is no function; write it as file.py:name, with a file that "
                        "exists")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise UserError(f"{path} defines no function {name}")
    return getattr(module, name)


def frozen(model):
    """Switch gradients and dropout off for good: for a reference or a reward model."""
    return model.eval().requires_grad_(False)


def autocast(device, dtype):
    """The context in which models run forward: matrix products in `dtype`, sums in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def due(step, every, num_steps):
    """Whether something that happens every so many steps, and after the last, happens now."""
    return step % every == 0 or step == num_steps


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
            raise UserError(f'{path}, line {number}: expected {{"step": number, ...}} with a number '
                            f"under each key, found {line[:60]!r}; remove the line") from None
    return rows


class Run:
    """One run of a script: where it reads and writes, its log and its random generator."""

    def __init__(self, cfg, folder, needed, first_line):
        self.cfg, self.folder, self.needed = cfg, Path(folder), needed
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.dtype, self.device)
        # float16's range is so small that gradients vanish unless the loss is scaled up; for the
        # other types the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**10,
                                           enabled=self.dtype == torch.float16)
        self.generator = torch.Generator(self.device).manual_seed(cfg.seed)  # for sampling
        self.data_order = torch.Generator().manual_seed(cfg.seed)  # for shuffling, at start only
        self.history, self._clock = [], time.time()
        self.tokenizer = None
        for name, ckpt in needed.items():
            tokenizer = Tokenizer.from_dict(ckpt["tokenizer"])
            if self.tokenizer and self.tokenizer.fingerprint() != tokenizer.fingerprint():
                raise UserError(
                    f"--{name} {getattr(cfg, name)} was trained with another vocabulary than "
                    f"--{next(iter(needed))} {getattr(cfg, next(iter(needed)))}; its token ids "
                    "mean other words. Retrain one of them from the same base model")
            self.tokenizer = self.tokenizer or tokenizer
        print(first_line)

    def model(self, name):
        """A fresh copy of the model in the checkpoint that the option `name` points to."""
        return build_model(self.needed[name]).to(self.device)

    def autocast(self):
        return autocast(self.device, self.dtype)

    def preflight(self, train_step, options):
        """Run the largest batch's forward and backward once, so that a lack of memory shows now.

        train_step: a function without arguments; options: those that shrink it, for the message.
        Random states and gradients are left as they were.
        """
        state, cpu_state = self.generator.get_state(), torch.get_rng_state()
        try:
            train_step()
        except RuntimeError as error:
            short_of_memory = (isinstance(error, torch.OutOfMemoryError) or
                               "allocate memory" in str(error) or
                               "not enough memory" in str(error) or "ALLOC_FAILED" in str(error))
            if not short_of_memory:
                raise
            raise UserError(f"the largest batch does not fit in the memory of {self.device}; "
                            f"make {options} smaller") from None
        self.generator.set_state(state)
        torch.set_rng_state(cpu_state)

    def restore(self, **parts):
        """Open the run's folder; with --resume, load the saved states into parts.

        Returns the number of steps done before, 0 in a new run. Scripts call it last before their
        loop, so that a mistake in the options or the data leaves the folder as it was, and a run
        that --overwrite is to replace is still there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(dataclasses.asdict(self.cfg), indent=2) + "\n"
        write_text(self.folder / "config.json", settings)
        if not self.cfg.resume:
            for name in ("ckpt.pt", "metrics.jsonl", "samples.txt", "curves.png",
                         "microscope.html"):  # no more than a run's own files
                (self.folder / name).unlink(missing_ok=True)
            for path in (self.folder / "ledger").glob("step_*"):
                path.unlink()
            (self.folder / "metrics.jsonl").touch()
            return 0
        ckpt = load_checkpoint(self.folder)
        for name, part in parts.items():
            part.load_state_dict(ckpt[name])
        if len(ckpt["generator"]) != len(self.generator.get_state()):
            raise UserError(f"--resume: the run in {self.folder} sampled on another kind of device "
                            f"than {self.device}; go on there, or start anew with --overwrite")
        self.scaler.load_state_dict(ckpt["scaler"])
        self.generator.set_state(ckpt["generator"])
        torch.set_rng_state(ckpt["rng"])
        # Rows logged after the checkpoint belong to steps that will be done again.
        self.history = [row for row in read_metrics(self.folder) if row["step"] <= ckpt["step"]]
        write_jsonl(self.folder / "metrics.jsonl", self.history)
        return ckpt["step"]

    def save(self, step, model, **parts):
        """Write ckpt.pt after `step` finished steps; `model` is what the next stage loads."""
        ckpt = {
            "step": step, "config": dataclasses.asdict(self.cfg),
            "kind": "gpt" if isinstance(model, GPT) else "scalar",
            "model_config": dataclasses.asdict(model.cfg), "tokenizer": self.tokenizer.to_dict(),
            "generator": self.generator.get_state(), "rng": torch.get_rng_state(),
            "scaler": self.scaler.state_dict(), "model": model.state_dict(),
        }
        ckpt.update({name: part.state_dict() for name, part in parts.items()})
        write_atomically(self.folder / "ckpt.pt", lambda part: torch.save(ckpt, part))

    def log(self, step, num_steps, num_tokens, **metrics):
        """Print a line and append its numbers to metrics.jsonl; num_tokens: since the last one."""
        row = {k: v.item() if isinstance(v, torch.Tensor) else float(v) for k, v in metrics.items()}
        rate = num_tokens / max(1e-9, time.time() - self._clock)
        self._clock = time.time()
        shown = " | ".join(f"{k} {v:.3g}" if abs(v) < 0.1 or abs(v) >= 1000 else f"{k} {v:.3f}"
                           for k, v in row.items())
        print(f"step {step}/{num_steps} | {shown} | {rate / 1000:.1f}k tok/s", flush=True)
        row = {"step": step, **row, "tok_per_s": rate}
        self.history.append(row)
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def show(self, step, text):
        """Print a sample and append it to samples.txt."""
        print(text, flush=True)
        with open(self.folder / "samples.txt", "a") as f:
            f.write(f"step {step}\n{text}\n\n")


def start_run(cfg, needs):
    """Check everything that can be checked before any work; `Run.restore` opens the folder.

    cfg: a script's Config, with out, resume, overwrite, seed, device and dtype among its fields.
    needs: {option: stage}, the options of cfg that name run folders of earlier stages, e.g.
    {"init": "sft"}; their checkpoints are read here. Raises UserError with the command that makes
    a missing one, and where the folder already holds a run.
    """
    out = Path(cfg.out)
    if cfg.resume and cfg.overwrite:
        raise UserError("--resume goes on and --overwrite starts anew; give one of them")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give the name of a folder")
    if cfg.resume and not (out / "ckpt.pt").exists():
        raise UserError(f"--resume: {out} holds no checkpoint yet; start it with --overwrite")
    if any((out / name).exists() for name in ("config.json", "ckpt.pt")):
        if not (cfg.resume or cfg.overwrite):
            raise UserError(f"{out} already holds a run; give --resume to go on with it, "
                            "--overwrite to start anew, or another --out")
        for name in needs:
            if out.resolve() == Path(getattr(cfg, name)).resolve():
                raise UserError(f"--out {out} is also --{name}: the run would replace what it "
                                "starts from; give another --out")
    needed = {}
    for name, stage in needs.items():
        kind = "scalar" if stage == "rm" else "gpt"
        needed[name] = load_checkpoint(getattr(cfg, name), stage, kind)
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)
    settings = dataclasses.asdict(cfg)
    run = Run(cfg, out, needed, "config | " + " ".join(f"{k}={v}" for k, v in settings.items()))
    if cfg.resume:
        changed = changed_settings(load_checkpoint(out)["config"], settings)
        if changed:
            raise UserError(f"--resume: these options differ from the run in {out}: {changed}; "
                            "a run that goes on keeps its options")
    torch.manual_seed(cfg.seed)
    return run


def changed_settings(old, new):
    """Readable list of the settings that differ, those left out that may: resume and overwrite."""
    free = {"resume", "overwrite", "device", "threads"}
    return ", ".join(f"{k} was {old.get(k)!r}, is {new[k]!r}"
                     for k in new if k not in free and old.get(k) != new[k])
