"""Checks 1 to 14: the rollout, the end token and the masks."""

import pytest
import torch
from tiny_road import collect

import train_dpo
import train_ppo
import train_sft
from conftest import close
from minirlhf.batches import response_mask
from minirlhf.masked import token_logprobs
from minirlhf.runs import start_run


def end_gradient(stage, road, tmp_path):
    """The gradient of the stage's loss at the end token's logit, wherever an answer ends, (N,); and
    where that is, (B, T-1) bool."""
    run = start_run(road.config(stage, tmp_path / "run", dtype="float32"), {"init": "sft"})
    model, cfg, end = run.model("init"), run.cfg, run.tokenizer.end_id
    if stage == "sft":
        rows = train_sft.read_demonstrations(cfg.data)
        tokens, mask = train_sft.make_batch(
            train_sft.encode(rows, run.tokenizer, 64, cfg)[:4], run.device)
    else:
        pairs = train_dpo.encode(train_dpo.read_preferences(cfg.data), run.tokenizer, 64, cfg)[:4]
        tokens, mask = train_dpo.make_batch(pairs, run.device)
        for pair in pairs:
            pair["ref_chosen_logp"] = pair["ref_rejected_logp"] = 0.0
    seen = []
    model.register_forward_hook(lambda module, inputs, logits: logits.retain_grad()
                                or seen.append(logits))
    loss = (train_sft.loss_of(model, tokens, mask) if stage == "sft"
            else train_dpo.loss_of(model, pairs, cfg, run)[0].mean())
    loss.backward()
    is_end = (tokens[:, 1:] == end) & mask  # (B, T-1): the answers' own end tokens
    return seen[0].grad[:, :-1][is_end][:, end], is_end


def test_check_03_dropout_is_off_in_rollout_and_update(road, tmp_path):
    """Bug: two dropout masks make a ratio that is not 1 though the policy has not moved."""
    road.run("pretrain", tmp_path / "pretrain", dropout=0.5)
    road.run("sft", tmp_path / "sft", init=str(tmp_path / "pretrain"))
    history = road.run("ppo", tmp_path / "ppo", init=str(tmp_path / "sft"), lr=0.0, dtype="float32")
    assert all(abs(row["approx_kl"]) < 1e-6 for row in history)


def test_check_04_the_first_minibatchs_ratio_is_exactly_1(road, tmp_path):
    rollout, actor, _, _, cfg, run = collect(road, tmp_path)
    T = rollout["tokens"].shape[1]
    with torch.no_grad():
        again = token_logprobs(actor(rollout["tokens"])[0][:, :-1], rollout["tokens"][:, 1:])
    mask = response_mask(rollout["prompt_lens"], rollout["lengths"], T)
    assert torch.equal(again[mask], rollout["logprobs"][mask])  # the same shape: to the bit
    _, stats = train_ppo.minibatch_loss(actor, rollout, list(range(16)), mask.sum(), cfg, run)
    assert stats["ratio_mean"] == 1 and stats["approx_kl"] == 0 and stats["clip_frac"] == 0


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 5e-2)])
def test_check_04_a_run_with_lr_0_keeps_the_ratio_at_1(dtype, tolerance, road, tmp_path):
    history = road.run("ppo", tmp_path / "run", lr=0.0, num_steps=3, dtype=dtype)
    for row in history:
        assert abs(row["approx_kl"]) < tolerance and abs(row["ratio_mean"] - 1) < tolerance
        assert abs(row["kl"]) < tolerance * row["length"]


def test_check_06_and_35_log_probs_of_both_models_equal_a_loop_at_the_sampling_temperature(
        road, tmp_path):
    """Bugs: off by one; a temperature that scales the policy's logits but not the reference's."""
    rollout, actor, reference, _, _, _ = collect(road, tmp_path, temperature=0.7)
    for name, model in (("logprobs", actor.policy), ("ref_logprobs", reference)):
        for b in range(4):
            p, n = int(rollout["prompt_lens"][b]), int(rollout["lengths"][b])
            row = rollout["tokens"][b, :n].tolist()
            for t in range(n - 1):
                if t + 1 < p:
                    assert rollout[name][b, t] == 0
                else:
                    logits = model(torch.tensor([row[: t + 1]]))[0, -1] / 0.7  # (V,)
                    close(rollout[name][b, t], logits.log_softmax(-1)[row[t + 1]].item(),
                          rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_check_08_the_end_token_is_trained_in_sft_and_dpo(stage, road, tmp_path):
    """Bug: a model that gets no loss on its end token never stops."""
    gradient, is_end = end_gradient(stage, road, tmp_path)
    assert (is_end.sum(1) == 1).all()
    chosen = gradient if stage == "sft" else gradient[:4]
    assert (chosen < 0).all()  # a step down this slope raises the end token's logit
    if stage == "dpo":
        assert (gradient[4:] > 0).all()


def test_check_08_ppo_trains_the_end_token_too(road, tmp_path):
    rollout, actor, _, _, cfg, run = collect(road, tmp_path)
    mask, ended = rollout["response_mask"], rollout["ended"]
    last = rollout["lengths"] - 2  # the column that emits the last response token
    rows = torch.arange(len(ended))
    assert ended.any() and mask[rows, last].all()
    emitted = rollout["tokens"][rows, last + 1]
    assert ((emitted == run.tokenizer.end_id) == ended).all()
    assert (rollout["whitened_advantages"][rows, last] != 0).all()
    seen = []
    actor.policy.register_forward_hook(lambda module, inputs, logits: logits.retain_grad()
                                       or seen.append(logits))
    loss, _ = train_ppo.minibatch_loss(actor, rollout, rows.tolist(), mask.sum(), cfg, run)
    loss.backward()
    slope = seen[0].grad[rows, last][:, run.tokenizer.end_id]  # (B,)
    advantages = rollout["whitened_advantages"][rows, last]
    assert (slope.sign() == -advantages.sign())[ended].all()


def test_check_09_and_10_each_response_earns_its_score_less_beta_times_its_kl(road, tmp_path):
    """Bugs: the reward on the first filler; a score for a response that never ended."""
    rollout, _, _, reward_model, cfg, _ = collect(road, tmp_path, max_new_tokens=6, score_clip=0.5)
    mask, ended, lengths = rollout["response_mask"], rollout["ended"], rollout["lengths"]
    assert 0 < ended.sum() < len(ended)
    raw = torch.stack([reward_model.raw(row[None, :n])[0, -1]
                       for row, n in zip(rollout["tokens"], lengths.tolist())])  # (B,)
    scores = ((raw - reward_model.score_mean) / reward_model.score_std).clamp(-0.5, 0.5)
    scores[~ended] = cfg.missing_end_score
    close(rollout["scores"], scores, rtol=1e-5, atol=1e-6)
    expected = -cfg.beta * (rollout["logprobs"] - rollout["ref_logprobs"])  # (B, T-1)
    expected[torch.arange(len(ended)), lengths - 2] += scores
    close(rollout["rewards"], expected, rtol=1e-5, atol=1e-6)
    for name in ("logprobs", "ref_logprobs", "values", "kl", "rewards", "advantages", "returns",
                 "whitened_advantages", "entropy"):
        assert (rollout[name][~mask] == 0).all(), name
    close(rollout["returns"], rollout["advantages"] + rollout["values"], rtol=1e-5)
