"""sample.py: what it asks, prints and saves, and how its conversations go on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_road import PROMPTS, chat, template, watch, write_rows

import sample
from minirlhf import generate
from minirlhf.generate import filter_logits
from minirlhf.look import ledger
from minirlhf.plumbing import signals
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.formats import read_samples
from minirlhf.plumbing.checkpoints import load_checkpoint, load_model

ROOT = Path(__file__).parent.parent


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


# ---------------------------------------------------------------- the ledger of samples

def recorded(road, tmp_path, capsys, **options):
    """(rows of the ledger, the options' config) of eight sampled answers."""
    options = dict(prompts=road.prompts, save=str(tmp_path / "s.jsonl"), limit=8,
                   ledger=str(tmp_path / "look"), **{"dtype": "float32", **options})
    sampled(road, capsys, **options)
    return ledger.load(tmp_path / "look", 1)["rows"]


@pytest.mark.parametrize("options", [
    {}, dict(temperature=0.5), dict(top_k=3), dict(top_p=0.7),
    dict(top_k=5, top_p=0.9, temperature=1.5), dict(temperature=0.0), dict(top_k=1)])
def test_the_ledger_shows_the_distribution_that_was_sampled_from(options, road, tmp_path, capsys):
    """Bug: --top_k and --top_p are forgotten, and a token that was certain shows a log-prob."""
    rows = recorded(road, tmp_path, capsys, **options)
    model, _ = load_model(road.folder / "sft")
    tokens = torch.tensor(rows["tokens"])
    logits = model(tokens).detach()[:, :-1]
    if options.get("temperature", 1.0) > 0:
        logits = logits / options.get("temperature", 1.0)
    seen = 0
    for b, t in torch.tensor(rows["response_mask"]).nonzero().tolist():
        kept = logits[b, t][None]
        if options.get("temperature", 1.0) > 0:
            kept = filter_logits(kept, options.get("top_k", 0), options.get("top_p", 1.0))
        probs = kept.softmax(-1)[0]
        logprob = probs[tokens[b, t + 1]].log().item()
        assert rows["logprobs"][b, t] == pytest.approx(logprob, abs=1e-4)
        assert rows["entropy"][b, t] == pytest.approx(
            -sum(p * p.log() for p in probs if p > 0).item(), abs=1e-4)
        seen += 1
    assert seen > 8
    if options == dict(top_k=1):
        assert abs(rows["logprobs"]).max() == 0


def test_the_ledger_is_computed_in_the_type_that_was_sampled_in(road, tmp_path, capsys):
    """Bug: sampled in bfloat16, shown in float32."""
    rows = recorded(road, tmp_path, capsys, dtype="bfloat16", top_k=2)
    model, _ = load_model(road.folder / "sft")
    tokens, mask = torch.tensor(rows["tokens"]), torch.tensor(rows["response_mask"])
    own = tokens[:, 1:, None]
    logprobs = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            logits = model(tokens).detach()[:, :-1].float()
        kept = filter_logits(logits.flatten(0, 1), 2).view_as(logits)
        logprobs[dtype] = kept.scatter(2, own, logits.gather(2, own)).log_softmax(-1).gather(
            2, own)[..., 0][mask]
    shown = torch.tensor(rows["logprobs"])[mask]
    assert (shown - logprobs[torch.bfloat16]).abs().max() < 1e-4
    assert (shown - logprobs[torch.float32]).abs().max() > 1e-3 and shown.isfinite().all()


# ---------------------------------------------------------------- outputs

def test_an_earlier_file_of_samples_is_replaced(road, tmp_path, capsys):
    for limit in (3, 2):
        sampled(road, capsys, prompts=road.prompts, save=str(tmp_path / "s.jsonl"), limit=limit)
    assert len(read_samples(tmp_path / "s.jsonl")) == 2


def test_a_disk_that_fills_up_is_named(road, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="s.jsonl cannot be written .No space left on device"):
        sampled(road, capsys, prompts=road.prompts, save=str(tmp_path / "s.jsonl"), limit=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_was_sampled_is_kept_when_the_work_is_stopped(number, code, road, tmp_path, capsys,
                                                           monkeypatch):
    """Bug: Ctrl-C after an hour, and nothing is written. Two batches of ten are finished, which
    hold all samples of six prompts and two of a seventh."""
    draw, calls = generate.generate, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(number)
        return draw(*args)

    monkeypatch.setattr(generate, "generate", stopped)
    old = [signal.signal(one, signals.on_signal) for one in (signal.SIGINT, signal.SIGTERM)]
    path = tmp_path / "s.jsonl"
    try:
        with pytest.raises(signals.Stopped, match="stopped: 6 of 40 prompts were answered") as stop:
            sampled(road, capsys, prompts=road.prompts, save=str(path), num_samples=3, batch_size=10,
                    ledger=str(tmp_path / "look"))
    finally:
        for one, handler in zip((signal.SIGINT, signal.SIGTERM), old):
            signal.signal(one, handler)
    captured = capsys.readouterr()
    assert 128 + stop.value.number == code
    assert "18 samples of 6 prompts" in captured.out
    rows = read_samples(path)
    assert [len(row["samples"]) for row in rows] == [3] * 6
    asked = [row["messages"][0]["content"] for row in rows]
    assert asked == [q for q, _ in PROMPTS if q in asked]  # in the file's order
    assert not (tmp_path / "look").exists()


def test_nothing_is_written_when_nothing_is_finished(road, tmp_path, capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate", stopped)
    for options in (dict(prompts=road.prompts, save=str(tmp_path / "s.jsonl")),
                    dict(prompt="cow?")):
        with pytest.raises(signals.Stopped, match="stopped: 0 of") as stop:
            sampled(road, capsys, **options)
        assert stop.value.number == signal.SIGINT and list(tmp_path.iterdir()) == []


def test_the_command_itself_is_stopped_by_sigterm(road, tmp_path):
    """Once in a process of its own, while it samples for longer than any test waits."""
    save = tmp_path / "s.jsonl"
    work = subprocess.Popen(
        [sys.executable, "-c", "import runpy, sys, minirlhf.generate as g, time; old = g.generate\n"
         "def slow(*a):\n    print('at work', flush=True); time.sleep(0.2); return old(*a)\n"
         "g.generate = slow\nsys.argv[0] = 'sample.py'\nrunpy.run_path('sample.py', "
         "run_name='__main__')", "--model", str(road.folder / "sft"), "--prompts", road.prompts,
         "--save", str(save), "--num_samples", "1000", "--batch_size", "1000"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    for _ in range(3):
        assert work.stdout.readline() == "at work\n"
    work.send_signal(signal.SIGTERM)
    out, err = work.communicate(timeout=60)
    assert work.returncode == 143 and "Traceback" not in err
    assert f"stopped: {len(read_samples(save))} of 40 prompts were answered" in err


# ---------------------------------------------------------------- sizes

def test_an_absurd_length_is_the_contexts(road, capsys):
    """Bug: near 2^63 the sum of prompt and response overflows, and each response has one token."""
    usual, absurd = (sampled_at(road, capsys, size) for size in (64, 2**63 - 1))
    assert usual == absurd and len(usual) > 100


def sampled_at(road, capsys, size):
    capsys.readouterr()
    sample.main(sample.Config(model=str(road.folder / "sft"), prompt="What does a cow say?",
                              max_new_tokens=size, batch_size=10**9, temperature=1.0, seed=3,
                              num_samples=8))
    return capsys.readouterr().out


# ---------------------------------------------------------------- conversations

def talk(road, capsys, monkeypatch, *said, **options):
    """What a chat prints, the user typing these lines; an exception among them is raised."""
    lines = iter([*said, ""])

    def answer(shown):
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    return sampled(road, capsys, chat=True, temperature=0.0, **options)


def test_a_turn_that_cannot_be_answered_is_left_out(road, capsys, monkeypatch):
    """Bug: a first turn that is too long, or pasted bytes, end the conversation in a traceback."""
    bad = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    prompts = watch(monkeypatch, sample, "respond")
    out = talk(road, capsys, monkeypatch, "What does a cow say? " * 40, "cow?", bad, "\udcff",
               "dog? " * 99, "dog?")
    assert out.count("not answered: ") == 4 and out.count("assistant: ") == 2
    assert "fills the whole context of 64" in out and "whole characters" in out
    last = road.tokenizer.decode(prompts[-1][0][1][0])
    assert last.count("<|user|>") == 2 and "cow?" in last and "dog?" in last


def test_control_characters_are_text(road, capsys, monkeypatch):
    out = talk(road, capsys, monkeypatch, "\x00\x1b[31mcow\x07?\x7f", "\ufeffcow?\u202e")
    assert out.count("assistant: ") == 2 and "not answered" not in out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EOFError()])
def test_a_conversation_ends_without_a_traceback(error, road, capsys, monkeypatch):
    out = talk(road, capsys, monkeypatch, "cow?", error, "dog?")
    assert out.count("assistant: ") == 1


def test_ctrl_c_ends_a_conversation_while_it_answers(road, capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate", stopped)
    assert "assistant" not in talk(road, capsys, monkeypatch, "cow?")
