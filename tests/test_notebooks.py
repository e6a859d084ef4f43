"""The notebooks run from top to bottom, and their stored outputs are those of the code as it is."""

import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
sys.path.append(str(NOTEBOOKS))

import run  # noqa: E402

PATHS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_not_stale(path, capsys):
    assert run.main([path.name]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebooks_form(path):
    """Small cells, outputs stored, a size for the web, no path of the machine that ran it."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert path.stat().st_size < 500_000 and 20 <= len(code) <= 48
    for cell in code:
        lines = cell.source.splitlines()
        assert len(lines) <= 25 and max(map(len, lines)) <= 80, cell.source
        assert cell.execution_count and "%" != cell.source[0]
    text = "".join(str(cell.get("outputs", "")) for cell in code)
    assert "/tmp/" not in text and "/home/" not in text and "Warning" not in text
    headings = [line for cell in notebook.cells if cell.cell_type == "markdown"
                for line in cell.source.splitlines() if line.startswith("## ")]
    assert headings[-2:] == ["## Summary", "## Try it"]


def test_a_changed_cell_or_library_file_makes_a_notebook_stale(monkeypatch):
    notebook = nbformat.read(PATHS[0], as_version=4)
    assert run.why_stale(notebook) == ""
    sources = run.sources
    monkeypatch.setattr(run, "sources", lambda code: sources(code)[1:])  # as if one had changed
    assert run.why_stale(notebook) == "the files it imports"
    monkeypatch.undo()
    next(cell for cell in notebook.cells if cell.cell_type == "code").source += "\n1 + 1"
    assert run.why_stale(notebook) == "its code cells"


def test_a_notebooks_sources_are_found_through_other_files():
    found = {path.name for path in run.sources("import small_world")}
    assert {"small_world.py", "world.py", "judge.py", "train_ppo.py", "losses.py", "masked.py",
            "model.py", "config.py"} <= found
