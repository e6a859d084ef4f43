"""The planted bugs: all can still be planted, each check has some, and a sample of them is killed."""

import collections
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mutants
from planted_bugs import BUGS, Bug

ROOT = Path(__file__).resolve().parents[1]


def run(*options):
    done = subprocess.run([sys.executable, "tests/mutants.py", *options], cwd=ROOT,
                          capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.story)
def test_each_bug_can_be_planted(bug):
    """Its text stands in the source exactly once, and the test that must catch it exists."""
    assert mutants.stale(bug) == "" and bug.wrong != bug.text


def test_every_check_has_bugs_of_its_own():
    count = collections.Counter(bug.test[:13] for bug in BUGS)
    assert len(BUGS) >= 80
    for number in range(1, 39):
        assert count[f"test_check_{number:02d}"] >= 2, number


def test_every_check_is_a_test_that_tells_its_story():
    """Each number has a test whose docstring says what the bug is, how it shows, where it was seen."""
    stories = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for number, doc in re.findall(r'def test_check_(\d\d)_\w+\([^"]*?\):\n    """(.*?)"""',
                                      path.read_text(), re.S):
            if all(f"{word}: " in doc for word in ("Bug", "Curve", "Seen")):
                stories[int(number)] = doc
    assert sorted(stories) == list(range(1, 39))
    assert not any("to come" in doc for doc in stories.values())


def test_a_sample_of_the_bugs_is_killed():
    code, printed = run("--quick")
    killed, of = map(int, re.search(r"killed (\d+)/(\d+)", printed).groups())
    assert code == 0 and killed == of >= 19, printed


def write(path, *bugs):
    path.write_text("from planted_bugs import Bug\nBUGS = [" + ", ".join(map(repr, bugs)) + "]\n")
    return str(path)


def test_a_text_that_is_gone_fails_the_run(tmp_path):
    gone = Bug("minirlhf/rl.py", "no such line", "x", "test_check_15", "a bug of another age")
    code, printed = run("--bugs", write(tmp_path / "bugs.py", gone))
    assert code == 1 and "occurs 0 times" in printed and "killed" not in printed


def test_a_choice_of_no_bugs_fails_the_run():
    code, printed = run("--only", "no such story")
    assert code == 1 and "no bug" in printed and "killed" not in printed


def test_a_bug_that_does_not_run_is_no_kill(tmp_path):
    """Neither a syntax error, nor a name that is missing, nor the library's own shape contracts."""
    bugs = [Bug("minirlhf/rl.py", "def gae(", "def gae)(", "test_check_15", "a syntax error"),
            Bug("minirlhf/rl.py", "def gae(", "def gae_(", "test_check_15", "a missing name"),
            Bug("minirlhf/masked.py", "assert x.shape == mask.shape", "assert x.shape != mask.shape",
                "test_check_16", "a shape contract that never holds")]
    code, printed = run("--bugs", write(tmp_path / "bugs.py", *bugs))
    assert code == 1 and "killed 0/3" in printed
    assert printed.count("by no assertion of a test") == 3, printed
