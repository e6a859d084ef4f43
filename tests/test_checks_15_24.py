"""Checks 15 to 24: the arithmetic of PPO, and what every optimizer step has to do."""

import contextlib
import itertools
import math
import re
import statistics
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_road import SCRIPTS, collect, digest, without_clock
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from conftest import awake_gpt, close, tiny_config, wake
from minirlhf.batches import pad_right
from minirlhf.generate import Rollout
from minirlhf.masked import token_logprobs
from minirlhf.model import GPT, ActorCritic, ScalarModel
from minirlhf.rl import gae, group_advantages, kl_estimate
from minirlhf.plumbing.optim import make_optimizer
from minirlhf.plumbing.runs import Run, frozen, load_checkpoint, load_model


def responses(rollout, *names):
    """Row by row, what the named tensors hold on the response: lists of Python numbers."""
    for b, (start, end) in enumerate(zip(rollout["prompt_lens"].tolist(),
                                         rollout["lengths"].tolist())):
        # The token at index t + 1 is emitted in column t.
        yield b, *(rollout[name][b, start - 1 : end - 1].tolist() for name in names)


# ---------------------------------------------------------------- 15

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


def test_check_15_gae_reads_no_filler_and_edits_no_argument():
    """Bug: an in-place edit of values, which the value clip needs unchanged afterwards."""
    rewards, values = torch.tensor([[8.0, 1.0, 2.0, 7.0]]), torch.tensor([[9.0, 3.0, 5.0, 6.0]])
    arguments = rewards.clone(), values.clone(), torch.tensor([[False, True, True, False]])
    advantages, returns = gae(*arguments, gamma=0.5, lam=0.5)
    # deltas: 1 + 5 / 2 - 3 and 2 - 5; from the end -3 and 0.5 - 3 / 4.
    assert advantages.tolist() == [[0.0, -0.25, -3.0, 0.0]]
    assert returns.tolist() == [[0.0, 2.75, 2.0, 0.0]]
    assert torch.equal(arguments[0], rewards) and torch.equal(arguments[1], values)


# ---------------------------------------------------------------- 16

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
        _, stats = train_ppo.minibatch_loss(actor, rollout, rows, denominator, cfg, run)
        close(stats["policy_loss"], -sum(expected) / len(expected), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- 17

END, PROMPT, TEMPERATURE = 0, [3, 1], 0.7
RESPONSES = [[END], *([i, j] for i in range(1, 5) for j in range(5))]  # all of up to two tokens


def all_responses(*_, **__):
    """In place of `generate`: every response once. A sum over the rows, each weighted with its
    probability, is then an exact expectation."""
    tokens, lengths = pad_right([PROMPT + response for response in RESPONSES])
    ended = torch.tensor([response[-1] == END for response in RESPONSES])
    return Rollout(tokens, torch.full_like(lengths, len(PROMPT)), lengths, ended)


def next_logprobs(model, prefix):
    """(5,) nats, of the token after the prompt and this beginning of a response."""
    return (model(torch.tensor([PROMPT + prefix]))[0, -1] / TEMPERATURE).log_softmax(-1)


def response_logprobs(model):
    """(21, 2) nats, token by token from the prefixes alone; 0 where there is no second token."""
    return torch.stack([
        torch.stack([next_logprobs(model, response[:i])[response[i]] if i < len(response)
                     else torch.zeros(()).double() for i in range(2)]) for response in RESPONSES])


def policy_and_reference():
    policy, reference = awake_gpt(vocab_size=5), GPT(tiny_config(vocab_size=5)).double()
    return policy, frozen(wake(reference, seed=2))


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


# ---------------------------------------------------------------- 18

def gradients(loss, module):
    """d loss / d parameter, for each parameter of the module; zeros where there is no path."""
    params = list(module.parameters())
    assert loss.requires_grad
    found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found)]


def same_gradients(mine, exact, rtol=1e-9):
    """Whether each parameter's gradient agrees, up to rounding of its own size."""
    return all((a - b).norm() <= rtol * b.norm() for a, b in zip(mine, exact, strict=True))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_check_18_gradients_of_kl_losses_over_sequences_against_enumeration(kind):
    """Bug: k1 as a loss, whose gradient is only noise, or k3, which descends another KL: what
    estimates the KL well does not for that reason have the KL's gradient.

    Curve: with k1 the KL grows alike for every coefficient; with k3 its gradient has spikes.
    Seen: huggingface/trl#2277, where Nash-MD differentiated the summed log-ratio, and
    OpenRLHF#1309; arXiv 2506.09477 collects the pitfalls.
    """
    policy, reference = policy_and_reference()
    logp, logq = response_logprobs(policy).sum(1), response_logprobs(reference).sum(1)  # (21,)
    p = logp.exp().detach()  # samples are drawn, not differentiated
    loss = (p * kl_estimate(logp[:, None], logq[:, None], kind).squeeze(1)).sum()
    kl = (logp.exp() * (logp - logq)).sum()
    reverse = (logq.exp() * (logq - logp)).sum()
    mine, forward, backward = (gradients(x, policy) for x in (loss, kl, reverse))
    assert not same_gradients(forward, backward, rtol=0.1)
    if kind == "k1":  # zero, measured by the size that it should have had
        assert all(g.norm() <= 1e-9 * size.norm() for g, size in zip(mine, forward))
    else:
        assert same_gradients(mine, forward if kind == "k2" else backward)


def test_check_18_k2_per_token_is_exact_given_the_prefix_only():
    """Bug: believing that it differentiates the KL of whole sequences too; it does not see that the
    first token chooses which prefixes come."""
    policy, reference = policy_and_reference()
    logp, logq = response_logprobs(policy), response_logprobs(reference)  # (21, 2)
    p = logp.sum(1).exp().detach()  # (21,)
    mine = gradients((p * kl_estimate(logp, logq, "k2").sum(1)).sum(), policy)

    def kl(prefix):
        new, ref = next_logprobs(policy, prefix), next_logprobs(reference, prefix)  # (5,)
        return (new.exp() * (new - ref)).sum()

    first = next_logprobs(policy, []).exp().detach()  # (5,)
    given_prefix = kl([]) + sum(first[i] * kl([i]) for i in range(1, 5))
    whole = (logp.sum(1).exp() * (logp - logq).sum(1)).sum()
    assert same_gradients(mine, gradients(given_prefix, policy))
    assert not same_gradients(mine, gradients(whole, policy), rtol=0.01)


def test_check_18_ppo_charges_the_kl_in_the_reward_and_never_as_a_loss(road, tmp_path):
    """Bug: the k1 of the reward added to the loss a second time."""
    rollout, actor, _, _, cfg, run = collect(road, tmp_path)
    assert not any(tensor.requires_grad for tensor in rollout.values())
    rollout["whitened_advantages"] = torch.zeros_like(rollout["advantages"])
    loss, _ = train_ppo.minibatch_loss(actor, rollout, list(range(16)),
                                       rollout["response_mask"].sum(), cfg, run)
    assert rollout["kl"].abs().sum() > 1 and cfg.beta > 0
    assert all((g == 0).all() for g in gradients(loss, actor.policy))


# ---------------------------------------------------------------- 19

def places(*modules):
    """Where the modules' numbers lie in memory."""
    return {tensor.data_ptr() for module in modules for tensor in module.state_dict().values()}


def keep_models(monkeypatch, stop_at=0):
    """The models that train_ppo.main works with, as [actor, reference, reward model] of each
    iteration; stop_at: the iteration that Ctrl-C ends before it begins."""
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


def test_check_19_dpos_reference_is_another_model_than_the_one_that_learns(road, tmp_path,
                                                                           monkeypatch):
    """Bug: one model in both roles."""
    references, learners = [], []
    add_reference, loss_of = train_dpo.add_reference, train_dpo.loss_of
    monkeypatch.setattr(train_dpo, "add_reference",
                        lambda model, *a: references.append(model) or add_reference(model, *a))
    monkeypatch.setattr(train_dpo, "loss_of",
                        lambda model, *a: learners.append(model) or loss_of(model, *a))
    road.run("dpo", tmp_path / "run")
    (reference,), learner = references, learners[-1]
    assert digest(reference) == digest(load_model(road.folder / "sft")[0]) != digest(learner)
    assert not places(reference) & places(learner)
    assert not any(module.training for module in reference.modules())
    assert not any(p.requires_grad for p in reference.parameters())


def test_check_19_a_reward_model_in_training_leaves_the_sft_model_alone(road, tmp_path,
                                                                        monkeypatch):
    """Bug: a shared trunk, so that a spoilt SFT model writes the answers that set the scale."""
    writers, measure = [], train_rm.measure_scores
    monkeypatch.setattr(train_rm, "measure_scores", lambda model, policy, *a:
                        writers.append(policy) or measure(model, policy, *a))
    road.run("rm", tmp_path / "run")
    assert digest(writers[0]) == digest(load_model(road.folder / "sft")[0])


# ---------------------------------------------------------------- 20

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


def shared(actor):
    """The same policy with a head for its values on its own trunk, a head that is awake."""
    model = ActorCritic(actor.policy)
    wake(model.value_head, std=0.1)
    return model


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
    loss, stats = train_ppo.minibatch_loss(actor, rollout, list(range(16)),
                                           rollout["response_mask"].sum(), cfg, run)
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
    loss, _ = train_ppo.minibatch_loss(actor, rollout, list(range(16)),
                                       rollout["response_mask"].sum(), cfg, run)
    learns = [actor.policy.trunk, actor.value_head] if share_critic else [actor.critic]
    for part in learns:
        assert all((g != 0).any() for g in gradients(loss, part))


@contextlib.contextmanager
def watched_steps():
    """Of each optimizer step: the optimizer, its parameters' gradients in a row, its rates."""
    steps = []

    def before_step(optimizer, *_):
        groups = optimizer.param_groups
        gradient = [p.grad.flatten() for group in groups for p in group["params"]]
        steps.append(SimpleNamespace(optimizer=optimizer, gradient=torch.cat(gradient),
                                     rates=[group["lr"] for group in groups]))

    handle = register_optimizer_step_pre_hook(before_step)
    try:
        yield steps
    finally:
        handle.remove()


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


# ---------------------------------------------------------------- 21

class Scaler(torch.amp.GradScaler):
    """A loss scaler that is on whatever the dtype, so that a gradient left scaled shows."""

    def __init__(self, device, **_):
        super().__init__(device, init_scale=1024.0)


def record(monkeypatch, owner, name, letter, events):
    """Write a letter into events at each call of owner.name."""
    function = getattr(owner, name)

    def recorder(*arguments, **options):
        events.append(letter)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, recorder)


def events_of(monkeypatch):
    """A list that will hold a letter for every backward, unscale, clip, step, zero and update."""
    events = []
    for owner, name in ((torch.Tensor, "backward"), (Scaler, "unscale_"), (Scaler, "step"),
                        (torch.nn.utils, "clip_grad_norm_"), (torch.optim.Optimizer, "zero_grad"),
                        (Scaler, "update")):
        letter = "+" if name == "update" else name[0]
        record(monkeypatch, owner, name, letter, events)
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    monkeypatch.setattr(Run, "preflight", lambda *_: None)  # its backward is no training step
    return events


@pytest.mark.parametrize("stage", SCRIPTS)
def test_check_21_every_stage_goes_backward_unscale_clip_step_zero(stage, road, tmp_path,
                                                                   monkeypatch):
    """Bug: clipping before unscaling, which clips the loss scale and not the gradient; stepping
    before clipping; gradients of one step that add up into the next.

    Curve: the logged gradient norm is the loss scale times too large and the loss falls slowly;
    or, with gradients that add up, the norm grows step by step.
    Seen: Lightning#9599, mended in #9606, and pytorch/examples#1196: clipped before unscaled. As to
    the betas, OpenRLHF 59d77665: the critic's optimizer ignored those that were asked for.
    """
    options = dict(dtype="float32", grad_clip=0.02)
    options.update({"stop_kl": 0.0} if stage == "ppo" else {"eval_every": 1})
    if stage != "pretrain":  # which has no micro-batches
        options["micro_batch_size"] = 3
    plain = road.run(stage, tmp_path / "plain", **options)
    events = events_of(monkeypatch)
    with watched_steps() as steps:
        scaled = road.run(stage, tmp_path / "scaled", **options)
    num_optimizers = 2 if stage == "ppo" else 1
    order = "".join(events)
    assert re.fullmatch(f"(b+(ucsz){{{num_optimizers}}})+", order.replace("+", ""))
    assert len(steps) == order.count("s") == num_optimizers * order.count("+") > 2
    # Each optimizer steps by its own clipped gradient (clipping divides by the norm plus 1e-6) ...
    assert [step.gradient.norm().item() for step in steps] == pytest.approx([0.02] * len(steps),
                                                                            rel=1e-4)
    # ... and the scale, a power of two, leaves no trace, not in the last bit.
    assert without_clock(scaled) == without_clock(plain)


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
        seen, loss = [], train_ppo.minibatch_loss
        with monkeypatch.context() as patched:
            patched.setattr(train_ppo, "minibatch_loss",
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


@pytest.mark.parametrize("stage", SCRIPTS)
def test_check_21_the_two_betas_are_two_numbers(stage, road, tmp_path):
    """Bug: one decay for both moments, or a pair that never reaches the optimizer."""
    road.run(stage, tmp_path)
    states = {k: v for k, v in load_checkpoint(tmp_path).items() if k.startswith("optimizer")}
    assert len(states) == (2 if stage == "ppo" else 1)
    for state in states.values():
        for group in state["param_groups"]:
            assert group["betas"] == (0.9, 0.95)
            assert group["eps"] == (1e-5 if stage == "ppo" else 1e-8)


def test_check_21_adamws_second_step_by_hand():
    """Bug: the betas exchanged or equal, which the first step, sign(g), cannot show."""
    layer = torch.nn.Linear(1, 1, bias=False).double()
    weight = layer.weight.item()
    optimizer = make_optimizer(layer, lr=0.1, eps=1e-3)
    m = v = 0.0
    for step, gradient in enumerate((2.0, -0.5), start=1):
        layer.weight.grad = torch.tensor([[gradient]]).double()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        weight -= 0.1 * m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.95**step)) + 1e-3)
        close(layer.weight, [[weight]])


# ---------------------------------------------------------------- 22

@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_check_22_equal_rewards_teach_nothing_though_their_mean_is_rounded(dtype, scale):
    """Bug: equal rewards recognised by a small deviation, or by an epsilon added to it: a mean is
    rounded, and the rounding error divided by a deviation of its own size is near 1.

    Curve: rare isolated spikes of loss and gradient norm, from groups that should teach nothing.
    Seen: verl#4598, where rewards that are all 0.2 teach something; NVIDIA-NeMo/RL#4161, where such
    a residue gave a loss of -26 in one step.
    """
    rounding_errors = 0
    # Seven times 0.1 first. PyTorch adds up one row in another order than several.
    for value in (0.1, 0.2, 1 / 3, -3.0, 0.0, 1e6 + 0.1, 1e-30):
        for K in (7, 2, 3, 5, 6, 10, 11):
            for B in (1, 2):
                scores = torch.full((B, K), value, dtype=dtype)
                assert group_advantages(scores, scale).tolist() == [[0.0] * K] * B
                rounding_errors += (scores.mean(1) != scores[:, 0]).any().item()
    assert rounding_errors > 0  # else the test would show nothing


def test_check_22_a_difference_is_a_difference_however_small():
    """Bug: an epsilon that takes rewards which do differ for equal."""
    scores = torch.tensor([[1e-9, 0.0], [5.0, 5.0 + 1e-9]], dtype=torch.float64)
    root = 1 / math.sqrt(2)
    close(group_advantages(scores), [[root, -root], [-root, root]], rtol=1e-6)


@pytest.mark.parametrize("scale", [True, False])
def test_check_22_a_group_of_one_gets_zero(scale):
    """Bug: the unbiased deviation of one number, 0 / 0, or the raw score as its own advantage."""
    assert group_advantages(torch.tensor([[3.0], [-7.0]]), scale).tolist() == [[0.0], [0.0]]


def test_check_22_group_advantages_by_hand():
    """Bug: the biased deviation, which gives two responses 1 and -1; a mean over all prompts."""
    scores = torch.tensor([[3.0, 1.0], [-2.0, 5.0], [4.0, 4.0]], dtype=torch.float64)
    before, root = scores.clone(), 1 / math.sqrt(2)
    close(group_advantages(scores), [[root, -root], [-root, root], [0.0, 0.0]])
    assert group_advantages(scores, scale=False).tolist() == [[1, -1], [-3.5, 3.5], [0, 0]]
    assert torch.equal(scores, before)


def test_check_22_group_advantages_equal_a_loop_over_prompts(generator):
    """Bug: any slip; here beside the deviation of Python's own library."""
    scores = 2 + 3 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    scores[2] = 0.1
    for row, scaled, centred in zip(scores.tolist(), group_advantages(scores),
                                    group_advantages(scores, scale=False)):
        mean, deviation = statistics.fmean(row), statistics.stdev(row)
        equal = len(set(row)) == 1
        close(centred, [0.0 if equal else r - mean for r in row])
        close(scaled, [0.0 if equal else (r - mean) / deviation for r in row])


# ---------------------------------------------------------------- 23

@pytest.mark.parametrize("stage, options", [
    ("sft", {}), ("rm", {"margin": 1.0}), ("dpo", {}), ("ppo", {}), ("ppo", {"share_critic": True}),
])
def test_check_23_micro_batches_give_the_full_batchs_steps(stage, options, road, tmp_path, double):
    """Bug: a mean of the micro-batches' means, in which a short one's tokens weigh more.

    Curve: runs with 1 and with 32 micro-batches have different curves of loss and gradient norm;
    without any division both are as many times too large.
    Seen: huggingface/transformers#24725 and #34191, pytorch/torchtune#1875 and, for DPO,
    huggingface/trl#2615.
    """
    options = {"dtype": "float32", **options, **({} if stage == "ppo" else {"held_out": 0.3})}
    runs = []
    for micro in (0, 3):  # 8 and, at the end, 4 rows a step; minibatches of 4 in PPO: 3 + 1
        with watched_steps() as steps:
            history = road.run(stage, tmp_path / str(micro), micro_batch_size=micro, **options)
        runs.append((without_clock(history), [step.gradient for step in steps]))
    (full, full_steps), (split, split_steps) = runs
    # PPO takes its log-probs in float32, whatever the model's precision.
    rtol = 1e-6 if stage == "ppo" else 1e-9
    assert len(full_steps) > 2
    for a, b in zip(split_steps, full_steps, strict=True):
        assert (a - b).norm() <= rtol * b.norm()
    for a, b in zip(split, full, strict=True):
        for key in b:
            assert a[key] == pytest.approx(b[key], rel=rtol, abs=1e-9), key


@pytest.mark.parametrize("share_critic", [False, True])
def test_check_23_every_minibatch_is_divided_by_its_own_number_of_tokens(
        share_critic, road, tmp_path, double, monkeypatch):
    """Bug: the count of a micro-batch, of the whole rollout, or of rows; statistics left as the sum
    of the micro-batches' means."""
    rollout, actor, cfg, run = moved(road, tmp_path, share_critic, minibatch_size=10, grad_clip=1e9,
                                     micro_batch_size=4, num_epochs=1)
    calls, loss = [], train_ppo.minibatch_loss
    monkeypatch.setattr(train_ppo, "minibatch_loss", lambda actor, rollout, rows, *rest:
                        calls.append(rows) or loss(actor, rollout, rows, *rest))
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


def test_check_23_the_sft_loss_is_the_mean_over_all_trained_tokens_of_the_batch(road, tmp_path,
                                                                               monkeypatch):
    """Bug: a count of all tokens, of rows, or of the filler too."""
    batches, make_batch = [], train_sft.make_batch
    monkeypatch.setattr(train_sft, "make_batch", lambda examples, device:
                        batches.append(examples) or make_batch(examples, device))
    history = road.run("sft", tmp_path / "run", dtype="float32", lr=0.0, batch_size=40,
                       micro_batch_size=16)
    model = load_model(road.folder / "pretrain")[0]

    def nats(examples):  # without any filler
        total, count = 0.0, 0
        for ids, mask in examples:
            logps = model(torch.tensor([ids]))[0].log_softmax(-1)  # (T, V)
            for t in range(1, len(ids)):
                total -= logps[t - 1, ids[t]].item() * mask[t]
                count += mask[t]
        return total / count

    # The preflight's batch, the micro-batches of the only step, the held-out one.
    _, *micro, held_out = batches
    assert [len(rows) for rows in micro] == [16, 16, 6] and len(held_out) == 2
    assert history[0]["loss"] == pytest.approx(nats(sum(micro, [])), rel=1e-5)
    assert history[0]["val_loss"] == pytest.approx(nats(held_out), rel=1e-5)


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_check_23_a_smaller_batch_is_divided_by_its_own_size(stage, road, tmp_path):
    """Bug: the last, smaller batch of an epoch divided by the size of the others."""
    history = road.run(stage, tmp_path, dtype="float32", batch_size=100, micro_batch_size=7)
    # One step, on 36 prompts or pairs. A new head scores all answers alike, and DPO's policy is its
    # reference still: nobody prefers anything yet.
    assert len(history) == 1 and history[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_check_23_pretrainings_held_out_loss_weighs_every_block_alike(generator):
    """Bug: a mean of the batches' means, in which the last, shorter batch weighs more."""
    model = awake_gpt(vocab_size=50)
    stream = torch.randint(50, (7 * 16 + 5,), generator=generator)
    blocks = stream[: 7 * 16].view(7, 16)
    nats = F.cross_entropy(model(blocks)[:, :-1].reshape(-1, 50), blocks[:, 1:].reshape(-1))
    run = SimpleNamespace(autocast=contextlib.nullcontext, device="cpu")
    for batch_size in (3, 7, 100):
        cfg = SimpleNamespace(batch_size=batch_size, block_size=16)
        assert train_pretrain.evaluate(model, stream, cfg, run) == pytest.approx(
            nats.item(), rel=1e-9)


# ---------------------------------------------------------------- 24

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
    loss, stats = train_ppo.minibatch_loss(actor, rollout, rows, rollout["response_mask"].sum(),
                                           cfg, run)
    assert stats["clip_frac"].item() == pytest.approx(  # the clipped side goes with the sign
        (cases[True, 1] + cases[False, -1]) / sum(cases.values()), rel=1e-6)
    assert set(stats) == set(slow)
    for name in slow:
        close(stats[name].double(), slow[name].item(), rtol=1e-5)
    total = slow["policy_loss"] + (cfg.vf_coef if share_critic else 1.0) * slow["value_loss"]
    close(loss, total.item(), rtol=1e-5)
    assert same_gradients(gradients(loss, actor), gradients(total, actor), rtol=1e-5)
