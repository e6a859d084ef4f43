"""Imports run one way: the lesson, what serves it, what looks at it, the scripts. No circles."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LESSON = "batches generate losses masked model rl tokenizer"
MAY_IMPORT = {  # room -> the rooms that its files may import
    "lesson": {"lesson", "plumbing.errors", "plumbing.files", "plumbing.formats"},
    "plumbing": {"lesson", "plumbing"}, "look": {"lesson", "plumbing", "look"},
    "script": {"lesson", "plumbing", "look"},
}


def modules():
    """{name: path}: "model", "plumbing.runs", ..., and the scripts by their file names."""
    files = {".".join(path.relative_to(ROOT / "minirlhf").with_suffix("").parts): path
             for path in (ROOT / "minirlhf").rglob("*.py") if path.name != "__init__.py"}
    return {**files, **{path.name: path for path in ROOT.glob("*.py")}}


def imports(path):
    """The project's own modules that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    known = {f"minirlhf.{name}": name for name in modules()} | {
        name.removesuffix(".py"): name for name in modules()}
    return {known[name] for name in names if name in known}


def room(name):
    return "script" if name.endswith(".py") else name.split(".")[0] if "." in name else "lesson"


def test_imports_run_one_way():
    graph = {name: imports(path) for name, path in modules().items()}
    assert sorted(name for name in graph if room(name) == "lesson") == LESSON.split()
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError on a circle
    for name, used in graph.items():
        for other in used:
            assert {room(other), other} & MAY_IMPORT[room(name)], f"{name} imports {other}"
    assert not {"model"} & (graph["losses"] | graph["rl"] | graph["masked"])  # tensors in and out


if __name__ == "__main__":  # python tests/test_rooms.py prints who imports whom
    for name in graphlib.TopologicalSorter(
            {name: imports(path) for name, path in modules().items()}).static_order():
        print(f"{name:22} {' '.join(sorted(imports(modules()[name])))}")
