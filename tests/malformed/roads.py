"""speedrun.py and the table of the README: options, and logs and files that are not as they were."""

import json

import speedrun

from malformed import Case, write

DONE = {"done": {}, "cpu_minutes": {}, "peak_gb": {}, "commands": {}, "running": "",
        "replaced": [], "spent": 0.0}


def options(name, words, *given):
    return Case(name, lambda road, folder: ["speedrun.py", "--quick", "--out", folder, *given],
                words)


def logged(name, content, words="speedrun.json is damaged", *given):
    """A case: the folder holds this speedrun.json."""
    def argv(road, folder):
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        write(folder, "speedrun.json", text)
        return ["speedrun.py", "--out", folder, *given]

    return Case(f"a log: {name}", argv, words)


def walked(name, spoil, words, *given):
    """A case: a road of seed 1 is done, as far as its files tell, and then spoil(its folder)."""
    def argv(road, folder):
        out = folder / "seed_1"
        log = {**DONE, "done": {}}
        for stage in speedrun.STAGES[:-1]:
            paths = speedrun.outputs(stage, 1, out.as_posix(), False)
            for path in paths:
                write(path.parent, path.name, f"{stage}: {path.name}")
            log["done"][stage] = speedrun.digests(paths)
        write(out, "speedrun.json", json.dumps(spoil(out, log) or log))
        return ["speedrun.py", "--first_seed", "1", "--out", folder, *given]

    return Case(f"a road: {name}", argv, words)


def broken_off(*stages):
    """spoil: these stages, as the log has it, are not done."""
    return lambda out, log: {**log, "done": {stage: found for stage, found in log["done"].items()
                                             if stage not in stages}}


def without(name):
    return lambda out, log: (out / name).unlink()


def other(name, content="other"):
    return lambda out, log: write(out, name, content) and None


def in_place(name):
    """spoil: a folder where a file was."""
    return lambda out, log: ((out / name).unlink(), (out / name).mkdir())[1]


def results(name, content, words="does not hold the results of a road"):
    return Case(f"the README's table: {name}", lambda road, folder: [
        "docs/first_screen.py", write(folder, "results.json", content)], words)


CASES = [
    # ------------------------------------------------ options
    Case("an empty --out", lambda road, folder: ["speedrun.py", "--out", ""], "name of a folder"),
    Case("an empty --out for the quick road",
         lambda road, folder: ["speedrun.py", "--quick", "--out", ""], "name of a folder"),
    Case("--out is a file", lambda road, folder: ["speedrun.py", "--out", write(folder, "f", "x")],
         "{folder}/f can't be a folder, since {folder}/f is a file"),
    Case("--out lies below a file",
         lambda road, folder: ["speedrun.py", "--out", write(folder, "f", "x") + "/out"],
         "{folder}/f is a file"),
    Case("a road's own folder is a file", lambda road, folder: [
        "speedrun.py", "--seeds", "2", "--out", write(folder, "seed_1", "x").rpartition("/")[0]],
         "seed_1 is a file"),
    Case("--out is a device", lambda road, folder: ["speedrun.py", "--out", "/dev/null"],
         "/dev/null is a file"),
    Case("--out where nothing can be made",
         lambda road, folder: ["speedrun.py", "--out", "/proc/none"], "/proc/none"),
    Case("a comma in --out", lambda road, folder: ["speedrun.py", "--out", f"{folder}/a,b"],
         "without a comma"),
    Case("an --out like an option", lambda road, folder: ["speedrun.py", "--out=-x"],
         "not beginning with -"),
    options("no road", "--seeds 0: expected a number above 0", "--seeds", "0"),
    options("fewer roads than none", "--seeds -3: expected a number above 0", "--seeds", "-3"),
    options("a billion roads", "expected up to 100 roads", "--seeds", "999999999"),
    options("half a road", "invalid int value: '0.5'", "--seeds", "0.5"),
    options("a negative seed", "--first_seed -1", "--first_seed", "-1"),
    options("a seed that no generator takes", "--first_seed: expected a whole number up to a billion",
            "--first_seed", str(2**63)),
    options("an option of the stages", "unknown option --threads", "--threads", "4"),
    options("a stage that is none", "--from reward: expected one of prepare, tokenizer", "--from",
            "reward"),
    options("a stage in capitals", "--from RM: expected one of", "--from", "RM"),
    options("two stages", "--from rm,ppo: expected one of", "--from", "rm,ppo"),
    options("a stage that was not asked for", "with --overoptimize that stage, too", "--from",
            "overoptimize"),
    options("a stage without the earlier ones", "pretrain.txt is missing, which prepare makes; "
            "--from prepare", "--from", "rm"),
    options("a word without an option", "unknown option rm", "rm"),
    # ------------------------------------------------ logs
    logged("empty", ""),
    logged("cut", json.dumps(DONE)[:30]),
    logged("no JSON", "done: all"),
    logged("no object", [DONE]),
    logged("null", "null"),
    logged("of another program", {"pid": 1, "done": True}),
    logged("of an older version", {**DONE, "done": ["prepare", "tokenizer"]}),
    logged("no UTF-8", b"\xff\xfe", "expected text in UTF-8, found text in UTF-16"),
    logged("unknown stages", {**DONE, "done": {"party": []}}),
    logged("hashes that are a number", {**DONE, "done": {"prepare": 7}}),
    logged("a running stage that is none", {**DONE, "running": "party"}),
    logged("a running stage that is a list", {**DONE, "running": ["rm"]}),
    logged("minutes that are words", {**DONE, "cpu_minutes": {"rm": "two"}}),
    logged("NaN minutes", json.dumps({**DONE, "cpu_minutes": {"rm": float("nan")}})),
    logged("minutes below 0", {**DONE, "spent": -1}),
    logged("nests without end", "[" * 100_000),
    logged("begun anew all the same", "{}", "speedrun.json is damaged", "--from", "prepare"),
    Case("a log: a folder", lambda road, folder: (
        (folder / "speedrun.json").mkdir(), ["speedrun.py", "--out", folder])[1],
         "speedrun.json: expected a readable file"),
    # ------------------------------------------------ files
    walked("a checkpoint is gone", without("sft/ckpt.pt"), "sft/ckpt.pt is missing, which sft makes"),
    walked("another checkpoint", other("rm/ckpt.pt"), "rm/ckpt.pt is not as rm left it; --from rm "
           "does that stage again, --from ppo goes on with the file as it is"),
    walked("an empty checkpoint", other("dpo/ckpt.pt", b""), "dpo/ckpt.pt is not as dpo left it"),
    walked("metrics with a row more", other("ppo/metrics.jsonl"), "--from dpo goes on"),
    walked("other preferences", other("preferences.jsonl"), "preferences.jsonl is not as annotate "
           "left it"),
    walked("another world", other("data/heldout.jsonl"), "heldout.jsonl is not as prepare left it"),
    walked("another vocabulary", other("data/tokenizer.json"), "not as tokenizer left it"),
    walked("results of another road", other("eval/results.json"), "not as evaluate left it; --from "
           "evaluate does that stage again"),
    walked("results of another road, gone on with", other("eval/results.json"), "not as evaluate "
           "left it", "--overoptimize", "--from", "overoptimize"),
    walked("answers are gone", without("eval/ppo.jsonl"), "ppo.jsonl is missing"),
    walked("a folder in a checkpoint's place", in_place("sft/ckpt.pt"), "sft/ckpt.pt is missing"),
    walked("a stage after one that was broken off", broken_off("rm", "ppo", "dpo", "evaluate"),
           "--from dpo: rm has not been done to its end", "--from", "dpo"),
    walked("a stage after a file that is gone", without("samples.jsonl"),
           "samples.jsonl is missing, which sample makes; --from sample", "--from", "rm"),
    walked("the first of two roads is whole, the second was never begun", lambda out, log: None,
           "seed_2/data/pretrain.txt is missing", "--seeds", "2", "--from", "ppo"),
    # ------------------------------------------------ docs/first_screen.py
    results("empty", ""), results("cut", '{"table": {'), results("a list", "[]"),
    results("no UTF-8", b"\xff"), results("no players", '{"table": {"rates": {}}, "seeds": []}'),
    results("a score that is text", '{"table": {"rates": {}, "players": {"sft": 1}}, "seeds": 3}'),
    Case("the README's table: no file", lambda road, folder: ["docs/first_screen.py",
                                                              folder / "none.json"],
         "none.json does not hold"),
    Case("the README's table: a folder", lambda road, folder: ["docs/first_screen.py", folder],
         "{folder} does not hold"),
]
