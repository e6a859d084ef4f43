"""Rows of demonstrations, preferences and prompts: what stands in them, and in what kind of file."""

import gzip
import json

from malformed import Case, write

USER, ANSWER = {"role": "user", "content": "cow?"}, {"role": "assistant", "content": "moo"}
SYSTEM = {"role": "system", "content": "Be brief."}
DEMO, PAIR = {"messages": [USER, ANSWER]}, {"prompt": "cow?", "chosen": "moo", "rejected": "baa"}
GOOD = {"sft": DEMO, "rm": PAIR, "dpo": PAIR, "ppo": {"prompt": "cow?"}, "sample": {"prompt": "a"}}


def command(stage, road, folder, path):
    """The command line of a stage that reads `path`."""
    at = road.folder
    return {"sft": ["train_sft.py", "--init", at / "pretrain", "--data", path],
            "rm": ["train_rm.py", "--init", at / "sft", "--data", path],
            "dpo": ["train_dpo.py", "--init", at / "sft", "--data", path],
            "ppo": ["train_ppo.py", "--init", at / "sft", "--reward_model", at / "rm",
                    "--prompts", path],
            "sample": ["sample.py", "--model", at / "sft", "--prompts", path]}[stage] + (
        ["--save", folder / "samples.jsonl"] if stage == "sample" else ["--out", folder / "run"])


def bad_row(name, stage, row, words):
    """A row (a dict, or a line as it stands) that is wrong in line 2 of an otherwise good file."""
    line = row if isinstance(row, str) else json.dumps(row)
    content = json.dumps(GOOD[stage]) + "\n" + line + "\n"
    return Case(f"{stage}: {name}", lambda road, folder: command(
        stage, road, folder, write(folder, "rows.jsonl", content)), words)


def bad_file(name, stage, file, content, words):
    """A file whose name or bytes are wrong."""
    return Case(f"{stage}: {name}", lambda road, folder: command(
        stage, road, folder, write(folder, file, content)), words)


def answer(**mark):
    return {"messages": [USER, {**ANSWER, **mark}]}


def parts(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


GOOD_LINE = json.dumps(DEMO) + "\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

CASES = [
    # Two shapes at a time
    bad_row("messages and instruction", "sft", {**DEMO, "instruction": "cow?", "output": "moo"},
            "found instruction, output beside messages"),
    bad_row("messages and an output", "sft", {**DEMO, "output": "baa"}, "output beside messages"),
    bad_row("messages and another prompt", "sft", {**DEMO, "prompt": "dog?"}, "prompt beside"),
    bad_row("messages and a pair", "sft", {**DEMO, "chosen": "a", "rejected": "b"},
            "chosen, rejected beside messages"),
    bad_row("instruction and text", "sft", {"instruction": "a", "output": "b", "text": "a b"},
            "text beside instruction, output"),
    bad_row("a pair and a list", "rm", {**PAIR, "output": ["moo", "baa"]}, "output beside"),
    bad_row("a list and half a pair", "dpo", {"prompt": "a", "output": ["b", "c"], "chosen": "b"},
            "chosen beside"),
    bad_row("a pair and a text", "rm", {**PAIR, "text": "cow? moo"}, "text beside"),
    bad_row("two prompts", "rm", {**PAIR, "query": "dog?"}, "exactly one of the keys"),
    bad_row("two prompts", "ppo", {"prompt": "a", "messages": [USER]}, "exactly one of the keys"),
    bad_row("an input without instruction", "ppo", {"prompt": "a", "input": "b"},
            "beside instruction only"),
    bad_row("a history without instruction", "dpo", {**PAIR, "history": [["a", "b"]]},
            "one way of writing a row"),
    # Standing instructions
    bad_row("two system texts", "sft", {"messages": [SYSTEM, USER, ANSWER], "system": "Shout."},
            "one system message"),
    bad_row("two system keys", "sft", {"instruction": "a", "output": "b", "system": "Shout.",
                                       "system_prompt": "Whisper."}, "one system message"),
    bad_row("a system that is no text", "ppo", {"prompt": "a", "system": 7}, "found 7"),
    bad_row("a system text in one answer only", "rm", {
        "chosen": [SYSTEM, USER, ANSWER], "rejected": [USER, ANSWER]}, "two that differ"),
    # Marks of turns
    bad_row("half a weight", "sft", answer(weight=0.5), "weight 0 or 1"),
    bad_row("a weight in words", "sft", answer(weight="0"), "found 0"),
    bad_row("train in words", "sft", answer(train="false"), "train true or false"),
    bad_row("train of null", "sft", answer(train=None), "found null"),
    bad_row("marks that contradict each other", "sft", answer(train=True, weight=0),
            "weight and train to agree"),
    bad_row("nothing left to train", "sft", answer(weight=0), "a turn that is to be trained"),
    bad_row("an answer that is not to be trained", "dpo", {**PAIR, "chosen": {**ANSWER,
                                                                             "train": False}},
            "marked as not to be trained"),
    # Scores, ranks, grades, labels
    bad_row("scores the other way round", "rm", {**PAIR, "score_chosen": 3, "score_rejected": 4},
            "the pair contradicts itself"),
    bad_row("one score of two", "dpo", {**PAIR, "chosen_score": 3}, "as two numbers"),
    bad_row("scores in words", "rm", {**PAIR, "chosen_rating": "4", "rejected_rating": "3"},
            "as two numbers"),
    bad_row("a tie that is ranked", "rm", {**PAIR, "ranks": [0, 1], "score_chosen": 4,
                                           "score_rejected": 4}, "ranks that agree"),
    bad_row("stars for a rating", "rm", {**PAIR, "rating": 1}, "a number doesn't say on what"),
    bad_row("an unknown rating", "dpo", {**PAIR, "rating": "good"}, "one of negligible"),
    bad_row("ranks that fall", "rm", {"prompt": "a", "output": ["b", "c"], "ranks": [1, 0]},
            "never fall"),
    bad_row("a rank of half", "rm", {"prompt": "a", "output": ["b", "c"], "ranks": [0, 0.5]},
            "whole numbers"),
    bad_row("ranks for others", "dpo", {"prompt": "a", "output": ["b", "c"], "ranks": [0]},
            "ranks as 2"),
    bad_row("grades of another size", "rm", {"prompt": "a", "output": ["b", "c"],
                                             "grades": [[0, 1]]}, "2 lists of 2"),
    bad_row("a label of 0", "sft", {**DEMO, "label": 0}, "else rename the key"),
    bad_row("a label of false", "sft", {**DEMO, "label": False}, "answers worth imitating"),
    # Messages
    bad_row("a picture", "sft", parts({"type": "image_url", "image_url": {"url": "x"}}),
            "in text parts only"),
    bad_row("a part without text", "sft", parts({"type": "text"}), "in text parts only"),
    bad_row("parts that are strings", "sft", {"messages": [{"role": "user", "content": ["cow?"]},
                                                           ANSWER]}, "to be a string"),
    bad_row("an empty list of parts", "sft", parts(), "to be a string"),
    bad_row("a call of a tool", "sft", {"messages": [USER, {"role": "assistant", "content": None,
                                                            "tool_calls": []}]}, "found null"),
    bad_row("ShareGPT's names of roles", "sft", {"messages": [{"role": "human", "content": "a"},
                                                              {"role": "gpt", "content": "b"}]},
            "found human"),
    bad_row("ShareGPT's keys", "sft", {"conversations": [{"from": "human", "value": "a"}]},
            "expected the key messages"),
    bad_row("a tool's turn", "sft", {"messages": [USER, {"role": "tool", "content": "4"}]},
            "found tool"),
    bad_row("one message, no list", "sft", {"messages": USER}, "wrap a lone message in a list"),
    bad_row("messages as a text of JSON", "sft", {"messages": json.dumps([USER, ANSWER])},
            "messages as a list"),
    bad_row("half a character", "sft", '{"messages": [{"role": "user", "content": "\\ud83d"}, '
            '{"role": "assistant", "content": "a"}]}', "whole characters"),
    bad_row("an answer of blanks", "dpo", {**PAIR, "rejected": "\u00a0\n"}, "to have text in it"),
    bad_row("a question of blanks", "ppo", {"prompt": "\t \r\n"}, "to have text in it"),
    bad_row("a transcript that ends with its answer", "ppo",
            {"prompt": "\r\n\r\nHuman: cow?\r\n\r\nAssistant: moo"}, "a prompt with the user"),
    bad_row("a transcript that the assistant opens", "ppo",
            {"prompt": "Human:\n\nAssistant: moo\n\nHuman: a"}, "to have text in it"),
    bad_row("a transcript without blank lines", "ppo",
            {"prompt": "Human: a\nAssistant: b\nHuman: c"}, "a blank line before each speaker"),
    bad_row("a transcript for an instruction", "sft", {
        "instruction": "Human: a\n\nAssistant: b\n\nHuman: c", "output": "d"}, "one question"),
    bad_row("transcripts of two questions", "rm", {
        "chosen": "Human: cow?\n\nAssistant: moo", "rejected": "Human: dog?\n\nAssistant: woof"},
        "two that differ"),
    bad_row("a history of single texts", "sft", {"instruction": "a", "output": "b",
                                                 "history": ["c"]}, "list of [user, assistant]"),
    bad_row("an answer that is a number", "sample", {"prompt": "cow?", "answer": 4}, "found 4"),
    bad_row("meta that is a list", "ppo", {"prompt": "cow?", "meta": []}, "meta as an object"),
    # JSON
    bad_row("a key twice", "sft", '{"messages": [], "messages": []}', '"messages" twice'),
    bad_row("a key twice in a message", "ppo", '{"messages": [{"role": "user", "content": "a", '
            '"content": "b"}]}', '"content" twice'),
    bad_row("NaN", "ppo", '{"prompt": "cow?", "score": NaN}', "found NaN"),
    bad_row("Infinity", "rm", '{"prompt": "a", "chosen": "b", "rejected": "c", "x": -Infinity}',
            "found -Infinity"),
    bad_row("a number too large for any machine", "ppo", '{"prompt": "cow?", "x": 1e999}', "1e999"),
    bad_row("a row in Python's quotes", "ppo", "{'prompt': 'cow?'}", "broken JSON"),
    bad_row("two rows in a line", "ppo", '{"prompt": "a"}{"prompt": "b"}', "broken JSON"),
    bad_row("a comma after the row", "ppo", '{"prompt": "a"},', "broken JSON"),
    bad_row("a list for a row", "ppo", '["cow?"]', "expected a JSON object, found a list"),
    bad_row("lists nested without end", "ppo", '{"prompt": ' + "[" * 10**5 + "]" * 10**5 + "}",
            "nested too deeply"),
    # Files
    bad_file("a JSON list", "sft", "rows.jsonl", json.dumps([DEMO], indent=1), "of a list"),
    bad_file("a JSON list in one line", "sft", "rows.jsonl", json.dumps([DEMO]), "of a list"),
    bad_file("a JSON list by its name", "sft", "rows.json", json.dumps([DEMO]), "one a line"),
    bad_file("one object over many lines", "sft", "rows.jsonl", json.dumps(DEMO, indent=1),
             "line 1: found broken JSON"),
    bad_file("a Git LFS pointer", "sft", "rows.jsonl", POINTER, "git lfs pull"),
    bad_file("a Git LFS pointer of a packed file", "rm", "rows.jsonl.gz", POINTER, "git lfs pull"),
    bad_file("UTF-16", "sft", "rows.jsonl", GOOD_LINE.encode("utf-16"), "found text in UTF-16"),
    bad_file("UTF-16 without its mark", "sft", "rows.jsonl", GOOD_LINE.encode("utf-16-le"),
             "bytes of something else"),
    bad_file("Latin-1", "ppo", "rows.jsonl", '{"prompt": "café"}'.encode("latin-1"),
             "line 1: expected UTF-8 text"),
    bad_file("a gzip file without its name", "sft", "rows.jsonl", gzip.compress(b"{}\n"),
             "doesn't end in .gz"),
    bad_file("no gzip file, but its name", "sft", "rows.jsonl.gz", GOOD_LINE, "whole gzip file"),
    bad_file("a gzip file packed twice", "sft", "rows.jsonl.gz",
             gzip.compress(gzip.compress(GOOD_LINE.encode())), "found a gzip file"),
    bad_file("a gzip file that breaks off", "dpo", "rows.jsonl.gz",
             gzip.compress(json.dumps(PAIR).encode())[:40], "breaks off"),
    bad_file("a zip archive under another name", "sft", "rows.jsonl", b"PK\x03\x04\x14\0\0\0rows",
             "a zip archive"),
    bad_file("a Parquet file under another name", "rm", "rows.jsonl", b"PAR1\x15\x04\x15\x10",
             "a Parquet file"),
    *[bad_file(f"a name in {end}", "sft", f"rows{end}", "x", words) for end, words in (
        (".csv", "as a JSON object"), (".tsv", "as a JSON object"), (".parquet", "export it"),
        (".xlsx", "export it"), (".zip", "unpack it"), (".txt", "rename or convert"),
        (".csv.gz", "as a JSON object"))],
    bad_file("nothing", "ppo", "rows.jsonl", "", "found an empty file"),
    bad_file("a byte-order mark and nothing else", "ppo", "rows.jsonl", b"\xef\xbb\xbf",
             "found an empty file"),
    bad_file("blank lines", "dpo", "rows.jsonl", "\n \r\n", "blank lines only"),
    bad_file("a header of CSV", "rm", "rows.jsonl", "prompt,chosen,rejected\na,b,c\n",
             "line 1: found broken JSON"),
    Case("sft: a folder for a file", lambda road, folder: command(
        "sft", road, folder, write(folder, "rows.jsonl/part", "x").removesuffix("/part")),
        "expected a readable file"),
]
