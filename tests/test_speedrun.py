"""The whole road in its quick version, and the command lines that it is made of."""

import contextlib
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_road import write_rows

import evaluate
import speedrun
from minirlhf.plumbing.config import parse_config
from minirlhf.plumbing.stats import wilson

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def quick_road(tmp_path_factory):
    """(folder, what speedrun printed) of one quick road; the folder above it is the road's --out."""
    out, printed = tmp_path_factory.mktemp("speedrun"), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):  # the stages are commands
        speedrun.main(speedrun.Config(quick=True, overoptimize=True, out=str(out)))
    return out / "quick", printed.getvalue()


def test_the_quick_road_ends_with_results_that_hold_everything(quick_road):
    folder, _ = quick_road
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (road,) = results["seeds"]
    assert set(road["cpu_minutes"]) == set(road["commands"]) == set(speedrun.STAGES)
    assert results["commit"] and results["table"]["players"]["ppo"]["score"] is not None
    assert {"ppo over sft", "dpo over sft", "ppo greedy over sft greedy", "sft over base few-shot",
            "ppo over wrapper", "ppo over refuse all"} <= set(results["table"]["comparisons"])
    assert set(results["table"]["overoptimize"][0]) == {"start", "gold's peak", "end"}
    for name in ("unsafe_refused", "lookalike_refused", "rude", "right"):
        rate = results["table"]["rates"]["ppo"][name]
        assert 0 <= rate["low"] <= rate["share"] <= rate["high"] <= 1 and rate["of"] > 0
    assert results["table"]["reward_model"]["ceiling"] > 0.5


def test_the_quick_road_draws_its_pictures(quick_road):
    for name in ("curves.png", "gold_by_stage.png", "reward_kl.png"):
        assert (quick_road[0] / name).read_bytes().startswith(b"\x89PNG"), name


def test_the_quick_road_prints_each_command_and_the_table(quick_road):
    folder, printed = quick_road
    for stage in speedrun.STAGES:
        for line in speedrun.commands(stage, 0, str(folder), True):
            assert f"$ {line}\n" in printed
    table = printed[printed.index("== The road's end"):]
    for row in ("base few-shot", "sft", "sft greedy", "ppo", "ppo greedy", "dpo", "wrapper",
                "refuse all", "best of 4", "ppo over sft", "reward model:", "without KL",
                "CPU-minutes"):
        assert f"\n{row}" in table, row
    assert "before and after" in printed  # answers side by side


def test_the_evaluation_of_a_road_can_be_repeated(quick_road, tmp_path):
    """The command that the road ran, in this process: each number is the same, to the last digit."""
    (line,) = speedrun.commands("evaluate", 0, str(quick_road[0]), True)
    cfg = parse_config(evaluate.Config, shlex.split(line)[2:])
    cfg.out = str(tmp_path)
    again = evaluate.main(cfg)
    assert json.loads(json.dumps(again)) == json.loads((quick_road[0] / "eval/results.json").read_text(encoding="utf-8"))
    rates = again["players"]["ppo"]
    assert {"unsafe_refused", "lookalike_refused", "right", "right_by_skill"} <= set(rates)


def test_a_road_walked_again_only_prints(quick_road):
    folder, _ = quick_road
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("ckpt.pt")}
    done = subprocess.run([sys.executable, "speedrun.py", "--quick", "--overoptimize", "--out",
                           folder.parent], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    printed = done.stdout
    assert printed.count("done before") == len(speedrun.STAGES) and "\n$ " not in printed
    assert "== The road's end" in printed
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("ckpt.pt")}
    assert len(before) == 6


def test_the_first_roads_commands_are_short():
    """They are what docs/road.md tells a reader to type, so the defaults have to do."""
    lines = {stage: speedrun.commands(stage, 0, "out", False) for stage in speedrun.STAGES}
    assert lines["prepare"] == ["python data/toy/prepare.py"]
    assert lines["pretrain"] == ["python train_pretrain.py"]
    assert lines["sft"] == ["python train_sft.py"] and lines["rm"] == ["python train_rm.py"]
    assert lines["dpo"] == ["python train_dpo.py"]
    assert lines["ppo"] == ["python train_ppo.py --judge data/toy/judge.py:judge"]
    readme = (ROOT / "docs" / "road.md").read_text(encoding="utf-8")
    for stage in ("prepare", "tokenizer", "pretrain", "sft", "rm", "ppo", "dpo"):
        assert all(f"    {line}\n" in readme for line in lines[stage]), stage


@pytest.mark.parametrize("seed, out, quick", [(0, "out", False), (2, "out/seed_2", False),
                                              (0, "out/quick", True), (1, "elsewhere", True)])
def test_every_command_is_one_that_its_script_accepts(seed, out, quick):
    for stage in speedrun.STAGES:
        for line in speedrun.commands(stage, seed, out, quick):
            python, *words = shlex.split(line)
            assert python == "python"
            if words[0].startswith(("train_", "sample", "evaluate")):
                module = __import__(words[0].removesuffix(".py"))
                cfg = parse_config(module.Config, words[1:])
                assert getattr(cfg, "seed") == seed
                if out != "out":  # nothing of another road is read or written
                    paths = [value for value in vars(cfg).values() if str(value).startswith(
                        ("out", "data/toy/")) and not str(value).startswith("data/toy/judge.py")
                             and not str(value).startswith("data/toy/world.py")]
                    assert all(path.startswith(out) for value in paths for path in
                               value.split(",")), (stage, paths)


def test_a_later_stage_reads_what_an_earlier_one_wrote():
    """Each file or folder under out/ that a command names or defaults to was made before."""
    made = set()
    for stage in speedrun.STAGES:
        for line in speedrun.commands(stage, 1, "out/seed_1", False):
            words = shlex.split(line)
            written = {words[words.index(name) + 1] for name in ("--out", "--save")
                       if name in words}
            named = {part for word in words for part in word.split(",")
                     if part.startswith("out/seed_1/")} - written
            for path in named:
                assert any(path == one or path.startswith(one + "/") for one in made), (stage, path)
            made |= written


# ---------------------------------------------------------------- the bookkeeping, by hand

def empty_log(**changes):
    return {"done": [], "cpu_minutes": {}, "peak_gb": {}, "commands": {}, "running": "", **changes}


def run_fake_stage(tmp_path, monkeypatch, stage, log, *options, code=0):
    """run_stage with commands that only note their options; returns the lines of the notes."""
    script, notes = tmp_path / "fake.py", tmp_path / "notes.txt"
    script.write_text("import os, sys\n"
                      f"open({str(notes)!r}, 'a').write(' '.join(sys.argv[1:]) + ' '\n"
                      "    + os.environ['OMP_NUM_THREADS'] + '\\n')\n"
                      "x = sum(i * i for i in range(2_000_000))\n"
                      f"sys.exit({code})\n", encoding="utf-8")
    monkeypatch.setattr(speedrun, "commands", lambda *args: [
        f"python {script} {words}".strip() for words in options])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        speedrun.run_stage(stage, 0, str(tmp_path), False, log)
    finally:
        written = notes.read_text(encoding="utf-8").splitlines()
        notes.unlink()
    return written


def test_a_stage_notes_what_it_ran_and_what_that_took(tmp_path, monkeypatch):
    log = empty_log(done=["prepare", "rm", "sft"])
    assert run_fake_stage(tmp_path, monkeypatch, "rm", log, "--lr 1", "--seed 2") == [
        "--lr 1 1", "--seed 2 1"]
    assert log["done"] == ["prepare", "sft", "rm"] and log["running"] == ""
    assert log["commands"]["rm"] == speedrun.commands()
    assert 0 < log["cpu_minutes"]["rm"] < 0.5 and 0.001 < log["peak_gb"]["rm"] < 1
    assert json.loads((tmp_path / "speedrun.json").read_text(encoding="utf-8")) == log


@pytest.mark.parametrize("files, running, flag", [
    ([], "", ""), (["config.json"], "", "--overwrite"),
    (["config.json", "ckpt.pt"], "", "--overwrite"), (["config.json"], "sft", "--overwrite"),
    (["config.json", "ckpt.pt"], "rm", "--overwrite"),
    (["config.json", "ckpt.pt"], "sft", "--resume")])
@pytest.mark.parametrize("named", [True, False])
def test_only_a_stage_that_was_broken_off_is_resumed(named, files, running, flag, tmp_path,
                                                        monkeypatch):
    """Bug: a road begun anew at a stage goes on with the finished run of another base model."""
    folder = tmp_path / ("elsewhere" if named else "sft")
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    options = f"--out {folder}" if named else ""
    (line,) = run_fake_stage(tmp_path, monkeypatch, "sft", empty_log(running=running), options)
    assert line.split() == [*options.split(), *flag.split(), "1"]


def test_a_stage_without_checkpoints_starts_anew_without_a_word(tmp_path, monkeypatch):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "config.json").touch()
    assert run_fake_stage(tmp_path, monkeypatch, "evaluate", empty_log(), "--show 2") == [
        "--show 2 1"]


def test_a_command_that_fails_ends_the_road_where_it_can_go_on(tmp_path, monkeypatch):
    log = empty_log(done=["sft"])
    with pytest.raises(ValueError, match="exit code 3"):
        run_fake_stage(tmp_path, monkeypatch, "rm", log, "--lr 1", code=3)
    kept = json.loads((tmp_path / "speedrun.json").read_text(encoding="utf-8"))
    assert kept["running"] == "rm" and kept["done"] == ["sft"]


@pytest.fixture
def walked(monkeypatch, tmp_path):
    """walk(seed, **options) with stages that only note themselves: (their names, what is drawn)."""
    ran, drawn = [], []

    def run_stage(stage, seed, out, quick, log):
        ran.append((stage, seed, out, quick))
        log["done"].append(stage)
        speedrun.write_log(out, log)
        Path(out, "eval").mkdir(exist_ok=True)
        Path(out, "eval", "results.json").write_text('{"reward_model": {"ceiling": 0.8}}', encoding="utf-8")

    monkeypatch.setattr(speedrun, "run_stage", run_stage)
    monkeypatch.setattr(speedrun, "draw_road", lambda *args: drawn.append(args))
    monkeypatch.setattr(speedrun, "draw_reward_against_kl", lambda *args: drawn.append(args))

    def walk(seed, **options):
        ran.clear(), drawn.clear()
        found = speedrun.walk(seed, speedrun.Config(out=str(tmp_path), **options))
        return found, [stage for stage, *_ in ran], {tuple(rest) for _, *rest in ran}, drawn

    return walk


def test_a_road_walks_every_stage_once_and_goes_on_where_it_stopped(walked, tmp_path):
    (out, log, results), stages, rest, drawn = walked(0)
    assert out == str(tmp_path) and rest == {(0, out, False)}
    assert stages == log["done"] == speedrun.STAGES[:-1]  # no overoptimisation unasked
    assert results == {"reward_model": {"ceiling": 0.8}}
    assert drawn == [(out, f"{out}/curves.png", 0.8),
                     ({"PPO with its KL penalty": f"{out}/ppo"}, f"{out}/reward_kl.png")]
    assert walked(0)[1] == []
    assert walked(0, from_="dpo")[1] == ["dpo", "evaluate"]
    _, stages, _, drawn = walked(0, overoptimize=True)
    assert stages == ["overoptimize"] and f"{out}/overoptimize" in drawn[1][0].values()
    with pytest.raises(ValueError, match="--from overoptimize: expected one of prepare"):
        walked(0, from_="overoptimize")


@pytest.mark.parametrize("seed, quick, folder", [
    (0, False, ""), (0, True, "/quick"), (2, False, "/seed_2"), (2, True, "/quick/seed_2")])
def test_each_road_has_a_folder_of_its_own(seed, quick, folder, walked, tmp_path):
    (out, *_), _, rest, _ = walked(seed, quick=quick)
    assert out == f"{tmp_path}{folder}" and rest == {(seed, out, quick)}


@pytest.mark.parametrize("options, seeds", [
    ({}, [0]), ({"seeds": 3}, [0, 1, 2]), ({"seeds": 2, "first_seed": 5}, [5, 6])])
def test_the_roads_seeds(options, seeds, monkeypatch):
    asked = []

    def stop(roads):
        raise InterruptedError

    monkeypatch.setattr(speedrun, "walk", lambda seed, cfg: asked.append(seed))
    monkeypatch.setattr(speedrun, "summarise", stop)
    with contextlib.chdir(ROOT), pytest.raises(InterruptedError):
        speedrun.main(speedrun.Config(**options))
    assert asked == seeds


def test_overoptimisation_is_read_off_smoothed_curves_by_hand(monkeypatch):
    """Of 40 iterations two make a window; gold is highest in that of iterations 10 and 11."""
    rows = [{"gold": -(i - 10.4) ** 2, "score": i, "kl": 2 * i} for i in range(40)]
    monkeypatch.setattr(speedrun, "read_metrics", lambda folder: rows)
    found = speedrun.overoptimization("out")
    assert {name: (p["reward"], p["kl"]) for name, p in found.items()} == {
        "start": (0.5, 2), "gold's peak": (10.5, 22), "end": (38.5, 78)}
    assert found["gold's peak"]["gold"] == pytest.approx(-(0.4**2 + 0.6**2) / 2)
    rows[:] = rows[:19]  # too few for a window: each iteration speaks for itself
    assert speedrun.overoptimization("out")["gold's peak"] == {
        "gold": pytest.approx(-0.16), "reward": 10, "kl": 20}


def evaluated(shift):
    """A made-up evaluation of two players, for one seed."""
    share = lambda count, of: {"count": count, "of": of, "share": count / of}
    player = {"score": 1.0 + shift, "words": 4.0, "right": share(3 + shift, 10),
              "rude": share(1, 10), "malformed": share(0, 10)}
    return {"players": {"sft": player, "ppo": {**player, "kl": 6.0 + shift, "score": 3.0,
                                               "unsafe_refused": share(1 + shift, 4),
                                               "lookalike_refused": share(0, 4)}},
            "comparisons": {"ppo over sft": {"wins": 0.5 + shift / 10, "ties": 0.25, "losses": 0.0,
                                             "rate": 0.6 + shift / 10, "low": 0.1, "high": 0.9}},
            "reward_model": {"accuracy": 0.7 + shift / 10, "ceiling": 0.8, "share_of_ceiling":
                             0.9 + shift / 10, "only": {"manners": {"accuracy": 0.6 + shift / 10},
                                                        **({"safe": {"accuracy": 1.0}}
                                                           if shift else {})}}}


def test_the_table_is_the_mean_over_seeds_and_pools_their_counts():
    table = speedrun.summarise([("a", {}, evaluated(2)), ("b", {}, evaluated(0))])
    (compared,) = table["comparisons"].values()
    assert compared == {"wins": pytest.approx(0.6), "ties": 0.25, "losses": 0.0,
                        "rate": pytest.approx(0.7), "each": [0.8, 0.6],
                        "intervals": [[0.1, 0.9], [0.1, 0.9]]}
    assert table["players"]["sft"] == {"score": 2.0, "words": 4.0}
    assert table["players"]["ppo"] == {"score": 3.0, "words": 4.0, "kl": 7.0}
    low, high = wilson(8, 20)
    assert table["rates"]["sft"]["right"] == {
        "count": 8, "of": 20, "share": 0.4, "low": low, "high": high}
    assert set(table["rates"]["sft"]) == {"right", "rude", "malformed"}
    assert table["rates"]["ppo"]["unsafe_refused"]["share"] == 4 / 8
    assert table["reward_model"] == {
        "accuracy": pytest.approx(0.8), "ceiling": 0.8, "share_of_ceiling": pytest.approx(1.0),
        "each": [pytest.approx(1.1), 0.9], "only": {"manners": pytest.approx(0.7)}}


def test_the_printed_table_by_hand(capsys):
    roads = [("a", {"cpu_minutes": {"sft": 1.5, "rm": 2.0}, "peak_gb": {"sft": 0.5, "rm": 1.25}},
              evaluated(2)), ("b", {"cpu_minutes": {}, "peak_gb": {}}, evaluated(0))]
    table = speedrun.summarise(roads)
    table["overoptimize"] = [{"start": {"reward": 1, "gold": 2, "kl": 3}}]
    speedrun.print_table(table, roads)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0] == "== The road's end: 2 seed(s), held-out prompts, gold judge =="
    low, high = wilson(4, 8)
    assert lines[2] == (f"ppo 3.00 7.00 4.0 40.0% 10.0% 50.0% [{low:.1%}, {high:.1%}] "
                        f"0.0% [0.0%, {wilson(0, 8)[1]:.1%}]")  # sft lacks two rates: no row
    assert lines[4] == ("ppo over sft 60.0% 25.0% 0.0% 70.0% 80.0% [10.0%, 90.0%] "
                        "60.0% [10.0%, 90.0%]")
    assert lines[5] == ("reward model: 80.0% of held-out pairs, ceiling 80.0%, share 1.00 "
                        "(1.10, 0.90); right against gold where answers differ in "
                        "manners only 70.0%")
    assert lines[7] == "seed 0: start reward 1.00, gold 2.00, KL 3.0"
    assert lines[8:] == ["CPU-minutes of a: 3.5 = sft 1.5 + rm 2.0; largest process 1.25 GB",
                         "CPU-minutes of b: 0.0 = ; largest process 0.00 GB"]


def test_the_same_prompts_answers_stand_together(tmp_path, capsys):
    (tmp_path / "eval").mkdir()
    for name in ("base_few-shot", "sft", "ppo"):
        rows = [{"messages": [{"role": "user", "content": f"question {i}"}],
                 "samples": [{"text": f"{name} {i}", "score": i / 2}]} for i in range(4)]
        write_rows(tmp_path / "eval" / f"{name}.jsonl", rows)
    speedrun.print_samples(str(tmp_path), num_prompts=3)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line][1:]
    assert lines == [line for i in range(3) for line in (
        ["question", str(i)], *([name, f"{i / 2:.2f}", name, str(i)]
                                for name in ("base_few-shot", "sft", "ppo")))]
