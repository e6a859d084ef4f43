"""Checks 25 to 38: preferences, slips of the big libraries, the tests themselves.

The first test of each check tells its bug, how it shows in a training curve, and where it was seen.
The tests run the scripts' own functions; their oracles are loops over bare rows without filler.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_road import PROMPTS, SCRIPTS, chat, collect, finite, polite, write_rows

import evaluate
import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from conftest import close
from minirlhf.generate import Rollout, generate
from minirlhf.model import ScalarModel
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.formats import read_rows
from minirlhf.plumbing.optim import make_optimizer
from minirlhf.plumbing.runs import Run, build_model, frozen, load_checkpoint, load_model, start_run


# ---------------------------------------------------------------- what several checks use

def begin(stage, road, tmp_path, **changes):
    """A run of the stage's script on the road's files, started but not in its loop."""
    needs = {"pretrain": {}, "sft": {"init": "pretrain"},
             "ppo": {"init": "sft", "reward_model": "rm"}}.get(stage, {"init": "sft"})
    return start_run(road.config(stage, tmp_path / "begun", **{"dtype": "float32", **changes}),
                     needs)


def watch(monkeypatch, where, name):
    """Let where.name do its work, and keep (arguments, result) of every call."""
    calls, original = [], getattr(where, name)

    def watched(*args, **options):
        result = original(*args, **options)
        calls.append((args, result))
        return result

    monkeypatch.setattr(where, name, watched)
    return calls


def moved(model):
    """The model a little away from where it was: one equal to the reference would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.trunk.blocks[1].mlp.down.weight
        weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def with_dropout(stage, road, tmp_path):
    """The folder of a copy of the stage's model with dropout, to see where it is switched off."""
    ckpt = load_checkpoint(road.folder / stage)
    ckpt["model_config"]["dropout"] = 0.5
    (tmp_path / "dropout").mkdir()
    torch.save(ckpt, tmp_path / "dropout" / "ckpt.pt")
    return str(tmp_path / "dropout")


@torch.no_grad()
def logprobs_of(model, ids, start, temperature=1.0):
    """Log-prob of each token from index `start` on, each by a forward pass of its own: (n,)."""
    rows = [model(torch.tensor([ids[:t]]))[0, -1] / temperature for t in range(start, len(ids))]
    return torch.stack([row.log_softmax(-1)[ids[t]] for t, row in enumerate(rows, start)])


def answers_of(row, tokenizer):
    """The ids of each answer after its prompt, spelt out, and the prompt's length."""
    prompt = tokenizer.encode_prompt(row["messages"])
    return [prompt + tokenizer.encode(answer) + [tokenizer.end_id]
            for answer in row["answers"]], len(prompt)


def strict_pairs(ranks):
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


def softplus(x):
    """log(1 + e^x), by Python: -log sigmoid(d) is softplus(-d)."""
    return math.log1p(math.exp(x))


# ---------------------------------------------------------------- 25

def dpo_oracle(policy, reference, better, worse, start, beta, smoothing=0.0):
    """Loss and statistics of one pair by loops over its answers' tokens."""
    logps = [[logprobs_of(model, ids, start).sum().item() for ids in (better, worse)]
             for model in (policy, reference)]
    chosen, rejected = (beta * (p - r) for p, r in zip(*logps))
    margin = chosen - rejected
    loss = (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin)
    return {"val_loss": loss, "chosen_reward": chosen, "rejected_reward": rejected,
            "margin": margin, "accuracy": float(margin > 0), "chosen_logp": logps[0][0],
            "rejected_logp": logps[0][1]}


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
    reference, policy = frozen(run.model("init")), moved(run.model("init"))
    pairs = train_dpo.encode(rows, run.tokenizer, 64, run.cfg)[:10]
    train_dpo.add_reference(reference, pairs, run.cfg, run)
    losses, stats = train_dpo.loss_of(policy, pairs, run.cfg, run)
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
    init = {"init": with_dropout("sft", road, tmp_path)} if dropout else {}
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


# ---------------------------------------------------------------- 26

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
    chosen, rejected = train_dpo.pair_logps(model, *train_dpo.make_batch(pairs, "cpu"))
    for k, pair in enumerate(pairs):
        pair["ref_chosen_logp"] = chosen[k].item() - margin / run.cfg.beta
        pair["ref_rejected_logp"] = rejected[k].item()
    losses, _ = train_dpo.loss_of(model, pairs, run.cfg, run)
    parameters = list(model.parameters())
    slopes = torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), parameters)])
    if margin > 0:
        assert (losses >= 0).all() and (losses < 1e-30).all() and (slopes.abs() < 1e-30).all()
    else:
        close(losses, [-margin] * 2, rtol=1e-5)
        full = torch.autograd.grad(run.cfg.beta * (rejected - chosen).sum(), parameters)
        full = torch.cat([g.flatten() for g in full])  # sigmoid(100) is 1
        assert (slopes - full).norm() < 1e-5 * full.norm()


@pytest.mark.parametrize("gap", [100.0, 1000.0])
def test_check_26_the_reward_model_is_finite_and_learns_at_gaps_of_100(gap, road, tmp_path):
    run = begin("rm", road, tmp_path, data=write_rows(tmp_path / "pairs.jsonl", [
        {"prompt": "cow?", "chosen": "moo", "rejected": "meow"}] * 2))
    examples = train_rm.encode(train_rm.read_preferences(run.cfg.data), run.tokenizer, 64, run.cfg)
    scores = torch.tensor([gap, 0.0, 0.0, gap], requires_grad=True)  # right, then wrong
    model = SimpleNamespace(score=lambda tokens, lengths: scores)
    losses = train_rm.loss_of(model, train_rm.make_batch(examples, 0.0, "cpu"))
    losses.sum().backward()
    assert 0 <= losses[0] < 1e-30 and losses[1] == gap
    close(scores.grad, [0.0, 0.0, -1.0, 1.0], atol=1e-30)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_check_26_log_probs_of_very_sure_models_equal_float64(stage, road, tmp_path):
    """Nothing is squashed before the cross-entropy, and log(0) never comes up."""
    run = begin("sft", road, tmp_path)
    real = run.model("init")
    with torch.no_grad():
        examples = train_sft.encode(train_sft.read_demonstrations(run.cfg.data), run.tokenizer, 64,
                                    run.cfg)[:4]
        tokens, mask = train_sft.make_batch(examples, "cpu")
        logits = (50 * real(tokens)).requires_grad_()  # float32, hundreds apart
    model = lambda idx: logits
    exact = logits.detach().double()[:, :-1].log_softmax(-1).gather(
        2, tokens[:, 1:, None]).squeeze(2)  # (B, T-1)
    assert exact.min() < -150
    if stage == "pretrain":
        result, expected = train_pretrain.loss_of(model, tokens), -exact.mean()
    elif stage == "sft":
        result, expected = train_sft.loss_of(model, tokens, mask), -exact[mask].mean()
    else:
        result = torch.cat(train_dpo.pair_logps(model, tokens, mask))
        expected = torch.where(mask, exact, 0.0).sum(1)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)
    result.sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().max() > 0


# ---------------------------------------------------------------- 27

TWINS = [{"prompt": "cow?", "chosen": "moo", "rejected": "moo"},
         {"prompt": "dog?", "chosen": "woof", "rejected": "meow"},
         {"prompt": "dog?", "chosen": "woof", "rejected": "meow"},  # another row, no twin
         {"prompt": "owl?", "output": ["hoot", "hoot", "moo", "baa"], "ranks": [0, 1, 2, 2],
          "grades": [[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 0], [0, 0, 0, 0]]},
         {"prompt": "pig?", "output": ["oink", "baa", "oink"], "ranks": [0, 0, 1]}]
LONG = "What does it say? " * 15  # more than the tiny models' context of 64 tokens


def longer(rows):
    """The same rows, each with a prompt that has to be cut."""
    return [{**row, "prompt": LONG + row["prompt"]} for row in rows]


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
    assert "| 7 pairs" in printed and "left out: 3 identical, 0 longer than 64 tokens" in printed


@pytest.mark.parametrize("cut", [False, True])
def test_check_27_the_reward_model_keeps_one_of_identical_answers_and_counts(cut, road, tmp_path,
                                                                             capsys):
    data = write_rows(tmp_path / "pairs.jsonl", longer(TWINS) if cut else TWINS)
    run = begin("rm", road, tmp_path, data=data, too_long="cut")
    examples = train_rm.encode(train_rm.read_preferences(data), run.tokenizer, 64, run.cfg)
    said = [[run.tokenizer.decode(ids).split("<|assistant|>")[1] for ids in e["ids"]]
            for e in examples]
    assert said == [["woof<|end|>", "meow<|end|>"]] * 2 + [
        ["hoot<|end|>", "moo<|end|>", "baa<|end|>"]]
    assert [e["ranks"] for e in examples] == [[0, 1], [0, 1], [0, 2, 2]]
    # The better of the twins stays, with its own grades against the others.
    assert [e["grades"] for e in examples] == [None, None, [[0, 2, 3], [0, 0, 0], [0, 0, 0]]]
    assert [e["row"] for e in examples] == [1, 2, 3]  # a cow's and a pig's row have no strict pair
    printed = capsys.readouterr().out
    assert "3 prompts of" in printed and "2 left out; answers left out: 3 identical, 0" in printed


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


# ---------------------------------------------------------------- 28

RANKED = [
    {"prompt": "cow?", "output": ["Please: moo.", "moo", "baa", "moo, fool."],
     "ranks": [0, 1, 1, 2],
     "grades": [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 0]]},
    {"prompt": "What does a dog say?", "chosen": "woof", "rejected": "meow, meow", "rating": 1},
    {"prompt": "owl?", "output": ["hoot", "moo", "baa, baa"], "ranks": [0, 0, 1]},
    {"prompt": "How does a pig go?", "output": ["oink, fool.", "Please: oink."]},
    {"prompt": "lion?", "output": ["roar, fool.", "Please: roar.", "roar"],
     "grades": [[0, 0, 3], [0, 0, 2], [0, 0, 0]]},
]


def scored(folder):
    """The trained reward model, with a function that scores one bare answer."""
    model = build_model(load_checkpoint(folder)).eval()
    return model, lambda ids: model.raw(torch.tensor([ids]))[0, -1].item()


def ranked_loss(row, score, tokenizer, margin=0.0):
    """Mean of softplus over the strict pairs of one row, each answer scored on its own."""
    scores = [score(ids) for ids in answers_of(row, tokenizer)[0]]
    asked = lambda i, j: margin * row["grades"][i][j] / 3 if row["grades"] else 0.0
    nats = [softplus(asked(i, j) - scores[i] + scores[j]) for i, j in strict_pairs(row["ranks"])]
    return sum(nats) / len(nats)


@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_check_28_a_prompts_loss_is_the_mean_over_its_strict_pairs(margin, road, tmp_path, double):
    """Bug: a tie that makes a pair, answers forwarded once for each pair, or one mean over all
    pairs, so that a prompt with nine answers weighs 36 times as much as one with two.

    Curve: pairs shuffled apart overfit within one epoch: the training accuracy rises fast, the
    held-out loss turns up. Ties as pairs give the loss a floor.
    Seen: InstructGPT (arXiv 2203.02155) made all pairs of a prompt one batch element, because
    shuffled ones overfitted; Open-Assistant#933 broke ties by taking the first.
    """
    data = write_rows(tmp_path / "ranked.jsonl", RANKED)
    run = begin("rm", road, tmp_path, data=data)
    rows = train_rm.read_preferences(data)
    examples = train_rm.encode(rows, run.tokenizer, 64, run.cfg)
    model, score = scored(road.folder / "rm")
    losses = train_rm.loss_of(model, train_rm.make_batch(examples, margin, "cpu"))
    close(losses, [ranked_loss(row, score, run.tokenizer, margin) for row in rows])


def test_check_28_each_answer_is_forwarded_once(road, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "ranked.jsonl", RANKED)
    run = begin("rm", road, tmp_path, data=data)
    examples = train_rm.encode(train_rm.read_preferences(data), run.tokenizer, 64, run.cfg)
    model, _ = scored(road.folder / "rm")
    seen = watch(monkeypatch, model.trunk, "forward")
    train_rm.loss_of(model, train_rm.make_batch(examples, 0.0, "cpu"))
    answers = [tuple(row) for (tokens,), _ in seen for row in tokens.tolist()]
    assert len(answers) == 4 + 2 + 3 + 2 + 3 == len(set(answers))


def test_check_28_a_batch_is_the_mean_over_its_prompts_however_it_is_split(road, tmp_path,
                                                                           monkeypatch, double):
    """The script's own loop, from a model that has opinions already."""
    data = write_rows(tmp_path / "ranked.jsonl", RANKED + [
        {"prompt": f"{i}?", "chosen": polite("moo"), "rejected": "moo"} for i in range(6)])
    trained, score = scored(road.folder / "rm")
    monkeypatch.setattr(train_rm, "ScalarModel", lambda cfg, trunk: copy.deepcopy(trained))
    calls = watch(monkeypatch, train_rm, "evaluate")
    (logged,) = road.run("rm", tmp_path / "run", data=data, dtype="float32", batch_size=16,
                         micro_batch_size=3, margin=1.5, held_out=0.1, eval_every=9)
    (held_out,) = calls[0][0][1]
    rows = train_rm.read_preferences(data)
    expected = [ranked_loss(row, score, road.tokenizer, 1.5)
                for number, row in enumerate(rows) if number != held_out["row"]]
    assert len(expected) == 10  # micro-batches of 3, 3, 3 and 1 prompts
    assert logged["loss"] == pytest.approx(sum(expected) / 10, rel=1e-9)


def test_check_28_evaluation_counts_each_strict_pair_and_leaves_margins_out(road, tmp_path, double):
    data = write_rows(tmp_path / "ranked.jsonl", RANKED)
    run = begin("rm", road, tmp_path, data=data, micro_batch_size=2, margin=9.0)
    rows = train_rm.read_preferences(data)
    examples = train_rm.encode(rows, run.tokenizer, 64, run.cfg)
    model, _ = scored(with_dropout("rm", road, tmp_path))
    result = train_rm.evaluate(model.train(), examples, run.cfg, run)
    assert model.training
    _, score = scored(road.folder / "rm")
    hits = []  # (grade, right)
    for row in rows:
        scores = [score(ids) for ids in answers_of(row, run.tokenizer)[0]]
        hits += [(row["grades"] and row["grades"][i][j], scores[i] > scores[j])
                 for i, j in strict_pairs(row["ranks"])]
    share = lambda chosen: sum(chosen) / len(chosen)
    losses = [ranked_loss(row, score, run.tokenizer) for row in rows]
    assert result.pop("val_loss") == pytest.approx(sum(losses) / 5, rel=1e-9)
    assert len(hits) == 5 + 1 + 2 + 1 + 3 and 0.2 < share([hit for _, hit in hits]) < 1
    assert result.pop("accuracy") == share([hit for _, hit in hits])
    assert result == {f"grade_{grade}": share([hit for g, hit in hits if g == grade])
                      for grade in range(4)}


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


# ---------------------------------------------------------------- 29

def prompts_of(rollout):
    return [row[:n].tolist() for row, n in zip(rollout["tokens"], rollout["prompt_lens"].tolist())]


def test_check_29_a_score_of_exactly_zero_is_kept_as_it_is(road, tmp_path):
    """Bug: `score or missing_score`, or a mask made by comparing scores with 0: a score of exactly
    0.0, such as a verifier's or a judge's "wrong", counts as no score at all.

    Curve: the mean score is biased away from 0, most with 0/1 verifiers, and disagrees with the
    accuracy on the same samples.
    Seen: OpenRLHF#1219, where `a.get("scores") or a.get("rewards")` lost a valid 0.0.
    """
    rollout, actor, reference, reward_model, cfg, run = collect(road, tmp_path, max_new_tokens=6)
    assert 0 < rollout["ended"].sum() < 16
    cfg.missing_end_score = 0.0  # a score like any other too
    no_fine = train_ppo.collect_rollout(actor, reference, reward_model, prompts_of(rollout), 0.1,
                                        cfg, run)
    ended = no_fine["ended"]
    assert (no_fine["scores"][~ended] == 0).all() and (no_fine["scores"][ended] != 0).all()
    torch.nn.init.zeros_(reward_model.head.weight)
    reward_model.head.bias.data.copy_(reward_model.score_mean)  # every raw score is the mean
    cfg.missing_end_score = -3.0
    rollout = train_ppo.collect_rollout(actor, reference, reward_model, prompts_of(rollout), 0.1,
                                        cfg, run)
    ended = rollout["ended"]
    assert 0 < ended.sum() < 16
    assert (rollout["scores"][ended] == 0).all() and (rollout["scores"][~ended] == -3).all()
    assert torch.equal(rollout["rewards"][ended], -0.1 * rollout["kl"][ended])
    assert train_ppo.summarise(rollout, 0.1)["score"] == -3 * (~ended).sum() / 16


def test_check_29_a_judges_zero_counts_in_the_mean(road, tmp_path, monkeypatch):
    """Each answer is judged beside its own prompt."""
    heard, verdicts = [], [0.0, 1.0, 0.0, 0.0]

    def judge(row, response, ended):
        heard.append((row["messages"][-1]["content"], response, ended))
        return {"score": verdicts[len(heard) % 4]}

    monkeypatch.setattr(train_ppo, "load_function", lambda spec: judge)
    rollouts = watch(monkeypatch, train_ppo, "collect_rollout")
    history = road.run("ppo", tmp_path / "run", judge="judge.py:judge", dtype="float32",
                       max_new_tokens=6)
    assert [row["gold"] for row in history] == [0.25, 0.25]
    answered = []
    for _, rollout in rollouts:
        for row, p, n, ended in zip(rollout["tokens"].tolist(), rollout["prompt_lens"].tolist(),
                                    rollout["lengths"].tolist(), rollout["ended"].tolist()):
            user = road.tokenizer.decode(row[:p]).split("<|user|>")[1].split("<|end|>")[0]
            answered.append((user, road.tokenizer.decode(row[p : n - ended]), ended))
    assert heard == answered and {ended for _, _, ended in heard} == {False, True}
    shown = (tmp_path / "run" / "samples.txt").read_text()
    for (user, response, _), score in zip(heard[8:11], rollouts[1][1]["scores"].tolist()):
        assert f"  user: {user}\n  model: {response}   (score {score:.2f})" in shown


def test_check_29_a_grade_of_zero_is_a_grade_and_a_gap_of_zero_half_a_hit(road, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", [
        {"prompt": "cow?", "chosen": "moo", "rejected": "baa", "rating": 0},
        {"prompt": "owl?", "chosen": "hoot", "rejected": "baa", "rating": "significantly"}])
    run = begin("rm", road, tmp_path, data=data)
    examples = train_rm.encode(train_rm.read_preferences(data), run.tokenizer, 64, run.cfg)
    sft = run.model("init")
    result = train_rm.evaluate(ScalarModel(sft.cfg, sft.trunk), examples, run.cfg, run)
    assert result == {"val_loss": pytest.approx(math.log(2), rel=1e-6), "accuracy": 0.5,
                      "grade_0": 0.5, "grade_3": 0.5}
    margins = train_rm.make_batch(examples, 1.5, "cpu")[4]
    assert margins.tolist() == [[[0, 0], [0, 0]], [[0, 1.5], [0, 0]]]


def test_check_29_dpo_takes_a_log_prob_of_zero_for_a_number_and_a_margin_of_zero_for_a_tie(
        road, tmp_path):
    run = begin("dpo", road, tmp_path, beta=0.5)
    model = run.model("init")
    pairs = train_dpo.encode(train_dpo.read_preferences(run.cfg.data), run.tokenizer, 64,
                             run.cfg)[:2]
    for pair in pairs:
        pair["ref_chosen_logp"] = pair["ref_rejected_logp"] = 0.0
    _, stats = train_dpo.loss_of(model, pairs, run.cfg, run)
    close(stats["chosen_reward"], 0.5 * stats["chosen_logp"], rtol=1e-6)
    for k, pair in enumerate(pairs):
        pair["ref_chosen_logp"], pair["ref_rejected_logp"] = (
            stats[name][k].item() for name in ("chosen_logp", "rejected_logp"))
    _, stats = train_dpo.loss_of(model, pairs, run.cfg, run)
    assert stats["margin"].tolist() == [0, 0] and stats["accuracy"].tolist() == [0.5, 0.5]


# ---------------------------------------------------------------- 30

def kl_by_loops(rollout, row, policy, reference, kind):
    """The estimator summed over one response, from log-probs of single forward passes."""
    p, n = int(rollout["prompt_lens"][row]), int(rollout["lengths"][row])
    ids = rollout["tokens"][row, :n].tolist()
    d = logprobs_of(policy, ids, p) - logprobs_of(reference, ids, p)
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[kind].sum().item()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_check_30_the_logged_kl_is_the_sampled_sequence_sum(kind, road, tmp_path):
    """Bug: the controller is fed with a mean per token, with a KL that was masked twice or over
    filler, or with another estimator than the one in the log.

    Curve: beta drifts one way without end, because the measured KL never comes near a target on
    another scale, while the true KL runs away.
    Seen: trlx#361 (the update's approximate KL instead of the one to the reference) and trlx#441
    (a mean per token instead of the sequence's sum).
    """
    rollout, actor, reference, _, _, _ = collect(road, tmp_path, kl_kind=kind)
    sums = [kl_by_loops(rollout, b, actor.policy, reference, kind) for b in range(16)]
    close(rollout["kl"].sum(1), sums, rtol=1e-5, atol=1e-5)  # a difference of numbers near 10
    summary = train_ppo.summarise(rollout, 0.1)
    close(summary["kl"], sum(sums) / 16, rtol=1e-5)
    earned = [score - 0.1 * kl for score, kl in zip(rollout["scores"].tolist(), sums)]
    close(rollout["rewards"].sum(1), earned, rtol=1e-5, atol=1e-5)
    close(summary["reward"], sum(earned) / 16, rtol=1e-5)


@pytest.mark.parametrize("target", [0.0, 0.3])
def test_check_30_the_controller_sees_the_number_that_is_logged(target, road, tmp_path,
                                                                monkeypatch):
    """A target of 0 switches it off. The new beta counts from the next rollout on."""
    rollouts = watch(monkeypatch, train_ppo, "collect_rollout")
    history = road.run("ppo", tmp_path / "run", dtype="float32", num_steps=4, rollout_size=16,
                       minibatch_size=8, micro_batch_size=0, lr=3e-3, beta=0.2, kl_target=target,
                       stop_kl=0.0)
    beta, errors = 0.2, set()
    for row, (arguments, rollout) in zip(history, rollouts):
        assert row["beta"] == arguments[4] == pytest.approx(beta, rel=1e-12)
        sums = [rollout["kl"][b, p - 1 : n - 1].sum().item() for b, (p, n) in enumerate(
            zip(rollout["prompt_lens"].tolist(), rollout["lengths"].tolist()))]
        assert row["kl"] == pytest.approx(sum(sums) / 16, rel=1e-5, abs=1e-7)
        assert row["reward"] == pytest.approx(row["score"] - beta * row["kl"], rel=1e-5)
        if target:
            error = max(-0.2, min(0.2, row["kl"] / target - 1))
            beta *= 1 + error * 16 / 10_000
            errors.add(error)
    assert not target or (min(errors) == -0.2 and max(errors) > 0)  # too near, then too far


# ---------------------------------------------------------------- 31

def spoilt(rollout, more):
    """A copy whose filler holds garbage, in `more` columns more of it."""
    mask, out = rollout["response_mask"], {}
    for name, value in rollout.items():
        if value.dim() == 2 and name != "response_mask":
            real = torch.arange(value.shape[1]) < rollout["lengths"][:, None]
            real = real if name == "tokens" else mask
            value = F.pad(torch.where(real, value, 7), (0, more), value=7)
        out[name] = F.pad(mask, (0, more)) if name == "response_mask" else value
    return out


def response_slices(rollout):
    """(row, the columns of its response) of each row."""
    return [(b, slice(p - 1, n - 1)) for b, (p, n) in enumerate(
        zip(rollout["prompt_lens"].tolist(), rollout["lengths"].tolist()))]


def test_check_31_a_rollouts_statistics_leave_the_filler_out(road, tmp_path):
    """Bug: entropy, clip fraction, values or explained variance averaged over all columns of the
    batch, filler and prompts among them.

    Curve: entropy slides down exactly as answers become shorter, or even below 0; statistics change
    with max_new_tokens while the weights do not.
    Seen: trl#2281 and #2496, where filler log-probs of 1.0 drove the logged entropy below 0;
    trlx's approx_kl was a mean over padding too.
    """
    rollout, actor, _, _, _, _ = collect(road, tmp_path, temperature=0.8)
    assert len(set(rollout["lengths"].tolist())) > 2
    entropies, returns, errors, rewards, kls = [], [], [], [], []
    for b, columns in response_slices(rollout):
        with torch.no_grad():
            bare = rollout["tokens"][b : b + 1, : columns.stop + 1]
            p = (actor.policy(bare)[0, columns].double() / 0.8).softmax(-1)  # (n, V)
        entropies += (-(p * p.log()).sum(-1)).tolist()
        returns += rollout["returns"][b, columns].tolist()
        errors += (rollout["returns"] - rollout["values"])[b, columns].tolist()
        rewards.append(sum(rollout["rewards"][b, columns].tolist()))
        kls.append(sum(rollout["kl"][b, columns].tolist()))
    mean = lambda values: sum(values) / len(values)
    variance = lambda values: mean([(v - mean(values)) ** 2 for v in values])
    expected = {
        "score": mean(rollout["scores"].tolist()), "kl": mean(kls), "reward": mean(rewards),
        "beta": 0.3, "length": len(entropies) / 16, "ended": mean(rollout["ended"].tolist()),
        "entropy": mean(entropies), "explained_variance": 1 - variance(errors) / variance(returns)}
    for one in (rollout, spoilt(rollout, 0), spoilt(rollout, 5)):
        summary = train_ppo.summarise(one, 0.3)
        assert set(summary) == set(expected)
        for name, value in expected.items():
            assert float(summary[name]) == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_check_31_an_updates_statistics_leave_the_filler_out(road, tmp_path):
    rollout, actor, _, _, cfg, run = collect(road, tmp_path, temperature=0.8, clip_range=0.05,
                                             value_clip=0.05)
    moved(actor.policy)
    moved(actor.critic)
    sums = dict.fromkeys(("clip_frac", "approx_kl", "ratio_mean", "value_clip_frac",
                          "policy_loss", "value_loss"), 0.0)
    count = 0
    for b, columns in response_slices(rollout):
        ids = rollout["tokens"][b, : columns.stop + 1]
        new = logprobs_of(actor.policy, ids.tolist(), columns.start + 1, 0.8).tolist()
        with torch.no_grad():
            new_values = actor.critic(ids[None])[0, columns].tolist()
        for n, v, column in zip(new, new_values, range(columns.start, columns.stop)):
            old, advantage, value, target = (rollout[name][b, column].item() for name in (
                "logprobs", "whitened_advantages", "values", "returns"))
            ratio = math.exp(n - old)
            plain, clipped = (-advantage * r for r in (ratio, min(max(ratio, 0.95), 1.05)))
            near = value + min(max(v - value, -0.05), 0.05)
            sums["clip_frac"] += clipped > plain
            sums["approx_kl"] += ratio - 1 - (n - old)
            sums["ratio_mean"] += ratio
            sums["policy_loss"] += max(plain, clipped)
            sums["value_loss"] += 0.5 * max((v - target) ** 2, (near - target) ** 2)
            sums["value_clip_frac"] += (near - target) ** 2 > (v - target) ** 2
            count += 1
    assert 0.05 < sums["clip_frac"] / count < 0.95 and 0.05 < sums["value_clip_frac"] / count < 0.95
    for one in (rollout, spoilt(rollout, 0), spoilt(rollout, 5)):
        _, stats = train_ppo.minibatch_loss(actor, one, list(range(16)), count, cfg, run)
        parts = [train_ppo.minibatch_loss(actor, one, rows, count, cfg, run)[1]
                 for rows in ([3, 0, 15], [i for i in range(16) if i not in (0, 3, 15)])]
        assert set(stats) == set(sums)
        for name, total in sums.items():
            expected = pytest.approx(total / count, rel=1e-5, abs=1e-6)
            assert stats[name].item() == expected, name
            assert sum(part[name].item() for part in parts) == expected, name


def test_check_31_an_iterations_statistics_are_its_minibatches_means(road, tmp_path):
    """With a learning rate of 0 each minibatch is known beforehand, however it is split."""
    rollout, actor, _, _, cfg, run = collect(road, tmp_path, minibatch_size=8, micro_batch_size=3,
                                             num_epochs=2, stop_kl=0.0, clip_range=0.05)
    moved(actor.policy)
    order = torch.Generator().manual_seed(5)
    minibatches = [rows.tolist() for _ in range(2)
                   for rows in torch.randperm(16, generator=order).split(8)]
    counts = [rollout["response_mask"][rows].sum() for rows in minibatches]
    assert len(set(map(int, counts))) > 1
    expected = [train_ppo.minibatch_loss(actor, rollout, rows, count, cfg, run)[1]
                for rows, count in zip(minibatches, counts)]
    optimizers = [make_optimizer(part, 0.0) for part in (actor.policy, actor.critic)]
    stats = train_ppo.ppo_update(actor, optimizers, rollout, cfg, run,
                                 torch.Generator().manual_seed(5))
    assert stats.pop("grad_norm") > 0 and stats.pop("critic_grad_norm") > 0
    assert set(stats) == set(expected[0])
    for name, value in stats.items():
        assert value == pytest.approx(sum(e[name].item() for e in expected) / 4, rel=1e-5), name


@pytest.mark.parametrize("micro", [0, 3])
def test_check_31_the_held_out_loss_of_sft_is_a_mean_over_trained_tokens(micro, road, tmp_path,
                                                                         double):
    run = begin("sft", road, tmp_path, micro_batch_size=micro)
    rows = train_sft.read_demonstrations(run.cfg.data)[::5]
    examples = train_sft.encode(rows, run.tokenizer, 64, run.cfg)
    model, _ = load_model(with_dropout("sft", road, tmp_path))
    plain, _ = load_model(road.folder / "sft")
    nats = []
    for row in rows:
        ids, start = answers_of({"messages": row["messages"][:-1],
                                 "answers": [row["messages"][-1]["content"]]}, run.tokenizer)
        nats += (-logprobs_of(plain, ids[0], start)).tolist()
    result = train_sft.evaluate(model.train(), examples, run.cfg, run)
    assert result == pytest.approx(sum(nats) / len(nats), rel=1e-9) and model.training


NUM_TOKENS = {  # the real tokens of one example
    "sft": lambda example: len(example[0]), "rm": lambda example: sum(map(len, example["ids"])),
    "dpo": lambda example: len(example["chosen"][0]) + len(example["rejected"][0])}


def without_evaluation(script, stage, monkeypatch):
    """Leave evaluations and the try of the largest batch out; collects the held-out examples."""
    held_out = []
    monkeypatch.setattr(Run, "preflight", lambda *rest: None)
    monkeypatch.setattr(script, "evaluate", lambda model, examples, *rest:
                        held_out.extend(examples) or (0.0 if stage == "sft" else {}))
    if stage == "rm":
        monkeypatch.setattr(script, "measure_scores", lambda *rest: (torch.zeros(()),) * 2)
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
    assert len(lines) == 2 and sum(arguments[3] for arguments, _ in lines) == expected


# ---------------------------------------------------------------- 32

@pytest.mark.parametrize("minibatch_size, micro", [(4, 2), (6, 0), (100, 5)])
def test_check_32_every_response_is_used_exactly_once_an_epoch(minibatch_size, micro, road,
                                                               tmp_path, monkeypatch):
    """Bug: minibatches drawn with replacement, a last smaller one that is lost, or epochs inside
    the minibatches, so that one minibatch is stepped on several times in a row.

    Curve: clip fraction and ratio climb within each minibatch's repeats and snap back, a sawtooth;
    more KL for the same reward.
    Seen: trlx#522, whose updates ran B1 B1 B1 B2 B2 B2 instead of full passes.
    """
    rollout, actor, _, _, cfg, run = collect(road, tmp_path, minibatch_size=minibatch_size,
                                             micro_batch_size=micro, num_epochs=3, stop_kl=0.0)
    losses = watch(monkeypatch, train_ppo, "minibatch_loss")
    steps = watch(monkeypatch, run.scaler, "step")
    optimizers = [make_optimizer(part, 0.0) for part in (actor.policy, actor.critic)]
    train_ppo.ppo_update(actor, optimizers, rollout, cfg, run, torch.Generator().manual_seed(0))
    flat = [row for (_, _, rows, *_), _ in losses for row in rows]
    epochs = [flat[i : i + 16] for i in (0, 16, 32)]
    assert len(flat) == 48 and all(sorted(epoch) == list(range(16)) for epoch in epochs)
    first = [set(epoch[:minibatch_size]) for epoch in epochs]
    assert minibatch_size > 16 or first[0] != first[1] != first[2]  # shuffled anew
    # One step of each optimizer for each minibatch, the last smaller one among them.
    assert len(steps) == 2 * 3 * math.ceil(16 / minibatch_size)
    assert all(len(rows) <= (micro or minibatch_size) for (_, _, rows, *_), _ in losses)


def test_check_32_ppos_prompts_come_once_before_any_comes_again(road, tmp_path, monkeypatch):
    rollouts = watch(monkeypatch, train_ppo, "collect_rollout")
    orders = watch(monkeypatch, train_ppo, "ppo_update")
    road.run("ppo", tmp_path / "run", num_steps=6, rollout_size=16, minibatch_size=16,
             micro_batch_size=0, num_epochs=1, max_new_tokens=2, lr=0.0)
    asked = [tuple(prompt) for (_, _, _, prompts, *_), _ in rollouts for prompt in prompts]
    everything = {tuple(road.tokenizer.encode_prompt(chat(question))) for question, _ in PROMPTS}
    assert len(asked) == 96 and set(asked[:40]) == set(asked[40:80]) == everything
    assert asked[:40] != asked[40:80]
    # Each iteration shuffles its minibatches by a seed of its own.
    assert len({arguments[5].initial_seed() for arguments, _ in orders}) == 6


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


# ---------------------------------------------------------------- 33

@pytest.mark.parametrize("contents", [
    (LONG, "Please: moo."), ("dog?", "woof", LONG, "Please: moo."),
    ("dog?", "woof, " * 30, "cow?", "Please: moo.")])
def test_check_33_a_cut_dialogue_trains_on_its_last_answer_and_nothing_else(contents, road,
                                                                            tmp_path):
    """Bug: ids cut at one end and the mask at the other; an end token cut away; a sample that is
    all prompt after the cut and still counts; a precomputed reference that nothing reads.

    Curve: some rows have a loss of exactly log 2 or NaN, the more the shorter the context; none of
    it shows in a mean. Precomputing changes neither speed nor memory.
    Seen: trl#3398 (truncation removed real tokens and could zero a whole sample) and trl#2431
    (precomputed reference log-probs were dropped by the collator).
    """
    data = write_rows(tmp_path / "long.jsonl", [
        {"messages": chat(*contents)}, {"messages": chat("cow?", "moo")}])
    run = begin("sft", road, tmp_path, data=data, too_long="cut")
    rows = train_sft.read_demonstrations(data)
    (ids, mask), short = train_sft.encode(rows, run.tokenizer, 64, run.cfg)
    whole, _ = run.tokenizer.encode_chat(rows[0]["messages"])
    assert len(whole) > 64 and ids == whole[:1] + whole[-63:] and len(mask) == 64
    trained = [i for i, m in zip(ids, mask) if m]
    assert run.tokenizer.decode(trained) == "Please: moo.<|end|>"
    assert mask == sorted(mask)
    assert short == run.tokenizer.encode_chat(rows[1]["messages"])
    # The mask that the loss uses stands one column to the left.
    tokens, shifted = train_sft.make_batch([(ids, mask), short], "cpu")
    for row, m, (ids, mask) in zip(tokens, shifted, ((ids, mask), short)):
        assert row[1:][m].tolist() == [i for i, trained in zip(ids, mask) if trained]


def test_check_33_an_earlier_answer_is_trained_only_while_its_whole_turn_is_left(road, tmp_path):
    """Cut by one token more each time, through the first question, its answer, and the second."""
    run = begin("sft", road, tmp_path, too_long="cut")
    rows = [{"messages": chat("dog?", "woof", "cow?", "moo")}]
    whole, mask = run.tokenizer.encode_chat(rows[0]["messages"])
    opens = [i for i, token in enumerate(whole) if token == run.tokenizer.assistant_id]
    for over in range(1, len(whole)):
        kept = train_sft.encode(rows, run.tokenizer, len(whole) - over, run.cfg)
        trained = [m and (i > opens[1] or over < opens[0]) for i, m in enumerate(mask)]
        assert kept == ([(whole[:1] + whole[1 + over :], trained[:1] + trained[1 + over :])]
                        if over < opens[1] else [])


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_check_33_compared_answers_keep_the_same_end_of_their_prompt(stage, road, tmp_path):
    data = write_rows(tmp_path / "long.jsonl", [
        {"prompt": LONG, "chosen": "Please: moo.", "rejected": "moo"},
        {"prompt": LONG, "chosen": "moo", "rejected": "moo, fool."}])
    run = begin(stage, road, tmp_path, data=data, too_long="cut")
    rows = SCRIPTS[stage].read_preferences(data)
    examples = SCRIPTS[stage].encode(rows, run.tokenizer, 64, run.cfg)
    for row, example in zip(rows, examples):
        answers, start = answers_of(row, run.tokenizer)
        over = max(map(len, answers)) - 64
        expected = [ids[:1] + ids[1 + over :] for ids in answers]
        if stage == "rm":
            assert example["ids"] == expected and example["prompt_len"] == start - over
        else:
            assert [example["chosen"][0], example["rejected"][0]] == expected
            for side, ids in zip(("chosen", "rejected"), expected):
                assert example[side][1] == [k >= start - over for k in range(len(ids))]
            tokens, shifted = train_dpo.make_batch([example], "cpu")
            for k in range(2):
                assert tokens[k, 1:][shifted[k]].tolist() == expected[k][start - over :]


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
        stage, 2 if too_long == "cut" else 3)
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
        shown = (tmp_path / "run" / "samples.txt").read_text()
        assert ("does it say? What does it" in shown) == (too_long == "cut")
        for (_, (prompt,), *_), _ in sampled:  # up to where the answer begins
            assert prompt[0] == road.tokenizer.begin_id
            assert prompt[-1] == road.tokenizer.assistant_id and len(prompt) < 64


def test_check_33_dpo_uses_the_stored_reference(road, tmp_path, double):
    run = begin("dpo", road, tmp_path, beta=0.5)
    model = run.model("init")
    pairs = train_dpo.encode(train_dpo.read_preferences(run.cfg.data), run.tokenizer, 64,
                             run.cfg)[:6]
    train_dpo.add_reference(frozen(copy.deepcopy(model)), pairs, run.cfg, run)
    _, stats = train_dpo.loss_of(model, pairs, run.cfg, run)
    for k, pair in enumerate(pairs):
        pair["ref_chosen_logp"] -= 2.0 + k
        pair["ref_rejected_logp"] -= 1.0
    _, shifted = train_dpo.loss_of(model, pairs, run.cfg, run)
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


def test_check_33_ppo_refuses_a_prompt_without_room_for_an_answer(road, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "cow?"}, {"prompt": LONG}])
    with pytest.raises(UserError, match=r"prompt 2 has \d+ tokens and fills the whole context"):
        road.run("ppo", tmp_path / "run", prompts=prompts)


# ---------------------------------------------------------------- 34

def test_check_34_the_reward_models_new_head_starts_without_an_opinion(road, tmp_path, monkeypatch):
    """Bug: a new head with random weights, drawn outside the seed's reach; or a critic made from
    the reward model that loses the head or the normalisation on the way.

    Curve: the first value loss differs widely from run to run with one seed, or starts far above
    the returns' variance; the first advantages are noise and the KL spikes early.
    Seen: NVIDIA-NeMo/RL#2953 (value heads did not follow the seed); trl#1783 (loading a reward
    model dropped the head's bias).
    """
    monkeypatch.setattr(train_rm, "measure_scores", lambda *rest: (torch.zeros(()),
                                                                   torch.ones(())))
    history = road.run("rm", tmp_path / "run", lr=0.0, dtype="float32", micro_batch_size=3)
    for row in history:
        assert row["accuracy"] == 0.5
        assert row["loss"] == row["val_loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert row["grad_norm"] > 0  # and yet it can learn
    weights = load_checkpoint(tmp_path / "run")["model"]
    sft = load_checkpoint(road.folder / "sft")["model"]
    trunk = {name for name in sft if name.startswith("trunk.")}
    assert all(torch.equal(weights[name], sft[name]) for name in trunk)
    new = {name: weights[name].tolist() for name in weights if name not in trunk}
    assert new == {"head.weight": [[0] * 32], "head.bias": [0], "score_mean": 0, "score_std": 1}


def test_check_34_a_shared_critics_head_starts_at_zero(road, tmp_path, monkeypatch):
    rollouts = watch(monkeypatch, train_ppo, "collect_rollout")
    (row,) = road.run("ppo", tmp_path / "run", share_critic=True, num_steps=1, num_epochs=1,
                      minibatch_size=8, dtype="float32")
    (_, rollout), = rollouts
    assert (rollout["values"] == 0).all() and row["value_loss"] > 0
    actor = load_checkpoint(tmp_path / "run")["actor"]
    assert (actor["value_head.weight"] != 0).any()  # it learns from the first step on


def test_check_34_a_critic_is_the_reward_model_with_head_and_normalisation(road, tmp_path,
                                                                           monkeypatch, double):
    rollouts = watch(monkeypatch, train_ppo, "collect_rollout")
    road.run("ppo", tmp_path / "run", lr=0.0, critic_lr=0.0, num_steps=1, dtype="float32")
    ((actor, _, reward_model, *_), rollout), = rollouts
    source = load_checkpoint(road.folder / "rm")["model"]
    mean, std = source["score_mean"].item(), source["score_std"].item()
    assert abs(mean) > 0.01 and abs(std - 1) > 0.1
    for b, columns in response_slices(rollout):
        for t in range(columns.start, columns.stop):  # the state before tokens[:, t + 1]
            h = reward_model.trunk(rollout["tokens"][b : b + 1, : t + 1])[0, -1]
            raw = (h @ source["head.weight"].double()[0] + source["head.bias"].double()[0]).item()
            assert rollout["values"][b, t].item() == pytest.approx((raw - mean) / std, rel=1e-9)
    parts = [dict(part.named_parameters()) for part in (actor.critic, reward_model)]
    assert all(p.requires_grad for p in parts[0].values())
    assert not {p.data_ptr() for p in parts[0].values()} & {p.data_ptr() for p in parts[1].values()}
    saved = load_checkpoint(tmp_path / "run")["actor"]
    assert saved["critic.score_mean"] == mean and saved["critic.score_std"] == std


def test_check_34_new_weights_come_from_the_seed_alone(road, tmp_path):
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # whatever happened before in the process
        road.run("pretrain", tmp_path / str(number), seed=seed, lr=0.0, num_steps=1)
        weights.append(load_checkpoint(tmp_path / str(number))["model"]["trunk.wte.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ---------------------------------------------------------------- 35

def test_check_35_both_models_log_probs_are_those_at_the_sampling_temperature(road, tmp_path):
    """Bug: the temperature scales the policy's logits and not the reference's, or the rollout's and
    not the update's.

    Curve: the KL is far from 0 at the first step, when both models are still the same, or grows
    faster than the text changes; the ratio is not 1 on the first minibatch.
    Seen: trl#3029 (GRPO did not divide logits by the sampling temperature), OpenRLHF#857 (policy
    and reference), verl#3133.
    """
    rollout, actor, reference, _, cfg, run = collect(road, tmp_path, temperature=0.7)
    for name, model in (("logprobs", actor.policy), ("ref_logprobs", reference)):
        for b, columns in response_slices(rollout)[:6]:
            ids = rollout["tokens"][b, : columns.stop + 1].tolist()
            expected = logprobs_of(model, ids, columns.start + 1, 0.7)
            close(rollout[name][b, columns], expected, rtol=1e-5, atol=1e-6)
    count = rollout["response_mask"].sum()
    _, stats = train_ppo.minibatch_loss(actor, rollout, list(range(16)), count, cfg, run)
    assert stats["ratio_mean"] == 1 and stats["approx_kl"] == 0


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_check_35_the_kl_is_0_as_long_as_both_models_are_the_same(temperature, road, tmp_path):
    history = road.run("ppo", tmp_path / "run", temperature=temperature, lr=0.0, dtype="float32")
    for row in history:
        assert row["kl"] == 0 and abs(row["approx_kl"]) < 1e-6
        assert row["ratio_mean"] == pytest.approx(1, abs=1e-6)


def test_check_35_what_is_scored_was_sampled_at_that_temperature(road, tmp_path):
    """Near 0 the samples are the greedy answers, and their log-probs nearly 0."""
    rollout, actor, _, _, _, run = collect(road, tmp_path, temperature=1e-3)
    greedy = generate(actor.policy, prompts_of(rollout), 10, [run.tokenizer.end_id], temperature=0)
    assert torch.equal(rollout["tokens"], greedy.tokens)
    assert rollout["logprobs"].min() > -0.05 and rollout["entropy"].max() < 0.05
    with pytest.raises(UserError, match="--temperature 0"):
        road.run("ppo", tmp_path / "run", temperature=0.0)


def evaluator(road, tmp_path, **options):
    return evaluate.Evaluator(evaluate.Config(
        **{"reward_model": str(road.folder / "rm"), "prompts": road.prompts, "limit": 5,
           "dtype": "float32", "batch_size": 4, "max_new_tokens": 8, "show": 0, **options}))


def test_check_35_an_evaluations_kl_is_of_answers_sampled_and_scored_at_temperature_1(
        road, tmp_path, monkeypatch, double):
    ev = evaluator(road, tmp_path)
    reference, tokenizer = load_model(road.folder / "sft")
    model = moved(copy.deepcopy(reference))
    prompts = [tokenizer.encode_prompt(row["messages"]) for row in ev.rows]
    answers = ev.answer(model, tokenizer, prompts, [tokenizer.end_id], 1.0, num_samples=2)
    sums = [(logprobs_of(model, prompt + s["ids"], len(prompt))
             - logprobs_of(reference, prompt + s["ids"], len(prompt))).sum().item()
            for prompt, samples in zip(prompts, answers) for s in samples]
    assert ev.kl(model, reference, prompts, answers) == pytest.approx(sum(sums) / 10, rel=1e-9)
    temperatures = watch(monkeypatch, evaluate.Evaluator, "answer")
    measured = watch(monkeypatch, evaluate.Evaluator, "kl")
    players, _ = evaluate.collect_players(evaluate.Config(
        models="", against=str(road.folder / "sft"), max_new_tokens=8), ev)
    sampled = [result for arguments, result in temperatures if arguments[5] == 1.0]
    assert any(arguments[4] is result for arguments, _ in measured for result in sampled)
    assert players["sft"]["kl"] == 0


# ---------------------------------------------------------------- 36

def apart(prompts, tokenizer):
    """A rollout of answers in single characters, for which the tokenizer has longer tokens; the
    second of them never ends. Returns it and its bare rows."""
    answers = [[tokenizer.encode(c)[0] for c in "Please: moo"[: 11 - i % 3]]
               for i in range(len(prompts))]
    assert all(tokenizer.encode(tokenizer.decode(ids)) != ids for ids in answers)
    ended = torch.arange(len(prompts)) != 1
    rows = [prompt + ids + [tokenizer.end_id] * int(end)
            for prompt, ids, end in zip(prompts, answers, ended)]
    tokens = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)
    lengths = [torch.tensor(list(map(len, ids))) for ids in (prompts, rows)]
    return Rollout(tokens, *lengths, ended), rows


def sample_apart(script, road, monkeypatch):
    """Let the script's sampling give such rollouts, and keep (rollout, rows) of each."""
    made = []

    def fake(policy, prompts, *rest, **options):
        made.append(apart(prompts, road.tokenizer))
        return made[-1][0]

    monkeypatch.setattr(script, "generate", fake)
    return made


def test_check_36_a_rollout_is_scored_on_the_ids_that_were_sampled(road, tmp_path, monkeypatch):
    """Bug: a response is decoded and encoded again on its way to the reward model or to the update:
    tokens that were sampled apart come back joined, and what is scored was never sampled.

    Curve: the ratio of an untouched policy is not 1, with rare enormous outliers; a slow KL that
    nothing explains.
    Seen: trl#5224, fixed by #5242: a tool loop decoded and encoded again, and BPE is no bijection.
    """
    made = sample_apart(train_ppo, road, monkeypatch)
    rollout, actor, reference, reward_model, cfg, run = collect(road, tmp_path, rollout_size=6)
    ((sampled, rows),) = made
    for name in ("tokens", "prompt_lens", "lengths", "ended"):
        assert torch.equal(rollout[name], getattr(sampled, name)), name
    for b, columns in response_slices(rollout):
        for name, model in (("logprobs", actor.policy), ("ref_logprobs", reference)):
            close(rollout[name][b, columns], logprobs_of(model, rows[b], columns.start + 1),
                  rtol=1e-5, atol=1e-6)
        score = reward_model(torch.tensor([rows[b]]))[0, -1].clamp(-5, 5)
        close(rollout["scores"][b], score if b != 1 else torch.tensor(-3.0), rtol=1e-5)
    seen = watch(monkeypatch, actor, "forward")
    train_ppo.minibatch_loss(actor, rollout, [2, 0, 1], 30, cfg, run)
    ((tokens,), _), = seen
    for row, b in zip(tokens.tolist(), (2, 0, 1)):
        assert row[: len(rows[b])] == rows[b]


def test_check_36_a_real_rollout_holds_what_generate_returned(road, tmp_path, monkeypatch):
    sampled = watch(monkeypatch, train_ppo, "generate")
    rollout = collect(road, tmp_path)[0]
    assert torch.equal(rollout["tokens"], sampled[0][1].tokens)


def test_check_36_the_scores_scale_is_measured_on_sampled_ids(road, tmp_path, monkeypatch):
    run = begin("rm", road, tmp_path)
    made = sample_apart(train_rm, road, monkeypatch)
    model, _ = scored(with_dropout("rm", road, tmp_path))
    prompts = [run.tokenizer.encode_prompt(chat(question)) for question, _ in PROMPTS[:13]]
    mean, std = train_rm.measure_scores(model.train(), None, prompts, run.cfg, run)
    _, score = scored(road.folder / "rm")
    scores = [score(row) for _, rows in made for b, row in enumerate(rows) if b != 1]
    assert len(made) == 2 and len(scores) == 11  # two batches, of 8 and of 5; those that ended
    close(mean, sum(scores) / 11, rtol=1e-5)
    close(std, (sum((s - sum(scores) / 11) ** 2 for s in scores) / 10) ** 0.5, rtol=1e-5)


def test_check_36_an_evaluation_scores_the_sampled_ids(road, tmp_path):
    ev = evaluator(road, tmp_path)
    prompts = [road.tokenizer.encode_prompt(row["messages"]) for row in ev.rows]
    _, rows = apart(prompts, road.tokenizer)
    answers = [[{"ids": row[len(p) :], "text": "", "ended": True}] * 2
               for p, row in zip(prompts, rows)]
    rewards = ev.rewards(answers, road.tokenizer)
    model, _ = scored(road.folder / "rm")
    for row, both in zip(rows, rewards):
        assert both == [pytest.approx(model(torch.tensor([row]))[0, -1].item(), rel=1e-5)] * 2


# ---------------------------------------------------------------- 37

def sft_setting(road, tmp_path):
    run = begin("sft", road, tmp_path)
    model = run.model("init")
    examples = train_sft.encode(train_sft.read_demonstrations(run.cfg.data), run.tokenizer, 64,
                                run.cfg)[:8]
    tokens, mask = train_sft.make_batch(examples, "cpu")
    wish = lambda: model(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[
        ..., 0][mask].mean()
    return model, lambda: train_sft.loss_of(model, tokens, mask), {"loss": wish}


def pretrain_setting(road, tmp_path):
    model, tokens = begin("sft", road, tmp_path).model("init"), torch.arange(40).view(4, 10) % 26
    wish = lambda: model(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).mean()
    return model, lambda: train_pretrain.loss_of(model, tokens), {"loss": wish}


def rm_setting(road, tmp_path):
    run = begin("rm", road, tmp_path, data=write_rows(tmp_path / "ranked.jsonl", RANKED))
    rows = train_rm.read_preferences(run.cfg.data)
    batch = train_rm.make_batch(train_rm.encode(rows, run.tokenizer, 64, run.cfg), 0.0, "cpu")
    model, score = scored(road.folder / "rm")
    wish = lambda: -torch.tensor([ranked_loss(row, score, run.tokenizer) for row in rows]).mean()
    return model, lambda: train_rm.loss_of(model, batch), {"loss": wish}


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

    return model, lambda: train_dpo.loss_of(model, pairs, run.cfg, run)[0], {"loss": wish}


def ppo_setting(road, tmp_path):
    rollout, actor, _, _, cfg, run = collect(road, tmp_path)
    mask, tokens = rollout["response_mask"], rollout["tokens"]

    def loss():
        total, stats = train_ppo.minibatch_loss(actor, rollout, list(range(16)), mask.sum(), cfg,
                                                run)
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

    def wrong(*arguments):
        result = original(*arguments)
        return ((CHANGES[change](result[0]), *result[1:]) if isinstance(result, tuple)
                else CHANGES[change](result))

    monkeypatch.setattr(SCRIPTS[stage], name, wrong)
    with pytest.raises(AssertionError):
        exam(stage, road, tmp_path)


# ---------------------------------------------------------------- 38

def sampled_texts(folder, prompts, temperature, num_samples=1):
    """(text, ended) of a few answers of the model in a run's folder to each question."""
    model, tokenizer = load_model(folder)
    rollout = generate(model, [tokenizer.encode_prompt(chat(question))
                               for question in prompts for _ in range(num_samples)], 14,
                       [tokenizer.end_id], temperature,
                       generator=torch.Generator().manual_seed(0))
    return list(zip(map(tokenizer.decode_response, rollout.responses()), rollout.ended.tolist()))


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags)


def test_check_38_pretraining_learns_the_text(road, tmp_path):
    """Bug: anything that lets a stage run, with finite numbers in its log, and learn nothing.

    Curve: losses move and weights change, but nothing gets better than the baseline that costs
    nothing. Here that is the entropy of single tokens, reached without looking back at all.
    Seen: TRL's PPO tests ask of training only that weights changed; trl#249 was approved after its
    examples had run, and trl#256 then found that one of them no longer learned.
    """
    history = road.run("pretrain", tmp_path, num_steps=100, batch_size=16, lr=5e-3, warmup=10,
                       eval_every=50, dtype="float32")
    counts = torch.tensor(road.tokenizer.encode(road.text.read_text())).bincount()
    p = counts[counts > 0] / counts.sum()
    unigram = -(p * p.log()).sum().item()
    assert history[-1]["val_loss"] < history[0]["val_loss"] < unigram
    model, tokenizer = load_model(tmp_path)
    blocks = torch.tensor(tokenizer.encode(road.text.read_text())[:-1][-320:]).view(5, 64)
    nats = F.cross_entropy(model(blocks)[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()).item()
    assert max(nats, history[-1]["val_loss"]) < 0.3 * unigram


def test_check_38_sft_beats_the_base_model_on_held_out_dialogues(road, tmp_path, monkeypatch):
    """The base model never ends an answer, and finds the demonstrated ones unlikely."""
    calls = watch(monkeypatch, train_sft, "evaluate")
    road.run("sft", tmp_path / "run", num_epochs=15, lr=3e-3, held_out=0.25, eval_every=1000,
             dtype="float32")
    held_out = calls[0][0][1]
    assert len(held_out) == 10
    nats = {}
    for folder in (road.folder / "pretrain", tmp_path / "run"):
        model, _ = load_model(folder)
        logps = [logprobs_of(model, ids, mask.index(True)) for ids, mask in held_out]
        nats[folder.name] = -torch.cat(logps).mean().item()
    assert nats["run"] < 0.5 * nats["pretrain"]
    asked = [question for question, _ in PROMPTS[::3]]
    ended = {folder.name: share(ended for _, ended in sampled_texts(folder, asked, 0.0))
             for folder in (road.folder / "pretrain", tmp_path / "run")}
    assert ended["pretrain"] == 0 and ended["run"] > 0.9


def test_check_38_the_reward_model_ranks_held_out_answers(road, tmp_path, monkeypatch):
    """The baseline: guessing. Its scores have mean 0 and deviation 1 on the SFT model's answers."""
    calls = watch(monkeypatch, train_rm, "evaluate")
    measured = watch(monkeypatch, train_rm, "measure_scores")
    history = road.run("rm", tmp_path, num_epochs=5, lr=2e-3, held_out=0.25, num_normalize=30,
                       dtype="float32")
    assert history[0]["val_loss"] > history[-1]["val_loss"] and history[-1]["accuracy"] > 0.8
    model, score = scored(tmp_path)
    rows, hits = train_rm.read_preferences(road.preferences), []
    for example in calls[0][0][1]:
        ids, _ = answers_of(rows[example["row"]], road.tokenizer)
        hits += [score(ids[i]) > score(ids[j]) for i, j in strict_pairs(example["ranks"])]
    assert len(hits) > 12 and share(hits) > 0.8
    asked = [question for question, _ in PROMPTS]
    prompts = [road.tokenizer.encode_prompt(chat(q)) for q in asked]
    sft, _ = load_model(road.folder / "sft")
    fresh = generate(sft, prompts * 3, 12, [road.tokenizer.end_id],
                     generator=torch.Generator().manual_seed(9))
    scores = [model(torch.tensor([row[:n].tolist()]))[0, -1].item() for row, n, ended in
              zip(fresh.tokens, fresh.lengths.tolist(), fresh.ended.tolist()) if ended]
    mean = sum(scores) / len(scores)
    deviation = (sum((s - mean) ** 2 for s in scores) / len(scores)) ** 0.5
    assert abs(mean) < 0.5 and 0.6 < deviation < 1.6
    assert (model.score_mean, model.score_std) == measured[0][1]


def test_check_38_dpo_learns_which_answer_is_preferred(road, tmp_path):
    """The baseline: the SFT model, a third of whose answers are rude."""
    history = road.run("dpo", tmp_path, num_epochs=4, lr=1e-3, held_out=0.25, dtype="float32")
    assert history[-1]["accuracy"] > 0.8 and history[-1]["val_loss"] < 0.9 * math.log(2)
    assert history[-1]["margin"] > max(0.1, history[0]["margin"])
    asked = [question for question, _ in PROMPTS]
    is_rude = {folder: share("fool" in text for text, _ in sampled_texts(folder, asked, 1.0, 2))
               for folder in (road.folder / "sft", tmp_path)}
    assert is_rude[road.folder / "sft"] > 0.2 and is_rude[tmp_path] < 0.1


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


@pytest.mark.parametrize("stage", SCRIPTS)
def test_check_38_each_step_has_its_own_learning_rate(stage, road, tmp_path, monkeypatch):
    """From warmup to peak to the last one; PPO falls in a straight line, for its critic too."""
    script = SCRIPTS[stage]
    rates = watch(monkeypatch, script, "set_lr")
    steps = watch(monkeypatch, torch.optim.AdamW, "step")
    if stage == "ppo":
        options = dict(lr=1e-3, critic_lr=2e-3, num_steps=2, num_epochs=1, minibatch_size=8)
        expected = [peak * share for share in (1, 0.55) for peak in (1e-3, 2e-3)]
    else:
        options = dict(lr=1e-3, warmup=2, eval_every=9, **(
            {"num_steps": 5} if stage == "pretrain" else {}))
        falls = lambda n: [0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * k / n)) for k in range(n)]
        expected = [1e-3 * share for share in (0.5, 1.0, *falls(3))]
    road.run(stage, tmp_path / "run", final_lr=0.1 if stage == "ppo" else 0.05, **options)
    assert len(rates) == len(steps) == len(expected)
    assert [rate for (_, rate), _ in rates] == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------- found by an attack on the scripts

def test_check_30_the_logged_beta_is_the_one_that_was_charged(road, tmp_path):
    """Bug: the controller's next beta is logged beside the KL of the rollout before."""
    first, second = road.run("ppo", tmp_path, num_steps=2, kl_target=0.001, dtype="float32")
    assert first["beta"] == 0.1 != second["beta"]


def test_check_32_each_pass_over_the_prompts_has_an_order_of_its_own(road, tmp_path, monkeypatch):
    """Bug: one permutation for all passes, so that the same prompts always meet in a rollout."""
    asked, collect_rollout = [], train_ppo.collect_rollout

    def spy(actor, reference, reward_model, prompts, *rest):
        asked.extend(map(tuple, prompts))
        return collect_rollout(actor, reference, reward_model, prompts, *rest)

    monkeypatch.setattr(train_ppo, "collect_rollout", spy)
    road.run("ppo", tmp_path, num_steps=10, dtype="float32")  # 40 prompts, 8 at a time
    first, second = asked[:40], asked[40:]
    assert len(second) == 40 and sorted(first) == sorted(second) and first != second


def test_check_32_seed_and_step_decide_the_order_of_the_minibatches(road, tmp_path, monkeypatch):
    """Bug: every seed, or every iteration, shuffles its responses alike."""
    orders, update = [], train_ppo.ppo_update
    monkeypatch.setattr(train_ppo, "ppo_update",
                        lambda *args: orders.append(args[-1].initial_seed()) or update(*args))
    for seed in (0, 1):
        road.run("ppo", tmp_path / str(seed), seed=seed, dtype="float32")
    assert len(orders) == len(set(orders)) == 4
