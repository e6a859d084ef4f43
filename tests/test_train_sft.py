"""Supervised fine-tuning: what is encoded, what is trained, and that it learns."""

import dataclasses

import pytest
import torch
from tiny_road import (CHAT, LONG, PROMPTS, answers_of, begin, chat, logprobs_of, loss_of, polite,
                       rude, sampled_texts, share, start, template, watch, with_dropout,
                       without_preflight, write_rows)

import train_sft
from conftest import close
from minirlhf.plumbing.checkpoints import load_model


def test_check_11_sft_weighs_tokens_alike_in_training_and_in_evaluation(road, tmp_path, float64):
    """Bug: a mean of the rows' means where a mean over tokens is meant (a short answer's tokens
    weigh more), a mean over the filler too, 0 / 0 where no token counts, NaN times a mask of 0.

    Curve: loss and gradient norm shrink with the share of filler, or one step turns all into NaN.
    Seen: verl#2377, a mean of x * mask let NaN leak in; open-instruct#1685, a row without any
    token gave 0 / 0; trl#6439, truncated tokens still counted in the denominator.
    """
    model, rows, run = start("sft", road, tmp_path)
    nats = [[-logp for logp, trained in zip(logprobs_of(model, ids, 1), mask[1:]) if trained]
            for ids, mask in rows]
    tokens = torch.stack(sum(nats, [])).mean()
    of_means = torch.stack([torch.stack(row).mean() for row in nats]).mean()
    assert abs(tokens - of_means) > 1e-3
    close(loss_of("sft", model, rows, run), tokens)
    for micro in (0, 1, 3):
        cfg = dataclasses.replace(run.cfg, micro_batch_size=micro)
        found = train_sft.evaluate(model, rows, cfg, run)["val_loss"]
        assert found == pytest.approx(tokens.item(), rel=1e-9)


def test_check_13_a_dialogue_that_is_cut_trains_whole_answers_only(road, tmp_path):
    tok, texts = road.tokenizer, ("cow?", polite("moo"), "What does a dog say?", rude("woof"))
    cfg = road.config("sft", tmp_path, too_long="cut")
    whole, _ = tok.encode_chat(chat(*texts))
    first, last = (tok.encode(text) + [tok.end_id] for text in texts[1::2])
    turn, _ = tok.encode_chat(chat(*texts[2:]))
    for max_len in range(len(last) + 5, len(whole) + 1):
        [(ids, mask)] = train_sft.encode([{"messages": chat(*texts)}], tok, max_len, cfg)
        if len(turn) <= max_len:
            assert ids == (whole if max_len == len(whole) else turn)
        else:
            assert ids[:2] == [tok.begin_id, tok.user_id] and len(ids) <= max_len
        trained = [one for one, counts in zip(ids, mask) if counts]
        kept = first if max_len == len(whole) else []  # none without its question
        assert trained == kept + last and mask[-len(last) :] == [True] * len(last)


def test_check_14_sft_trains_every_assistant_turn_with_its_end_and_nothing_else(road, tmp_path):
    """Bug: the template's tokens come twice or not at all (two begin tokens, a second end token),
    or the mask covers one assistant turn only, or the users' turns too.

    Curve: none in training, the loss even falls faster on a second end token; the model meets other
    prompts when it is used than those it was trained on.
    Seen: OpenRLHF#393, template and tokenizer gave Llama 3 two begin tokens; trl#4908, DPO appended
    a second end token; trl#1185, the mask of several turns paired them wrongly.
    """
    tok = road.tokenizer
    [(ids, mask)] = train_sft.encode([{"messages": CHAT}], tok, 200, road.config("sft", tmp_path))
    assert list(zip(ids, mask)) == template(tok, CHAT)
    assert ids.count(tok.begin_id) == 1 and ids.count(tok.end_id) == len(CHAT)
    assert not any(a == b == tok.end_id for a, b in zip(ids, ids[1:]))
    batch = train_sft.make_batch([(ids, mask)], "cpu")
    said = tok.decode(batch["tokens"][0, 1:][batch["mask"][0]])
    assert said == "moo<|end|> woof\n<|end|><|end|> is text<|end|>"


def test_check_23_the_sft_loss_is_the_mean_over_all_trained_tokens_of_the_batch(road, tmp_path,
                                                                               monkeypatch):
    """Bug: a count of all tokens, of rows, or of the filler too."""
    without_preflight(monkeypatch)
    batches, make_batch = [], train_sft.make_batch
    monkeypatch.setattr(train_sft, "make_batch", lambda examples, device:
                        batches.append(examples) or make_batch(examples, device))
    history = road.run("sft", tmp_path / "run", dtype="float32", lr=0.0, batch_size=40,
                       micro_batch_size=16)
    model = load_model(road.folder / "pretrain")[0]

    def nats(examples):  # without any filler
        total, count = 0.0, 0
        for ids, mask in examples:
            logps = model(torch.tensor([ids]))[0].log_softmax(-1)  # (T, V)
            for t in range(1, len(ids)):
                total -= logps[t - 1, ids[t]].item() * mask[t]
                count += mask[t]
        return total / count

    # The micro-batches of the only step, the held-out one.
    *micro, held_out = batches
    assert [len(rows) for rows in micro] == [16, 16, 6] and len(held_out) == 2
    assert history[0]["loss"] == pytest.approx(nats(sum(micro, [])), rel=1e-5)
    assert history[0]["val_loss"] == pytest.approx(nats(held_out), rel=1e-5)


@pytest.mark.parametrize("micro", [0, 3])
def test_check_31_the_held_out_loss_of_sft_is_a_mean_over_trained_tokens(micro, road, tmp_path,
                                                                         double):
    run = begin("sft", road, tmp_path, micro_batch_size=micro)
    rows = train_sft.read_demonstrations(run.cfg.data)[::5]
    examples = train_sft.encode(rows, run.tokenizer, 64, run.cfg)
    model, _ = load_model(with_dropout(road.folder / "sft", tmp_path / "dropout"))
    plain, _ = load_model(road.folder / "sft")
    nats = []
    for row in rows:
        ids, start = answers_of({"messages": row["messages"][:-1],
                                 "answers": [row["messages"][-1]["content"]]}, run.tokenizer)
        nats += (-logprobs_of(plain, ids[0], start)).tolist()
    result = train_sft.evaluate(model.train(), examples, run.cfg, run)["val_loss"]
    assert result == pytest.approx(sum(nats) / len(nats), rel=1e-9) and model.training


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
    assert len(whole) > 64 and len(ids) == len(mask) <= 64
    assert ids[:2] == [run.tokenizer.begin_id, run.tokenizer.user_id]  # no turn without its role
    read = run.tokenizer.decode([i for i, m in zip(ids, mask) if not m])
    question = read.removeprefix("<|begin|><|user|>").removesuffix("<|end|><|assistant|>")
    assert question == contents[-2] or contents[-2] == LONG and LONG.strip().endswith(question)
    trained = [i for i, m in zip(ids, mask) if m]
    assert run.tokenizer.decode(trained) == "Please: moo.<|end|>"
    assert mask == sorted(mask)
    assert short == run.tokenizer.encode_chat(rows[1]["messages"])
    # The mask that the loss uses stands one column to the left.
    batch = train_sft.make_batch([(ids, mask), short], "cpu")
    for row, m, (ids, mask) in zip(batch["tokens"], batch["mask"], ((ids, mask), short)):
        assert row[1:][m].tolist() == [i for i, trained in zip(ids, mask) if trained]


def test_check_14_a_turn_that_is_marked_as_not_to_be_trained_is_read_only(road, tmp_path, capsys):
    """Bug: "weight": 0 on an assistant message was read over, and its answer imitated."""
    turns = chat("cow?", "moo, fool.", "dog?", "woof")
    turns[1]["weight"] = 0
    data = write_rows(tmp_path / "marked.jsonl", [{"messages": turns}])
    run = begin("sft", road, tmp_path, data=data)
    rows = train_sft.read_demonstrations(data)
    [(ids, mask)] = train_sft.encode(rows, run.tokenizer, 64, run.cfg)
    assert run.tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "woof<|end|>"
    assert ids == run.tokenizer.encode_chat(chat("cow?", "moo, fool.", "dog?", "woof"))[0]
    turns = chat("cow? " * 30, "moo", "dog?", "woof")  # the trained answer goes with its question
    rows = [{"messages": [*turns[:3], {**turns[3], "train": False}]}]
    run.cfg.too_long = "cut"
    assert train_sft.encode(rows, run.tokenizer, 64, run.cfg) == []
    assert "| 0 dialogues" in (printed := capsys.readouterr().out) and ", 1 left out" in printed


def test_what_a_cut_takes_is_counted_by_kind(road, tmp_path, capsys):
    """Bug: a dialogue that lost its standing instruction was reported like one that is whole."""
    system, long = [{"role": "system", "content": "Answer in one word."}], "What does it say? " * 15
    rows = [{"messages": m} for m in (
        chat("cow?", "moo"), system + chat(long, "moo", "cow?", "moo"),
        chat(long, "moo", "cow?", "moo"), [{**system[0], "content": long}] + chat("cow?", "moo"),
        chat(long, "moo"), chat("cow?", "moo, " * 40))]
    run = begin("sft", road, tmp_path, too_long="cut")
    examples = train_sft.encode(rows, run.tokenizer, 64, run.cfg)
    assert [run.tokenizer.decode(ids) for ids, _ in examples[:4]] == [
        "<|begin|><|user|>cow?<|end|><|assistant|>moo<|end|>",
        "<|begin|><|system|>Answer in one word.<|end|><|user|>cow?<|end|><|assistant|>moo<|end|>",
        *["<|begin|><|user|>cow?<|end|><|assistant|>moo<|end|>"] * 2]
    assert ("5 dialogues of " in (printed := capsys.readouterr().out) and printed.endswith(
        ", 1 left out (longer than 64 tokens); cut to fit: 1 lost the beginning of the last "
        "question, 1 lost the system turn, 2 lost turns\n"))


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


def test_no_held_out_dialogue_begins_like_one_that_is_trained_on(road, tmp_path, monkeypatch):
    """Bug: rows were held out, not prompts: 22% of the held-out prompts of the toy's demonstrations
    were also trained on. Nor does a longer dialogue begin with a held-out question."""
    rows = [chat(f"Question {i % 12}?", f"Answer {i}.", *(["And?", f"More {i}."] if i % 5 == 0 else []))
            for i in range(60)]
    data = write_rows(tmp_path / "data.jsonl", [{"messages": row} for row in rows])
    held_out, measure = [], train_sft.evaluate
    monkeypatch.setattr(train_sft, "evaluate", lambda model, examples, *rest:
                        held_out.extend(examples) or measure(model, examples, *rest))
    encoded = watch(monkeypatch, train_sft, "encode")
    road.run("sft", tmp_path / "run", data=data, held_out=0.25, eval_every=100)
    every, begins = encoded[0][1], {}
    for ids, _ in every:
        begins.setdefault(tuple(ids[: ids.index(road.tokenizer.assistant_id)]), []).append(ids)
    out = [ids for ids, _ in held_out]
    assert len(begins) == 12 and len(out) == 15  # three questions with their five dialogues each
    assert all(all(ids in out for ids in group) or not any(ids in out for ids in group)
               for group in begins.values())
