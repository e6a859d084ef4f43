"""Every number against an oracle: other people's libraries, finite differences, enumeration of all
that can happen, closed forms. The table "Checked against" of docs/tests.md is measured here.

The error is max |a - b| / max |b| everywhere. Float64 has to come within 1e-9, float32 within 1e-5,
finite differences within 1e-6.
"""

import contextlib
import inspect
import math
import random
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.overrides import TorchFunctionMode

import evaluate
import train_dpo
import train_ppo
import train_rm
import train_sft
from tiny_road import ppo_loss
from conftest import FLAVOURS, awake_gpt, tiny_config, wake
from minirlhf.batches import pad_right, response_mask, shifted_mask
from minirlhf.generate import Rollout, generate
from minirlhf.losses import dpo_loss, ppo_policy_loss, ppo_value_loss, reward_model_loss, sft_loss
from minirlhf.masked import masked_whiten
from minirlhf.model import ActorCritic, ScalarModel
from minirlhf.rl import gae, kl_estimate
from minirlhf.tokenizer import Tokenizer, merge_pair
from minirlhf.plumbing.optim import lr_at, make_optimizer
from minirlhf.plumbing.judges import load_function
import parity as parity_table
from parity import PAGE, Row, find_fault, find_orphans, read_table, relative_error, with_table
from parity import parity  # noqa: F401  (a fixture: tests ask for it by its name)

EXACT, SINGLE, FINITE = 1e-9, 1e-5, 1e-6  # float64, float32, finite differences


def run_with(end_id, generator=None):
    """All that the scripts' functions ask of a run, without a folder or a checkpoint."""
    return SimpleNamespace(autocast=contextlib.nullcontext, device=torch.device("cpu"),
                           generator=generator, tokenizer=SimpleNamespace(end_id=end_id))


RUN = run_with(end_id=4)


class Float64(TorchFunctionMode):
    """Whoever asks for float32 gets float64.

    Hugging Face computes RMSNorm, RoPE and the loss in float32 even in a float64 model, and
    train_ppo.py scores logits in float32. This widens their own code, instead of replacing it by
    ours, which would then be compared with itself.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = lambda x: torch.float64 if x is torch.float32 else x
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- transformers

def their_layout(ours, get):
    """{transformers' parameter: get(our parameter), cut and turned as theirs is}."""
    trunk, names = ours.trunk, {}
    if ours.cfg.norm == "layernorm":
        names = {"wte.weight": get(trunk.wte.weight), "wpe.weight": get(trunk.wpe.weight),
                 "ln_f.weight": get(trunk.norm_f.weight), "ln_f.bias": get(trunk.norm_f.bias)}
        for i, block in enumerate(trunk.blocks):
            for key, layer in (("attn.c_attn", block.attn.qkv), ("attn.c_proj", block.attn.proj),
                               ("mlp.c_fc", block.mlp.up), ("mlp.c_proj", block.mlp.down)):
                names[f"h.{i}.{key}.weight"] = get(layer.weight).T
                names[f"h.{i}.{key}.bias"] = get(layer.bias)
            for key, norm in (("ln_1", block.norm1), ("ln_2", block.norm2)):
                names[f"h.{i}.{key}.weight"] = get(norm.weight)
                names[f"h.{i}.{key}.bias"] = get(norm.bias)
        return {f"transformer.{key}": value for key, value in names.items()}
    names = {"model.embed_tokens.weight": get(trunk.wte.weight),
             "model.norm.weight": get(trunk.norm_f.weight)}
    if not ours.cfg.tied:
        names["lm_head.weight"] = get(ours.lm_head.weight)
    D = ours.cfg.n_embd // ours.cfg.n_head
    for i, block in enumerate(trunk.blocks):
        q, k, v = get(block.attn.qkv.weight).split(
            [ours.cfg.n_embd, ours.cfg.n_kv_head * D, ours.cfg.n_kv_head * D])
        for key, value in (
            ("self_attn.q_proj", q), ("self_attn.k_proj", k), ("self_attn.v_proj", v),
            ("self_attn.o_proj", get(block.attn.proj.weight)),
            ("mlp.gate_proj", get(block.mlp.gate.weight)),
            ("mlp.up_proj", get(block.mlp.up.weight)),
            ("mlp.down_proj", get(block.mlp.down.weight)),
            ("input_layernorm", get(block.norm1.weight)),
            ("post_attention_layernorm", get(block.norm2.weight)),
        ):
            names[f"model.layers.{i}.{key}.weight"] = value
    return names


def twin(ours):
    """transformers' own model with our weights, in float64."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    cfg = ours.cfg
    if cfg.norm == "layernorm":
        theirs = GPT2LMHeadModel(GPT2Config(
            vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd,
            n_layer=cfg.n_layer, n_head=cfg.n_head, n_inner=cfg.n_hidden))
    else:
        theirs = LlamaForCausalLM(LlamaConfig(
            vocab_size=cfg.vocab_size, max_position_embeddings=cfg.block_size,
            hidden_size=cfg.n_embd, num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
            num_key_value_heads=cfg.n_kv_head, intermediate_size=cfg.n_hidden,
            rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tied,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}))
    theirs = theirs.double().eval()
    weights, parameters = their_layout(ours, lambda p: p.detach()), dict(theirs.named_parameters())
    assert weights.keys() == parameters.keys()
    with torch.no_grad():
        for name, p in parameters.items():
            assert p.shape == weights[name].shape, name
            p.copy_(weights[name])
    return theirs


def gpt2_models(std=0.2):
    """std: of the weights. Larger random ones would amplify Hugging Face's float32 rounding."""
    return [wake(awake_gpt(block_size=48, attention=attention), std=std)
            for attention in ("fused", "manual")]


def llama_models(std=0.2):
    """Grouped heads, a tied and an untied head, the two usual RoPE thetas."""
    return [wake(awake_gpt(block_size=48, **{**FLAVOURS["llama"], "tied": tied}, n_kv_head=2,
                           rope_theta=theta), std=std)
            for tied, theta in product((False, True), (10_000.0, 500_000.0))]


def both_logits(models, generator, dtype=torch.float64, widen=False):
    """Our logits and transformers', each a list with one (B, T, V) a model."""
    idx = torch.randint(17, (2, 40), generator=generator)
    results = [], []
    with torch.no_grad():
        for ours in models:
            with Float64() if widen else contextlib.nullcontext():
                theirs = twin(ours).to(dtype)(idx).logits
            results[0].append(ours.to(dtype)(idx))
            results[1].append(theirs)
    return results


def test_gpt2_logits_equal_transformers(parity, generator):
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        parity(f"GPT-2 logits, {str(dtype)[6:]}", "transformers",
               *both_logits(gpt2_models(), generator, dtype), tolerance)


def test_llama_logits_equal_transformers(parity, generator):
    """Grouped heads, tied and untied, two RoPE thetas."""
    parity("Llama logits, float64", "transformers, widened to float64 throughout",
           *both_logits(llama_models(), generator, widen=True), EXACT)
    parity("Llama logits, float64", "transformers, whose norms and RoPE are in float32",
           *both_logits(llama_models(), generator), 1e-6)
    parity("Llama logits, float32", "transformers",
           *both_logits(llama_models(), generator, torch.float32), SINGLE)


def test_greedy_answers_equal_transformers(parity):
    """Theirs pads on the left and masks, ours does neither."""
    prompts = [[3], [1, 2, 3, 4, 5, 6], [7, 8, 9], [2, 2], [11, 0, 0], [5, 16, 4, 1]]
    stop = [14]
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])  # (B, width)
    real = torch.arange(width) >= width - torch.tensor([[len(p)] for p in prompts])  # (B, width)
    actual, expected = [], []
    for ours in gpt2_models(0.5) + llama_models(0.5):  # weights for lively answers
        rollout = generate(ours, prompts, 24, stop, temperature=0)
        theirs = twin(ours).generate(padded, attention_mask=real.long(), do_sample=False,
                                     max_new_tokens=24, eos_token_id=stop, pad_token_id=0)
        actual.append(rollout.tokens)
        expected.append(torch.zeros_like(rollout.tokens))  # laid out as ours: filler comes last
        for row, prompt, answer in zip(expected[-1], prompts, theirs[:, width:].tolist()):
            ends = [t + 1 for t, idx in enumerate(answer) if idx in stop]
            text = prompt + answer[: min(ends, default=24)]
            row[: len(text)] = torch.tensor(text)
        assert 0 < rollout.ended.sum() < len(prompts)  # else one way to stop was not compared
    parity("greedy answers to prompts of unequal length", "transformers, left padding",
           actual, expected, 0)


def test_sft_loss_and_gradients_equal_transformers(parity, generator):
    rows = [torch.randint(17, (n,), generator=generator).tolist() for n in (20, 7, 13)]
    trained = [torch.rand(len(row), generator=generator) < 0.5 for row in rows]
    tokens, _ = pad_right(rows)  # (B, T)
    mask = shifted_mask([m.tolist() for m in trained], tokens.shape[1])  # (B, T-1)
    labels = torch.full_like(tokens, -100)
    labels[:, 1:][mask] = tokens[:, 1:][mask]
    actual, expected = [], []
    for ours in gpt2_models() + llama_models():
        loss = train_sft.loss_of(ours, {"tokens": tokens, "mask": mask}, None)[0] / mask.sum()
        loss.backward()
        with Float64():
            theirs = twin(ours)
            their_loss = theirs(tokens, labels=labels).loss
        their_loss.backward()
        gradients = their_layout(ours, lambda p: p.grad)
        actual += [loss, *gradients.values()]
        expected += [their_loss, *(theirs.get_parameter(name).grad for name in gradients)]
    parity("SFT loss and the gradient of every parameter", "transformers, labels -100",
           actual, expected, EXACT)


# ---------------------------------------------------------------- tokenizers

TEXTS = [
    "The small cat doesn't know 1987 words, but it'll learn them: 3.14!",
    "Où dort le café ? Die Straße führt über den Fluß.", "Η γάτα κοιμάται στο σπίτι.",
    "Маленькая кошка спит дома.", "القطة الصغيرة تنام في البيت.", "छोटी बिल्ली घर में सो रही है।",
    "小猫在家里睡觉。", "小さな猫は家で寝ています。ネコです。", "작은 고양이가 집에서 자고 있어요.",
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽 ❤️\u200d🔥", "e\u0301 n\u0303 a\u0308\u0323 Z\u0337\u0303",
    "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # 1e-10\n\n\n",
    "a" + " " * 300 + "b\n\n\n\t\t c \r\n\u3000\u00a0\u2003 d" + " " * 64 + "e" + " " * 65,
]


def random_text(rng):
    """Up to 40 characters, of each of four kinds about equally many."""
    known = "".join(TEXTS)
    odd = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2000\u200b\u2028\u3000"
    kinds = (lambda: chr(rng.randrange(0xD800)), lambda: chr(rng.randrange(0xE000, 0x110000)),
             lambda: rng.choice(known), lambda: rng.choice(odd))
    return "".join(rng.choice(kinds)() for _ in range(rng.randrange(1, 41)))


def byte_level_bpe(ours):
    """The tokenizers library's BPE with the merges that made our vocabulary.

    That library writes a byte as a visible character: itself, or the next free one from 256 on.
    """
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Theirs

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    letter = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    spell = lambda token: "".join(letter[b] for b in token)
    pairs = []
    for token in ours.ranks[256:]:
        # The older merges leave exactly two pieces of a token: those that its own merge joined.
        word = list(token)
        for older, pair in enumerate(pairs, start=256):
            word = merge_pair(word, pair, older)
        assert len(word) == 2, token
        pairs.append(tuple(word))
    merges = [(spell(ours.ranks[left]), spell(ours.ranks[right])) for left, right in pairs]
    theirs = Theirs(models.BPE({spell(token): i for i, token in enumerate(ours.ranks)}, merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(ours.pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return theirs


def test_token_ids_equal_tokenizers(parity):
    rng = random.Random(0)
    texts = TEXTS + [random_text(rng) for _ in range(4000)]
    ours = Tokenizer.train(TEXTS * 2, 500)
    theirs = [encoded.ids for encoded in byte_level_bpe(ours).encode_batch(texts)]
    different = [text for text, ids in zip(texts, theirs) if ours.encode(text) != ids]
    assert not different, different[:3]
    joined = lambda lists: torch.tensor([idx for ids in lists for idx in ids])
    parity("ids of text in many scripts and of random Unicode", "tokenizers' BPE, same merges",
           joined(map(ours.encode, texts)), joined(theirs), 0)


# ---------------------------------------------------------------- finite differences

def derivatives(loss_of, params, directions, h):
    """Derivatives of loss_of() along directions (n, P) in the space of all params: those of
    autograd and central differences, each (n,)."""
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_of(), params)])  # (P,)
    start, central = parameters_to_vector(params).detach().clone(), []
    with torch.no_grad():
        for direction in directions:
            ends = []
            for step in (h, -h):
                vector_to_parameters(start + step * direction, params)
                ends.append(loss_of())
            central.append((ends[0] - ends[1]) / (2 * h))
        vector_to_parameters(start, params)
    return directions @ gradient, torch.stack(central)


def along_random_directions(loss_of, model, generator):
    """The same along 20 random directions of length 1 through all of a model's parameters."""
    params = list(model.parameters())
    directions = draw(generator, 20, sum(p.numel() for p in params))
    directions = directions / directions.norm(dim=1, keepdim=True)
    return derivatives(loss_of, params, directions, h=1e-5)


def test_every_loss_passes_gradcheck(parity, generator):
    """Ragged rows, ties, absent answers, margins, smoothing; clips on both sides of their kinks."""
    mask = torch.arange(8) < torch.tensor([[5], [8]])  # (2, 8)
    old, new, advantages, returns, move, value_move = draw(generator, 6, 2, 8)
    near, values = old + 0.3 * move, new + 0.3 * value_move
    ratio = (near - old).exp()
    kinks = torch.stack([ratio - 0.8, ratio - 1.2, new - values - 0.2, new - values + 0.2])
    assert kinks[:, mask].abs().min() > 1e-3  # across a kink a difference means nothing
    clipped = (ppo_policy_loss(near, old, advantages, mask)[1]["clip_frac"],
               ppo_value_loss(new, values, returns, mask)[1]["value_clip_frac"])
    assert all(0 < share < 1 for share in clipped)
    ranks = torch.tensor([[0, 1, 2, 2], [1, 0, -1, 0], [0, 1, -1, -1]])
    margins = draw(generator, 3, 4, 4).abs()
    cases = [
        (new, lambda x: sft_loss(x, mask)),
        (draw(generator, 3, 4), lambda x: reward_model_loss(x, ranks, margins)),
        (near, lambda x: ppo_policy_loss(x, old, advantages, mask)[0]),
        (new, lambda x: ppo_value_loss(x, values, returns, mask)[0]),
        (old, lambda x: dpo_loss(x[0], x[1], new[0], new[1], 0.3, 0.1)[0]),
    ]
    actual, expected = [], []
    for x, loss in cases:
        x = x.clone().requires_grad_()
        assert gradcheck(loss, x, rtol=FINITE, atol=1e-9)
        pair = derivatives(lambda: loss(x).sum(), [x], torch.eye(x.numel()).double(), h=1e-6)
        actual.append(pair[0])
        expected.append(pair[1])
    parity("gradients of all five losses", "torch.autograd.gradcheck, central differences",
           actual, expected, FINITE)


def random_rows(generator, lengths):
    """[(ids, mask)], as the scripts encode: the last four tokens are the answer."""
    return [(torch.randint(17, (n,), generator=generator).tolist(), [False] * (n - 4) + [True] * 4)
            for n in lengths]


def test_sft_gradient_equals_differences(parity, generator):
    model = awake_gpt()
    batch = train_sft.make_batch(random_rows(generator, (12, 7, 9)), RUN.device)
    parity("SFT loss through a model, 20 directions", "central differences",
           *along_random_directions(lambda: train_sft.loss_of(model, batch, None)[0] / 12, model,
                                    generator), FINITE)


def test_reward_model_gradient_equals_differences(parity, generator):
    model, cfg = wake(ScalarModel(tiny_config()).double()), train_rm.Config(margin=1.5)
    ids = [ids for ids, _ in random_rows(generator, (12, 7, 9, 5, 8))]
    batch = train_rm.make_batch(
        [{"ids": ids[:3], "ranks": [0, 1, 1], "grades": [[0, 3, 1], [0, 0, 0], [0, 0, 0]],
          "prompt_len": 3},
         {"ids": ids[3:], "ranks": [1, 0], "grades": None, "prompt_len": 3}], RUN.device)
    parity("reward-model loss through a model, 20 directions", "central differences",
           *along_random_directions(lambda: train_rm.loss_of(model, batch, cfg)[0].mean(), model,
                                    generator), FINITE)


def test_ppo_gradients_equal_differences(parity, generator):
    """After a rollout policy and critic move, until some tokens are clipped and others are not."""
    cfg = train_ppo.Config(temperature=0.7, max_new_tokens=6, beta=0.3)
    policy, critic = awake_gpt(), wake(ScalarModel(tiny_config()).double(), seed=3, std=0.3)
    actor = ActorCritic(policy, critic)
    run = run_with(end_id=12, generator=generator)
    prompts = [ids for ids, _ in random_rows(generator, (5, 7, 4, 6))]
    with Float64():
        rollout = train_ppo.collect_rollout(actor, awake_gpt(), critic, prompts, cfg.beta, cfg, run)
        with torch.no_grad():
            for model, size in ((policy, 0.02), (critic, 0.1)):
                for p in model.parameters():
                    p += size * draw(generator, *p.shape)
        assert 0 < rollout["ended"].sum() < 4
        count = rollout["response_mask"].sum()
        loss = lambda: ppo_loss(actor, rollout, [0, 1, 2, 3], count, run, cfg)
        assert all(0.1 < loss()[1][name] < 0.9 for name in ("clip_frac", "value_clip_frac"))
        # The critic shares nothing with the policy, so each loss has its own model's parameters.
        for name, model in (("policy", policy), ("value", critic)):
            parity(f"PPO's {name} loss through a model, 20 directions", "central differences",
                   *along_random_directions(lambda: loss()[0], model, generator), FINITE)


def test_dpo_gradient_equals_differences(parity, generator):
    model, cfg = awake_gpt(), train_dpo.Config(beta=0.3, label_smoothing=0.1)
    rows = random_rows(generator, (12, 7, 9, 9, 10, 8))
    pairs = [{"chosen": rows[i], "rejected": rows[i + 3], "ref_chosen_logp": -9.0 + i,
              "ref_rejected_logp": -8.0} for i in range(3)]
    batch = train_dpo.make_batch(pairs, RUN.device)
    parity("DPO loss through a model, 20 directions", "central differences",
           *along_random_directions(lambda: train_dpo.loss_of(model, batch, cfg)[0].mean(),
                                    model, generator), FINITE)


# ---------------------------------------------------------------- enumeration

# A world small enough to hold every response: five tokens, of which 4 ends, and at most three long.
PROMPTS = [[1, 2], [3]]
SEQUENCES = [list(s) for n in (1, 2, 3) for s in product(range(5), repeat=n)]
RESPONSES = [s for s in SEQUENCES if 4 not in s[:-1] and (s[-1] == 4 or len(s) == 3)]
ROWS = [(prompt, response) for prompt in PROMPTS for response in RESPONSES]


def small_gpt(seed):
    return wake(awake_gpt(vocab_size=5, block_size=5), seed, std=0.3)


def small_scalar(seed):
    return wake(ScalarModel(small_gpt(seed).cfg).double().eval(), seed, std=0.3)


def response_logps(model, temperature):
    """Log-prob of each response to each prompt, (prompts, responses), with gradient: a forward pass
    for each beginning by itself, so that no batch, mask or shift is involved."""
    following = {}
    for prompt, response in ROWS:
        for beginning in (prompt + response[:t] for t in range(len(response))):
            if str(beginning) not in following:
                logits = model(torch.tensor([beginning]))[0, -1]
                following[str(beginning)] = (logits / temperature).log_softmax(-1)  # (5,)
    return torch.stack([sum(following[str(prompt + response[:t])][response[t]]
                            for t in range(len(response)))
                        for prompt, response in ROWS]).view(len(PROMPTS), -1)


class Enumerated:
    """A policy, its reference, a reward model, and the rollout that holds every response once."""

    def __init__(self, monkeypatch, critic=None, **options):
        self.cfg = train_ppo.Config(**{**dict(temperature=0.7, beta=0.3, gamma=1.0, lam=1.0,
                                              score_clip=0.0, whiten=False), **options})
        self.policy, self.reference, self.judge = small_gpt(1), small_gpt(2), small_scalar(3)
        self.judge.score_mean.fill_(0.2)
        self.judge.score_std.fill_(0.5)
        critic = critic or ScalarModel(self.policy.cfg).double()  # a new critic's values are all 0
        self.actor = ActorCritic(self.policy, critic)
        tokens, lengths = pad_right([prompt + response for prompt, response in ROWS])
        everything = Rollout(tokens, torch.tensor([len(prompt) for prompt, _ in ROWS]), lengths,
                             torch.tensor([response[-1] == 4 for _, response in ROWS]))
        monkeypatch.setattr(train_ppo, "generate", lambda *args, **kwargs: everything)
        with Float64():
            self.rollout = train_ppo.collect_rollout(
                self.actor, self.reference, self.judge, [prompt for prompt, _ in ROWS],
                self.cfg.beta, self.cfg, RUN)
        # The oracle: probabilities and scores, one response at a time; (prompts, responses) each.
        self.logps = response_logps(self.policy, self.cfg.temperature)
        self.ref_logps = response_logps(self.reference, self.cfg.temperature).detach()
        self.probs = self.logps.exp()
        with torch.no_grad():
            self.scores = torch.stack([
                (self.judge.raw(torch.tensor([prompt + response]))[0, -1] - 0.2) / 0.5
                if response[-1] == 4 else f64(self.cfg.missing_end_score)
                for prompt, response in ROWS]).view(len(PROMPTS), -1)

    def kl(self):
        """KL(policy || reference) of whole responses by its definition, one per prompt."""
        return (self.probs * (self.logps - self.ref_logps)).sum(1)

    def expectation(self, name):
        """Of the rollout's tensor, summed over each response's tokens; one per prompt."""
        per_response = self.rollout[name].sum(1).view(len(PROMPTS), -1)
        return (self.probs * per_response).sum(1)

    def minibatch_loss(self, i):
        """PPO's loss of response i by itself, on a constant denominator."""
        with Float64():
            return ppo_loss(self.actor, self.rollout, [i], 1, RUN, self.cfg)[0]


ALL_RESPONSES = "enumeration of all 85 responses"


def test_expectations_equal_enumeration(parity, monkeypatch):
    assert len(RESPONSES) == 1 + 4 + 16 + 64  # ended after 1, 2 or 3 tokens; never ended
    world = Enumerated(monkeypatch)
    logps = world.rollout["logprobs"].sum(1).view(len(PROMPTS), -1)
    parity("log-probs of whole responses", ALL_RESPONSES, logps, world.logps, EXACT)
    parity("sum of all responses' probabilities", ALL_RESPONSES, logps.exp().sum(1), f64([1, 1]),
           EXACT)
    kl, reversed_kl = world.kl(), (world.ref_logps.exp() * (world.ref_logps - world.logps)).sum(1)
    assert ((kl - reversed_kl).abs() > 0.01).all()  # else its direction could not be told
    parity("KL: k1 of the tokens, summed, in expectation", ALL_RESPONSES, world.expectation("kl"),
           kl, EXACT)
    k3 = Enumerated(monkeypatch, kl_kind="k3").expectation("kl")
    parity("KL: k3 of the tokens, summed, in expectation", ALL_RESPONSES, k3, kl, EXACT)
    ref_logps = world.rollout["ref_logprobs"].sum(1).view(len(PROMPTS), -1)
    k3 = (world.probs * kl_estimate(logps, ref_logps, "k3")).sum(1)
    parity("KL: k3 of the whole response, in expectation", ALL_RESPONSES, k3, kl, EXACT)
    parity("entropy of the tokens, summed, in expectation", ALL_RESPONSES,
           world.expectation("entropy"), -(world.probs * world.logps).sum(1), EXACT)
    parity("rewards of the tokens, summed, in expectation", ALL_RESPONSES,
           world.expectation("rewards"), (world.probs * world.scores).sum(1) - 0.3 * kl, EXACT)


def test_ppos_first_gradient_is_the_policy_gradient(parity, monkeypatch):
    """Before the first step the ratio is 1, and in expectation over the responses the clipped loss
    has the gradient of E[score] - beta KL, whatever the critic says."""
    for name, critic in (("values of 0", None), ("a critic with any opinion", small_scalar(4))):
        world = Enumerated(monkeypatch, critic)
        assert (world.rollout["values"] != 0).any() == (critic is not None)
        for i, prob in enumerate(world.probs.detach().flatten()):
            (prob * world.minibatch_loss(i)).backward()
        objective = (world.probs * world.scores).sum() - world.cfg.beta * world.kl().sum()
        exact = torch.autograd.grad(-objective, list(world.policy.parameters()))
        parity(f"PPO's first gradient in expectation, {name}", "exact policy gradient, enumerated",
               [p.grad for p in world.policy.parameters()], exact, EXACT)


def test_dpos_gradient_vanishes_at_its_optimum(parity, generator):
    """Where preferences are Bradley-Terry with reward r, the optimum is the reference times
    exp(r / beta). The gradients of the pairs labelled one way and of those labelled the other way
    cancel there, and nowhere else."""
    beta, rewards = 0.3, draw(generator, 5)
    ref = draw(generator, 5).log_softmax(-1)

    def pulls(logits):
        """Gradient of the expected loss from the labels that prefer the earlier, the later one."""
        logits = logits.clone().requires_grad_()
        logp, losses = logits.log_softmax(-1), [0.0, 0.0]
        for i, j in product(range(5), range(5)):
            if i != j:  # i is preferred; both labels of a pair are shown according to their odds
                shown = (ref[i] + ref[j]).exp() * (rewards[i] - rewards[j]).sigmoid()
                losses[i > j] += shown * dpo_loss(logp[i], logp[j], ref[i], ref[j], beta)[0]
        return [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses]

    earlier, later = pulls(ref + rewards / beta)
    parity("DPO at its optimum: the gradients of both labels cancel", "reference * exp(r / beta)",
           earlier, -later, EXACT)
    for other in (ref, ref + rewards, ref - rewards / beta):
        earlier, later = pulls(other)
        assert relative_error(earlier, -later) > 0.1


def test_best_of_n_takes_what_the_formula_says(parity, monkeypatch):
    """evaluate.py's own choice in every draw of n answers; two answers tie, one never ended."""
    probs, scores, n = f64([0.3, 0.25, 0.2, 0.15, 0.1]), [1.0, 2.0, 1.0, 0.5, 9.0], 3
    ended = [True, True, True, True, False]  # so the last answer ranks below all
    draws = list(product(range(5), repeat=n))
    tokenizer = SimpleNamespace(end_id=0, fingerprint=lambda: "")
    model = SimpleNamespace(cfg=SimpleNamespace(block_size=1))
    monkeypatch.setattr(evaluate, "load_model", lambda *args, **kwargs: (model, tokenizer))
    monkeypatch.setattr(evaluate, "encode_prompts", lambda *args: draws)
    evaluator = SimpleNamespace(
        rows=draws, device="cpu", reward_model=model, reward_tokenizer=tokenizer,
        answer=lambda model, tokenizer, prompts, stop, temperature, num_samples=1:
            [[{"answer": k, "ended": ended[k]} for k in row[:num_samples]] for row in prompts],
        rewards=lambda answers, tokenizer: [[scores[s["answer"]] for s in r] for r in answers],
        kl=lambda *args: 0.0, verdicts=lambda player: None)
    cfg = evaluate.Config(models="", courtesy="", refusal="", best_of=n)
    players, _ = evaluate.collect_players(cfg, evaluator)
    chosen = torch.tensor([row[0]["answer"] for row in players[f"best of {n}"]["answers"]])
    chances = torch.stack([probs[list(row)].prod() for row in draws])
    actual = torch.zeros(5, dtype=torch.float64).index_add(0, chosen, chances)

    # Of answers ordered by score, a class is the best of n with F^n - (F before it)^n, and within a
    # class the first drawn is taken, so that ties share in proportion to their probability.
    expected = torch.zeros(5, dtype=torch.float64)
    below = 0.0
    for tied in ([4], [3], [0, 2], [1]):
        mass = probs[tied].sum()
        expected[tied] = ((below + mass) ** n - below**n) * probs[tied] / mass
        below += mass
    parity("best of 3, all 125 draws: which answer is taken", "F(y)^n - F(y-)^n", actual,
           expected, EXACT)
    kl = lambda q: (q * (q / probs).log()).sum()  # of the best against a single answer
    parity("best of 3, all 125 draws: its KL", "F(y)^n - F(y-)^n", kl(actual), kl(expected), EXACT)
    assert 0 < kl(actual) < math.log(n) - (n - 1) / n  # a known upper bound


# ---------------------------------------------------------------- closed forms

def test_gae_of_constant_rewards_is_a_geometric_series(parity):
    """Values of 0 leave the discounted rewards to come: a geometric series."""
    prompt_lens, lengths = torch.tensor([2, 5, 3]), torch.tensor([9, 7, 4])
    mask, reward, q = response_mask(prompt_lens, lengths, 9), 0.7, 0.9 * 0.8  # mask: (3, 8)
    rewards = torch.where(mask, f64(reward), math.nan)
    advantages, _ = gae(rewards, torch.zeros(3, 8).double(), mask, 0.9, 0.8)
    left = (lengths - 1)[:, None] - torch.arange(8)  # (3, 8) tokens to come, this one included
    expected = torch.where(mask, reward * (1 - q ** left.double()) / (1 - q), 0.0)
    parity("GAE of constant rewards", "geometric series", advantages, expected, EXACT)


def test_whitening_equals_its_closed_form(parity):
    x = f64([[5.0, 1.0, 2.0, 3.0, -7.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    unit = 1 / math.sqrt(2 / 3 + 1e-8)  # the variance of 1, 2, 3 is 2/3
    parity("whitening 1, 2, 3, with and without its mean", "closed form",
           [masked_whiten(x, mask), masked_whiten(x, mask, shift_mean=False)],
           [f64([[0, -unit, 0, unit, 0]]), f64([[0, 2 - unit, 2, 2 + unit, 0]])], EXACT)


def test_adamws_first_step_equals_its_closed_form(parity, generator):
    model, lr, decay, eps = awake_gpt(), 0.01, 0.1, 1e-5
    expected = []
    for p in model.parameters():
        p.grad = 1e-4 * draw(generator, *p.shape)  # not far from eps, which therefore shows
        shrunk = p.detach() * (1 - lr * decay if p.dim() == 2 else 1)
        expected.append(shrunk - lr * p.grad / (p.grad.abs() + eps))
    make_optimizer(model, lr, decay, eps=eps).step()
    parity("AdamW's first step, decay on matrices only", "closed form", list(model.parameters()),
           expected, EXACT)


def test_the_schedule_meets_its_corners(parity):
    """Of 110 steps: the warmup's first, its middle and its last, the first after it, the fall's
    middle, and the last one that a run makes, a hundredth of the fall before its end."""
    rate = lambda step, shape: lr_at(step, 110, 2.0, warmup=10, final=0.1, shape=shape)
    actual = [[rate(step, shape) for step in (0, 4, 9, 10, 60, 109)]
              for shape in ("cosine", "linear")]
    ends = [0.2 + 1.8 * math.sin(math.pi / 200) ** 2, 0.2 + 1.8 / 100]
    parity("learning rates: warmup, fall, ends", "closed form", f64(actual),
           f64([[0.2, 1.0, 2.0, 2.0, 1.1, end] for end in ends]), EXACT)


def test_annotators_are_bradley_terry(parity):
    annotate = f"{Path(__file__).parent.parent}/data/toy/annotate.py"
    rank, win_probability = (load_function(f"{annotate}:{f}") for f in ("rank", "win_probability"))
    golds, temperature, count, rng = f64([1.5, 1.0, 1.0, 0.2]), 0.3, 20_000, random.Random(0)
    places = torch.empty(count, 4)
    for row in places:
        row[rank(golds.tolist(), temperature, rng)[0]] = torch.arange(4.0)
    shares = (places[:, :, None] < places[:, None, :]).double().mean(0)  # (4, 4): i before j
    probs = ((golds[:, None] - golds) / temperature).sigmoid()  # (4, 4)
    stated = [[win_probability(a, b, temperature) for b in golds.tolist()] for a in golds.tolist()]
    parity("annotators' probability of every pair", "Bradley-Terry", f64(stated), probs, EXACT)
    i, j = torch.triu_indices(4, 4, 1)
    shares, probs = shares[i, j], probs[i, j]  # (6,)
    parity("shares of the annotators' 20,000 rankings", "Bradley-Terry", shares, probs, 4,
           standard_error=(probs * (1 - probs) / count).sqrt())


# ---------------------------------------------------------------- the table itself

def test_relative_error_by_hand():
    assert relative_error(f64([1.0, 4.5]), f64([2.0, -5.0])) == 1.9
    assert relative_error([f64([3.0]), f64([2.2])], [f64([3.0]), f64([2.0])]) == pytest.approx(0.1)
    assert relative_error(f64([0.0]), f64([0.0])) == 0
    assert relative_error(f64([1e-30]), f64([0.0])) == math.inf
    one, nan = f64([1.0]), f64([math.nan])
    for actual, expected in (([one, nan], [one, one]), ([one, one], [nan, one])):
        assert math.isnan(relative_error(actual, expected))
    with pytest.raises(AssertionError, match="compared"):
        relative_error(f64([1.0]), f64([1.0, 1.0]))


def test_a_table_that_is_stale_in_either_direction_is_found():
    row = Row("GAE", "series", "2e-15", "test_gae")
    text = with_table("Text.\n<!-- parity -->\nold\n<!-- /parity -->\nMore.\n", [row])
    assert read_table(text) == [row] and text.startswith("Text.\n") and text.endswith("\nMore.\n")
    assert find_fault(row, 1e-9, [row]) is None
    for error in ("2e-09", "inf", "nan", "1.7e-08 standard errors"):
        assert f"states an error of {error}" in find_fault(row, 1e-9, [row._replace(error=error)])
    for column in ("quantity", "oracle", "test"):
        assert "has 0 rows" in find_fault(row._replace(**{column: "other"}), 1e-9, [row])
    assert "has 2 rows" in find_fault(row, 1e-9, [row, row])
    other = row._replace(quantity="whitening")
    assert find_orphans("test_gae", [row._replace(error="1e-15")], [row, other]) == ["whitening"]
    assert find_orphans("test_other", [], [row, other]) == []


@pytest.mark.parametrize("code, rows", [(0, 1), (0, 0), (1, 1)])
def test_the_table_is_written_from_what_was_measured_here(code, rows, tmp_path, monkeypatch, capsys):
    """Bug: tests that run in other processes, as pytest.ini has them, leave an empty table."""
    page, old = tmp_path / "page.md", "Text.\n<!-- parity -->\nold\n<!-- /parity -->\n"
    page.write_text(old, encoding="utf-8")
    row = Row("GAE", "series", "2e-15", "test_gae")

    def fake(args, plugins):
        assert args[args.index("-n") + 1] == "0"
        plugins[0].rows.extend([row] * rows)
        return code

    monkeypatch.setattr(parity_table, "PAGE", page)
    monkeypatch.setattr(pytest, "main", fake)
    assert bool(parity_table.main(["--write"])) == bool(code or not rows)
    assert page.read_text(encoding="utf-8") == (with_table(old, [row]) if rows and not code else old)


def test_every_row_of_the_page_belongs_to_a_test():
    """The `parity` that a row's test asks for refuses rows that it does not measure."""
    for row in read_table(PAGE.read_text(encoding="utf-8")):
        assert row.test in globals(), f"docs/tests.md's {row} belongs to no test of this file"
        assert "parity" in inspect.signature(globals()[row.test]).parameters, row
