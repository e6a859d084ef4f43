"""Every malformed input of the folder `malformed`: one message, exit code 2, nothing lost."""

import importlib
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from minirlhf.plumbing import runs

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 5  # of processor time, before a case counts as hanging
FILES = sorted(path.stem for path in (ROOT / "tests" / "malformed").glob("[a-z]*.py"))
CASES = [pytest.param(case, id=f"{name}: {case.name}") for name in FILES
         for case in importlib.import_module(f"malformed.{name}").CASES]


def run_command(words):
    """Run a script of this project, as its command line would, in this process."""
    path = ROOT / words[0]
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if words[0].startswith("data/"):  # a script that is no module
        spec = importlib.util.spec_from_file_location(name.replace(".", "_"), path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # where the comments of its Config are looked up
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(name)
    sys.argv = [str(word) for word in words]
    if hasattr(module, "Config"):
        from minirlhf.plumbing.config import command_line

        command_line(module.main, module.Config)
    else:
        module.main()


def seen(folder):
    """{path: content} of all files below a folder; None for what can't be read."""
    return {path: path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
            for path in folder.rglob("*")}


def too_slow(*_):
    pytest.fail(f"still at work after {SECONDS} seconds of processor time")


@pytest.mark.parametrize("case", CASES)
def test_malformed_input(case, road, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    words = case.argv(road, folder)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(ROOT)  # speedrun changes there
    before, made = seen(tmp_path), seen(road.folder)

    def trained(*_, **__):
        raise AssertionError("training began before the mistake was found")

    monkeypatch.setattr(runs.Run, "log", trained)
    capsys.readouterr()
    old = signal.signal(signal.SIGVTALRM, too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    started = time.process_time()
    try:
        with pytest.raises(SystemExit) as stop:
            run_command(words)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert case.words.replace("{folder}", str(folder)) in message
    assert time.process_time() - started < SECONDS
    assert seen(tmp_path) == before and seen(road.folder) == made


def test_the_tables_names_are_unique():
    names = [param.id for param in CASES]
    assert len(set(names)) == len(names)
