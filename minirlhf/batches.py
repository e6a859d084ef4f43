"""From lists of token ids to right-padded tensors, and the masks that lengths imply."""

import tempfile

import numpy as np
import torch

from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import writing

TEMPLATE = 4  # tokens around a lone question: begin, user, end, assistant
MOST_PLANNED = 10**8  # rows, of all epochs together, that a plan in memory may hold
CHUNK = 2**20  # characters of text that are in memory as tokens at one time


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


def token_streams(tokenizer, documents, share, generator):
    """Text -> two streams for pretraining, (N,) and (M,) int32: to train on, and held out.

    documents: an iterable of texts, best one that reads its files as it goes (`read_documents`);
    each is followed by a blank line. Tokens go to unnamed temporary files, of which the streams are
    views, so text and tokens need not fit into memory; the files go with the streams.
    share: of the tokens to hold out, in whole documents drawn by `generator` from the whole text:
    a text's last pages may be of another kind. Each document of a chunk, in random order, is held
    out if that brings their share of all tokens so far nearer to `share`.
    """
    files, counts = (tempfile.TemporaryFile(), tempfile.TemporaryFile()), [0, 0]
    separator = tokenizer.encode("\n\n")
    with writing(tempfile.gettempdir()):
        for chunk in chunks_of(documents):
            encoded = [np.array(ids + separator, dtype=np.int32)
                       for ids in tokenizer.encode_batch(chunk)]
            total, held_out = sum(counts) + sum(map(len, encoded)), set()
            for i in torch.randperm(len(encoded), generator=generator).tolist():
                if counts[1] + len(encoded[i]) / 2 <= share * total:
                    held_out.add(i)
                    counts[1] += len(encoded[i])
            counts[0] = total - counts[1]
            for i, ids in enumerate(encoded):
                files[i in held_out].write(ids.tobytes())
        for file in files:
            file.flush()
    return tuple(torch.from_numpy(np.memmap(file, dtype=np.int32, mode="r+")) if count
                 else torch.zeros(0, dtype=torch.int32) for file, count in zip(files, counts))


def chunks_of(documents):
    """Yield lists of documents that have CHUNK characters together, or a little more."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def random_blocks(stream, num_steps, batch_size, T, generator):
    """Where each step's blocks begin in a token stream: (num_steps, batch_size) int64.

    Drawn for the whole run at once, so that a resumed run sees the same text without any saved
    loader state. A step's blocks are `stream[starts[step][:, None] + torch.arange(T)]`, (B, T).
    """
    if num_steps * batch_size > MOST_PLANNED:
        raise UserError(f"--num_steps {num_steps} of --batch_size {batch_size}: "
                        f"{num_steps * batch_size:,} blocks are more than any run trains on")
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
    if num_epochs * len(lengths) > MOST_PLANNED:
        raise UserError(f"--num_epochs {num_epochs} of {len(lengths):,} examples are more than any "
                        "run trains on")
    return [batch for _ in range(num_epochs)
            for batch in epoch_batches(lengths, batch_size, generator)]


def micro_batches(examples, size):
    """A batch's parts of `size` examples, the last perhaps smaller: as much as memory holds."""
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def split_by_prompt(prompts, share, generator):
    """Indices of training rows and of held-out rows: (list, list).

    prompts: one text, or tuple of ids, per row; share: of the distinct prompts to hold out, at
    least one. All rows of a prompt stay on one side, else held-out pairs would ask about prompts
    already seen.
    """
    distinct = sorted(set(prompts))
    order = torch.randperm(len(distinct), generator=generator).tolist()
    kept_out = {distinct[i] for i in order[: max(1, int(share * len(distinct)))]}
    sides = [[], []]
    for i, prompt in enumerate(prompts):
        sides[prompt in kept_out].append(i)
    return sides[0], sides[1]


def fit(tokenizer, messages, answers, max_len, too_long, where):
    """Make a prompt and its answers fit the context -> (messages, answers, what the prompt lost).

    messages: a conversation up to the user's last turn. answers: texts, one of a dialogue, or K to
    be compared. too_long, where some have more than max_len tokens together with the prompt:
    "refuse" raises UserError naming `where`; "drop" leaves these answers out: None in their place;
    "cut" shortens the prompt as the longest answer needs it, for all of them alike, else each would
    answer another one. Answers are never cut: one that leaves a prompt no room is None here, too.
    What the prompt lost is "" (nothing) or one of the kinds that `shorten` names.
    """
    prompt_len = len(tokenizer.encode_prompt(messages))
    sizes = [len(tokenizer.encode(answer)) + 1 for answer in answers]  # + 1: the end token
    if prompt_len + max(sizes) <= max_len:
        return messages, answers, ""
    if too_long == "refuse":
        k = next(k for k, size in enumerate(sizes) if prompt_len + size > max_len)
        where += f", answer {k + 1}" if len(answers) > 1 else ""
        raise UserError(f"{where} has {prompt_len + sizes[k]} tokens, {max_len} fit; shorten it, "
                        "or give --too_long drop (leave such rows out) or --too_long cut (cut "
                        "prompts)")
    room = max_len - (TEMPLATE + 1 if too_long == "cut" else prompt_len)  # for an answer
    answers = [answer if size <= room else None for answer, size in zip(answers, sizes)]
    if too_long == "drop" or answers == [None] * len(answers):
        return messages, answers, ""
    longest = max(size for size in sizes if size <= room)
    shorter, lost = shorten(tokenizer, messages, max_len - longest)
    return (shorter, answers, lost) if shorter else (messages, [None] * len(answers), "")


def shorten(tokenizer, messages, room):
    """A prompt cut down to `room` tokens, and what it lost: "", "turns", "the system turn" or "the
    beginning of the last question".

    Whole turns go first, the oldest first, each question with its answer, so that roles still take
    turns; then the system message; and only where the last question alone is too long, its
    beginning. None instead of messages where not a character of it would be left.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system):]
    for start in range(0, len(turns), 2):
        if len(tokenizer.encode_prompt(system + turns[start:])) <= room:
            return system + turns[start:], "turns" if start else ""
    if system and len(tokenizer.encode_prompt(turns[-1:])) <= room:
        return turns[-1:], "the system turn"
    ids = tokenizer.encode(turns[-1]["content"])
    for num_left in range(room - TEMPLATE, 0, -1):
        # The cut may fall within a character's bytes; and another beginning may split otherwise.
        text = tokenizer.decode(ids[-num_left:]).lstrip("\ufffd").strip()
        if text and len(tokenizer.encode(text)) <= room - TEMPLATE:
            return [{"role": "user", "content": text}], "the beginning of the last question"
    return None, ""


def what_was_cut(cuts):
    """The end of a script's line about its data: a Counter of what rows lost, kind by kind."""
    lost = [f"{count:,} lost {kind}" for kind, count in sorted(cuts.items()) if kind]
    return f"; cut to fit: {', '.join(lost)}" if lost else ""


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
