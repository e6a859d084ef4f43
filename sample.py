"""Use a model: complete a prompt, chat in the terminal, or write K samples per prompt to a file.

    python sample.py --prompt "What does a cow say?"
    python sample.py --chat
    python sample.py --prompts data/toy/prompts.jsonl --num_samples 4 --save out/samples.jsonl
    python sample.py --prompt "What does a cow say?" --ledger out/look    (every token's log-prob)

The file of samples is what annotators, best-of-K selection and evaluation read: each row of the
prompts file with "samples": [{"text", "ended"}, ...] added.
"""

from dataclasses import dataclass

import torch

from minirlhf.batches import encode_prompts, pad_right, response_mask
from minirlhf.generate import sample_prompts
from minirlhf.masked import entropy, token_logprobs
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import write_jsonl
from minirlhf.plumbing.formats import read_prompts, spread_meta
from minirlhf.plumbing.checkpoints import load_model
from minirlhf.plumbing.devices import autocast, pick_device, pick_dtype
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


def respond(model, prompts, cfg, generator, stop_ids, num_samples=1):
    """sample_prompts with the options of the command line."""
    with autocast(generator.device, pick_dtype(cfg.dtype, generator.device)):
        return sample_prompts(model, prompts, stop_ids, cfg.max_new_tokens, cfg.temperature,
                              generator, num_samples, cfg.batch_size, cfg.top_k, cfg.top_p)


@torch.no_grad()
def tensors_of(model, prompts, results, cfg):
    """For the ledger: log-prob and entropy (nats) of each sampled token of the first samples."""
    pairs = [(prompt, ids) for prompt, samples in zip(prompts, results) for ids, _ in samples][:64]
    device = model.trunk.wte.weight.device
    tokens, lengths = pad_right([prompt + ids for prompt, ids in pairs], device)  # (B, T), (B,)
    prompt_lens = torch.tensor([len(prompt) for prompt, _ in pairs], device=device)  # (B,)
    mask = response_mask(prompt_lens, lengths, tokens.shape[1])  # (B, T-1)
    # Greedy answers have no distribution of their own: shown is the model's at temperature 1.
    logits = model(tokens)[:, :-1].float() / (cfg.temperature or 1.0)  # (B, T-1, V)
    logprobs = token_logprobs(logits, tokens[:, 1:])  # (B, T-1)
    zero = torch.zeros_like(logprobs)
    return {"tokens": tokens, "lengths": lengths, "response_mask": mask,
            "logprobs": torch.where(mask, logprobs, zero),
            "entropy": torch.where(mask, entropy(logits), zero)}


def chat(model, tokenizer, cfg, generator):
    """Read user turns until an empty line; the oldest turns leave a context that is full."""
    start = [{"role": "system", "content": cfg.system}] if cfg.system else []
    turns = []
    print("An empty line ends the conversation.")
    while True:
        try:
            text = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            return
        turns.append({"role": "user", "content": text})
        room = model.cfg.block_size - cfg.max_new_tokens
        while len(turns) > 1 and len(tokenizer.encode_prompt(start + turns)) > room:
            turns = turns[2:]
        (prompt,) = encode_prompts(tokenizer, [{"messages": start + turns}], model.cfg.block_size,
                                   "this conversation")
        ids, _ = respond(model, [prompt], cfg, generator, [tokenizer.end_id])[0][0]
        answer = tokenizer.decode_response(ids)
        print(f"assistant: {answer}")
        turns.append({"role": "assistant", "content": answer})


def main(cfg):
    if [bool(cfg.prompt), cfg.chat, bool(cfg.prompts)].count(True) != 1:
        raise UserError("give one of --prompt TEXT, --chat, and --prompts FILE --save FILE")
    if bool(cfg.prompts) != bool(cfg.save):
        raise UserError("--prompts FILE and --save FILE go together")
    if cfg.plain and not cfg.prompt:
        raise UserError("--plain goes with --prompt TEXT; a file and a chat hold messages")
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)
    rows = read_prompts(cfg.prompts) if cfg.prompts else []
    rows = rows[: cfg.limit or None]
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
    if cfg.prompt:
        start = [{"role": "system", "content": cfg.system}] if cfg.system else []
        rows = [{"messages": start + [{"role": "user", "content": cfg.prompt}]}]
    prompts = encode_prompts(tokenizer, rows, model.cfg.block_size, cfg.prompts or "--prompt")
    results = respond(model, prompts, cfg, generator, [tokenizer.end_id], cfg.num_samples)
    if cfg.ledger:
        ledger = Ledger(cfg.ledger, tokenizer, every=1)
        ledger.record(1, lambda: tensors_of(model, prompts, results, cfg))
    for row, samples in zip(rows, results):
        row["samples"] = [{"text": tokenizer.decode_response(ids), "ended": ended}
                          for ids, ended in samples]
    if cfg.prompt:
        print("\n".join(sample["text"] for sample in rows[0]["samples"]))
        return
    write_jsonl(cfg.save, [spread_meta(row) for row in rows])
    ended = [sample["ended"] for row in rows for sample in row["samples"]]
    print(f"{cfg.save}: {len(ended):,} samples of {len(rows):,} prompts, "
          f"{100 * sum(ended) / len(ended):.1f}% ended")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
