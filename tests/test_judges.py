"""Functions that users bring: each fault of theirs is one line that says where and what."""

import copy
import re
import sys
from pathlib import Path

import pytest
from tiny_road import chat

from minirlhf.plumbing import judges
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.judges import load_function, load_judge, load_plain

TOY = Path(__file__).parent.parent / "data" / "toy"
ROW = {"messages": chat("What does a cow say?"), "answer": "moo", "meta": {"kind": "farm"}}


@pytest.fixture
def judge_file(tmp_path):
    """judge_file(source) -> the spec of the function `judge` in a file with that source."""
    def write(source):
        (tmp_path / "my.py").write_text(source, encoding="utf-8")
        return f"{tmp_path / 'my.py'}:judge"

    return write


def returning(expression, before=""):
    return f"{before}\ndef judge(row, response, ended):\n    return {expression}\n"


# ---------------------------------------------------------------- what is good

def test_a_judge_sees_row_answer_and_end(judge_file):
    judge = load_judge(judge_file(returning(
        '{"score": len(response) + 100 * ended, "kind": row["meta"]["kind"], "fine": ended}')), ROW)
    assert judge(ROW, "moo!", True) == {"score": 104.0, "kind": "farm", "fine": True}
    verdict = judge({**ROW, "meta": {"kind": "wild"}}, "", False)
    assert verdict == {"score": 0.0, "kind": "wild", "fine": False}
    assert type(verdict["score"]) is float


@pytest.mark.parametrize("expression, score", [
    ("1", 1.0), ("-0.5", -0.5), ("__import__('numpy').float32(0.5)", 0.5),
    ("__import__('fractions').Fraction(1, 4)", 0.25), ("{'score': 3}", 3.0), ("-10**300", -1e300)])
def test_a_plain_number_is_a_score(expression, score, judge_file):
    verdict = load_judge(judge_file(returning(expression)), ROW)(ROW, "moo", True)
    assert verdict == {"score": score} and type(verdict["score"]) is float


def test_a_judges_further_numbers_are_floats_and_its_flags_stay_flags(judge_file):
    verdict = load_judge(judge_file(returning('{"b": 2, "score": 1, "a": True}')), ROW)(
        ROW, "moo", True)
    assert list(verdict.items()) == [("b", 2.0), ("score", 1.0), ("a", True)]
    assert type(verdict["b"]) is float and verdict["a"] is True


def test_a_judge_of_any_kind_of_callable(judge_file):
    """Bug: a dataclass looks its module up where a module loaded by path is not."""
    source = '''
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Judge:
    weights: list = field(default_factory=lambda: [1.0])

    def __call__(self, row, response, ended):
        return {"score": self.weights[0] * len(response)}

judge = Judge()
'''
    try:
        verdict = load_judge(judge_file(source), ROW)(ROW, "moo", True)
    except UserError as error:
        pytest.fail(str(error))
    assert verdict == {"score": 3.0}


def test_two_files_of_one_name_are_two_judges_and_no_modules_of_ours(tmp_path):
    specs = []
    for name, score in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "json.py").write_text(returning(score), encoding="utf-8")
        specs.append(f"{tmp_path / name / 'json.py'}:judge")
    one, two = (load_judge(spec, ROW) for spec in specs)
    assert one(ROW, "", True)["score"] == 1 and two(ROW, "", True)["score"] == 2
    assert hasattr(sys.modules["json"], "dumps")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "json.py", "json.py"]


def test_a_judge_cannot_change_the_data(judge_file):
    """Bug: a judge that changes its row changes what is trained on and written."""
    row = copy.deepcopy(ROW)
    judge = load_judge(judge_file(returning(
        '1.0 + len(row.pop("answer", "")) + bool(row["meta"].update(seen=1))')), row)
    assert [judge(row, "moo", True)["score"] for _ in range(2)] == [4.0, 4.0] and row == ROW


def test_the_toy_judge_is_loaded_like_any_other():
    row = {"messages": chat("What does a cow say?"), "answer": None, "meta": {"task": {
        "skill": "sound", "brief": False, "capitals": False, "unsafe": False, "lookalike": False,
        "accepted": ["A cow says moo.", "Moo."]}}}
    judge = load_judge(f"{TOY / 'judge.py'}:judge", row)
    assert judge(row, "Sure! A cow says moo.", True)["score"] == 1.5
    with pytest.raises(UserError, match="knows the toy world only.*the keys answer, messages, meta"):
        load_judge(f"{TOY / 'judge.py'}:judge", ROW)
    for task in ("sum", {"skill": "sum"}, {**row["meta"]["task"], "skill": []},
                 {**row["meta"]["task"], "accepted": [3]}, {**row["meta"]["task"], "brief": 1},
                 {**row["meta"]["task"], "members": ["a"], "kind": "toys", "count": 99}):
        with pytest.raises(UserError, match='knows the toy world only.*found the "task"'):
            judge({**row, "meta": {"task": task}}, "Moo.", True)


# ---------------------------------------------------------------- what is not

@pytest.mark.parametrize("expression, found", [
    ("None", r"None \(NoneType\)"), ("'1.0'", r"1.0 \(str\)"), ("float('nan')", r"nan \(float\)"),
    ("float('inf')", r"inf \(float\)"), ("-float('inf')", r"-inf"), ("True", r"True \(bool\)"),
    ("10**400", r"\(int\)"), ("[1.0]", r"\(list\)"), ("(1.0,)", r"\(tuple\)"), ("1j", r"\(complex\)"),
    ("{}", r"\{\} \(dict\)"), ("{'gold': 1.0}", r"'gold'"), ("{'score': None}", r"'score': None"),
    ("{'score': '1'}", r"'score': '1'"), ("{'score': True}", r"'score': True"),
    ("{'score': float('nan')}", r"'score': nan"), ("{'score': [1.0]}", r"'score': \[1.0\]"),
    ("{'score': 1.0, 'tone': float('nan')}", r"'tone': nan"),
    ("{'score': 1.0, 'tone': 10**400}", r"'tone': 1000"), ("judge", r"function judge"),
    ("__import__('torch').tensor(1.0)", r"\(Tensor\)"), ("(x for x in [1.0])", r"\(generator\)")])
def test_a_verdict_that_is_none_is_refused_before_any_work(expression, found, judge_file):
    spec = judge_file(returning(expression))
    with pytest.raises(UserError) as refused:
        load_judge(spec, ROW)
    message = str(refused.value)
    assert message.startswith(f'{spec} on the prompt "What does a cow say?": expected a function '
                              "(row, response, ended) that returns")
    assert re.search(f"found .*{found}", message) and "\n" not in message


@pytest.mark.parametrize("source, words", [
    (returning("row['gold']"), "line 3: .*KeyError: 'gold'"),
    (returning("1 / len(response)"), "line 3: .*ZeroDivisionError"),  # of the empty answer
    ("def help(row):\n    raise OSError('a\\nb')\n" + returning("help(row)"), "line 2: .*OSError: a b"),
    (returning("__import__('sys').exit(0)"), "line 3: .*SystemExit: 0"),
    (returning("judge(row, response, ended)"), "line 3: .*RecursionError"),
    ("def judge(row):\n    return 1.0\n", r"TypeError: judge\(\) takes 1 positional"),
    ("def judge(row, response, ended, tone):\n    return 1.0\n", "TypeError: .*missing 1"),
    ("class judge:\n    pass\n", "TypeError"), ("from json import dumps as judge\n", "TypeError"),
    ("async def judge(row, response, ended):\n    return 1.0\n", r"\(coroutine\)"),
    ("def judge(row, response, ended):\n    yield 1.0\n", r"\(generator\)"),
])
@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_judge_that_fails_is_refused_with_its_line(source, words, judge_file):
    with pytest.raises(BaseException, match=words) as refused:
        load_judge(judge_file(source), ROW)
    assert isinstance(refused.value, UserError)  # and no SystemExit, which would end with code 0
    assert "\n" not in str(refused.value) and 'on the prompt "What does' in str(refused.value)


@pytest.mark.parametrize("source, words", [
    ("def judge(row:\n    return 1\n", "line 1: .*SyntaxError"),
    ("\n\nimport no_such_module\n", "line 3: .*ModuleNotFoundError: No module named 'no_such_mod"),
    ("from minirlhf import nothing_there\n", "line 1: .*ImportError"),
    ("import sys\nsys.exit(0)\n", "line 2: .*SystemExit: 0"), ("exit()\n", "SystemExit|NameError"),
    ("1 / 0\n", "line 1: .*ZeroDivisionError"), ("judge = 3\n", "judge to be a function, found 3"),
    ("x = 1\n", "defines no function judge"), ("", "defines no function judge"),
    ("\0", "null bytes"), ("if True:\njudge = 1\n", "line 2: .*IndentationError"),
])
def test_a_file_that_cannot_be_loaded_is_refused_with_its_line(source, words, judge_file, tmp_path):
    with pytest.raises(UserError, match=words) as refused:
        load_judge(judge_file(source), ROW)
    assert str(refused.value).startswith(str(tmp_path / "my.py")) and "\n" not in str(refused.value)


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "my.py").write_bytes("def judge(*a):\n    return 'fünf'\n".encode("latin-1"))
    with pytest.raises(UserError, match="my.py.*SyntaxError"):
        load_judge(f"{tmp_path / 'my.py'}:judge", ROW)


@pytest.mark.parametrize("spec", ["", ":", "judge", "judge.py", "missing.py:judge", "{}:judge",
                                  "{}/my.py:", "{}/my.py", ":judge", "{}/my.py:judge:more"])
def test_a_spec_that_names_no_function(spec, judge_file, tmp_path):
    judge_file(returning("1.0"))
    with pytest.raises(UserError, match="is no function; write it as file.py:name"):
        load_function(spec.format(tmp_path))


def test_a_fault_at_a_later_prompt_names_that_prompt(judge_file):
    judge = load_judge(judge_file(returning(
        'float("nan") if "dog" in row["messages"][-1]["content"] else 1.0')), ROW)
    assert judge(ROW, "moo", True)["score"] == 1
    long = chat("What does a dog say? " * 20)
    with pytest.raises(UserError, match=r'on the prompt "What does a dog .*\.\.\.": expected'):
        judge({"messages": long}, "woof", True)


def test_a_plain_prompt_is_made_from_the_messages(judge_file):
    plain = load_plain(judge_file(
        "def judge(messages, few_shot):\n    return few_shot * 'x ' + messages.pop()['content']\n"),
        ROW)
    assert plain(ROW, True) == "x What does a cow say?" and plain(ROW, False) == plain(ROW, True)[2:]
    for source in (returning("'x'"), "def judge(messages, few_shot):\n    return None\n"):
        with pytest.raises(UserError, match=r"expected a function \(messages, few_shot\) that"):
            load_plain(judge_file(source), ROW)


def test_what_is_shown_of_a_value_is_one_short_line():
    assert judges.shown("a\n b") == "a b" and judges.shown([1, 2]) == "[1, 2]"
    assert judges.shown("cow\udcff") == "cow\\udcff"
    assert judges.shown("x" * 80) == "x" * 80 and judges.shown("x" * 81) == "x" * 77 + "..."
