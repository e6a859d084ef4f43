"""The planted bugs: all can still be planted, each check has some, and a sample of them is killed."""

import collections
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mutants
from bugs import Bug

ROOT = Path(__file__).resolve().parents[1]
BUGS = mutants.read_bugs(ROOT / "tests/bugs")


def run(*options):
    done = subprocess.run([sys.executable, "tests/mutants.py", *options], cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8")
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.story)
def test_each_bug_can_be_planted(bug):
    """Its text stands in its function exactly once, and the test that must catch it exists."""
    assert mutants.stale(bug) == "" and bug.wrong != bug.text


def test_every_check_has_bugs_of_its_own():
    """At least two: enough to show that it bites. Other bugs are those of tests without a number."""
    count = collections.Counter(bug.test[: len("test_check_00")] for bug in BUGS
                                if bug.test.startswith("test_check_"))
    assert sorted(count) == [f"test_check_{number:02d}" for number in range(1, 39)]
    assert all(n >= 2 for n in count.values()), count


def test_each_list_is_named_after_its_module():
    for path in (ROOT / "tests/bugs").glob("[!_]*.py"):
        assert {Path(bug.file).stem for bug in mutants.read_bugs(path)} == {path.stem}


def test_every_check_is_a_test_that_tells_its_story():
    """Each number has a test whose docstring says what the bug is, how it shows, where it was seen."""
    stories = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for number, doc in re.findall(r'def test_check_(\d\d)_\w+\([^"]*?\):\n    """(.*?)"""',
                                      path.read_text(encoding="utf-8"), re.S):
            if all(f"{word}: " in doc for word in ("Bug", "Curve", "Seen")):
                stories[int(number)] = doc
    assert sorted(stories) == list(range(1, 39))
    assert not any("to come" in doc for doc in stories.values())


@pytest.mark.slow
def test_a_sample_of_the_bugs_is_killed():
    code, printed = run("--quick")
    killed, of = map(int, re.search(r"killed (\d+)/(\d+)", printed).groups())
    assert code == 0 and killed == of >= 19, printed


def write(folder, file, *bugs):
    """A folder with one list of bugs, those of the file."""
    folder.mkdir(exist_ok=True)
    (folder / f"{Path(file).stem}.py").write_text(
        f"from bugs import Bug\nFILE = {file!r}\nBUGS = [{', '.join(map(repr, bugs))}]\n", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("function, text, why", [
    ("gae", "no such line", "occurs 0 times in gae"), ("gae", "gamma", "times in gae, not once"),
    ("gea", "gamma", "no such function"), ("", "no such line", "occurs 0 times in minirlhf/rl.py"),
])
def test_a_text_that_is_gone_fails_the_run(function, text, why, tmp_path):
    gone = Bug(function, text, "x", "test_check_15", "a bug of another age")
    code, printed = run("--bugs", write(tmp_path / "bugs", "minirlhf/rl.py", gone))
    assert code == 1 and why in printed and "killed" not in printed


def test_a_bug_is_planted_in_its_function_alone(tmp_path):
    """The text may stand elsewhere in the file, decorators count, a nested function has its own."""
    source = ("x = a\n\n\nclass Model:\n    @wraps(a)\n    def forward(self):\n        return b\n"
              "\n    def score(self):\n        def inner():\n            return a\n"
              "        return inner\n")
    for function, line in (("Model.forward", 4), ("Model.score.inner", 10), ("Model.score", 10)):
        (tmp_path / "file.py").write_text(source, encoding="utf-8")
        bug = Bug(function, "a)" if line == 4 else "return a", "WRONG", "", "", "file.py")
        assert mutants.plant(bug, tmp_path) == source
        changed = (tmp_path / "file.py").read_text(encoding="utf-8").splitlines()
        assert [i for i, (one, other) in enumerate(zip(changed, source.splitlines()))
                if one != other] == [line]


def test_a_choice_of_no_bugs_fails_the_run():
    code, printed = run("--only", "no such story")
    assert code == 1 and "no bug" in printed and "killed" not in printed


@pytest.mark.slow
def test_a_bug_that_does_not_run_is_no_kill(tmp_path):
    """Neither a syntax error, nor a name that is missing, nor the library's own shape contracts."""
    bugs = [Bug("gae", "def gae(", "def gae)(", "test_check_15", "a syntax error"),
            Bug("gae", "def gae(", "def gae_(", "test_check_15", "a missing name")]
    write(tmp_path / "bugs", "minirlhf/rl.py", *bugs)
    path = write(tmp_path / "bugs", "minirlhf/masked.py", Bug(
        "masked_sum", "x.shape == mask.shape", "x.shape != mask.shape", "test_check_16",
        "a shape contract that never holds"))
    code, printed = run("--bugs", path)
    assert code == 1 and "killed 0/3" in printed
    assert printed.count("by no assertion of a test") == 3, printed
