"""Padding, masks from lengths, batches, and how examples are made to fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minirlhf import batches
from minirlhf.batches import (encode_answer, encode_prompts, epoch_batches, fit, pad_right,
                              random_blocks, response_mask, shifted_mask, split_by_prompt,
                              token_streams)
from minirlhf.tokenizer import Tokenizer
from minirlhf.plumbing.errors import UserError


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train("the cow says moo and the cat says meow", 270)


# ---------------------------------------------------------------- the grid

def test_pad_right_by_hand():
    tokens, lengths = pad_right([[5, 6, 7], [8], [0, 0]])
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]] and tokens.dtype == torch.int64
    assert lengths.tolist() == [3, 1, 2]


def test_check_07_response_mask_equals_a_loop_and_has_the_end_token():
    """The bug: a mask from token ids, or one column off: the end token then gets no loss."""
    prompt_lens, lengths, T = torch.tensor([1, 3, 4]), torch.tensor([6, 4, 8]), 8
    mask = response_mask(prompt_lens, lengths, T)
    assert mask.shape == (3, 7) and mask.dtype == torch.bool
    for b in range(3):
        for column in range(7):  # column t speaks of emitting token t + 1
            assert mask[b, column] == (prompt_lens[b] <= column + 1 < lengths[b])
        assert mask[b, lengths[b] - 2] and mask[b].sum() == lengths[b] - prompt_lens[b]


def test_check_06_shifted_mask_lines_up_with_the_token_that_is_predicted():
    """The bug: a loss mask that is not shifted with its targets."""
    masks = [[False, False, True, True], [False, True]]
    assert shifted_mask(masks, 4).tolist() == [[False, True, True], [True, False, False]]


# ---------------------------------------------------------------- pretraining text



def test_check_32_random_blocks_reach_every_start_and_never_run_over_the_end(generator):
    stream = torch.arange(10)
    starts = random_blocks(stream, 50, 8, 6, generator)
    assert starts.shape == (50, 8) and set(starts.flatten().tolist()) == {0, 1, 2, 3, 4}
    blocks = stream[starts[7][:, None] + torch.arange(6)]  # (8, 6)
    assert (blocks[:, 1:] == blocks[:, :-1] + 1).all()
    assert (random_blocks(stream, 3, 2, 10, generator) == 0).all()  # exactly one block of text
    with pytest.raises(UserError, match="10 tokens.*block of 11.*block_size"):
        random_blocks(stream, 1, 1, 11, generator)


# ---------------------------------------------------------------- epochs

@pytest.mark.parametrize("count, batch_size", [(1, 4), (8, 4), (203, 4), (203, 1), (50, 64)])
def test_check_32_an_epoch_uses_every_index_exactly_once(count, batch_size, generator):
    """The bug: minibatches drawn with replacement, or a last smaller batch that is lost."""
    lengths = [i * 7 % 31 for i in range(count)]
    batches = epoch_batches(lengths, batch_size, generator)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert len(batches) == -(-count // batch_size) and max(map(len, batches)) <= batch_size


def test_epochs_differ_by_generator_state_and_repeat_by_seed(generator):
    lengths = list(range(100))
    first, second = (epoch_batches(lengths, 8, generator) for _ in range(2))
    assert first != second
    assert first == epoch_batches(lengths, 8, torch.Generator().manual_seed(0))


def test_rows_of_like_length_come_together(generator):
    lengths = [i * 7 % 101 for i in range(512)]
    filler = lambda batches: sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b)
                                 for b in batches)
    unsorted = [list(range(i, i + 8)) for i in range(0, 512, 8)]
    assert filler(epoch_batches(lengths, 8, generator)) < 0.2 * filler(unsorted)


# ---------------------------------------------------------------- fitting the context

LONG = "what does the big old cow say and why?"
DIALOGUE = [{"role": role, "content": text} for role, text in (
    ("system", "be brief"), ("user", "cow?"), ("assistant", "moo"), ("user", "cat?"),
    ("assistant", "meow"), ("user", LONG))]


class Text(str):
    """Text with another hash, as every string has in the next Python process."""
    def __hash__(self):
        return hash(self[::-1] + "another process")


def test_a_split_holds_out_a_share_of_the_prompts_and_not_of_the_rows(generator):
    """Bugs: a share counted in rows; an order out of a set, so a resumed run splits anew."""
    prompts = [f"prompt {i % 20}" for i in range(100)]
    train, held_out = split_by_prompt(prompts, 0.15, generator.manual_seed(1))
    assert sorted(train + held_out) == list(range(100))
    assert len({prompts[i] for i in held_out}) == 3 and len(held_out) == 15
    assert not {prompts[i] for i in train} & {prompts[i] for i in held_out}
    again = split_by_prompt([Text(p) for p in prompts], 0.15, generator.manual_seed(1))
    assert again == (train, held_out)


def size(tok, messages, answer="moo"):
    return len(encode_answer(tok, messages, answer)[0])


def test_what_fits_is_left_alone(tok):
    for too_long in ("refuse", "drop", "cut"):
        assert fit(tok, DIALOGUE, ["moo"], size(tok, DIALOGUE), too_long, "row 1") == (
            DIALOGUE, ["moo"], "")


def test_check_33_a_cut_takes_the_oldest_turns_then_the_system_turn_then_the_last_questions_head(
        tok):
    """The bug: a cut by tokens, which beheads the standing instruction and leaves a rest of a turn
    without its role; or the answer's end is cut away, and with it the end token."""
    system, last = DIALOGUE[:1], DIALOGUE[5:]
    steps = [(DIALOGUE, ""), (system + DIALOGUE[3:], "turns"), (system + last, "turns"),
             (last, "the system turn")]
    sizes = [size(tok, messages) for messages, _ in steps]
    for max_len in range(sizes[-1], sizes[0] + 1):
        expected = next(step for step, length in zip(steps, sizes) if length <= max_len)
        assert fit(tok, DIALOGUE, ["moo"], max_len, "cut", "row 1") == (
            expected[0], ["moo"], expected[1])
    before = LONG
    for max_len in range(sizes[-1] - 1, sizes[-1] - 12, -1):
        [question], answers, lost = fit(tok, DIALOGUE, ["moo"], max_len, "cut", "row 1")
        assert lost == "the beginning of the last question" and answers == ["moo"]
        assert question["role"] == "user" and before.endswith(question["content"])
        assert 0 <= max_len - size(tok, [question]) <= 2  # a space at the edge is left out, too
        before = question["content"]
    assert DIALOGUE[0]["content"] == "be brief"  # the argument is unchanged


def test_check_33_an_answer_that_does_not_fit_is_left_out_rather_than_silently_zeroed(tok):
    """The bug: a sample without any trained token left, which adds 0 to the loss and is counted."""
    question, answer = [{"role": "user", "content": "cow?"}], "the cow says moo"
    least = len(tok.encode(answer)) + 1 + 4  # with nothing of the question
    [cut], answers, _ = fit(tok, question, [answer], least + 1, "cut", "row 1")
    assert cut["content"] == "?" and answers == [answer]
    assert fit(tok, question, [answer], least, "cut", "row 1") == (question, [None], "")
    assert fit(tok, question, [answer], size(tok, question, answer) - 1, "drop", "row 1") == (
        question, [None], "")
    emoji = [{"role": "user", "content": "\N{GRINNING FACE}"}]  # of four tokens
    assert fit(tok, emoji, [answer], least + 3, "cut", "row 1")[1] == [None]


def test_too_long_an_example_is_refused_with_its_place_and_the_remedies(tok):
    length = size(tok, DIALOGUE, "the cat says meow")
    with pytest.raises(UserError, match=rf"row 8 has {length} tokens, {length - 1} fit.*"
                                        "--too_long drop.*cut"):
        fit(tok, DIALOGUE, ["the cat says meow"], length - 1, "refuse", "row 8")
    with pytest.raises(UserError, match=f"row 8, answer 2 has {length} tokens"):
        fit(tok, DIALOGUE, ["moo", "the cat says meow"], length - 1, "refuse", "row 8")


def test_check_13_the_prompt_is_masked_in_chosen_and_rejected_also_after_a_cut(tok):
    """The bug: the prompt counts in one of the two, or again after truncation."""
    texts = ["moo", "the cat says meow"]
    whole = size(tok, DIALOGUE, texts[1])
    for length in (whole, whole - 4, whole - 30):
        messages, answers, _ = fit(tok, DIALOGUE, texts, length, "cut", "row 1")
        for text, answer in zip(texts, answers):
            ids, mask = encode_answer(tok, messages, answer)
            assert answer == text and len(ids) <= length
            assert [i for i, m in zip(ids, mask) if m] == [*tok.encode(text), tok.end_id]
            assert mask == sorted(mask)  # False for the prompt, then True to the end


def test_check_14_earlier_assistant_turns_belong_to_a_preferences_prompt(tok):
    """The bug: in DPO and for rewards, the mask covers answers that were not chosen between."""
    messages = [{"role": "user", "content": "cow?"}, {"role": "assistant", "content": "moo"},
                {"role": "user", "content": "cat?"}]
    ids, mask = encode_answer(tok, messages, "meow")
    assert ids[: mask.index(True)] == tok.encode_prompt(messages)
    assert tok.decode([i for i, m in zip(ids, mask) if m][:-1]).strip() == "meow"


def test_a_prompt_that_fills_the_context_is_refused_with_its_number(tok):
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("moo", "cow " * 30)]
    length = len(tok.encode_prompt(rows[1]["messages"]))
    assert len(encode_prompts(tok, rows, length + 1, "prompts.jsonl")) == 2
    with pytest.raises(UserError, match=rf"prompts.jsonl: prompt 2 has {length} tokens"):
        encode_prompts(tok, rows, length, "prompts.jsonl")


def test_check_33_compared_answers_keep_the_same_prompt(tok):
    """Bug: each answer of a pair was cut by its own excess, so the two answered different prompts;
    or one giant answer took the prompt away from all."""
    last = DIALOGUE[5:]
    answers = ["moo", "the cat says meow and the cow says moo"]
    max_len = size(tok, last, answers[1])  # the short one would leave room for more
    assert size(tok, DIALOGUE[:1] + last, answers[0]) <= max_len
    assert fit(tok, DIALOGUE, answers, max_len, "cut", "row 1") == (
        last, answers, "the system turn")
    assert fit(tok, DIALOGUE, ["moo " * 99, "moo"], size(tok, DIALOGUE), "cut", "row 1") == (
        DIALOGUE, [None, "moo"], "")
    # Dropping goes by each answer's own length: the short one still fits.
    assert fit(tok, DIALOGUE, answers, size(tok, DIALOGUE), "drop", "row 1") == (
        DIALOGUE, ["moo", None], "")


# ---------------------------------------------------------------- streams

def documents(count):
    return [f"the cow number {i} says {'moo ' * (i % 7)}" for i in range(count)]


def test_check_32_streams_hold_every_document_once_in_the_texts_order(tok, generator, monkeypatch):
    """Bugs: a held-out share that is trained on, too; a chunk that is lost at the text's end."""
    monkeypatch.setattr(batches, "CHUNK", 300)  # a chunk has about a dozen of them
    texts = documents(500)
    streams = token_streams(tok, iter(texts), 0.1, generator)
    assert all(stream.dtype == torch.int32 for stream in streams)
    train, held_out = (tok.decode(stream).split("\n\n")[:-1] for stream in streams)
    assert sorted(train + held_out) == sorted(texts) and len(set(texts)) == 500
    for side in (train, held_out):
        assert side == sorted(side, key=texts.index)
    assert 0.09 < len(streams[1]) / sum(map(len, streams)) < 0.11
    again = token_streams(tok, iter(texts), 0.1, torch.Generator().manual_seed(0))
    assert all(map(torch.equal, streams, again))


def test_held_out_documents_come_from_the_whole_text_by_the_seed(tok, generator):
    """Bug: the text's last 2% were held out, whatever they are: only one kind of its documents."""
    texts = documents(2000)
    seen = [tok.decode(token_streams(tok, texts, 0.02, generator)[1]).split("\n\n")[:-1]
            for _ in range(2)]
    assert seen[0] != seen[1]
    for side in seen:
        places = sorted(map(texts.index, side))
        assert 30 <= len(places) <= 60 and places[0] < 200 and places[-1] > 1800
        assert sum(place < 1000 for place in places) > 8


def test_a_text_of_few_documents_holds_out_none_of_them(tok, generator):
    train, held_out = token_streams(tok, ["the cow says moo"] * 3, 0.02, generator)
    assert len(held_out) == 0 and len(train) == 3 * len(tok.encode("the cow says moo\n\n"))
    assert [len(side) for side in token_streams(tok, [], 0.02, generator)] == [0, 0]


def test_a_large_text_becomes_tokens_in_little_memory(tok, tmp_path):
    """Bug: 87 MB of text took 3.2 GB: the text, its documents and its ids, all at one time."""
    path, program = tmp_path / "text.txt", tmp_path / "measure.py"
    path.write_text(("the cow says moo and the cat says meow\n" * 20 + "\n") * 12_000, encoding="utf-8")  # 9.4 MB
    tok.save(tmp_path / "tokenizer.json")
    program.write_text(f"""
import resource, torch
from minirlhf.batches import token_streams
from minirlhf.plumbing.formats import read_documents
from minirlhf.tokenizer import Tokenizer
tok = Tokenizer.load({str(tmp_path / "tokenizer.json")!r})
tok.encode_batch(["moo"] * 9)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
token_streams(tok, read_documents({str(path)!r}), 0.02, torch.Generator())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
""", encoding="utf-8")
    done = subprocess.run([sys.executable, program], cwd=Path(__file__).parents[1], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": "."}, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 80, f"{done.stdout} MB for a text of 9.4 MB"
