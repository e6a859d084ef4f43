"""The mutator: its operators on small snippets, and its verdicts in a project of three files."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import mutate
from mutations import mutants_of

ROOT = Path(__file__).resolve().parents[1]


def wrong(text):
    """All that may become of the snippet, as a set of texts."""
    return {mutant.apply(text) for mutant in mutants_of("snippet.py", text)}


@pytest.mark.parametrize("text, expected", [
    ("a < b", {"a <= b"}),
    ("a == b != c", {"a != b != c", "a == b == c"}),
    ("a is not b", {"a is b"}),
    ("a not in b", {"a in b"}),
    ("(a) + (b)", {"(a) - (b)"}),
    ("a // b ** c", {"a * b ** c", "a // b * c"}),
    ("'text' + a", set()),
    ("-a", {"a"}),
    ("not a", {"a"}),
    ("a and b and c", {"a or b and c", "a and b or c"}),
    ("x.detach()", {"x", "pass"}),
    ("y = x.max(1)", {"y = x.min(1)", "y = x.max(2)"}),
    ("y = x.sum()", {"y = x.mean()"}),
    ("y = sum(x)", set()),
    ("y = min(x)", {"y = max(x)"}),
    ("y = f(a, k=b, m=c)", {"y = f(a, m=c)", "y = f(a, k=b)"}),
    ("y = f(k=b, m=c)", {"y = f(m=c)", "y = f(k=b)"}),
    ("y = f((a), k=b)", {"y = f((a))"}),
    ("f(a)", {"pass"}),
    ("n += 1", {"n -= 1", "n += 2", "pass"}),
    ("x[:n]", {"x[:(n) + 1]"}),
    ("x[-1]", {"x[1]", "x[-2]"}),
    ("x[i - 1]", {"x[i + 1]", "x[i - 2]", "x[i - 1 + 1]"}),
    ("y = 0.0", {"y = 1.0"}),
    ("y = 0.5, True", {"y = 1.0, True", "y = 0.5, False"}),
    ("y = a if b else c", {"y = a if (not (b)) else c"}),
    ("while a > 0: f()", {"while a >= 0: f()", "while a > 1: f()", "while (not (a > 0)): f()",
                          "while a > 0: pass"}),
    ("if a == b: c", {"if a != b: c"}),
    ("[a for a in b if c]", {"[a for a in b if (not (c))]"}),
    ("with torch.no_grad(): a", {"if True: a"}),
    ("with open(a) as f: b", set()),
])
def test_an_operator_makes_these_texts_and_no_others(text, expected):
    assert wrong(text) == expected


def test_decorators_and_defaults():
    text = "@torch.no_grad()\ndef f(x: Literal[3], y=2):\n    return x\n"
    assert wrong(text) == {text.replace("@torch.no_grad()", ""), text.replace("y=2", "y=3")}


@pytest.mark.parametrize("text", [
    '"""Said 3 > 2."""', "import a.b", "y: List[3]", "raise ValueError(a + b)", "print(a > 3)",
    "refuse(a > 3)", "y = f'{a + 3}'", "y = f(a, help=b[3])", "assert a, b[3]",
    'if __name__ == "__main__":\n    f(3)', "y = f(a, device=b)", "@dataclass\nclass A:\n    b: int"])
def test_what_is_left_out(text):
    assert wrong(text) == set()


def test_lines_keep_their_numbers_and_letters_of_two_bytes_move_nothing():
    text = 'y = f("ä", a < b,\n      k=c,\n      m=d)  # ü\nz = 1\n'
    for changed in wrong(text):
        assert changed.count("\n") == 4
    assert text.replace("<", "<=") in wrong(text)
    assert text.replace("      k=c,\n", "\n") not in wrong(text)
    assert any("k=c" not in changed and "m=d" in changed for changed in wrong(text))


def test_a_mutant_knows_its_function_and_its_lines():
    text = "LIMIT = (1,\n  2)\n\n\nclass A:\n    size: int = 3\n\n    def f(self):\n        g(4)\n"
    found = {(m.function, m.line, m.lines, m.names) for m in mutants_of("a.py", text)}
    assert found == {("", 1, (1, 2), ("LIMIT",)), ("", 2, (1, 2), ("LIMIT",)),
                     ("A", 6, (6,), ("size",)), ("A.f", 9, (9,), ())}


def test_equivalents_are_read_and_keep_their_reason():
    text = "# a comment\n\na.py | f\n- x < 3  # why\n+ x <= 3  # why\nNever\nequal.\n"
    assert mutate.equivalents(text) == {("a.py", "f", "x < 3  # why", "x <= 3  # why"):
                                        "Never equal."}
    assert mutate.equivalents("a.py | \n- N = 1\n+ N = 2\nOh.") == {
        ("a.py", "", "N = 1", "N = 2"): "Oh."}


# ---------------------------------------------------------------- a whole run

TOY = {
    "minirlhf/toy.py": """
        LIMIT = 3


        def clip(x):
            if x > LIMIT:
                x = LIMIT
            return x


        def rest(n):
            while n >= 2:
                n -= 2
            return n


        def unused(x):
            return x * 2
        """,
    "tests/conftest.py": "",
    "tests/tiny_road.py": """
        class Road:
            def __init__(self, folder):
                folder.mkdir(parents=True)

            def walk(self):
                pass
        """,
    "tests/test_toy.py": """
        import subprocess, sys
        from minirlhf import toy


        def test_clip():
            assert toy.clip(1) == 1 and toy.clip(5) == 3


        def test_rest():
            assert toy.rest(5) == 1


        def test_that_fails_anyway():
            assert toy.unused(1) == 3
        """,
    "tests/equivalent_mutants.txt": """
        minirlhf/toy.py | clip
        - if x > LIMIT:
        + if x >= LIMIT:
        The limit itself stays the limit.
        """,
}


def mutate_toy(folder, *options):
    for name, text in TOY.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
    code = (f"import sys, pathlib; sys.path.insert(0, {str(ROOT / 'tests')!r}); import mutate; "
            f"mutate.ROOT = pathlib.Path({str(folder)!r}); mutate.PATIENCE = 1; "
            f"mutate.LOADED = ('hypothesis',); "
            f"sys.exit(mutate.main({[*options, '--out', str(folder / 'found.json')]!r}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder,
                          env={**os.environ, "PYTHONPATH": ""}, encoding="utf-8")
    return done.returncode, done.stdout + done.stderr


def test_a_run_kills_what_a_test_notices_and_judges_the_rest(tmp_path):
    code, printed = mutate_toy(tmp_path)
    assert code == 0, printed
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    status = {(v["before"], v["after"]): (v["status"], v["by"]) for v in found["verdicts"]}
    clip, rest = "tests/test_toy.py::test_clip", "tests/test_toy.py::test_rest"
    assert status == {
        ("LIMIT = 3", "LIMIT = 4"): ("killed", clip),
        ("if x > LIMIT:", "if (not (x > LIMIT)):"): ("killed", clip),
        ("if x > LIMIT:", "if x >= LIMIT:"): ("equivalent", ""),
        ("while n >= 2:", "while (not (n >= 2)):"): ("killed", rest),
        ("while n >= 2:", "while n > 2:"): ("survived", ""),
        ("while n >= 2:", "while n >= 3:"): ("survived", ""),
        ("n -= 2", "pass"): ("killed", "timed out"),
        ("n -= 2", "n += 2"): ("killed", "timed out"),
        ("n -= 2", "n -= 3"): ("killed", rest),
        ("return x * 2", "return x / 2"): ("uncovered", ""),
        ("return x * 2", "return x * 3"): ("uncovered", ""),
    }
    assert found["score"]["killed"] == 6 and found["score"]["of"] == 11
    assert found["score_without_equivalents"]["of"] == 10
    assert "test_that_fails_anyway" in printed and "killed  " in printed
    assert (tmp_path / "minirlhf/toy.py").read_text(encoding="utf-8").startswith("LIMIT = 3")
    code, printed = mutate_toy(tmp_path, "--sample", "4", "--list")
    assert code == 0 and printed.count("minirlhf/toy.py:") == 4


def test_a_stale_equivalent_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(TOY, "tests/equivalent_mutants.txt",
                        "minirlhf/toy.py | clip\n- if x > 3:\n+ if x >= 3:\nGone.\n")
    code, printed = mutate_toy(tmp_path)
    assert code == 1 and "STALE  minirlhf/toy.py | clip | if x > 3:" in printed
