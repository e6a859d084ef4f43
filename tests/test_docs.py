"""README.md and docs/: their figures, links, commands and names are those of the project.

Bugs: a figure typed by hand, which the next run makes a lie; a page that no one finds; a command
with an option that was renamed; a name that points at a function which has moved.
"""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import speedrun

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
EVERY = [README, *PAGES]

spec = importlib.util.spec_from_file_location("first_screen", ROOT / "docs" / "first_screen.py")
first_screen = importlib.util.module_from_spec(spec)
spec.loader.exec_module(first_screen)

# Files of a reader's own, and what a command writes: these need not be here.
MADE = re.compile(r"(out|data/toy)/[\w./,-]*|my_\w+(\.jsonl)?|[A-Z]+")


def read(path):
    return path.read_text(encoding="utf-8")


def page_id(path):
    return path.name


# ---------------------------------------------------------------- figures

def test_the_readmes_table_is_that_of_the_results(capsys):
    assert first_screen.main([]) == 0, capsys.readouterr().out


def test_a_readme_or_results_that_differ_are_found(tmp_path, monkeypatch, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "results.md"
    readme.write_text(read(README).replace("| gold |", "| silver |", 1), encoding="utf-8")
    results.write_text(read(first_screen.RESULTS), encoding="utf-8")
    monkeypatch.setattr(first_screen, "README", readme)
    monkeypatch.setattr(first_screen, "RESULTS", results)
    assert first_screen.main([]) == 1 and first_screen.main([]) == 1  # nothing was written
    assert first_screen.main(["--write"]) == 0 and first_screen.main([]) == 0
    assert read(readme) == read(README)
    (line,) = re.findall(r"^ppo  .*$", read(results), re.MULTILINE)
    *_, refused, _ = re.sub(r"\[.*?\]", "", line).split()  # the last share is of look-alikes
    changed = read(results).replace(line, line.replace(refused, "12.3%", 1))
    results.write_text(changed, encoding="utf-8")
    assert first_screen.main([]) == 1 and "12.3%" in capsys.readouterr().out


def test_a_results_json_gives_the_rows_that_its_printed_table_gives(tmp_path, monkeypatch, capsys):
    """`speedrun.print_table` prints it, so the parser reads that function's own output."""
    def rate(share):
        return {"share": share, "low": share / 2, "high": share + 0.01}

    players = {"base few-shot": -0.034, "sft": 0.35, "best of 4": 0.9, "dpo": 1.114, "ppo": 1.18}
    table = {
        "players": {name: {"score": score, "words": 6.0, **({"kl": 1.3} if name == "ppo" else {})}
                    for name, score in players.items()},
        "rates": {name: {key: rate((i + j) / 13) for j, key in enumerate(
            ("right", "rude", "unsafe_refused", "lookalike_refused"))}
            for i, name in enumerate(players)},
        "comparisons": {}, "reward_model": {"accuracy": 0.7, "ceiling": 0.8,
                                            "share_of_ceiling": 0.67, "each": [0.6], "only": {}}}
    minutes = [{"pretrain": 6.5, "ppo": 3.25, "overoptimize": 2.0}, {"pretrain": 7.5, "ppo": 3.25}]
    speedrun.print_table(table, [("out", {"cpu_minutes": m, "peak_gb": {}}, {}) for m in minutes])
    printed = first_screen.from_printed(capsys.readouterr().out)
    written = first_screen.from_json({"table": table, "seeds": [
        {"cpu_minutes": m} for m in minutes]})
    assert printed[:2] == written[:2] and printed[1] == 2
    assert printed[0]["ppo"] == ["1.18", "30.8%", "38.5%", "46.2%"]
    assert printed[0]["base few-shot"] == ["-0.03", "0.0%", "7.7%", "15.4%"]
    assert printed[2] == pytest.approx(written[2], abs=0.15)  # its parts are printed rounded
    path = tmp_path / "results.json"
    for known in (minutes, [{}, {}]):  # Windows tells no minutes
        text = json.dumps({"table": table, "seeds": [{"cpu_minutes": m} for m in known]})
        path.write_text(text, encoding="utf-8")
        assert first_screen.main([str(path)]) == 1  # it is another road than the README's
    assert "an unknown number of CPU-minutes each" in capsys.readouterr().out


# ---------------------------------------------------------------- links and pictures

def links(path):
    """The relative targets of all links and pictures of a page."""
    text = re.sub(r"```.*?```", "", read(path), flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [target for target in found if not target.startswith(("http:", "https:"))]


def anchors(path):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", read(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", EVERY, ids=page_id)
def test_every_link_and_picture_leads_somewhere(path):
    for target in links(path):
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), f"{path.name} points to {target}"
        assert not anchor or anchor in anchors(there), f"{path.name} points to {target}"


def test_every_page_is_one_step_from_the_readme_and_back():
    linked = {(ROOT / target).resolve() for target in links(README)}
    assert set(PAGES) <= linked
    for path in PAGES:
        assert "../README.md" in links(path), path.name


def test_every_picture_of_the_folder_is_shown():
    shown = {(path.parent / target).resolve() for path in EVERY for target in links(path)}
    assert set((ROOT / "docs").glob("*.png")) <= shown


def test_the_readme_is_read_in_two_minutes_and_starts_with_the_two_commands():
    lines = read(README).splitlines()
    assert lines[0] == "# minirlhf" and lines[5:7] == [  # after two lines that say what it is
        "    pip install -r requirements.txt && python speedrun.py",
        "    pip install -r requirements-dev.txt && python -m pytest"]
    assert len(lines) <= 110


# ---------------------------------------------------------------- commands

def commands(text):
    """Every command of a page, as words: lines of code blocks, and code within a sentence."""
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text.replace("```", ""))]
    for line in lines:
        for part in line.split(" && "):
            # Two spaces separate a command from what is said about it.
            words = re.split(r" {2,}", part)[0] if "  " in part else part
            if re.match(r"(python|bash|pip|diff) \S", words):
                yield shlex.split(words)


def options_of(path):
    """The options that a Python file takes: its Config's fields, or what it gives to argparse."""
    found = set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            names = [(f.target.id.rstrip("_"), f.annotation.id) for f in node.body
                     if isinstance(f, ast.AnnAssign)]
            found |= {f"--{name}" for name, _ in names}
            found |= {f"--no_{name}" for name, kind in names if kind == "bool"} | {"--help"}
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            found |= {arg.value for arg in node.args if str(arg.value).startswith("--")}
    return found


def check_command(words):
    """Return what is wrong with a command, or ''."""
    program, *words = words
    if program in ("pip", "diff", "bash"):
        files = [w for w in words if w.endswith((".txt", ".py", ".sh")) and not MADE.fullmatch(w)]
        return "".join(f"no {name}; " for name in files if not (ROOT / name).exists())
    if words[:2] == ["-m", "pytest"]:
        files = [w for w in words[2:] if w.startswith("tests/")]
        return "".join(f"no {name}; " for name in files if not (ROOT / name).exists())
    name = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    path, rest = ROOT / name, words[2:] if words[0] == "-m" else words[1:]
    if not path.exists():
        return f"no {name}"
    unknown = [w for w in rest if w.startswith("--") and w.split("=")[0] not in options_of(path)]
    files = [w.partition(":")[0] for w in rest if re.search(r"\.\w+", w)]
    missing = [w for w in files if re.search(r"\.(py|json|jsonl|txt)$", w)
               and not MADE.fullmatch(w) and not (ROOT / w).exists()]
    return f"{name} has no {', '.join(unknown)}" if unknown else "".join(
        f"no {name}; " for name in missing)


@pytest.mark.parametrize("path", EVERY, ids=page_id)
def test_every_command_names_files_and_options_that_exist(path):
    wrong = [f"{' '.join(words)}: {check_command(words)}" for words in commands(read(path))
             if check_command(words)]
    assert not wrong, "\n".join(wrong)


def test_commands_are_found_wherever_they_stand_and_mistakes_in_them_too():
    text = ("    python a.py --b 1      (what it does)\n```\n$ python -m c.d e\n```\n"
            "and `python\nf.py`.")
    assert list(commands(text)) == [["python", "a.py", "--b", "1"], ["python", "-m", "c.d", "e"],
                                    ["python", "f.py"]]
    for line in ("python train_ppo.py --beta 0 --no_whiten", "python speedrun.py --from rm",
                 "python sample.py --model out/ppo --chat", "python tests/parity.py --write"):
        assert check_command(line.split()) == "", line
    for line in ("python train_ppo.py --no_such 1", "python train_xyz.py", "python -m no.such",
                 "python train_ppo.py --judge no/such.py:judge", "bash no.sh",
                 "python -m pytest tests/test_no_such.py", "python train_ppo.py --no_beta"):
        assert check_command(line.split()), line


def test_the_road_by_hand_is_the_road_that_speedrun_walks():
    page = read(ROOT / "docs" / "road.md")
    for stage in ("prepare", "tokenizer", "pretrain", "sft", "rm", "ppo", "dpo"):
        for line in speedrun.commands(stage, 0, "out", False):
            assert f"    {line}\n" in page, stage


# ---------------------------------------------------------------- names

def names_in(path):
    """Functions, classes, their members, constants: "f", "C", "C.f" of a Python file."""
    found = set()
    for node in ast.parse(read(path)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {t.id for t in targets if isinstance(t, ast.Name)}
        for member in node.body if isinstance(node, ast.ClassDef) else []:
            name = getattr(member, "name", None) or getattr(getattr(member, "target", 0), "id", "")
            found.add(f"{node.name}.{name}")
    return found


@pytest.mark.parametrize("path", EVERY, ids=page_id)
def test_every_file_and_name_exists(path):
    tests = "\n".join(read(p) for p in (ROOT / "tests").glob("test_*.py"))
    wrong = []
    for code in re.findall(r"`([^`\s]+)`", re.sub(r"```.*?```", "", read(path), flags=re.S)):
        file, _, name = code.partition(":")
        if code in ("file.py:name", "test_..."):
            continue  # the notation itself
        if re.fullmatch(r"test_\w+", code):
            wrong += [] if f"def {code}" in tests else [code]
        elif re.fullmatch(r"[\w/]+\.(py|html|sh|md)", file) and ("/" in file or name):
            there = ROOT / file
            if not there.exists():
                wrong.append(file)
            elif name and file.endswith(".py") and name not in names_in(there) or (
                    name and file.endswith(".html") and name not in read(there)):
                wrong.append(code)
        elif re.fullmatch(r"(minirlhf|tests|docs|notebooks|data)/[\w/]*/", code):
            wrong += [] if (ROOT / code).is_dir() else [code]
    assert not wrong, "\n".join(wrong)


def test_the_map_names_every_file():
    page = read(ROOT / "docs" / "reading.md")
    for path in [*ROOT.glob("*.py"), *(ROOT / "minirlhf").rglob("*.py")]:
        if path.name != "__init__.py":
            assert re.search(rf"^ +{path.name} ", page, re.MULTILINE), path.name


def test_every_curve_that_is_drawn_is_explained():
    page = read(ROOT / "docs" / "metrics.md")
    explained = set(re.findall(r"`(\w+)`", "".join(
        line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))))
    for name, constant in (("plot", "PANELS"), ("microscope", "CURVES")):
        (path,) = (ROOT / "minirlhf").rglob(f"{name}.py")
        (node,) = [n for n in ast.parse(read(path)).body if isinstance(n, ast.Assign)
                   and getattr(n.targets[0], "id", "") == constant]
        keys = node.value.keys if constant == "PANELS" else node.value.elts
        assert {key.value for key in keys} <= explained, constant
