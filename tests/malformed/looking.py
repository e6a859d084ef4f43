"""What one looks with, `ledger`, `plot` and `microscope`: damaged records, and places to write to."""

import json
import shutil

import numpy as np

from malformed import Case, write

TOOLS = {name: f"minirlhf/look/{name}.py" for name in ("ledger", "plot", "microscope")}


def recorded(folder, stage="ppo"):
    """The folder `run` of a made-up PPO run with one recorded step of two rows and four metrics."""
    run, R, T = folder / "run", 2, 6
    mask = np.zeros((R, T - 1), dtype=bool)
    mask[:, 2:4] = True
    arrays = {"rows/tokens": np.arange(R * T).reshape(R, T), "rows/lengths": np.array([5, 5]),
              "rows/response_mask": mask, "rows/example": np.arange(R),
              "rows/ended": np.array([True, False]), "rows/scores": np.array([0.5, -1.0]),
              "batch/num_tokens": np.array([2, 2, 2]), "batch/example": np.arange(3),
              "batch/lengths": np.array([5, 5, 5])}
    for name in ("logprobs", "advantages", "kl"):
        arrays[f"rows/{name}"] = np.where(mask, 0.25, 0.0).astype(np.float32)
        arrays[f"batch/{name}"] = arrays[f"squares/{name}"] = np.full(3, 0.5)
    save(run, **arrays)
    write(run, "ledger/step_000001.json", json.dumps({
        "step": 1, "batch_size": 3, "pieces": [list("ab cd")] * R}))
    write(run, "config.json", json.dumps({"beta": 0.1, "gamma": 1.0, "kl_kind": "k1"}))
    write(run, "metrics.jsonl", [
        {"step": i, "kl": 0.1 * i, "score": 1.0, "gold": 0.5, "beta": 0.1} for i in range(1, 5)])
    return run


def save(run, **arrays):
    (run / "ledger").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(run / "ledger" / "step_000001.npz", **arrays)


def arrays_of(run):
    with np.load(run / "ledger" / "step_000001.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def looked(tool, name, spoil, words, *options):
    """A case: a tool looks at the run after spoil(run), which may also return what to look at."""
    def argv(road, folder):
        run = recorded(folder)
        return [TOOLS[tool], str(spoil(run) or run), *options]

    return Case(f"{tool}: {name}", argv, words)


def changed(**arrays):
    """spoil: with other arrays; None takes one away, a function makes it of what it was."""
    def spoil(run):
        old = arrays_of(run)
        for name, new in arrays.items():
            name = name.replace("__", "/")
            old[name] = new(old[name]) if callable(new) else new
        save(run, **{name: value for name, value in old.items() if value is not None})

    return spoil


def record(text):
    return lambda run: write(run, "ledger/step_000001.json", text) and None


def meta(**changes):
    return record(json.dumps({"step": 1, "batch_size": 3, "pieces": [list("ab cd")] * 2, **changes}))


def metrics(text):
    return lambda run: write(run, "metrics.jsonl", text) and None


def config(text):
    return lambda run: write(run, "config.json", text) and None


def cut(name, keep):
    def spoil(run):
        path = run / name
        path.write_bytes(path.read_bytes()[:keep])

    return spoil


def flipped(run):
    """One bit in the middle of the arrays."""
    path = run / "ledger" / "step_000001.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(bytes(content))


def remove(name):
    return lambda run: (run / name).unlink()


def foreign(name, content):
    """spoil, for a file in the place of what is to be written."""
    return lambda run: write(run, name, content) and None


def objects(run):
    """Arrays that only a pickle could hold: whoever unpickles a stranger's file runs their code."""
    old = arrays_of(run)
    with open(run / "ledger" / "step_000001.npz", "wb") as file:
        np.savez(file, **{**old, "rows/ended": np.array([{}, []], dtype=object)})


def promised(run):
    """An array whose header speaks of 8 TB."""
    import zipfile

    header = str({"descr": "<f8", "fortran_order": False, "shape": (10**12,)}).ljust(117) + "\n"
    with zipfile.ZipFile(run / "ledger" / "step_000001.npz", "a") as arrays:
        arrays.writestr("rows/more.npy", b"\x93NUMPY\x01\x00\x76\x00" + header.encode("latin-1"))


def folder_in_place(name):
    return lambda run: (run / name).mkdir()


NPZ, JSON_FILE = "step_000001.npz is no ledger's file", "step_000001.json is no ledger's file"

CASES = [
    # ------------------------------------------------ the command line
    Case("no run", lambda road, folder: [TOOLS["ledger"]], "required: run; --help"),
    Case("no folder at all", lambda road, folder: [TOOLS["ledger"], folder / "none"],
         "{folder}/none holds no ledger"),
    Case("an empty folder", lambda road, folder: [TOOLS["microscope"], folder], "holds no ledger"),
    Case("a folder that is a file",
         lambda road, folder: [TOOLS["ledger"], write(folder, "run", "text")], "holds no ledger"),
    Case("a picture of a folder that is a file",
         lambda road, folder: [TOOLS["plot"], write(folder, "run", "text"), "--save",
                               folder / "x.png"], "{folder}/run holds no metrics"),
    Case("a page of a folder that is a file",
         lambda road, folder: [TOOLS["microscope"], write(folder, "run", "text")],
         "holds no ledger"),
    Case("an empty name", lambda road, folder: [TOOLS["ledger"], ""], "holds no ledger"),
    looked("ledger", "a step that is no number", lambda run: None, "invalid int value: 'last'",
           "--step", "last"),
    looked("ledger", "a step that is a fraction", lambda run: None, "invalid int value: '1.0'",
           "--step", "1.0"),
    looked("ledger", "a negative step", lambda run: None, "step -1 is not in", "--step", "-1"),
    looked("ledger", "a huge step", lambda run: None, "it holds 1", "--step", "9" * 30),
    looked("ledger", "a negative row", lambda run: None, "row -1 is not in the ledger; it keeps "
           "rows 0 to 1", "--row", "-1"),
    looked("plot", "a negative row", lambda run: None, "row -1 is not in", "--row", "-1"),
    looked("plot", "a row that is not kept", lambda run: None, "row 2 is not in", "--row", "2"),
    looked("plot", "a sequence of two runs", lambda run: None, "give one folder", "other", "--row",
           "0"),
    looked("microscope", "an option of another tool", lambda run: None, "unrecognized arguments: "
           "--step 1", "--step", "1"),
    # ------------------------------------------------ a damaged ledger
    looked("ledger", "no arrays", remove("ledger/step_000001.npz"), NPZ),
    looked("ledger", "cut arrays", cut("ledger/step_000001.npz", 300), NPZ),
    looked("microscope", "empty arrays", cut("ledger/step_000001.npz", 0), NPZ),
    looked("ledger", "a flipped bit", flipped, NPZ),
    looked("ledger", "arrays that are a pickle", objects, NPZ),
    looked("ledger", "an array larger than any memory", promised, NPZ),
    looked("plot", "arrays that are text", foreign("ledger/step_000001.npz", "text"), NPZ, "--row",
           "0"),
    looked("ledger", "a single array in their place", lambda run: np.save(
        open(run / "ledger" / "step_000001.npz", "wb"), np.arange(3)), NPZ),
    looked("ledger", "a folder in the place of arrays", lambda run: (
        remove("ledger/step_000001.npz")(run), (run / "ledger" / "step_000001.npz").mkdir())[0],
           NPZ),
    looked("ledger", "without a mask", changed(rows__response_mask=None),
           "rows/response_mask missing"),
    looked("ledger", "without lengths", changed(rows__lengths=None), "rows/lengths missing"),
    looked("ledger", "without counts", changed(batch__num_tokens=None), "batch/num_tokens missing"),
    looked("ledger", "a mask of numbers", changed(rows__response_mask=lambda x: x.astype(float)),
           "response_mask is no mask"),
    looked("ledger", "a per-token tensor with a number per row", changed(
        rows__logprobs=np.zeros(2)), "rows/logprobs has the shape (2,), expected (2, 5)"),
    looked("ledger", "a number per row with one per token", changed(
        rows__scores=np.zeros((2, 5))), "rows/scores has the shape (2, 5), expected (2,)"),
    looked("plot", "a tensor as long as the tokens", changed(
        rows__kl=np.zeros((2, 6))), "rows/kl has the shape (2, 6)", "--row", "0"),
    looked("microscope", "a row too few", changed(rows__kl=lambda x: x[:1]),
           "rows/kl has the shape (1, 5)"),
    looked("ledger", "another batch's sums", changed(batch__kl=np.zeros(4)), "is not (3,)"),
    looked("ledger", "squares of nothing", changed(squares__values=np.zeros(3)), NPZ),
    looked("ledger", "words for numbers", changed(rows__scores=np.array(["good", "bad"])),
           "holds no numbers"),
    looked("ledger", "an unknown kind of array", changed(columns__kl=np.zeros(3)), NPZ),
    looked("ledger", "no token of any response", changed(batch__num_tokens=np.zeros(3, int)),
           "no token of a response"),
    looked("plot", "a row without a token of the response", changed(
        rows__response_mask=lambda x: np.zeros_like(x)), "has no token of a response", "--row", "1"),
    looked("ledger", "no JSON", remove("ledger/step_000001.json"), "holds no ledger"),
    looked("ledger", "cut JSON", cut("ledger/step_000001.json", 30), JSON_FILE),
    looked("ledger", "empty JSON", cut("ledger/step_000001.json", 0), JSON_FILE),
    looked("ledger", "JSON that is no object", record("[1, 3]"), JSON_FILE),
    looked("ledger", "JSON that nests without end", record("[" * 100_000), JSON_FILE),
    looked("ledger", "bytes that are no UTF-8", record(b'{"step": "\xff"}'), "expected UTF-8"),
    looked("ledger", "a batch of NaN", meta(batch_size=float("nan")), "is not (nan,)"),
    looked("ledger", "another step's record", meta(step=2), "the step's number"),
    looked("ledger", "no pieces", meta(pieces=[]), "its pieces are wrong"),
    looked("ledger", "pieces of another row", meta(pieces=[list("ab"), list("ab cd")]),
           "the pieces are not those of the rows"),
    looked("microscope", "pieces that are numbers", meta(pieces=[[1, 2, 3, 4, 5]] * 2),
           "the pieces are not those of the rows"),
    looked("ledger", "a file that only looks like a step", lambda run: (
        write(run, "ledger/step_best.json", "{}"), remove("ledger/step_000001.json")(run))[1],
           "holds no ledger"),
    # ------------------------------------------------ metrics and options
    looked("plot", "no metrics", remove("metrics.jsonl"), "holds no metrics", "--save", "x.png"),
    looked("plot", "a broken line in the middle", metrics('{"step": 1, "kl": 1}\n{"step": }\n'
           '{"step": 3, "kl": 1}\n'), "metrics.jsonl, line 2", "--save", "x.png"),
    looked("plot", "a row without its step", metrics('{"kl": 1}\n{"kl": 2}\n'),
           "metrics.jsonl, line 1", "--save", "x.png"),
    looked("plot", "a row that is a list", metrics("[1]\n[2]\n"), "line 1", "--save", "x.png"),
    looked("plot", "a metric that is text", metrics('{"step": 1, "kl": "high"}\n' * 3), "line 1",
           "--save", "x.png"),
    looked("plot", "a number that no float holds", metrics(
        '{"step": 1, "kl": 1%s}\n' % ("0" * 400)), "line 1", "--save", "x.png"),
    looked("plot", "numbers that no axis spans", metrics(
        '{"step": 1, "kl": 1e308}\n{"step": 2, "kl": -1e308}\n'), "no picture has room", "--save",
           "x.png"),
    looked("plot", "nothing that is drawn", metrics('{"step": 1, "lr": 1}\n' * 3), "was logged",
           "--save", "x.png"),
    looked("plot", "metrics that are no UTF-8", metrics(b"\xff\xfe{}\n"), "found text in UTF-16",
           "--save", "x.png"),
    looked("microscope", "a broken line in the middle", metrics(
        '{"step": 1, "beta": 1}\nnonsense}\n{"step": 2}\n'), "metrics.jsonl, line 2"),
    looked("microscope", "no metrics", remove("metrics.jsonl"), "metrics.jsonl: no such file"),
    looked("microscope", "no options", remove("config.json"), "config.json: no such file"),
    looked("microscope", "cut options", cut("config.json", 9), "config.json is damaged"),
    looked("microscope", "options that are a list", config("[]"), "config.json is damaged"),
    looked("microscope", "an option that is NaN", config('{"gamma": NaN}'),
           "config.json is damaged"),
    looked("microscope", "an option that is a list", config('{"gamma": [1]}'),
           "config.json is damaged"),
    looked("microscope", "a beta that is a word", config('{"beta": "large"}'),
           "config.json is damaged"),
    # ------------------------------------------------ places to write to
    looked("plot", "a picture of an unknown kind", lambda run: None,
           "x.banana: expected a name that ends in .png, .pdf, .svg", "--save", "x.banana"),
    looked("plot", "a picture without a kind", lambda run: None, "expected a name that ends in",
           "--save", "picture"),
    looked("plot", "a heat map of an unknown kind", lambda run: None, "expected a name that ends",
           "--row", "0", "--save", "x.jpeg2"),
    looked("microscope", "a page that somebody wrote", foreign("microscope.html", "<p>mine</p>"),
           "microscope.html exists, and minirlhf did not write it"),
    looked("microscope", "a picture in the page's place", foreign("microscope.html", b"\x89PNG\xff"),
           "microscope.html"),
    looked("microscope", "a folder in the page's place", folder_in_place("microscope.html"),
           "microscope.html is a folder"),
    Case("plot: a folder in the picture's place",
         lambda road, folder: [TOOLS["plot"], recorded(folder), "--save",
                               str(shutil.copytree(folder / "run", folder / "x.png"))],
         "{folder}/x.png is a folder"),
    Case("plot: a text in the picture's place",
         lambda road, folder: [TOOLS["plot"], recorded(folder), "--save",
                               write(folder, "x.png", "a text of mine")],
         "x.png exists, and is write-protected or no .png picture"),
    Case("plot: a place below a file",
         lambda road, folder: [TOOLS["plot"], recorded(folder), "--save",
                               write(folder, "file", "text") + "/x.png"], "{folder}/file is a file"),
    Case("plot: a place where nothing can be made",
         lambda road, folder: [TOOLS["plot"], recorded(folder), "--save", "/proc/none/x.png"],
         "/proc/none/x.png cannot be written"),
]
