"""sample.py: what it asks, prints and saves, and how its conversations go on."""

import sys

import pytest
import torch
from tiny_road import PROMPTS, chat, template, watch, write_rows

import sample
from minirlhf.plumbing.formats import read_samples
from minirlhf.plumbing.runs import load_checkpoint


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
    monkeypatch.setattr(sys, "stdin", open("/dev/null", encoding="utf-8"))
    assert "An empty line ends" in sampled(road, capsys, chat=True)


def test_check_14_a_conversation_closes_each_answer_once(road, monkeypatch, capsys):
    """Bug: the end token stays in a sampled answer's text, and comes back in the next prompt."""
    tok, calls = road.tokenizer, watch(monkeypatch, sample, "respond")
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


def test_sample_computes_in_the_type_that_was_asked_for(road, capsys, monkeypatch):
    """Bug: --dtype is checked and then forgotten."""
    seen, draw = [], sample.sample_prompts
    monkeypatch.setattr(sample, "sample_prompts", lambda *args: seen.append(
        (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))) or draw(*args))
    for dtype in ("float32", "bfloat16"):
        sampled(road, capsys, prompt="cow?", dtype=dtype)
    assert seen[0][0] is False and seen[1] == (True, torch.bfloat16)
