"""From lists of token ids to right-padded tensors, and the masks that lengths imply."""

import torch

from minirlhf.plumbing.errors import UserError


def pad_right(rows, device="cpu"):
    """Lists of ids -> tokens (B, T) int64 and lengths (B,), filled up with 0 on the right.

    The filler 0 is an ordinary token: whoever needs to know where a row ends asks `lengths`.
    """
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)  # (B, T)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens.to(device), lengths.to(device)


def response_mask(prompt_lens, lengths, T):
    """(B, T-1) bool on the shifted grid: True where tokens[:, 1:] is a response token.

    prompt_lens, lengths: (B,). Column t speaks of tokens[:, t+1], so the first response token, at
    index prompt_lens, lies in column prompt_lens - 1, and the end token in column lengths - 2.
    """
    column = torch.arange(1, T, device=lengths.device)  # (T-1,) index of the token emitted
    return (column >= prompt_lens[:, None]) & (column < lengths[:, None])


def shifted_mask(masks, T, device="cpu"):
    """Per-token loss masks (lists of bool, aligned with the tokens) -> (B, T-1) bool.

    The first entry is dropped: nothing predicts token 0.
    """
    out = torch.zeros(len(masks), T, dtype=torch.bool)
    for i, row in enumerate(masks):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.bool)
    return out[:, 1:].to(device)


def pack(documents, separator):
    """Documents (lists of ids) -> one (N,) int64 stream for pretraining, `separator` ids between.

    Nothing is wasted on filler; a block may begin in the middle of a document.
    """
    stream = []
    for document in documents:
        stream.extend(document)
        stream.extend(separator)
    return torch.tensor(stream, dtype=torch.int64)


def random_blocks(stream, num_steps, batch_size, T, generator):
    """Where each step's blocks begin in a token stream: (num_steps, batch_size) int64.

    Drawn for the whole run at once, so that a resumed run sees the same text without any saved
    loader state. A step's blocks are `stream[starts[step][:, None] + torch.arange(T)]`, (B, T).
    """
    if len(stream) < T:
        raise UserError(f"the text has {len(stream)} tokens, fewer than one block of {T}; "
                        "give more text or a smaller block_size")
    return torch.randint(len(stream) - T + 1, (num_steps, batch_size), generator=generator)


def epoch_batches(lengths, batch_size, generator):
    """One epoch: lists of indices, every index exactly once, rows of like length together.

    lengths: sequence of N ints. The order is random, but each pool of 16 batches is sorted by
    length before it is cut, which leaves little filler; then the batches are shuffled. The last
    batch may be smaller.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches, pool = [], 16 * batch_size
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda i: lengths[i])
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def plan_batches(lengths, num_epochs, batch_size, generator):
    """`epoch_batches` of every epoch, one after the other: step k's batch is plan[k - 1].

    Drawn for the whole run at once, so that a resumed run needs no saved loader state.
    """
    return [batch for _ in range(num_epochs)
            for batch in epoch_batches(lengths, batch_size, generator)]


def micro_batches(examples, size):
    """A batch's parts of `size` examples, the last perhaps smaller: as much as memory holds."""
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def split_by_prompt(prompts, share, generator):
    """Indices of training rows and of held-out rows: (list, list).

    prompts: one text per row; share: of the distinct prompts to hold out, at least one. All rows of
    a prompt stay on one side, else held-out pairs would ask about prompts already seen.
    """
    distinct = sorted(set(prompts))
    order = torch.randperm(len(distinct), generator=generator).tolist()
    kept_out = {distinct[i] for i in order[: max(1, int(share * len(distinct)))]}
    sides = [[], []]
    for i, prompt in enumerate(prompts):
        sides[prompt in kept_out].append(i)
    return sides[0], sides[1]


def fit(ids, mask, max_len, too_long, where, over=None):
    """Make one encoded example fit the context.

    ids, mask: equally long lists; mask is True on the trained tokens, the last of which ends the
    row. too_long: "refuse" raises UserError naming `where`; "drop" returns None; "cut" keeps the
    *end*, where the last response is, and cuts `over` tokens after the first (the begin token), ids
    and mask alike. It returns None where that would cut into the last response or leave nothing of
    its prompt. over: how many tokens to cut, as many as needed if None; answers to be compared
    must all lose the same tokens of their prompt, else each would answer another one.
    """
    over = len(ids) - max_len if over is None else over
    if over <= 0 or (too_long != "cut" and len(ids) <= max_len):
        return ids, mask
    if too_long == "refuse":
        raise UserError(f"{where} has {len(ids)} tokens, {max_len} fit; shorten it, or give "
                        "--too_long drop (leave such rows out) or --too_long cut (cut prompts)")
    start = len(mask) - mask[::-1].index(False)  # of the last response
    if too_long == "drop" or start <= over + 1:
        return None
    kept = mask[1 + over :]
    if kept[0]:  # the cut goes through an earlier response: what is left of it is no answer
        beheaded = kept.index(False)
        kept = [False] * beheaded + kept[beheaded:]
    return ids[:1] + ids[1 + over :], mask[:1] + kept


def encode_answer(tokenizer, messages, answer):
    """A prompt and an answer -> (ids, mask), the mask True on the answer and its end token only."""
    ids, _ = tokenizer.encode_chat(messages + [{"role": "assistant", "content": answer}])
    prompt_len = len(tokenizer.encode_prompt(messages))
    return ids, [False] * prompt_len + [True] * (len(ids) - prompt_len)


def encode_prompts(tokenizer, rows, max_len, where):
    """Prompt rows -> lists of ids, each with at least one token of room left in max_len."""
    prompts = [tokenizer.encode_prompt(row["messages"]) for row in rows]
    for i, prompt in enumerate(prompts):
        if len(prompt) >= max_len:
            raise UserError(f"{where}: prompt {i + 1} has {len(prompt)} tokens and fills the whole "
                            f"context of {max_len}; shorten it, or train a model with a longer one")
    return prompts
