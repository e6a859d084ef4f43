"""The model: against its own slow versions, and published parameter counts."""

import dataclasses
import math
from itertools import product

import pytest
import torch
from conftest import FLAVOURS, awake_gpt, close, tiny_config, wake

from minirlhf.losses import ppo_value_loss
from minirlhf.masked import masked_mean, token_logprobs
from minirlhf.model import (GPT, SIZES, ActorCritic, ModelConfig, RMSNorm, ScalarModel, apply_rope,
                            count_parameters, fused_attention, make_norm, manual_attention,
                            named_config, rope_angles, scalar_head)

# Every way to build a block: positions x sharing of key/value heads x attention code x the rest.
COMBINATIONS = [
    dict(FLAVOURS[flavour], positions=positions, n_kv_head=n_kv_head, attention=attention)
    for flavour, positions, n_kv_head, attention
    in product(FLAVOURS, ("learned", "rope"), (4, 2, 1), ("fused", "manual"))
]
every_combination = pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(
    [o.get("mlp", "gelu"), o["positions"], f"{o['n_kv_head']}kv", o["attention"]]))


def random_ids(generator, *shape):
    return torch.randint(17, shape, generator=generator)


def test_fused_attention_equals_the_written_out_one(generator):
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=generator, dtype=torch.float64)
    triangle = torch.ones(6, 6, dtype=torch.bool).tril()
    close(fused_attention(q, k, v, None), manual_attention(q, k, v, triangle), atol=1e-13)
    # One query that may look at the first 1 (row 0) or 4 (row 1) keys.
    mask = (torch.arange(6) < torch.tensor([1, 4])[:, None])[:, None, None, :]  # (2, 1, 1, 6)
    fused = fused_attention(q[:, :, :1], k, v, mask)
    close(fused, manual_attention(q[:, :, :1], k, v, mask), atol=1e-13)
    close(fused[0, :, 0], v[0, :, 0], atol=1e-13)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_fused_and_manual_models_are_equal_in_logits_and_gradients(flavour, generator):
    idx = random_ids(generator, 2, 12)
    results = []
    for attention in ("fused", "manual"):
        model = awake_gpt(**FLAVOURS[flavour], n_kv_head=2, attention=attention)
        logits = model(idx)
        logits.logsumexp(-1).mean().backward()
        results.append([logits] + [p.grad for p in model.parameters()])
    for fused, manual in zip(*results):
        close(fused, manual, atol=1e-12)


def test_attention_by_a_loop_over_positions_and_heads(generator):
    """Softmax of q k / sqrt(head_dim) over the past, for each head by itself, in plain Python."""
    q, k, v = torch.randn(3, 1, 2, 5, 4, generator=generator, dtype=torch.float64)
    result = fused_attention(q, k, v, None)
    for h, t in product(range(2), range(5)):
        weights = [math.exp(float(q[0, h, t] @ k[0, h, s]) / 2) for s in range(t + 1)]
        expected = sum(w * v[0, h, s] for s, w in enumerate(weights)) / sum(weights)
        close(result[0, h, t], expected, atol=1e-13)


def test_grouped_heads_equal_full_heads_with_repeated_weights(generator):
    grouped, full = awake_gpt(n_kv_head=2), awake_gpt(n_kv_head=4)
    state = grouped.state_dict()
    for name in [n for n in state if ".qkv." in n]:
        q, k, v = state[name].split([16, 8, 8])
        repeat = lambda x: x.unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1)
        state[name] = torch.cat([q, repeat(k), repeat(v)])
    full.load_state_dict(state)
    idx = random_ids(generator, 2, 9)
    close(grouped(idx), full(idx), atol=1e-13)


def test_rmsnorm_by_hand():
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    rms = math.sqrt((9 + 16) / 2)
    close(norm(torch.tensor([[3.0, 4.0]])), [[3 / rms, 40 / rms]], rtol=1e-6)


def test_rmsnorm_squares_in_float32_also_where_the_model_is_in_bf16(generator):
    x = torch.randn(64, 32, generator=generator).bfloat16()
    close(RMSNorm(32, 1e-5).bfloat16()(x), RMSNorm(32, 1e-5)(x.float()).bfloat16(), rtol=0.0)


def test_the_options_of_a_norm_reach_it():
    x = torch.tensor([[3.0, 4.0]])  # mean 3.5, variance 0.25, mean square 12.5
    rms = make_norm(ModelConfig(n_embd=2, n_head=1, norm="rmsnorm", norm_eps=3.5))
    layer = make_norm(ModelConfig(n_embd=2, n_head=1, norm_eps=0.75))
    close(rms(x), [[3 / 4, 4 / 4]], rtol=1e-6)  # the root of 12.5 + 3.5 is 4
    close(layer(x), [[-0.5, 0.5]], rtol=1e-6)  # that of 0.25 + 0.75 is 1


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_without_bias_there_is_none_anywhere(flavour):
    names = [name for name, _ in GPT(tiny_config(**{**FLAVOURS[flavour], "bias": False})
                                     ).named_parameters()]
    assert names and not any(name.endswith("bias") for name in names)


def test_rope_by_hand_and_relative(generator):
    cos, sin = rope_angles(torch.arange(8), 4, 100.0, torch.float64)  # angles p * 1 and p * 1/10
    x = torch.tensor([[[[1.0, 0.0, 0.0, 2.0]]]], dtype=torch.float64)  # pairs (1, 0) and (0, 2)
    close(apply_rope(x, cos[3], sin[3])[0, 0, 0],
          [math.cos(3), -2 * math.sin(0.3), math.sin(3), 2 * math.cos(0.3)])
    close(apply_rope(x, cos[0], sin[0]), x)
    # A query and a key meet the same way wherever they stand, if their distance is the same.
    q, k = torch.randn(2, 1, 1, 1, 4, generator=generator, dtype=torch.float64)
    meet = lambda m, n: (apply_rope(q, cos[m], sin[m]) * apply_rope(k, cos[n], sin[n])).sum()
    close(meet(5, 2), meet(7, 4))
    assert abs(meet(5, 2) - meet(5, 3)) > 1e-3


# ---------------------------------------------------------------- causality, padding, the cache

@every_combination
def test_causal_a_token_changes_nothing_before_it(options, generator):
    model, idx = awake_gpt(**options), random_ids(generator, 2, 10)
    before = model(idx)
    idx[:, 6] = (idx[:, 6] + 1) % 17
    after = model(idx)
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before - after)[:, 6:].abs().amax((0, 2)) > 1e-6).all()


@every_combination
def test_check_01_padding_content_changes_nothing(options, generator):
    """The bug: filler that is read, in logits or in gradients. Not even the last bit may change."""
    lengths = torch.tensor([4, 9])
    mask = torch.arange(1, 9) < lengths[:, None]  # (2, 8)
    model = awake_gpt(**options).float()
    idx, results = random_ids(generator, 2, 9), []
    for filler in (0, 5, 16):
        idx[0, 4:] = filler
        model.zero_grad()
        logprobs = token_logprobs(model(idx)[:, :-1], idx[:, 1:])
        loss = masked_mean(logprobs, mask)
        loss.backward()
        results.append([logprobs[mask], loss] + [p.grad.clone() for p in model.parameters()])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@every_combination
def test_check_01_padding_amount_changes_nothing(options, generator):
    """The bug: positions, or anything else, that depend on how wide the batch happens to be."""
    model, idx = awake_gpt(**options), random_ids(generator, 1, 5)
    wide = torch.cat([idx, torch.zeros(1, 9, dtype=torch.int64)], dim=1)
    close(model(wide)[:, :5], model(idx), rtol=1e-12, atol=1e-12)


@every_combination
def test_check_02_cached_equals_uncached_for_ragged_prompts(options, generator):
    """The bugs: `is_causal=True` with one query, which shows it key 0 alone; one position for all
    rows of a ragged batch; keys of filler that are seen; a row's cache left behind when rows go."""
    model = awake_gpt(**options)
    lengths, T = torch.tensor([1, 4, 7]), 12
    texts = random_ids(generator, 3, T)
    full = model(texts)  # (3, T, V)
    prompts = texts[:, :7].clone()
    prompts[torch.arange(7) >= lengths[:, None]] = 0
    cache = model.make_cache(3, T)
    logits = model(prompts, cache)  # the prefill
    rows = torch.arange(3)
    close(logits[rows, lengths - 1], full[rows, lengths - 1], atol=1e-12)
    for step in range(5):
        if step == 3:  # the middle row has ended
            keep = torch.tensor([True, False, True])
            cache.keep_rows(keep)
            rows = rows[keep]
        where = lengths[rows] + step  # every row at a position of its own
        logits = model(texts[rows, where][:, None], cache, positions=where)
        close(logits[:, 0], full[rows, where], atol=1e-12)


def test_check_03_dropout_acts_in_training_mode_only(generator):
    """The bug: dropout during a rollout or scoring, so the ratio is noise."""
    for attention in ("fused", "manual"):
        model = wake(GPT(tiny_config(dropout=0.5, attention=attention)))
        plain = wake(GPT(tiny_config(attention=attention)))
        idx = random_ids(generator, 2, 8)
        assert not torch.equal(model.train()(idx), model(idx))
        assert torch.equal(model.eval()(idx), plain(idx))


@pytest.mark.parametrize("attention", [manual_attention, fused_attention])
def test_dropout_acts_on_the_attention_weights(attention):
    q = k = v = torch.ones(100, 10, 1, 1)  # one key: its weight is 1
    y = attention(q, k, v, torch.ones(1, 1, dtype=torch.bool), 0.2)
    close(y.unique(), [0.0, 1.25], rtol=1e-6)
    assert 0.7 < (y > 0).float().mean() < 0.9


@pytest.mark.parametrize("attention", ["manual", "fused"])
def test_dropout_acts_in_each_of_its_places(attention, generator):
    """Embeddings, attention weights, attention's output, the MLP's output (as in GPT-2)."""
    plain = wake(GPT(tiny_config(attention=attention))).eval().trunk
    trunk = wake(GPT(tiny_config(attention=attention, dropout=0.5))).train().trunk
    x = torch.randn(400, 1, 16, generator=generator).to(plain.wte.weight.dtype)
    mlp, expected = trunk.blocks[0].mlp(x), 2 * plain.blocks[0].mlp(x)
    close(mlp, torch.where(mlp == 0, 0, expected))
    assert 0.4 < (mlp == 0).float().mean() < 0.6

    for block in (trunk.blocks[0], plain.blocks[0]):  # heads side by side, not mixed
        block.attn.proj.weight.data.copy_(torch.eye(16))
        block.attn.proj.bias.data.zero_()
    att, expected = trunk.blocks[0].attn(x), 4 * plain.blocks[0].attn(x)
    close(att, torch.where(att == 0, 0, expected))
    assert 0.7 < (att == 0).float().mean() < 0.8  # one of two weights, one of two outputs

    for layers in (trunk, plain):
        layers.blocks, layers.norm_f = torch.nn.ModuleList(), torch.nn.Identity()
    idx = random_ids(generator, 40, 8)
    embedded = trunk(idx)
    close(embedded, torch.where(embedded == 0, 0, 2 * plain(idx)))
    assert 0.4 < (embedded == 0).float().mean() < 0.6


def test_check_04_two_forward_passes_give_the_same_bits(generator):
    """The bug: a ratio that is not 1 before the first update."""
    model, idx = awake_gpt().float().train(), random_ids(generator, 4, 10)
    with torch.no_grad():
        first = token_logprobs(model(idx)[:, :-1], idx[:, 1:])
    second = token_logprobs(model(idx)[:, :-1], idx[:, 1:])
    assert torch.equal((second - first).exp(), torch.ones_like(first))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_bf16_autocast_comes_near_float32_forward_backward_and_with_the_cache(flavour, generator):
    """Within 10%: eight bits, rounded in each of two layers. Another position would be 100% off."""
    model = awake_gpt(**FLAVOURS[flavour], n_kv_head=2).float()
    idx = random_ids(generator, 2, 8)
    rows = [torch.cat([idx[0], idx[0, :1]]), torch.cat([idx[1, :3], idx[1, :1]])]
    targets, every = idx.roll(-1, 1), torch.ones(2, 8, dtype=torch.bool)

    def results(logits, step):
        loss = -masked_mean(token_logprobs(logits, targets), every)
        return [logits.float(), step.float(), *torch.autograd.grad(loss, model.parameters())]

    exact = results(model(idx), torch.stack([model(row[None])[0, -1] for row in rows]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, cache = model(idx), model.make_cache(2, 9)
        with torch.no_grad():
            model(idx, cache)
            step = model(idx[:, :1], cache, positions=torch.tensor([8, 3]))[:, 0]
    assert logits.dtype == step.dtype == torch.bfloat16
    for near, number in zip(results(logits, step), exact, strict=True):
        assert near.dtype == torch.float32
        assert 0 < (near - number).norm() < 0.1 * number.norm()


# ---------------------------------------------------------------- sizes and initialisation

@pytest.mark.parametrize("name, count", [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
    ("gpt2-xl", 1_557_611_200), ("llama2-7b", 6_738_415_616), ("llama2-13b", 13_015_864_320),
    ("llama2-70b", 68_976_648_192),
    ("gpt1", 116_534_784 + 2 * 768),  # the published weights, and the one final LayerNorm more
])
def test_parameter_counts_of_published_weights(name, count):
    assert count_parameters(named_config(name)) == count


def test_parameter_count_of_llama2_34b_by_formula():
    C, hidden, D, V = 8192, 22016, 128, 32000
    block = 2 * C * C + 2 * C * 8 * D + 3 * C * hidden + 2 * C  # q, proj; k, v; MLP; two norms
    assert count_parameters(named_config("llama2-34b")) == 48 * block + 2 * V * C + C


@pytest.mark.parametrize("name, millions", [
    ("gpt1", 117), ("gpt3-125m", 125), ("gpt3-350m", 350), ("gpt3-760m", 760), ("gpt3-1.3b", 1300),
    ("gpt3-2.7b", 2700), ("gpt3-6.7b", 6700), ("gpt3-13b", 13000), ("gpt3-175b", 175000)])
def test_parameter_counts_near_the_papers_rounded_ones(name, millions):
    assert count_parameters(named_config(name)) == pytest.approx(millions * 1e6, rel=0.05)


def test_heads_and_contexts_of_the_named_sizes():
    """Parameter counts don't see them. GPT-3: arXiv 2005.14165, Table 2.1; see SIZES on 1.3B."""
    head_dims = {"gpt3-760m": 96, "gpt3-1.3b": 128, "gpt3-2.7b": 80, "gpt3-6.7b": 128,
                 "gpt3-13b": 128, "gpt3-175b": 128}
    contexts = {"gpt1": 512, "gpt2": 1024, "gpt3": 2048, "llama2": 4096}
    for name in SIZES:
        cfg, family = named_config(name), name.split("-")[0]
        head_dim = 128 if family == "llama2" else head_dims.get(name, 64)
        assert cfg.n_embd == head_dim * cfg.n_head and cfg.block_size == contexts[family], name


def test_every_named_size_is_tested_above():
    assert len(SIZES) == 17
    with pytest.raises(ValueError, match="gpt2-huge.*gpt2-xl"):
        named_config("gpt2-huge")


def test_scaled_initialisation():
    model = GPT(ModelConfig(n_layer=8, n_embd=256, n_head=4, vocab_size=500))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:  # what adds to the residual stream, twice in each of 8 blocks, starts smaller
            small = name.endswith(("attn.proj.weight", "mlp.down.weight"))
            assert p.std().item() == pytest.approx(0.02 / 4 if small else 0.02, rel=0.05), name


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_new_model_guesses_uniformly(flavour, generator):
    model = GPT(tiny_config(**FLAVOURS[flavour]))
    idx = random_ids(generator, 4, 16)
    loss = -token_logprobs(model(idx)[:, :-1], idx[:, 1:]).mean()
    assert loss.item() == pytest.approx(math.log(17), abs=0.05)


def test_a_tied_head_is_one_tensor_and_an_untied_one_two():
    tied, untied = GPT(tiny_config()), GPT(tiny_config(tied=False))
    assert tied.lm_head.weight is tied.trunk.wte.weight
    assert untied.lm_head.weight is not untied.trunk.wte.weight
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(untied) - count(tied) == 17 * 16


@pytest.mark.parametrize("options, message", [
    (dict(norm="batchnorm"), "norm is 'batchnorm'"), (dict(mlp="relu"), "mlp is 'relu'"),
    (dict(positions="none"), "positions is 'none'"), (dict(attention="flash"), "'flash'"),
    (dict(n_embd=18), "multiple of n_head"), (dict(n_kv_head=3), "n_kv_head 3")])
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="17 tokens does not fit block_size 16"):
        awake_gpt()(torch.zeros(1, 17, dtype=torch.int64))


# ---------------------------------------------------------------- heads

def test_check_34_new_heads_start_at_zero_and_learn(generator):
    """The bug: a new head that starts with random opinions, or one that gets no gradient."""
    idx, mask = random_ids(generator, 2, 6), torch.ones(2, 6, dtype=torch.bool)
    policy = awake_gpt().float()
    scalar, shared = ScalarModel(policy.cfg, policy.trunk), ActorCritic(policy)
    for values, head in ((scalar(idx), scalar.head), (shared(idx)[1], shared.value_head)):
        assert values.shape == (2, 6) and (values == 0).all()
        ppo_value_loss(values, values.detach(), torch.ones(2, 6), mask)[0].backward()
        assert (head.weight.grad != 0).any() and (head.bias.grad != 0).all()


def test_check_34_the_same_seed_gives_the_same_new_model():
    """The bug: a head drawn outside the seed's reach, so that two runs differ."""
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(ScalarModel(tiny_config()).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_check_19_a_scalar_model_copies_the_trunk(generator):
    """The bug: a reward model or critic that shares memory with the policy and drifts with it."""
    policy = awake_gpt()
    critic = ScalarModel(policy.cfg, policy.trunk)
    theirs = {p.data_ptr() for p in policy.parameters()}
    assert not theirs & {p.data_ptr() for p in critic.parameters()}
    idx = random_ids(generator, 2, 6)
    close(critic.trunk(idx), policy.trunk(idx))


def scalar_model():
    return wake(ScalarModel(tiny_config()).double()).eval()


def test_check_12_the_score_is_read_at_each_rows_last_real_token(generator):
    """The bug: reading column -1, which is filler for all but the longest row."""
    model = scalar_model()
    lengths = torch.tensor([3, 9, 1])
    idx = random_ids(generator, 3, 9)
    alone = torch.stack([model.raw(idx[b : b + 1, :n])[0, -1] for b, n in enumerate(lengths)])
    close(model.score(idx, lengths), alone, atol=1e-12)
    idx[torch.arange(9) >= lengths[:, None]] = 0
    close(model.score(idx, lengths), alone, atol=1e-12)


def test_a_score_is_computed_in_float32_also_under_autocast(generator):
    head, h = torch.nn.Linear(16, 1), torch.randn(2, 5, 16, generator=generator).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scalar_head(head, h)
    assert scores.dtype == torch.float32
    close(scores, scalar_head(head, h.float()), rtol=1e-6)


def test_a_scalar_model_speaks_in_normalised_units(generator):
    model, idx = scalar_model(), random_ids(generator, 2, 6)
    model.score_mean.fill_(2.0)
    for deviation in (4.0, 1 / 256):  # however small
        model.score_std.fill_(deviation)
        close(model(idx), (model.raw(idx) - 2) / deviation)


def test_check_34_a_critic_keeps_the_reward_models_head_and_normalisation():
    """The bug: a critic made from the reward model loses score_mean and score_std on the way,
    because they are not in the state dict, and starts in other units than its targets."""
    reward_model = scalar_model()
    reward_model.score_mean.fill_(2.0)
    reward_model.score_std.fill_(4.0)
    critic = ScalarModel(reward_model.cfg).double()
    critic.load_state_dict(reward_model.state_dict())
    idx = torch.arange(6)[None]
    close(critic(idx), reward_model(idx))


def test_an_actor_with_a_separate_critic_is_the_two_models(generator):
    policy, critic = awake_gpt(), scalar_model()
    idx = random_ids(generator, 2, 6)
    logits, values = ActorCritic(policy, critic)(idx)
    assert torch.equal(logits, policy(idx)) and torch.equal(values, critic(idx))
    values.sum().backward()
    assert all(p.grad is None for p in policy.parameters())


def test_an_actor_with_a_shared_critic_adds_one_head(generator):
    policy = awake_gpt()
    shared = ActorCritic(policy).double()
    added = {name for name, _ in shared.named_parameters() if not name.startswith("policy.")}
    assert added == {"value_head.weight", "value_head.bias"}
    wake(shared.value_head)
    idx = random_ids(generator, 2, 6)
    logits, values = shared(idx)
    close(logits, policy(idx))
    close(values, shared.value_head(policy.trunk(idx))[..., 0])
    values.sum().backward()
    assert (policy.trunk.wte.weight.grad != 0).any()  # the values' loss reaches the policy's trunk


# ---------------------------------------------------------------- where a model starts

def test_an_untied_head_starts_as_small_as_an_embedding():
    """Bug: PyTorch's own initialisation, here nearly twice as wide: surer than a new model is."""
    model = GPT(ModelConfig(n_layer=1, n_embd=256, n_head=4, vocab_size=500, tied=False))
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_what_is_not_asked_for_is_gpt2():
    """Bug: a default that moves. Nothing else would notice: a checkpoint lists every option, but
    `SIZES` and every test's model leave most of them out.

    GPT-2's own (its repository's model.py): eps 1e-5, biases, tanh-GELU of width 4 n_embd, learned
    positions, one matrix for embedding and unembedding; dropout only where it is asked for.
    """
    cfg = ModelConfig(n_embd=64, n_head=8)
    assert dataclasses.asdict(cfg) == dict(
        vocab_size=1024, block_size=192, n_layer=4, n_head=8, n_kv_head=8, n_embd=64, n_hidden=256,
        norm="layernorm", norm_eps=1e-5, mlp="gelu", positions="learned", rope_theta=10000.0,
        bias=True, tied=True, dropout=0.0, attention="fused")
    assert (ModelConfig().n_head, ModelConfig().n_embd) == (4, 128)
    # Llama 2's weights were made with the same eps and base (its params.json).
    llama = named_config("llama2-7b")
    assert (llama.norm_eps, llama.rope_theta, llama.dropout) == (1e-5, 10000.0, 0.0)


def test_rotary_angles_have_the_published_base_unless_told_otherwise():
    """RoFormer's 10000 (arXiv 2104.09864): of head size 4 the slower pair turns by 1/100."""
    model = awake_gpt(positions="rope", n_layer=1)
    cos, _ = rope_angles(torch.arange(2), 4, model.cfg.rope_theta, torch.float64)
    close(cos[1], [math.cos(1), math.cos(0.01)] * 2)
    idx = torch.arange(10)[None]
    other = GPT(tiny_config(positions="rope", n_layer=1, rope_theta=500.0)).double().eval()
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(model(idx), other(idx))  # and the model reads it


def test_fused_attention_computes_in_float32_on_a_cpu_also_under_autocast(generator):
    """Bug: bf16 attention on a CPU, whose backward pass is ten times slower there, and coarser."""
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=generator)
    plain = fused_attention(q, k, v, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_attention(q, k, v, None)
        rounded = fused_attention(*(x.bfloat16() for x in (q, k, v)), None)
    assert torch.equal(found, plain) and rounded.dtype == torch.float32
