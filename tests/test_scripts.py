"""All scripts alike: each of their options, seeds, and the checks of several stages at once."""

import dataclasses
import functools
import math
import re
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_road import (CHAT, LONG, PROMPTS, RANKED, SCRIPTS, TWINS, Scaler, answers_of, backward,
                       begin, chat, collect, dpo_oracle, finite, head_of, logprobs_of, loss_of,
                       poison, polite, ppo_loss, ranked_loss, refill, results, rude, scored, sequences,
                       start, template, watch, watched_steps, without_clock, without_preflight,
                       write_rows)
from torch.optim.optimizer import register_optimizer_step_post_hook

import evaluate
import sample
import speedrun
import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from conftest import close
from minirlhf.batches import pad_right
from minirlhf.plumbing.config import field_comments, parse_config
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.formats import read_rows
from minirlhf.plumbing.optim import make_optimizer
from minirlhf.plumbing.checkpoints import build_model, frozen, load_checkpoint
from minirlhf.plumbing.runs import Run, start_run

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


# Boolean options that need a set-up of their own, and the tests that give it to them.
OWN_TESTS = {
    ("sample", "chat"): "test_sample.py::test_chat_holds_a_conversation_of_several_turns",
    ("sample", "plain"): "test_sample.py::test_plain_goes_on_with_the_text",
    **{(stage, "tensorboard"): "test_stops.py::test_the_same_numbers_go_to_tensorboard"
       for stage in SCRIPTS},
    ("speedrun", "quick"): "test_speedrun.py::test_the_quick_road_ends_with_results",
    ("speedrun", "overoptimize"): "test_speedrun.py::test_every_command_is_one_that_its_script",
}


# Switches and choices that say what is trained; the others say where, how far or how fast.
SHAPES = {"norm", "mlp", "positions", "bias", "tied", "whiten", "share_critic", "kl_kind", "pairs"}


@functools.cache
def plain_history(road, script):
    """What the smoke run logs where every option keeps its default."""
    with tempfile.TemporaryDirectory() as out:
        return without_clock(smoke(road, script, Path(out)))


def check_history(history, road, script, option):
    """Finite numbers, and others than the default's where the option is one of those that shape.

    Bug: an option that is read, checked, logged and never used.
    """
    if script in SCRIPTS:
        assert finite(history)
        if option in SHAPES:
            assert without_clock(history) != plain_history(road, script)


@pytest.mark.parametrize("script, option", fields(bool))
def test_two_steps_with_each_boolean_option_the_other_way(script, option, road, tmp_path):
    if (script, option) in OWN_TESTS:
        file, test = OWN_TESTS[script, option].split("::")
        assert f"def {test}" in (Path(__file__).parent / file).read_text(encoding="utf-8")
        return
    if option in ("resume", "overwrite"):  # both need a run to be there
        smoke(road, script, tmp_path)
    default = getattr(ALL[script].Config, option)
    check_history(smoke(road, script, tmp_path, **{option: not default}), road, script, option)


@pytest.mark.parametrize("script, option, value", other_choices())
def test_two_steps_with_each_choice_of_a_text_option(script, option, value, road, tmp_path):
    check_history(smoke(road, script, tmp_path, **{option: value}), road, script, option)


# Another value for each number that says how a model is trained, and a run in which it can matter.
SCHEDULE = dict(lr=1e-4, warmup=3, final_lr=0.9, weight_decay=0.9, grad_clip=0.05, batch_size=6)
ACTS = {
    "pretrain": (dict(num_steps=3), dict(
        SCHEDULE, num_steps=4, dropout=0.1, block_size=32, n_layer=1, n_head=4, n_kv_head=1,
        n_embd=64, n_hidden=0, seed=1)),
    "sft": (dict(num_epochs=1), dict(SCHEDULE, num_epochs=2, held_out=0.5, seed=1)),
    "rm": (dict(num_epochs=1), dict(SCHEDULE, num_epochs=2, held_out=0.5, margin=1.0,
                                    num_normalize=8, max_new_tokens=7, seed=1)),
    "dpo": (dict(num_epochs=1), dict(SCHEDULE, num_epochs=2, held_out=0.5, beta=0.1,
                                     label_smoothing=0.1, seed=1)),
    "ppo": (dict(lr=3e-3, critic_lr=3e-3, stop_kl=0.0, micro_batch_size=0, max_new_tokens=6,
                 kl_target=0.5), dict(
        num_steps=3, rollout_size=4, max_new_tokens=5, temperature=0.7, num_epochs=1,
        minibatch_size=8, lr=1e-4, critic_lr=1e-4, final_lr=0.9, beta=0.5, kl_target=0.0, kl_horizon=100, gamma=0.9,
        lam=1.0, clip_range=0.01, value_clip=0.0, score_clip=0.1, missing_end_score=-1.0,
        stop_kl=1e-9, grad_clip=0.05, vf_coef=1.0, seed=1)),
}
NEUTRAL = {"micro_batch_size", "sample_batch_size", "eval_every", "save_every", "ledger_every", "num_samples", "threads"}


def trained(road, stage, out, options):
    """All weights that the run has trained, as one list of tensors."""
    history = road.run(stage, out, dtype="float32", **options)
    assert finite(history)
    checkpoint = load_checkpoint(out)
    return [*checkpoint["actor" if stage == "ppo" else "model"].values()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ACTS)
def test_every_number_that_shapes_training_acts(stage, road, tmp_path):
    """Bug: an option that is read, checked, logged and never used."""
    base, others = ACTS[stage]
    numbers = {option for script, option in fields(int) + fields(float) if script == stage}
    assert set(others) == numbers - NEUTRAL
    same = trained(road, stage, tmp_path / "base", base)
    for option, value in others.items():
        if option == "vf_coef":  # a separate critic is moved by Adam, whatever its loss's weight
            base = {**base, "share_critic": True}
            same = trained(road, stage, tmp_path / "shared", base)
        other = trained(road, stage, tmp_path / option, {**base, option: value})
        assert len(same) != len(other) or any(
            a.shape != b.shape or not torch.equal(a, b) for a, b in zip(same, other)), option


@pytest.mark.parametrize("script, options", [
    ("sft", dict(micro_batch_size=3, num_samples=2)), ("dpo", dict(micro_batch_size=3)),
    ("ppo", dict(value_clip=0.0, score_clip=0.0, stop_kl=0.0)),
    ("ppo", dict(share_critic=True, micro_batch_size=0)),
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

@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_same_seed_gives_the_same_history_and_another_seed_another(stage, road, tmp_path):
    a, b, c = (without_clock(road.run(stage, tmp_path / name, seed=seed))
               for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert a == b != c


# ---------------------------------------------------------------- small promises of the loops


def test_prompts_of_one_text_stay_on_one_side(road, tmp_path, monkeypatch):
    """Bug: pairs of a held-out prompt among the training pairs make the accuracy a memory test."""
    rows = [row for _, row in read_rows(road.preferences)]
    data = write_rows(tmp_path / "twice.jsonl", rows + rows)
    without_preflight(monkeypatch)
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


# ---------------------------------------------------------------- checks of several stages

STAGES = ["sft", "rm", "dpo", "ppo"]


def refilled(stage, rows, monkeypatch, **how):
    """Let the stage's batches have another filler; returns the rows to use from now on."""
    if stage == "ppo":
        return {**rows, "tokens": refill(rows["tokens"], rows["lengths"], **how)}

    def pad(ids, device):
        tokens, lengths = pad_right(ids, device)
        return refill(tokens, lengths, **how), lengths

    monkeypatch.setattr(SCRIPTS[stage], "pad_right", pad)
    return rows


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


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm", "dpo"])
def test_check_03_an_evaluation_is_without_dropout_and_gives_the_mode_back(stage, road, tmp_path,
                                                                          dropouts):
    if stage == "pretrain":
        run = start_run(road.config(stage, tmp_path / stage), {})
        rows = torch.tensor(road.tokenizer.encode(road.text.read_text(encoding="utf-8"))[: 32 * 64]).view(32, 64)
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
        answers = train_rm.sample_answers(policy.train(), prompts, run.cfg, run)
        found.append(train_rm.measure_scores(model.train(), answers, run.cfg, run))
    assert found[0] == found[1]


def test_check_06_sft_and_dpo_add_up_the_log_probs_of_the_answers_tokens(road, tmp_path, float64):
    model, rows, run = start("sft", road, tmp_path)
    nats = [-logp for ids, mask in rows for logp, trained in zip(logprobs_of(model, ids, 1), mask[1:])
            if trained]
    close(loss_of("sft", model, rows, run), torch.stack(nats).mean())
    model, pairs, run = start("dpo", road, tmp_path)
    logps = train_dpo.pair_logps(model, train_dpo.make_batch(pairs, run.device))
    reference = run.model("init")
    for name, mine in zip(("chosen", "rejected"), logps):
        for pair, logp in zip(pairs, mine):
            ids, mask = pair[name]
            first = mask.index(True)
            close(logp, logprobs_of(model, ids, first).sum())
            close(torch.tensor(pair[f"ref_{name}_logp"]), logprobs_of(reference, ids, first).sum())


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


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_check_11_an_evaluation_weighs_prompts_or_pairs_alike(stage, road, tmp_path, float64):
    model, rows, run = start(stage, road, tmp_path)
    script = SCRIPTS[stage]
    alone = [script.loss_of(model, script.make_batch([row], "cpu"), run.cfg)[0] for row in rows]
    for micro in (0, 1, 3):
        cfg = dataclasses.replace(run.cfg, micro_batch_size=micro)
        found = SCRIPTS[stage].evaluate(model, rows, cfg, run)["val_loss"]
        assert found == pytest.approx(torch.cat(alone).mean().item(), rel=1e-9)


def test_check_11_a_batch_without_any_token_to_train_raises(road, tmp_path):
    model, rows, run = start("sft", road, tmp_path)
    nothing = [(ids, [False] * len(ids)) for ids, _ in rows]
    with pytest.raises(ValueError, match="empty mask"):
        loss_of("sft", model, nothing, run)
    actor, rollout, run = start("ppo", road, tmp_path)
    empty = {**rollout, "response_mask": torch.zeros_like(rollout["response_mask"])}
    with pytest.raises(ValueError, match="empty mask"):
        ppo_loss(actor, empty, [0, 1], 5, run)
    with pytest.raises(ValueError, match="empty mask"):
        train_ppo.summarise(empty, 0.1)


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


def test_check_13_the_prompt_stays_masked_in_both_answers_however_much_of_it_is_cut(road, tmp_path):
    """Bug: prompt tokens get loss: in one answer of a pair only, or once ids and mask are cut at
    different ends.

    Curve: SFT's loss follows the prompts' text; DPO's log-probs are far too low, and its margins
    jump with the prompts' lengths where the two answers are cut differently.
    Seen: OpenRLHF#235, DPO counted the prompt's log-probs, mended by #237;
    eric-mitchell/direct-preference-optimization 21fd7fe, labels padded with an id that had loss.
    """
    long = "Tell me, please, " + " and ".join(question for question, _ in PROMPTS[:4])
    tok, answers = road.tokenizer, [polite("moo"), rude("moo")]
    row = {"messages": chat(long), "answers": answers, "ranks": [0, 1], "grades": None}
    whole = tok.encode_prompt(row["messages"])
    cfg = road.config("dpo", tmp_path, too_long="cut")
    longest = len(whole) + max(len(tok.encode(answer)) for answer in answers) + 1
    for max_len in range(longest - len(whole) + 5, longest + 1):
        [pair] = train_dpo.encode([row], tok, max_len, cfg)
        prompt = tok.encode_prompt(chat(end_of(long, tok, max_len - longest + len(whole))))
        for name, answer in zip(("chosen", "rejected"), answers):
            trained = tok.encode(answer) + [tok.end_id]
            assert pair[name] == (prompt + trained, [False] * len(prompt) + [True] * len(trained))
        [example] = train_rm.encode([row], tok, max_len, cfg)
        assert example["ids"] == [pair["chosen"][0], pair["rejected"][0]]


def end_of(question, tokenizer, room):
    """The longest end of a question, in its tokens, that makes a prompt of at most `room`."""
    ids = tokenizer.encode(question)
    ends = [tokenizer.decode(ids[-n:]).strip() for n in range(len(ids), 0, -1)]
    return next(end for end in ends if len(tokenizer.encode_prompt(chat(end))) <= room)


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
    calls = watch(monkeypatch, train_ppo, "collect_rollout")
    road.run("ppo", tmp_path / "ppo", num_steps=1, rollout_size=40, minibatch_size=40,
             micro_batch_size=0)
    [((_, _, _, asked, *_), rollout)] = calls
    assert sorted(asked) == sorted(prompts)
    assert [ids[:p] for ids, p in zip(sequences("ppo", rollout), rollout["prompt_lens"])] == asked

    calls = watch(monkeypatch, train_rm, "generate")
    road.run("rm", tmp_path / "rm", num_normalize=33, batch_size=8)
    assert [len(asked) for (_, asked, *_), _ in calls] == [8, 8, 8, 8, 1]  # and none is left out
    asked = [one for (_, batch, *_), _ in calls for one in batch]
    assert all(one in prompts for one in asked) and len(set(map(tuple, asked))) == 33

    model, _, run = start("sft", road, tmp_path)
    shown = []
    monkeypatch.setattr(run, "show", lambda text: shown.append(text))
    calls = watch(monkeypatch, train_sft, "generate")
    rows = [{"messages": messages} for messages in
            (CHAT[:3], chat("cow?", "moo"), chat("cow?", "moo", "dog?", "woof"))]
    train_sft.show_samples(model, train_sft.encode(rows, tok, 64, run.cfg), run)
    assert [args[1] for args, _ in calls] == [[prompt_of(row["messages"][:-1])] for row in rows]
    for text, row in zip(shown, rows):
        assert text.startswith(f"  user: {row['messages'][-2]['content']}\n  model: ")


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
    without_preflight(monkeypatch)  # its backward is no training step
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


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_check_23_a_smaller_batch_is_divided_by_its_own_size(stage, road, tmp_path):
    """Bug: the last, smaller batch of an epoch divided by the size of the others."""
    history = road.run(stage, tmp_path, dtype="float32", batch_size=100, micro_batch_size=7)
    # One step, on 36 prompts or pairs. A new head scores all answers alike, and DPO's policy is its
    # reference still: nobody prefers anything yet.
    assert len(history) == 1 and history[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_check_26_log_probs_of_very_sure_models_equal_float64(stage, road, tmp_path):
    """Nothing is squashed before the cross-entropy, and log(0) never comes up."""
    run = begin("sft", road, tmp_path)
    real = run.model("init")
    with torch.no_grad():
        examples = train_sft.encode(train_sft.read_demonstrations(run.cfg.data), run.tokenizer, 64,
                                    run.cfg)[:4]
        batch = train_sft.make_batch(examples, "cpu")
        tokens, mask = batch["tokens"], batch["mask"]
        logits = (50 * real(tokens)).requires_grad_()  # float32, hundreds apart
    model = lambda idx: logits
    exact = logits.detach().double()[:, :-1].log_softmax(-1).gather(
        2, tokens[:, 1:, None]).squeeze(2)  # (B, T-1)
    assert exact.min() < -150
    if stage == "pretrain":
        result, expected = train_pretrain.loss_of(model, batch, None)[0], -exact.sum()
    elif stage == "sft":
        result, expected = train_sft.loss_of(model, batch, None)[0], -exact[mask].sum()
    else:
        result = torch.cat(train_dpo.pair_logps(model, batch))
        expected = torch.where(mask, exact, 0.0).sum(1)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)
    result.sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().max() > 0


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_check_27_a_run_leaves_them_out_too(stage, road, tmp_path, capsys):
    rows = [row for _, row in read_rows(road.preferences)][:8]
    data = write_rows(tmp_path / "pairs.jsonl", rows + TWINS[:1] * 5)
    road.run(stage, tmp_path / "run", data=data)
    printed = capsys.readouterr().out
    assert "5 identical" in printed
    assert ("8 pairs" if stage == "dpo" else "8 prompts") in printed
    with pytest.raises(UserError, match="too few"):
        road.run(stage, tmp_path / "other", data=write_rows(tmp_path / "t.jsonl", TWINS[:1] * 9))


NUM_TOKENS = {  # the real tokens of one example
    "sft": lambda example: len(example[0]), "rm": lambda example: sum(map(len, example["ids"])),
    "dpo": lambda example: len(example["chosen"][0]) + len(example["rejected"][0])}


def without_evaluation(script, stage, monkeypatch):
    """Leave evaluations and the try of the largest batch out; collects the held-out examples."""
    held_out = []
    without_preflight(monkeypatch)
    monkeypatch.setattr(script, "evaluate", lambda model, examples, *rest:
                        held_out.extend(examples) or {})
    if stage == "rm":
        monkeypatch.setattr(script, "measure_scores",
                            lambda *rest: (torch.zeros(()), torch.ones(())))
    if stage == "dpo":
        monkeypatch.setattr(script, "add_reference", lambda reference, pairs, *rest: [
            pair.update(ref_chosen_logp=0.0, ref_rejected_logp=0.0) for pair in pairs])
    return held_out


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_check_31_the_speed_counts_real_tokens_only(stage, road, tmp_path, monkeypatch):
    script, lines = SCRIPTS[stage], watch(monkeypatch, Run, "log")
    if stage == "ppo":
        rollouts = watch(monkeypatch, script, "collect_rollout")
        road.run(stage, tmp_path / "run", num_steps=2)
        expected = sum(int(rollout["lengths"].sum()) for _, rollout in rollouts)
    else:
        encoded = watch(monkeypatch, script, "encode")
        held_out = without_evaluation(script, stage, monkeypatch)
        road.run(stage, tmp_path / "run", eval_every=4,  # 5 steps: a row of 4 and a row of 1
                 **({"num_samples": 0} if stage == "sft" else {}))
        everything = sum(map(NUM_TOKENS[stage], encoded[0][1]))
        expected = everything - sum(map(NUM_TOKENS[stage], held_out[: len(held_out) // 2]))
    assert len(lines) == 2 and sum(arguments[1] for arguments, _ in lines) == expected


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_check_32_an_epoch_trains_on_each_example_once_and_on_no_held_out_one(
        stage, road, tmp_path, monkeypatch):
    script = SCRIPTS[stage]
    held_out = without_evaluation(script, stage, monkeypatch)
    encoded = watch(monkeypatch, script, "encode")
    batches = watch(monkeypatch, script, "make_batch")
    steps = watch(monkeypatch, torch.nn.utils, "clip_grad_norm_")
    road.run(stage, tmp_path / "run", num_epochs=3, micro_batch_size=3, held_out=0.3,
             eval_every=100, **({"num_samples": 0} if stage == "sft" else {}))
    examples = encoded[0][1]
    place = {id(example): i for i, example in enumerate(examples)}
    out = {place[id(example)] for example in held_out}
    seen = [place[id(example)] for arguments, _ in batches for example in arguments[0]]
    epochs = [seen[i : i + 28] for i in (0, 28, 56)]
    assert len(examples) == 40 and len(out) == 12 and len(seen) == 3 * 28
    assert all(sorted([*epoch, *out]) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(steps) == 3 * math.ceil(28 / 8)
    sizes = [[NUM_TOKENS[stage](examples[i]) for i in epoch[::8]] for epoch in epochs]
    assert any(row != sorted(row) for row in sizes)  # batches do not come from short to long


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_check_33_compared_answers_keep_the_same_end_of_their_prompt(stage, road, tmp_path):
    data = write_rows(tmp_path / "long.jsonl", [
        {"prompt": LONG, "chosen": "Please: moo.", "rejected": "moo"},
        {"prompt": LONG, "chosen": "moo", "rejected": "moo, fool."}])
    run = begin(stage, road, tmp_path, data=data, too_long="cut")
    rows = SCRIPTS[stage].read_preferences(data)
    examples = SCRIPTS[stage].encode(rows, run.tokenizer, 64, run.cfg)
    for row, example in zip(rows, examples):
        answers, whole = answers_of(row, run.tokenizer)
        end = end_of(LONG, run.tokenizer, 64 - max(map(len, answers)) + whole)
        expected, start = answers_of({**row, "messages": chat(end)}, run.tokenizer)
        assert len(end) < len(LONG) and max(map(len, expected)) > 60
        if stage == "rm":
            assert example["ids"] == expected and example["prompt_len"] == start
        else:
            assert [example["chosen"][0], example["rejected"][0]] == expected
            for side, ids in zip(("chosen", "rejected"), expected):
                assert example[side][1] == [k >= start for k in range(len(ids))]
            batch = train_dpo.make_batch([example], "cpu")
            for k in range(2):
                assert batch["tokens"][k, 1:][batch["mask"][k]].tolist() == expected[k][start:]


GIANT = "moo, " * 40  # an answer that no cut of its prompt makes fit


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_check_33_no_sample_is_kept_that_has_nothing_left_to_train_on(stage, too_long, road,
                                                                      tmp_path, capsys):
    if stage == "sft":
        rows = [{"messages": chat(*turns)} for turns in
                (("cow?", GIANT), ("dog?", "woof"), (LONG, "moo"))]
    else:
        rows = [{"prompt": "cow?", "chosen": "moo", "rejected": GIANT},
                {"prompt": "dog?", "output": ["woof", "meow", "baa"]},
                {"prompt": LONG, "chosen": "moo", "rejected": "baa"}]
    data = write_rows(tmp_path / "long.jsonl", rows)
    script = SCRIPTS[stage]
    read = train_sft.read_demonstrations if stage == "sft" else script.read_preferences
    run = begin(stage, road, tmp_path, data=data, too_long=too_long)
    examples = script.encode(read(data), run.tokenizer, 64, run.cfg)
    printed = capsys.readouterr().out
    assert len(examples) == (2 if too_long == "cut" else 1)
    answers = (examples if stage == "sft" else
               [e[side] for e in examples for side in ("chosen", "rejected")] if stage == "dpo"
               else [(ids, [True]) for e in examples for ids in e["ids"]])
    for ids, mask in answers:
        assert ids[0] == run.tokenizer.begin_id and ids[-1] == run.tokenizer.end_id
        assert len(ids) <= 64 and any(mask)
    left = {"sft": 3 - len(examples), "dpo": 3 - len(examples)}.get(
        stage, 1 if too_long == "cut" else 3)
    assert {"sft": f"{left} left out (longer than 64", "dpo": f"{left} longer than 64",
            "rm": f"{left} longer than 64"}[stage] in printed
    run.cfg.too_long = "refuse"
    place = "dialogue 1" if stage == "sft" else "row 1, answer 2"  # the one that does not fit
    with pytest.raises(UserError, match=rf"{place} has \d+ tokens, 64 fit"):
        script.encode(read(data), run.tokenizer, 64, run.cfg)


def test_check_33_one_answer_that_is_too_long_leaves_the_others_their_ranks(road, tmp_path, capsys):
    data = write_rows(tmp_path / "long.jsonl", [
        {"prompt": "cow?", "output": ["Please: moo.", GIANT, "moo", "baa"],
         "ranks": [0, 1, 2, 3], "grades": [[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 1], [0] * 4]}])
    run = begin("rm", road, tmp_path, data=data, too_long="drop")
    (example,) = train_rm.encode(train_rm.read_preferences(data), run.tokenizer, 64, run.cfg)
    assert example["ranks"] == [0, 2, 3]
    assert example["grades"] == [[0, 2, 3], [0, 0, 1], [0, 0, 0]]
    run = begin("dpo", road, tmp_path, data=data, too_long="drop", pairs="all")
    pairs = train_dpo.encode(train_dpo.read_preferences(data), run.tokenizer, 64, run.cfg)
    assert len(pairs) == 3 and "0 identical, 3 longer than 64" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_check_33_a_run_with_long_rows_ends_and_shows_them(stage, too_long, road, tmp_path, capsys,
                                                           monkeypatch):
    """A cut prompt's row once met a script that needed the whole prompt, after all the training."""
    if stage == "sft":
        long, source = {"messages": chat(LONG, polite("moo"))}, road.demonstrations
    else:
        long = {"prompt": LONG, "chosen": polite("moo"), "rejected": "moo"}
        source = road.preferences
    sampled = watch(monkeypatch, train_sft, "generate")
    rows = [row for _, row in read_rows(source)][:10]
    data = write_rows(tmp_path / "long.jsonl", [long] * 5 + rows)
    history = road.run(stage, tmp_path / "run", data=data, too_long=too_long, eval_every=100,
                       **({"num_samples": 20, "held_out": 0.8} if stage == "sft" else {}))
    assert finite(history)
    printed = capsys.readouterr().out
    if stage == "sft":
        assert f"{15 if too_long == 'cut' else 10} dialogues" in printed
        shown = (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")
        assert ("does it say? What does it" in shown) == (too_long == "cut")
        for (_, (prompt,), *_), _ in sampled:  # up to where the answer begins
            assert prompt[0] == road.tokenizer.begin_id
            assert prompt[-1] == road.tokenizer.assistant_id and len(prompt) < 64


def sft_setting(road, tmp_path):
    run = begin("sft", road, tmp_path)
    model = run.model("init")
    examples = train_sft.encode(train_sft.read_demonstrations(run.cfg.data), run.tokenizer, 64,
                                run.cfg)[:8]
    batch = train_sft.make_batch(examples, "cpu")
    tokens, mask = batch["tokens"], batch["mask"]
    wish = lambda: model(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[
        ..., 0][mask].mean()
    return model, lambda: train_sft.loss_of(model, batch, run.cfg)[0] / mask.sum(), {"loss": wish}


def pretrain_setting(road, tmp_path):
    model, tokens = begin("sft", road, tmp_path).model("init"), torch.arange(40).view(4, 10) % 26
    wish = lambda: model(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).mean()
    loss = lambda: train_pretrain.loss_of(model, {"tokens": tokens}, None)[0] / (4 * 9)
    return model, loss, {"loss": wish}


def rm_setting(road, tmp_path):
    run = begin("rm", road, tmp_path, data=write_rows(tmp_path / "ranked.jsonl", RANKED))
    rows = train_rm.read_preferences(run.cfg.data)
    batch = train_rm.make_batch(train_rm.encode(rows, run.tokenizer, 64, run.cfg), "cpu")
    model, score = scored(road.folder / "rm")
    wish = lambda: -torch.tensor([ranked_loss(row, score, run.tokenizer) for row in rows]).mean()
    return model, lambda: train_rm.loss_of(model, batch, run.cfg)[0], {"loss": wish}


def dpo_setting(road, tmp_path):
    run = begin("dpo", road, tmp_path)
    model = run.model("init")
    pairs = train_dpo.encode(train_dpo.read_preferences(run.cfg.data), run.tokenizer, 64,
                             run.cfg)[:2]
    reference = frozen(run.model("init"))
    train_dpo.add_reference(reference, pairs, run.cfg, run)

    def wish():
        nats = [dpo_oracle(model, reference, pair["chosen"][0], pair["rejected"][0],
                           pair["chosen"][1].index(True), run.cfg.beta)["val_loss"]
                for pair in pairs]
        return -torch.tensor(nats).mean()

    batch = train_dpo.make_batch(pairs, "cpu")
    return model, lambda: train_dpo.loss_of(model, batch, run.cfg)[0], {"loss": wish}


def ppo_setting(road, tmp_path):
    rollout, actor, _, _, cfg, run = collect(road, tmp_path)
    mask, tokens = rollout["response_mask"], rollout["tokens"]

    def loss():
        total, stats = ppo_loss(actor, rollout, list(range(16)), mask.sum(), run)
        close(total.detach(), stats["policy_loss"] + stats["value_loss"], rtol=1e-5)
        return total, stats["policy_loss"], stats["value_loss"]

    def policy_wish():
        new = actor.policy(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        gain = rollout["whitened_advantages"] * (new - rollout["logprobs"]).exp()
        return gain[mask].mean()

    value_wish = lambda: -0.5 * ((actor.critic(tokens)[:, :-1] - rollout["returns"])[mask] ** 2
                                 ).mean()
    return actor, loss, {"policy_loss": policy_wish, "value_loss": value_wish}


SETTINGS = {  # stage: (how to set it up, the losses that its script uses)
    "pretrain": (pretrain_setting, ["loss_of"]), "sft": (sft_setting, ["sft_loss"]),
    "rm": (rm_setting, ["reward_model_loss"]), "dpo": (dpo_setting, ["dpo_loss"]),
    "ppo": (ppo_setting, ["ppo_policy_loss", "ppo_value_loss"]),
}


def exam(stage, road, tmp_path):
    """Each of the script's losses is minus what one wishes for, written here in plain PyTorch, and
    one step of its optimizer brings more of that."""
    model, loss_of, wishes = SETTINGS[stage][0](road, tmp_path)
    result = loss_of()
    loss, *parts = result if isinstance(result, tuple) else (result.mean(), result.mean())
    with torch.no_grad():
        before = [wish().item() for wish in wishes.values()]
    for part, wished in zip(parts, before):
        assert part.item() == pytest.approx(-wished, rel=1e-5, abs=1e-6)
    assert loss.requires_grad
    loss.backward()
    make_optimizer(model, lr=1e-4).step()
    with torch.no_grad():
        after = [wish().item() for wish in wishes.values()]
    assert all(new > old + 1e-5 for new, old in zip(after, before)), (before, after)


@pytest.mark.parametrize("stage", SETTINGS)
def test_check_37_one_step_down_each_stages_loss_brings_more_of_what_it_is_for(stage, road,
                                                                               tmp_path):
    """Bug: a test suite that would pass a loss of zeros, a negated loss or a detached one.

    Curve: zeros and a detached loss leave every curve flat; a negated one falls smoothly, below any
    value that the formula can take, while the true score falls too.
    Seen: Ziegler et al. (arXiv 1909.08593), "Bugs can optimize for bad behavior": a refactor
    flipped a sign; PaLM-rlhf-pytorch c816ae6, an entropy term of the wrong sign for years.
    """
    exam(stage, road, tmp_path)


CHANGES = {"zeros": lambda loss: loss * 0, "negated": lambda loss: -loss,
           "detached": lambda loss: loss.detach(),
           # The right number, but a gradient of zeros, or one that leads uphill.
           "stuck": lambda loss: loss.detach() + 0 * loss,
           "uphill": lambda loss: 2 * loss.detach() - loss}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stage, name", [(stage, name) for stage in SETTINGS
                                         for name in SETTINGS[stage][1]])
def test_check_37_zeros_a_negated_and_a_detached_loss_fail_each_stages_step(
        stage, name, change, road, tmp_path, monkeypatch):
    original = getattr(SCRIPTS[stage], name)

    def wrong(*arguments, **options):
        result = original(*arguments, **options)
        return ((CHANGES[change](result[0]), *result[1:]) if isinstance(result, tuple)
                else CHANGES[change](result))

    monkeypatch.setattr(SCRIPTS[stage], name, wrong)
    with pytest.raises(AssertionError):
        exam(stage, road, tmp_path)


def rates_of(road, stage, out, **options):
    """The rate of each optimizer step of the stage's main, optimizer by optimizer: [[rate, ...]]."""
    with watched_steps() as steps:
        history = road.run(stage, out, dtype="float32", **options)
    rates = {}
    for step in steps:
        assert len(set(step.rates)) == 1  # of matrices and of all else
        rates.setdefault(id(step.optimizer), []).append(step.rates[0])
    return [*rates.values()], history


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm", "dpo"])
def test_check_38_each_step_has_its_own_learning_rate(stage, road, tmp_path):
    """Bug: a schedule that counts epochs or micro-batches beside the steps, and so is at its end
    before the run is, climbs again and learns at rates that nobody asked for."""
    length = {"num_steps": 10} if stage == "pretrain" else {"num_epochs": 2}
    micro = {} if stage == "pretrain" else {"micro_batch_size": 3}
    [rates], history = rates_of(road, stage, tmp_path / "run", lr=1e-3, warmup=2, final_lr=0.05,
                                eval_every=1, **length, **micro)
    falls = [0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates == pytest.approx([1e-3 * share for share in (0.5, 1.0, *falls)], rel=1e-9)
    assert [row["lr"] for row in history] == rates
    assert 0.05e-3 < rates[-1] < 0.1e-3 and all(a > b for a, b in zip(rates[2:], rates[3:]))


def test_check_38_ppos_rates_fall_once_an_iteration_to_the_last_one(road, tmp_path):
    """Bug: a schedule that counts epochs or minibatches; a straight line that goes on beyond its
    end is below 0 there, and the policy climbs its loss: it unlearns what it has learnt."""
    policy, critic = rates_of(road, "ppo", tmp_path / "run", lr=1e-3, critic_lr=3e-3, final_lr=0.2,
                              num_steps=4, num_epochs=3, minibatch_size=4, stop_kl=0.0)[0]
    shares = [share for share in (1.0, 0.8, 0.6, 0.4) for _ in range(3 * 2)]  # of each peak
    assert policy == pytest.approx([1e-3 * share for share in shares], rel=1e-9)
    assert critic == pytest.approx([3e-3 * share for share in shares], rel=1e-9)


@pytest.mark.parametrize("save_every", [2, 1000])
@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_last_steps_weights_are_saved(stage, save_every, road, tmp_path):
    """Bug: a checkpoint at every so many steps and none at the end, so that a run that they do not
    divide hands older weights on, and a short run none."""
    after = {}  # {id of a parameter: it after the last step}

    def keep(optimizer, *_):
        for group in optimizer.param_groups:
            after.update({id(p): p.detach().clone() for p in group["params"]})

    options = dict(num_steps=3) if stage in ("pretrain", "ppo") else dict(num_epochs=1)
    handle = register_optimizer_step_post_hook(keep)
    try:
        road.run(stage, tmp_path, dtype="float32", save_every=save_every, **options)
    finally:
        handle.remove()
    assert (tmp_path / "ckpt.pt").exists()
    ckpt = load_checkpoint(tmp_path)
    assert ckpt["step"] == (3 if stage in ("pretrain", "ppo") else 5)
    saved = ckpt["actor" if stage == "ppo" else "model"]
    for last in after.values():
        assert any(torch.equal(last, one) for one in saved.values())
    if stage == "ppo":
        assert all(torch.equal(ckpt["model"][name], saved[f"policy.{name}"])
                   for name in ckpt["model"])
    if stage == "rm":  # they are measured after the last step
        assert saved["score_std"] not in (0.0, 1.0) and saved["score_mean"] != 0


@pytest.mark.parametrize("stage, says", [
    ("sft", "| 40 dialogues of {}, 2 left out (longer than 64 tokens)\n"),
    ("rm", "| 40 prompts of {}, 5 left out, 2 of them ties; answers left out: 1 identical, 2 "
           "longer than 64 tokens\n"),
    ("dpo", "| 40 pairs of {}; left out: 2 ties, 1 identical, 2 longer than 64 tokens\n")])
def test_what_is_left_out_is_counted(stage, says, road, tmp_path, capsys):
    """Bug: counts that run backwards, of which "-2 left out" was taken for "2 left out"."""
    source = road.demonstrations if stage == "sft" else road.preferences
    rows, long = [row for _, row in read_rows(source)], "moo " * 80
    if stage == "sft":
        rows += [{"messages": chat("cow?", long)}] * 2
    else:
        rows += [{"prompt": f"{i}?", "chosen": long, "rejected": "moo"} for i in range(2)]
        rows += [{"prompt": "2?", "chosen": "moo", "rejected": "moo"}]
        rows += [{"prompt": f"{i}?", "chosen": "moo", "rejected": "baa", "score_chosen": 4,
                  "score_rejected": 4} for i in range(2)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    road.run(stage, tmp_path / "run", data=data, too_long="drop")
    assert says.format(data) in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm", "dpo"])
def test_an_evaluation_computes_in_the_runs_type(stage, road, tmp_path, monkeypatch):
    """Bug: a held-out loss in another precision than the training loss beside it."""
    if stage == "pretrain":
        run = start_run(road.config(stage, tmp_path / stage, dtype="bfloat16"), {})
        model = build_model(load_checkpoint(road.folder / "pretrain"))
        rows = torch.tensor(road.tokenizer.encode(road.text.read_text(encoding="utf-8"))[: 4 * 64]).view(4, 64)
    else:
        model, rows, run = start(stage, road, tmp_path, dtype="bfloat16")
    seen, loss_of = [], SCRIPTS[stage].loss_of
    monkeypatch.setattr(SCRIPTS[stage], "loss_of", lambda *args: seen.append(
        torch.is_autocast_enabled("cpu")) or loss_of(*args))
    SCRIPTS[stage].evaluate(model, rows, run.cfg, run)
    assert seen and all(seen)
