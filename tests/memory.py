"""Peak memory of PPO with GPT-2's vocabulary: of preflight, and of the iterations after it.

    python tests/memory.py              (this tree)
    python tests/memory.py OTHER        (another checkout of the project, to compare)

Linux only: the kernel's own high-water mark of this process, reset between the two. The models are
small and untrained, so nearly all of it are logits. Their vocabulary is made of pairs of bytes.
"""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

# Memory that is freed goes back to the system at once, so that the mark means what is in use.
if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.execv(sys.executable, [sys.executable, *sys.argv])
ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train_ppo  # noqa: E402
from minirlhf.model import GPT, ModelConfig, ScalarModel  # noqa: E402
from minirlhf.plumbing.runs import Run  # noqa: E402
from minirlhf.tokenizer import Tokenizer  # noqa: E402


def high_water_mark(reset=False):
    """GB that this process has used at most since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e6


def checkpoints(folder):
    """An untrained policy and a reward model with a vocabulary of 50,257."""
    ranks = [bytes([a]) for a in range(256)]
    ranks += [bytes([a, b]) for a in range(256) for b in range(256)][: 50_257 - 5 - 256]
    tokenizer = Tokenizer(ranks)
    cfg = ModelConfig(vocab_size=tokenizer.n_vocab, block_size=160, n_embd=64, n_hidden=128)
    for name, model in (("sft", GPT(cfg)), ("rm", ScalarModel(cfg))):
        (folder / name).mkdir()
        torch.save({"kind": "gpt" if name == "sft" else "scalar", "model": model.state_dict(),
                    "model_config": dataclasses.asdict(cfg), "tokenizer": tokenizer.to_dict()},
                   folder / name / "ckpt.pt")


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    marks = {}
    restore = Run.restore

    def mark(self, *args, **parts):
        marks["preflight"] = high_water_mark()
        high_water_mark(reset=True)
        return restore(self, *args, **parts)

    Run.restore = mark
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints(folder)
        rows = [{"prompt": f"How does a {animal} go, and why? " * 2} for animal in range(100)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows),
                                              encoding="utf-8")
        start = high_water_mark(reset=True)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        train_ppo.main(train_ppo.Config(
            init=str(folder / "sft"), reward_model=str(folder / "rm"), out=str(folder / "ppo"),
            prompts=str(folder / "prompts.jsonl"), num_steps=2, dtype="float32", ledger_every=1))
        sys.stdout = sys.__stdout__
    marks["iterations"] = high_water_mark()
    print(f"{ROOT.name}: before {start:.2f} GB, preflight {marks['preflight']:.3f} GB, two "
          f"iterations {marks['iterations']:.3f} GB")


if __name__ == "__main__":
    main()
