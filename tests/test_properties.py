"""Properties that hold for any batch, any lengths, any text: not only for a few picked examples.

hypothesis draws the cases, the same ones on every run, and shrinks a failure to a small one. A
number that has to be the same "to the bit" is compared with `torch.equal`; one whose sum is taken
in another order is compared in float64 at 1e-12 (`near`).
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import math
import random
import sys
import zipfile
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from tiny_road import ppo_loss
from conftest import FLAVOURS, awake_gpt, tiny_config, wake
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from minirlhf.batches import (encode_answer, epoch_batches, fit, pad_right, response_mask,
                              split_by_prompt)
from minirlhf.generate import generate
from minirlhf.losses import (dpo_loss, ppo_policy_loss, ppo_value_loss, reward_model_loss,
                             sft_loss)
from minirlhf.masked import (masked_mean, masked_sum, masked_var, masked_whiten,
                             sequence_logprobs, token_logprobs)
from minirlhf.model import GPT, ActorCritic, ScalarModel
from minirlhf.rl import gae, kl_estimate, normalize_scores, token_rewards
from minirlhf.tokenizer import SPECIAL_TOKENS, Tokenizer
from minirlhf.plumbing import formats
from minirlhf.plumbing.config import parse_config
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import write_jsonl
from minirlhf.plumbing import checkpoints
from minirlhf.plumbing.checkpoints import load_checkpoint

PROFILE = settings(derandomize=True, deadline=None, max_examples=30)
SEEDS = st.integers(0, 999)


def near(actual, expected, rtol=1e-12):
    """Equal up to rounding, against the largest entry: an entry may be 0 but for rounding, as the
    gradient of the keys' biases is, which the softmax cancels."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, {tuple(expected.shape)}"
    gap, size = (actual - expected).abs().max(), expected.abs().max()
    assert gap <= rtol * size, f"differ by {gap.item()}, the largest entry is {size.item()}"


def same_bits(actual, expected):
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected)):
        assert torch.equal(a, b), f"result {i}: {a} against {b}"


def flat(result):
    """Every tensor of a result: of a tensor, a tuple, a dict of statistics, or these nested."""
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [tensor for part in parts for tensor in flat(part)]


def with_gradients(result, inputs):
    """All tensors of the result, then the gradient of a mix of them for each of the inputs."""
    results = flat(result)
    # Each entry has another weight: plain sums of whitened numbers, say, have no gradient at all.
    mix = sum((r * torch.arange(1, r.numel() + 1, dtype=r.dtype).view(r.shape)).sum()
              for r in results if r.requires_grad)
    return [r.detach() for r in results], torch.autograd.grad(mix, inputs)


# ---------------------------------------------------------------- batches of any shape

@st.composite
def batches(draw):
    """Lengths and masks of a ragged batch on the grid, perhaps with columns of filler only."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4))
    prompt_lens = torch.tensor([prompt for prompt, _ in sizes])  # (B,)
    lengths = torch.tensor([prompt + response for prompt, response in sizes])  # (B,)
    B, T = len(sizes), int(lengths.max()) + draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    scattered = torch.rand(B, T - 1, generator=generator) < 0.5  # a mask of any kind
    scattered[torch.arange(B), torch.randint(T - 1, (B,), generator=generator)] = True
    return SimpleNamespace(
        B=B, T=T, prompt_lens=prompt_lens, lengths=lengths, generator=generator,
        mask=response_mask(prompt_lens, lengths, T), scattered=scattered,  # (B, T-1)
        tokens=torch.randint(17, (B, T), generator=generator))


def noise(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


GARBAGE = torch.tensor([math.nan, math.inf, -math.inf, 1e308, -1e308, 7.0], dtype=torch.float64)


def dirty(x, mask, generator):
    """x with garbage where the mask is False."""
    return torch.where(mask, x, GARBAGE[torch.randint(6, x.shape, generator=generator)])


def permuted(count, generator):
    return torch.randperm(count, generator=generator)


# ---------------------------------------------------------------- 1. filler changes nothing

def rewards_of_log_probs(kind):
    """The steps from log-probs to rewards: their filler is cut off, as `collect_rollout` does."""
    def steps(logprobs, ref_logprobs, mask):
        zero = torch.zeros_like(logprobs)
        kl = kl_estimate(torch.where(mask, logprobs, zero), torch.where(mask, ref_logprobs, zero),
                         kind)
        return token_rewards(torch.arange(1.0, 1 + len(mask)), kl, mask, 0.5)
    return steps


# name: the function of (B, T-1) tensors and a mask, how many tensors, how many get a gradient
GRID = {
    "masked_sum": (masked_sum, 1, 1),
    "masked_sum of each row": (lambda x, mask: masked_sum(x, mask, dim=1), 1, 1),
    "masked_mean": (masked_mean, 1, 1),
    "masked_mean of each row": (lambda x, mask: masked_mean(x, mask, dim=1), 1, 1),
    "masked_mean with a denominator": (lambda x, mask: masked_mean(x, mask, 7), 1, 1),
    "masked_var": (masked_var, 1, 1),
    "masked_whiten": (masked_whiten, 1, 1),
    "masked_whiten around the mean": (lambda x, mask: masked_whiten(x, mask, False), 1, 1),
    "sequence_logprobs": (sequence_logprobs, 1, 1),
    "sequence_logprobs on average": (lambda x, mask: sequence_logprobs(x, mask, True), 1, 1),
    "sft_loss": (sft_loss, 1, 1),
    "ppo_policy_loss": (ppo_policy_loss, 3, 1),
    "ppo_value_loss": (ppo_value_loss, 3, 1),
    "ppo_value_loss without clip": (lambda *args: ppo_value_loss(*args, clip_range=0), 3, 1),
    "k1 and token_rewards": (rewards_of_log_probs("k1"), 2, 2),
    "k2 and token_rewards": (rewards_of_log_probs("k2"), 2, 2),
    "k3 and token_rewards": (rewards_of_log_probs("k3"), 2, 2),
    "token_rewards": (lambda kl, mask: token_rewards(torch.ones(len(mask)), kl, mask, 0.5), 1, 1),
    "gae": (lambda rewards, values, mask: gae(rewards, values, mask, 0.9, 0.8), 2, 2),
}
ONE_RUN = ("k1 and token_rewards", "k2 and token_rewards", "k3 and token_rewards", "token_rewards",
           "gae")  # their mask is one unbroken run of True in each row


@pytest.mark.parametrize("name", GRID)
@PROFILE
@given(batch=batches())
def test_garbage_outside_the_mask_changes_no_bit_of_a_result_or_a_gradient(name, batch):
    function, num_tensors, num_trained = GRID[name]
    mask = batch.mask if name in ONE_RUN else batch.scattered
    clean = [torch.where(mask, noise(*mask.shape, generator=batch.generator), 0.0)
             for _ in range(num_tensors)]
    results = []
    for tensors in (clean, [dirty(x, mask, batch.generator) for x in clean]):
        tensors = [x.clone().requires_grad_(i < num_trained) for i, x in enumerate(tensors)]
        values, gradients = with_gradients(function(*tensors, mask), tensors[:num_trained])
        for gradient in gradients:
            assert (gradient[~mask] == 0).all(), f"gradient of the filler: {gradient[~mask]}"
        for value in values:
            assert value.shape != mask.shape or (value[~mask] == 0).all(), value[~mask]
        results.append([*values, *gradients])
    same_bits(*results)


@PROFILE
@given(batch=batches(), K=st.integers(2, 5))
def test_garbage_scores_of_absent_or_unfinished_answers_change_no_bit(batch, K):
    B, generator = batch.B, batch.generator
    ranks = torch.randint(-1, K, (B, K), generator=generator)  # -1: absent
    scores, margins = noise(B, K, generator=generator), noise(B, K, K, generator=generator).abs()
    pairs = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] >= 0)  # (B, K, K)
    results = []
    for s, m in ((scores, margins), (dirty(scores, ranks >= 0, generator),
                                     dirty(margins, pairs, generator))):
        s = s.clone().requires_grad_()
        values, gradients = with_gradients(reward_model_loss(s, ranks, m), [s])
        results.append([*values, *gradients])
    same_bits(*results)
    ended = ranks >= 0
    same_bits([normalize_scores(scores, 0.5, 2.0, 1.0, ended, -3.0)],
              [normalize_scores(dirty(scores, ended, generator), 0.5, 2.0, 1.0, ended, -3.0)])


@functools.cache
def model_of(kind, flavour, attention="fused"):
    """A tiny model far from its start, in float64; two query heads share a key/value head."""
    options = dict(FLAVOURS[flavour], n_kv_head=2, attention=attention)
    if kind in ("policy", "untied"):
        return awake_gpt(**{**options, "tied": kind == "policy" and flavour == "gpt2"})
    if kind == "scalar":
        return wake(ScalarModel(tiny_config(**options)).double(), seed=2)
    if kind == "shared":
        return wake(ActorCritic(GPT(tiny_config(**options))).double(), seed=3).eval()
    return ActorCritic(model_of("policy", flavour, attention),
                       model_of("scalar", flavour, attention)).eval()


KINDS = ("policy", "scalar", "shared", "actor")


def readings(kind, model, tokens, batch):
    """All that is ever read of a model's output on real tokens, and the gradient of a mix of it."""
    real = torch.arange(tokens.shape[1]) < batch.lengths[:, None]  # (B, T)
    if kind == "scalar":
        result = model.score(tokens, batch.lengths), model.raw(tokens)[real], model(tokens)[real]
    else:
        logits, *values = [model(tokens)] if kind == "policy" else model(tokens)
        mask = response_mask(batch.prompt_lens, batch.lengths, tokens.shape[1])
        loss = sft_loss(token_logprobs(logits[:, :-1], tokens[:, 1:]), mask)
        result = logits[real], loss, *[v[real] for v in values]
    return with_gradients(result, list(model.parameters()))


def other_filler(batch):
    """The same real tokens, other ids behind them."""
    others = torch.randint(17, batch.tokens.shape, generator=batch.generator)
    return torch.where(torch.arange(batch.T) < batch.lengths[:, None], batch.tokens, others)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flavour", FLAVOURS)
@settings(PROFILE, max_examples=15)
@given(batch=batches(), attention=st.sampled_from(["fused", "manual"]))
def test_check_01_other_filler_changes_no_bit_of_a_models_real_positions(kind, flavour, batch,
                                                                         attention):
    model = model_of(kind, flavour, attention)
    results, gradients = readings(kind, model, batch.tokens, batch)
    other_results, other_gradients = readings(kind, model, other_filler(batch), batch)
    same_bits([*other_results, *other_gradients], [*results, *gradients])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flavour", FLAVOURS)
@settings(PROFILE, max_examples=15)
@given(batch=batches(), attention=st.sampled_from(["fused", "manual"]))
def test_check_01_more_filler_changes_nothing_at_a_models_real_positions(kind, flavour, batch,
                                                                         attention):
    model = model_of(kind, flavour, attention)
    narrow = batch.tokens[:, : int(batch.lengths.max())]
    wide = torch.cat([narrow, torch.randint(17, (batch.B, 16 - narrow.shape[1]),
                                            generator=batch.generator)], dim=1)
    results, gradients = readings(kind, model, narrow, batch)
    wide_results, wide_gradients = readings(kind, model, wide, batch)
    for wide_result, result in zip(wide_results, results):
        near(wide_result, result)
    near(joined(wide_gradients), joined(gradients))


def joined(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


# ---------------------------------------------------------------- the scripts' own losses

STAGES = {"sft": "policy", "rm": "scalar", "dpo": "policy", "ppo": "actor", "ppo shared": "shared"}
RUN = SimpleNamespace(device="cpu", autocast=contextlib.nullcontext)
PER_TOKEN = ("logprobs", "values", "returns", "whitened_advantages")


@st.composite
def example_lists(draw, stage):
    """A few rows as the stage's `encode` makes them; of PPO, rows of a rollout."""
    rng = random.Random(draw(SEEDS))

    def ids(smallest, largest):
        return [rng.randrange(17) for _ in range(draw(st.integers(smallest, largest)))]

    def answer(prompt):
        response = ids(1, 6)
        return prompt + response, [False] * len(prompt) + [True] * len(response)

    def row():
        if stage == "sft":
            whole = ids(2, 12)
            return whole, [False] + [rng.random() < 0.5 for _ in whole[2:]] + [True]
        prompt = ids(1, 6)
        if stage == "rm":
            K = draw(st.integers(2, 4))
            grades = [[rng.randrange(4) if i < j else 0 for j in range(K)] for i in range(K)]
            return {"ids": [answer(prompt)[0] for _ in range(K)],
                    "ranks": sorted(rng.randrange(3) for _ in range(K)),
                    "grades": rng.choice([None, grades])}
        if stage == "dpo":
            return {"chosen": answer(prompt), "rejected": answer(prompt),
                    "ref_chosen_logp": rng.uniform(-20, -5),
                    "ref_rejected_logp": rng.uniform(-20, -5)}
        whole, _ = answer(prompt)
        size = len(whole) - len(prompt)
        # At the temperature in `loss_of`, log-probs are near -log 17 = -2.8: ratios are around 1.
        return {"ids": whole, "prompt_len": len(prompt),
                "logprobs": [rng.uniform(-3.1, -2.5) for _ in range(size)],
                **{name: [rng.gauss(0, 1) for _ in range(size)] for name in PER_TOKEN[1:]}}

    return [row() for _ in range(draw(st.integers(1, 5)))]


def filled_pad_right(generator, extra):
    """`pad_right` with random ids for filler, and `extra` columns of it."""
    def pad(rows, device="cpu"):
        tokens, lengths = pad_right(rows, device)
        tokens = torch.cat([tokens, tokens.new_zeros(len(rows), extra)], dim=1)
        others = torch.randint(17, tokens.shape, generator=generator)
        real = torch.arange(tokens.shape[1]) < lengths[:, None]  # (B, T)
        return torch.where(real, tokens, others), lengths
    return pad


def make_rollout(examples, pad, generator):
    """PPO's rows on the grid, with 0 outside the mask, or garbage where a generator is given."""
    tokens, lengths = pad([e["ids"] for e in examples])
    prompt_lens = torch.tensor([e["prompt_len"] for e in examples])
    mask = response_mask(prompt_lens, lengths, tokens.shape[1])  # (B, T-1)
    rollout = {"tokens": tokens, "lengths": lengths, "response_mask": mask}
    for name in PER_TOKEN:
        values = torch.tensor([x for e in examples for x in e[name]], dtype=torch.float64)
        rollout[name] = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, values)
        if generator:
            rollout[name] = dirty(rollout[name], mask, generator)
    return rollout


def loss_of(stage, examples, rows=None, pad=pad_right, generator=None, flavour="gpt2"):
    """What `rows` add to the loss of the batch of all examples, as the script's loop adds it up.

    Returns the loss, its gradient as one vector, the losses of the rows (or None), statistics.
    """
    model = model_of(STAGES[stage], flavour)
    part = examples if rows is None else [examples[i] for i in rows]
    losses, stats = None, {}
    if stage == "sft":
        with mock.patch.object(train_sft, "pad_right", pad):
            batch = train_sft.make_batch(part, "cpu")
        loss = train_sft.loss_of(model, batch, None)[0] / sum(sum(mask) for _, mask in examples)
    elif stage == "rm":
        with mock.patch.object(train_rm, "pad_right", pad):
            batch = train_rm.make_batch([{**e, "prompt_len": 1} for e in part], "cpu")
        losses, _ = train_rm.loss_of(model, batch, train_rm.Config(margin=0.7))
    elif stage == "dpo":
        with mock.patch.object(train_dpo, "pad_right", pad):
            batch = train_dpo.make_batch(part, "cpu")
        losses, stats = train_dpo.loss_of(model, batch, train_dpo.Config())
        stats = {name: values.sum() for name, values in stats.items()}
    else:
        rollout = make_rollout(examples, pad, generator)
        cfg = train_ppo.Config(temperature=50.0, share_critic=stage == "ppo shared")
        # PPO rounds its logits to float32. In float64, rounding can't be what a gap is put down to.
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            loss, stats = ppo_loss(
                model, rollout, list(range(len(examples)) if rows is None else rows),
                rollout["response_mask"].sum(), RUN, cfg)
    if losses is not None:
        loss = losses.sum() / len(examples)
    gradient = joined(torch.autograd.grad(loss, list(model.parameters())))
    return loss.detach(), gradient, losses if losses is None else losses.detach(), stats


@pytest.mark.parametrize("stage", STAGES)
@settings(PROFILE, max_examples=15)
@given(data=st.data(), seed=SEEDS, flavour=st.sampled_from([*FLAVOURS]))
def test_check_01_other_filler_changes_no_bit_of_a_scripts_loss(stage, data, seed, flavour):
    examples, generator = data.draw(example_lists(stage)), torch.Generator().manual_seed(seed)
    results = [loss_of(stage, examples, flavour=flavour),
               loss_of(stage, examples, pad=filled_pad_right(generator, 0), generator=generator,
                       flavour=flavour)]
    same_bits(*[[loss, gradient, *stats.values()] for loss, gradient, _, stats in results])


@pytest.mark.parametrize("stage", STAGES)
@settings(PROFILE, max_examples=15)
@given(data=st.data(), seed=SEEDS, flavour=st.sampled_from([*FLAVOURS]))
def test_check_01_more_filler_changes_nothing_in_a_scripts_loss(stage, data, seed, flavour):
    examples, generator = data.draw(example_lists(stage)), torch.Generator().manual_seed(seed)
    loss, gradient, losses, _ = loss_of(stage, examples, flavour=flavour)
    wide = loss_of(stage, examples, pad=filled_pad_right(generator, 4), generator=generator,
                   flavour=flavour)
    near(wide[0], loss)
    near(wide[1], gradient)
    if losses is not None:
        near(wide[2], losses)


# ---------------------------------------------------------------- 2. the order of rows

@PROFILE
@given(batch=batches())
def test_permuting_rows_permutes_gradients_and_leaves_token_losses(batch):
    mask, order = batch.scattered, permuted(batch.B, batch.generator)
    tensors = [noise(*mask.shape, generator=batch.generator) for _ in range(3)]
    for function, count in ((sft_loss, 1), (ppo_policy_loss, 3), (ppo_value_loss, 3)):
        results = []
        for rows in (torch.arange(batch.B), order):
            new, *rest = [x[rows].clone() for x in tensors[:count]]
            new.requires_grad_()
            results.append(with_gradients(function(new, *rest, mask[rows]), [new]))
        (values, (gradient,)), (moved_values, (moved_gradient,)) = results
        for moved, value in zip(moved_values, values):
            torch.testing.assert_close(moved, value, rtol=1e-12, atol=1e-13)  # they may cancel
        near(moved_gradient, gradient[order])


@PROFILE
@given(batch=batches(), K=st.integers(2, 5))
def test_permuting_prompts_or_their_answers_permutes_preference_losses(batch, K):
    B, generator = batch.B, batch.generator
    rows, answers = permuted(B, generator), permuted(K, generator)
    ranks = torch.randint(-1, K, (B, K), generator=generator)  # -1: absent
    scores = noise(B, K, generator=generator).requires_grad_()
    margins = noise(B, K, K, generator=generator).abs()
    losses = reward_model_loss(scores, ranks, margins)
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    moved = scores.detach()[rows][:, answers].requires_grad_()
    moved_losses = reward_model_loss(moved, ranks[rows][:, answers],
                                     margins[rows][:, answers][:, :, answers])
    near(moved_losses, losses[rows])
    near(torch.autograd.grad(moved_losses.sum(), moved)[0], gradient[rows][:, answers])
    logps = [noise(B, generator=generator) for _ in range(4)]
    for result, moved in zip(dpo_loss(*logps, label_smoothing=0.2),
                             dpo_loss(*[x[rows] for x in logps], label_smoothing=0.2)):
        near(moved, result[rows])


@pytest.mark.parametrize("stage", STAGES)
@settings(PROFILE, max_examples=15)
@given(data=st.data(), flavour=st.sampled_from([*FLAVOURS]))
def test_permuting_rows_leaves_a_scripts_loss_and_gradient(stage, data, flavour):
    examples = data.draw(example_lists(stage))
    order = data.draw(st.permutations(range(len(examples))))
    loss, gradient, losses, _ = loss_of(stage, examples, flavour=flavour)
    moved = loss_of(stage, [examples[i] for i in order], flavour=flavour)
    near(moved[0], loss)
    near(moved[1], gradient)
    if losses is not None:
        near(moved[2], losses[list(order)])


@settings(PROFILE, max_examples=15)
@given(data=st.data(), flavour=st.sampled_from([*FLAVOURS]))
def test_check_28_the_order_in_which_answers_are_listed_does_not_matter(data, flavour):
    examples, moved = data.draw(example_lists("rm")), []
    for e in examples:
        order = data.draw(st.permutations(range(len(e["ids"]))))
        moved.append({"ids": [e["ids"][i] for i in order], "ranks": [e["ranks"][i] for i in order],
                      "grades": e["grades"] and [[e["grades"][i][j] for j in order]
                                                 for i in order]})
    _, gradient, losses, _ = loss_of("rm", examples, flavour=flavour)
    _, moved_gradient, moved_losses, _ = loss_of("rm", moved, flavour=flavour)
    near(moved_losses, losses)
    near(moved_gradient, gradient)


PROMPTS = st.lists(st.lists(st.integers(0, 16), min_size=1, max_size=15), min_size=1, max_size=5)


@settings(PROFILE, max_examples=30)
@given(data=st.data(), prompts=PROMPTS, flavour=st.sampled_from([*FLAVOURS]),
       max_new_tokens=st.integers(1, 20), stop_ids=st.sets(st.integers(0, 16), max_size=6))
def test_a_greedy_response_does_not_depend_on_its_place_or_on_other_prompts(
        data, prompts, flavour, max_new_tokens, stop_ids):
    order = data.draw(st.permutations(range(len(prompts))))
    some = order[: data.draw(st.integers(1, len(prompts)))]
    model = model_of("untied", flavour)  # a tied one repeats its last token, whatever stood before
    rollout = generate(model, prompts, max_new_tokens, stop_ids, temperature=0)
    moved = generate(model, [prompts[i] for i in some], max_new_tokens, stop_ids, temperature=0)
    assert moved.responses() == [rollout.responses()[i] for i in some]
    for name in ("prompt_lens", "lengths", "ended"):
        assert torch.equal(getattr(moved, name), getattr(rollout, name)[some]), name


# ---------------------------------------------------------------- 3. splitting for accumulation

@pytest.mark.parametrize("stage", STAGES)
@settings(PROFILE, max_examples=15)
@given(data=st.data(), flavour=st.sampled_from([*FLAVOURS]))
def test_check_23_a_batch_split_anywhere_gives_the_same_loss_gradient_and_statistics(stage, data,
                                                                                     flavour):
    examples = data.draw(example_lists(stage))
    order = data.draw(st.permutations(range(len(examples))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(examples)))) | {len(examples)})
    loss, gradient, _, stats = loss_of(stage, examples, flavour=flavour)
    parts = [loss_of(stage, examples, order[start:end], flavour=flavour)
             for start, end in zip([0, *cuts], cuts)]
    near(sum(part[0] for part in parts), loss)
    near(sum(part[1] for part in parts), gradient)
    for name in stats:  # each statistic is weighed by a share of tokens in float32
        near(sum(part[3][name] for part in parts), stats[name], rtol=1e-5)


# ---------------------------------------------------------------- 4. readers and their errors

def chat(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


HH = "\n\nHuman: Name a colour.\n\nAssistant: "
ROWS = [
    {"messages": chat("Hi.", "Hello.", "More?", "No.", system="Be short."), "skill": "manners"},
    {"instruction": "Turn it round.", "input": "top", "output": "pot", "history": [["a", "b"]]},
    {"prompt": "Hi.", "chosen": "Hello.", "rejected": "What?", "rating": "slightly"},
    {"chosen": HH + "Green.", "rejected": HH + "Dog.", "safety": [True, False]},
    {"messages": chat("Hi."), "output": ["a", "b", "c"], "ranks": [0, 1, 1], "meta": {"id": 7},
     "grades": [[0, "better", 3], [0, 0, 1], [0, 0, 0]]},
    {"query": "Hi.", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
    {"prompt": HH, "answer": "Green.", "task": {"words": ["a", None, 1.5]}},
    {"messages": chat("Hi."), "samples": [{"text": "", "ended": True}, {"text": "a", "ended": False,
                                                                        "num_tokens": 2}]},
    {"text": "One story.\n\nIt has two paragraphs."},
    # Wrong in one place, and easily overlooked:
    {"prompt": "Hi.", "output": ["a", "b"], "ranks": [False, True]},
    {"prompt": "Hi.", "output": ["a", "b"], "ranks": [1, 0]},
    {"prompt": "Hi.", "output": ["a", "b", "c"], "rating": 3},
    {"prompt": "Hi.", "samples": []},
]
KEYS = sorted({key for row in ROWS for key in row} | {"role", "content"})
# Strings of JSON may hold half a character, and its numbers need not fit a machine word.
ODD = ["", " ", "user", "assistant", "better", HH, "\n\nHuman:", "\ud83d", "\x00", "\u2028", -1, 0,
       1, True, None, 2**63, math.inf, math.nan, [], {}, [[]], [0, 0], [-1, 0, 1], chat("a", "b"),
       chat("a")]
VALUES = st.one_of(st.sampled_from(ODD), st.recursive(
    st.one_of(st.sampled_from(ODD), st.text(max_size=3), st.integers(), st.floats()),
    lambda inner: st.one_of(st.lists(inner, max_size=3),
                            st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)),
    max_leaves=6))


def near_misses(value):
    """JSON values that look much like this one: the kind of mistake that slips through a check."""
    if isinstance(value, bool):
        return [int(value), str(value), None]
    if isinstance(value, int):
        return [value + 1, -value - 1, value == 0, float(value), str(value), 2**63]
    if isinstance(value, str):
        return [" ", value + "\ud83d", len(value), [value], {"role": "user", "content": value}]
    if isinstance(value, list):
        return [value[::-1], value[:-1], value[:1] * 2, value * 2, dict(enumerate(value))]
    if isinstance(value, dict):
        return [[value], {**value, "name": 1}, {**value, "role": "system"}, [*value.values()], {}]
    return [0, "None", []]


@st.composite
def damaged(draw, rows):
    """One of the JSON values with a few pieces replaced, removed, renamed or put in twice."""
    row = json.loads(json.dumps(draw(st.sampled_from(rows))))
    for _ in range(draw(st.integers(0, 3))):
        if not row:
            break
        container = row
        while True:  # a step deeper, or here
            keys = list(container) if isinstance(container, dict) else range(len(container))
            key = keys[draw(st.integers(0, len(keys) - 1))]
            inside = container[key]
            if not isinstance(inside, (dict, list)) or not inside or draw(st.booleans()):
                break
            container = inside
        change = draw(st.sampled_from(["near miss", "near miss", "replace", "remove", "move"]))
        if change == "near miss":
            container[key] = draw(st.sampled_from(near_misses(container[key])))
        elif change == "replace":
            container[key] = draw(VALUES)
        elif change == "remove":
            del container[key]
        elif isinstance(container, list):
            container.insert(draw(st.integers(0, 3)), container[key])
        else:
            container[draw(st.sampled_from(KEYS))] = container.pop(key)
        row = json.loads(json.dumps(row))  # a copy: no piece is in two places, or drawn again
    return row


@st.composite
def damaged_bytes(draw, whole):
    """Bytes with a few of them changed, removed, put in or cut off."""
    whole = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.integers(0, max(0, len(whole) - 1)))
        end = where + draw(st.sampled_from([0, 1, 1, 3]))
        whole[where:end] = draw(st.binary(max_size=3))
        if draw(st.integers(0, 4)) == 4:
            del whole[where:]
    return bytes(whole)


def check_text(value):
    assert isinstance(value, str) and value.strip()
    assert not any("\ud800" <= character <= "\udfff" for character in value), ascii(value)


def check_conversation(messages, last):
    assert messages and messages[-1]["role"] == last
    turns = messages[messages[0]["role"] == "system":]
    assert [m["role"] for m in turns] == [("user", "assistant")[i % 2] for i in range(len(turns))]
    for message in messages:
        assert list(message) == ["role", "content"]
        check_text(message["content"])


def check_demonstration(row):
    assert set(row) == {"messages", "meta"} and isinstance(row["meta"], dict)
    check_conversation(row["messages"], "assistant")


def check_preference(row):
    assert set(row) == {"messages", "answers", "ranks", "grades", "meta"}
    check_conversation(row["messages"], "user")
    K = len(row["answers"])
    assert K >= 2 and len(row["ranks"]) == K and isinstance(row["meta"], dict)
    for answer in row["answers"]:
        check_text(answer)
    # Not below 0: the loss takes -1 for an absent answer. Not above what a tensor can hold.
    assert all(type(rank) is int and 0 <= rank < 2**63 for rank in row["ranks"]), row["ranks"]
    assert row["ranks"] == sorted(row["ranks"])
    if row["grades"] is not None:
        assert [len(line) for line in row["grades"]] == [K] * K
        for i in range(K):
            for j in range(K):
                assert type(row["grades"][i][j]) is int and 0 <= row["grades"][i][j] <= 3 * (i < j)


def check_prompt(row, keys=("messages", "answer", "meta")):
    assert set(row) == set(keys) and isinstance(row["meta"], dict)
    check_conversation(row["messages"], "user")
    if row["answer"] is not None:
        check_text(row["answer"])


def check_samples(row):
    check_prompt(row, ("messages", "answer", "meta", "samples"))
    assert isinstance(row["samples"], list) and row["samples"]
    for sample in row["samples"]:
        assert isinstance(sample["text"], str) and type(sample["ended"]) is bool


READERS = {formats.read_demonstrations: check_demonstration,
           formats.read_preferences: check_preference, formats.read_prompts: check_prompt,
           formats.read_samples: check_samples}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


def read_or_refused(path):
    """The rows that each reader makes of a file; a UserError in one line is as good."""
    rows = {}
    for read, check in READERS.items():
        try:
            rows[read] = read(path)
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            continue
        assert rows[read]
        for row in rows[read]:
            check(row)
    try:
        text = formats.read_text(path)
        assert text.strip() and text.endswith("\n") and not text.endswith("\n\n")
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    return rows


@settings(PROFILE, max_examples=500)
@given(row=st.one_of(damaged(ROWS), damaged(ROWS), VALUES))
@example(row={"prompt": "Hi.", "output": ["a", "b", "c"], "ranks": [-1, 0, 1]})
@example(row={"prompt": "Hi.", "output": ["a", "b"], "ranks": [0, 10**30]})
def test_a_damaged_row_becomes_a_canonical_row_or_is_refused(folder, row):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    read_or_refused(path)


@settings(PROFILE, max_examples=300)
@given(row=damaged(ROWS))
@example(row={"prompt": "Hi.", "title": "half a smiley: \ud83d"})
def test_whatever_was_read_can_be_written_and_reads_the_same(folder, row):
    path, again = folder / "rows.jsonl", folder / "again.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    for read, rows in read_or_refused(path).items():
        write_jsonl(again, rows)
        if read is not formats.read_preferences:  # its canonical row is not one of its own shapes
            assert json.dumps(read(again)) == json.dumps(rows)  # as text: NaN is not equal to NaN


def test_a_row_nested_to_any_depth_is_read_or_refused(folder):
    """Between what JSON can be read from and what it can be written to lie a few depths more."""
    path = folder / "deep.jsonl"
    for depth in [1, 10, *range(sys.getrecursionlimit() - 200, sys.getrecursionlimit()), 10**5]:
        path.write_text('{"prompt": ' + "[" * depth + "]" * depth + "}\n", encoding="utf-8")
        read_or_refused(path)


WHOLE_FILE = "".join(json.dumps(row) + "\n" for row in ROWS[:3]).encode()


@settings(PROFILE, max_examples=150)
@given(data=st.data(), name=st.sampled_from(["rows.jsonl", "rows.txt"]), packed=st.booleans())
def test_any_bytes_of_a_file_are_read_or_refused(folder, data, name, packed):
    whole = gzip.compress(WHOLE_FILE, mtime=0) if packed else WHOLE_FILE
    path = folder / (name + ".gz" * packed)
    path.write_bytes(data.draw(st.one_of(damaged_bytes(whole), st.binary(max_size=40),
                                         st.text(max_size=40).map(str.encode))))
    read_or_refused(path)


TOKENIZER = Tokenizer.train("the cow says moo and the dog says woof. " + " <|end|>" * 9, 285)


def tokenizer_or_refused(load, source):
    """The tokenizer, or None where it is refused. No name of a published one is looked up."""
    with mock.patch("tiktoken.get_encoding", side_effect=ValueError("no such name")):
        try:
            return load(source)
        except UserError as error:
            assert isinstance(source, dict) or str(error).startswith(str(source))


def check_tokenizer(loaded):
    assert len(set(loaded.ranks)) == len(loaded.ranks) == loaded.n_vocab - len(SPECIAL_TOKENS)
    assert {bytes([b]) for b in range(256)} <= set(loaded.ranks)
    assert loaded.begin_id == len(loaded.ranks) and loaded.end_id == loaded.n_vocab - 1


@settings(PROFILE, max_examples=150)
@given(content=st.one_of(damaged_bytes(json.dumps(TOKENIZER.to_dict(), indent=1).encode()),
                         st.binary(max_size=20)))
@example(content=b"[" * 10**5)
def test_a_damaged_tokenizer_file_is_read_or_refused(folder, content):
    path = folder / "tokenizer.json"
    path.write_bytes(content)
    loaded = tokenizer_or_refused(Tokenizer.load, path)
    if loaded:
        check_tokenizer(loaded)


@settings(PROFILE, max_examples=150)
@given(row=damaged([TOKENIZER.to_dict(), {**TOKENIZER.to_dict(), "name": None}]))
def test_a_damaged_tokenizer_in_a_checkpoint_is_read_or_refused(row):
    loaded = tokenizer_or_refused(Tokenizer.from_dict, row)
    if loaded:
        check_tokenizer(loaded)


@PROFILE
@given(pattern=st.sampled_from(["", "a", r"\w+", r"\S+", r"[a-z]*", r" ?\p{L}+|\s", r"\p{L}*|."]))
def test_a_tokenizer_whose_pattern_loses_text_is_refused(pattern):
    row = {**TOKENIZER.to_dict(), "pattern": pattern}
    loaded = tokenizer_or_refused(Tokenizer.from_dict, row)
    text = "The  cow's 2 calves say:\n\tmoo, moo!"
    assert loaded is None or loaded.decode(loaded.encode(text)) == text


CHECKPOINT = {"kind": "gpt", "model": {}, "model_config": {"n_layer": 1}, "step": 3,
              "tokenizer": {"name": "gpt2"}}


@st.composite
def damaged_checkpoints(draw):
    """Any bytes, another value than a checkpoint, or a checkpoint with a few bytes changed."""
    how = draw(st.sampled_from(["any bytes", "value", "bytes", "pickle"]))
    if how == "any bytes":
        return draw(st.binary(max_size=20))
    ckpt = {**CHECKPOINT, "model": {"w": torch.arange(4.0)}}
    whole, buffer = io.BytesIO(), io.BytesIO()
    torch.save(draw(st.one_of(damaged([CHECKPOINT]), VALUES)) if how == "value" else ckpt, whole)
    if how in ("value", "bytes"):
        return draw(damaged_bytes(whole.getvalue())) if how == "bytes" else whole.getvalue()
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():  # only the pickle inside changes, its checksum is right
            content, spoilt = old.read(name), name.endswith("data.pkl")
            new.writestr(name, draw(damaged_bytes(content)) if spoilt else content)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(PROFILE, max_examples=300)
@given(content=damaged_checkpoints())
@example(content=b"(.")  # a pickle that ends with nothing on its stack
def test_any_bytes_of_a_checkpoint_are_read_or_refused(folder, content):
    path = folder / "ckpt.pt"
    path.write_bytes(content)
    try:
        assert checkpoints.KEYS <= set(load_checkpoint(path))
    except UserError as error:
        assert str(error).startswith(str(path))


CONFIGS = {"pretrain": train_pretrain, "sft": train_sft, "rm": train_rm, "dpo": train_dpo,
           "ppo": train_ppo}
NUMBERS = ["0", "1", "-1", "0.5", "1.5", "1e999", "nan", "-inf", "1_0", "9" * 30, "9" * 400,
           "9" * 5000, "", "one"]


@st.composite
def command_lines(draw):
    """A stage and a few words, most of them its options, most with a value of their type."""
    stage, words = draw(st.sampled_from(sorted(CONFIGS))), []
    fields = dataclasses.fields(CONFIGS[stage].Config)
    for _ in range(draw(st.integers(0, 3))):
        field = fields[draw(st.integers(0, len(fields) - 1))]
        name = field.name.rstrip("_")
        usual = {int: st.integers(), float: st.floats(), str: st.text(max_size=4)}.get(field.type)
        if usual is None:
            words.append(draw(st.sampled_from([f"--{name}", f"--no_{name}", f"--{name}=1"])))
        else:
            value = str(draw(st.one_of(usual, st.sampled_from(NUMBERS))))
            words += draw(st.sampled_from([[f"--{name}", value], [f"--{name}={value}"]]))
        if draw(st.integers(0, 9)) == 9:
            words.append(draw(st.sampled_from(["--help", "-h", "--", "-x", "--lr", "stray", ""])))
    return stage, words


# With one of these at 0 a script would train nothing, or divide by it, after minutes of loading.
NEVER_0 = ("n_layer", "n_head", "n_embd", "block_size", "num_steps", "num_epochs", "num_samples",
           "batch_size", "rollout_size", "minibatch_size", "max_new_tokens", "eval_every",
           "save_every", "grad_clip", "top_p")
SHARES = ("dropout", "held_out", "label_smoothing", "gamma", "lam", "top_p")


@settings(PROFILE, max_examples=250)
@given(line=command_lines())
@example(line=("sft", ["--seed", "9" * 30]))
@example(line=("sft", ["--seed", "9" * 400]))
def test_any_command_line_gives_a_sound_config_or_is_refused(line):
    stage, words = line
    try:
        cfg = parse_config(CONFIGS[stage].Config, words)
    except UserError:
        return
    except SystemExit as stop:
        assert stop.code == 0 and any(word.startswith(("-h", "--help")) for word in words)
        return
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        assert type(value) is field.type, f"{field.name} is {value!r}"
        if field.type in (int, float):
            assert math.isfinite(value), f"{field.name} is {value}"
            assert field.type is float or value < 2**63, f"{field.name} is {value}: no such tensor"
            assert value >= 0 or field.name == "missing_end_score"
            assert value > 0 or field.name not in NEVER_0
            assert value <= 1 or field.name not in SHARES


# ---------------------------------------------------------------- 5. text and chats

TRICKY = st.lists(st.one_of(
    st.text(max_size=6), st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "end", "<|endoftext|>",
                                          "\n\n", " ", "cow"])), max_size=6).map("".join)


@settings(PROFILE, max_examples=200)
@given(text=TRICKY)
def test_no_text_encodes_to_a_special_token_and_every_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert all(0 <= idx < len(TOKENIZER.ranks) for idx in ids)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode_batch([text]) == [ids]


DIALOGUES = st.builds(lambda system, turns: chat(*turns, system=system),
                      st.one_of(st.none(), TRICKY), st.lists(TRICKY, min_size=1, max_size=5))


@settings(PROFILE, max_examples=200)
@given(messages=DIALOGUES)
def test_check_14_a_chats_ids_read_back_as_its_messages_and_the_mask_as_the_answers(messages):
    """One begin token, one end token a message, and nothing in the mask but assistant's contents
    and their end tokens, whatever the users write."""
    ids, mask = TOKENIZER.encode_chat(messages)
    assert len(ids) == len(mask) and ids[0] == TOKENIZER.begin_id and not mask[0]
    assert ids.count(TOKENIZER.begin_id) == 1 and ids.count(TOKENIZER.end_id) == len(messages)
    roles = {TOKENIZER.system_id: "system", TOKENIZER.user_id: "user",
             TOKENIZER.assistant_id: "assistant"}
    read, start = [], 1
    while start < len(ids):
        end = ids.index(TOKENIZER.end_id, start)
        role = roles[ids[start]]
        read.append({"role": role, "content": TOKENIZER.decode(ids[start + 1 : end])})
        assert mask[start : end + 1] == [False] + [role == "assistant"] * (end - start)
        start = end + 1
    assert read == messages
    if messages[-1]["role"] == "user":
        assert TOKENIZER.encode_prompt(messages) == [*ids, TOKENIZER.assistant_id]


@settings(PROFILE, max_examples=100)
@given(messages=DIALOGUES, answer=TRICKY)
def test_check_13_the_mask_of_an_answer_covers_it_and_its_end_token_only(messages, answer):
    assume(messages[-1]["role"] == "user")
    ids, mask = encode_answer(TOKENIZER, messages, answer)
    prompt = TOKENIZER.encode_prompt(messages)
    assert ids == prompt + TOKENIZER.encode(answer) + [TOKENIZER.end_id]
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


# ---------------------------------------------------------------- 6. responses and their end

@settings(PROFILE, max_examples=100)
@given(prompts=PROMPTS, seed=SEEDS, flavour=st.sampled_from([*FLAVOURS]),
       max_new_tokens=st.integers(1, 20), stop_ids=st.sets(st.integers(0, 16), max_size=6),
       temperature=st.sampled_from([0, 0.3, 1.0, 4.0]), top_k=st.integers(0, 5),
       top_p=st.sampled_from([0.2, 0.9, 1.0]))
def test_check_07_nothing_comes_after_a_responses_end(prompts, seed, flavour, max_new_tokens,
                                                      stop_ids, temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(seed)
    model = wake(GPT(tiny_config(**FLAVOURS[flavour], n_layer=1, n_kv_head=2)), seed)
    rollout = generate(model, prompts, max_new_tokens, stop_ids, temperature, top_k, top_p,
                       generator)
    assert rollout.tokens.shape == (len(prompts), int(rollout.lengths.max()))
    assert rollout.prompt_lens.tolist() == [len(prompt) for prompt in prompts]
    for prompt, row, length, ended, response in zip(
            prompts, rollout.tokens.tolist(), rollout.lengths.tolist(), rollout.ended.tolist(),
            rollout.responses(), strict=True):
        limit = min(len(prompt) + max_new_tokens, 16)
        assert row == prompt + response + [0] * (len(row) - length)
        assert len(prompt) < length <= limit and len(response) == length - len(prompt)
        assert not stop_ids & set(response[:-1])
        assert ended == (response[-1] in stop_ids) and (ended or length == limit)
        assert all(0 <= idx < 17 for idx in row)


# ---------------------------------------------------------------- 7. arithmetic and bookkeeping

def eighths(*shape, generator):
    """Random multiples of 1/8: their sums and their products with 0.5 are exact in float64."""
    return torch.randint(-40, 41, shape, generator=generator).double() / 8


@settings(PROFILE, max_examples=60)
@given(batch=batches())
def test_a_responses_mask_counts_its_tokens_and_only_them(batch):
    for prompt_len, length, row in zip(batch.prompt_lens.tolist(), batch.lengths.tolist(),
                                       batch.mask.tolist(), strict=True):
        assert row == [prompt_len <= t + 1 < length for t in range(batch.T - 1)]
    assert torch.equal(batch.mask.sum(1), batch.lengths - batch.prompt_lens)


@settings(PROFILE, max_examples=60)
@given(batch=batches())
def test_check_09_and_30_a_responses_rewards_add_up_to_its_score_less_beta_times_its_kl(batch):
    kl = dirty(eighths(*batch.mask.shape, generator=batch.generator), batch.mask, batch.generator)
    scores = eighths(batch.B, generator=batch.generator)
    rewards = token_rewards(scores, kl, batch.mask, 0.5)
    assert torch.equal(rewards.sum(1), scores - 0.5 * masked_sum(kl, batch.mask, dim=1))
    assert (rewards[~batch.mask] == 0).all()


@settings(PROFILE, max_examples=60)
@given(batch=batches(), lam=st.floats(0, 1), gamma=st.floats(0, 1))
def test_check_15_advantages_and_values_add_up_to_the_reward_to_go(batch, lam, gamma):
    mask, generator = batch.mask, batch.generator
    rewards = dirty(eighths(*mask.shape, generator=generator), mask, generator)
    values = dirty(eighths(*mask.shape, generator=generator), mask, generator)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    for b in range(batch.B):
        start, end = int(batch.prompt_lens[b]) - 1, int(batch.lengths[b]) - 1
        to_go = torch.stack([rewards[b, t:end].sum() for t in range(start, end)])
        assert torch.equal(advantages[b, start:end] + values[b, start:end], to_go)
        assert torch.equal(returns[b, start:end], to_go)
    # Whatever gamma and lambda are, a return is its advantage plus its value, and filler has 0.
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    assert torch.equal(returns[mask], (advantages + values)[mask])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@settings(PROFILE, max_examples=60)
@given(batch=batches(), scale=st.sampled_from([1e-3, 1.0, 1e3]), mean=st.floats(-5, 5))
def test_check_16_whitened_numbers_have_mean_0_and_variance_1_over_the_mask(batch, scale, mean):
    mask = batch.scattered
    assume(mask.sum() > 1)
    x = (noise(*mask.shape, generator=batch.generator) + mean) * scale
    before = x[mask].var(correction=0)
    assume(before > 1e-3 * scale**2)  # less would lose digits to the mean
    expected = before / (before + 1e-8)  # 1, but for what keeps a division by 0 away
    for shift_mean in (True, False):
        whitened = masked_whiten(dirty(x, mask, batch.generator), mask, shift_mean)
        after = whitened[mask]
        torch.testing.assert_close(after.var(correction=0), expected, rtol=1e-9, atol=0)
        kept = 0.0 if shift_mean else x[mask].mean().item()
        assert abs(after.mean().item() - kept) < 1e-9 * (1 + abs(kept))
        assert (whitened[~mask] == 0).all()


@PROFILE
@given(count=st.integers(0, 150), batch_size=st.integers(1, 5), seed=SEEDS)
def test_check_32_the_batches_of_an_epoch_are_full_but_one_and_use_every_row_once(
        count, batch_size, seed):
    lengths = random.Random(seed).choices(range(1, 40), k=count)
    plan = epoch_batches(lengths, batch_size, torch.Generator().manual_seed(seed))
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    assert len(plan) == math.ceil(len(lengths) / batch_size)
    assert all(len(batch) <= batch_size for batch in plan)


@PROFILE
@given(prompts=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=20),
       share=st.floats(0, 1), seed=SEEDS)
def test_every_prompt_is_on_one_side_with_all_its_rows(prompts, share, seed):
    train, held_out = split_by_prompt(prompts, share, torch.Generator().manual_seed(seed))
    assert sorted(train + held_out) == list(range(len(prompts)))
    sides = {prompts[i] for i in train}, {prompts[i] for i in held_out}
    assert not sides[0] & sides[1]
    assert len(sides[1]) == max(1, int(share * len(set(prompts))))


@settings(PROFILE, max_examples=150)
@given(contents=st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=1,
                         max_size=7),
       answers=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=3),
       system=st.booleans(), max_len=st.integers(6, 80),
       too_long=st.sampled_from(["refuse", "drop", "cut"]))
def test_check_33_what_fits_keeps_its_answers_whole_and_whole_turns_of_its_prompt(
        contents, answers, system, max_len, too_long):
    contents = contents[: len(contents) - 1 + len(contents) % 2]  # ends with a user's turn
    messages = chat(*contents, system="Be short." if system else None)
    sizes = [len(encode_answer(TOKENIZER, messages, answer)[0]) for answer in answers]
    try:
        kept, texts, lost = fit(TOKENIZER, messages, answers, max_len, too_long, "row 1")
    except UserError:
        assert too_long == "refuse" and max(sizes) > max_len, "refused, although it fits"
        return
    if max(sizes) <= max_len:
        assert (kept, texts, lost) == (messages, answers, "")
    elif too_long == "drop":
        assert (kept, lost) == (messages, "")
        assert texts == [a if n <= max_len else None for a, n in zip(answers, sizes)]
    assert all(text in (None, answer) for text, answer in zip(texts, answers))
    fitting = [text for text in texts if text is not None]
    for text in fitting:
        assert len(encode_answer(TOKENIZER, kept, text)[0]) <= max_len
    turns = kept[kept[0]["role"] == "system":]
    question = messages[-1]["content"]
    if lost == "the beginning of the last question":
        assert len(kept) == 1 and question.strip().endswith(kept[0]["content"])
        assert all(len(encode_answer(TOKENIZER, messages[-1:], text)[0]) > max_len
                   for text in [max(fitting, key=lambda t: len(TOKENIZER.encode(t)))])
    else:
        assert turns == messages[len(messages) - len(turns):] and len(turns) % 2 == 1
        assert len(kept) - len(turns) == (system and lost != "the system turn")
