"""DPO: pairs, their stored reference, the loss and its rewards, and that it learns."""

import copy
import math

import pytest
import torch
from tiny_road import (PROMPTS, RANKED, TWINS, answers_of, begin, chat, digest, dpo_oracle,
                       logprobs_of, longer, nudge, places, sampled_texts, share, strict_pairs,
                       watch, with_dropout, write_rows)

import train_dpo
from conftest import close
from minirlhf.plumbing.checkpoints import frozen, load_model


def loss_of_pairs(model, pairs, run):
    """(losses, statistics) of the script."""
    return train_dpo.loss_of(model, train_dpo.make_batch(pairs, "cpu"), run.cfg)


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


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_check_25_dpo_sums_log_probs_and_its_rewards_carry_beta(smoothing, road, tmp_path, double):
    """Bug: log-probs averaged over the answer's tokens, which is another objective with another
    scale of beta, or implicit rewards logged without beta.

    Curve: the first loss is not 0.6931 where the reference is wrong or has dropout; averaged, the
    margins shrink by the answers' length and the loss hardly moves; without beta they look 1 / beta
    too large.
    Seen: trl#789, where users averaged and saw training collapse; the DPO authors' trainers.py sums
    and logs rewards times beta.
    """
    run = begin("dpo", road, tmp_path, beta=0.5, pairs="all", micro_batch_size=3,
                label_smoothing=smoothing)
    rows = train_dpo.read_preferences(run.cfg.data)
    reference, policy = frozen(run.model("init")), nudge(run.model("init"))
    pairs = train_dpo.encode(rows, run.tokenizer, 64, run.cfg)[:10]
    train_dpo.add_reference(reference, pairs, run.cfg, run)
    losses, stats = loss_of_pairs(policy, pairs, run)
    k = 0
    for row in rows[:6]:
        ids, start = answers_of(row, run.tokenizer)
        for i, j in strict_pairs(row["ranks"])[: 10 - k]:
            expected = dpo_oracle(policy, reference, ids[i], ids[j], start, 0.5, smoothing)
            close(losses[k], expected.pop("val_loss"))
            assert set(stats) == set(expected) and abs(expected["margin"]) > 0.001
            for name, value in expected.items():
                close(stats[name][k], value)
            k += 1
    assert k == 10
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("dropout", [False, True])
def test_check_25_the_loss_at_the_start_is_log_2(dropout, road, tmp_path, double):
    """Dropout, if there is any, touches neither the reference nor the evaluation."""
    init = {"init": with_dropout(road.folder / "sft", tmp_path / "dropout")} if dropout else {}
    history = road.run("dpo", tmp_path / "run", dtype="float32", lr=0.0, eval_every=1,
                       micro_batch_size=3, label_smoothing=0.1, **init)
    for row in history:
        assert row["val_loss"] == pytest.approx(math.log(2), rel=1e-9)
        assert dropout or row["loss"] == pytest.approx(math.log(2), rel=1e-9)
        for name in ("chosen_reward", "rejected_reward", "margin"):
            assert abs(row[name]) < 1e-9


def test_check_25_what_is_logged_are_the_means_over_the_held_out_pairs(
        road, tmp_path, monkeypatch, double):
    calls = watch(monkeypatch, train_dpo, "evaluate")
    (row,) = road.run("dpo", tmp_path / "run", dtype="float32", lr=1e-3, beta=0.5, held_out=0.18,
                      micro_batch_size=3, eval_every=100)
    evaluated, held_out = calls[0][0][:2]
    assert evaluated.training  # again, after the evaluation
    reference, policy = (load_model(f)[0] for f in (road.folder / "sft", tmp_path / "run"))
    by_prompt = {row["messages"][0]["content"]: answers_of(row, road.tokenizer)
                 for row in train_dpo.read_preferences(road.preferences)}
    expected = []
    for pair in held_out:
        ids, start = by_prompt[pair["prompt"]]
        expected.append(dpo_oracle(policy, reference, ids[0], ids[-1], start, 0.5))
    assert len(held_out) == 7  # so the last micro-batch has one pair
    for name in expected[0]:
        assert row[name] == pytest.approx(sum(e[name] for e in expected) / 7, rel=1e-9), name


@pytest.mark.parametrize("margin", [-1000.0, -100.0, 100.0, 1000.0])
def test_check_26_dpo_is_finite_and_learns_at_margins_of_100(margin, road, tmp_path):
    """Bug: log(sigmoid(x)) instead of logsigmoid(x), -inf in float32 from x = -104 on, and its
    gradient is 0 / 0 there. Softmax before cross-entropy flattens what the model believes.

    Curve: the loss jumps to inf or NaN as soon as one badly ranked pair comes along; with a double
    softmax it falls very slowly and stalls high up.
    Seen: DeepSpeedExamples#501 replaced -log(sigmoid(x)) by logsigmoid; trlx's summarize_rlhf
    example still has the old form.
    """
    run = begin("dpo", road, tmp_path)
    model = run.model("init")
    pairs = train_dpo.encode(train_dpo.read_preferences(run.cfg.data), run.tokenizer, 64,
                             run.cfg)[:2]
    chosen, rejected = train_dpo.pair_logps(model, train_dpo.make_batch(pairs, "cpu"))
    for k, pair in enumerate(pairs):
        pair["ref_chosen_logp"] = chosen[k].item() - margin / run.cfg.beta
        pair["ref_rejected_logp"] = rejected[k].item()
    losses, _ = loss_of_pairs(model, pairs, run)
    parameters = list(model.parameters())
    slopes = torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), parameters)])
    if margin > 0:
        assert (losses >= 0).all() and (losses < 1e-30).all() and (slopes.abs() < 1e-30).all()
    else:
        close(losses, [-margin] * 2, rtol=1e-5)
        full = torch.autograd.grad(run.cfg.beta * (rejected - chosen).sum(), parameters)
        full = torch.cat([g.flatten() for g in full])  # sigmoid(100) is 1
        assert (slopes - full).norm() < 1e-5 * full.norm()


@pytest.mark.parametrize("cut", [False, True])
def test_check_27_dpo_drops_and_counts_pairs_without_a_difference(cut, road, tmp_path, capsys):
    """Bug: pairs whose answers are the same, perhaps only once they are cut, stay in the data.

    Curve: for a share p of such pairs the loss has a floor of 0.693 p, and the accuracy stays below
    1 however long one trains.
    Seen: OpenRLHF#1311, where truncation makes chosen and rejected identical and the pair is kept.
    """
    data = write_rows(tmp_path / "pairs.jsonl", longer(TWINS) if cut else TWINS)
    run = begin("dpo", road, tmp_path, data=data, pairs="all", too_long="cut")
    rows = train_dpo.read_preferences(data)
    pairs = train_dpo.encode(rows, run.tokenizer, 64, run.cfg)
    said = [tuple(run.tokenizer.decode([i for i, m in zip(*pair[side]) if m][:-1])
                  for side in ("chosen", "rejected")) for pair in pairs]
    assert said == [("woof", "meow")] * 2 + [("hoot", "moo"), ("hoot", "baa")] * 2 + [
        ("baa", "oink")]
    printed = capsys.readouterr().out
    assert "| 7 pairs" in printed
    assert "left out: 2 ties, 3 identical, 0 longer than 64 tokens" in printed


@pytest.mark.parametrize("transcript", [False, True])
def test_check_27_conversations_that_differ_in_their_last_answer_are_no_twins(transcript, road,
                                                                              tmp_path):
    """Whole conversations, as messages or in hh-rlhf's way: what comes before is their prompt."""
    turns = ["dog?", "woof", "cow?"]
    whole = [chat(*turns, answer) for answer in ("moo", "baa")]
    if transcript:
        whole = ["".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {message['content']}"
                         for i, message in enumerate(messages)) for messages in whole]
    data = write_rows(tmp_path / "pairs.jsonl", [dict(zip(("chosen", "rejected"), whole))])
    prompt = road.tokenizer.encode_prompt(chat(*turns))
    run = begin("dpo", road, tmp_path, data=data)
    pairs = train_dpo.encode(train_dpo.read_preferences(data), road.tokenizer, 64, run.cfg)
    assert len(pairs) == 1
    for side, answer in (("chosen", "moo"), ("rejected", "baa")):
        ids, mask = pairs[0][side]
        assert ids[: mask.index(True)] == prompt and mask == sorted(mask)
        assert road.tokenizer.decode(ids[len(prompt) :]) == answer + "<|end|>"


def test_check_28_dpo_takes_the_strict_pairs_too(road, tmp_path):
    data = write_rows(tmp_path / "ranked.jsonl", RANKED + [
        {"prompt": "tie?", "output": ["a", "b", "c"], "ranks": [0, 0, 0]}])
    rows = train_dpo.read_preferences(data)
    for choice in ("all", "best_worst"):
        run = begin("dpo", road, tmp_path, data=data, pairs=choice)
        pairs = train_dpo.encode(rows, run.tokenizer, 64, run.cfg)
        expected = []
        for row in rows[:5]:
            ids, _ = answers_of(row, run.tokenizer)
            couples = strict_pairs(row["ranks"])
            expected += [(ids[i], ids[j]) for i, j in couples
                         if choice == "all" or (i, j) == (0, len(ids) - 1)]
        assert [(pair["chosen"][0], pair["rejected"][0]) for pair in pairs] == expected
        assert len(expected) == (12 if choice == "all" else 5)


def test_check_29_dpo_takes_a_log_prob_of_zero_for_a_number_and_a_margin_of_zero_for_a_tie(
        road, tmp_path):
    run = begin("dpo", road, tmp_path, beta=0.5)
    model = run.model("init")
    pairs = train_dpo.encode(train_dpo.read_preferences(run.cfg.data), run.tokenizer, 64,
                             run.cfg)[:2]
    for pair in pairs:
        pair["ref_chosen_logp"] = pair["ref_rejected_logp"] = 0.0
    _, stats = loss_of_pairs(model, pairs, run)
    close(stats["chosen_reward"], 0.5 * stats["chosen_logp"], rtol=1e-6)
    for k, pair in enumerate(pairs):
        pair["ref_chosen_logp"], pair["ref_rejected_logp"] = (
            stats[name][k].item() for name in ("chosen_logp", "rejected_logp"))
    _, stats = loss_of_pairs(model, pairs, run)
    assert stats["margin"].tolist() == [0, 0] and stats["accuracy"].tolist() == [0.5, 0.5]


def test_check_33_dpo_uses_the_stored_reference(road, tmp_path, double):
    run = begin("dpo", road, tmp_path, beta=0.5)
    model = run.model("init")
    pairs = train_dpo.encode(train_dpo.read_preferences(run.cfg.data), run.tokenizer, 64,
                             run.cfg)[:6]
    train_dpo.add_reference(frozen(copy.deepcopy(model)), pairs, run.cfg, run)
    _, stats = loss_of_pairs(model, pairs, run)
    for k, pair in enumerate(pairs):
        pair["ref_chosen_logp"] -= 2.0 + k
        pair["ref_rejected_logp"] -= 1.0
    _, shifted = loss_of_pairs(model, pairs, run)
    close(shifted["chosen_reward"] - stats["chosen_reward"], 1 + 0.5 * torch.arange(6))
    close(shifted["rejected_reward"] - stats["rejected_reward"], [0.5] * 6)


def test_check_33_every_pairs_reference_is_its_own_from_the_sft_model(road, tmp_path, monkeypatch,
                                                                      double):
    """Computed in order of length and in parts, for the training pairs and the held-out ones."""
    calls = watch(monkeypatch, train_dpo, "add_reference")
    road.run("dpo", tmp_path / "run", dtype="float32", lr=1e-3, micro_batch_size=3, pairs="all")
    pairs, (sft, _) = calls[0][0][1], load_model(road.folder / "sft")
    assert len(pairs) == 80
    for pair in pairs[::7]:
        for side in ("chosen", "rejected"):
            ids, mask = pair[side]
            expected = logprobs_of(sft, ids, mask.index(True)).sum().item()
            assert pair[f"ref_{side}_logp"] == pytest.approx(expected, rel=1e-9)


def test_check_38_dpo_learns_which_answer_is_preferred(road, tmp_path):
    """The baseline: the SFT model, a third of whose answers are rude."""
    history = road.run("dpo", tmp_path, num_epochs=4, lr=1e-3, held_out=0.25, dtype="float32")
    assert history[-1]["accuracy"] > 0.8 and history[-1]["val_loss"] < 0.9 * math.log(2)
    assert history[-1]["margin"] > max(0.1, history[0]["margin"])
    asked = [question for question, _ in PROMPTS]
    is_rude = {folder: share("fool" in text for text, _ in sampled_texts(folder, asked, 1.0, 2))
               for folder in (road.folder / "sft", tmp_path)}
    assert is_rude[road.folder / "sft"] > 0.2 and is_rude[tmp_path] < 0.1
