"""The ledger: what it records is what the run used, and recording changes nothing."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import malformed.looking
import numpy as np
import pytest
import torch
from tiny_road import with_dropout, without_clock, write_rows

import sample
from conftest import close
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.formats import read_preferences
from minirlhf.plumbing.checkpoints import load_checkpoint, load_model
from minirlhf.look import ledger, microscope, plot

STAGES = ["sft", "rm", "dpo", "ppo"]
ROOT = Path(__file__).parent.parent


def recorded(stage, road, out, **options):
    """Run a stage with a record of every step; (history, {step: record})."""
    history = road.run(stage, out, **{"ledger_every": 1, "eval_every": 1, "dtype": "float32",
                                      "micro_batch_size": 3, **options})
    return history, {step: ledger.load(out, step) for step in ledger.recorded_steps(out)}


@pytest.mark.parametrize("stage", STAGES)
def test_means_made_from_the_rows_sums_are_the_logged_ones(stage, road, tmp_path, double):
    history, records = recorded(stage, road, tmp_path)
    assert len(history) == len(records) > 1
    for row in history:
        record = records[row["step"]]
        means, batch = ledger.batch_means(record), record["batch"]
        if stage == "ppo":
            expected = {"kl": means["kl/sequence"], "reward": means["rewards/sequence"],
                        "score": means["scores"], "length": means["num_tokens"],
                        "ended": means["ended"], "entropy": means["entropy/token"]}
        elif stage == "sft":
            expected = {"loss": means["token_losses/token"]}
        elif stage == "rm":  # each prompt's loss stands beside each of its answers
            _, first = np.unique(batch["example"], return_index=True)
            expected = {"loss": batch["losses"][first].mean()}
        else:
            chosen, rejected = (batch["implicit_rewards"][np.lexsort((batch["example"],
                                                                      batch["rank"]))]
                                .reshape(2, -1))
            expected = {"loss": np.log1p(np.exp(rejected - chosen)).mean()}
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-6), (stage, row["step"], key)


@pytest.mark.parametrize("stage", STAGES)
def test_recording_changes_no_number_of_the_run(stage, road, tmp_path):
    histories = []
    for every in (0, 1):
        histories.append(without_clock(road.run(stage, tmp_path / str(every), ledger_every=every,
                                                eval_every=1)))
    assert histories[0] == histories[1]
    with_, without = (load_checkpoint(tmp_path / name)["model"] for name in "10")
    assert all(torch.equal(with_[name], without[name]) for name in without)
    assert not (tmp_path / "0" / "ledger").exists()


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_recording_leaves_dropout_as_it_was(stage, road, tmp_path):
    """Bugs: dropout stays off after a record; a record draws from the generator of dropout."""
    init = with_dropout(road.folder / ("pretrain" if stage == "sft" else "sft"), tmp_path / "init")
    for every in (0, 1):
        road.run(stage, tmp_path / str(every), ledger_every=every, eval_every=100, init=init)
    with_, without = (load_checkpoint(tmp_path / name)["model"] for name in "10")
    assert all(torch.equal(with_[name], without[name]) for name in without)


def test_a_rows_tensors_are_those_of_the_grid(road, tmp_path):
    _, records = recorded("ppo", road, tmp_path)
    rows = {name: torch.from_numpy(value) for name, value in records[2]["rows"].items()}
    mask = rows["response_mask"]
    for row in range(len(mask)):
        advantages, returns = advantages_by_the_sum(rows["rewards"][row], rows["values"][row],
                                                    mask[row], lam=0.95)
        close(rows["advantages"][row][mask[row]], advantages, rtol=1e-4, atol=1e-6)
        close(rows["returns"][row][mask[row]], returns, rtol=1e-4, atol=1e-6)
    close(rows["ratio"], (rows["new_logprobs"] - rows["logprobs"]).exp(), rtol=1e-5)
    assert (rows["new_logprobs"] != rows["logprobs"])[mask].any()  # after the update, not before
    assert rows["tokens"].shape == (4, mask.shape[1] + 1)
    for name, value in rows.items():
        if value.dim() == 2 and name not in ("tokens", "ratio"):
            assert (value[~mask] == 0).all(), name
    for pieces, tokens, length in zip(records[2]["pieces"], rows["tokens"], rows["lengths"]):
        assert pieces == [road.tokenizer.decode([idx]) for idx in tokens[:length].tolist()]


def advantages_by_the_sum(rewards, values, mask, lam):
    """The exponentially weighted mean of the k-step advantages, of one row, gamma being 1.

    The k-step advantage of token t is the sum of k rewards, plus the value k tokens on (0 behind the
    last), less the value at t; its weight is (1 - lam) lam^(k-1), all that is left for the longest
    (arXiv 1506.02438, Eq. 16, before it is simplified to the recursion that the library uses).
    """
    r, v = (x[mask].double().tolist() for x in (rewards, values))
    n, found = len(r), []
    for t in range(n):
        steps = [sum(r[t : t + k]) + (v[t + k] if t + k < n else 0.0) - v[t]
                 for k in range(1, n - t + 1)]
        weights = [(1 - lam) * lam**k for k in range(n - t - 1)] + [lam ** (n - t - 1)]
        found.append(sum(w * a for w, a in zip(weights, steps)))
    return found, [a + b for a, b in zip(found, v)]


def test_a_ledger_without_room_on_the_disk_ends_with_a_message(road, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    book = ledger.Ledger(tmp_path, road.tokenizer, every=1)
    with pytest.raises(UserError, match=r"step_000001.npz cannot be written .No space left"):
        book.record(1, lambda: {"tokens": torch.ones(1, 3, dtype=torch.int64),
                                "lengths": torch.tensor([3]),
                                "response_mask": torch.tensor([[False, True]])})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ---------------------------------------------------------------- characters and columns

@pytest.mark.parametrize("tokens, pieces", [
    ([b"\xe6", b"\x97", b"\xa5"], ["\\xe6", "\\x97", "日"]),
    ([b"a\xe6\x97", b"\xa5b"], ["a\\xe6\\x97", "日b"]),
    ([b"\xe6\x97\xa5\xe6", b"\x9c\xac!"], ["日\\xe6", "本!"]),
    ([b"\xf0\x9f", b"\x98\x80"], ["\\xf0\\x9f", "😀"]),
    ([b"\xe6\x97", b"a"], ["\\xe6\\x97", "a"]),  # the character never ends
    ([b"x", b"\xff\xfe", b"\xa5"], ["x", "\\xff\\xfe", "\\xa5"]),  # no character's bytes
    ([b"\xe6\x97"], ["\\xe6\\x97"]), ([b"<|end|>", b" e\xcc\x81"], ["<|end|>", " e\u0301"]),
])
def test_the_pieces_of_characters_that_span_tokens_by_hand(tokens, pieces):
    """Bug: each part of a character was shown as the replacement sign, in all tokens alike."""
    assert ledger.pieces_of(tokens) == pieces


def test_a_ledger_of_any_text_shows_it_whole(road, tmp_path):
    """A tokenizer that has met English only cuts other scripts into bytes."""
    tok = road.tokenizer
    messages = [{"role": "user", "content": "Ünïcode"}, {"role": "assistant", "content": "日本 é 😀!"}]
    ids, mask = tok.encode_chat(messages)
    ledger.Ledger(tmp_path, tok, every=1).record(1, lambda: {
        "tokens": torch.tensor([ids]), "lengths": torch.tensor([len(ids)]),
        "response_mask": torch.tensor([mask[1:]]), "kl": torch.full((1, len(ids) - 1), -0.5)})
    (pieces,) = ledger.load(tmp_path, 1)["pieces"]
    assert len(pieces) == len(ids)
    shown = re.sub(r"\\x[0-9a-f]{2}", "", "".join(pieces))
    assert shown == "<|begin|><|user|>Ünïcode<|end|><|assistant|>日本 é 😀!<|end|>"
    assert "\\xe6" in pieces
    lines = [line for line in ledger.show(tmp_path).splitlines() if "response" in line]
    assert len(lines) == sum(mask) and {ledger.columns_of(line) for line in lines} == {33}
    plot.draw_sequence(tmp_path, tmp_path / "x.png")


def test_columns_are_counted_as_a_terminal_fills_them():
    """Bug: a wide character or a combining mark moved all the numbers behind it."""
    assert [ledger.columns_of(text) for text in ("abc", "日本", "ｱ", "Ａ", "e\u0301", "👩", "")] == [
        3, 4, 1, 2, 1, 2, 0]
    assert ledger.visible("日本", 6) == "日本  " and ledger.visible("e\u0301", 3) == "e\u0301  "
    assert ledger.visible("日本語", 5) == "日本…" and ledger.visible("日本語", 4) == "日… "
    assert ledger.visible("日本語", 5, end=True) == "…本語"
    # What joins or turns text without being seen is shown by its number.
    assert ledger.visible("a\u200d\u202e", 14) == "a\\u200d\\u202e "


def test_compared_answers_stand_in_columns_whatever_their_script(road, tmp_path):
    mask = np.ones((2, 2), dtype=bool)
    record = {"pieces": [["?", "日", "本"], ["?", "a", "b"]], "rows": {
        "response_mask": mask, "kl": mask * 0.5, "rank": np.array([0, 1])}}
    *_, first, second, sums = ledger.side_by_side(record, 0, 1)
    assert [ledger.columns_of(line[: line.index(piece)]) for line, piece in (
        (first, "a"), (second, "b"), (sums, "sum  "))][:2] == [26, 26]


def test_a_terminal_of_another_code_page_shows_what_it_lacks_by_number(road, tmp_path):
    """Bug: on Windows a pipe is no UTF-8, and the first foreign character ended in a traceback."""
    run = malformed.looking.recorded(tmp_path)
    text = json.dumps({"step": 1, "batch_size": 3, "pieces": [list("ab日 d")] * 2})
    (run / "ledger" / "step_000001.json").write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "minirlhf.look.ledger", run], cwd=ROOT,
                          capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"\\u65e5" in done.stdout, done.stderr


def test_the_made_up_run_of_the_malformed_cases_is_whole(tmp_path, capsys):
    """Or each of them might be refused for another reason than its own."""
    run = str(malformed.looking.recorded(tmp_path))
    ledger.main([run])
    plot.main([run, "--save", str(tmp_path / "x.png")])
    plot.main([run, "--row", "1", "--save", str(tmp_path / "y.png")])
    microscope.main([run])
    assert "written: " in capsys.readouterr().out


def test_a_tensor_of_another_length_is_refused(tmp_path):
    """Bug: numbers a column beside their tokens, since a damaged record was taken as it came."""
    run = malformed.looking.recorded(tmp_path)
    malformed.looking.changed(rows__kl=np.zeros((2, 4)))(run)
    with pytest.raises(UserError, match=r"rows/kl has the shape \(2, 4\), expected \(2, 5\)"):
        ledger.load(run, 1)


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_the_record_of_compared_answers_is_that_of_the_data(stage, road, tmp_path):
    """Bugs: another answer's rank, prompt length, length or score beside an answer's tokens."""
    asked = ["cow?", "What does a pig say?", "Tell me the sound of a big old duck.", "And a bee, then?",
             "How does a dog go?", "Tell me what a cow says, what a dog says, and no more."]
    path = write_rows(tmp_path / "data.jsonl", [
        {"prompt": question, "output": ["Please: moo.", "moo", "baa, fool.", "fool"],
         "ranks": [0, 0, 1, 1]} for question in asked])
    _, records = recorded(stage, road, tmp_path / "run", data=path, num_epochs=3, held_out=0.1)
    data = {row["messages"][-1]["content"]: row for row in read_preferences(path)}
    for record in records.values():
        check_compared(stage, {k: torch.from_numpy(v) for k, v in record["rows"].items()}, road, data)


def check_compared(stage, rows, road, data):
    tok, sft = road.tokenizer, load_model(road.folder / "sft")[0]
    for i, (ids, mask) in enumerate(zip(rows["tokens"], rows["response_mask"])):
        text = tok.decode(ids[: rows["lengths"][i]])
        assert text.endswith("<|end|>") and text.count("<|end|>") == 2  # and no filler behind it
        prompt, answer = re.findall(r"(?:user|assistant).>(.*?)<.end.>", text)
        assert tok.decode(ids[1:][mask]) == answer + "<|end|>"
        answers, ranks = data[prompt]["answers"], data[prompt]["ranks"]
        rank = ranks[answers.index(answer)]
        assert rows["rank"][i] == (rank if stage == "rm" else min(rank, 1))
        if stage == "rm":
            assert rows["scores"][i] == rows["raw_scores"][i][mask][-1]
        else:
            close(rows["log_ratios"][i], rows["logprobs"][i] - rows["ref_logprobs"][i], atol=1e-6)
            close(rows["implicit_rewards"][i], 0.3 * rows["log_ratios"][i].sum(), rtol=1e-4)
            logits = sft(ids[None])[0, :-1]  # (T-1, V)
            want = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]  # (T-1,)
            close(rows["ref_logprobs"][i][mask], want[mask], rtol=1e-4, atol=1e-5)
    prompts = [tok.decode(ids[: mask.int().argmax() + 1])
               for ids, mask in zip(rows["tokens"], rows["response_mask"])]
    assert len(set(zip(prompts, rows["example"].tolist()))) == len(set(prompts)) == 4
    record = {"rows": {name: value.flip(0).numpy() for name, value in rows.items()}}
    for example in range(4):  # whatever their order in the file
        ranks = [record["rows"]["rank"][ledger.find_row(record, example, worst)]
                 for worst in (False, True)]
        assert ranks == [0, 1]


def test_what_an_update_without_steps_leaves_is_what_was_there(road, tmp_path):
    """Bug: what is recorded after the update stands a column beside what was recorded before."""
    _, records = recorded("ppo", road, tmp_path, lr=0.0, critic_lr=0.0)
    rows = {name: torch.from_numpy(value) for name, value in records[1]["rows"].items()}
    for name in ("values", "logprobs"):
        close(rows[f"new_{name}"], rows[name], rtol=1e-5, atol=1e-7)
    assert not rows["clipped"].any() and (rows["values"] != 0).any()


def test_the_first_and_each_nth_step_are_recorded(road, tmp_path):
    road.run("ppo", tmp_path, num_steps=5, ledger_every=2)
    assert ledger.recorded_steps(tmp_path) == [1, 2, 4]


def test_an_overwritten_run_leaves_no_old_steps(road, tmp_path):
    road.run("ppo", tmp_path, num_steps=3, ledger_every=1)
    road.run("ppo", tmp_path, num_steps=2, ledger_every=2, overwrite=True)
    assert ledger.recorded_steps(tmp_path) == [1, 2]


def test_the_terminal_shows_a_line_a_token_within_110_columns(road, tmp_path, capsys):
    _, records = recorded("ppo", road, tmp_path, lr=3e-3, num_epochs=3, stop_kl=0.0)
    rows = records[2]["rows"]
    # Some of its tokens are clipped, others not.
    row = next(row for row in range(4) if len(set(
        rows["clipped"][row][rows["response_mask"][row]].tolist())) == 2)
    capsys.readouterr()
    ledger.main([str(tmp_path), "--step", "2", "--row", str(row)])
    lines = capsys.readouterr().out.splitlines()
    pieces = records[2]["pieces"][row]
    assert max(map(len, lines)) <= 110
    for word in ("logprob", "ref", "kl", "reward", "value", "advant.", "whitened", "return",
                 "ratio", "clip"):
        assert word in lines[2].split()
    shown = [line for line in lines if re.match(r" +\d+ ", line)]
    assert len(shown) == len(pieces)
    assert [("response" in line) for line in shown[1:]] == (
        rows["response_mask"][row][: len(pieces) - 1].tolist())
    last, mask = shown[-1].split(), rows["response_mask"][row]
    clipped = [line.split()[-1] == "yes" for line in shown if "response" in line]
    assert clipped == rows["clipped"][row][mask].tolist()
    numbers = [float(word) for word in last[3:-1]]
    for value, name in zip(numbers, ("logprobs", "ref_logprobs", "kl", "rewards", "values",
                                     "advantages", "whitened_advantages", "returns", "ratio")):
        assert value == pytest.approx(rows[name][row][len(pieces) - 2], abs=5.1e-4), name
    (total,) = [line.split() for line in lines if line.startswith("sum ")]
    assert float(total[6]) == pytest.approx(rows["rewards"][row].sum(), abs=5.1e-4)


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_compared_answers_stand_side_by_side(stage, road, tmp_path, capsys):
    _, records = recorded(stage, road, tmp_path)
    ledger.main([str(tmp_path), "--step", "1", "--row", "1"])
    out = capsys.readouterr().out
    rows, pieces = records[1]["rows"], records[1]["pieces"]
    best, worst = (ledger.find_row(records[1], 1, worst) for worst in (False, True))
    assert rows["rank"][best] < rows["rank"][worst] and f"rank {rows['rank'][worst]}" in out
    for row in (best, worst):
        start = rows["response_mask"][row].argmax() + 1
        for piece in pieces[row][start:]:
            assert ledger.visible(piece, 14).strip() in out
    assert ("score" if stage == "rm" else "logratio") in out
    assert ("\nsum " in out) == (stage == "dpo")  # scores are no sums
    (prompt,) = [line for line in out.splitlines() if line.startswith("prompt: ")]
    assert prompt.endswith("<|assistant|>") and len(prompt) <= 110
    pieces[best][1] = "x" * 200  # of a long prompt its end is shown: what was answered
    (prompt,) = [line for line in ledger.side_by_side(records[1], best, worst)
                 if line.startswith("prompt: ")]
    assert prompt.startswith("prompt: …x") and prompt.endswith("<|assistant|>")


def test_control_characters_and_escape_codes_are_shown_not_obeyed():
    assert ledger.visible("\x1b[31m a\nb", 20).rstrip() == "\\x1b[31m·a\\nb"
    assert len(ledger.visible("x" * 50, 12)) == 12
    assert ledger.visible("abcdef", 4) == "abc…" and ledger.visible("abcdef", 4, end=True) == "…def"
    assert ledger.visible("abcd", 4, end=True) == "abcd"


def test_a_reader_that_has_seen_enough_is_no_error(road, tmp_path):
    recorded("ppo", road, tmp_path)
    done = subprocess.run(f"{sys.executable} -m minirlhf.look.ledger {tmp_path} | true", shell=True,
                          cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.stderr == ""


def test_mistakes_end_with_one_line(road, tmp_path, capsys):
    recorded("ppo", road, tmp_path)
    for options, says in ((["--step", "77"], "it holds 1, 2"), (["--row", "9"], "rows 0 to 3")):
        with pytest.raises(SystemExit) as stop:
            ledger.main([str(tmp_path), *options])
        assert stop.value.code == 2 and says in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no ledger"):
        ledger.load(road.folder, 1)


def test_colour_only_where_the_terminal_has_it(road, tmp_path):
    recorded("ppo", road, tmp_path)
    assert "\033[" not in ledger.show(tmp_path)
    coloured = ledger.show(tmp_path, colour=True)
    assert re.sub(r"\033\[\d+m", "", coloured) == ledger.show(tmp_path) != coloured


def test_samples_have_a_ledger_too(road, tmp_path):
    cfg = sample.Config(model=str(road.folder / "sft"), prompt="cow?", num_samples=3,
                        ledger=str(tmp_path), max_new_tokens=8, dtype="float32")
    sample.main(cfg)
    record = ledger.load(tmp_path, 1)
    assert record["batch_size"] == 3 and (record["rows"]["logprobs"] <= 0).all()
    assert (record["batch"]["entropy"] > 0).all()


def test_a_samples_log_probs_are_those_at_its_temperature(road, tmp_path):
    sample.main(sample.Config(model=str(road.folder / "sft"), prompt="cow?", temperature=0.6,
                              ledger=str(tmp_path), max_new_tokens=8, dtype="float32"))
    rows = {k: torch.from_numpy(v)[0] for k, v in ledger.load(tmp_path, 1)["rows"].items()}
    logits = load_model(road.folder / "sft")[0](rows["tokens"][None])[0, :-1] / 0.6  # (T-1, V)
    logprobs, mask = logits.log_softmax(-1), rows["response_mask"]
    close(rows["logprobs"][mask], logprobs.gather(1, rows["tokens"][1:, None])[:, 0][mask],
          rtol=1e-4, atol=1e-5)
    close(rows["entropy"][mask], -(logprobs.exp() * logprobs).sum(1)[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_heat_map_of_one_sequence(stage, road, tmp_path):
    recorded(stage, road, tmp_path)
    plot.main([str(tmp_path), "--row", "1", "--step", "1", "--save", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
