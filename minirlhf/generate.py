"""Batched sampling with the KV cache, for prompts of different lengths."""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minirlhf.batches import pad_right
from minirlhf.plumbing.errors import UserError


@dataclass
class Rollout:
    """Sampled sequences on the grid (B, T): prompt, then response, then filler."""

    tokens: torch.Tensor  # (B, T) int64
    prompt_lens: torch.Tensor  # (B,) where the response starts
    lengths: torch.Tensor  # (B,) where filler starts
    ended: torch.Tensor  # (B,) bool: the response closed with a stop token

    def responses(self):
        """The response ids of each row, the end token included, as lists."""
        return [row[p:n].tolist() for row, p, n in
                zip(self.tokens, self.prompt_lens.tolist(), self.lengths.tolist())]


def filter_logits(logits, top_k=0, top_p=1.0):
    """Set the logits outside the top k, or outside the nucleus of mass p, to -inf.

    logits: (B, V). top_k 0 and top_p 1 keep everything. The most likely token always stays.
    Nucleus: arXiv 1904.09751. Not for training rollouts: the distribution that is sampled has to
    be the one that is scored.
    """
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)  # (B, V)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # (B, V): the mass before it already reaches p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    return logits


def pick(logits, temperature, top_k, top_p, generator):
    """One token per row from (B, V) logits; temperature 0 is greedy. Returns (B,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = filter_logits(logits.float() / temperature, top_k, top_p)
    if bool(logits.isnan().any()):
        raise UserError("the model's logits are NaN, there is nothing to sample from; it was "
                        "trained with too high an --lr, or float16 is too narrow for it")
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, stop_ids, temperature=1.0, top_k=0, top_p=1.0,
             generator=None):
    """Sample one response for each prompt.

    model: a GPT; prompts: list of B non-empty lists of token ids; max_new_tokens: the most tokens
    of a response, fewer where the context (block_size) is full; stop_ids: ids that close a
    response (they belong to it). Returns a Rollout. A row that stops leaves the batch, so the work
    shrinks as responses end. The ids are the sampled ones: nothing is decoded and encoded again.
    Raises ValueError where a prompt leaves no room for even one token.
    """
    block_size, device = model.cfg.block_size, model.trunk.wte.weight.device
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < block_size:
            raise UserError(f"prompt {i} has {len(prompt)} tokens; it must have at least 1 and "
                            f"leave room for a response within block_size {block_size}")
    was_training = model.training
    model.eval()  # dropout would sample from another distribution than the one that is scored
    tokens, prompt_lens = pad_right(prompts, device)  # (B, P), (B,)
    B, P = tokens.shape
    T = min(P + max_new_tokens, block_size)
    tokens = torch.cat([tokens, tokens.new_zeros(B, T - P)], dim=1)  # (B, T)
    limits = (prompt_lens + max_new_tokens).clamp(max=T)  # (B,) where each row runs out of room
    stop = torch.tensor(sorted(stop_ids), device=device)
    lengths, ended = prompt_lens.clone(), torch.zeros(B, dtype=torch.bool, device=device)

    cache = model.make_cache(B, T)
    h = model.trunk(tokens[:, :P], cache)  # (B, P, C)
    # Right-padded: a row's next token follows its own last prompt token, not column P - 1. Logits
    # of the other positions are not needed, and (B, P, V) may be more than memory holds.
    logits = model.lm_head(h[torch.arange(B, device=device), prompt_lens - 1])  # (B, V)
    rows = torch.arange(B, device=device)  # the rows still at work, as indices into the batch
    while True:
        chosen = pick(logits, temperature, top_k, top_p, generator)  # (rows,)
        tokens[rows, lengths[rows]] = chosen
        lengths[rows] += 1
        ended[rows] = torch.isin(chosen, stop)
        alive = ~ended[rows] & (lengths[rows] < limits[rows])  # (rows,)
        if not alive.all():
            rows, chosen = rows[alive], chosen[alive]
            if len(rows) == 0:
                break
            cache.keep_rows(alive)
        # The token just written stands at lengths - 1: its query sees keys up to there.
        logits = model(chosen[:, None], cache, positions=lengths[rows] - 1)[:, 0]  # (rows, V)
    model.train(was_training)
    T = int(lengths.max())
    return Rollout(tokens[:, :T], prompt_lens, lengths, ended)


def join(rollouts):
    """Several rollouts as one, filled up to the longest on the right."""
    T = max(rollout.tokens.shape[1] for rollout in rollouts)
    padded = [F.pad(rollout.tokens, (0, T - rollout.tokens.shape[1])) for rollout in rollouts]
    return Rollout(torch.cat(padded), *(torch.cat([getattr(rollout, name) for rollout in rollouts])
                                        for name in ("prompt_lens", "lengths", "ended")))


def sample_prompts(model, prompts, stop_ids, max_new_tokens, temperature=1.0, generator=None,
                   num_samples=1, batch_size=256, top_k=0, top_p=1.0, results=None):
    """num_samples responses for each prompt (lists of ids): per prompt a list of (ids, ended).

    Prompts are batched by length, longest first: a batch has little filler, and a lack of memory
    shows at once. results: a list that is filled while the work goes on and is returned; whoever is
    interrupted still has in it what was done.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    work = [i for i in order for _ in range(num_samples)]
    results = [] if results is None else results
    results[:] = [[] for _ in prompts]
    # More than the context can hold is never sampled, and a number near 2^63 would overflow.
    max_new_tokens = min(max_new_tokens, model.cfg.block_size)
    starts = range(0, len(work), batch_size)
    for start in tqdm(starts, desc="sampling", disable=not sys.stderr.isatty()):
        batch = work[start : start + batch_size]
        rollout = generate(model, [prompts[i] for i in batch], max_new_tokens, stop_ids,
                           temperature, top_k, top_p, generator)
        for i, ids, ended in zip(batch, rollout.responses(), rollout.ended.tolist()):
            results[i].append((ids, ended))
    return results
