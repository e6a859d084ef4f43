"""Judges and other functions that users bring to evaluate.py."""

from malformed import Case, write


def judged(name, source, words, function="judge"):
    """A case of evaluate.py with this judge's file."""
    def argv(road, folder):
        path = write(folder, "my.py", source)
        return ["evaluate.py", "--models", "", "--against", road.folder / "sft", "--prompts",
                road.prompts, "--out", folder / "eval", "--judge", f"{path}:{function}"]
    return Case(name, argv, words)


def returning(value, before=""):
    return f"{before}\ndef judge(row, response, ended):\n    return {value}\n"


def plain(name, source, words):
    """A case of evaluate.py with a base model, whose plain prompts this file writes."""
    def argv(road, folder):
        path = write(folder, "my.py", source)
        return ["evaluate.py", "--models", "", "--against", road.folder / "sft", "--prompts",
                road.prompts, "--out", folder / "eval", "--judge", f"{road.tools}:judge",
                "--base", road.folder / "pretrain", "--plain", f"{path}:plain"]
    return Case(name, argv, words)


CASES = [
    judged("raises", returning("row['gold']"), "line 3: expected a function (row, response, ended)"),
    judged("raises for an empty answer", returning("1 / len(response)"), "ZeroDivisionError"),
    judged("leaves the program", returning("__import__('sys').exit(0)"), "found SystemExit: 0"),
    judged("leaves the program when loaded", "raise SystemExit\n", "{folder}/my.py, line 1"),
    judged("asserts without a word", returning("1", "assert False"), "AssertionError"),
    judged("an error of several lines", returning("open('a\\nb')"), "FileNotFoundError"),
    judged("calls itself for ever", returning("judge(row, response, ended)"), "RecursionError"),
    judged("returns nothing", "def judge(row, response, ended):\n    row\n", "found None"),
    judged("returns a text", returning("'good'"), "found good (str)"),
    judged("returns a number as a text", returning("'1.0'"), "found 1.0 (str)"),
    judged("returns NaN", returning("float('nan')"), "found nan (float)"),
    judged("returns infinity", returning("{'score': float('inf')}"), "found {'score': inf}"),
    judged("returns a bool", returning("ended"), "found True (bool)"),
    judged("returns a dict without a score", returning("{'gold': 1.0}"), "found {'gold': 1.0}"),
    judged("a score that is no number", returning("{'score': 'high'}"), "{'score': 'high'}"),
    judged("a score that is a bool", returning("{'score': ended}"), "{'score': True}"),
    judged("a score beyond all floats", returning("10**400"), "(int)"),
    judged("a further number is NaN", returning("{'score': 1, 'tone': float('nan')}"), "'tone': nan"),
    judged("a list of scores", returning("[1.0, 2.0]"), "found [1.0, 2.0] (list)"),
    judged("a tensor", returning("torch.ones(())", "import torch"), "(Tensor); mend the function"),
    judged("an array of one number", returning("np.ones(1)", "import numpy as np"), "(ndarray)"),
    judged("takes too few arguments", "def judge(row):\n    return 1.0\n", "TypeError"),
    judged("wants a fourth argument", "def judge(a, b, c, d):\n    return 1.0\n", "missing 1"),
    judged("names its arguments only", "def judge(*, row, response, ended):\n    return 1\n",
           "TypeError"),
    judged("a generator", "def judge(row, response, ended):\n    yield 1.0\n", "(generator)"),
    judged("a coroutine's factory", returning("(x for x in ())"), "(generator)"),
    judged("does not parse", "def judge(row:\n    return 1\n", "{folder}/my.py, line 1"),
    judged("mixes tabs and spaces", "if 1:\n\tx = 1\n        y = 1\n", "line 3"),
    judged("lacks an import", "import no_such_module\n", "No module named 'no_such_module'"),
    judged("is no function", "judge = 1.0\n", "expected judge to be a function, found 1.0"),
    judged("is a module", "import json as judge\n", "expected judge to be a function"),
    judged("is a class without a verdict", "class judge:\n    pass\n", "TypeError"),
    judged("defines another name", "def jugde(a, b, c):\n    return 1\n", "defines no function judge"),
    judged("an empty file", "", "defines no function judge"),
    judged("a binary file", b"\x00\x01\xff", "{folder}/my.py"),
    judged("another encoding", "judge = 'f\xfcnf'\n".encode("latin-1"), "SyntaxError"),
    judged("JSON in place of Python", '{"judge": null}\n', "NameError: name 'null'"),
    judged("no name after the colon", returning("1.0"), "is no function", function=""),
    judged("a name with a dot", returning("1.0"), "defines no function a.judge", function="a.judge"),
    judged("a name with a space", returning("1.0"), "defines no function", function=" judge"),
    Case("a judge's file that does not exist", lambda road, folder: [
        "evaluate.py", "--models=", "--against", road.folder / "sft", "--prompts", road.prompts,
        "--judge", f"{folder}/my.py:judge", "--out", folder / "eval"], "with a file that exists"),
    Case("a judge's folder", lambda road, folder: [
        "evaluate.py", "--models=", "--against", road.folder / "sft", "--prompts", road.prompts,
        "--judge", f"{folder}:judge", "--out", folder / "eval"], "is no function"),
    Case("the toy judge on foreign prompts", lambda road, folder: [
        "evaluate.py", "--models=", "--against", road.folder / "sft", "--prompts", road.prompts,
        "--judge", "data/toy/judge.py:judge", "--out", folder / "eval"],
        "this judge knows the toy world only"),
    Case("the toy judge on a task of another world", lambda road, folder: [
        "evaluate.py", "--models=", "--against", road.folder / "sft", "--prompts",
        write(folder, "p.jsonl", [{"prompt": "cow?", "task": "animals"}]),
        "--judge", "data/toy/judge.py:judge", "--out", folder / "eval"],
        'found the "task" animals'),
    plain("plain: returns nothing", "def plain(messages, few_shot):\n    pass\n", "found None"),
    plain("plain: returns tokens", "def plain(messages, few_shot):\n    return [1]\n", "found [1]"),
    plain("plain: takes a row", "def plain(row):\n    return 'x'\n", "TypeError"),
    plain("plain: an empty text", "def plain(messages, few_shot):\n    return ''\n", "a text to go on"),
    plain("plain: too long", "def plain(messages, few_shot):\n    return 'cow ' * 900\n",
          "takes up to"),
    plain("plain: only zero-shot is too long",
          "def plain(messages, few_shot):\n    return 'cow ' * (1 if few_shot else 900)\n",
          "takes up to"),
    plain("plain: half a character", "def plain(messages, few_shot):\n    return '\\udcff'\n",
          "that returns a text to go on with, found"),
]
