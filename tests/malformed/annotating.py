"""The toy world's commands: annotate.py, judge.py and prepare.py."""

from malformed import Case, write

TASK = {"skill": "sound", "brief": False, "capitals": False, "unsafe": False, "lookalike": False,
        "accepted": ["A cow says moo.", "Moo."]}
ROW = {"prompt": "What does a cow say?", "task": TASK,
       "samples": [{"text": "Moo.", "ended": True}, {"text": "Baa.", "ended": True}]}


def of(script, name, words, *options, file="s.jsonl", content=None, out="p.jsonl", **changes):
    """A case of annotate.py or judge.py: a row with some keys changed, or another content."""
    def argv(road, folder):
        row = {key: value for key, value in {**ROW, **changes}.items() if value is not None}
        path = write(folder, file, [ROW, row] if content is None else content)
        output = ["--out", folder / out] if script == "annotate" else []
        return [f"data/toy/{script}.py", path, *output, *options]
    return Case(f"{script}: {name}", argv, words)


def both(*args, **options):
    return [of(script, *args, **options) for script in ("annotate", "judge")]


def existing(name, file, content, words):
    """annotate.py is to write where something else is."""
    def argv(road, folder):
        write(folder, file, content)
        return ["data/toy/annotate.py", write(folder, "s.jsonl", [ROW]), "--out", folder / "p.jsonl"]
    return Case(f"annotate: {name}", argv, words)


CASES = [
    *both("an unknown option", "unrecognized arguments: --sede", "--sede"),
    *both("an empty file", "found an empty file", content=""),
    *both("blank lines", "found blank lines only", content="\n\n"),
    *both("broken JSON", "line 1: found broken JSON", content="{\n"),
    *both("a list", "expected one JSON object a line, found the beginning of a list", content="[1]\n"),
    *both("another format", "expected a name in .jsonl", file="s.txt"),
    *both("bytes", "expected UTF-8 text", content=b"\xff\n"),
    *both("no samples", "line 2: expected samples as a list", samples=None),
    *both("samples that are texts", "line 2: expected samples as a list", samples=["Moo."]),
    *both("samples without ended", "line 2: expected samples as a list",
          samples=[{"text": "Moo."}]),
    *both("an empty list of samples", "line 2: expected samples as a list", samples=[]),
    *both("no prompt", "exactly one of the keys prompt, messages", prompt=None),
    *both("no task", "row 2: this judge knows the toy world only", task=None),
    *both("a task in words", 'found the "task" animals', task="animals"),
    *both("a task of another skill", "row 2: this judge knows", task={**TASK, "skill": "chess"}),
    *both("a task without its kinds", "row 2: this judge knows", task={"skill": "sound"}),
    *both("a task that accepts a text", "row 2: this judge knows", task={**TASK, "accepted": "Moo."}),
    *both("a task of 99 members", "row 2: this judge knows",
          task={**TASK, "members": ["cat"], "kind": "animals", "count": 99}),
    of("annotate", "a temperature of zero", "--temperature 0.0: expected", "--temperature", "0"),
    of("annotate", "a temperature below zero", "--temperature -1.0", "--temperature=-1"),
    of("annotate", "a temperature that is NaN", "--temperature nan", "--temperature", "nan"),
    of("annotate", "a temperature without end", "--temperature inf", "--temperature", "inf"),
    of("annotate", "a temperature that overflows", "--temperature 1e-308", "--temperature", "1e-308"),
    of("annotate", "a temperature of words", "invalid float value: 'warm'", "--temperature", "warm"),
    of("annotate", "a seed of words", "invalid int value: 'x'", "--seed", "x"),
    of("annotate", "an option without a value", "expected one argument", "--seed"),
    of("annotate", "one answer a prompt", "no prompt has 2 different answers that ended",
       content=[{**ROW, "samples": ROW["samples"][:1]}]),
    of("annotate", "answers that did not end", "no prompt has 2 different answers that ended",
       content=[{**ROW, "samples": [{"text": t, "ended": False} for t in "ab"]}]),
    Case("annotate: no --out", lambda road, folder: [
        "data/toy/annotate.py", write(folder, "s.jsonl", [ROW])], "required: --out"),
    Case("annotate: no samples at all", lambda road, folder: [
        "data/toy/annotate.py", "--out", folder / "p.jsonl"], "required: samples"),
    Case("annotate: a missing file", lambda road, folder: [
        "data/toy/annotate.py", folder / "s.jsonl", "--out", folder / "p.jsonl"], "no such file"),
    Case("judge: a missing file", lambda road, folder: ["data/toy/judge.py", folder / "s.jsonl"],
         "{folder}/s.jsonl: no such file"),
    Case("judge: a folder", lambda road, folder: [
        "data/toy/judge.py", (folder / "s.jsonl").mkdir() or folder / "s.jsonl"],
        "expected a readable file"),
    of("annotate", "--out in another format", "p.txt: expected a name in .jsonl", out="p.txt"),
    of("annotate", "--out onto its own samples", "minirlhf did not write it", out="s.jsonl"),
    of("annotate", "--out below a file", "since {folder}/s.jsonl is a file", out="s.jsonl/p.jsonl"),
    existing("--out onto a diary", "p.jsonl", "dear diary\n", "minirlhf did not write it"),
    existing("--out onto people's preferences", "p.jsonl",
             [{"prompt": "cow?", "chosen": "moo", "rejected": "baa"}], "minirlhf did not write it"),
    existing("--out onto a folder", "p.jsonl/x", "", "p.jsonl is a folder"),
    Case("prepare: a seed of words", lambda road, folder: [
        "data/toy/prepare.py", "--seed", "x", "--out", folder / "toy"], "invalid int value: 'x'"),
    Case("prepare: an unknown option", lambda road, folder: [
        "data/toy/prepare.py", "--oout", folder / "toy"], "unrecognized arguments"),
    Case("prepare: an argument too many", lambda road, folder: [
        "data/toy/prepare.py", folder / "toy"], "unrecognized arguments"),
    Case("prepare: an empty --out", lambda road, folder: ["data/toy/prepare.py", "--out", ""],
         "expected a folder"),
    Case("prepare: --out is a file", lambda road, folder: [
        "data/toy/prepare.py", "--out", write(folder, "toy", "x")],
        "{folder}/toy can't be a folder"),
    *(Case(f"prepare: a foreign {name}", lambda road, folder, name=name: [
        "data/toy/prepare.py", "--out", write(folder, f"toy/{name}", "x") and folder / "toy"],
        f"{name} exists, and minirlhf did not write it")
      for name in ("pretrain.txt", "fewshot.txt", "prompts.jsonl")),
    Case("prepare: a folder in place of a file", lambda road, folder: [
        "data/toy/prepare.py", "--out",
        (folder / "toy" / "heldout.jsonl").mkdir(parents=True) or folder / "toy"], "is a folder"),
]
