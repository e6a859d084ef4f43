"""Make every small wrong change to the code, one at a time, and count how many the tests notice.

    python tests/mutate.py                       (all mutants of all files: hours)
    python tests/mutate.py --sample 250          (a random sample of them, with an interval)
    python tests/mutate.py --files "minirlhf/losses.py" --list
    python tests/mutate.py --jobs 2

The planted bugs of `mutants.py` are known ones, each with its test; these mutants are nobody's
idea: `mutations.py` finds them in the library, the scripts and the toy data's makers. First the
whole suite runs once under coverage, in a scratch copy, to learn which tests execute which lines;
then, for each mutant, the tests that execute its line run, the quickest first, until one fails.
mutmut and cosmic-ray would start pytest, and import torch, afresh for each of some 4,000 mutants;
here each run is a fork of a process that has torch loaded, and takes a sixth of a second more than
its tests.

The rules of the score:
  killed      a covering test fails, by whatever error, or runs out of time (an endless loop)
  survived    the covering tests that fit into BUDGET seconds, quickest first, all pass
  uncovered   no test executes the line; counted with the survivors
  equivalent  survived, and `equivalent_mutants.txt` says why it changes nothing worth a test;
              the score is stated with these as survivors, and without them
A line that is executed in a subprocess counts as executed by the test that started it. A line that
runs only while its module is imported (a constant, a default) is covered by the tests that execute
a line where a name stands that it defines, or else any line of its file.
"""

import argparse
import collections
import fnmatch
import gc
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
from pathlib import Path

from covering import Covering, digest, fork, make_base, run_pytest, sources, traces
from mutations import mutants_of

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 20  # seconds of covering tests for each mutant
PATIENCE = 10  # CPU seconds that a mutant may take beyond five times what its tests take
LOADED = ("hypothesis", "matplotlib.pyplot", "numpy", "regex", "tiktoken", "torch", "transformers")


# ---------------------------------------------------------------- the mutants

def snapshot(folder):
    return {str(path): digest(path) for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


class Worker:
    """Tries mutants in a copy of the base that is its own."""

    def __init__(self, base):
        self.base, self.count = base, 0
        self.folder = Path(tempfile.mkdtemp(prefix="worker", dir=base.parent))
        self.renew()

    def renew(self):
        for name in ("tree", "road"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            shutil.copytree(self.base / name, self.folder / name)
        self.right = self.snapshot()

    def snapshot(self):
        return snapshot(self.folder / "tree") | snapshot(self.folder / "road")

    def attempt(self, mutant, tests, seconds):
        """(status, the test that failed, CPU seconds) of one mutant."""
        if not tests:
            return "uncovered", "", 0.0
        tree, before = self.folder / "tree", resource.getrusage(resource.RUSAGE_CHILDREN)
        path = tree / mutant.file
        right, times = path.read_text(encoding="utf-8"), path.stat()
        path.write_text(mutant.apply(right), encoding="utf-8")
        # Python takes a compiled file for that of any source of the same size and second.
        self.count += 1
        os.utime(path, (times.st_atime, times.st_mtime + self.count))

        def run():
            code, notes = run_pytest(tree, sorted({test.split("::")[0] for test in tests}),
                                     {test: rank for rank, test in enumerate(tests)},
                                     options=["-x"])
            return code, (notes.failed or ["no test ran"])[0]
        answer = fork(run, cpu_seconds=PATIENCE + 5 * seconds)
        path.write_text(right, encoding="utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        if self.snapshot() != self.right:  # the mutant wrote where no test does
            self.renew()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if isinstance(answer, str):
            return "killed", answer, used
        code, by = answer
        return ("survived", "", used) if code == 0 else ("killed", by, used)


def start_worker(base):
    global worker
    worker = Worker(base)


def attempt(job):
    mutant, tests, seconds = job
    return mutant, *worker.attempt(mutant, tests, seconds)


def try_all(jobs, num_workers, base):
    """[(mutant, status, the test that failed, CPU seconds)], also of a run that broke off before.

    Each verdict is written down at once, in a file named after all sources and tests.
    """
    paths = [base / "tree" / name for name in sources(base / "tree")]
    state = digest(*paths, *sorted((base / "tree/tests").glob("*.py")))
    path = ROOT / f"out/mutate/verdicts_{state[:12]}.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {place: verdict for place, *verdict in map(json.loads, rows)}
    place = lambda mutant: f"{mutant.file}:{mutant.start}-{mutant.end} {mutant.new}"
    results = [(job[0], *done[place(job[0])]) for job in jobs if place(job[0]) in done]
    jobs = [job for job in jobs if place(job[0]) not in done]
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    with multiprocessing.Pool(num_workers, start_worker, (base,)) as pool, open(path, "a", encoding="utf-8") as file:
        for result in pool.imap_unordered(attempt, jobs):
            results.append(result)
            mutant, status, by, used = result
            file.write(json.dumps([place(mutant), status, by, used]) + "\n")
            file.flush()
            print(f"{len(results)} {status:9} {used:5.1f} s  {mutant}  {by}", flush=True)
    return results


# ---------------------------------------------------------------- the report

def equivalents(text):
    """{(file, function, before, after): why} of blocks of four lines and more."""
    known = {}
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.strip().splitlines() if not line.startswith("#")]
        if lines:
            file, _, function = lines[0].partition(" | ")
            known[file, function, lines[1][2:], lines[2][2:]] = " ".join(lines[3:])
    return known


def key(mutant):
    return mutant.file, mutant.function, mutant.before, mutant.after


def report(results, total):
    """Print the table and the survivors; returns what is written as JSON."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from minirlhf.plumbing.stats import wilson

    count = collections.Counter((mutant.file, status) for mutant, status, _, _ in results)
    print(f"\n{'file':28} mutants  killed   score")
    for file in sorted({mutant.file for mutant, *_ in results}):
        n = sum(count[file, s] for s in ("killed", "survived", "uncovered", "equivalent"))
        print(f"{file:28} {n:7} {count[file, 'killed']:7} {count[file, 'killed'] / n:7.1%}")
    for status in ("survived", "uncovered", "equivalent"):
        print("".join(f"\n{status}: {mutant}" for mutant, s, _, _ in results if s == status))
    killed = sum(status == "killed" for _, status, _, _ in results)
    known = sum(status == "equivalent" for _, status, _, _ in results)
    scores = {}
    for name, n in (("score", len(results)), ("score_without_equivalents", len(results) - known)):
        low, high = wilson(killed, n)
        low, high = (killed / n,) * 2 if len(results) == total else (low, high)
        scores[name] = {"killed": killed, "of": n, "share": killed / n, "low": low, "high": high}
        print(f"{name}: {killed}/{n} = {killed / n:.1%}"
              + (f" (95% interval {low:.1%} to {high:.1%})" if len(results) < total else ""))
    used = sum(used for *_, used in results)
    print(f"{total} mutants in all; {used / len(results):.1f} CPU seconds each")
    return {**scores, "mutants": total, "tried": len(results), "cpu_seconds": used, "verdicts": [
        {"file": m.file, "function": m.function, "before": m.before, "after": m.after,
         "status": status, "by": by} for m, status, by, _ in results]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", default="*", help="only files of this pattern")
    parser.add_argument("--sample", type=int, default=0, help="a random sample of so many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tried at a time")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--out", default=str(ROOT / "out/mutate.json"))
    args = parser.parse_args(argv)
    mutants = [mutant for file in sources(ROOT)
               for mutant in mutants_of(file, (ROOT / file).read_text(encoding="utf-8"))]
    known = equivalents((ROOT / "tests/equivalent_mutants.txt").read_text(encoding="utf-8"))
    stale = known.keys() - {key(mutant) for mutant in mutants}
    if stale:
        print("\n".join(f"STALE  {' | '.join(entry)}" for entry in sorted(stale)))
        return 1
    mutants = [mutant for mutant in mutants if fnmatch.fnmatch(mutant.file, args.files)]
    total = len(mutants)
    if args.sample:
        mutants = random.Random(args.seed).sample(mutants, min(args.sample, total))
    if args.list:
        print("\n".join(map(str, mutants)))
        return 0

    os.environ["OMP_NUM_THREADS"] = "1"
    for name in LOADED:  # once, before the forks, which import the project from their copies
        importlib.import_module(name)
    gc.freeze()  # no fork has to look through all this for garbage
    old = json.loads(Path(args.out).read_text(encoding="utf-8"))["verdicts"] if Path(args.out).exists() else []
    killers = {(v["file"], v["function"], v["before"], v["after"]): v["by"] for v in old}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        tree = make_base(ROOT, base)
        covering = Covering(tree, traces(ROOT, tree))
        for test in covering.failed:
            print(f"fails without any mutant, left out: {test}", flush=True)
        jobs = [(mutant, *covering.within(BUDGET, mutant, killers.get(key(mutant))))
                for mutant in mutants if key(mutant) not in known]
        results = [(m, "equivalent", "", 0.0) for m in mutants if key(m) in known]
        results += try_all(jobs, args.jobs, base)
    results.sort(key=lambda result: (result[0].file, result[0].start))
    summary = report(results, total)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
