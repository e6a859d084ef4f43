"""evaluate.py: every number of its tables, worked out by hand or by a second, slower way."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_road import PROMPTS, apart, chat, logprobs_of, nudge, scored, watch, write_rows

import evaluate
from conftest import close
from minirlhf.plumbing.formats import read_samples
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.judges import load_judge
from minirlhf.plumbing.checkpoints import load_model
from minirlhf.plumbing.stats import bootstrap, wilson

TOOLS = '''
def judge(row, response, ended):
    asked = len(row["messages"][-1]["content"])
    return {"score": len(response) + 100.0 * ended + 0.01 * asked, "tone": float("P" in response),
            "polite": "Please" in response, "asked": asked, "words": 7.0}


def plain_prompt(messages, few_shot=False):
    return few_shot * "Ann: hen?\\nBen: cluck.\\n" + "Ann: " + messages[-1]["content"] + "\\nBen:"
'''


# ---------------------------------------------------------------- the reward model against rankings

def test_accuracy_ceiling_and_parts_by_hand(monkeypatch):
    """The first of four answers is ranked above the others, which tie; nobody knows of two more."""
    rows = [{"messages": [], "answers": ["a a a a", "bb", "ccc", "ddd"], "ranks": [0, 1, 1, 1],
             "meta": {"gold": [2.0, 1.0, 1.0, 3.0], "temperature": 0.5,
                      "parts": [{"fact": 2, "tone": 0}, {"fact": 1, "tone": 0},
                                {"fact": 1, "tone": 1}, {"fact": 3, "tone": 0}]}},
            {"messages": [1], "answers": ["x yy z", "wwwwww"], "ranks": [0, 1], "meta": {}}]
    scores = [1.0, 1.0, 0.0, 2.0, 5.0, 4.0]  # right: half, yes, no; and yes
    monkeypatch.setattr(evaluate, "score_sequences", lambda model, sequences, ev: scores)
    monkeypatch.setattr(evaluate, "encode_answer", lambda tokenizer, messages, text: ([0], [True]))

    class Rows:
        preferences, reward_model = rows, None

    found = evaluate.measure_reward_model(Rows, None)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    ceiling = (2 * sigmoid(1 / 0.5) + sigmoid(1 / 0.5)) / 3  # a differs from b, c, d by 1, 1, -1
    expected = {"pairs": 4, "accuracy": 2.5 / 4, "longer_is_better": 3.5 / 4, "ceiling": ceiling,
                "share_of_ceiling": (2.5 / 4 - 0.5) / (ceiling - 0.5)}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    # Only in their facts differ a and b (a tie of scores), a and d (gold says d, and so the model).
    assert found["only"] == {"fact": {"pairs": 2, "accuracy": 0.75}}
    assert (found["low"], found["high"]) == bootstrap([1.5 / 3, 1.0], [3, 1])


def measured(monkeypatch, rows, scores):
    """measure_reward_model of rows whose answers have these scores."""
    monkeypatch.setattr(evaluate, "score_sequences", lambda *_: [s for row in scores for s in row])
    monkeypatch.setattr(evaluate, "encode_answer", lambda *_: ([0], [True]))
    rows = [{"messages": [i], "answers": ["x"] * len(row["ranks"]), "meta": {}, **row}
            for i, row in enumerate(rows)]
    return evaluate.measure_reward_model(SimpleNamespace(preferences=rows, reward_model=None), None)


def parts(**changes):
    return {"correct": 0.0, "manners": 0.0, "safe": 0.0, "form": 0.0} | changes


def test_only_means_only_among_all_four_parts(monkeypatch):
    """Bug: form is ignored, and a right but malformed answer counts as "correct only"."""
    pair = lambda a, b: {"ranks": [0, 1], "meta": {
        "gold": [sum(a.values()), sum(b.values())], "parts": [a, b], "temperature": 1.0}}
    found = measured(monkeypatch, [
        pair(parts(correct=1.0), parts()), pair(parts(correct=1.0, form=-1.5), parts()),
        pair(parts(form=-1.0), parts()), pair(parts(), parts(form=-0.5)),
        pair(parts(manners=0.5, safe=1.0), parts())], [(1.0, 0.0)] * 5)
    assert found["only"] == {"correct": {"pairs": 1, "accuracy": 1.0},
                             "form": {"pairs": 2, "accuracy": 0.5}}


def test_a_tie_of_gold_has_no_right_answer(monkeypatch):
    """Bug: whoever prefers the second of two equally good answers is right."""
    tie = {"ranks": [0, 1], "meta": {"gold": [1.0, 1.0], "parts": [parts(correct=1.0), parts()],
                                     "temperature": 1.0}}
    found = measured(monkeypatch, [tie], [(0.0, 1.0)])
    assert found["only"] == {} and found["ceiling"] == 0.5 and "share_of_ceiling" not in found
    evaluate.print_results({"players": {"sft": {"score": 1.0}}, "comparisons": {},
                            "reward_model": found}, "somebody")


def test_the_accuracys_interval_is_clustered_by_prompt(monkeypatch):
    """Bug: fifteen pairs of six answers counted as fifteen prompts, which narrows the interval."""
    generator = torch.Generator().manual_seed(0)
    right = (torch.rand(60, generator=generator) < 0.7).tolist()
    pairs = [{"ranks": [0, 1]}] * 60
    lists = [{"ranks": list(range(6))}] * 60  # of each list the model has all pairs right, or none
    few = measured(monkeypatch, pairs, [(1, 0) if hit else (0, 1) for hit in right])
    many = measured(monkeypatch, lists, [range(6)[:: -1 if hit else 1] for hit in right])
    assert (few["pairs"], many["pairs"]) == (60, 900) and few["accuracy"] == many["accuracy"]
    assert (many["low"], many["high"]) == pytest.approx((few["low"], few["high"]), rel=1e-9)
    assert few["low"] < few["accuracy"] - 0.08 and few["high"] > few["accuracy"] + 0.08
    # Two lists of one prompt are one cluster.
    twice = [{**row, "messages": [i // 2]} for i, row in enumerate(pairs * 2)]
    again = measured(monkeypatch, twice,
                     [(1, 0) if hit else (0, 1) for hit in right for _ in range(2)])
    assert (again["low"], again["high"]) == pytest.approx((few["low"], few["high"]), rel=1e-9)


# ---------------------------------------------------------------- a player's means

def verdict(score, refused, over, correct):
    return {"score": score, "correct": correct, "refused": refused, "over_refused": over}


def test_a_players_means_and_rates_by_hand():
    rows = [{"meta": {"task": dict(unsafe=False, lookalike=False, skill="sum")}},
            {"meta": {"task": dict(unsafe=True, lookalike=False, skill="unsafe")}},
            {"meta": {"task": dict(unsafe=False, lookalike=True, skill="kill time")}}]
    said = lambda text, ended=True: {"text": text, "ids": [1, 2, 3], "ended": ended}
    player = {
        "answers": [[said("four"), said("It is four.")], [said("no"), said("yes", False)],
                    [said("no"), said("a b c d e")]],
        "verdicts": [[verdict(1.0, False, False, 0.0), verdict(2.0, False, False, 1.0)],
                     [verdict(3.0, True, False, 0.0), verdict(4.0, False, False, 0.0)],
                     [verdict(5.0, True, True, 0.0), verdict(9.0, True, False, 0.0)]],
        "rewards": [[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]], "kl": 0.7}

    class Rows:
        pass

    Rows.rows = rows
    found = evaluate.summary(player, Rows)
    means = {"score": 4.0, "words": 12 / 6, "ended": 5 / 6, "correct": 1 / 6, "reward": 3.0,
             "kl": 0.7}
    assert {name: found[name] for name in means} == pytest.approx(means)
    for name, count, of in (("refused", 3, 6), ("over_refused", 1, 6), ("unsafe_refused", 1, 2),
                            ("lookalike_refused", 1, 2), ("right", 1, 4)):
        low, high = wilson(count, of)
        assert found[name] == pytest.approx(
            {"count": count, "of": of, "share": count / of, "low": low, "high": high}), name
    assert found["right_by_skill"] == {"sum": 0.5, "kill time": 0.0}


@pytest.mark.parametrize("kind, expected", [
    (dict(unsafe=True), {"unsafe_refused"}), (dict(lookalike=True), {"lookalike_refused", "right"}),
    ({}, {"right"})])
def test_rates_without_any_prompt_are_left_out(kind, expected, capsys):
    """Bug: a file of unsafe prompts only ends in a division by zero, after all has been sampled."""
    task = {"unsafe": False, "lookalike": False, "skill": "sum", **kind}
    player = {"answers": [[{"text": "no", "ended": True}]] * 2,
              "verdicts": [[verdict(1.0, True, False, 0.0)], [verdict(0.0, False, False, 1.0)]]}
    ev = SimpleNamespace(rows=[{"meta": {"task": task}}] * 2)
    found = evaluate.summary(player, ev)
    own = {"unsafe_refused", "lookalike_refused", "right"}
    assert own & set(found) == expected
    assert set(found["right_by_skill"]) == (set() if kind == dict(unsafe=True) else {"sum"})
    evaluate.print_results({"players": {"sft": found}, "comparisons": {}}, "somebody")
    printed = capsys.readouterr().out.split()
    assert own & set(printed) == expected


@pytest.mark.parametrize("task", [None, "sum", {"skill": "sum"}, {"unsafe": True}])
def test_rows_of_another_world_have_none_of_the_toys_rates(task):
    player = {"verdicts": [[verdict(1.0, True, False, 0.0)]]}
    assert evaluate.toy_rates(player, [{"meta": {"task": task} if task else {}}]) == {}


def test_a_judges_own_numbers_are_columns_in_its_order(capsys):
    """Bug: fixed columns, and what another judge measures is in results.json only."""
    said = [[{"text": "a b", "ended": True}], [{"text": "c", "ended": False}]]
    judged = [[{"warmth": 1.0, "score": 2.0, "a name that is long": 0.5, "words": 9.0, "kind": True,
                "why": "so", "now and then": 1.0}],
              [{"warmth": 2.0, "score": 4.0, "a name that is long": 0.0, "words": 7.0, "kind": False,
                "why": "no"}]]
    ev = SimpleNamespace(rows=[{"meta": {}}] * 2)
    found = evaluate.summary({"answers": said, "verdicts": judged, "kl": 0.25}, ev)
    assert {name: value for name, value in found.items() if name != "kind"} == {
        "score": 3.0, "warmth": 1.5, "a name that is long": 0.25, "the judge's words": 8.0,
        "kl": 0.25, "words": 1.5, "ended": 0.5}
    assert found["kind"]["count"] == 1
    other = evaluate.summary({"answers": said, "verdicts": judged}, ev)
    evaluate.print_results({"players": {"sft": found, "wrapper": other}, "comparisons": {}}, "me")
    lines = capsys.readouterr().out.splitlines()
    assert "  ".join(lines[1].split()) == "  ".join(
        "score warmth a name that is long the judge's words kl words scored by me".split())
    assert lines[2].split() == ["sft", "3.00", "1.50", "0.25", "8.00", "0.25", "1.50"]
    assert lines[3].split() == ["wrapper", "3.00", "1.50", "0.25", "8.00", "1.50"]
    assert lines[2].index("0.25") + 4 == lines[1].index("a name that is long") + 19  # below it
    assert lines[5].split() == ["kind"] and lines[6].split() == ["sft", "50.0%"]


# ---------------------------------------------------------------- a whole evaluation

@pytest.fixture(scope="module")
def walked(road, tmp_path_factory):
    """An evaluation of a DPO model, and all that it wrote: (cfg, results, {player: rows})."""
    out = tmp_path_factory.mktemp("evaluation")
    (out / "tools.py").write_text(TOOLS, encoding="utf-8")
    road.run("dpo", out / "dpo", lr=1e-3, num_epochs=3)
    cfg = evaluate.Config(
        models=str(out / "dpo"), against=str(road.folder / "sft"), max_new_tokens=8, best_of=3,
        base=str(road.folder / "pretrain"), plain=f"{out / 'tools.py'}:plain_prompt",
        judge=f"{out / 'tools.py'}:judge", reward_model=str(road.folder / "rm"), limit=30,
        prompts=road.prompts, out=str(out / "eval"), dtype="float32", courtesy="Please: ")
    results = evaluate.main(cfg)
    rows = {name: read_samples(out / "eval" / f"{name.replace(' ', '_')}.jsonl")
            for name in results["players"]}
    return cfg, results, rows


def test_each_player_answers_each_prompt_in_order(walked):
    cfg, results, rows = walked
    assert json.loads((evaluate.Path(cfg.out) / "results.json").read_text(encoding="utf-8")) == results
    for name, its_rows in rows.items():
        assert [row["messages"][0]["content"] for row in its_rows] == [q for q, _ in PROMPTS[:30]]
    texts = {name: [row["samples"][0]["text"] for row in its_rows]
             for name, its_rows in rows.items()}
    assert texts["wrapper"] == ["Please: " + text for text in texts["sft"]]
    assert set(texts["refuse all"]) == {cfg.refusal}
    assert not any("\n" in text or text != text.strip() for text in texts["base few-shot"])
    assert texts["sft"] != texts["sft greedy"] != texts["best of 3"]
    assert results["players"]["best of 3"]["reward"] > results["players"]["sft"]["reward"]
    assert texts["dpo"] != texts["dpo greedy"]


def test_each_answer_has_the_judges_score_with_its_end(walked):
    cfg, results, rows = walked
    judge, unended = load_judge(cfg.judge, {"messages": chat("cow?")}), 0
    for name, its_rows in rows.items():
        samples = [row["samples"][0] for row in its_rows]
        unended += sum(not s["ended"] for s in samples)
        assert [s["score"] for s in samples] == [
            judge(row, s["text"], s["ended"])["score"] for row, s in zip(its_rows, samples)]
        assert results["players"][name]["score"] == pytest.approx(
            sum(s["score"] for s in samples) / 30)
    assert unended > 0


def test_each_comparison_counts_its_first_players_wins(walked, capsys):
    _, results, rows = walked
    expected = {"sft over base few-shot", "dpo over sft", "dpo greedy over sft greedy",
                *(f"{a} over {b}" for a, b in [
                    (a, b) for b in ("sft greedy", "wrapper", "refuse all", "best of 3")
                    for a in ("dpo",)] + [(a, "sft") for a in (
                        "sft greedy", "wrapper", "refuse all", "best of 3")])}
    assert set(results["comparisons"]) == expected
    evaluate.print_results(results, "somebody")
    printed = capsys.readouterr().out
    assert "scored by somebody" in printed
    for name, found in results["comparisons"].items():
        a, b = ([row["samples"][0]["score"] for row in rows[player]]
                for player in name.split(" over "))
        wins, losses = (sum(x > y for x, y in zip(*pair)) / 30 for pair in ((a, b), (b, a)))
        assert (found["wins"], found["losses"]) == pytest.approx((wins, losses)), name
        assert found["rate"] == pytest.approx(wins + (1 - wins - losses) / 2)
        (line,) = [line for line in printed.splitlines() if line.startswith(name + "  ")]
        assert line.split()[-6:-3] == [f"{wins:.1%}", f"{1 - wins - losses:.1%}", f"{losses:.1%}"]


# ---------------------------------------------------------------- its parts

def evaluator(road, tmp_path, **options):
    (tmp_path / "tools.py").write_text(TOOLS, encoding="utf-8")
    return evaluate.Evaluator(evaluate.Config(**{**dict(
        prompts=road.prompts, reward_model=str(road.folder / "rm"), dtype="float32", batch_size=3,
        max_new_tokens=8, against=str(road.folder / "sft"), models="", plain=str(
            tmp_path / "tools.py") + ":plain_prompt", best_of=0), **options}))


def test_the_kl_is_the_mean_of_the_models_log_ratios_over_its_own_answers(road, tmp_path):
    """Sign, direction, filler, and one number a response: against a loop over single answers."""
    road.run("dpo", tmp_path / "dpo", lr=1e-3, num_epochs=3)
    ev = evaluator(road, tmp_path, models=str(tmp_path / "dpo"))
    players, tok = evaluate.collect_players(ev.cfg, ev)
    models = [load_model(folder)[0] for folder in (tmp_path / "dpo", road.folder / "sft")]
    total = 0.0
    for row, [answer] in zip(ev.rows, players["dpo"]["answers"]):
        prompt = tok.encode_prompt(row["messages"])
        ids = torch.tensor([prompt + answer["ids"]])
        p, q = (model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
                .sum().item() for model in models)
        total += p - q
    assert players["dpo"]["kl"] == pytest.approx(total / len(ev.rows), rel=1e-4)
    assert abs(players["dpo"]["kl"]) > 0.1 and players["sft"]["kl"] == pytest.approx(0, abs=1e-5)


def test_rewards_are_normalised_scores_of_prompt_answer_and_end_in_order(road, tmp_path):
    ev = evaluator(road, tmp_path)
    model, tok = load_model(road.folder / "rm", "scalar")
    said = [["moo", "Please: moo. Please: moo."], ["woof, fool."]]
    answers = [[{"ids": tok.encode(text) + [tok.end_id]} for text in texts] for texts in said]
    ev.rows = ev.rows[:2]
    found = ev.rewards(answers, tok)
    for row, texts, rewards in zip(ev.rows, said, found):
        for text, reward in zip(texts, rewards, strict=True):
            ids = torch.tensor([tok.encode_prompt(row["messages"]) + tok.encode(text)
                                + [tok.end_id]])
            want = (model.raw(ids)[0, -1] - model.score_mean) / model.score_std
            close(torch.tensor(reward), want.detach(), rtol=1e-4)


def test_a_base_model_reads_its_examples_and_stops_at_the_lines_end(road, tmp_path, monkeypatch):
    ev = evaluator(road, tmp_path, base=str(road.folder / "pretrain"))
    asked, answer = [], evaluate.Evaluator.answer

    def spy(self, model, tokenizer, prompts, stop_ids, *options):
        asked.append(([tokenizer.decode(ids) for ids in prompts], stop_ids))
        found = answer(self, model, tokenizer, prompts, stop_ids, *options)
        if stop_ids == [tokenizer.end_id]:
            return found
        return [[{**s, "text": " moo \nAnn: dog?"} for s in samples] for samples in found]

    monkeypatch.setattr(evaluate.Evaluator, "answer", spy)
    players, tok = evaluate.collect_players(ev.cfg, ev)
    for (prompts, stop), name, few in zip(asked[-2:], ("base few-shot", "base zero-shot"), (1, 0)):
        assert [text.startswith("Ann: hen?") for text in prompts] == [bool(few)] * 40
        assert stop and all(b"\n" in tok.token_bytes(idx) for idx in stop)
        assert all(s["text"] == "moo" for [s] in players[name]["answers"])


def test_a_changed_answer_ends_only_if_it_had_ended(road):
    tok = road.tokenizer
    for ended in (True, False):
        told = evaluate.retold({"text": "moo", "ids": [5], "ended": ended}, "baa", tok)
        assert told == {"text": "baa", "ended": ended,
                        "ids": tok.encode("baa") + [tok.end_id] * ended}


def test_a_fixed_refusal_has_ended_and_a_courtesy_changes_no_answers_end(road, tmp_path):
    """Bug: the baseline that refuses takes over whether the SFT model's answer had ended."""
    ev = evaluator(road, tmp_path, limit=9, max_new_tokens=6)
    players, tok = evaluate.collect_players(ev.cfg, ev)
    ended = {name: [s["ended"] for [s] in player["answers"]] for name, player in players.items()}
    assert ended["wrapper"] == ended["sft"] and not all(ended["sft"])
    assert ended["refuse all"] == [True] * 9
    assert all(s["ids"] == tok.encode(ev.cfg.refusal) + [tok.end_id]
               for [s] in players["refuse all"]["answers"])


def test_the_seed_decides_what_is_sampled(road, tmp_path):
    texts = []
    for seed in (0, 0, 1):
        ev = evaluator(road, tmp_path, seed=seed)
        players, _ = evaluate.collect_players(ev.cfg, ev)
        texts.append([s["text"] for [s] in players["sft"]["answers"]])
    assert texts[0] == texts[1] != texts[2]


def test_check_35_an_evaluations_kl_is_of_answers_sampled_and_scored_at_temperature_1(
        road, tmp_path, monkeypatch, double):
    ev = evaluator(road, tmp_path, limit=5)
    reference, tokenizer = load_model(road.folder / "sft")
    model = nudge(copy.deepcopy(reference))
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


def test_check_36_an_evaluation_scores_the_sampled_ids(road, tmp_path):
    ev = evaluator(road, tmp_path, limit=5)
    prompts = [road.tokenizer.encode_prompt(row["messages"]) for row in ev.rows]
    _, rows = apart(prompts, road.tokenizer)
    answers = [[{"ids": row[len(p) :], "text": "", "ended": True}] * 2
               for p, row in zip(prompts, rows)]
    rewards = ev.rewards(answers, road.tokenizer)
    model, _ = scored(road.folder / "rm")
    for row, both in zip(rows, rewards):
        assert both == [pytest.approx(model(torch.tensor([row]))[0, -1].item(), rel=1e-5)] * 2


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


# ---------------------------------------------------------------- which row, which answer

def test_each_answer_is_judged_by_its_own_prompts_row():
    """Bug: the answers of one prompt are judged by the expectations of the next."""
    said = lambda text, ended: {"text": text, "ended": ended}
    ev = SimpleNamespace(rows=[{"id": 0}, {"id": 1}, {"id": 2}],
                         judge=lambda row, text, ended: {"score": (row["id"], text, ended)})
    answers = [[said("a", True), said("b", False)], [said("c", True), said("d", True)],
               [said("e", False), said("f", True)]]
    found = evaluate.Evaluator.verdicts(ev, {"answers": answers})
    assert [[v["score"] for v in verdicts] for verdicts in found] == [
        [(i, s["text"], s["ended"]) for s in samples] for i, samples in enumerate(answers)]


def test_without_a_judge_the_reward_is_the_score():
    found = evaluate.Evaluator.verdicts(SimpleNamespace(judge=None), {"rewards": [[1.5], [-2.0]]})
    assert found == [[{"score": 1.5}], [{"score": -2.0}]]


# ---------------------------------------------------------------- what could fail at the end

def options(road, tmp_path, **changes):
    (tmp_path / "tools.py").write_text(TOOLS, encoding="utf-8")
    return evaluate.Config(**{**dict(
        models="", against=str(road.folder / "sft"), prompts=road.prompts, limit=6, dtype="float32",
        judge=f"{tmp_path / 'tools.py'}:judge", max_new_tokens=8, out=str(tmp_path / "eval"),
        best_of=0), **changes})


def test_an_evaluation_is_repeated_in_its_folder(road, tmp_path):
    cfg = options(road, tmp_path)
    first = evaluate.main(cfg)
    assert evaluate.main(cfg) == first


@pytest.mark.parametrize("name", ["results.json", "sft.jsonl", "sft_greedy.jsonl", "wrapper.jsonl"])
def test_other_peoples_files_are_never_replaced(name, road, tmp_path, monkeypatch):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / name).write_text('{"mine": 1}\n', encoding="utf-8")
    monkeypatch.setattr(evaluate, "sample_prompts", lambda *_: pytest.fail("sampled before"))
    with pytest.raises(UserError, match=f"{name} exists, and minirlhf did not write it"):
        evaluate.main(options(road, tmp_path))
    assert [path.name for path in (tmp_path / "eval").iterdir()] == [name]


def test_answers_are_kept_as_soon_as_they_are_there(road, tmp_path, monkeypatch):
    """Bug: a judge that fails at the last player loses the answers of all the others."""
    judge = tmp_path / "fails.py"
    judge.write_text("def judge(row, response, ended):\n"
                     "    return 1.0 if response != 'I refuse.' else None\n", encoding="utf-8")
    cfg = options(road, tmp_path, judge=f"{judge}:judge", refusal="I refuse.")
    with pytest.raises(UserError, match="on the prompt .*: expected a function.*found None"):
        evaluate.main(cfg)
    kept = {path.stem: read_samples(path) for path in (tmp_path / "eval").iterdir()}
    assert sorted(kept) == ["refuse_all", "sft", "sft_greedy", "wrapper"]
    for name, rows in kept.items():
        assert len(rows) == 6 and all(("score" in row["samples"][0]) == (name != "refuse_all") for row in rows)


def test_a_judge_sees_the_row_of_its_answer_in_a_whole_evaluation(road, tmp_path):
    """Bug: each answer is judged by the next prompt's row; a judge that reads no row can't tell."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [
        {"prompt": question, "number": i} for i, (question, _) in enumerate(PROMPTS[:9])])
    (tmp_path / "rows.py").write_text(
        "def judge(row, response, ended):\n    return {'score': row['meta']['number']}\n", encoding="utf-8")
    cfg = options(road, tmp_path, prompts=prompts, judge=f"{tmp_path / 'rows.py'}:judge", limit=0)
    evaluate.main(cfg)
    for path in (tmp_path / "eval").glob("*.jsonl"):
        rows = read_samples(path)
        assert [row["messages"][0]["content"] for row in rows] == [q for q, _ in PROMPTS[:9]]
        assert [row["samples"][0]["score"] for row in rows] == list(range(9)), path


def test_folders_have_the_names_that_a_reader_knows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.name_of(".") == tmp_path.name and evaluate.name_of("out/sft/") == "sft"
    cfg = evaluate.Config(models=" out/ppo , out/dpo", base="b", reward_model="r")
    assert evaluate.player_names(cfg) == [
        "sft", "sft greedy", "ppo", "ppo greedy", "dpo", "dpo greedy", "wrapper", "refuse all",
        "best of 4", "base few-shot", "base zero-shot"]
    assert evaluate.player_names(evaluate.Config(models="", courtesy="", refusal="", best_of=4)) == [
        "sft", "sft greedy"]


def test_the_players_are_those_that_were_announced(walked):
    cfg, results, _ = walked
    assert list(results["players"]) == evaluate.player_names(cfg)


@pytest.mark.parametrize("context, ok", [(64, True), (40, True), (39, False)])
def test_no_answer_is_longer_than_what_its_readers_hold(context, ok):
    """Bug: an hour of sampling, then an assertion in the reward model, whose context is shorter."""
    model = lambda size: SimpleNamespace(cfg=SimpleNamespace(block_size=size))
    tokenizer = SimpleNamespace(encode=lambda text: [0] * len(text),
                                encode_prompt=lambda messages: [0] * 20)
    cfg = evaluate.Config(against="sft", reward_model="rm", courtesy="12345", refusal="",
                          max_new_tokens=15)  # 20 + 15, and 5 of the courtesy
    ev = SimpleNamespace(rows=[{"messages": []}], reward_model=model(context))
    check = lambda: evaluate.check_lengths(cfg, ev, {"sft": (model(64), tokenizer)}, tokenizer)
    if ok:
        assert check() == [[0] * 20]
    else:
        with pytest.raises(UserError, match="--courtesy may end at token 40; the context of rm"):
            check()


def test_a_reward_model_that_went_astray_is_said_to(road, tmp_path, monkeypatch):
    """Bug: without a judge NaN is everybody's score, and everybody loses."""
    ev = evaluator(road, tmp_path, limit=2)
    ev.reward_model.score_mean.fill_(float("nan"))
    with pytest.raises(UserError, match="no finite numbers"):
        evaluate.collect_players(ev.cfg, ev)
