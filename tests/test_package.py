"""On any computer: the package installed, text read and written as UTF-8 whatever the system's own
encoding is."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for pattern in ("*.py", "minirlhf/**/*.py", "data/**/*.py", "docs/*.py",
                                    "notebooks/*.py", "tests/**/*.py")
               for path in ROOT.glob(pattern))
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


# ---------------------------------------------------------------- text is UTF-8

def literals(node):
    """All strings that stand in an expression, joined: "ab" if x else "wb" is "abwb"."""
    return "".join(part.value for part in ast.walk(node)
                   if isinstance(part, ast.Constant) and isinstance(part.value, str))


def mode_of(call, place):
    """The mode that a call opens a file in, None where it gives none."""
    named = [word.value for word in call.keywords if word.arg == "mode"]
    given = named or call.args[place : place + 1]
    return literals(given[0]) if given else None


def leaves_encoding_open(call):
    """Whether a call reads or writes text in the system's own encoding."""
    owner = getattr(getattr(call.func, "value", None), "id", "")  # of a plain `owner.name(...)`
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    method, named = isinstance(call.func, ast.Attribute), {word.arg for word in call.keywords}
    if {"encoding", None} & named:  # None: **options
        return False
    if name in ("read_text", "write_text"):  # without an owner: minirlhf.plumbing.files.write_text
        return method and len(call.args) <= (name == "write_text")
    if name in ("NamedTemporaryFile", "TemporaryFile", "fdopen"):
        mode = mode_of(call, int(name == "fdopen"))
        return mode is not None and "b" not in mode
    if name == "open" and owner == "gzip":
        return "t" in (mode_of(call, 1) or "")
    if name == "open" and owner not in ("os", "Tokenizer", "tokenizer", "tarfile"):
        mode = mode_of(call, 0 if method and owner != "io" else 1)
        return mode is None or "b" not in mode
    return name in ("run", "Popen", "check_output") and any(
        word.arg == "text" and getattr(word.value, "value", None) is True for word in call.keywords)


def open_places(source):
    return [(node.lineno, ast.unparse(node)[:80]) for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call) and leaves_encoding_open(node)]


def test_every_text_file_is_opened_as_utf8():
    """Bug: on Windows a file is read in the code page of the country, and é becomes Ã©."""
    wrong = [f"{path.relative_to(ROOT)}:{line}: {call}" for path in FILES
             for line, call in open_places(path.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("code, found", [
    ("open(path)", True), ("open(path, 'w')", True), ("open(path, mode='a')", True),
    ("path.open()", True), ("path.open('w')", True), ("path.read_text()", True),
    ("path.write_text(text)", True), ("io.open(path)", True), ("gzip.open(path, 'wt')", True),
    ("tempfile.NamedTemporaryFile('w')", True), ("subprocess.run(words, text=True)", True),
    ("road.run(stage, out, text=text)", False),
    ("open(path, 'rb')", False), ("open(path, 'ab' if start else 'wb')", False),
    ("open(path, encoding='utf-8')", False), ("path.open('rb')", False), ("os.open(path, 0)", False),
    ("gzip.open(path)", False), ("path.read_text('utf-8')", False), ("path.read_bytes()", False),
    ("path.write_text(text, encoding='utf-8')", False), ("write_text(path, text)", False),
    ("tempfile.NamedTemporaryFile()", False), ("subprocess.run(words)", False),
    ("subprocess.run(words, text=True, encoding='utf-8')", False), ("Tokenizer.open(where)", False)])
def test_the_search_finds_what_it_should(code, found):
    assert bool(open_places(code)) == found


USE_IT = """
import runpy, sys
from pathlib import Path
root, folder = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(root))
for name in sys.argv[3:]:
    sys.argv = [name, "--help"]
    sys.path.insert(1, str((root / name).parent))
    try:
        runpy.run_path(str(root / name), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, name
import torch
from minirlhf.look import ledger, microscope, plot
from minirlhf.plumbing import files, formats
from minirlhf.tokenizer import Tokenizer
tok = Tokenizer.train("déjà vu " * 40, 265)
tok.save(folder / "tokenizer.json")
assert Tokenizer.load(folder / "tokenizer.json").decode(tok.encode("déjà")) == "déjà"
files.write_jsonl(folder / "rows.jsonl.gz", [{"prompt": "où?"}] * 2)
assert formats.read_prompts(folder / "rows.jsonl.gz")[0]["messages"][0]["content"] == "où?"
files.write_jsonl(folder / "metrics.jsonl", [{"step": i, "loss": 1 / i} for i in range(1, 5)])
(folder / "config.json").write_text("{}", encoding="utf-8")
ids, mask = tok.encode_chat([{"role": "user", "content": "où"},
                             {"role": "assistant", "content": "là"}])
ledger.Ledger(folder, tok, every=1).record(1, lambda: {
    "tokens": torch.tensor([ids]), "lengths": torch.tensor([len(ids)]),
    "response_mask": torch.tensor([mask[1:]]), "token_losses": torch.zeros(1, len(ids) - 1)})
ledger.main([str(folder)]), microscope.main([str(folder)])
plot.draw_curves(folder)
print("all is well")
"""


def test_no_script_leaves_an_encoding_to_the_system(tmp_path):
    """Every script as far as its --help, the library's files written and read, where Python itself
    warns of each encoding that is left open; other people's packages may do as they like."""
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-W", "always::EncodingWarning", "-c",
         USE_IT, ROOT, tmp_path, *SCRIPTS, "data/toy/prepare.py", "data/toy/annotate.py",
         "docs/first_screen.py"], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.endswith("all is well\n"), done.stderr[-3000:]
    ours = [line for line in done.stderr.splitlines() if "EncodingWarning" in line
            and line.startswith((str(ROOT), "<string>"))]
    assert not ours, "\n".join(ours)


# ---------------------------------------------------------------- the package

def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_package_needs_what_the_scripts_are_tested_with():
    """Bug: a requirement is added to one list only, and `import minirlhf` fails elsewhere."""
    pinned = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text(
        encoding="utf-8").splitlines() if line and not line.startswith("#"))
    needed = dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in project()["dependencies"])
    assert set(needed) == set(pinned)
    numbers = lambda version: [int(part) for part in version.split(".")]
    assert numbers(pinned["torch"]) >= numbers(needed["torch"].removeprefix(">="))


def test_whatever_the_package_imports_is_in_the_standard_library_or_listed():
    needed = {re.match(r"[\w-]+", line)[0] for line in project()["dependencies"]} | {"minirlhf"}
    for path in (ROOT / "minirlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                first = name.partition(".")[0]
                assert first in sys.stdlib_module_names | needed | {"safetensors"}, (
                    f"{path}: {name}")


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.path[1]), module.__file__
from minirlhf.look import microscope
assert "the data alone" in microscope.page("the data alone")
print(len(sys.argv) - 1, "modules")
"""


@pytest.mark.slow
def test_a_wheel_is_the_package_and_nothing_else(tmp_path):
    """Bugs: the page's template is left behind; tests and data are installed beside the library."""
    missing = [name for name in ("setuptools", "pip") if not importlib.util.find_spec(name)]
    if missing or int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("THE WHEEL IS NOT BUILT: it takes pip, and setuptools 77 or later")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"  # pip leaves build/ and an egg-info in what it builds
    subprocess.run(["git", "clone", "--quiet", ROOT, source], check=True)
    for name in ("pyproject.toml", *(p.relative_to(ROOT) for p in (ROOT / "minirlhf").rglob("*")
                                     if p.suffix in (".py", ".html"))):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"minirlhf-{project()['version']}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / "minirlhf").rglob("*")
              if path.suffix in (".py", ".html")}
    assert {name for name in names if ".dist-info/" not in name} == inside
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", tmp_path / "installed",
                    wheel], check=True)
    modules = [re.sub(r"/__init__|\.py$", "", name.removesuffix(".py")).replace("/", ".")
               for name in sorted(inside) if name.endswith(".py")]
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *modules], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
                          capture_output=True, text=True, encoding="utf-8")
    assert done.stdout == f"{len(modules)} modules\n", done.stderr[-3000:]
