"""The whole road in its quick version, and the command lines that it is made of."""

import contextlib
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import speedrun
from minirlhf.plumbing.config import parse_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(folder, what speedrun printed) of one quick road; the folder above it is the road's --out."""
    out, printed = tmp_path_factory.mktemp("speedrun"), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):  # the stages are commands
        speedrun.main(speedrun.Config(quick=True, overoptimize=True, out=str(out)))
    return out / "quick", printed.getvalue()


def test_the_quick_road_ends_with_results_that_hold_everything(quick):
    folder, _ = quick
    results = json.loads((folder / "results.json").read_text())
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


def test_the_quick_road_draws_its_pictures(quick):
    for name in ("curves.png", "gold_by_stage.png", "reward_kl.png"):
        assert (quick[0] / name).read_bytes().startswith(b"\x89PNG"), name


def test_the_quick_road_prints_each_command_and_the_table(quick):
    folder, printed = quick
    for stage in speedrun.STAGES:
        for line in speedrun.commands(stage, 0, str(folder), True):
            assert f"$ {line}\n" in printed
    table = printed[printed.index("== The road's end"):]
    for row in ("base few-shot", "sft", "sft greedy", "ppo", "ppo greedy", "dpo", "wrapper",
                "refuse all", "best of 4", "ppo over sft", "reward model:", "without KL",
                "CPU-minutes"):
        assert f"\n{row}" in table, row
    assert "before and after" in printed  # answers side by side


def test_the_evaluation_of_a_road_can_be_repeated(quick, tmp_path):
    """The command that the road ran, in this process: each number is the same, to the last digit."""
    (line,) = speedrun.commands("evaluate", 0, str(quick[0]), True)
    cfg = parse_config(evaluate.Config, shlex.split(line)[2:])
    cfg.out = str(tmp_path)
    again = evaluate.main(cfg)
    assert json.loads(json.dumps(again)) == json.loads((quick[0] / "eval/results.json").read_text())
    rates = again["players"]["ppo"]
    assert {"unsafe_refused", "lookalike_refused", "right", "right_by_skill"} <= set(rates)


def test_a_road_walked_again_only_prints(quick):
    folder, _ = quick
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("ckpt.pt")}
    done = subprocess.run([sys.executable, "speedrun.py", "--quick", "--overoptimize", "--out",
                           folder.parent], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    printed = done.stdout
    assert printed.count("done before") == len(speedrun.STAGES) and "\n$ " not in printed
    assert "== The road's end" in printed
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("ckpt.pt")}
    assert len(before) == 6


def test_the_first_roads_commands_are_short():
    """They are what the README tells a reader to type, so the defaults have to do."""
    lines = {stage: speedrun.commands(stage, 0, "out", False) for stage in speedrun.STAGES}
    assert lines["prepare"] == ["python data/toy/prepare.py"]
    assert lines["pretrain"] == ["python train_pretrain.py"]
    assert lines["sft"] == ["python train_sft.py"] and lines["rm"] == ["python train_rm.py"]
    assert lines["dpo"] == ["python train_dpo.py"]
    assert lines["ppo"] == ["python train_ppo.py --judge data/toy/judge.py:judge"]
    readme = (ROOT / "README.md").read_text()
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
