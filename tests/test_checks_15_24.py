"""Checks 15 to 24: the arithmetic of PPO."""

import pytest
import torch
from tiny_road import collect, digest, without_clock

import train_ppo
from conftest import close
from minirlhf.optim import make_optimizer
from minirlhf.runs import load_checkpoint, load_model


@pytest.mark.parametrize("share_critic", [False, True])
def test_check_19_reference_and_reward_model_stay_as_they_were(share_critic, road, tmp_path,
                                                               monkeypatch):
    """Bug: a reference that shares its tensors with the policy, and so drifts along with it."""
    kept, rollouts = [], train_ppo.collect_rollout

    def keep(actor, reference, reward_model, *rest):
        kept.append((actor, reference, reward_model))
        return rollouts(actor, reference, reward_model, *rest)

    monkeypatch.setattr(train_ppo, "collect_rollout", keep)
    road.run("ppo", tmp_path / "run", share_critic=share_critic, num_steps=3)
    actor, reference, reward_model = kept[-1]
    assert digest(reference) == digest(load_model(road.folder / "sft")[0])
    assert digest(reward_model) == digest(load_model(road.folder / "rm", "scalar")[0])
    assert digest(actor.policy) != digest(reference)
    if not share_critic:
        assert digest(actor.critic) != digest(reward_model)
    frozen_ones = [*reference.parameters(), *reward_model.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen_ones)


def test_check_20_the_critic_learns_to_predict_returns(road, tmp_path):
    """Bug: a critic without gradient. The policy stands still, so only the critic can improve."""
    history = road.run("ppo", tmp_path / "run", lr=0.0, num_steps=16, rollout_size=32,
                       minibatch_size=16, micro_batch_size=0, critic_lr=2e-3, value_clip=0.0,
                       dtype="float32")
    explained = [row["explained_variance"] for row in history]
    assert sum(explained[-4:]) / 4 > max(0.1, explained[0] + 0.2)


def test_check_21_each_step_clips_the_unscaled_gradient_and_then_clears_it(road, tmp_path,
                                                                           monkeypatch):
    """Bugs: clipping before unscaling, which clips the loss scale away; gradients that add up."""
    rollout, actor, _, _, cfg, run = collect(road, tmp_path, dtype="float16", num_epochs=1)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    events, norms = [], []
    clip = torch.nn.utils.clip_grad_norm_

    def spy_clip(params, largest):
        events.append("clip")
        norms.append(clip(params, largest).item())
        return norms[-1]

    for name in ("unscale_", "step", "update"):
        monkeypatch.setattr(run.scaler, name, lambda *a, name=name, f=getattr(run.scaler, name):
                            events.append(name) or f(*a))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy_clip)
    optimizers = [make_optimizer(part, 1e-4) for part in (actor.policy, actor.critic)]
    train_ppo.ppo_update(actor, optimizers, rollout, cfg, run, torch.Generator().manual_seed(0))
    one = ["unscale_", "clip", "step"] * 2 + ["update"]
    assert events == one * (16 // cfg.minibatch_size)
    assert max(norms) < 100  # 1024 times larger if still scaled
    assert all(p.grad is None for p in actor.parameters())
    betas = optimizers[0].param_groups[0]["betas"]
    assert betas[0] != betas[1]


@pytest.mark.parametrize("stage, full, micro", [
    ("sft", dict(micro_batch_size=0), dict(micro_batch_size=3)),
    ("dpo", dict(micro_batch_size=0), dict(micro_batch_size=3)),
    ("ppo", dict(micro_batch_size=0), dict(micro_batch_size=3)),
    ("ppo", dict(micro_batch_size=0, share_critic=True),
     dict(micro_batch_size=3, share_critic=True)),
])
def test_check_23_micro_batches_give_the_full_batchs_weights(stage, full, micro, road, tmp_path,
                                                             double):
    """Bug: a mean of the micro-batches' means, in which a short one's tokens weigh more."""
    runs = [road.run(stage, tmp_path / str(i), dtype="float32", **options)
            for i, options in enumerate((full, micro))]
    weights = [load_checkpoint(tmp_path / str(i))["model"] for i in range(2)]
    start = load_checkpoint(road.folder / "sft")["model"]
    for name in weights[0]:
        close(weights[1][name], weights[0][name], rtol=1e-7, atol=1e-10)
    assert any((weights[0][name] - start[name]).abs().max() > 1e-6 for name in start)
    for a, b in zip(*map(without_clock, runs)):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-9), key
