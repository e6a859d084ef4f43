"""Checks 25 to 38: preferences, the other stages, the tests themselves."""

import copy

import pytest
import torch
from tiny_road import collect, finite, polite, write_rows

import train_dpo
import train_ppo
import train_rm
from conftest import close
from minirlhf.formats import read_rows
from minirlhf.optim import make_optimizer
from minirlhf.runs import frozen, start_run


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


def test_check_36_a_rollout_never_encodes_text_again(road, tmp_path, monkeypatch):
    """Bug: decoding a response and encoding it again gives other tokens than those sampled."""
    sampled = []
    generate = train_ppo.generate
    monkeypatch.setattr(train_ppo, "generate", lambda *a, **k: sampled.append(generate(*a, **k))
                        or sampled[0])
    rollout = collect(road, tmp_path)[0]
    assert torch.equal(rollout["tokens"], sampled[0].tokens)
