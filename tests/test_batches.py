"""Padding, masks from lengths, batches, and how examples are made to fit."""

import pytest
import torch

from minirlhf.batches import (encode_answer, encode_prompts, epoch_batches, fit, pack, pad_right,
                              random_blocks, response_mask, shifted_mask, split_by_prompt)
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

def test_pack_by_hand():
    assert pack([[1, 2], [3]], [9, 9]).tolist() == [1, 2, 9, 9, 3, 9, 9]


def test_random_blocks_reach_every_start_and_never_run_over_the_end(generator):
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

IDS = [100, 1, 2, 3, 4, 50, 51]  # a begin token, a prompt of four, an answer with its end token
MASK = [False] * 5 + [True, True]


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


def test_what_fits_is_left_alone():
    for too_long in ("refuse", "drop", "cut"):
        assert fit(IDS, MASK, 7, too_long, "row 1") == (IDS, MASK)


def test_check_33_cutting_takes_the_prompts_oldest_tokens_and_its_mask_alike():
    """The bug: ids are cut on one side and the mask on the other, so that prompt tokens get loss;
    or the answer's end is cut away, and with it the end token."""
    ids, mask = fit(IDS, MASK, 5, "cut", "row 1")
    assert ids == [100, 3, 4, 50, 51]  # the begin token stays
    assert mask == [False, False, False, True, True]
    assert IDS[1] == 1  # the argument is unchanged


def test_check_33_an_answer_that_does_not_fit_is_left_out_rather_than_silently_zeroed():
    """The bug: a sample without any trained token left, which adds 0 to the loss and is counted."""
    assert fit(IDS, MASK, 4, "cut", "row 1") == ([100, 4, 50, 51], [False, False, True, True])
    for max_len in (3, 2, 1):
        assert fit(IDS, MASK, max_len, "cut", "row 1") is None
    assert fit(IDS, MASK, 6, "drop", "row 1") is None


def test_too_long_an_example_is_refused_with_its_place_and_the_remedies():
    with pytest.raises(UserError, match=r"row 8 has 7 tokens, 6 fit.*--too_long drop.*cut"):
        fit(IDS, MASK, 6, "refuse", "row 8")


def test_check_13_the_prompt_is_masked_in_chosen_and_rejected_also_after_a_cut(tok):
    """The bug: the prompt counts in one of the two, or again after truncation."""
    messages = [{"role": "user", "content": "what does the big old cow say?"}]
    for answer in ("moo", "the cat says meow"):
        ids, mask = encode_answer(tok, messages, answer)
        for length in (len(ids), len(ids) - 4):
            kept_ids, kept_mask = fit(ids, mask, length, "cut", "row 1")
            trained = [i for i, m in zip(kept_ids, kept_mask) if m]
            assert tok.decode(trained[:-1]).strip() == answer
            assert trained[-1] == tok.encode_chat(
                messages + [{"role": "assistant", "content": answer}])[0][-1]
            assert kept_mask == sorted(kept_mask)  # False for the prompt, then True to the end


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


def test_check_33_compared_answers_lose_the_same_tokens_of_their_prompt():
    """Bug: each answer of a pair was cut by its own excess, so the two answered different prompts."""
    prompt = [100, 1, 2, 3, 4]
    answers = [([*prompt, 50, 51], [False] * 5 + [True] * 2), ([*prompt, 60], [False] * 5 + [True])]
    over = max(len(ids) for ids, _ in answers) - 5
    chosen, rejected = (fit(ids, mask, 5, "cut", "row 1", over) for ids, mask in answers)
    assert chosen == ([100, 3, 4, 50, 51], [False] * 3 + [True] * 2)
    assert rejected == ([100, 3, 4, 60], [False] * 3 + [True])
    # Dropping goes by each answer's own length: the short one still fits.
    assert fit(*answers[0], 6, "drop", "row 1", 1) is None
    assert fit(*answers[1], 6, "drop", "row 1", 1) == answers[1]


def test_check_33_a_dialogue_is_cut_down_to_its_last_turns():
    """Bug: a long dialogue was dropped because its first answer would have been cut."""
    ids = [100, 1, 2, 50, 51, 52, 3, 60, 61]  # two turns; 50-52 and 60-61 are answers
    mask = [False] * 3 + [True] * 3 + [False] + [True] * 2
    # The cut goes through the first answer: what is left of it is prompt, no longer trained.
    assert fit(ids, mask, 6, "cut", "row 1") == ([100, 51, 52, 3, 60, 61],
                                                [False] * 4 + [True] * 2)
    # The cut falls between the turns: nothing of the first answer is left.
    assert fit(ids, mask, 4, "cut", "row 1") == ([100, 3, 60, 61], [False] * 2 + [True] * 2)
    assert fit(ids, mask, 3, "cut", "row 1") is None  # nothing of the last prompt would be left
