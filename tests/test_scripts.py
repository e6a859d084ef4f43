"""The scripts: a smoke test of each option, seeds, and what sample.py and evaluate.py promise."""

import contextlib
import dataclasses
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_road import PROMPTS, SCRIPTS, chat, collect, finite, without_clock, write_rows

import evaluate
import sample
import speedrun
import train_dpo
import train_ppo
import train_pretrain
import train_rm
from minirlhf.config import field_comments, parse_config
from minirlhf.formats import read_rows, read_samples
from minirlhf.model import GPT, SIZES, ModelConfig
from minirlhf.runs import load_checkpoint

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
    "ppo": (dict(lr=3e-3, critic_lr=3e-3, stop_kl=0.0, micro_batch_size=0, max_new_tokens=6), dict(
        num_steps=3, rollout_size=4, max_new_tokens=5, temperature=0.7, num_epochs=1,
        minibatch_size=8, lr=1e-4, critic_lr=1e-4, final_lr=0.9, beta=0.5, kl_target=1.0, gamma=0.9,
        lam=1.0, clip_range=0.01, value_clip=0.0, score_clip=0.1, missing_end_score=-1.0,
        stop_kl=1e-9, grad_clip=0.05, vf_coef=1.0, seed=1)),
}
NEUTRAL = {"micro_batch_size", "eval_every", "save_every", "ledger_every", "num_samples", "threads"}


def trained(road, stage, out, options):
    """All weights that the run has trained, as one list of tensors."""
    history = road.run(stage, out, dtype="float32", **options)
    assert finite(history)
    checkpoint = load_checkpoint(out)
    return [*checkpoint["actor" if stage == "ppo" else "model"].values()]


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


def test_the_seed_chooses_the_text_of_pretraining(road, tmp_path, monkeypatch):
    starts, blocks = [], train_pretrain.random_blocks
    monkeypatch.setattr(train_pretrain, "random_blocks",
                        lambda *args: starts.append(blocks(*args)) or starts[-1])
    for seed in (0, 1):
        road.run("pretrain", tmp_path / str(seed), seed=seed)
    assert not torch.equal(*starts)


def test_several_texts_are_read_one_after_the_other(road, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("The owl is on the wall.\n" * 300)
    for text in (f"{road.text}", f"{other}", f"{road.text},{other}"):
        road.run("pretrain", tmp_path / f"run_{len(text)}", text=text)
    tokens = [int(line.split()[2].replace(",", "")) for line in capsys.readouterr().out.splitlines()
              if line.startswith("data")]
    assert tokens[2] == pytest.approx(tokens[0] + tokens[1], abs=3)  # and the blank line between


def test_a_published_size_keeps_context_dropout_and_attention_of_the_options(road, tmp_path,
                                                                               monkeypatch):
    monkeypatch.setitem(SIZES, "gpt2", dict(n_layer=1, n_head=4, n_embd=16, block_size=128))
    road.run("pretrain", tmp_path, size="gpt2", block_size=32, dropout=0.1, attention="manual")
    config = load_checkpoint(tmp_path)["model_config"]
    expected = dict(n_layer=1, n_head=4, n_embd=16, block_size=32, dropout=0.1, attention="manual",
                    norm="layernorm", positions="learned", vocab_size=road.tokenizer.n_vocab)
    assert {name: config[name] for name in expected} == expected


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

def test_stop_kl_ends_an_iterations_epochs(road, tmp_path, monkeypatch):
    calls, loss = [], train_ppo.minibatch_loss
    monkeypatch.setattr(train_ppo, "minibatch_loss",
                        lambda *a: calls.append(a) or loss(*a))
    road.run("ppo", tmp_path / "a", num_steps=1, num_epochs=4, micro_batch_size=0, stop_kl=1e-9,
             lr=1e-3, dtype="float32")
    # One call is the preflight's. The first minibatch has ratio 1; the second one sees a KL.
    assert len(calls) == 1 + 2


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


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_chat_forgets_its_oldest_exchange_only_where_the_context_is_full(system, road, capsys,
                                                                          monkeypatch):
    """An answer may take all of max_new_tokens, and a conversation may fill the rest to the last."""
    tok, asked, said = road.tokenizer, [], ["cow?", "dog?", "pig?"]
    monkeypatch.setattr(sample, "respond", lambda model, prompts, *a, **k: (
        asked.append(prompts[0]) or [[(tok.encode("moo") + [tok.end_id], True)]]))
    start = [{"role": "system", "content": system}] if system else []
    whole = [tok.encode_prompt(start + chat("cow?", "moo", "dog?", "moo", "pig?")[at:])
             for at in (0, 2)]
    for room, expected in ((len(whole[0]), whole[0]), (len(whole[0]) - 1, whole[1])):
        lines = iter([*said, ""])
        monkeypatch.setattr("builtins.input", lambda shown: next(lines))
        block_size = load_checkpoint(road.folder / "sft")["model_config"]["block_size"]
        sample.main(sample.Config(model=str(road.folder / "sft"), chat=True, system=system,
                                  max_new_tokens=block_size - room))
        assert asked[-1] == expected


def test_sample_passes_its_options_on(road, tmp_path, capsys):
    greedy = sampled(road, capsys, prompt="What does a cow say?", temperature=0.0)
    for option in (dict(top_k=1), dict(top_p=1e-6)):
        assert sampled(road, capsys, prompt="What does a cow say?", **option) == greedy
    out = sampled(road, capsys, prompts=road.prompts, save=str(tmp_path / "s.jsonl"), limit=3,
                  num_samples=2)
    rows = read_samples(tmp_path / "s.jsonl")
    assert [row["messages"][0]["content"] for row in rows] == [q for q, _ in PROMPTS[:3]]
    ended = [answer["ended"] for row in rows for answer in row["samples"]]
    assert f"6 samples of 3 prompts, {100 * sum(ended) / 6:.1f}% ended" in out


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


def test_sample_computes_in_the_type_that_was_asked_for(road, capsys, monkeypatch):
    """Bug: --dtype is checked and then forgotten."""
    seen, draw = [], sample.sample_prompts
    monkeypatch.setattr(sample, "sample_prompts", lambda *args: seen.append(
        (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))) or draw(*args))
    for dtype in ("float32", "bfloat16"):
        sampled(road, capsys, prompt="cow?", dtype=dtype)
    assert seen[0][0] is False and seen[1] == (True, torch.bfloat16)


# ---------------------------------------------------------------- what a step reads

def test_pretraining_draws_its_blocks_from_all_but_the_last_50th_of_the_text(road, tmp_path,
                                                                            monkeypatch):
    seen, trained = [], []
    blocks_of, loss_of = train_pretrain.random_blocks, train_pretrain.loss_of
    monkeypatch.setattr(train_pretrain, "random_blocks", lambda stream, *args: seen.append(
        (stream, blocks_of(stream, *args))) or seen[0][1])
    monkeypatch.setattr(train_pretrain, "loss_of", lambda model, blocks: trained.append(blocks)
                        or loss_of(model, blocks))
    road.run("pretrain", tmp_path / "run", num_steps=3, eval_every=3)
    encode = road.tokenizer.encode
    whole = [idx for document in road.text.read_text().split("\n\n")
             for idx in encode(document) + encode("\n\n")]
    [(stream, starts)] = seen
    assert stream.tolist() == whole[: int(0.98 * len(whole))]
    for step in range(3):  # trained[0] only tries out whether the largest batch fits
        assert trained[1 + step].tolist() == [whole[at : at + 64] for at in starts[step].tolist()]
    held_out = torch.cat(trained[4:]).flatten().tolist()
    last = whole[int(0.98 * len(whole)):]
    assert held_out == last[: len(last) // 64 * 64][: 32 * 64]


def test_ppos_learning_rate_falls_once_an_iteration_whatever_the_epochs(road, tmp_path,
                                                                        monkeypatch):
    """Bug: a schedule that counts epochs or minibatches is at its end long before the run is."""
    for num_epochs in (1, 3):
        seen = []
        monkeypatch.setattr(train_ppo, "ppo_update", lambda actor, optimizers, *args: seen.append(
            [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]) or {})
        road.run("ppo", tmp_path / str(num_epochs), num_steps=4, num_epochs=num_epochs, lr=1e-3,
                 critic_lr=3e-3, final_lr=0.2)
        left = [1.0, 0.8, 0.6, 0.4]  # of the way from the peak down to a fifth of it
        assert seen == [pytest.approx([1e-3 * share] * 2 + [3e-3 * share] * 2) for share in left]


def test_ppo_samples_and_scores_in_the_type_that_was_asked_for(road, tmp_path, monkeypatch):
    """Bug: answers are sampled in another precision than the one that their log-probs are of."""
    seen, generate = [], train_ppo.generate
    monkeypatch.setattr(train_ppo, "generate", lambda *args, **options: seen.append(
        (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        or generate(*args, **options))
    for dtype in ("float32", "bfloat16"):
        collect(road, tmp_path / dtype, dtype=dtype)
    assert seen[0][0] is False and seen[1] == (True, torch.bfloat16)


# ---------------------------------------------------------------- the reward model's statistics

def measured(scores, ended, batch_size, monkeypatch):
    """measure_scores of answers with these raw scores."""
    parts = iter(zip(torch.tensor(scores).split(batch_size), torch.tensor(ended).split(batch_size)))
    asked, now = [], {}

    def generate(policy, prompts, max_new_tokens, stop_ids, generator):
        asked.append((list(prompts), max_new_tokens, stop_ids))
        now["scores"], ended = next(parts)
        return SimpleNamespace(tokens=None, lengths=None, ended=ended)

    monkeypatch.setattr(train_rm, "generate", generate)
    model = SimpleNamespace(eval=lambda: None, score=lambda tokens, lengths: now["scores"])
    run = SimpleNamespace(tokenizer=SimpleNamespace(end_id=7), generator=None,
                          autocast=contextlib.nullcontext)
    cfg = SimpleNamespace(batch_size=batch_size, max_new_tokens=5)
    prompts = list(range(len(scores)))
    found = train_rm.measure_scores(model, None, prompts, cfg, run)
    assert [p for part, *_ in asked for p in part] == prompts
    assert all(rest == [5, [7]] for _, *rest in asked)
    return [x.item() for x in found]


def test_scores_are_measured_on_the_answers_that_ended(monkeypatch):
    mean, std = measured([1.0, 50.0, 2.0, 6.0, 90.0], [True, False, True, True, False], 2,
                         monkeypatch)
    assert mean == pytest.approx(3.0) and std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert measured([1.0, 3.0], [True, True], 2, monkeypatch) == pytest.approx([2.0, 2**0.5])


@pytest.mark.parametrize("scores, ended, message", [
    ([1.0, 2.0, 3.0], [False, True, False], "fewer than 2 of 3 sampled answers ended"),
    ([2.0, 2.0, 2.0], [True, True, True], "every answer got the same score")])
def test_scores_that_cannot_be_normalised_are_refused(scores, ended, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        measured(scores, ended, 2, monkeypatch)


def test_the_default_model_of_pretraining_can_be_built_and_has_a_million_parameters():
    cfg = train_pretrain.Config()
    options = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(ModelConfig)
               if hasattr(cfg, field.name)}
    model = GPT(ModelConfig(**{**options, "vocab_size": 1280}))
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.5e6


@pytest.mark.parametrize("stage, says", [
    ("sft", "| 40 dialogues of {}, 2 left out (longer than 64 tokens)\n"),
    ("rm", "| 40 prompts of {}, 3 left out; answers left out: 1 identical, 2 longer than 64 "
           "tokens\n"),
    ("dpo", "| 40 pairs of {}; left out: 1 identical, 2 longer than 64 tokens\n")])
def test_what_is_left_out_is_counted(stage, says, road, tmp_path, capsys):
    """Bug: counts that run backwards, of which "-2 left out" was taken for "2 left out"."""
    source = road.demonstrations if stage == "sft" else road.preferences
    rows, long = [row for _, row in read_rows(source)], "moo " * 80
    if stage == "sft":
        rows += [{"messages": chat("cow?", long)}] * 2
    else:
        rows += [{"prompt": f"{i}?", "chosen": long, "rejected": "moo"} for i in range(2)]
        rows += [{"prompt": "2?", "chosen": "moo", "rejected": "moo"}]
    data = write_rows(tmp_path / "data.jsonl", rows)
    road.run(stage, tmp_path / "run", data=data, too_long="drop")
    assert says.format(data) in capsys.readouterr().out
