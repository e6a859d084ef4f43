"""Plant every known bug on purpose, and show that the test named after it fails.

    python tests/mutants.py                 (all of them)
    python tests/mutants.py --quick         (twenty of them, from all over the list, as CI does)
    python tests/mutants.py --only 15       (those of check 15, or whose story has the word)

A test that passes says little until it has been seen to fail. The folder `bugs` lists the bugs of
each module: a function, a text that occurs once in it, the wrong text, the test that must catch it,
a line of story. Here the tests first run on a scratch copy without any bug; then each bug is planted
into the copy, its test runs in a fork of this process (which has torch loaded already, but no file
of this project), and the copy is put right again.

A bug is killed by an assertion that a test makes about behaviour, be it `assert`, `assert_close` or
an exception that was expected and did not come. A test that stops with any other error says only
that the bug does not run, and counts as a survivor; so does a bug that only another test finds.
"""

import argparse
import ast
import functools
import os
import pickle
import re
import resource
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Verdict:
    """A pytest plugin that remembers the failures: [(test, a line of why, whether it is a kill)].

    seconds: how long each test takes, {node id: seconds}; the quick ones run first.
    """

    def __init__(self, tree, seconds):
        self.tree, self.seconds, self.failures, self.passed = tree, seconds, [], 0

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0))

    def pytest_runtest_makereport(self, item, call):
        if call.when == "call":
            self.seconds[item.nodeid] = call.duration
        if call.excinfo is None:
            self.passed += call.when == "call"
        elif not call.excinfo.errisinstance(pytest.skip.Exception):
            error = call.excinfo.value
            while isinstance(error, BaseExceptionGroup):  # several counterexamples of one property
                error = error.exceptions[0]
            # Who asserted? A shape contract within the library is no test's judgement.
            frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)
                      if frame.filename.startswith(str(self.tree))]
            by_test = bool(frames) and Path(frames[-1]).is_relative_to(self.tree / "tests")
            kill = isinstance(error, (AssertionError, pytest.fail.Exception)) and by_test
            why = (str(error).strip().splitlines() or [""])[0]
            self.failures.append((item.nodeid, f"{type(error).__name__}: {why}"[:100], kill))
            if kill:
                item.session.shouldstop = "one judgement is enough"

    def pytest_collectreport(self, report):
        if report.failed:
            self.failures.append((report.nodeid, str(report.longrepr)[-100:], False))


def tests_of(name, tree):
    """The test files that define tests whose name begins with `name`."""
    return sorted(str(path) for path in (tree / "tests").glob("test_*.py")
                  if re.search(rf"^def {name}", path.read_text(encoding="utf-8"), re.M))


def run_tests(tree, *names, seconds=()):
    """Run the tests whose names begin so (all tests, if none is given) in a fork of this process.

    The fork changes into the tree and imports the project from there, which this process has not.
    Returns (failures, how many tests passed, seconds); see Verdict.
    """
    files = sorted({file for name in names for file in tests_of(name, tree)})
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            os.chdir(tree)
            sys.path[:0] = [str(tree), str(tree / "tests")]
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            verdict = Verdict(tree, dict(seconds))
            # A survivor of its own test meets all the others, but neither this command's own tests
            # nor those of the notebooks, which fail at any change of what they import.
            choice = (["-k", " or ".join(names)] if names else
                      ["-k", "not mutants and not notebook", "-x"])
            pytest.main(["-q", "-o", "addopts=", "-p", "no:cacheprovider",
                         *(files or [str(tree / "tests")]), *choice], plugins=[verdict])
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump((verdict.failures, verdict.passed, verdict.seconds), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(answer) if answer else ([("?", "the process died", False)], 0, {})


def read_bugs(path):
    """All bugs of a folder of lists, or of one list, each with its file's name."""
    path, bugs = Path(path), []
    for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
        if file.name != "__init__.py":
            names = {}
            exec(file.read_text(encoding="utf-8"), names)
            bugs += [bug._replace(file=names["FILE"]) for bug in names["BUGS"]]
    return bugs


@functools.lru_cache(maxsize=None)
def spans(source):
    """{qualified name: [(start, end), ...]}, where the source of each function or class stands."""
    starts, found = [0], {"": [(0, len(source))]}
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}".lstrip(".")
                first = min(part.lineno for part in (child, *child.decorator_list))
                found.setdefault(name, []).append((starts[first - 1], starts[child.end_lineno]))
            visit(child, name)

    visit(ast.parse(source), "")
    return found


def plant(bug, tree):
    """Replace the bug's text in its function in the tree; returns the file's right text."""
    path = tree / bug.file
    right = path.read_text(encoding="utf-8")
    [(start, end)] = spans(right)[bug.function]
    wrong = right[start:end].replace(bug.text, bug.wrong)
    path.write_text(right[:start] + wrong + right[end:], encoding="utf-8")
    return right


def stale(bug):
    """Why the bug cannot be planted, or ''."""
    path = ROOT / bug.file
    if not path.exists():
        return "no such file"
    source = path.read_text(encoding="utf-8")
    places = spans(source).get(bug.function, [])
    if len(places) != 1:
        return (f"{bug.function} is defined {len(places)} times in {bug.file}" if places else
                f"no such function in {bug.file}: {bug.function}")
    count = source[slice(*places[0])].count(bug.text)
    if count != 1:
        return f"its text occurs {count} times in {bug.function or bug.file}, not once"
    if not tests_of(bug.test, ROOT):
        return f"no test begins with {bug.test}"
    return ""


def try_bug(bug, tree, seconds):
    """'' if the bug's own test kills it, else what happened."""
    right = plant(bug, tree)
    try:
        failures, *_ = run_tests(tree, bug.test, seconds=seconds)
        if any(kill for _, _, kill in failures):
            return ""
        if failures:
            return f"fails, but by no assertion of a test: {failures[0][0]}: {failures[0][1]}"
        failures, *_ = run_tests(tree, seconds=seconds)
        others = f"only {failures[0][0]} fails" if failures else "no test at all fails"
        return f"survives {bug.test}; {others}"
    finally:
        (tree / bug.file).write_text(right, encoding="utf-8")


def select(bugs, quick, only):
    if only:
        return [bug for bug in bugs if bug.test.startswith(f"test_check_{only}_") or
                bug.test == f"test_check_{only}" or only in bug.story]
    if quick:
        return bugs[:: -(-len(bugs) // 20)]
    return bugs


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="twenty bugs from all over the list")
    parser.add_argument("--only", default="", help="a check's number, or a word of the story")
    parser.add_argument("--bugs", default=ROOT / "tests/bugs",
                        help="other bugs (a folder of lists, or one list)")
    args = parser.parse_args(argv)
    listed = read_bugs(args.bugs)
    bugs = select(listed, args.quick, args.only)
    gone = [(bug, stale(bug)) for bug in listed if stale(bug)]
    for bug, why in gone:
        print(f"STALE  {bug.story}\n       {why}:\n       {bug.text!r}")
    if gone:
        return 1
    if not bugs:
        print(f"no bug of check {args.only}, and none whose story has this word")
        return 1

    import hypothesis, numpy, regex, tiktoken, torch  # noqa: loaded once, before the forks
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(
            ".git", "out", "__pycache__", ".hypothesis", ".pytest_cache", "*.png", "*.txt"))
        os.environ["MINIRLHF_ROAD"] = str(Path(folder) / "road")  # tiny models, trained only once
        failures, passed, seconds = run_tests(tree, *sorted({bug.test for bug in bugs}))
        if failures or not passed:
            print(f"WITHOUT any bug: {failures or 'no test ran'}")
            return 1
        print(f"without a bug all {passed} tests pass", flush=True)
        survivors = 0
        for bug in bugs:
            why = try_bug(bug, tree, seconds)
            survivors += bool(why)
            print(f"{'SURVIVES' if why else 'killed  '}  {bug.test.removeprefix('test_'):10} "
                  f"{bug.file} {bug.function}: {bug.story}" + (f"\n          {why}" if why else ""), flush=True)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = sum(u.ru_utime + u.ru_stime for u in used) / 60
    print(f"killed {len(bugs) - survivors}/{len(bugs)}   ({minutes:.1f} CPU-minutes)")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
