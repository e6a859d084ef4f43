"""Sampling: greedy against slow full forward passes, and what is sampled against what is scored."""

import pytest
import torch
from conftest import FLAVOURS, awake_gpt, close

from minirlhf import generate as sampling
from minirlhf.generate import filter_logits, generate, pick, sample_prompts
from minirlhf.masked import token_logprobs
from minirlhf.tokenizer import Tokenizer

PROMPTS = [[3], [1, 2, 3, 4, 5, 6], [7, 8, 9], [2, 2], [11, 0, 0], [5, 16, 4, 1]]
STOP = [0, 12, 13, 14]  # the filler id 0 is among them: it must be an ordinary token


def slow_greedy(model, prompt, max_new_tokens, stop_ids):
    """The definition: a full forward pass for each token of each prompt by itself, no cache."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + max_new_tokens, model.cfg.block_size):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in stop_ids:
            return ids, True
    return ids, False


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("max_new_tokens", [1, 4, 100])
def test_check_02_greedy_equals_full_forward_passes_of_each_prompt_alone(flavour, max_new_tokens):
    """The bugs: the first token is read at the batch's last column, not at the row's own last
    prompt token; a row that ended keeps or loses the wrong place in the batch."""
    model = awake_gpt(**FLAVOURS[flavour], n_kv_head=2)
    rollout = generate(model, PROMPTS, max_new_tokens, STOP, temperature=0)
    expected = [slow_greedy(model, prompt, max_new_tokens, STOP) for prompt in PROMPTS]
    for b, (ids, ended) in enumerate(expected):
        assert rollout.tokens[b, : len(ids)].tolist() == ids
        assert rollout.lengths[b] == len(ids) and rollout.ended[b] == ended
        assert rollout.responses()[b] == ids[len(PROMPTS[b]) :]
    assert rollout.prompt_lens.tolist() == [len(prompt) for prompt in PROMPTS]
    assert rollout.tokens.shape == (6, max(len(ids) for ids, _ in expected))
    if max_new_tokens == 100:  # some rows end and others run out of room, or the test is too easy
        assert 0 < rollout.ended.sum() < 6


def test_check_07_nothing_comes_after_the_end_and_the_filler_may_be_the_end_id(generator):
    """The bugs: rows that ended go on; masks by id, which lose an end token that looks like filler
    or take filler for an end."""
    rollout = generate(awake_gpt(), PROMPTS * 20, 10, STOP, generator=generator)
    for b, response in enumerate(rollout.responses()):
        assert not set(response[:-1]) & set(STOP)
        assert (response[-1] in STOP) == bool(rollout.ended[b])
        assert rollout.ended[b] or len(response) == 10
        assert (rollout.tokens[b, rollout.lengths[b] :] == 0).all()
    assert any(response[-1] == 0 for response in rollout.responses())


def test_a_prompt_stays_as_it_was_though_it_holds_end_tokens(generator):
    rollout = generate(awake_gpt(), PROMPTS, 5, STOP, generator=generator)
    for b, prompt in enumerate(PROMPTS):
        assert rollout.tokens[b, : len(prompt)].tolist() == prompt


def test_a_rollout_may_fill_the_whole_context(generator):
    prompts = [[1] * 15, [1, 2, 3]]
    rollout = generate(awake_gpt(), prompts, 100, [], generator=generator)
    assert rollout.lengths.tolist() == [16, 16] and not rollout.ended.any()
    assert rollout.tokens.shape == (2, 16)


@pytest.mark.parametrize("prompt", [[], [1] * 16, [1] * 40])
def test_a_prompt_without_room_for_a_response_is_refused(prompt):
    with pytest.raises(ValueError, match=f"prompt 1 has {len(prompt)} tokens"):
        generate(awake_gpt(), [[1, 2], prompt], 5, STOP)


def test_the_same_seed_gives_the_same_samples_and_another_seed_others():
    draw = lambda seed: generate(awake_gpt(), PROMPTS, 8, STOP,
                                 generator=torch.Generator().manual_seed(seed)).tokens
    assert torch.equal(draw(1), draw(1))
    assert draw(1).shape != draw(2).shape or not torch.equal(draw(1), draw(2))


def test_check_03_a_rollout_is_sampled_without_dropout_and_gives_the_mode_back():
    """The bug: dropout while sampling, so that the samples are those of another distribution."""
    model = awake_gpt(dropout=0.5)
    plain = generate(awake_gpt(), PROMPTS, 8, STOP, temperature=0).tokens
    for training in (True, False):
        model.train(training)
        assert torch.equal(generate(model, PROMPTS, 8, STOP, temperature=0).tokens, plain)
        assert model.training is training


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_check_05_the_sampled_distribution_is_the_scored_one(temperature, generator):
    """The bugs: a temperature that the log-probs do not know of; top-k or top-p on by default."""
    model, count = awake_gpt(), 4000
    rollout = generate(model, [[3, 1, 4]] * count, 2, [], temperature, generator=generator)
    logits = model(rollout.tokens) / temperature
    logprobs = token_logprobs(logits[:, :-1], rollout.tokens[:, 1:])  # (count, 4)
    probs = logits[0, 2].softmax(-1)  # (V,) of the first sampled token
    shares = torch.bincount(rollout.tokens[:, 3], minlength=17) / count
    assert ((shares - probs).abs() <= 4 * (probs * (1 - probs) / count).sqrt() + 1e-9).all()
    # The mean log-prob of samples is minus the entropy, for the first token and for the second.
    entropies = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    for column in (2, 3):
        gap = logprobs[:, column] + entropies[:, column]
        assert abs(gap.mean()) < 4 * gap.std() / count**0.5


def test_check_36_a_response_is_the_ids_that_were_sampled():
    """The bug: text that is decoded and encoded again, which joins tokens that were sampled apart,
    so that what is scored was never sampled."""
    model, prompt = awake_gpt(**FLAVOURS["llama"]), [3]
    response = generate(model, [prompt], 8, [], temperature=0).responses()[0]
    assert prompt + response == slow_greedy(model, prompt, 8, [])[0]
    # The ids 0 to 16 are single bytes; a tokenizer that knows this text has longer tokens for it.
    tok = Tokenizer.train([bytes(response).decode()] * 9, 263)
    assert tok.decode(response).encode() == bytes(response)
    assert tok.encode(tok.decode(response)) != response


def test_sampling_under_bf16_autocast_draws_from_logits_near_the_float32_ones(generator,
                                                                              monkeypatch):
    """A cache that is read at the wrong place would show far beyond bf16's rounding."""
    model, drawn, choose = awake_gpt(**FLAVOURS["llama"], n_kv_head=2).float(), [], sampling.pick
    monkeypatch.setattr(sampling, "pick",
                        lambda logits, *rest: drawn.append(logits) or choose(logits, *rest))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollout = generate(model, PROMPTS, 8, STOP, generator=generator)
    full = model(rollout.tokens)  # (B, T, V)
    assert len(drawn) == (rollout.lengths - rollout.prompt_lens).max() > 2
    for step, logits in enumerate(drawn):
        rows = torch.nonzero(rollout.prompt_lens + step < rollout.lengths)[:, 0]
        exact = full[rows, rollout.prompt_lens[rows] + step - 1]
        assert logits.dtype == torch.bfloat16
        assert (logits - exact).norm() < 0.1 * exact.norm()


# ---------------------------------------------------------------- one token

PROBS = [[0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]]
LOGITS = torch.tensor(PROBS, dtype=torch.float64).log()


def kept(logits):
    return [[i for i, z in enumerate(row) if z > float("-inf")] for row in logits.tolist()]


@pytest.mark.parametrize("top_k, expected", [
    (0, [[0, 1, 2, 3], [0, 1, 2, 3]]), (1, [[0], [3]]), (2, [[0, 2], [2, 3]]),
    (4, [[0, 1, 2, 3], [0, 1, 2, 3]]), (99, [[0, 1, 2, 3], [0, 1, 2, 3]])])
def test_top_k_by_hand(top_k, expected):
    assert kept(filter_logits(LOGITS, top_k=top_k)) == expected


@pytest.mark.parametrize("top_p, expected", [
    (1.0, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    (0.75, [[0, 2], [1, 2, 3]]),  # 0.5 + 0.3; 0.4 + 0.3 is not yet enough
    (0.45, [[0], [2, 3]]), (0.5, [[0], [2, 3]]),  # a mass of exactly p is enough
    (0.01, [[0], [3]]), (0.0, [[0], [3]])])  # the likeliest always stays
def test_top_p_by_hand(top_p, expected):
    assert kept(filter_logits(LOGITS, top_p=top_p)) == expected


def test_filters_keep_the_proportions_of_what_stays():
    probs = filter_logits(LOGITS, top_k=2).softmax(-1)
    close(probs, [[5 / 8, 0, 3 / 8, 0], [0, 0, 3 / 7, 4 / 7]])


def test_temperature_0_is_greedy_and_a_low_one_nearly(generator):
    logits = torch.randn(50, 9, generator=generator, dtype=torch.float64)
    assert torch.equal(pick(logits, 0, 0, 1.0, None), logits.argmax(-1))
    assert torch.equal(pick(logits, 1e-4, 0, 1.0, generator), logits.argmax(-1))
    assert torch.equal(pick(logits, 1.0, 1, 1.0, generator), logits.argmax(-1))


def test_bf16_logits_are_widened_before_the_temperature_divides_them(generator, monkeypatch):
    """Bug: a division in bf16, after which the distribution drawn from is not the one scored."""
    drawn, multinomial = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda probs, *args, **options: drawn.append(probs)
                        or multinomial(probs, *args, **options))
    logits = (5 * torch.randn(4, 50, generator=generator)).bfloat16()
    pick(logits, 0.7, 0, 1.0, generator)
    exact = (logits.double() / 0.7).log_softmax(-1)
    assert ((logits / 0.7).double().log_softmax(-1) - exact).abs().max() > 1e-2
    assert drawn[0].dtype == torch.float32
    close(drawn[0].double().log(), exact, rtol=1e-5, atol=1e-5)


def test_the_nucleus_is_that_of_the_tempered_distribution(generator):
    logits = LOGITS[:1].expand(500, 4)  # 0.5, 0.3, 0.1, 0.1; at temperature 0.5 0.69, 0.25, ...
    assert pick(logits, 0.5, 0, 0.6, generator).unique().tolist() == [0]
    assert pick(logits, 1.0, 0, 0.6, generator).unique().tolist() == [0, 2]


# ---------------------------------------------------------------- many prompts

def test_sample_prompts_gives_each_prompt_its_own_samples_in_order():
    model = awake_gpt()
    results = sample_prompts(model, PROMPTS, STOP, 100, temperature=0, num_samples=3, batch_size=4)
    for prompt, samples in zip(PROMPTS, results):
        ids, ended = slow_greedy(model, prompt, 100, STOP)
        assert samples == [(ids[len(prompt) :], ended)] * 3


def test_sample_prompts_passes_its_options_on(generator):
    """Every id of an answer that ran out of room is there; top_k and top_p reach the sampling."""
    model = awake_gpt()
    greedy = sample_prompts(model, PROMPTS, [], 5, temperature=0)
    assert [(len(ids), ended) for [(ids, ended)] in greedy] == [(5, False)] * len(PROMPTS)
    for option in (dict(top_k=1), dict(top_p=1e-6)):
        assert sample_prompts(model, PROMPTS, [], 5, generator=generator, **option) == greedy
    assert sample_prompts(model, PROMPTS, [], 5, generator=generator) != greedy
