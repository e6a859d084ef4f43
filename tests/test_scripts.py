"""The scripts: a smoke test of each option, and the bugs of this field that live in a loop."""

import copy
import dataclasses
import hashlib
import re
import sys

import pytest
import torch
from tiny_road import SCRIPTS, polite, write_rows

import evaluate
import sample
import speedrun
import train_dpo
import train_ppo
import train_rm
import train_sft
from conftest import close
from minirlhf.batches import response_mask
from minirlhf.config import field_comments, parse_config
from minirlhf.formats import read_rows, read_samples
from minirlhf.masked import token_logprobs
from minirlhf.model import ActorCritic
from minirlhf.optim import make_optimizer
from minirlhf.runs import frozen, load_checkpoint, load_model, start_run

ALL = {**SCRIPTS, "sample": sample, "evaluate": evaluate, "speedrun": speedrun}


# ---------------------------------------------------------------- every option of every script

def fields(kind):
    """(script, field) of every option of one type, so that a new option is never forgotten."""
    return [(name, field.name) for name, script in ALL.items()
            for field in dataclasses.fields(script.Config) if field.type is kind]


def other_choices():
    """(script, field, value) of every choice that a comment lists and that is not the default."""
    cases = []
    for name, field in fields(str):
        listed = re.search(r"\w+(?: \| \w+)+", field_comments(ALL[name].Config).get(field, ""))
        default = getattr(ALL[name].Config, field)
        cases += [(name, field, value) for value in (listed[0].split(" | ") if listed else [])
                  if value != default]
    return cases


def smoke(road, script, out, **changes):
    """Two or three steps of a training script, or a few answers of the others."""
    if script == "sample":
        options = dict(model=str(road.folder / "sft"), prompts=road.prompts, limit=3,
                       save=str(out / "samples.jsonl"), max_new_tokens=8)
        return sample.main(sample.Config(**{**options, **changes}))
    if script == "evaluate":
        options = dict(models="", against=str(road.folder / "sft"), prompts=road.prompts, limit=4,
                       reward_model=str(road.folder / "rm"), max_new_tokens=8, out=str(out))
        return evaluate.main(evaluate.Config(**{**options, **changes}))
    return road.run(script, out / "run", **changes)


def finite(history):
    return all(abs(value) < float("inf") for row in history for value in row.values())


# Boolean options that need a set-up of their own, and the test that gives it to them.
OWN_TESTS = {
    ("sample", "chat"): "test_chat_holds_a_conversation_of_several_turns",
    ("sample", "plain"): "test_plain_goes_on_with_the_text",
    ("speedrun", "quick"): "test_speedrun.py", ("speedrun", "overoptimize"): "test_speedrun.py",
}


@pytest.mark.parametrize("script, option", fields(bool))
def test_two_steps_with_each_boolean_option_the_other_way(script, option, road, tmp_path):
    if (script, option) in OWN_TESTS:
        assert OWN_TESTS[script, option] in {"test_speedrun.py", *globals()}
        return
    if option in ("resume", "overwrite"):  # both need a run to be there
        smoke(road, script, tmp_path)
    default = getattr(ALL[script].Config, option)
    assert finite(smoke(road, script, tmp_path, **{option: not default}))


@pytest.mark.parametrize("script, option, value", other_choices())
def test_two_steps_with_each_choice_of_a_text_option(script, option, value, road, tmp_path):
    history = smoke(road, script, tmp_path, **{option: value})
    assert script in ("sample", "evaluate") or finite(history)


@pytest.mark.parametrize("script, options", [
    ("pretrain", dict(n_kv_head=1, dropout=0.1)), ("pretrain", dict(n_hidden=0)),
    ("sft", dict(micro_batch_size=3, num_samples=2)), ("rm", dict(margin=1.0)),
    ("ppo", dict(kl_target=1.0)), ("ppo", dict(value_clip=0.0, score_clip=0.0, stop_kl=0.0)),
    ("ppo", dict(micro_batch_size=0, temperature=0.7, gamma=0.9, lam=1.0)),
    ("ppo", dict(share_critic=True, micro_batch_size=0)), ("ppo", dict(stop_kl=1e-9)),
    ("dpo", dict(micro_batch_size=3, label_smoothing=0.1)),
    ("sample", dict(top_k=3)), ("sample", dict(top_p=0.5)), ("sample", dict(num_samples=3)),
    ("evaluate", dict(best_of=0, courtesy="", refusal="", show=0, batch_size=2)),
])
def test_two_steps_with_numbers_that_switch_something(script, options, road, tmp_path):
    history = smoke(road, script, tmp_path, **options)
    assert script in ("sample", "evaluate") or finite(history)


@pytest.mark.parametrize("script", ALL)
def test_help_explains_every_option_in_a_line(script, capsys):
    config = ALL[script].Config
    assert set(field_comments(config)) == {field.name for field in dataclasses.fields(config)}
    with pytest.raises(SystemExit) as stop:
        parse_config(config, ["--help"], ALL[script].__doc__)
    text = capsys.readouterr().out
    assert stop.value.code == 0 and ALL[script].__doc__.splitlines()[0] in text
    for comment in field_comments(config).values():
        assert "".join(comment.split()) in "".join(text.split())  # lines break at hyphens too


@pytest.mark.parametrize("script", ALL)
def test_the_defaults_pass_their_own_checks(script):
    assert parse_config(ALL[script].Config, []) == ALL[script].Config()


# ---------------------------------------------------------------- the same numbers again

def without_clock(history):
    return [{k: v for k, v in row.items() if k != "tok_per_s"} for row in history]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_same_seed_gives_the_same_history_and_another_seed_another(stage, road, tmp_path):
    a, b, c = (without_clock(road.run(stage, tmp_path / name, seed=seed))
               for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert a == b != c


@pytest.fixture
def double():
    """Run in float64: Adam divides by the gradient's size, so a rounding error of a gradient that
    is nearly zero would show in the weights as a whole step."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


# ---------------------------------------------------------------- the end token

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


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_check_08_the_end_token_is_trained_in_sft_and_dpo(stage, road, tmp_path):
    """Bug: a model that gets no loss on its end token never stops."""
    gradient, is_end = end_gradient(stage, road, tmp_path)
    assert (is_end.sum(1) == 1).all()
    chosen = gradient if stage == "sft" else gradient[:4]
    assert (chosen < 0).all()  # a step down this slope raises the end token's logit
    if stage == "dpo":
        assert (gradient[4:] > 0).all()


def collect(road, tmp_path, **changes):
    """One rollout of PPO, and all that made it."""
    options = {"dtype": "float32", "rollout_size": 16, **changes}
    cfg = road.config("ppo", tmp_path / "run", **options)
    run = start_run(cfg, {"init": "sft", "reward_model": "rm"})
    policy, reward_model = run.model("init"), frozen(run.model("reward_model"))
    with torch.no_grad():  # a policy that has moved: one equal to the reference would hide mistakes
        weight = policy.trunk.blocks[1].mlp.down.weight
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    reference = frozen(run.model("init"))
    critic = copy.deepcopy(reward_model).requires_grad_(True)
    actor = ActorCritic(policy, critic)
    prompts = [run.tokenizer.encode_prompt(row["messages"])
               for row in train_ppo.read_prompts(cfg.prompts)][:cfg.rollout_size]
    rollout = train_ppo.collect_rollout(actor, reference, reward_model, prompts, cfg.beta, cfg, run)
    return rollout, actor, reference, reward_model, cfg, run


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


# ---------------------------------------------------------------- the rollout

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


def test_check_36_a_rollout_never_encodes_text_again(road, tmp_path, monkeypatch):
    """Bug: decoding a response and encoding it again gives other tokens than those sampled."""
    sampled = []
    generate = train_ppo.generate
    monkeypatch.setattr(train_ppo, "generate", lambda *a, **k: sampled.append(generate(*a, **k))
                        or sampled[0])
    rollout = collect(road, tmp_path)[0]
    assert torch.equal(rollout["tokens"], sampled[0].tokens)


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


# ---------------------------------------------------------------- the update

def digest(model):
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())
                          ).hexdigest()


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


@pytest.mark.parametrize("minibatch_size, micro", [(4, 2), (6, 0), (100, 5)])
def test_check_32_every_response_is_used_exactly_once_an_epoch(minibatch_size, micro, road,
                                                               tmp_path, monkeypatch):
    """Bug: minibatches drawn with replacement, or epochs inside the minibatches."""
    rollout, actor, _, _, cfg, run = collect(road, tmp_path, minibatch_size=minibatch_size,
                                             micro_batch_size=micro, num_epochs=3, stop_kl=0.0)
    used, loss = [], train_ppo.minibatch_loss

    def spy(actor, rollout, rows, *rest):
        used.append(rows)
        return loss(actor, rollout, rows, *rest)

    monkeypatch.setattr(train_ppo, "minibatch_loss", spy)
    optimizers = [make_optimizer(part, 0.0) for part in (actor.policy, actor.critic)]
    train_ppo.ppo_update(actor, optimizers, rollout, cfg, run, torch.Generator().manual_seed(0))
    flat = [row for rows in used for row in rows]
    epochs = [flat[i : i + 16] for i in (0, 16, 32)]
    assert len(flat) == 48 and all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert epochs[0] != epochs[1]  # shuffled anew


def test_stop_kl_ends_an_iterations_epochs(road, tmp_path, monkeypatch):
    calls, loss = [], train_ppo.minibatch_loss
    monkeypatch.setattr(train_ppo, "minibatch_loss",
                        lambda *a: calls.append(a) or loss(*a))
    road.run("ppo", tmp_path / "a", num_steps=1, num_epochs=4, micro_batch_size=0, stop_kl=1e-9,
             lr=1e-3, dtype="float32")
    # One call is the preflight's. The first minibatch has ratio 1; the second one sees a KL.
    assert len(calls) == 1 + 2


# ---------------------------------------------------------------- data of the preference stages

def test_check_27_pairs_that_are_identical_after_cutting_are_dropped_and_counted(
        road, tmp_path, capsys):
    """Bug: pairs without a difference dilute every accuracy and margin."""
    data = write_rows(tmp_path / "pairs.jsonl", [
        {"prompt": "cow?", "chosen": "moo", "rejected": "moo"},
        {"prompt": "dog?", "chosen": "woof", "rejected": "meow"},
        {"prompt": "owl?", "output": ["hoot", "moo", "moo"]}])
    rows = train_dpo.read_preferences(data)
    for script, stage in ((train_dpo, "dpo"), (train_rm, "rm")):
        cfg = road.config(stage, tmp_path / "run", data=data, **(
            {"pairs": "all"} if stage == "dpo" else {}))
        examples = script.encode(rows, road.tokenizer, 64, cfg)
        printed = capsys.readouterr().out
        if stage == "dpo":
            assert len(examples) == 3 and "2 identical" in printed
        else:
            assert [len(e["ids"]) for e in examples] == [2, 2] and "2 identical" in printed


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_check_33_rows_longer_than_the_context_are_dropped_or_cut_as_asked(
        stage, too_long, road, tmp_path, capsys):
    """Bug: a cut prompt's row met a script that needed the whole prompt, after all the training."""
    question = "What does a cow say? " * 12
    if stage == "sft":
        long = {"messages": [{"role": "user", "content": question},
                             {"role": "assistant", "content": polite("moo")}]}
        source = road.demonstrations
    else:
        long = {"prompt": question, "chosen": polite("moo"), "rejected": "moo"}
        source = road.preferences
    data = write_rows(tmp_path / "long.jsonl", [long] * 6 + [row for _, row in read_rows(source)])
    history = road.run(stage, tmp_path / "run", data=data, too_long=too_long,
                       **({"num_samples": 40, "held_out": 0.9} if stage == "sft" else {}))
    assert finite(history)
    printed = capsys.readouterr().out
    if stage == "sft":
        assert f"{46 if too_long == 'cut' else 40} dialogues" in printed
        shown = (tmp_path / "run" / "samples.txt").read_text()
        assert ("cow say? What does a cow" in shown) == (too_long == "cut")


def test_check_33_dpo_uses_the_stored_reference(road, tmp_path):
    """Bug: a precomputed reference that nothing reads."""
    cfg = road.config("dpo", tmp_path / "run", dtype="float32", beta=0.5)
    run = start_run(cfg, {"init": "sft"})
    model = run.model("init")
    pairs = train_dpo.encode(train_dpo.read_preferences(cfg.data), run.tokenizer, 64, cfg)[:6]
    train_dpo.add_reference(frozen(copy.deepcopy(model)), pairs, cfg, run)
    losses, stats = train_dpo.loss_of(model, pairs, cfg, run)
    close(losses, torch.full((6,), 2.0).log(), rtol=1e-4)  # check 25: log 2 at the start
    for pair in pairs:
        pair["ref_chosen_logp"] -= 2.0
    _, moved = train_dpo.loss_of(model, pairs, cfg, run)
    close(moved["chosen_reward"] - stats["chosen_reward"], torch.ones(6), rtol=1e-4)


def test_prompts_of_one_text_stay_on_one_side(road, tmp_path, monkeypatch):
    """Bug: pairs of a held-out prompt among the training pairs make the accuracy a memory test."""
    rows = [row for _, row in read_rows(road.preferences)]
    data = write_rows(tmp_path / "twice.jsonl", rows + rows)
    sides = {}
    for script, stage in ((train_rm, "rm"), (train_dpo, "dpo")):
        seen, held_out = [], []
        make, measure = script.make_batch, script.evaluate
        monkeypatch.setattr(script, "make_batch",
                            lambda rows, *a, make=make: seen.extend(rows) or make(rows, *a))
        monkeypatch.setattr(script, "evaluate", lambda model, rows, *a, measure=measure:
                            held_out.extend(rows) or measure(model, rows, *a))
        road.run(stage, tmp_path / stage, data=data, held_out=0.5, eval_every=100)
        key = "row" if stage == "rm" else "prompt"
        kept = {e[key] % 40 if stage == "rm" else e[key] for e in held_out}
        sides[stage] = len(kept)
        assert len(kept) == 20
        trained = [e for e in seen if not any(e is other for other in held_out)]
        assert not kept & {e[key] % 40 if stage == "rm" else e[key] for e in trained}


# ---------------------------------------------------------------- sample.py and evaluate.py

def sampled(road, capsys, **options):
    capsys.readouterr()
    sample.main(sample.Config(model=str(road.folder / "sft"), max_new_tokens=12, **options))
    return capsys.readouterr().out


def test_greedy_answers_are_the_same_on_every_run(road, capsys):
    first = sampled(road, capsys, prompt="What does a cow say?", temperature=0.0)
    assert first == sampled(road, capsys, prompt="What does a cow say?", temperature=0.0, seed=7)
    assert first.strip()


def test_plain_goes_on_with_the_text(road, capsys):
    out = sampled(road, capsys, prompt="Ann: cow?\nBen:", plain=True, num_samples=2)
    assert out.count("Ann: cow?\nBen:") == 2


def test_samples_are_read_back_with_their_rows_keys(road, tmp_path, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", [
        {"prompt": "cow?", "answer": "moo", "kind": "farm"}, {"prompt": "lion?", "kind": "wild"}])
    path = tmp_path / "samples.jsonl"
    sampled(road, capsys, prompts=prompts, save=str(path), num_samples=3)
    rows = read_samples(path)
    assert [len(row["samples"]) for row in rows] == [3, 3]
    assert [row["meta"]["kind"] for row in rows] == ["farm", "wild"]
    assert [row["answer"] for row in rows] == ["moo", None]


def test_chat_holds_a_conversation_of_several_turns(road, capsys, monkeypatch):
    """The second answer sees the first turn; the oldest turns leave when the context is full."""
    prompts, respond = [], sample.respond
    monkeypatch.setattr(sample, "respond", lambda model, ids, *a: prompts.extend(ids)
                        or respond(model, ids, *a))
    lines = iter(["cow?", "dog?", *["What does a pig say?"] * 6, ""])
    monkeypatch.setattr("builtins.input", lambda shown: next(lines))
    out = sampled(road, capsys, chat=True, temperature=0.0)
    assert out.count("assistant: ") == 8 == len(prompts)
    first, second, last = (road.tokenizer.decode(prompts[i]) for i in (0, 1, -1))
    assert first.count("<|user|>") == 1 and second.count("<|user|>") == 2
    assert "cow?" in second and "cow?" not in last and len(prompts[-1]) <= 64 - 12
    assert last.startswith("<|begin|><|user|>")


def test_chat_ends_with_the_input(road, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))
    assert "An empty line ends" in sampled(road, capsys, chat=True)


def test_evaluate_compares_tiny_models(road, tmp_path, capsys):
    road.run("dpo", tmp_path / "dpo", lr=1e-3, num_epochs=3)
    results = evaluate.main(evaluate.Config(
        models=str(tmp_path / "dpo"), against=str(road.folder / "sft"), max_new_tokens=12,
        base=str(road.folder / "pretrain"), plain=f"{road.tools}:plain_prompt",
        judge=f"{road.tools}:judge", reward_model=str(road.folder / "rm"), prompts=road.prompts,
        preferences=road.preferences, out=str(tmp_path / "eval"), best_of=2))
    players, compared = results["players"], results["comparisons"]
    assert set(players) == {"sft", "sft greedy", "dpo", "dpo greedy", "wrapper", "refuse all",
                            "best of 2", "base few-shot", "base zero-shot"}
    assert players["sft"]["kl"] == pytest.approx(0, abs=1e-4) and players["dpo"]["kl"] > 0
    assert players["best of 2"]["reward"] > players["sft"]["reward"]
    assert results["reward_model"]["accuracy"] > 0.8
    for c in compared.values():
        assert c["wins"] + c["ties"] + c["losses"] == pytest.approx(1)
        assert c["low"] <= c["rate"] <= c["high"]
    assert "dpo over sft" in capsys.readouterr().out
    rows = read_samples(tmp_path / "eval" / "dpo_greedy.jsonl")
    assert len(rows) == 40 and (tmp_path / "eval" / "results.json").exists()
