"""PPO: the rollout and its masks, advantages and KL, the update, what is logged, what is learnt.

One test of each check tells its bug, how it shows in a training curve, and where it was seen; of a
check that concerns several stages, it stands in test_scripts.py. Oracles are loops over bare rows
without filler.
"""

import contextlib
import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_road import (LONG, PROMPTS, Scaler, chat, collect, digest, logprobs_of, nudge, places,
                       poison, ppo_loss, refill, results, sample_apart, sampled_texts, scores_alone,
                       sequences, start, watch, watched_steps, without_clock, without_preflight,
                       write_rows)

import train_ppo
from conftest import (END, PROMPT, RESPONSES, TEMPERATURE, close, gradients, policy_and_reference,
                      response_logprobs, same_gradients, wake)
from minirlhf import generate as sampling
from minirlhf.batches import pad_right
from minirlhf.generate import Rollout, generate
from minirlhf.model import ActorCritic, ScalarModel
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.optim import make_optimizer
from minirlhf.plumbing.checkpoints import load_checkpoint, load_model
from minirlhf.plumbing.judges import load_function


def test_check_01_a_response_alone_gives_the_loss_that_it_gives_beside_longer_ones(
        road, tmp_path, float64):
    actor, rollout, run = start("ppo", road, tmp_path)
    together = results("ppo", actor, rollout, run)[1:]
    count = rollout["response_mask"].sum()
    actor.zero_grad()
    parts = [ppo_loss(actor, rollout, [row], count, run)[0]
             for row in range(16)]
    sum(parts).backward()
    for a, b in zip([sum(parts), *[p.grad for p in actor.parameters()]], together):
        close(a, b, rtol=1e-12, atol=1e-14)


def refill_rollouts(monkeypatch, **how):
    """Let every rollout of PPO come with another filler."""
    def sample_and_refill(*args, **options):
        rollout = sampling.generate(*args, **options)
        return dataclasses.replace(rollout, tokens=refill(rollout.tokens, rollout.lengths, **how))

    monkeypatch.setattr(train_ppo, "generate", sample_and_refill)


@pytest.mark.parametrize("how, rtol", [(dict(filler=340), 0), (dict(filler=7, more=9), 1e-12)])
def test_check_01_filler_changes_nothing_that_a_rollout_measures(how, rtol, road, tmp_path, float64,
                                                                 monkeypatch):
    plain = collect(road, tmp_path)[0]
    refill_rollouts(monkeypatch, **how)
    other, T = collect(road, tmp_path)[0], plain["tokens"].shape[1]
    assert not torch.equal(other["tokens"], plain["tokens"])
    for name in set(plain) - {"tokens"}:
        if plain[name].dim() == 2:  # on the grid (B, T-1)
            assert not other[name][:, T - 1 :].any(), name
        close(other[name][..., : T - 1].double(), plain[name].double(), rtol=rtol,
              atol=1e-14 if rtol else 0.0)


@pytest.mark.parametrize("options", [dict(), dict(max_new_tokens=3), dict(max_new_tokens=50)])
def test_check_02_the_logits_a_rollout_samples_from_equal_a_full_forward_pass(
        options, road, tmp_path, double, monkeypatch):
    """Bug: one query against the cache with `is_causal=True` sees key 0 alone; or all rows of a
    ragged batch decode at one position.

    Curve: the loss looks healthy, the samples repeat themselves, and length and KL are wild.
    Seen: pytorch#144858, the mask of `is_causal` is aligned top-left; DeepSpeedExamples#468,
    generation ran without the mask of its padding.
    """
    draws = watch(monkeypatch, sampling, "pick")
    rollout, actor = collect(road, tmp_path, **options)[:2]
    prompt_lens, lengths = rollout["prompt_lens"], rollout["lengths"]
    assert len(prompt_lens.unique()) > 1 and len(draws) == (lengths - prompt_lens).max()
    full = actor.policy(rollout["tokens"])  # (B, T, V)
    for step, ((logits, *_), _) in enumerate(draws):
        rows = torch.nonzero(prompt_lens + step < lengths)[:, 0]  # those that were still at work
        close(logits, full[rows, prompt_lens[rows] + step - 1], atol=1e-12)


@pytest.mark.parametrize("share_critic", [False, True])
def test_check_03_models_with_dropout_give_the_same_run_as_those_without(share_critic, road,
                                                                         tmp_path, dropouts):
    """Bug: dropout while sampling, scoring or updating: two random masks give a ratio that is not 1
    though the policy has not moved, and a reward model whose scores are noise.

    Curve: clip fraction and approximate KL have a floor that no smaller learning rate removes.
    Seen: verl#4708, log-probs and values were computed without `eval()`; trl#4, a ratio that is not
    1 because of dropout.
    """
    options = dict(share_critic=share_critic, dtype="float32")
    plain = road.run("ppo", tmp_path / "a", **options)
    other = road.run("ppo", tmp_path / "b", **options, **dropouts)
    assert without_clock(plain) == without_clock(other)


def test_check_03_rollout_and_update_switch_dropout_off_by_themselves(road, tmp_path, dropouts,
                                                                      monkeypatch):
    collect_rollout, stats = train_ppo.collect_rollout, []
    monkeypatch.setattr(train_ppo, "collect_rollout",
                        lambda actor, *rest: collect_rollout(actor.train(), *rest))
    for options in ({}, dropouts):
        rollout, actor, reference, reward_model, cfg, run = collect(road, tmp_path, **options)
        optimizers = [make_optimizer(part, 1e-3) for part in (actor.policy, actor.critic)]
        order = torch.Generator().manual_seed(0)
        stats.append([rollout["rewards"], rollout["advantages"],
                      train_ppo.ppo_update(actor.train(), optimizers, rollout, cfg, run, order)])
    ids = torch.arange(8)[None]
    assert not torch.equal(actor.train().policy(ids), actor.eval().policy(ids))  # there is dropout
    for plain, other in zip(*stats):
        assert torch.equal(plain, other) if isinstance(plain, torch.Tensor) else plain == other


def new_and_old(calls):
    """What each call of a PPO loss compares, real tokens alone: [(new, old)]."""
    return [(new[mask].detach(), old[mask]) for (new, old, _, mask, *_), _ in calls]


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7), dict(dtype="bfloat16")])
def test_check_04_the_first_minibatchs_ratio_is_exactly_1(options, road, tmp_path, monkeypatch):
    """Bug: the rollout's log-probs come from other arithmetic than the update's: another mask or
    precision, another temperature, the decoding cache. Then every update starts by correcting a
    difference that no policy made.

    Curve: tokens are clipped on the first minibatch, and a run with lr 0 shows policy KL.
    Seen: trlx#107, a ratio other than 1 before any optimizer step; trlx#108 gave the old log-probs
    the attention mask that the new ones had.
    """
    calls = watch(monkeypatch, train_ppo, "ppo_policy_loss")
    actor, rollout, run = start("ppo", road, tmp_path, **options)
    everything = list(range(16))
    stats = ppo_loss(actor, rollout, everything, rollout["response_mask"].sum(), run)[1]
    [(new, old)] = new_and_old(calls)
    assert torch.equal(new, old)  # the same shape on CPU: to the bit
    assert stats["approx_kl"] == 0 and stats["clip_frac"] == 0
    close(stats["ratio_mean"], 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_04_the_update_computes_in_the_rollouts_type(dtype, road, tmp_path, monkeypatch):
    """Bug: an update without autocast, whose every first ratio corrects a rounding."""
    rollout, actor, _, _, cfg, run = collect(road, tmp_path, dtype=dtype, num_epochs=1)
    seen, loss_of = [], train_ppo.loss_of
    monkeypatch.setattr(train_ppo, "loss_of", lambda *args: seen.append(
        torch.is_autocast_enabled("cpu")) or loss_of(*args))
    optimizers = [make_optimizer(part, 0.0) for part in (actor.policy, actor.critic)]
    train_ppo.ppo_update(actor, optimizers, rollout, cfg, run, torch.Generator().manual_seed(0))
    assert seen and set(seen) == {dtype == "bfloat16"}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_check_04_a_run_with_lr_0_keeps_every_ratio_at_1(dtype, tolerance, road, tmp_path,
                                                         monkeypatch):
    calls = watch(monkeypatch, train_ppo, "ppo_policy_loss")
    history = road.run("ppo", tmp_path / "run", lr=0.0, num_steps=3, dtype=dtype)
    assert len(calls) == 3 * 2 * 4
    for new, old in new_and_old(calls):
        assert ((new - old).exp() - 1).abs().max() < tolerance
    for row in history:
        assert abs(row["approx_kl"]) < tolerance**2 and abs(row["ratio_mean"] - 1) < tolerance
        assert abs(row["kl"]) < tolerance * row["length"] and row["clip_frac"] == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_check_05_the_distribution_drawn_from_is_the_one_that_is_scored(temperature, road, tmp_path,
                                                                        float64, monkeypatch):
    """Bug: top-k, top-p or a temperature while sampling that the log-probs know nothing of, so that
    they belong to a distribution that nobody sampled from.

    Curve: the logged KL falls below 0, and as -beta * KL is paid out, reward rises as text worsens.
    Seen: trl#235, top-k and unmasked padding in sampling drive the estimated KL negative;
    DeepSpeed-Chat's ppo_trainer.py (83757d9c) rolls Llama out greedily.
    """
    draws = watch(monkeypatch, torch, "multinomial")
    rollout = collect(road, tmp_path, temperature=temperature)[0]
    prompt_lens, lengths = rollout["prompt_lens"], rollout["lengths"]
    assert len(draws) == (lengths - prompt_lens).max()
    for step, ((probs, *_), chosen) in enumerate(draws):
        rows = torch.nonzero(prompt_lens + step < lengths)[:, 0]
        where = prompt_lens[rows] + step
        assert torch.equal(rollout["tokens"][rows, where], chosen[:, 0]) and (probs > 0).all()
        close(rollout["logprobs"][rows, where - 1], probs.gather(1, chosen)[:, 0].log())
        close(rollout["entropy"][rows, where - 1], -(probs * probs.log()).sum(1))


def collect_again(collected, beta=0.1):
    """Another rollout of the same prompts, with a critic that is the reward model's copy no longer:
    until then the one in place of the other would not show."""
    rollout, actor, reference, reward_model, cfg, run = collected
    with torch.no_grad():
        actor.critic.head.weight.mul_(1.5)
    prompts = [ids[:p] for ids, p in zip(sequences("ppo", rollout), rollout["prompt_lens"])]
    return train_ppo.collect_rollout(actor, reference, reward_model, prompts, beta, cfg, run)


def test_check_06_a_rollouts_log_probs_and_values_equal_a_loop_over_its_tokens(road, tmp_path,
                                                                              float64):
    """Bug: logits, targets and mask shifted against one another by a token, so that each token is
    given the log-prob of its neighbour.

    Curve: in SFT the loss falls though the first word is wrong; in PPO both log-probs share the
    shift, so the ratio stays at 1 and only the reward stands still.
    Seen: verl#3287, a loss mask cut to `[:, :-1]` in place of `[:, 1:]` never trained the first
    token of an answer; trlx#509 moved its response mask by one.
    """
    collected = collect(road, tmp_path)
    _, actor, reference, *_ = collected
    rollout = collect_again(collected)
    for b, ids in list(enumerate(sequences("ppo", rollout)))[:6]:
        p, n = int(rollout["prompt_lens"][b]), len(ids)
        values = [actor.critic(torch.tensor([ids[:t]]))[0, -1] for t in range(p, n)]
        for name, expected in (("logprobs", logprobs_of(actor.policy, ids, p)),
                               ("ref_logprobs", logprobs_of(reference, ids, p)),
                               ("values", torch.stack(values))):
            close(rollout[name][b, p - 1 : n - 1], expected, atol=1e-12)
            assert not rollout[name][b, : p - 1].any() and not rollout[name][b, n - 1 :].any()


def test_check_06_an_updates_log_probs_and_values_equal_a_loop(road, tmp_path, float64,
                                                               monkeypatch):
    actor, rollout, run = start("ppo", road, tmp_path)
    policy_calls = watch(monkeypatch, train_ppo, "ppo_policy_loss")
    value_calls = watch(monkeypatch, train_ppo, "ppo_value_loss")
    with torch.no_grad():
        for p in actor.parameters():  # both have moved since the rollout
            p.mul_(1.01)
    rows = [3, 1]
    ppo_loss(actor, rollout, rows, 1, run)
    ids = [sequences("ppo", rollout)[row] for row in rows]
    starts = rollout["prompt_lens"][rows].tolist()
    seen = new_and_old(policy_calls + value_calls)
    close(seen[0][0], torch.cat([logprobs_of(actor.policy, one, p) for one, p in zip(ids, starts)]))
    close(seen[1][0], torch.stack([actor.critic(torch.tensor([one[:t]]))[0, -1] for one, p in
                                   zip(ids, starts) for t in range(p, len(one))]))
    for (new, old), name in zip(seen, ("logprobs", "values")):
        close(old, torch.cat([rollout[name][row, p - 1 : len(one) - 1] for row, one, p in
                              zip(rows, ids, starts)]))
        assert (new != old).all()


def response_slices(rollout):
    """(row, the columns of its response) of each row."""
    return [(b, slice(p - 1, n - 1)) for b, (p, n) in enumerate(
        zip(rollout["prompt_lens"].tolist(), rollout["lengths"].tolist()))]


def responses(rollout, *names):
    """Row by row, what the named tensors hold on the response: lists of Python numbers."""
    for b, columns in response_slices(rollout):
        yield b, *(rollout[name][b, columns].tolist() for name in names)


def given_rollout(road, tmp_path, monkeypatch, **changes):
    """`collect` with responses that might have been sampled, but rarely are: their ids look like
    filler or like the end. Returns all that `collect` does."""
    tok = road.tokenizer
    prompts = [tok.encode_prompt(chat(*texts)) for texts in
               (["cow?"], ["owl?"], ["cow?", "moo", "What does a dog say?"], ["bee?"], ["pig?"])]
    responses = [[0, 0, tok.end_id], [0, tok.end_id], [260, 0],
                 [300, 0, 0, 0, 301, tok.end_id], [0, tok.user_id]]
    tokens, lengths = pad_right([p + r for p, r in zip(prompts, responses)])
    rollout = sampling.Rollout(tokens, torch.tensor([len(p) for p in prompts]), lengths,
                               torch.tensor([True, True, False, True, False]))
    monkeypatch.setattr(train_ppo, "generate", lambda *args, **options: rollout)
    return collect(road, tmp_path, **changes)


def test_check_07_a_sampled_id_0_is_a_token_and_a_prompts_end_token_is_no_end(road, tmp_path,
                                                                             monkeypatch):
    rollout = given_rollout(road, tmp_path, monkeypatch)[0]
    mask = rollout["response_mask"]
    for b, (p, n) in enumerate(zip(rollout["prompt_lens"].tolist(), rollout["lengths"].tolist())):
        assert torch.nonzero(mask[b])[:, 0].tolist() == list(range(p - 1, n - 1))
    assert rollout["ended"].tolist() == [True, True, False, True, False]
    for name in ("logprobs", "ref_logprobs", "values", "entropy"):
        assert torch.equal(rollout[name] != 0, mask), name
    assert train_ppo.summarise(rollout, 0.1)["length"] == (3 + 2 + 2 + 6 + 2) / 5


def test_check_08_sampling_keeps_the_end_token_as_the_responses_last(road):
    model, tok = load_model(road.folder / "sft")
    prompts = [tok.encode_prompt(chat(question)) for question, _ in PROMPTS[::4]]
    rollout, end = train_ppo.generate(model, prompts, 6, [tok.end_id]), tok.end_id
    assert 0 < rollout.ended.sum() < 10
    for response, ended in zip(rollout.responses(), rollout.ended):
        assert response.count(end) == int(ended) and (response[-1] == end) == ended


def test_check_08_ppo_charges_the_end_token_for_its_kl_and_credits_it_with_the_score(
        road, tmp_path, float64, monkeypatch):
    rollout, *_, cfg, _ = given_rollout(road, tmp_path, monkeypatch)
    for b in (0, 1, 3):  # those that ended
        last = rollout["lengths"][b] - 2
        assert rollout["response_mask"][b, last] and rollout["kl"][b, last] != 0
        close(rollout["rewards"][b, last] - rollout["scores"][b],
              -cfg.beta * rollout["kl"][b, last])


@pytest.mark.parametrize("given", [False, True])
def test_check_09_the_score_comes_on_top_of_the_kl_on_the_last_real_token(given, road, tmp_path,
                                                                         float64, monkeypatch):
    """Bug: the score is paid one position late, on the first filler, or at the end of the batch, so
    that it is masked away or reaches the response only through the critic's guess there.

    Curve: reward still climbs, but slowly; the longest answers learn otherwise than the others.
    Seen: trl#1893 and trl#3750, PPO v2 adds the score at `sequence_lengths + 1`;
    DeepSpeedExamples#672, `ends = start + mask.sum + 1`.
    """
    rollout, _, _, reward_model, cfg, _ = (
        given_rollout(road, tmp_path, monkeypatch) if given
        else collect(road, tmp_path, max_new_tokens=6))
    ids = sequences("ppo", rollout)
    scores = (scores_alone(reward_model, ids) - reward_model.score_mean) / reward_model.score_std
    for b, (p, n) in enumerate(zip(rollout["prompt_lens"].tolist(), map(len, ids))):
        score = scores[b] if rollout["ended"][b] else torch.tensor(cfg.missing_end_score)
        for t in range(rollout["rewards"].shape[1]):
            kl = rollout["logprobs"][b, t] - rollout["ref_logprobs"][b, t]
            expected = -cfg.beta * kl * (p - 1 <= t <= n - 2) + score * (t == n - 2)
            close(rollout["rewards"][b, t], expected)


def test_check_09_a_responses_rewards_add_up_to_its_score_less_beta_times_its_kl(road, tmp_path):
    for row in road.run("ppo", tmp_path / "history", num_steps=3, lr=1e-3, beta=0.5,
                        dtype="float32"):
        assert row["reward"] == pytest.approx(row["score"] - 0.5 * row["kl"], rel=1e-5)
    # The coefficient is the one that is handed in, as it may have been adapted.
    rollout = collect_again(collect(road, tmp_path), beta=5.0)
    close(rollout["rewards"].sum(1), rollout["scores"] - 5 * rollout["kl"].sum(1), rtol=1e-5)


@pytest.mark.parametrize("clip", [0.5, 5.0, 0.0])
def test_check_10_a_response_without_end_has_its_score_replaced(clip, road, tmp_path, float64):
    """Bug: a response that ran out of room keeps its score, or loses a penalty that is scaled or
    clipped with it, so that a long ramble of high score stays above an honest short answer.

    Curve: length grows to the limit while the mean reward rises; the share of ended answers sinks.
    Seen: trl#2012, PPOv2 replaced the score where OnlineDPO subtracted a penalty; trl#6802, the end
    token was looked for in prompt and answer together, so the penalty never came.
    """
    rollout, _, _, reward_model, cfg, _ = collect(road, tmp_path, max_new_tokens=6, score_clip=clip,
                                                  missing_end_score=-0.7)
    ended, ids = rollout["ended"], sequences("ppo", rollout)
    assert 0 < ended.sum() < len(ended)
    assert ended.tolist() == [one[-1] == road.tokenizer.end_id for one in ids]
    assert all(n == p + 6 for n, p, e in zip(map(len, ids), rollout["prompt_lens"], ended) if not e)
    scores = (scores_alone(reward_model, ids) - reward_model.score_mean) / reward_model.score_std
    if clip:
        assert scores.abs().max() > 0.5
        scores = scores.clamp(-clip, clip)
    scores[~ended] = -0.7  # outside one clip, inside the other
    close(rollout["scores"], scores)


@pytest.mark.parametrize("options", [dict(), dict(gamma=0.9, lam=0.5), dict(lam=1.0)])
def test_check_10_nothing_bootstraps_from_beyond_the_last_token(options, road, tmp_path, double,
                                                                monkeypatch):
    options = {**options, "max_new_tokens": 6, "micro_batch_size": 16}  # all rows at once
    plain = collect(road, tmp_path, **options)[0]
    last = (plain["lengths"] - 2)[:, None]
    reward, value, advantage, future = (plain[name].gather(1, last) for name in (
        "rewards", "values", "advantages", "returns"))
    close(advantage, reward - value)  # ended or not: an episode is over where its response is
    close(future, reward)
    forward = ScalarModel.forward
    beyond = lambda idx: torch.arange(idx.shape[1]) >= plain["lengths"][:, None] - 1  # (B, T)
    monkeypatch.setattr(ScalarModel, "forward", lambda self, idx: forward(self, idx).masked_fill(
        beyond(idx), 1000.0))
    other = collect(road, tmp_path, **options)[0]
    for name in ("values", "advantages", "returns", "whitened_advantages"):
        assert torch.equal(other[name], plain[name]), name


@pytest.mark.parametrize("micro", [0, 3])
def test_check_11_ppo_weighs_the_tokens_of_a_minibatch_alike(micro, road, tmp_path, float64):
    actor, rollout, run = start("ppo", road, tmp_path, whiten=False, num_epochs=1,
                                minibatch_size=16, micro_batch_size=micro)
    real = [tuple(place) for place in torch.nonzero(rollout["response_mask"]).tolist()]
    advantages = torch.stack([rollout["advantages"][place] for place in real])
    errors = torch.stack([rollout["returns"][place] - rollout["values"][place] for place in real])
    optimizers = [make_optimizer(part, 1e-3) for part in (actor.policy, actor.critic)]
    stats = train_ppo.ppo_update(actor, optimizers, rollout, run.cfg, run,
                                 torch.Generator().manual_seed(0))
    # Nothing has moved yet: the ratio is 1 everywhere, and every value is the rollout's.
    assert stats["policy_loss"] == pytest.approx(-advantages.mean().item(), rel=1e-9)
    assert stats["value_loss"] == pytest.approx((errors**2 / 2).mean().item(), rel=1e-9)
    rows = [row[mask].mean() for row, mask in zip(rollout["advantages"], rollout["response_mask"])]
    assert abs(torch.stack(rows).mean() - advantages.mean()) > 1e-3


def test_check_11_nan_at_filler_changes_nothing_in_a_rollout(road, tmp_path, monkeypatch):
    plain, actor, reference, reward_model, cfg, run = collect(road, tmp_path, micro_batch_size=16)
    given = sampling.Rollout(*(plain[name] for name in ("tokens", "prompt_lens", "lengths",
                                                        "ended")))
    monkeypatch.setattr(train_ppo, "generate", lambda *args, **options: given)
    for model in (actor.policy, actor.critic, reference, reward_model.trunk):
        poison(model, plain["lengths"])
    other = train_ppo.collect_rollout(actor, reference, reward_model, [None], cfg.beta, cfg, run)
    for name in plain:
        assert torch.equal(other[name], plain[name]), name


def test_check_12_a_rollouts_scores_are_read_at_last_real_tokens_whatever_these_are(
        road, tmp_path, float64, monkeypatch):
    collected = given_rollout(road, tmp_path, monkeypatch, score_clip=0.0)
    rollout, reward_model = collect_again(collected), collected[3]
    raw = scores_alone(reward_model, sequences("ppo", rollout))
    scores = (raw - reward_model.score_mean) / reward_model.score_std
    close(rollout["scores"][rollout["ended"]], scores[rollout["ended"]])
    assert len(scores.unique()) == 5


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (0.9, 1.0), (0.9, 0.0), (1.0, 0.95)])
def test_check_15_a_rollouts_advantages_equal_a_quadratic_loop(gamma, lam, road, tmp_path, double):
    """Bug: GAE starts in the filler and bootstraps from a value that nobody means, or mixes up
    gamma and lam. The critic's targets then hold its own inventions.

    Curve: the value loss falls and explained variance looks good, but the reward hardly rises;
    returns grow with the amount of filler.
    Seen: alibaba/ROLL#447, where a value of 100 in a masked place changed both real advantages;
    natolambert/rlhf-book#216, where the KL of padding leaked into the returns.
    """
    rollout, *_, cfg, _ = collect(road, tmp_path, gamma=gamma, lam=lam, max_new_tokens=6)
    assert 0 < rollout["ended"].sum() < 16  # a cut response bootstraps no more than an ended one
    assert rollout["response_mask"].sum(1).unique().numel() > 1
    for b, rewards, values, advantages, returns in responses(
            rollout, "rewards", "values", "advantages", "returns"):
        n, values = len(rewards), values + [0.0]  # nothing follows, ended or not
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
        close(torch.tensor(advantages),
              [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)])
        close(torch.tensor(returns), [a + v for a, v in zip(advantages, values)])
        if lam == 1:  # whatever the critic believes, the return is the discounted reward to go
            close(torch.tensor(returns), [sum(gamma ** (k - t) * rewards[k] for k in range(t, n))
                                          for t in range(n)])
        if lam == 0:  # the one-step error
            close(torch.tensor(advantages), deltas)
    for name in ("rewards", "values", "advantages", "returns"):
        assert (rollout[name][~rollout["response_mask"]] == 0).all()


def test_check_15_a_value_has_read_all_before_its_token_and_not_the_token(road, tmp_path, double):
    """Bug: values shifted by one, which judge a token by what only became known with it."""
    rollout, actor, *_ = collect(road, tmp_path)
    for b, values in responses(rollout, "values"):
        tokens, start = rollout["tokens"][b : b + 1], int(rollout["prompt_lens"][b])
        for i, value in enumerate(values):
            close(actor(tokens[:, : start + i])[1][0, -1], value, rtol=1e-7)


def test_check_16_advantages_are_whitened_over_the_tokens_of_the_whole_rollout(road, tmp_path,
                                                                               double):
    """Bug: filler enters the mean and the variance, or every row is whitened by itself.

    Curve: the advantages' mean over real tokens is not 0, a constant push on all tokens alike; the
    gradient's norm drifts with the length of the responses.
    Seen: trlx's `whiten` (trlx/utils/modeling.py) takes no mask; verl#1527 shifted the zeros of the
    padding away from 0 and did not mask them again.
    """
    rollout = collect(road, tmp_path)[0]
    mask = rollout["response_mask"]
    raw = [a for _, row in responses(rollout, "advantages") for a in row]
    mean = sum(raw) / len(raw)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in raw) / len(raw) + 1e-8)
    assert len(raw) < mask.numel() and abs(mean) > 0.01 and abs(deviation - 1) > 0.01
    close(rollout["whitened_advantages"][mask], [(a - mean) / deviation for a in raw])
    assert (rollout["whitened_advantages"][~mask] == 0).all()
    # The critic's targets are in the units of the reward: made of the raw advantages.
    close(rollout["returns"], rollout["advantages"] + rollout["values"])


def test_check_16_whiten_off_leaves_the_advantages_as_they_are(road, tmp_path):
    """Bug: a switch that does nothing, or the opposite."""
    rollout = collect(road, tmp_path, whiten=False)[0]
    assert torch.equal(rollout["whitened_advantages"], rollout["advantages"])


def test_check_16_a_minibatch_takes_its_advantages_as_they_are(road, tmp_path):
    """Bug: whitening each minibatch anew, so that a response's advantage depends on the others
    that it is drawn with; or using the raw ones."""
    rollout, actor, _, _, cfg, run = collect(road, tmp_path)
    white = [row for _, row in responses(rollout, "whitened_advantages")]
    for rows in ([0, 1, 2], [7], list(range(16))):
        expected = [a for b in rows for a in white[b]]
        denominator = torch.tensor(len(expected))
        _, stats = ppo_loss(actor, rollout, rows, denominator, run)
        close(stats["policy_loss"], -sum(expected) / len(expected), rtol=1e-5, atol=1e-6)


def all_responses(*_, **__):
    """In place of `generate`: every response once. A sum over the rows, each weighted with its
    probability, is then an exact expectation."""
    tokens, lengths = pad_right([PROMPT + response for response in RESPONSES])
    ended = torch.tensor([response[-1] == END for response in RESPONSES])
    return Rollout(tokens, torch.full_like(lengths, len(PROMPT)), lengths, ended)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_check_17_the_expected_kl_of_a_rollout_is_the_kl_from_policy_to_reference(
        kind, monkeypatch):
    """Bug: the difference of log-probs the wrong way round, or its absolute value, so that the
    penalty pays for drift; or the KL of other distributions than those at the sampling temperature.

    Curve: the logged KL falls below 0 and goes on falling while the reward with its KL term rises
    and the samples turn to nonsense.
    Seen: lucidrains/PaLM-rlhf-pytorch 2bb47d4 mends a `masked_kl_div` that was the KL's negative;
    huggingface/trl#262 a run whose KL fell below 0.
    """
    monkeypatch.setattr(train_ppo, "generate", all_responses)
    policy, reference = policy_and_reference()
    judge = wake(ScalarModel(policy.cfg).double())
    cfg = train_ppo.Config(temperature=TEMPERATURE, kl_kind=kind)
    run = SimpleNamespace(autocast=contextlib.nullcontext, generator=None,
                          tokenizer=SimpleNamespace(end_id=END))
    rollout = train_ppo.collect_rollout(ActorCritic(policy, judge), reference, judge,
                                        [PROMPT] * len(RESPONSES), 0.3, cfg, run)
    with torch.no_grad():
        per_token = response_logprobs(policy) - response_logprobs(reference)  # (21, 2)
        logp, logq = (response_logprobs(model).sum(1) for model in (policy, reference))  # (21,)
    p = logp.exp()  # (21,)
    close(p.sum(), 1.0)
    kl, reverse = (p * (logp - logq)).sum(), (logq.exp() * (logq - logp)).sum()
    assert abs(kl - reverse) > 0.1  # else the direction could not be told
    biased = (p * (per_token**2 / 2).sum(1)).sum()
    assert abs(biased - kl) > 0.1
    expected = biased if kind == "k2" else kl
    close((p * rollout["kl"].sum(1)).sum(), expected.item(), rtol=1e-5)
    # It is charged for, response by response, in addition to the score.
    charged = rollout["rewards"].sum(1) - rollout["scores"]  # (21,)
    close((p * charged).sum(), -0.3 * expected.item(), rtol=1e-5)


def test_check_18_ppo_charges_the_kl_in_the_reward_and_never_as_a_loss(road, tmp_path):
    """Bug: the k1 of the reward added to the loss a second time."""
    rollout, actor, _, _, cfg, run = collect(road, tmp_path)
    assert not any(tensor.requires_grad for tensor in rollout.values())
    rollout["whitened_advantages"] = torch.zeros_like(rollout["advantages"])
    loss, _ = ppo_loss(actor, rollout, list(range(16)), rollout["response_mask"].sum(), run)
    assert rollout["kl"].abs().sum() > 1 and cfg.beta > 0
    assert all((g == 0).all() for g in gradients(loss, actor.policy))


def keep_models(monkeypatch, stop_at=0):
    """The models that train_ppo.main works with, as [actor, reference, reward model] of each
    iteration; stop_at: the iteration that Ctrl-C ends before it begins."""
    without_preflight(monkeypatch)
    kept, rollouts = [], train_ppo.collect_rollout

    def keep(actor, reference, reward_model, *rest):
        kept.append((actor, reference, reward_model))
        if len(kept) == stop_at:
            raise KeyboardInterrupt
        return rollouts(actor, reference, reward_model, *rest)

    monkeypatch.setattr(train_ppo, "collect_rollout", keep)
    return kept


@pytest.mark.parametrize("share_critic", [False, True])
def test_check_19_reference_and_reward_model_stay_as_they_were(share_critic, road, tmp_path,
                                                               monkeypatch):
    """Bug: a reference that shares its tensors with the policy, and so drifts along with it; or a
    critic that is the reward model itself, whose scores then change.

    Curve: the KL stays 0 for ever, the reward rises and the samples degenerate unseen; a trained
    reward model's scores rise without any better answer.
    Seen: huggingface/trl#1534, where the active model wrote the reference's responses;
    YiyangZhou/POVID#11, where the reference was the policy.
    """
    kept = keep_models(monkeypatch)
    history = road.run("ppo", tmp_path / "run", share_critic=share_critic, num_steps=3, lr=1e-3)
    actor, reference, reward_model = kept[-1]
    assert digest(reference) == digest(load_model(road.folder / "sft")[0])
    assert digest(reward_model) == digest(load_model(road.folder / "rm", "scalar")[0])
    assert digest(actor.policy) != digest(reference) and history[-1]["kl"] != 0
    assert not places(actor) & places(reference, reward_model)
    if not share_critic:
        assert not places(actor.policy) & places(actor.critic)
        assert digest(actor.critic) != digest(reward_model)
    for model in (reference, reward_model):
        assert not any(module.training for module in model.modules())
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_check_19_a_resumed_run_has_the_sft_model_as_reference_again(road, tmp_path, monkeypatch):
    """Bug: the reference copied from the policy after the checkpoint was loaded into it."""
    options = dict(num_steps=2, save_every=1, lr=1e-3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        keep_models(patch, stop_at=2)
        road.run("ppo", tmp_path / "run", **options)
    kept = keep_models(monkeypatch)
    history = road.run("ppo", tmp_path / "run", resume=True, **options)
    assert digest(kept[0][1]) == digest(load_model(road.folder / "sft")[0])
    assert len(kept) == 1 and history[-1]["kl"] != 0


def test_check_20_the_critic_learns_to_predict_returns(road, tmp_path):
    """Bug: a critic without gradient, or with an optimizer that steps other parameters.

    Curve: the value loss follows the variance of the returns and never falls; explained variance
    stays at 0 or below.
    Seen: ray-project/ray#15610, where the value function was not trained without GAE;
    jsboige/CoursIA#15256, where the values were detached and the critic never moved.
    """
    # The policy stands still, so only the critic can improve.
    history = road.run("ppo", tmp_path / "run", lr=0.0, num_steps=16, rollout_size=32,
                       minibatch_size=16, micro_batch_size=0, critic_lr=2e-3, value_clip=0.0,
                       dtype="float32")
    explained = [row["explained_variance"] for row in history]
    assert sum(explained[-4:]) / 4 > max(0.1, explained[0] + 0.2)


def slow_losses(actor, rollout, rows, cfg):
    """PPO's terms, response by response and token by token: no filler, no mask, no micro-batch.

    Returns the means over all response tokens of the rows, and how often each case of the clip
    came: (advantage above 0, ratio within, below or above the range) -> a count.
    """
    terms, cases = {}, {}
    for b in rows:
        start, end = int(rollout["prompt_lens"][b]), int(rollout["lengths"][b])
        logits, values = actor(rollout["tokens"][b : b + 1, :end])
        for t in range(start - 1, end - 1):  # the token at t + 1, seen from the state before it
            logps = (logits[0, t] / cfg.temperature).log_softmax(-1)
            old, old_value, target, advantage = (rollout[name][b, t] for name in (
                "logprobs", "values", "returns", "whitened_advantages"))
            log_ratio = logps[rollout["tokens"][b, t + 1]] - old
            ratio, low, high = log_ratio.exp(), 1 - cfg.clip_range, 1 + cfg.clip_range
            gain, limited = ratio * advantage, min(max(ratio, low), high) * advantage
            move = values[0, t] - old_value
            near = old_value + min(max(move, -cfg.value_clip), cfg.value_clip)
            errors = (values[0, t] - target) ** 2, (near - target) ** 2
            for name, term in (
                    ("policy_loss", -min(gain, limited)), ("value_loss", max(errors) / 2),
                    ("clip_frac", torch.tensor(float(limited < gain))), ("ratio_mean", ratio),
                    ("approx_kl", ratio - 1 - log_ratio),
                    ("value_clip_frac", torch.tensor(float(errors[1] > errors[0])
                                                     * float(abs(move) > cfg.value_clip)))):
                terms.setdefault(name, []).append(term)
            case = bool(advantage > 0), int(ratio > high) - int(ratio < low)
            cases[case] = cases.get(case, 0) + 1
    return {name: torch.stack(values).mean() for name, values in terms.items()}, cases


def shared(actor):
    """The same policy with a head for its values on its own trunk, a head that is awake."""
    model = ActorCritic(actor.policy)
    wake(model.value_head, std=0.1)
    return model


def moved(road, tmp_path, share_critic=False, **options):
    """A rollout, and an actor that has gone on since, so that ratios and values have changed."""
    rollout, actor, _, _, cfg, run = collect(
        road, tmp_path, share_critic=share_critic, temperature=0.7, clip_range=0.1, value_clip=0.3,
        vf_coef=0.37, stop_kl=0.0, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in actor.parameters():
            p += 0.03 * torch.randn(p.shape, generator=generator)
    return rollout, shared(actor) if share_critic else actor, cfg, run


@pytest.mark.parametrize("share_critic", [False, True])
def test_check_20_the_value_loss_equals_a_loop_over_tokens(share_critic, road, tmp_path, double):
    """Bug: targets made of the new values or of the old ones, so that the critic chases itself."""
    rollout, actor, cfg, run = moved(road, tmp_path, share_critic)
    rollout["whitened_advantages"] = torch.zeros_like(rollout["advantages"])  # the value loss alone
    slow, _ = slow_losses(actor, rollout, range(16), cfg)
    loss, stats = ppo_loss(actor, rollout, list(range(16)), rollout["response_mask"].sum(), run)
    close(stats["value_loss"], slow["value_loss"].item())
    # A critic with a trunk and an optimizer of its own needs no weight.
    weighted = (cfg.vf_coef if share_critic else 1.0) * slow["value_loss"]
    assert same_gradients(gradients(loss, actor), gradients(weighted, actor), rtol=1e-6)


@pytest.mark.parametrize("share_critic", [False, True])
def test_check_20_every_parameter_of_the_critic_gets_a_gradient(share_critic, road, tmp_path):
    """Bug: values detached, or computed without gradient."""
    rollout, actor, _, _, cfg, run = collect(road, tmp_path, share_critic=share_critic)
    if share_critic:
        actor = shared(actor)
    rollout["whitened_advantages"] = torch.zeros_like(rollout["advantages"])  # the value loss alone
    loss, _ = ppo_loss(actor, rollout, list(range(16)), rollout["response_mask"].sum(), run)
    learns = [actor.policy.trunk, actor.value_head] if share_critic else [actor.critic]
    for part in learns:
        assert all((g != 0).any() for g in gradients(loss, part))


@pytest.mark.parametrize("share_critic", [False, True])
def test_check_20_policy_and_critic_step_at_their_own_rates(share_critic, road, tmp_path,
                                                            monkeypatch):
    """Bug: parameters in two optimizers or in none, or a schedule for only one of them."""
    kept = keep_models(monkeypatch)
    with watched_steps() as steps:
        road.run("ppo", tmp_path / "run", share_critic=share_critic, num_steps=3, lr=1e-4,
                 critic_lr=5e-4, final_lr=0.1, num_epochs=1, minibatch_size=8)
    actor = kept[0][0]
    parts = [(actor, 1e-4)] if share_critic else [(actor.policy, 1e-4), (actor.critic, 5e-4)]
    optimizers = list({id(step.optimizer): step.optimizer for step in steps}.values())
    for (part, lr), optimizer in zip(parts, optimizers, strict=True):
        ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in part.parameters()}
        # From 1 in a straight line towards 0.1, so two thirds of 0.9 are left at the second step.
        for step, share in zip([step for step in steps if step.optimizer is optimizer],
                               (1.0, 0.7, 0.4), strict=True):
            assert step.rates == pytest.approx([share * lr] * 2)


def test_check_20_explained_variance_by_hand():
    """Bug: filler among the returns, advantages in their place, or the ratio without its 1 -."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # Returns 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3. Errors 1, -1, 3: mean 1, (0 + 4 + 4) / 3.
    rollout = {"response_mask": mask, "returns": torch.tensor([[1.0, 2.0, 0.0], [6.0, 0.0, 0.0]]),
               "values": torch.tensor([[0.0, 3.0, 0.0], [3.0, 0.0, 0.0]]), "scores": torch.ones(2),
               **{name: torch.zeros(2, 3) for name in ("kl", "rewards", "entropy")},
               "ended": torch.tensor([True, True])}
    close(train_ppo.summarise(rollout, 0.1)["explained_variance"], 1 - 8 / 14, rtol=1e-6)
    rollout["values"] = rollout["returns"] - mask * 2.0  # all but a constant is foreseen
    close(train_ppo.summarise(rollout, 0.1)["explained_variance"], 1.0)


def optimizers_of(actor, lr):
    parts = [actor] if actor.critic is None else [actor.policy, actor.critic]
    return [make_optimizer(part, lr) for part in parts]


def update(actor, optimizers, rollout, cfg, run):
    """The statistics and the watched steps of one update on the rollout."""
    with watched_steps() as steps:
        stats = train_ppo.ppo_update(actor, optimizers, rollout, cfg, run,
                                     torch.Generator().manual_seed(0))
    return stats, steps


@pytest.mark.parametrize("share_critic", [False, True])
def test_check_21_ppo_logs_the_mean_norms_before_the_clip(share_critic, road, tmp_path):
    """Bug: a norm logged scaled, clipped, of one minibatch, or under the other model's name."""
    rollout, actor, cfg, run = moved(road, tmp_path, share_critic, num_epochs=1, grad_clip=1e9)
    run.scaler = Scaler("cpu")
    optimizers = optimizers_of(actor, 1e-4)
    stats, steps = update(actor, optimizers, rollout, cfg, run)
    for optimizer, name in zip(optimizers, ("grad_norm", "critic_grad_norm")):
        norms = [step.gradient.norm().item() for step in steps if step.optimizer is optimizer]
        assert len(norms) == 4 and stats[name] == pytest.approx(sum(norms) / 4, rel=1e-5)
    assert ("critic_grad_norm" in stats) == (not share_critic)


def test_check_21_a_minibatch_past_stop_kl_makes_no_step_and_leaves_no_gradient(road, tmp_path):
    """Bug: an early stop whose gradients wait for the next iteration's first step."""
    def collect_and_update(stop_kl):
        rollout, actor, _, _, cfg, run = collect(road, tmp_path, minibatch_size=8, num_epochs=1,
                                                 stop_kl=stop_kl, grad_clip=1e9)
        stats, steps = update(actor, optimizers_of(actor, 1e-3), rollout, cfg, run)
        assert all(p.grad is None for p in actor.parameters())
        return stats, [step.gradient.norm().item() for step in steps]

    stats, norms = collect_and_update(0.0)  # never
    assert len(norms) == 4  # policy and critic, two minibatches
    moved_by = 2 * stats["approx_kl"]  # the first minibatch's is 0
    assert moved_by > 1e-4
    stopped, first_norms = collect_and_update(0.99 * moved_by)
    assert first_norms == norms[:2] and stopped["approx_kl"] == stats["approx_kl"]
    # A norm for each step that was made, and so one.
    assert [stopped["grad_norm"], stopped["critic_grad_norm"]] == pytest.approx(norms[:2], rel=1e-5)
    assert len(collect_and_update(1.01 * moved_by)[1]) == 4


def test_check_21_the_early_stop_looks_at_each_minibatch_by_itself(road, tmp_path, monkeypatch):
    """Bugs: a KL summed over the minibatches so far; means over those that were only planned."""
    def collect_and_update(stop_kl):
        rollout, actor, _, _, cfg, run = collect(road, tmp_path, minibatch_size=4, num_epochs=1,
                                                 micro_batch_size=0, stop_kl=stop_kl)
        seen, loss = [], train_ppo.loss_of
        with monkeypatch.context() as patched:
            patched.setattr(train_ppo, "loss_of",
                            lambda *args: seen.append(loss(*args)) or seen[-1])
            stats, steps = update(actor, optimizers_of(actor, 1e-3), rollout, cfg, run)
        return stats, [part for _, part in seen], len(steps)

    _, parts, num_steps = collect_and_update(0.0)  # never
    kls = [part["approx_kl"].item() for part in parts]
    assert len(kls) == 4 and num_steps == 8  # policy and critic
    assert sum(kls) > 1.1 * max(kls)
    assert collect_and_update(1.01 * max(kls))[2] == 8  # none of them is too far
    stats, parts, num_steps = collect_and_update(0.99 * kls[1])
    assert len(parts) == 2 and num_steps == 2
    for name in ("policy_loss", "value_loss", "approx_kl"):
        assert stats[name] == pytest.approx((parts[0][name] + parts[1][name]).item() / 2, rel=1e-5)


@pytest.mark.parametrize("share_critic", [False, True])
def test_check_23_every_minibatch_is_divided_by_its_own_number_of_tokens(
        share_critic, road, tmp_path, double, monkeypatch):
    """Bug: the count of a micro-batch, of the whole rollout, or of rows; statistics left as the sum
    of the micro-batches' means."""
    rollout, actor, cfg, run = moved(road, tmp_path, share_critic, minibatch_size=10, grad_clip=1e9,
                                     micro_batch_size=4, num_epochs=1)
    calls, make_batch = [], train_ppo.make_batch
    monkeypatch.setattr(train_ppo, "make_batch", lambda rollout, rows:
                        calls.append(rows) or make_batch(rollout, rows))
    optimizers = optimizers_of(actor, 0.0)
    stats, steps = update(actor, optimizers, rollout, cfg, run)
    assert [len(rows) for rows in calls] == [4, 4, 2, 4, 2]  # minibatches of 10 and of 6
    minibatches = [sum(calls[:3], []), sum(calls[3:], [])]
    slow = [slow_losses(actor, rollout, rows, cfg)[0] for rows in minibatches]
    for name in slow[0]:
        close(torch.tensor(stats[name]), sum(s[name].item() for s in slow) / 2, rtol=1e-5)
    weight = cfg.vf_coef if share_critic else 1.0
    totals = [s["policy_loss"] + weight * s["value_loss"] for s in slow]
    for step, (total, optimizer) in zip(steps, itertools.product(totals, optimizers), strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(total, params,
                                                                    retain_graph=True)])
        assert (step.gradient - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("share_critic", [False, True])
def test_check_24_a_minibatchs_loss_equals_a_loop_over_its_tokens(share_critic, road, tmp_path,
                                                                  double):
    """Bug: the smaller of the two losses; a clip on one side only, or counted wherever the ratio
    has left the range; the two clip ranges exchanged.

    Curve: the share of clipped tokens does not go with the KL, or is near 0; with the wrong branch
    the KL explodes after a good start.
    Seen: huggingface/trl#3145 and #3175, three versions of the fraction until it looked at the
    advantage's sign; takuseno/ppo#3, where the minimum came before the advantage.
    """
    rollout, actor, cfg, run = moved(road, tmp_path, share_critic)
    rows = list(range(16))
    slow, cases = slow_losses(actor, rollout, rows, cfg)
    # A good and a bad token; its ratio below, within and above the range: all six happen.
    assert len(cases) == 6
    assert 0 < slow["value_clip_frac"] < 1
    loss, stats = ppo_loss(actor, rollout, rows, rollout["response_mask"].sum(), run)
    assert stats["clip_frac"].item() == pytest.approx(  # the clipped side goes with the sign
        (cases[True, 1] + cases[False, -1]) / sum(cases.values()), rel=1e-6)
    assert set(stats) == set(slow)
    for name in slow:
        close(stats[name].double(), slow[name].item(), rtol=1e-5)
    total = slow["policy_loss"] + (cfg.vf_coef if share_critic else 1.0) * slow["value_loss"]
    close(loss, total.item(), rtol=1e-5)
    assert same_gradients(gradients(loss, actor), gradients(total, actor), rtol=1e-5)


def prompts_of(rollout):
    return [row[:n].tolist() for row, n in zip(rollout["tokens"], rollout["prompt_lens"].tolist())]


def test_check_29_a_score_of_exactly_zero_is_kept_as_it_is(road, tmp_path):
    """Bug: `score or missing_score`, or a mask made by comparing scores with 0: a score of exactly
    0.0, such as a verifier's or a judge's "wrong", counts as no score at all.

    Curve: the mean score is biased away from 0, most with 0/1 verifiers, and disagrees with the
    accuracy on the same samples.
    Seen: OpenRLHF#1219, where `a.get("scores") or a.get("rewards")` lost a valid 0.0.
    """
    rollout, actor, reference, reward_model, cfg, run = collect(road, tmp_path, max_new_tokens=6)
    assert 0 < rollout["ended"].sum() < 16
    cfg.missing_end_score = 0.0  # a score like any other too
    no_fine = train_ppo.collect_rollout(actor, reference, reward_model, prompts_of(rollout), 0.1,
                                        cfg, run)
    ended = no_fine["ended"]
    assert (no_fine["scores"][~ended] == 0).all() and (no_fine["scores"][ended] != 0).all()
    torch.nn.init.zeros_(reward_model.head.weight)
    reward_model.head.bias.data.copy_(reward_model.score_mean)  # every raw score is the mean
    cfg.missing_end_score = -3.0
    rollout = train_ppo.collect_rollout(actor, reference, reward_model, prompts_of(rollout), 0.1,
                                        cfg, run)
    ended = rollout["ended"]
    assert 0 < ended.sum() < 16
    assert (rollout["scores"][ended] == 0).all() and (rollout["scores"][~ended] == -3).all()
    assert torch.equal(rollout["rewards"][ended], -0.1 * rollout["kl"][ended])
    assert train_ppo.summarise(rollout, 0.1)["score"] == -3 * (~ended).sum() / 16


def test_check_29_a_judges_zero_counts_in_the_mean(road, tmp_path, monkeypatch):
    """Each answer is judged beside its own prompt."""
    heard, verdicts = [], [0.0, 1.0, 0.0, 0.0]

    def judge(row, response, ended):
        heard.append((row["messages"][-1]["content"], response, ended))
        return {"score": verdicts[len(heard) % 4]}

    monkeypatch.setattr(train_ppo, "load_judge", lambda spec, row: judge)
    rollouts = watch(monkeypatch, train_ppo, "collect_rollout")
    history = road.run("ppo", tmp_path / "run", judge=f"{road.tools}:judge", dtype="float32",
                       max_new_tokens=6)
    assert [row["gold"] for row in history] == [0.25, 0.25]
    answered = []
    for _, rollout in rollouts:
        for row, p, n, ended in zip(rollout["tokens"].tolist(), rollout["prompt_lens"].tolist(),
                                    rollout["lengths"].tolist(), rollout["ended"].tolist()):
            user = road.tokenizer.decode(row[:p]).split("<|user|>")[1].split("<|end|>")[0]
            answered.append((user, road.tokenizer.decode(row[p : n - ended]), ended))
    assert heard == answered and {ended for _, _, ended in heard} == {False, True}
    shown = (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")
    for (user, response, _), score in zip(heard[8:11], rollouts[1][1]["scores"].tolist()):
        assert f"  user: {user}\n  model: {response}   (score {score:.2f})" in shown


def kl_by_loops(rollout, row, policy, reference, kind):
    """The estimator summed over one response, from log-probs of single forward passes."""
    p, n = int(rollout["prompt_lens"][row]), int(rollout["lengths"][row])
    ids = rollout["tokens"][row, :n].tolist()
    d = logprobs_of(policy, ids, p) - logprobs_of(reference, ids, p)
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[kind].sum().item()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_check_30_the_logged_kl_is_the_sampled_sequence_sum(kind, road, tmp_path):
    """Bug: the controller is fed with a mean per token, with a KL that was masked twice or over
    filler, or with another estimator than the one in the log.

    Curve: beta drifts one way without end, because the measured KL never comes near a target on
    another scale, while the true KL runs away.
    Seen: trlx#361 (the update's approximate KL instead of the one to the reference) and trlx#441
    (a mean per token instead of the sequence's sum).
    """
    rollout, actor, reference, _, _, _ = collect(road, tmp_path, kl_kind=kind)
    sums = [kl_by_loops(rollout, b, actor.policy, reference, kind) for b in range(16)]
    close(rollout["kl"].sum(1), sums, rtol=1e-5, atol=1e-5)  # a difference of numbers near 10
    summary = train_ppo.summarise(rollout, 0.1)
    close(summary["kl"], sum(sums) / 16, rtol=1e-5)
    earned = [score - 0.1 * kl for score, kl in zip(rollout["scores"].tolist(), sums)]
    close(rollout["rewards"].sum(1), earned, rtol=1e-5, atol=1e-5)
    close(summary["reward"], sum(earned) / 16, rtol=1e-5)


@pytest.mark.parametrize("target", [0.0, 0.3])
def test_check_30_the_controller_sees_the_number_that_is_logged(target, road, tmp_path,
                                                                monkeypatch):
    """A target of 0 switches it off. The new beta counts from the next rollout on."""
    rollouts = watch(monkeypatch, train_ppo, "collect_rollout")
    history = road.run("ppo", tmp_path / "run", dtype="float32", num_steps=4, rollout_size=16,
                       minibatch_size=8, micro_batch_size=0, lr=3e-3, beta=0.2, kl_target=target,
                       stop_kl=0.0)
    beta, errors = 0.2, set()
    for row, (arguments, rollout) in zip(history, rollouts):
        assert row["beta"] == arguments[4] == pytest.approx(beta, rel=1e-12)
        sums = [rollout["kl"][b, p - 1 : n - 1].sum().item() for b, (p, n) in enumerate(
            zip(rollout["prompt_lens"].tolist(), rollout["lengths"].tolist()))]
        assert row["kl"] == pytest.approx(sum(sums) / 16, rel=1e-5, abs=1e-7)
        assert row["reward"] == pytest.approx(row["score"] - beta * row["kl"], rel=1e-5)
        if target:
            error = max(-0.2, min(0.2, row["kl"] / target - 1))
            beta *= 1 + error * 16 / 1000
            errors.add(error)
    assert not target or (min(errors) == -0.2 and max(errors) > 0)  # too near, then too far


def test_check_30_the_logged_beta_is_the_one_that_was_charged(road, tmp_path):
    """Bug: the controller's next beta is logged beside the KL of the rollout before."""
    first, second = road.run("ppo", tmp_path, num_steps=2, kl_target=0.001, dtype="float32")
    assert first["beta"] == 0.1 != second["beta"]


def spoilt(rollout, more):
    """A copy whose filler holds garbage, in `more` columns more of it."""
    mask, out = rollout["response_mask"], {}
    for name, value in rollout.items():
        if value.dim() == 2 and name != "response_mask":
            real = torch.arange(value.shape[1]) < rollout["lengths"][:, None]
            real = real if name == "tokens" else mask
            value = F.pad(torch.where(real, value, 7), (0, more), value=7)
        out[name] = F.pad(mask, (0, more)) if name == "response_mask" else value
    return out


def test_check_31_a_rollouts_statistics_leave_the_filler_out(road, tmp_path):
    """Bug: entropy, clip fraction, values or explained variance averaged over all columns of the
    batch, filler and prompts among them.

    Curve: entropy slides down exactly as answers become shorter, or even below 0; statistics change
    with max_new_tokens while the weights do not.
    Seen: trl#2281 and #2496, where filler log-probs of 1.0 drove the logged entropy below 0;
    trlx's approx_kl was a mean over padding too.
    """
    rollout, actor, _, _, _, _ = collect(road, tmp_path, temperature=0.8)
    assert len(set(rollout["lengths"].tolist())) > 2
    entropies, returns, errors, rewards, kls = [], [], [], [], []
    for b, columns in response_slices(rollout):
        with torch.no_grad():
            bare = rollout["tokens"][b : b + 1, : columns.stop + 1]
            p = (actor.policy(bare)[0, columns].double() / 0.8).softmax(-1)  # (n, V)
        entropies += (-(p * p.log()).sum(-1)).tolist()
        returns += rollout["returns"][b, columns].tolist()
        errors += (rollout["returns"] - rollout["values"])[b, columns].tolist()
        rewards.append(sum(rollout["rewards"][b, columns].tolist()))
        kls.append(sum(rollout["kl"][b, columns].tolist()))
    mean = lambda values: sum(values) / len(values)
    variance = lambda values: mean([(v - mean(values)) ** 2 for v in values])
    expected = {
        "score": mean(rollout["scores"].tolist()), "kl": mean(kls), "reward": mean(rewards),
        "beta": 0.3, "length": len(entropies) / 16, "ended": mean(rollout["ended"].tolist()),
        "entropy": mean(entropies), "explained_variance": 1 - variance(errors) / variance(returns)}
    for one in (rollout, spoilt(rollout, 0), spoilt(rollout, 5)):
        summary = train_ppo.summarise(one, 0.3)
        assert set(summary) == set(expected)
        for name, value in expected.items():
            assert float(summary[name]) == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_check_31_an_updates_statistics_leave_the_filler_out(road, tmp_path):
    rollout, actor, _, _, cfg, run = collect(road, tmp_path, temperature=0.8, clip_range=0.05,
                                             value_clip=0.05)
    nudge(actor.policy)
    nudge(actor.critic)
    sums = dict.fromkeys(("clip_frac", "approx_kl", "ratio_mean", "value_clip_frac",
                          "policy_loss", "value_loss"), 0.0)
    count = 0
    for b, columns in response_slices(rollout):
        ids = rollout["tokens"][b, : columns.stop + 1]
        new = logprobs_of(actor.policy, ids.tolist(), columns.start + 1, 0.8).tolist()
        with torch.no_grad():
            new_values = actor.critic(ids[None])[0, columns].tolist()
        for n, v, column in zip(new, new_values, range(columns.start, columns.stop)):
            old, advantage, value, target = (rollout[name][b, column].item() for name in (
                "logprobs", "whitened_advantages", "values", "returns"))
            ratio = math.exp(n - old)
            plain, clipped = (-advantage * r for r in (ratio, min(max(ratio, 0.95), 1.05)))
            near = value + min(max(v - value, -0.05), 0.05)
            sums["clip_frac"] += clipped > plain
            sums["approx_kl"] += ratio - 1 - (n - old)
            sums["ratio_mean"] += ratio
            sums["policy_loss"] += max(plain, clipped)
            sums["value_loss"] += 0.5 * max((v - target) ** 2, (near - target) ** 2)
            sums["value_clip_frac"] += (near - target) ** 2 > (v - target) ** 2
            count += 1
    assert 0.03 < sums["clip_frac"] / count < 0.97
    assert 0.03 < sums["value_clip_frac"] / count < 0.97
    for one in (rollout, spoilt(rollout, 0), spoilt(rollout, 5)):
        _, stats = ppo_loss(actor, one, list(range(16)), count, run)
        parts = [ppo_loss(actor, one, rows, count, run)[1]
                 for rows in ([3, 0, 15], [i for i in range(16) if i not in (0, 3, 15)])]
        assert set(stats) == set(sums)
        for name, total in sums.items():
            expected = pytest.approx(total / count, rel=1e-5, abs=1e-6)
            assert stats[name].item() == expected, name
            assert sum(part[name].item() for part in parts) == expected, name


def test_check_31_an_iterations_statistics_are_its_minibatches_means(road, tmp_path):
    """With a learning rate of 0 each minibatch is known beforehand, however it is split."""
    rollout, actor, _, _, cfg, run = collect(road, tmp_path, minibatch_size=8, micro_batch_size=3,
                                             num_epochs=2, stop_kl=0.0, clip_range=0.05)
    nudge(actor.policy)
    order = torch.Generator().manual_seed(5)
    minibatches = [rows.tolist() for _ in range(2)
                   for rows in torch.randperm(16, generator=order).split(8)]
    counts = [rollout["response_mask"][rows].sum() for rows in minibatches]
    assert len(set(map(int, counts))) > 1
    expected = [ppo_loss(actor, rollout, rows, count, run)[1]
                for rows, count in zip(minibatches, counts)]
    optimizers = [make_optimizer(part, 0.0) for part in (actor.policy, actor.critic)]
    stats = train_ppo.ppo_update(actor, optimizers, rollout, cfg, run,
                                 torch.Generator().manual_seed(5))
    assert stats.pop("grad_norm") > 0 and stats.pop("critic_grad_norm") > 0
    assert set(stats) == set(expected[0])
    for name, value in stats.items():
        assert value == pytest.approx(sum(e[name].item() for e in expected) / 4, rel=1e-5), name


@pytest.mark.parametrize("minibatch_size, micro", [(4, 2), (6, 0), (100, 5)])
def test_check_32_every_response_is_used_exactly_once_an_epoch(minibatch_size, micro, road,
                                                               tmp_path, monkeypatch):
    """Bug: minibatches drawn with replacement, a last smaller one that is lost, or epochs inside
    the minibatches, so that one minibatch is stepped on several times in a row.

    Curve: clip fraction and ratio climb within each minibatch's repeats and snap back, a sawtooth;
    more KL for the same reward.
    Seen: trlx#522, whose updates ran B1 B1 B1 B2 B2 B2 instead of full passes.
    """
    rollout, actor, _, _, cfg, run = collect(road, tmp_path, minibatch_size=minibatch_size,
                                             micro_batch_size=micro, num_epochs=3, stop_kl=0.0)
    batches = watch(monkeypatch, train_ppo, "make_batch")
    steps = watch(monkeypatch, run.scaler, "step")
    optimizers = [make_optimizer(part, 0.0) for part in (actor.policy, actor.critic)]
    train_ppo.ppo_update(actor, optimizers, rollout, cfg, run, torch.Generator().manual_seed(0))
    flat = [row for (_, rows), _ in batches for row in rows]
    epochs = [flat[i : i + 16] for i in (0, 16, 32)]
    assert len(flat) == 48 and all(sorted(epoch) == list(range(16)) for epoch in epochs)
    first = [set(epoch[:minibatch_size]) for epoch in epochs]
    assert minibatch_size > 16 or first[0] != first[1] != first[2]  # shuffled anew
    # One step of each optimizer for each minibatch, the last smaller one among them.
    assert len(steps) == 2 * 3 * math.ceil(16 / minibatch_size)
    assert all(len(rows) <= (micro or minibatch_size) for (_, rows), _ in batches)


def test_check_32_ppos_prompts_come_once_before_any_comes_again(road, tmp_path, monkeypatch):
    rollouts = watch(monkeypatch, train_ppo, "collect_rollout")
    orders = watch(monkeypatch, train_ppo, "ppo_update")
    road.run("ppo", tmp_path / "run", num_steps=6, rollout_size=16, minibatch_size=16,
             micro_batch_size=0, num_epochs=1, max_new_tokens=2, lr=0.0)
    asked = [tuple(prompt) for (_, _, _, prompts, *_), _ in rollouts for prompt in prompts]
    everything = {tuple(road.tokenizer.encode_prompt(chat(question))) for question, _ in PROMPTS}
    assert len(asked) == 96 and set(asked[:40]) == set(asked[40:80]) == everything
    assert asked[:40] != asked[40:80]
    # Each iteration shuffles its minibatches by a seed of its own.
    assert len({arguments[5].initial_seed() for arguments, _ in orders}) == 6


def test_check_32_each_pass_over_the_prompts_has_an_order_of_its_own(road, tmp_path, monkeypatch):
    """Bug: one permutation for all passes, so that the same prompts always meet in a rollout."""
    without_preflight(monkeypatch)
    asked, collect_rollout = [], train_ppo.collect_rollout

    def spy(actor, reference, reward_model, prompts, *rest):
        asked.extend(map(tuple, prompts))
        return collect_rollout(actor, reference, reward_model, prompts, *rest)

    monkeypatch.setattr(train_ppo, "collect_rollout", spy)
    road.run("ppo", tmp_path, num_steps=10, dtype="float32")  # 40 prompts, 8 at a time
    first, second = asked[:40], asked[40:]
    assert len(second) == 40 and sorted(first) == sorted(second) and first != second


def test_check_32_seed_and_step_decide_the_order_of_the_minibatches(road, tmp_path, monkeypatch):
    """Bug: every seed, or every iteration, shuffles its responses alike."""
    orders, update = [], train_ppo.ppo_update
    monkeypatch.setattr(train_ppo, "ppo_update",
                        lambda *args: orders.append(args[-1].initial_seed()) or update(*args))
    for seed in (0, 1):
        road.run("ppo", tmp_path / str(seed), seed=seed, dtype="float32")
    assert len(orders) == len(set(orders)) == 4


def test_check_33_ppo_refuses_a_prompt_without_room_for_an_answer(road, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "cow?"}, {"prompt": LONG}])
    with pytest.raises(UserError, match=r"prompt 2 has \d+ tokens and fills the whole context"):
        road.run("ppo", tmp_path / "run", prompts=prompts)


def test_check_34_a_shared_critics_head_starts_at_zero(road, tmp_path, monkeypatch):
    rollouts = watch(monkeypatch, train_ppo, "collect_rollout")
    (row,) = road.run("ppo", tmp_path / "run", share_critic=True, num_steps=1, num_epochs=1,
                      minibatch_size=8, dtype="float32")
    (_, rollout), = rollouts
    assert (rollout["values"] == 0).all() and row["value_loss"] > 0
    actor = load_checkpoint(tmp_path / "run")["actor"]
    assert (actor["value_head.weight"] != 0).any()  # it learns from the first step on


def test_check_34_a_critic_is_the_reward_model_with_head_and_normalisation(road, tmp_path,
                                                                           monkeypatch, double):
    rollouts = watch(monkeypatch, train_ppo, "collect_rollout")
    road.run("ppo", tmp_path / "run", lr=0.0, critic_lr=0.0, num_steps=1, dtype="float32")
    ((actor, _, reward_model, *_), rollout), = rollouts
    source = load_checkpoint(road.folder / "rm")["model"]
    mean, std = source["score_mean"].item(), source["score_std"].item()
    assert abs(mean) > 0.01 and abs(std - 1) > 0.1
    for b, columns in response_slices(rollout):
        for t in range(columns.start, columns.stop):  # the state before tokens[:, t + 1]
            h = reward_model.trunk(rollout["tokens"][b : b + 1, : t + 1])[0, -1]
            raw = (h @ source["head.weight"].double()[0] + source["head.bias"].double()[0]).item()
            assert rollout["values"][b, t].item() == pytest.approx((raw - mean) / std, rel=1e-9)
    parts = [dict(part.named_parameters()) for part in (actor.critic, reward_model)]
    assert all(p.requires_grad for p in parts[0].values())
    assert not {p.data_ptr() for p in parts[0].values()} & {p.data_ptr() for p in parts[1].values()}
    saved = load_checkpoint(tmp_path / "run")["actor"]
    assert saved["critic.score_mean"] == mean and saved["critic.score_std"] == std


def test_check_35_both_models_log_probs_are_those_at_the_sampling_temperature(road, tmp_path):
    """Bug: the temperature scales the policy's logits and not the reference's, or the rollout's and
    not the update's.

    Curve: the KL is far from 0 at the first step, when both models are still the same, or grows
    faster than the text changes; the ratio is not 1 on the first minibatch.
    Seen: trl#3029 (GRPO did not divide logits by the sampling temperature), OpenRLHF#857 (policy
    and reference), verl#3133.
    """
    rollout, actor, reference, _, cfg, run = collect(road, tmp_path, temperature=0.7)
    for name, model in (("logprobs", actor.policy), ("ref_logprobs", reference)):
        for b, columns in response_slices(rollout)[:6]:
            ids = rollout["tokens"][b, : columns.stop + 1].tolist()
            expected = logprobs_of(model, ids, columns.start + 1, 0.7)
            close(rollout[name][b, columns], expected, rtol=1e-5, atol=1e-6)
    count = rollout["response_mask"].sum()
    _, stats = ppo_loss(actor, rollout, list(range(16)), count, run)
    assert stats["ratio_mean"] == 1 and stats["approx_kl"] == 0


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_check_35_the_kl_is_0_as_long_as_both_models_are_the_same(temperature, road, tmp_path):
    history = road.run("ppo", tmp_path / "run", temperature=temperature, lr=0.0, dtype="float32")
    for row in history:
        assert row["kl"] == 0 and abs(row["approx_kl"]) < 1e-6
        assert row["ratio_mean"] == pytest.approx(1, abs=1e-6)


def test_check_35_what_is_scored_was_sampled_at_that_temperature(road, tmp_path):
    """Near 0 the samples are the greedy answers, and their log-probs nearly 0."""
    rollout, actor, _, _, _, run = collect(road, tmp_path, temperature=1e-3)
    greedy = generate(actor.policy, prompts_of(rollout), 10, [run.tokenizer.end_id], temperature=0)
    assert torch.equal(rollout["tokens"], greedy.tokens)
    assert rollout["logprobs"].min() > -0.05 and rollout["entropy"].max() < 0.05
    with pytest.raises(UserError, match="--temperature 0"):
        road.run("ppo", tmp_path / "run", temperature=0.0)


def test_check_36_a_rollout_is_scored_on_the_ids_that_were_sampled(road, tmp_path, monkeypatch):
    """Bug: a response is decoded and encoded again on its way to the reward model or to the update:
    tokens that were sampled apart come back joined, and what is scored was never sampled.

    Curve: the ratio of an untouched policy is not 1, with rare enormous outliers; a slow KL that
    nothing explains.
    Seen: trl#5224, fixed by #5242: a tool loop decoded and encoded again, and BPE is no bijection.
    """
    made = sample_apart(train_ppo, road, monkeypatch)
    rollout, actor, reference, reward_model, cfg, run = collect(road, tmp_path, rollout_size=6)
    ((sampled, rows),) = made
    for name in ("tokens", "prompt_lens", "lengths", "ended"):
        assert torch.equal(rollout[name], getattr(sampled, name)), name
    for b, columns in response_slices(rollout):
        for name, model in (("logprobs", actor.policy), ("ref_logprobs", reference)):
            close(rollout[name][b, columns], logprobs_of(model, rows[b], columns.start + 1),
                  rtol=1e-5, atol=1e-6)
        score = reward_model(torch.tensor([rows[b]]))[0, -1].clamp(-5, 5)
        close(rollout["scores"][b], score if b != 1 else torch.tensor(-3.0), rtol=1e-5)
    seen = watch(monkeypatch, actor, "forward")
    ppo_loss(actor, rollout, [2, 0, 1], 30, run)
    ((tokens,), _), = seen
    for row, b in zip(tokens.tolist(), (2, 0, 1)):
        assert row[: len(rows[b])] == rows[b]


def test_check_36_a_real_rollout_holds_what_generate_returned(road, tmp_path, monkeypatch):
    sampled = watch(monkeypatch, train_ppo, "generate")
    rollout = collect(road, tmp_path)[0]
    assert torch.equal(rollout["tokens"], sampled[0][1].tokens)


def test_check_38_ppo_raises_the_reward_and_what_people_want(road, tmp_path):
    """Bug: learning that stops or turns round halfway, as with a rate that falls below 0: the first
    gains outlast a few wrong steps, the last rollouts tell.

    The baseline: the SFT model, whose normalised score is 0, with a deviation of 1. The judge, which
    no loss has seen, agrees; the KL penalty keeps the policy near. Over the seeds 0 to 8 the last
    six rollouts had a score of 0.69 to 0.80, a reward of 0.57 to 0.69, a gold of 0.63 to 0.77 (of
    0.03 before) and a KL of 1.1 to 1.3 nats.
    """
    judge = load_function(f"{road.tools}:judge")
    before = [judge(None, *answer)["score"] for answer in
              sampled_texts(road.folder / "sft", [question for question, _ in PROMPTS], 1.0, 4)]
    history = road.run("ppo", tmp_path, num_steps=24, rollout_size=32, minibatch_size=16,
                       micro_batch_size=0, lr=1e-3, critic_lr=3e-3, stop_kl=0.0, dtype="float32",
                       judge=f"{road.tools}:judge")
    last = {name: sum(row[name] for row in history[-6:]) / 6 for name in history[0]}
    assert history[0]["kl"] == 0 and -0.8 < history[0]["score"] < 0.4
    assert last["score"] > 0.5 and last["reward"] > 0.4
    assert last["gold"] > sum(before) / len(before) + 0.4
    assert 0.5 < last["kl"] < 2.5


def test_stop_kl_ends_an_iterations_epochs(road, tmp_path, monkeypatch):
    without_preflight(monkeypatch)
    calls, loss = [], train_ppo.loss_of
    monkeypatch.setattr(train_ppo, "loss_of",
                        lambda *a: calls.append(a) or loss(*a))
    road.run("ppo", tmp_path / "a", num_steps=1, num_epochs=4, micro_batch_size=0, stop_kl=1e-9,
             lr=1e-3, dtype="float32")
    assert len(calls) == 2  # the first minibatch has ratio 1; the second one sees a KL


def test_temperature_divides_logits_that_were_widened_before(road, tmp_path, monkeypatch):
    """Bug: bf16 logits divided by the temperature as they come out of autocast: eight bits are left
    of them, and every log-prob is off by more than an update moves it.

    Here the widened ones' log-probs are exact to 1e-5 nats, the others wrong by 1e-2.
    """
    rollout, actor, reference, _, cfg, run = collect(road, tmp_path, dtype="bfloat16",
                                                     temperature=0.7)
    tokens, mask = rollout["tokens"], rollout["response_mask"]

    def exact(model):
        with torch.no_grad(), run.autocast():
            logits = model(tokens)[:, :-1]
        assert logits.dtype == torch.bfloat16
        rounded = (logits / 0.7).double().log_softmax(-1)
        logps = (logits.double() / 0.7).log_softmax(-1)
        logprobs, wrong = (x.gather(2, tokens[:, 1:, None])[..., 0][mask] for x in (logps, rounded))
        assert (logprobs - wrong).abs().max() > 1e-2  # so that the two can be told apart
        return logprobs, -(logps.exp() * logps).sum(-1)[mask]

    logprobs, entropies = exact(actor.policy)
    near = dict(rtol=1e-5, atol=1e-5)
    close(rollout["logprobs"][mask].double(), logprobs, **near)
    close(rollout["entropy"][mask].double(), entropies, **near)
    close(rollout["ref_logprobs"][mask].double(), exact(reference)[0], **near)
    updated = train_ppo.tensors_of(actor, rollout, cfg, run)
    close(updated["new_logprobs"][mask].double(), logprobs, **near)
    calls = watch(monkeypatch, train_ppo, "ppo_policy_loss")
    ppo_loss(actor, rollout, list(range(16)), mask.sum(), run)
    [(new, _)] = new_and_old(calls)
    close(new.double(), logprobs, **near)


def test_ppo_samples_and_scores_in_the_type_that_was_asked_for(road, tmp_path, monkeypatch):
    """Bug: answers are sampled in another precision than the one that their log-probs are of."""
    seen, generate = [], train_ppo.generate
    monkeypatch.setattr(train_ppo, "generate", lambda *args, **options: seen.append(
        (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        or generate(*args, **options))
    for dtype in ("float32", "bfloat16"):
        collect(road, tmp_path / dtype, dtype=dtype)
    assert seen[0][0] is False and seen[1] == (True, torch.bfloat16)


@pytest.mark.parametrize("width", ["one token", "alike"])
def test_explained_variance_of_equal_returns_is_0(width):
    """Bug: 0 / 0 clamped to 0 / 1e-8, which logs a perfect critic, 1.000, where there is nothing to
    explain, and one that is wrong by millions where the returns are equal and the values not."""
    mask = torch.tensor([[True, width == "alike", False], [width == "alike", False, False]])
    rollout = {"response_mask": mask, "returns": 2.0 * mask,
               "values": torch.tensor([[1.0, 3.0, 0.0], [-1.0, 0.0, 0.0]]) * mask,
               "scores": torch.ones(2), "ended": torch.tensor([True, True]),
               **{name: torch.zeros(2, 3) for name in ("kl", "rewards", "entropy")}}
    if width == "one token":
        rollout = {name: value[:1] for name, value in rollout.items()}
    assert float(train_ppo.summarise(rollout, 0.1)["explained_variance"]) == 0.0
