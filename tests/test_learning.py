"""Check 38: each stage beats its baseline from fixed seeds, in seconds, not merely runs."""

import math

import train_sft
from minirlhf.runs import load_model, start_run


def test_check_38_pretraining_learns_the_text(road, tmp_path):
    """The baseline: guessing every token alike."""
    history = road.run("pretrain", tmp_path, num_steps=100, batch_size=16, lr=5e-3, warmup=10,
                       eval_every=50, dtype="float32")
    assert history[-1]["val_loss"] < history[0]["val_loss"] < math.log(road.tokenizer.n_vocab) / 2
    assert history[-1]["val_loss"] < 1.0


def test_check_38_sft_beats_the_base_model_on_held_out_dialogues(road, tmp_path):
    run = start_run(road.config("sft", tmp_path / "run", dtype="float32"), {"init": "pretrain"})
    rows = train_sft.read_demonstrations(run.cfg.data)
    examples = train_sft.encode(rows, run.tokenizer, 64, run.cfg)
    base = train_sft.evaluate(run.model("init"), examples[30:], run.cfg, run)
    history = road.run("sft", tmp_path / "run", num_epochs=15, lr=3e-3, held_out=0.25,
                       dtype="float32")
    assert history[-1]["val_loss"] < 0.5 * base


def test_check_38_the_reward_model_ranks_held_out_answers(road, tmp_path):
    """The baseline: guessing. Its scores have mean 0 and deviation 1 on the SFT model's answers."""
    history = road.run("rm", tmp_path, num_epochs=5, lr=2e-3, held_out=0.25, dtype="float32")
    assert history[0]["val_loss"] > history[-1]["val_loss"] and history[-1]["accuracy"] > 0.8
    model, tokenizer = load_model(tmp_path, "scalar")
    assert model.score_std > 0 and model.score_std != 1 and model.score_mean != 0


def test_check_38_dpo_learns_which_answer_is_preferred(road, tmp_path):
    history = road.run("dpo", tmp_path, num_epochs=4, lr=1e-3, held_out=0.25, dtype="float32")
    assert history[-1]["accuracy"] > 0.8 and history[-1]["val_loss"] < 0.9 * math.log(2)
    assert history[-1]["margin"] > max(0.1, history[0]["margin"])


def test_check_38_ppo_raises_the_reward_and_what_people_want(road, tmp_path):
    """The baseline: the SFT model, whose rollouts the first iteration sees. The judge, which no
    loss has seen, agrees; the KL penalty keeps the policy near."""
    history = road.run("ppo", tmp_path, num_steps=24, rollout_size=32, minibatch_size=16,
                       micro_batch_size=0, lr=5e-4, critic_lr=3e-3, dtype="float32",
                       judge=f"{road.tools}:judge")
    first, last = history[:2], history[-5:]

    def mean(rows, key):
        return sum(row[key] for row in rows) / len(rows)

    assert history[0]["kl"] == 0
    assert mean(last, "score") > mean(first, "score") + 0.5
    assert mean(last, "reward") > mean(first, "reward") + 0.5
    assert mean(last, "gold") > mean(first, "gold") + 0.3
    assert mean(history[2:], "explained_variance") > mean(first, "explained_variance") + 0.1
    assert 0 < mean(last, "kl") < 10
