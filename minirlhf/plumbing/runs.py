"""One run of a training script, from its set-up to its last save: what is nobody's lesson."""

import contextlib
import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from minirlhf.model import GPT, count_parameters
from minirlhf.plumbing import signals
from minirlhf.plumbing.checkpoints import (build_model, load_checkpoint, newest_whole,
                                           open_tokenizer, save_checkpoint, save_tensors)
from minirlhf.plumbing.devices import (autocast, memory_of, pick_device, pick_dtype, random_states,
                                       set_random_states, set_threads)
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import flush, lock, write_atomically, write_text, writing
from minirlhf.plumbing.folders import (FILES, LEDGER_FILE, LOGS, check_folder, check_same_run,
                                       claims, hash_inputs, read_metrics)
from minirlhf.plumbing.health import name_the_bad, not_finite


def due(step, every, num_steps):
    """Whether something that happens every so many steps, and after the last, happens now."""
    return step % every == 0 or step == num_steps


class Run:
    """One run of a script: where it reads and writes, its log and its random generator."""

    def __init__(self, cfg, folder, needed, inputs):
        self.cfg, self.folder, self.needed, self.inputs = cfg, Path(folder), needed, inputs
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.dtype, self.device)
        # float16's range is so small that gradients vanish unless the loss is scaled up; for the
        # other types the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**10,
                                           enabled=self.dtype == torch.float16)
        self.generator = torch.Generator(self.device).manual_seed(cfg.seed)  # for sampling
        self.data_order = torch.Generator().manual_seed(cfg.seed)  # for shuffling, at start only
        self.history, self._clock, self._shown = [], time.time(), time.time()
        self.step, self.num_steps, self.done = 0, 0, False  # steps behind us, in all, and whether
        self._failure, self._writer, self._bar = None, None, None  # nothing is left to be done
        self._saved = None  # the step of the last checkpoint that was written
        self.tokenizer = None
        for name, ckpt in needed.items():
            tokenizer = open_tokenizer(ckpt)
            if self.tokenizer and self.tokenizer.fingerprint() != tokenizer.fingerprint():
                raise UserError(
                    f"--{name} {getattr(cfg, name)} was trained with another vocabulary than "
                    f"--{next(iter(needed))} {getattr(cfg, next(iter(needed)))}; its token ids "
                    "mean other words. Retrain one of them from the same base model")
            self.tokenizer = self.tokenizer or tokenizer
        print("config | " + " ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items()))

    def model(self, name):
        """A fresh copy of the model in the checkpoint that the option `name` points to."""
        return build_model(self.needed[name]).to(self.device)

    def autocast(self):
        return autocast(self.device, self.dtype)

    # ---- before the loop

    def preflight(self, model, train, also=(), *, options):
        """Run the largest batch of each kind that the run will have, so that a lack of memory shows
        now and not after an hour.

        train: a function without arguments that returns the losses of the largest training batch;
        also: functions that do whatever else the run does (sample, score, record), each at its
        largest; options: those that shrink them, for the message. Meanwhile as much memory is held
        as the optimizer will take. Random states and gradients are left as they were.
        """
        states = self.generator.get_state(), random_states(self.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        try:
            adam = [torch.full_like(p, 0.0) for p in trained for _ in range(2)]  # its two averages
            with torch.no_grad():
                for other in also:
                    other()
            for _ in range(2):  # the second time beside the gradients of the first
                with self.autocast():
                    losses = train()
                losses.sum().backward()
            for p in trained:
                p.grad = None
            del adam
        except RuntimeError as error:
            short_of_memory = (isinstance(error, torch.OutOfMemoryError) or
                               "allocate memory" in str(error) or
                               "not enough memory" in str(error) or "ALLOC_FAILED" in str(error))
            if not short_of_memory:
                raise
            raise UserError(f"the largest batch does not fit in the memory of {self.device}; "
                            f"make {options} smaller") from None
        self.generator.set_state(states[0])
        set_random_states(states[1])

    def check_size(self, model_cfg):
        """Refuse a model that can't be trained here: a parameter takes 16 bytes, 4 each for itself,
        its gradient and Adam's two averages."""
        counts = [count_parameters(dataclasses.replace(model_cfg, n_layer=n)) for n in (1, 2)]
        parameters = counts[0] + (model_cfg.n_layer - 1) * (counts[1] - counts[0])
        memory = memory_of(self.device)
        if memory and 16 * parameters > memory:
            raise UserError(f"a model of {parameters:,} parameters takes {16e-9 * parameters:,.0f} "
                            f"GB to train, and {self.device} has {1e-9 * memory:,.0f}; choose a "
                            "smaller one")

    def restore(self, num_steps, **parts):
        """Open the run's folder; with --resume, load the saved states into parts.

        num_steps: how many the run has in all. Scripts call this last before their loop, so that a
        mistake in the options or the data leaves the folder as it was, and a run that --overwrite
        is to replace is still there.
        """
        self.num_steps = num_steps
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder / ".lock")
        ckpt, note = newest_whole(self.folder) if self.cfg.resume else (None, "")
        if note:
            print(f"resume | {note}: going on from the older one, of step {ckpt['step']}")
        if ckpt is None:
            if self.cfg.resume:
                print("resume | there is no checkpoint yet: starting from the first step")
            for name in FILES:  # but config.json, which says that they are a run's: it is replaced
                if name != "config.json":
                    (self.folder / name).unlink(missing_ok=True)
            self._trim_ledger(0)
        else:
            self._go_on_from(ckpt, parts)
        settings = json.dumps(dataclasses.asdict(self.cfg), indent=2) + "\n"
        write_text(self.folder / "config.json", settings)  # the first of all files
        write_text(self.folder / "run.json", json.dumps(claims(self), indent=2) + "\n")
        if ckpt is None:
            write_text(self.folder / "metrics.jsonl", "")
        if self.cfg.tensorboard:
            self._writer = open_tensorboard(self.folder)

    def _go_on_from(self, ckpt, parts):
        """Load a checkpoint's states, and cut off what was written after it: it is done again."""
        try:
            for name, part in parts.items():
                part.load_state_dict(ckpt[name])
            if len(ckpt["generator"]) != len(self.generator.get_state()):
                raise UserError(f"--resume: the run in {self.folder} sampled on another kind of "
                                f"device than {self.device}; go on there, or start anew with "
                                "--overwrite")
            self.scaler.load_state_dict(ckpt["scaler"])
            self.generator.set_state(ckpt["generator"])
            set_random_states(ckpt["random_states"])
            self.step, self.done = ckpt["step"], ckpt["done"] and ckpt["step"] == self.num_steps
            if not 0 <= self.step <= self.num_steps:
                raise ValueError(f"step {self.step} of {self.num_steps}")
            sizes = {name: int(ckpt["sizes"][name]) for name in LOGS
                     if name == LOGS[0] or name in ckpt["sizes"]}  # samples come later, if at all
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error).partition("\n")[0][:100]
            raise UserError(f"{self.folder}: its checkpoint can't be resumed from, something in it "
                            f"is missing or of another kind ({type(error).__name__}: {reason}); "
                            "start anew with --overwrite") from None
        for name, size in sizes.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size < size:
                raise UserError(f"{path} is shorter than when the checkpoint was written; put it "
                                "back as it was, or start anew with --overwrite")
            with writing(path), open(path, "rb+") as file:
                if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
                    raise UserError(f"{path} is not as the run wrote it; put it back as it was, or "
                                    "start anew with --overwrite")
                file.truncate(size)
        self._trim_ledger(self.step)
        self.history = read_metrics(self.folder)
        if self.done:
            print(f"resume | the run in {self.folder} is finished: all its {self.step} steps are "
                  "done")
        else:
            print(f"resume | going on after step {self.step} of {self.num_steps}")

    def _trim_ledger(self, step):
        """Remove the ledger's records of later steps; nothing else that lies there."""
        for path in (self.folder / "ledger").glob("step_*"):
            found = LEDGER_FILE.fullmatch(path.name)
            if found and int(found[1]) > step:
                path.unlink()

    # ---- in the loop

    def steps(self):
        """The numbers of the steps that are left, up to num_steps.

        Between two steps it shows where the run is, and leaves if it is asked to: after Ctrl-C, or
        with an error that `postponing` has kept. It leaves only after a step that was saved, as
        `save_due` asks for; a signal that comes too late for that ends the run a step later.
        """
        bar = tqdm(total=self.num_steps, initial=self.step, disable=not sys.stderr.isatty(),
                   desc=self.folder.name, leave=False)
        signals.patient = True
        started, first = time.time(), self.step
        self._bar, self._shown = (None if bar.disable else bar), started
        try:
            while self.step < self.num_steps:
                self.step += 1
                yield self.step
                bar.update()
                self._show_progress((time.time() - started) / (self.step - first))
                if self._failure:
                    raise self._failure
                if signals.received and self._saved == self.step:
                    raise signals.Stopped(signals.received, f"stopped after step {self.step} of "
                                          f"{self.num_steps}, which is saved; go on with: python "
                                          f"{Path(sys.argv[0]).name} --resume --out {self.folder}")
        finally:
            signals.patient = False
            bar.close()
            if self._writer:
                self._writer.close()

    def _show_progress(self, seconds):
        """Where nobody watches a bar, say once in a while how far the run is; seconds: a step's."""
        first = self.step == 1 and seconds * self.num_steps > 5
        if self._bar is None and (first or time.time() - self._shown > 30):
            left = seconds * (self.num_steps - self.step)
            left = f"{left / 60:.0f} min" if left > 99 else f"{left:.0f} s"
            print(f"step {self.step}/{self.num_steps} | {seconds:.2g} s a step | about {left} left",
                  flush=True)
            self._shown = time.time()

    @contextlib.contextmanager
    def postponing(self):
        """Keep an error of what only looks at the run, such as a judge, until the step is saved."""
        try:
            yield
        except UserError as error:
            self._failure = error

    def check_finite(self, model, batch, **values):
        """End the run, before a weight is touched, where a loss or a gradient is no number.

        The message names the first tensor that went bad; the batch is kept as bad_batch.pt, and
        the last checkpoint stays. Under float16 a gradient may be infinite: its step is skipped and
        the loss scale lowered, until that helps no more.
        """
        if self.scaler.is_enabled() and self.scaler.get_scale() > 2.0**-10:
            values.pop("grad_norm", None)
        if not any(not_finite(value) for value in values.values()):
            return
        with self.autocast():
            bad = name_the_bad(model, batch, values)
        write_atomically(self.folder / "bad_batch.pt", lambda part: save_tensors(batch, part))
        raise UserError(f"step {self.step}: {bad} became NaN or infinite, so the run ends; the "
                        f"batch is kept in {self.folder / 'bad_batch.pt'}, and the last checkpoint "
                        "is as it was. Lower --lr, or use --dtype float32")

    def log(self, num_tokens, **metrics):
        """Print a line and append its numbers to metrics.jsonl; num_tokens: since the last one."""
        row = {k: v.item() if isinstance(v, torch.Tensor) else float(v) for k, v in metrics.items()}
        if self.scaler.is_enabled():  # float16: a step whose gradient overflowed was skipped
            row = {k: v for k, v in row.items() if not (k.endswith("grad_norm") and not_finite(v))}
        for name, value in row.items():
            if not_finite(value):
                raise UserError(f"step {self.step}: {name} is {value}, so the run ends; the last "
                                "checkpoint is as it was. Lower --lr, or use --dtype float32")
        rate = num_tokens / max(1e-9, time.time() - self._clock)
        self._clock = self._shown = time.time()
        shown = " | ".join(f"{k} {v:.3g}" if abs(v) < 0.1 or abs(v) >= 1000 else f"{k} {v:.3f}"
                           for k, v in row.items())
        self._print(f"step {self.step}/{self.num_steps} | {shown} | {rate / 1000:.1f}k tok/s")
        for name, value in row.items():
            if self._writer:
                self._writer.add_scalar(name, value, self.step)
        row = {"step": self.step, **row, "tok_per_s": rate}
        self.history.append(row)
        self._append("metrics.jsonl", json.dumps(row) + "\n")

    def show(self, text):
        """Print a sample and append it to samples.txt."""
        self._print(text)
        self._append("samples.txt", f"step {self.step}\n{text}\n\n")

    def _print(self, text):
        tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def _append(self, name, text):
        with writing(self.folder / name), open(self.folder / name, "ab") as file:
            file.write(text.encode("utf-8"))

    def save_due(self):
        """Whether a checkpoint is to be written now: every save_every steps, after the last one,
        and where the run is about to be left."""
        leaving = bool(self._failure or signals.received)
        return leaving or due(self.step, self.cfg.save_every, self.num_steps)

    def save(self, model, done=None, **parts):
        """Write ckpt.pt after `step` finished steps; `model` is what the next stage loads.

        done: whether the run is finished with it; by default, whether this was the last step.
        """
        for name, weight in model.state_dict().items():
            if not_finite(weight):
                raise UserError(f"step {self.step}: the weights {name} became NaN or infinite, so "
                                "the run ends and the last checkpoint stays as it was. Lower --lr")
        self.done = self.step == self.num_steps if done is None else done
        logs = [self.folder / name for name in LOGS if (self.folder / name).exists()]
        for path in logs:  # never behind the checkpoint, even if the power fails
            flush(path)
        save_checkpoint(self.folder, {
            "step": self.step, "num_steps": self.num_steps, "done": self.done,
            "config": dataclasses.asdict(self.cfg), "inputs": self.inputs,
            "kind": "gpt" if isinstance(model, GPT) else "scalar",
            "model_config": dataclasses.asdict(model.cfg), "tokenizer": self.tokenizer.to_dict(),
            "generator": self.generator.get_state(), "random_states": random_states(self.device),
            "scaler": self.scaler.state_dict(), "model": model.state_dict(),
            "sizes": {path.name: path.stat().st_size for path in logs},
            **{name: part.state_dict() for name, part in parts.items()}})
        self._saved = self.step
        if self.done and importlib.util.find_spec("safetensors"):
            save_safetensors(model, self.folder / "model.safetensors")


def save_safetensors(model, path):
    """The weights once more, in the form that other programs read; shared tensors once."""
    from safetensors.torch import save_model

    write_atomically(path, lambda part: save_model(model, str(part)))


def open_tensorboard(folder):
    """A writer of TensorBoard's event files into folder/tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(folder / "tensorboard")


def start_run(cfg, needs, reads=()):
    """Check everything that can be checked before any work; `Run.restore` opens the folder.

    cfg: a script's Config, with out, resume, overwrite, seed, device and dtype among its fields.
    needs: {option: stage}, the options of cfg that name run folders of earlier stages, e.g.
    {"init": "sft"}; their checkpoints are read here. reads: the options that name files. Raises
    UserError with the command that makes a missing one, and where the folder already holds a run,
    or files that no run wrote.
    """
    out = Path(cfg.out)
    check_folder(cfg, out, needs)
    needed = {}
    for name, stage in needs.items():
        kind = "scalar" if stage == "rm" else "gpt"
        needed[name] = load_checkpoint(getattr(cfg, name), stage, kind)
        if not needed[name].get("done", True):
            raise UserError(f"--{name} {getattr(cfg, name)}: that run stands at step "
                            f"{needed[name]['step']} of {needed[name]['num_steps']}; finish it "
                            "with --resume")
    set_threads(cfg.threads)
    inputs = hash_inputs(cfg, needed, reads)
    if cfg.resume:
        ckpt, _ = newest_whole(out)
        if ckpt is not None:
            check_same_run(cfg, ckpt, inputs, out)
    run = Run(cfg, out, needed, inputs)
    torch.manual_seed(cfg.seed)
    return run
