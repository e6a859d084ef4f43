"""Which tests execute which lines: the whole suite once under coverage, a test file at a time.

`mutate.py` asks this for each mutant. A line that a subprocess executes counts as executed by the
test that started it, and what a fixture of a whole module executes, by all tests that use it. The
answers are kept in out/mutate/, and a test file is run again only if it, or any of the sources, has
changed.
"""

import collections
import hashlib
import importlib
import json
import os
import pickle
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

import mutations

LEFT_OUT = ("test_notebooks.py", "test_mutants.py", "test_mutate.py")  # they run whole suites


def sources(root):
    """The files that are mutated, relative to the root."""
    patterns = ("minirlhf/**/*.py", "*.py", "data/toy/*.py")
    return sorted(str(path.relative_to(root)) for p in patterns for path in root.glob(p))


def digest(*paths):
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


# ---------------------------------------------------------------- runs of pytest

def cpu_seconds():
    """Of this process and of those that it waited for: a busy machine makes no test slower."""
    return sum(os.times()[:4])


class Chosen:
    """A pytest plugin: keeps only the chosen tests, in their order, and notes what happens.

    chosen: {node id: rank}, or None for all; enter: called with the name of what runs next.
    """

    def __init__(self, chosen, enter):
        self.chosen, self.enter = chosen, enter
        self.seconds, self.fixtures = collections.Counter(), {}
        self.inner, self.uses, self.failed = 0.0, {}, []

    def pytest_collection_modifyitems(self, items):
        if self.chosen is not None:
            items[:] = sorted((item for item in items if item.nodeid in self.chosen),
                              key=lambda item: self.chosen[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        file, given = item.nodeid.split("::")[0], getattr(item, "callspec", None)
        self.uses[item.nodeid] = [f"{base} {name}" for name in item.fixturenames
                                  if not (given and name in given.params)  # by parametrize
                                  for base in ("", "tests", file)]
        self.enter(item.nodeid)
        start = cpu_seconds()
        result = yield
        self.seconds[item.nodeid] += cpu_seconds() - start
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        """All its users execute what a shared fixture does; its time is none of theirs alone."""
        if fixturedef.scope == "function":
            return (yield)
        test = os.environ["PYTEST_CURRENT_TEST"].rsplit(" ", 1)[0]
        name, start = f"{fixturedef.baseid} {fixturedef.argname}", cpu_seconds()
        outer, self.inner = self.inner, 0.0  # seconds of the fixtures that a fixture uses
        self.enter(name)
        try:
            return (yield)
        finally:
            took = cpu_seconds() - start
            self.fixtures[name] = took - self.inner
            self.seconds[test] -= self.fixtures[name]
            self.inner = outer + took
            self.enter(test)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid or "collection")


def fork(action, cpu_seconds=None):
    """Run action() in a fork; returns its result, "timed out" or "died"."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.setsid()  # its subprocesses end with it
            if cpu_seconds:
                resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + 1,) * 2)
                resource.setrlimit(resource.RLIMIT_AS, (16 << 30,) * 2)
            quiet = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(quiet, stream)
            answer = pickle.dumps(action())
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        # Waiting may take longer than computing: the machine may be busy, or a mutant asleep.
        ready, _, _ = select.select([pipe], [], [], cpu_seconds and 10 * cpu_seconds)
        answer = pipe.read() if ready else b""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    _, status = os.waitpid(child, 0)
    timed_out = not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (
        signal.SIGXCPU, signal.SIGKILL) and not answer)
    return pickle.loads(answer) if answer else "timed out" if timed_out else "died"


def run_pytest(tree, files, chosen=None, enter=lambda name: None, options=()):
    """Run tests in this process, which must be a fork; returns (exit code, the plugin's notes)."""
    import hypothesis

    # A counterexample is enough: no search for a smaller one, none kept for the next mutant.
    phases = hypothesis.Phase.explicit, hypothesis.Phase.generate
    hypothesis.settings.register_profile("mutate", database=None, derandomize=True, deadline=None,
                                         phases=phases)
    hypothesis.settings.load_profile("mutate")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # no test needs any, and they take long
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(tree.parent / "hypothesis")
    os.environ["MINIRLHF_ROAD"] = str(tree.parent / "road")  # tiny models, trained only once
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "tests")]
    plugin = Chosen(chosen, enter)
    code = pytest.main(["-q", "-o", "addopts=", "-p", "no:cacheprovider",
                        "--basetemp", str(tree.parent / "tmp"), *options, *files],
                       plugins=[plugin])
    return int(code), plugin


# ---------------------------------------------------------------- which tests execute which lines

COVERAGE = """[run]
data_file = {folder}/data
parallel = true
source = {tree}
omit = {tree}/tests/*
context = ${{PYTEST_CURRENT_TEST-}}
"""


def trace(tree, files):
    """What these test files' tests execute, and what they take:

    {"seconds": {test: seconds}, "fixtures": {test: {shared fixture: seconds}},
     "lines": {test: {file: [lines]}}, "imported": {file: [lines]}, "failed": [tests]}
    """
    import coverage

    folder = Path(tempfile.mkdtemp(dir=tree.parent))
    settings = folder / "settings"
    settings.write_text(COVERAGE.format(folder=folder, tree=tree), encoding="utf-8")
    os.environ["COVERAGE_PROCESS_START"] = str(settings)  # subprocesses note their test as context
    measure = coverage.Coverage(config_file=str(settings), context="here")
    measure.start()
    _, plugin = run_pytest(tree, files, enter=measure.switch_context)
    measure.stop()
    measure.save()
    measure.combine()
    users = collections.defaultdict(set)
    for test, fixtures in plugin.uses.items():
        for name in [test, *fixtures]:
            users[name].add(test)
    lines = {test: collections.defaultdict(list) for test in plugin.uses}
    imported = collections.defaultdict(list)
    for name in sources(tree):
        for line, contexts in measure.get_data().contexts_by_lineno(str(tree / name)).items():
            contexts = {re.sub(r"^here\|?| \((call|setup|teardown)\)$", "", c) for c in contexts}
            for test in set().union(*(users[context] for context in contexts)):
                lines[test][name].append(line)
            if "" in contexts:  # while pytest collected the tests
                imported[name].append(line)
    fixtures = {test: {name: plugin.fixtures[name] for name in names if name in plugin.fixtures}
                for test, names in plugin.uses.items()}
    return {"seconds": dict(plugin.seconds), "fixtures": fixtures, "lines": lines,
            "imported": imported, "failed": plugin.failed}


def make_base(root, folder):
    """A copy of the project and, beside it, a road of tiny models that no test walks again."""
    tree = folder / "tree"
    shutil.copytree(root, tree, ignore=shutil.ignore_patterns(
        ".git", "out", "notebooks", "__pycache__", ".hypothesis", ".pytest_cache", "*.png"))
    kept = root / f"out/mutate/road_{digest_of_base(tree)[:12]}"
    if not kept.exists():
        fork(lambda: walk(tree, kept.with_name("walking")))
        kept.with_name("walking").rename(kept)
    shutil.copytree(kept, folder / "road")
    files = [f"tests/{name}" for name in test_files(tree)]
    fork(lambda: run_pytest(tree, files, chosen={})[0])  # compiles the tests
    return tree


def walk(tree, folder):
    shutil.rmtree(folder, ignore_errors=True)
    sys.path[:0] = [str(tree), str(tree / "tests")]
    os.chdir(tree)
    importlib.import_module("tiny_road").Road(folder).walk()


def digest_of_base(tree):
    """Of all that the traces depend on, beside the test files."""
    return digest(*(tree / name for name in [*sources(tree), "tests/conftest.py",
                                             "tests/tiny_road.py"]))


def test_files(root):
    return [path.name for path in sorted((root / "tests").glob("test_*.py"))
            if path.name not in LEFT_OUT]


def traces(root, tree):
    """{test file: its trace}, from the cache where neither it nor the sources have changed."""
    path = root / "out/mutate/traces.json"
    base = digest_of_base(tree)
    cache = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = cache["files"] if cache.get("base") == base else {}
    for name in test_files(tree):
        now = digest(tree / "tests" / name)
        if found.get(name, {}).get("digest") != now:
            print(f"which lines does {name} execute?", flush=True)
            entry = fork(lambda: trace(tree, [f"tests/{name}"]))
            if isinstance(entry, str):
                raise SystemExit(f"{name} without any mutant: {entry}")
            found[name] = {"digest": now, **entry}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"base": base, "files": found}), encoding="utf-8")
    return {name: found[name] for name in test_files(tree)}


class Covering:
    """Answers which tests execute a mutant's line, the quickest first."""

    def __init__(self, tree, found):
        self.seconds, self.fixtures, self.failed = {}, {}, []
        self.lines = collections.defaultdict(set)  # {(file, line): tests}
        self.imported = set()  # the places that are executed while a module is imported
        for entry in found.values():
            self.seconds.update(entry["seconds"])
            self.fixtures.update(entry["fixtures"])
            self.failed += entry["failed"]
            for test, files in entry["lines"].items():
                for file, lines in files.items():
                    for line in lines:
                        self.lines[file, line].add(test)
            for file, lines in entry["imported"].items():
                self.imported.update((file, line) for line in lines)
        self.words = collections.defaultdict(set)  # {word: the lines in functions where it stands}
        self.defined = collections.defaultdict(set)  # {word: the names defined with its help}
        for file in sources(tree):
            text = (tree / file).read_text(encoding="utf-8")
            for number in mutations.lines_in_functions(text):
                for word in set(re.findall(r"\w+", text.splitlines()[number - 1])):
                    self.words[word].add((file, number))
            for names, words in mutations.definitions(text):
                for word in words:
                    self.defined[word] |= names

    def tests(self, mutant):
        """All tests of a mutant, the quickest first."""
        places, names = {(mutant.file, line) for line in mutant.lines}, set(mutant.names)
        if places & self.imported and not names:  # in a function that the import calls
            names.add(mutant.function.split(".")[-1])
        tests = set() if mutant.names else self.at(places)
        todo = list(names)
        while todo:
            for name in self.defined[todo.pop()] - names:
                names.add(name)
                todo.append(name)
        tests |= self.at(set().union(*(self.words[name] for name in names)))
        if mutant.names and not tests:
            tests = self.at({place for place in self.lines if place[0] == mutant.file})
        alone = lambda test: self.seconds[test] + sum(self.fixtures[test].values())
        return sorted(tests.difference(self.failed), key=alone)

    def at(self, places):
        return set().union(*(self.lines[place] for place in places if place in self.lines))

    def within(self, budget, mutant, first=None):
        """(its quickest tests, their seconds in all); `first`, which killed it before, first.

        One test runs however long it takes, then as many as fit; a shared fixture counts once.
        """
        chosen, spent, shared, total = [], 0.0, set(), 0.0
        for test in sorted(self.tests(mutant), key=lambda test: test != first):
            new = self.fixtures[test].keys() - shared
            seconds = self.seconds[test] + sum(self.fixtures[test][name] for name in new)
            spent += seconds * bool(chosen)
            if spent > budget:
                break
            chosen.append(test)
            shared |= new
            total += seconds
        return chosen, total
