"""Use a model: complete a prompt, chat in the terminal, or write K samples per prompt to a file.

    python sample.py --prompt "What does a cow say?"
    python sample.py --chat
    python sample.py --prompts data/toy/prompts.jsonl --num_samples 4 --save out/samples.jsonl
    python sample.py --prompt "What does a cow say?" --ledger out/look    (every token's log-prob)

The file of samples is what annotators, best-of-K selection and evaluation read: each row of the
prompts file with "samples": [{"text", "ended"}, ...] added.
"""

import sys
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from minirlhf.batches import encode_prompts, pad_right, response_mask
from minirlhf.generate import filter_logits, sample_prompts
from minirlhf.masked import entropy, token_logprobs
from minirlhf.plumbing.commands import check_amount, check_file, has_keys
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import check_writable, write_jsonl
from minirlhf.plumbing.formats import checked_text, read_prompts, spread_meta
from minirlhf.plumbing.checkpoints import load_model
from minirlhf.plumbing.devices import autocast, pick_device, pick_dtype, set_threads
from minirlhf.plumbing.signals import Stopped
from minirlhf.look.ledger import Ledger


@dataclass
class Config:
    model: str = "out/sft"  # run folder of the model
    prompt: str = ""  # one user message to answer
    system: str = ""  # a standing instruction before it
    chat: bool = False  # hold a conversation in the terminal
    prompts: str = ""  # a file of prompts to answer
    save: str = ""  # where to write the samples of --prompts
    ledger: str = ""  # folder for a ledger of the first 64 samples
    plain: bool = False  # treat the prompt as plain text to go on with (for a base model)
    num_samples: int = 1  # samples for each prompt; above 0
    max_new_tokens: int = 48  # longest response in tokens; above 0
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # sample among the k likeliest tokens (0: all)
    top_p: float = 1.0  # sample within the likeliest tokens of this mass (1: all); above 0, up to 1
    batch_size: int = 256  # sequences per batch; above 0
    limit: int = 0  # answer only the first so many prompts (0: all)
    seed: int = 0  # of the sampling
    device: str = ""  # cuda or cpu (default: cuda where there is one)
    dtype: str = "auto"  # auto | float32 | bfloat16, of the matrix products
    threads: int = 1  # CPU threads


def respond(model, prompts, cfg, generator, stop_ids, num_samples=1, results=None):
    """sample_prompts with the options of the command line."""
    with autocast(generator.device, pick_dtype(cfg.dtype, generator.device)):
        return sample_prompts(model, prompts, stop_ids, cfg.max_new_tokens, cfg.temperature,
                              generator, num_samples, cfg.batch_size, cfg.top_k, cfg.top_p, results)


@torch.no_grad()
def tensors_of(model, prompts, results, cfg):
    """For the ledger: log-prob and entropy (nats) of each sampled token of the first samples.

    Of the distribution that they were sampled from: at that temperature, of the k likeliest tokens,
    in that precision. Greedy answers have none: shown is the model's own at temperature 1.
    """
    pairs = [(prompt, ids) for prompt, samples in zip(prompts, results) for ids, _ in samples][:64]
    device = model.trunk.wte.weight.device
    tokens, lengths = pad_right([prompt + ids for prompt, ids in pairs], device)  # (B, T), (B,)
    prompt_lens = torch.tensor([len(prompt) for prompt, _ in pairs], device=device)  # (B,)
    mask = response_mask(prompt_lens, lengths, tokens.shape[1])  # (B, T-1)
    with autocast(device, pick_dtype(cfg.dtype, device)):
        logits = model(tokens)[:, :-1]  # (B, T-1, V)
    logits = logits.float()
    if cfg.temperature > 0:
        logits = logits / cfg.temperature
        kept = filter_logits(logits.flatten(0, 1), cfg.top_k, cfg.top_p).view_as(logits)
        # A sampled token was kept; rounding must not put it outside here. Nor is there a finite
        # entropy of -inf, so that the others get a logit whose probability is 0.
        own = tokens[:, 1:, None]  # (B, T-1, 1)
        logits = kept.clamp(min=-1e9).scatter(2, own, logits.gather(2, own))
    logprobs = token_logprobs(logits, tokens[:, 1:])  # (B, T-1)
    zero = torch.zeros_like(logprobs)
    return {"tokens": tokens, "lengths": lengths, "response_mask": mask,
            "logprobs": torch.where(mask, logprobs, zero),
            "entropy": torch.where(mask, entropy(logits), zero)}


def chat(model, tokenizer, cfg, generator):
    """Read user turns until an empty line; the oldest turns leave a context that is full.

    A turn that can't be answered, because it is too long or no text, is said so and left out.
    """
    room = model.cfg.block_size - cfg.max_new_tokens
    if room < 1:
        raise UserError(f"--max_new_tokens {cfg.max_new_tokens} leaves no room for a conversation "
                        f"in a context of {model.cfg.block_size}; give fewer")
    if sys.stdin is None:
        raise UserError("--chat reads what you type; there is no standard input")
    start, turns = system_message(cfg), []
    print("An empty line ends the conversation.")
    while True:
        try:
            text = input("you: ").strip()
            if not text:
                return
            asked = [*turns, {"role": "user", "content": checked_text(text, "your message")}]
            while len(asked) > 1 and len(tokenizer.encode_prompt(start + asked)) > room:
                asked = asked[2:]
            (prompt,) = encode_prompts(tokenizer, [{"messages": start + asked}],
                                       model.cfg.block_size, "this conversation")
            ids, _ = respond(model, [prompt], cfg, generator, [tokenizer.end_id])[0][0]
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except (UserError, UnicodeDecodeError) as error:
            print(f"not answered: {error}")
            continue
        answer = tokenizer.decode_response(ids)
        print(f"assistant: {answer}")
        turns = [*asked, {"role": "assistant", "content": answer}]


def system_message(cfg):
    """The list that a conversation starts with: the system message, or nothing."""
    if not cfg.system:
        return []
    return [{"role": "system", "content": checked_text(cfg.system, "--system")}]


def check_options(cfg):
    """Refuse options that don't go together, and outputs that can't be written, before any work."""
    if [bool(cfg.prompt), cfg.chat, bool(cfg.prompts)].count(True) != 1:
        raise UserError("give one of --prompt TEXT, --chat, and --prompts FILE --save FILE")
    if bool(cfg.prompts) != bool(cfg.save):
        raise UserError("--prompts FILE and --save FILE go together")
    if cfg.plain and not cfg.prompt:
        raise UserError("--plain goes with --prompt TEXT; a file and a chat hold messages")
    if cfg.system and (cfg.plain or cfg.prompts):
        raise UserError("--system goes with --prompt TEXT and --chat; a plain text has no system "
                        "message, and a file's prompts bring their own")
    if cfg.ledger and (cfg.plain or cfg.chat):
        raise UserError("--ledger goes with --prompt TEXT and --prompts FILE")
    if cfg.limit and not cfg.prompts or cfg.chat and cfg.num_samples > 1:
        raise UserError("--limit goes with --prompts FILE, --num_samples with all but --chat")
    if 0 < cfg.temperature < 1e-3:  # the logits over it would overflow
        raise UserError(f"--temperature {cfg.temperature}: expected 0 (greedy), or from 0.001")
    if cfg.prompt:
        checked_text(cfg.prompt, "--prompt")
    if cfg.save:
        check_file("--save", cfg.save, has_keys("samples"), (".jsonl", ".jsonl.gz"))
        if Path(cfg.save).resolve() == Path(cfg.prompts).resolve():
            raise UserError(f"--save {cfg.save} is also --prompts; give another name")
    if cfg.ledger:
        check_writable(Path(cfg.ledger) / "ledger")
        if (Path(cfg.ledger) / "config.json").exists():
            raise UserError(f"--ledger {cfg.ledger} holds a run, with a ledger of its own; give "
                            "another folder")


def main(cfg):
    check_options(cfg)
    set_threads(cfg.threads)
    rows = read_prompts(cfg.prompts)[: cfg.limit or None] if cfg.prompts else [
        {"messages": [*system_message(cfg), {"role": "user", "content": cfg.prompt}]}]
    check_amount(len(rows), cfg.num_samples, cfg.batch_size)
    device = pick_device(cfg.device)
    model, tokenizer = load_model(cfg.model, device=device)
    generator = torch.Generator(device).manual_seed(cfg.seed)

    if cfg.chat:
        return chat(model, tokenizer, cfg, generator)
    if cfg.plain:
        ids = tokenizer.encode(cfg.prompt)
        for response, _ in respond(model, [ids], cfg, generator, [tokenizer.end_id],
                                   cfg.num_samples)[0]:
            print(cfg.prompt + tokenizer.decode(response) + "\n")
        return
    prompts = encode_prompts(tokenizer, rows, model.cfg.block_size, cfg.prompts or "--prompt")
    results, stopped = [], None
    try:
        respond(model, prompts, cfg, generator, [tokenizer.end_id], cfg.num_samples, results)
    except KeyboardInterrupt as stop:
        stopped = stop
    done = [(row, samples) for row, samples in zip(rows, results)
            if len(samples) == cfg.num_samples]
    for row, samples in done:
        row["samples"] = [{"text": tokenizer.decode_response(ids), "ended": ended}
                          for ids, ended in samples]
    if cfg.prompt:
        print("\n".join(sample["text"] for row, _ in done for sample in row["samples"]))
    elif done:
        write_jsonl(cfg.save, [spread_meta(row) for row, _ in done])
        ended = [ended for _, samples in done for _, ended in samples]
        print(f"{cfg.save}: {len(ended):,} samples of {len(done):,} prompts, "
              f"{100 * sum(ended) / len(ended):.1f}% ended")
    if stopped:
        raise Stopped(getattr(stopped, "number", signal.SIGINT),
                      f"stopped: {len(done):,} of {len(rows):,} prompts were answered")
    if cfg.ledger:
        ledger = Ledger(cfg.ledger, tokenizer, every=1)
        ledger.record(1, lambda: tensors_of(model, prompts, results, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
