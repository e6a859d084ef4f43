"""Checks 1 to 14: the rollout, the end token and the masks.

Every test goes through what the scripts call: their own encoding, batches, rollouts and losses.
"""

import dataclasses

import pytest
import torch
from tiny_road import (PROMPTS, SCRIPTS, chat, collect, polite, rude, with_dropout,
                       without_clock)

import sample
import train_dpo
import train_ppo
import train_rm
import train_sft
from conftest import close
from minirlhf import generate as sampling
from minirlhf.batches import pad_right
from minirlhf.losses import ppo_policy_loss, ppo_value_loss, sft_loss
from minirlhf.model import ScalarModel
from minirlhf.plumbing.optim import make_optimizer
from minirlhf.plumbing.runs import build_model, frozen, load_checkpoint, load_model, start_run

STAGES = ["sft", "rm", "dpo", "ppo"]
NAN = float("nan")


@pytest.fixture
def float64(double, monkeypatch):
    """float64 all the way: the scripts' `.float()` is there to widen bf16, not to narrow this."""
    narrow = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float",
                        lambda x: x if x.dtype == torch.float64 else narrow(x))


def spy(monkeypatch, where, name):
    """Keep every call of where.name from now on: [(arguments, result)]."""
    calls, function = [], getattr(where, name)

    def keep(*args, **options):
        calls.append((args, function(*args, **options)))
        return calls[-1][1]

    monkeypatch.setattr(where, name, keep)
    return calls


def start(stage, road, tmp_path, **changes):
    """(model, rows, run): what the stage's main has before its first step, four rows of its data;
    of PPO the actor and a rollout."""
    changes = {"dtype": "float32", **changes}
    if stage == "ppo":
        rollout, actor, _, _, _, run = collect(road, tmp_path, **changes)
        return actor, rollout, run
    script = SCRIPTS[stage]
    run = start_run(road.config(stage, tmp_path / stage, **changes), {"init": "sft"})
    read = train_sft.read_demonstrations if stage == "sft" else train_dpo.read_preferences
    # Every eleventh row: another animal, another way to ask, pairs as well as lists.
    rows = script.encode(read(run.cfg.data), run.tokenizer, 64, run.cfg)[::11]
    if stage == "rm":
        return load_model(road.folder / "rm", "scalar")[0], rows, run
    model = run.model("init")
    with torch.no_grad():  # a policy that has moved: at the start DPO's pairs would all look alike
        model.trunk.blocks[1].mlp.down.weight.mul_(2)
    if stage == "dpo":
        train_dpo.add_reference(frozen(run.model("init")), rows, run.cfg, run)
    return model, rows, run


def loss_of(stage, model, rows, run):
    """The script's own loss of these rows."""
    if stage == "sft":
        return train_sft.loss_of(model, *train_sft.make_batch(rows, run.device))
    if stage == "rm":
        return train_rm.loss_of(model, train_rm.make_batch(rows, 1.0, run.device)).mean()
    if stage == "dpo":
        return train_dpo.loss_of(model, rows, run.cfg, run)[0].mean()
    everything = list(range(len(rows["lengths"])))
    return train_ppo.minibatch_loss(model, rows, everything, rows["response_mask"].sum(), run.cfg,
                                    run)[0]


def sequences(stage, rows):
    """The ids of each sequence in the stage's batch, without filler."""
    if stage == "sft":
        return [ids for ids, _ in rows]
    if stage == "rm":
        return [ids for row in rows for ids in row["ids"]]
    if stage == "dpo":
        return [pair[name][0] for name in ("chosen", "rejected") for pair in rows]
    return [ids[:n] for ids, n in zip(rows["tokens"].tolist(), rows["lengths"].tolist())]


def head_of(stage, model):
    return model.head if stage == "rm" else (model.policy if stage == "ppo" else model).lm_head


def backward(stage, model, rows, run):
    """Run the loss and its gradients; returns it and the head's outputs (N, T, .) with theirs."""
    seen = []
    handle = head_of(stage, model).register_forward_hook(
        lambda module, inputs, out: seen.append(out) or out.retain_grad())
    model.zero_grad()
    loss = loss_of(stage, model, rows, run)
    loss.backward()
    handle.remove()
    assert len(seen) == 1  # each sequence is forwarded once
    return loss, seen[0]


def results(stage, model, rows, run):
    """What filler must not touch: the outputs at real tokens, the loss, every gradient."""
    loss, outputs = backward(stage, model, rows, run)
    lengths = torch.tensor([len(ids) for ids in sequences(stage, rows)])
    real = torch.arange(outputs.shape[1]) < lengths[:, None]  # (N, T)
    return [outputs[real], loss, *[p.grad.clone() for p in model.parameters()]]


def refill(tokens, lengths, filler=0, more=0):
    """The same rows with another id as filler, and with more of it."""
    tokens = torch.nn.functional.pad(tokens, (0, more))  # (B, T + more)
    return torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens, filler)


def refilled(stage, rows, monkeypatch, **how):
    """Let the stage's batches have another filler; returns the rows to use from now on."""
    if stage == "ppo":
        return {**rows, "tokens": refill(rows["tokens"], rows["lengths"], **how)}

    def pad(ids, device):
        tokens, lengths = pad_right(ids, device)
        return refill(tokens, lengths, **how), lengths

    monkeypatch.setattr(SCRIPTS[stage], "pad_right", pad)
    return rows


def refill_rollouts(monkeypatch, **how):
    """Let every rollout of PPO come with another filler."""
    def sample_and_refill(*args, **options):
        rollout = sampling.generate(*args, **options)
        return dataclasses.replace(rollout, tokens=refill(rollout.tokens, rollout.lengths, **how))

    monkeypatch.setattr(train_ppo, "generate", sample_and_refill)


@pytest.mark.parametrize("stage", STAGES)
def test_check_01_the_fillers_content_changes_no_bit_of_a_loss_or_gradient(stage, road, tmp_path,
                                                                         monkeypatch):
    """Bug: real tokens attend to filler, or positions count it, so that a row's log-probs depend on
    which other rows happen to share its batch.

    Curve: KL and ratio are off from step 0; all curves move when only the batch size does.
    Seen: trl#2708, GRPO's log-probs came from a forward pass without the attention mask that its
    left padding needs; trlx#509, position ids did not know of the padding.
    """
    model, rows, run = start(stage, road, tmp_path)
    plain = results(stage, model, rows, run)
    for filler in (5, 340):
        other = results(stage, model, refilled(stage, rows, monkeypatch, filler=filler), run)
        assert all(torch.equal(a, b) for a, b in zip(other, plain))


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_check_01_the_fillers_amount_changes_no_loss_or_gradient(stage, road, tmp_path, float64,
                                                                 monkeypatch):
    model, rows, run = start(stage, road, tmp_path)
    plain = results(stage, model, rows, run)
    wide = results(stage, model, refilled(stage, rows, monkeypatch, filler=7, more=9), run)
    for a, b in zip(wide, plain):
        close(a, b, rtol=1e-12, atol=1e-14)


def test_check_01_a_response_alone_gives_the_loss_that_it_gives_beside_longer_ones(
        road, tmp_path, float64):
    actor, rollout, run = start("ppo", road, tmp_path)
    together = results("ppo", actor, rollout, run)[1:]
    count = rollout["response_mask"].sum()
    actor.zero_grad()
    parts = [train_ppo.minibatch_loss(actor, rollout, [row], count, run.cfg, run)[0]
             for row in range(16)]
    sum(parts).backward()
    for a, b in zip([sum(parts), *[p.grad for p in actor.parameters()]], together):
        close(a, b, rtol=1e-12, atol=1e-14)


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
    draws = spy(monkeypatch, sampling, "pick")
    rollout, actor = collect(road, tmp_path, **options)[:2]
    prompt_lens, lengths = rollout["prompt_lens"], rollout["lengths"]
    assert len(prompt_lens.unique()) > 1 and len(draws) == (lengths - prompt_lens).max()
    full = actor.policy(rollout["tokens"])  # (B, T, V)
    for step, ((logits, *_), _) in enumerate(draws):
        rows = torch.nonzero(prompt_lens + step < lengths)[:, 0]  # those that were still at work
        close(logits, full[rows, prompt_lens[rows] + step - 1], atol=1e-12)


@pytest.fixture
def dropouts(road, tmp_path):
    """PPO's options for an SFT and a reward model that have dropout."""
    return {"init": with_dropout(road.folder / "sft", tmp_path / "dropout_sft"),
            "reward_model": with_dropout(road.folder / "rm", tmp_path / "dropout_rm")}


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


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm", "dpo"])
def test_check_03_an_evaluation_is_without_dropout_and_gives_the_mode_back(stage, road, tmp_path,
                                                                          dropouts):
    if stage == "pretrain":
        run = start_run(road.config(stage, tmp_path / stage), {})
        rows = torch.tensor(road.tokenizer.encode(road.text.read_text()))
    else:
        _, rows, run = start(stage, road, tmp_path)
    plain, dropout = (road.folder / "rm", dropouts["reward_model"]) if stage == "rm" else (
        road.folder / "sft", dropouts["init"])
    models = [build_model(load_checkpoint(folder)).train() for folder in (plain, dropout)]
    found = [SCRIPTS[stage].evaluate(model, rows, run.cfg, run) for model in models]
    assert found[0] == found[1] and models[1].training


def test_check_03_the_frozen_models_of_reward_modelling_and_dpo_have_no_dropout(road, tmp_path,
                                                                              dropouts):
    """DPO's reference, and the SFT model and reward model that set the scores' scale."""
    _, rows, run = start("dpo", road, tmp_path)
    again = [dict(row) for row in rows]
    reference = frozen(build_model(load_checkpoint(dropouts["init"])))
    train_dpo.add_reference(reference, again, run.cfg, run)
    assert again == rows
    found = []
    for sft, rm in ((road.folder / "sft", road.folder / "rm"), dropouts.values()):
        run = start_run(road.config("rm", tmp_path / "rm", dtype="float32"), {"init": "sft"})
        prompts = [run.tokenizer.encode_prompt(chat(question)) for question, _ in PROMPTS[:16]]
        policy, model = build_model(load_checkpoint(sft)), build_model(load_checkpoint(rm))
        found.append(train_rm.measure_scores(model.train(), policy.train(), prompts, run.cfg, run))
    assert found[0] == found[1]


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
    calls = spy(monkeypatch, train_ppo, "ppo_policy_loss")
    actor, rollout, run = start("ppo", road, tmp_path, **options)
    everything = list(range(16))
    stats = train_ppo.minibatch_loss(actor, rollout, everything, rollout["response_mask"].sum(),
                                     run.cfg, run)[1]
    [(new, old)] = new_and_old(calls)
    assert torch.equal(new, old)  # the same shape on CPU: to the bit
    assert stats["approx_kl"] == 0 and stats["clip_frac"] == 0
    close(stats["ratio_mean"], 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_check_04_a_run_with_lr_0_keeps_every_ratio_at_1(dtype, tolerance, road, tmp_path,
                                                         monkeypatch):
    calls = spy(monkeypatch, train_ppo, "ppo_policy_loss")
    history = road.run("ppo", tmp_path / "run", lr=0.0, num_steps=3, dtype=dtype)
    assert len(calls) == 1 + 3 * 2 * 4  # the first is the preflight's
    for new, old in new_and_old(calls[1:]):
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
    draws = spy(monkeypatch, torch, "multinomial")
    rollout = collect(road, tmp_path, temperature=temperature)[0]
    prompt_lens, lengths = rollout["prompt_lens"], rollout["lengths"]
    assert len(draws) == (lengths - prompt_lens).max()
    for step, ((probs, *_), chosen) in enumerate(draws):
        rows = torch.nonzero(prompt_lens + step < lengths)[:, 0]
        where = prompt_lens[rows] + step
        assert torch.equal(rollout["tokens"][rows, where], chosen[:, 0]) and (probs > 0).all()
        close(rollout["logprobs"][rows, where - 1], probs.gather(1, chosen)[:, 0].log())
        close(rollout["entropy"][rows, where - 1], -(probs * probs.log()).sum(1))


def loop(model, ids):
    """Log-prob of every token but the first, each from a forward pass of what stands before it."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids[:t]]))[0, -1].log_softmax(-1)[ids[t]]
                            for t in range(1, len(ids))])  # (T-1,)


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
        for name, expected in (("logprobs", loop(actor.policy, ids)[p - 1 :]),
                               ("ref_logprobs", loop(reference, ids)[p - 1 :]),
                               ("values", torch.stack(values))):
            close(rollout[name][b, p - 1 : n - 1], expected, atol=1e-12)
            assert not rollout[name][b, : p - 1].any() and not rollout[name][b, n - 1 :].any()


def test_check_06_an_updates_log_probs_and_values_equal_a_loop(road, tmp_path, float64,
                                                               monkeypatch):
    actor, rollout, run = start("ppo", road, tmp_path)
    policy_calls = spy(monkeypatch, train_ppo, "ppo_policy_loss")
    value_calls = spy(monkeypatch, train_ppo, "ppo_value_loss")
    with torch.no_grad():
        for p in actor.parameters():  # both have moved since the rollout
            p.mul_(1.01)
    rows = [3, 1]
    train_ppo.minibatch_loss(actor, rollout, rows, 1, run.cfg, run)
    ids = [sequences("ppo", rollout)[row] for row in rows]
    starts = rollout["prompt_lens"][rows].tolist()
    seen = new_and_old(policy_calls + value_calls)
    close(seen[0][0], torch.cat([loop(actor.policy, one)[p - 1 :] for one, p in zip(ids, starts)]))
    close(seen[1][0], torch.stack([actor.critic(torch.tensor([one[:t]]))[0, -1] for one, p in
                                   zip(ids, starts) for t in range(p, len(one))]))
    for (new, old), name in zip(seen, ("logprobs", "values")):
        close(old, torch.cat([rollout[name][row, p - 1 : len(one) - 1] for row, one, p in
                              zip(rows, ids, starts)]))
        assert (new != old).all()


def test_check_06_sft_and_dpo_add_up_the_log_probs_of_the_answers_tokens(road, tmp_path, float64):
    model, rows, run = start("sft", road, tmp_path)
    nats = [-logp for ids, mask in rows for logp, trained in zip(loop(model, ids), mask[1:])
            if trained]
    close(loss_of("sft", model, rows, run), torch.stack(nats).mean())
    model, pairs, run = start("dpo", road, tmp_path)
    logps = train_dpo.pair_logps(model, *train_dpo.make_batch(pairs, run.device))
    reference = run.model("init")
    for name, mine in zip(("chosen", "rejected"), logps):
        for pair, logp in zip(pairs, mine):
            ids, mask = pair[name]
            first = mask.index(True)
            close(logp, loop(model, ids)[first - 1 :].sum())
            close(torch.tensor(pair[f"ref_{name}_logp"]), loop(reference, ids)[first - 1 :].sum())


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_check_07_exactly_the_answers_tokens_get_gradient_whatever_fills_the_rows(
        stage, road, tmp_path, monkeypatch):
    """Bug: masks made from ids. Where the filler is the end token, `tokens != pad` throws the
    answers' own end tokens out together with the filler.

    Curve: the loss looks a little better than it should, and answers grow up to the limit.
    Seen: transformers#23530, with pad = eos the collator gave every end token the label -100;
    trl#3200 mended it in SFT, trl#6357 in two more trainers.
    """
    model, rows, run = start(stage, road, tmp_path)
    tok, losses = run.tokenizer, []
    if stage != "ppo":  # an answer may hold the id 0 too
        zeros = {"messages": chat("cow?"), "answers": ["\0", "moo\0\0"], "ranks": [0, 1]}
        if stage == "sft":
            zeros = {"messages": chat("cow?", "\0moo\0")}
        rows = rows + SCRIPTS[stage].encode([zeros], tok, 64, run.cfg)
    if stage == "dpo":
        train_dpo.add_reference(frozen(run.model("init")), rows, run.cfg, run)
    for filler in (0, tok.end_id, tok.assistant_id, 300):
        loss, outputs = backward(stage, model, refilled(stage, rows, monkeypatch, filler=filler),
                                 run)
        for ids, gradient in zip(sequences(stage, rows), outputs.grad.ne(0).any(-1)):
            first = ids.index(tok.assistant_id)  # its output predicts the answer's first token
            last = len(ids) - 2  # this one predicts the end token
            assert torch.nonzero(gradient)[:, 0].tolist() == list(range(first, last + 1))
        losses.append(loss.item())
    assert len(set(losses)) == 1


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


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_check_08_every_stage_trains_the_end_token(stage, road, tmp_path):
    """Bug: the end token gets no loss in one of the stages: cut off when a row is shortened, left
    out of a mask, or never among the tokens that a rollout keeps.

    Curve: the share of ended answers falls to 0, length stands at the limit, and in PPO the
    missing-end score becomes the whole reward.
    Seen: trl#1623, SFT models that never stop, and trl#3091, the same again; OpenRLHF#181, PPO's
    action mask left the end token out.
    """
    model, rows, run = start(stage, road, tmp_path)
    end, ids = run.tokenizer.end_id, sequences(stage, rows)
    slope = torch.stack([gradient[len(one) - 2, end] for one, gradient in zip(  # (N,)
        ids, backward(stage, model, rows, run)[1].grad)])
    if stage == "ppo":
        ended, last = rows["ended"], (rows["lengths"] - 2)[:, None]
        assert ended.any() and [one[-1] == end for one in ids] == ended.tolist()
        advantages = rows["whitened_advantages"].gather(1, last)[:, 0]  # of the last token
        assert (slope.sign() == -advantages.sign())[ended].all() and (slope != 0).all()
    else:
        assert all(one[-1] == end for one in ids)
        assert (slope[:4] < 0).all()  # a step down this slope makes the end token likelier ...
        assert stage == "sft" or (slope[4:] > 0).all()  # ... and less likely where it is rejected


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


def scores_alone(reward_model, rows):
    """The raw score of each row from a forward pass of its own, without filler: (N,)."""
    with torch.no_grad():
        return torch.stack([reward_model.raw(torch.tensor([ids]))[0, -1] for ids in rows])


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
    plain = collect(road, tmp_path, max_new_tokens=6, **options)[0]
    last = (plain["lengths"] - 2)[:, None]
    reward, value, advantage, future = (plain[name].gather(1, last) for name in (
        "rewards", "values", "advantages", "returns"))
    close(advantage, reward - value)  # ended or not: an episode is over where its response is
    close(future, reward)
    forward = ScalarModel.forward
    beyond = lambda idx: torch.arange(idx.shape[1]) >= plain["lengths"][:, None] - 1  # (B, T)
    monkeypatch.setattr(ScalarModel, "forward", lambda self, idx: forward(self, idx).masked_fill(
        beyond(idx), 1000.0))
    other = collect(road, tmp_path, max_new_tokens=6, **options)[0]
    for name in ("values", "advantages", "returns", "whitened_advantages"):
        assert torch.equal(other[name], plain[name]), name


def test_check_10_the_scores_scale_is_measured_on_answers_that_ended(road, tmp_path, float64,
                                                                     monkeypatch):
    model, examples, run = start("rm", road, tmp_path, max_new_tokens=6, batch_size=3)
    calls = spy(monkeypatch, train_rm, "generate")
    rows = train_rm.read_preferences(run.cfg.data)
    prompts = [run.tokenizer.encode_prompt(row["messages"]) for row in rows[:16]]
    mean, std = train_rm.measure_scores(model, run.model("init"), prompts, run.cfg, run)
    ids = [row[:n].tolist() for _, rollout in calls for row, n, ended in zip(
        rollout.tokens, rollout.lengths, rollout.ended) if ended]
    assert 2 < len(ids) < 16
    scores = scores_alone(model, ids)
    close(mean, scores.sum() / len(ids))
    close(std, ((scores - mean) ** 2).sum().div(len(ids) - 1).sqrt())


def test_check_10_the_saved_reward_model_carries_the_scores_scale(road, tmp_path, monkeypatch):
    calls = spy(monkeypatch, train_rm, "measure_scores")
    road.run("rm", tmp_path / "rm", dtype="float32")
    model = load_model(tmp_path / "rm", "scalar")[0]
    assert (model.score_mean, model.score_std) == calls[-1][1] and model.score_mean != 0


def test_check_11_sft_weighs_tokens_alike_in_training_and_in_evaluation(road, tmp_path, float64):
    """Bug: a mean of the rows' means where a mean over tokens is meant (a short answer's tokens
    weigh more), a mean over the filler too, 0 / 0 where no token counts, NaN times a mask of 0.

    Curve: loss and gradient norm shrink with the share of filler, or one step turns all into NaN.
    Seen: verl#2377, a mean of x * mask let NaN leak in; open-instruct#1685, a row without any
    token gave 0 / 0; trl#6439, truncated tokens still counted in the denominator.
    """
    model, rows, run = start("sft", road, tmp_path)
    nats = [[-logp for logp, trained in zip(loop(model, ids), mask[1:]) if trained]
            for ids, mask in rows]
    tokens = torch.stack(sum(nats, [])).mean()
    of_means = torch.stack([torch.stack(row).mean() for row in nats]).mean()
    assert abs(tokens - of_means) > 1e-3
    close(loss_of("sft", model, rows, run), tokens)
    for micro in (0, 1, 3):
        cfg = dataclasses.replace(run.cfg, micro_batch_size=micro)
        assert train_sft.evaluate(model, rows, cfg, run) == pytest.approx(tokens.item(), rel=1e-9)


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_check_11_an_evaluation_weighs_prompts_or_pairs_alike(stage, road, tmp_path, float64):
    model, rows, run = start(stage, road, tmp_path)
    if stage == "rm":
        alone = [train_rm.loss_of(model, train_rm.make_batch([row], 0.0, "cpu")) for row in rows]
    else:
        alone = [train_dpo.loss_of(model, [row], run.cfg, run)[0] for row in rows]
    for micro in (0, 1, 3):
        cfg = dataclasses.replace(run.cfg, micro_batch_size=micro)
        found = SCRIPTS[stage].evaluate(model, rows, cfg, run)["val_loss"]
        assert found == pytest.approx(torch.cat(alone).mean().item(), rel=1e-9)


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


def test_check_11_a_batch_without_any_token_to_train_raises(road, tmp_path):
    model, rows, run = start("sft", road, tmp_path)
    nothing = [(ids, [False] * len(ids)) for ids, _ in rows]
    with pytest.raises(ValueError, match="empty mask"):
        loss_of("sft", model, nothing, run)
    actor, rollout, run = start("ppo", road, tmp_path)
    empty = {**rollout, "response_mask": torch.zeros_like(rollout["response_mask"])}
    with pytest.raises(ValueError, match="empty mask"):
        train_ppo.minibatch_loss(actor, empty, [0, 1], 5, run.cfg, run)
    with pytest.raises(ValueError, match="empty mask"):
        train_ppo.summarise(empty, 0.1)


@pytest.mark.parametrize("loss", [
    lambda x, y, z, mask: sft_loss(x, mask),
    lambda x, y, z, mask: ppo_policy_loss(x, y, z, mask)[0],
    lambda x, y, z, mask: ppo_value_loss(x, y, z, mask)[0],
], ids=["sft", "policy", "value"])
def test_check_11_nan_at_filler_comes_back_as_a_gradient_of_exactly_0(loss, generator):
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    three = [torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    found = []
    for filler in (0.0, NAN):
        x, y, z = (torch.where(mask, one, filler) for one in three)
        value = loss(x.requires_grad_(), y, z, mask)
        value.backward()
        found.append((value, x.grad))
        assert (x.grad[~mask] == 0).all() and (x.grad != 0).any()
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def poison(module, lengths):
    """Let the module's outputs be NaN at filler."""
    def hook(module, inputs, out):
        filler = torch.arange(out.shape[1]) >= lengths[:, None]  # (B, T)
        filler = filler.view(*filler.shape, *[1] * (out.dim() - 2))
        return torch.where(filler, NAN, out)

    return module.register_forward_hook(hook)


@pytest.mark.parametrize("stage", STAGES)
def test_check_11_nan_at_filler_changes_no_loss_and_no_gradient(stage, road, tmp_path):
    model, rows, run = start(stage, road, tmp_path)
    plain = results(stage, model, rows, run)
    lengths = torch.tensor([len(ids) for ids in sequences(stage, rows)])
    poison(head_of(stage, model), lengths)
    if stage == "ppo":
        poison(model.critic, lengths)
    for a, b in zip(results(stage, model, rows, run), plain):
        assert torch.equal(a, b)


def test_check_11_nan_at_filler_changes_nothing_in_a_rollout(road, tmp_path, monkeypatch):
    plain, actor, reference, reward_model, cfg, run = collect(road, tmp_path)
    given = sampling.Rollout(*(plain[name] for name in ("tokens", "prompt_lens", "lengths",
                                                        "ended")))
    monkeypatch.setattr(train_ppo, "generate", lambda *args, **options: given)
    for model in (actor.policy, actor.critic, reference, reward_model.trunk):
        poison(model, plain["lengths"])
    other = train_ppo.collect_rollout(actor, reference, reward_model, None, cfg.beta, cfg, run)
    for name in plain:
        assert torch.equal(other[name], plain[name]), name


def test_check_12_training_reads_each_answers_score_at_its_last_real_token(road, tmp_path, float64,
                                                                          monkeypatch):
    """Bug: the score is read in the batch's last column, or before the first id that looks like
    padding: for most rows that is filler, or a place in the prompt.

    Curve: pair accuracy stays near chance or follows length, and depends on what shares the batch.
    Seen: transformers#35911, classifiers read the token before the leftmost pad id; trlx's
    summarize_rlhf reward model (3340c2f) reads both answers at the longer one's end.
    """
    model, examples, run = start("rm", road, tmp_path)
    calls = spy(monkeypatch, train_rm, "reward_model_loss")
    loss_of("rm", model, examples, run)
    (scores, ranks, _), _ = calls[0]
    assert len({len(ids) for e in examples for ids in e["ids"]}) > 3
    for b, e in enumerate(examples):
        k = len(e["ids"])
        assert all(ids[-1] == run.tokenizer.end_id for ids in e["ids"])
        close(scores[b, :k].detach(), scores_alone(model, e["ids"]))
        assert ranks[b].tolist() == e["ranks"] + [-1] * (ranks.shape[1] - k)


def test_check_12_an_evaluation_compares_scores_of_last_real_tokens(road, tmp_path, float64):
    model, examples, run = start("rm", road, tmp_path)
    model.head.weight.data.mul_(-1)  # or nearly every pair is right
    examples[0]["ids"].reverse()
    right, losses = [], []
    for e in examples:
        scores = scores_alone(model, e["ids"])
        gaps = [scores[i] - scores[j] for i, a in enumerate(e["ranks"])
                for j, b in enumerate(e["ranks"]) if a < b]
        right += [float(gap > 0) for gap in gaps]
        losses.append(torch.stack([(1 + (-gap).exp()).log() for gap in gaps]).mean())
    found = train_rm.evaluate(model, examples, run.cfg, run)
    assert 0 < sum(right) < len(right)
    assert found["accuracy"] == pytest.approx(sum(right) / len(right), rel=1e-9)
    assert found["val_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)


def test_check_12_a_rollouts_scores_are_read_at_last_real_tokens_whatever_these_are(
        road, tmp_path, float64, monkeypatch):
    collected = given_rollout(road, tmp_path, monkeypatch, score_clip=0.0)
    rollout, reward_model = collect_again(collected), collected[3]
    raw = scores_alone(reward_model, sequences("ppo", rollout))
    scores = (raw - reward_model.score_mean) / reward_model.score_std
    close(rollout["scores"][rollout["ended"]], scores[rollout["ended"]])
    assert len(scores.unique()) == 5


LONG = "Tell me, please, " + " and ".join(question for question, _ in PROMPTS[:4])


def test_check_13_the_prompt_stays_masked_in_both_answers_however_much_of_it_is_cut(road, tmp_path):
    """Bug: prompt tokens get loss: in one answer of a pair only, or once ids and mask are cut at
    different ends.

    Curve: SFT's loss follows the prompts' text; DPO's log-probs are far too low, and its margins
    jump with the prompts' lengths where the two answers are cut differently.
    Seen: OpenRLHF#235, DPO counted the prompt's log-probs, mended by #237;
    eric-mitchell/direct-preference-optimization 21fd7fe, labels padded with an id that had loss.
    """
    tok, answers = road.tokenizer, [polite("moo"), rude("moo")]
    row = {"messages": chat(LONG), "answers": answers, "ranks": [0, 1], "grades": None}
    whole = tok.encode_prompt(row["messages"])
    cfg = road.config("dpo", tmp_path, too_long="cut")
    longest = len(whole) + max(len(tok.encode(answer)) for answer in answers) + 1
    for max_len in range(longest - len(whole) + 2, longest + 1):
        [pair] = train_dpo.encode([row], tok, max_len, cfg)
        prompt = whole[:1] + whole[1 + longest - max_len :]  # the same tokens leave both
        for name, answer in zip(("chosen", "rejected"), answers):
            trained = tok.encode(answer) + [tok.end_id]
            assert pair[name] == (prompt + trained, [False] * len(prompt) + [True] * len(trained))
        [example] = train_rm.encode([row], tok, max_len, cfg)
        assert example["ids"] == [pair["chosen"][0], pair["rejected"][0]]


@pytest.mark.parametrize("max_len", [64, 35, 30])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_check_13_no_prompt_token_gets_gradient(stage, max_len, road, tmp_path):
    model, _, run = start(stage, road, tmp_path, too_long="cut")
    tok, long = run.tokenizer, " ".join(question for question, _ in PROMPTS[:3])
    if stage == "sft":
        rows = [{"messages": chat(text, polite("moo"))} for text in ("cow?", long)]
    else:
        rows = [{"messages": chat(text), "answers": [polite("moo"), rude("moo")], "ranks": [0, 1]}
                for text in ("cow?", long)]
    rows = SCRIPTS[stage].encode(rows, tok, max_len, run.cfg)
    if stage == "dpo":
        train_dpo.add_reference(frozen(run.model("init")), rows, run.cfg, run)
    gradients = backward(stage, model, rows, run)[1].grad.ne(0).any(-1)  # (N, T)
    assert max(map(len, sequences(stage, rows))) <= max_len
    for ids, gradient in zip(sequences(stage, rows), gradients):
        first = ids.index(tok.assistant_id)  # its output predicts the answer's first token
        assert torch.nonzero(gradient)[:, 0].tolist() == list(range(first, len(ids) - 1))


def test_check_13_a_dialogue_that_is_cut_trains_whole_answers_only(road, tmp_path):
    tok, texts = road.tokenizer, ("cow?", polite("moo"), "What does a dog say?", rude("woof"))
    cfg = road.config("sft", tmp_path, too_long="cut")
    whole, _ = tok.encode_chat(chat(*texts))
    first, last = (tok.encode(text) + [tok.end_id] for text in texts[1::2])
    mark = whole.index(tok.assistant_id)  # where the first answer is announced
    for max_len in range(len(last) + 4, len(whole) + 1):
        [(ids, mask)] = train_sft.encode([{"messages": chat(*texts)}], tok, max_len, cfg)
        assert ids == whole[:1] + whole[1 + len(whole) - max_len :]
        trained = [one for one, counts in zip(ids, mask) if counts]
        kept = first if len(whole) - max_len < mark else []  # none without its mark
        assert trained == kept + last and mask[-len(last) :] == [True] * len(last)


CHAT = [{"role": "system", "content": "Be brief."}, *chat("cow?", "moo", " dog? ", " woof\n", "bye",
                                                         "<|end|> is text")]


def template(tok, messages):
    """The chat template, spelled out: [(id, whether it is trained)]."""
    marks = {"system": tok.system_id, "user": tok.user_id, "assistant": tok.assistant_id}
    out = [(tok.begin_id, False)]
    for message in messages:
        says = message["role"] == "assistant"
        out += [(marks[message["role"]], False)]
        out += [(one, says) for one in tok.encode(message["content"]) + [tok.end_id]]
    return out


def test_check_14_sft_trains_every_assistant_turn_with_its_end_and_nothing_else(road, tmp_path):
    """Bug: the template's tokens come twice or not at all (two begin tokens, a second end token),
    or the mask covers one assistant turn only, or the users' turns too.

    Curve: none in training, the loss even falls faster on a second end token; the model meets other
    prompts when it is used than those it was trained on.
    Seen: OpenRLHF#393, template and tokenizer gave Llama 3 two begin tokens; trl#4908, DPO appended
    a second end token; trl#1185, the mask of several turns paired them wrongly.
    """
    tok = road.tokenizer
    [(ids, mask)] = train_sft.encode([{"messages": CHAT}], tok, 200, road.config("sft", tmp_path))
    assert list(zip(ids, mask)) == template(tok, CHAT)
    assert ids.count(tok.begin_id) == 1 and ids.count(tok.end_id) == len(CHAT)
    assert not any(a == b == tok.end_id for a, b in zip(ids, ids[1:]))
    tokens, trained = train_sft.make_batch([(ids, mask)], "cpu")
    said = tok.decode(tokens[0, 1:][trained[0]])
    assert said == "moo<|end|> woof\n<|end|><|end|> is text<|end|>"


def test_check_14_preferences_train_the_last_turn_only(road, tmp_path):
    tok = road.tokenizer
    row = {"messages": CHAT[:-1], "answers": ["moo", " moo.", "<|end|>"], "ranks": [0, 1, 2],
           "grades": None}
    expected = [[one for one, _ in template(tok, CHAT[:-1] + [
        {"role": "assistant", "content": answer}])] for answer in row["answers"]]
    start = len(template(tok, CHAT[:-1])) + 1  # after the last assistant mark
    [example] = train_rm.encode([row], tok, 200, road.config("rm", tmp_path))
    assert example["ids"] == expected
    [pair] = train_dpo.encode([row], tok, 200, road.config("dpo", tmp_path))
    for (ids, mask), want in zip((pair["chosen"], pair["rejected"]), (expected[0], expected[2])):
        assert ids == want
        assert mask == [False] * start + [True] * (len(ids) - start)


def test_check_14_what_is_sampled_continues_the_template_with_the_answer_open(road, tmp_path,
                                                                             monkeypatch):
    """In PPO, for the reward model's scale, and in SFT's samples."""
    tok = road.tokenizer
    prompt_of = lambda messages: [one for one, _ in template(tok, messages)] + [tok.assistant_id]
    prompts = [prompt_of(chat(question)) for question, _ in PROMPTS]
    calls = spy(monkeypatch, train_ppo, "collect_rollout")
    road.run("ppo", tmp_path / "ppo", num_steps=1, rollout_size=40, minibatch_size=40,
             micro_batch_size=0)
    [((_, _, _, asked, *_), rollout)] = calls
    assert sorted(asked) == sorted(prompts)
    assert [ids[:p] for ids, p in zip(sequences("ppo", rollout), rollout["prompt_lens"])] == asked

    calls = spy(monkeypatch, train_rm, "generate")
    road.run("rm", tmp_path / "rm", num_normalize=33, batch_size=8)
    assert [len(asked) for (_, asked, *_), _ in calls] == [8, 8, 8, 8, 1]  # and none is left out
    asked = [one for (_, batch, *_), _ in calls for one in batch]
    assert all(one in prompts for one in asked) and len(set(map(tuple, asked))) == 33

    model, _, run = start("sft", road, tmp_path)
    shown = []
    monkeypatch.setattr(run, "show", lambda step, text: shown.append(text))
    calls = spy(monkeypatch, train_sft, "generate")
    rows = [{"messages": messages} for messages in
            (CHAT[:3], chat("cow?", "moo"), chat("cow?", "moo", "dog?", "woof"))]
    train_sft.show_samples(model, train_sft.encode(rows, tok, 64, run.cfg), 1, run)
    assert [args[1] for args, _ in calls] == [[prompt_of(row["messages"][:-1])] for row in rows]
    for text, row in zip(shown, rows):
        assert text.startswith(f"  user: {row['messages'][-2]['content']}\n  model: ")


def test_check_14_a_conversation_closes_each_answer_once(road, monkeypatch, capsys):
    """Bug: the end token stays in a sampled answer's text, and comes back in the next prompt."""
    tok, calls = road.tokenizer, spy(monkeypatch, sample, "respond")
    lines = iter(["cow?", "dog?", ""])
    monkeypatch.setattr("builtins.input", lambda shown: next(lines))
    sample.main(sample.Config(model=str(road.folder / "sft"), chat=True, temperature=0.0,
                              max_new_tokens=12))
    [first], [second] = (args[1] for args, _ in calls)
    [[(ids, ended)]] = calls[0][1]
    answer = tok.decode(ids[:-1])
    assert ended and f"assistant: {answer}\n" in capsys.readouterr().out
    assert first == [one for one, _ in template(tok, chat("cow?"))] + [tok.assistant_id]
    assert second == [one for one, _ in template(tok, chat("cow?", answer, "dog?"))] + [
        tok.assistant_id]
