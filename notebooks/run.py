"""Execute the notebooks, each in a fresh kernel, and report the times.

    python notebooks/run.py              (all; fails where a cell fails or a notebook is stale)
    python notebooks/run.py 05 --write   (store the outputs of notebook 05, and what they came from)

A stored notebook carries a hash of its code cells, and one of the library and script files that it
imports, directly or through others. It is stale where either has changed since its outputs were
stored: a reader on the web would then see outputs that the code no longer gives.
"""

import argparse
import ast
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SEARCHED = [ROOT, HERE, ROOT / "data" / "toy"]  # where an imported name may be a file of ours


def code_of(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def imported(code):
    """The files of this project that a piece of code imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = [folder / (name.replace(".", "/") + ".py") for name in names for folder in SEARCHED]
    return {path for path in paths if path.exists()}


def sources(code):
    """All files of this project behind a notebook's code, sorted."""
    found, new = set(), imported(code)
    while new:
        found |= new
        texts = [known.read_text(encoding="utf-8") for known in new]
        new = {path for text in texts for path in imported(text)} - found
    return sorted(found)


def fingerprint(notebook):
    """{"code": hash of the code cells, "sources": hash of the files behind them}."""
    code = code_of(notebook)
    files = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources(code)))
    return {"code": hashlib.sha256(code.encode()).hexdigest()[:16],
            "sources": files.hexdigest()[:16]}


def why_stale(notebook):
    """What has changed since the outputs were stored, or ''."""
    stored, now = notebook.metadata.get("minirlhf", {}), fingerprint(notebook)
    changed = [name for name in now if stored.get(name) != now[name]]
    return " and ".join({"code": "its code cells", "sources": "the files it imports"}[name]
                        for name in changed)


def execute(notebook):
    """Run all cells in a fresh kernel, in the notebooks' folder; raises CellExecutionError."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", PYTHONHASHSEED="0")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as folder:
        # Over files and not over ports: a machine without any network can execute them too.
        files = {"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}}
        transport = Config(files if os.name == "posix" else {})
        NotebookClient(notebook, timeout=300, kernel_name="python3", config=transport,
                       resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.metadata.pop("execution", None)  # clock times: they would differ on every run
        cell.outputs, outputs = [], cell.get("outputs", [])
        for output in outputs:  # a kernel cuts what is printed into chunks as it happens to
            last = cell.outputs[-1] if cell.outputs else {}
            if output.output_type == last.get("output_type") == "stream" and (
                    output.name == last.name):
                last.text += output.text
            else:
                cell.outputs.append(output)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="how the notebooks' names begin (default: all)")
    parser.add_argument("--write", action="store_true", help="store outputs and fingerprints")
    args = parser.parse_args(argv)
    paths = [path for path in sorted(HERE.glob("[0-9]*.ipynb"))
             if not args.names or path.name.startswith(tuple(args.names))]
    failed, start = [], time.time()
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        problem = "" if args.write else why_stale(notebook)
        problem = problem and f"STALE: {problem} changed; run it with --write"
        begin = time.time()
        try:
            execute(notebook)
        except CellExecutionError as error:
            problem = f"FAILED: {error}"
        if args.write and not problem:
            notebook.metadata["minirlhf"] = fingerprint(notebook)
            nbformat.write(notebook, path)
        failed += [path.name] if problem else []
        print(f"{path.name:36} {time.time() - begin:5.1f} s  {path.stat().st_size / 1000:4.0f} kB"
              f"  {problem or 'ok'}", flush=True)
    print(f"{len(paths) - len(failed)} of {len(paths)} notebooks ok, {time.time() - start:.0f} s")
    return int(bool(failed) or not paths)


if __name__ == "__main__":
    sys.exit(main())
