"""The whole road in its quick version, and the command lines that it is made of."""

import contextlib
import io
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_road import write_rows

import evaluate
import speedrun
from minirlhf.plumbing.config import parse_config
from minirlhf.plumbing.errors import UserError
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
    held_out = questions(folder / "data" / "heldout.jsonl")
    for name in ("sft", "ppo", "dpo", "base_few-shot", "best_of_4"):
        asked = questions(folder / "eval" / f"{name}.jsonl")
        assert len(asked) == 100 and asked <= held_out, name
    assert questions(folder / "heldout_preferences.jsonl") <= held_out
    for name in ("demonstrations", "prompts"):
        assert not held_out & questions(folder / "data" / f"{name}.jsonl"), name
    for name in ("unsafe_refused", "lookalike_refused", "rude", "right"):
        rate = results["table"]["rates"]["ppo"][name]
        assert 0 <= rate["low"] <= rate["share"] <= rate["high"] <= 1 and rate["of"] > 0
    assert results["table"]["reward_model"]["ceiling"] > 0.5


def questions(path):
    """All that is asked in a file of rows with messages or a prompt, answers left out."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chats = [row.get("messages") or row["prompt"] for row in rows]
    return {json.dumps([m["content"] for m in chat if m["role"] != "assistant"]) for chat in chats}


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
    written = (quick_road[0] / "eval" / "results.json").read_text(encoding="utf-8")
    assert json.loads(json.dumps(again)) == json.loads(written)
    rates = again["players"]["ppo"]
    assert {"unsafe_refused", "lookalike_refused", "right", "right_by_skill"} <= set(rates)


def test_a_road_walked_again_only_prints(quick_road):
    folder, _ = quick_road
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("ckpt.pt")}
    done = subprocess.run([sys.executable, "speedrun.py", "--quick", "--overoptimize", "--out",
                           folder.parent], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8")
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


BY_HAND = {  # of seed 1, whose commands name every file
    "prepare": ["python data/toy/prepare.py --seed 1 --out out/seed_1/data"],
    "tokenizer": ["python -m minirlhf.tokenizer out/seed_1/data/pretrain.txt --vocab_size 1280 "
                  "--out out/seed_1/data/tokenizer.json"],
    "pretrain": ["python train_pretrain.py --text out/seed_1/data/pretrain.txt --tokenizer "
                 "out/seed_1/data/tokenizer.json --out out/seed_1/pretrain --seed 1"],
    "sft": ["python train_sft.py --init out/seed_1/pretrain --data "
            "out/seed_1/data/demonstrations.jsonl --out out/seed_1/sft --seed 1"],
    "sample": ["python sample.py --model out/seed_1/sft --prompts out/seed_1/data/prompts.jsonl "
               "--num_samples 6 --save out/seed_1/samples.jsonl --seed 1",
               "python sample.py --model out/seed_1/sft --prompts out/seed_1/data/heldout.jsonl "
               "--num_samples 4 --save out/seed_1/heldout_samples.jsonl --seed 1"],
    "annotate": ["python data/toy/annotate.py out/seed_1/samples.jsonl --out "
                 "out/seed_1/preferences.jsonl --seed 1",
                 "python data/toy/annotate.py out/seed_1/heldout_samples.jsonl --out "
                 "out/seed_1/heldout_preferences.jsonl --seed 1"],
    "rm": ["python train_rm.py --init out/seed_1/sft --data out/seed_1/preferences.jsonl "
           "--out out/seed_1/rm --seed 1"],
    "ppo": ["python train_ppo.py --judge data/toy/judge.py:judge --init out/seed_1/sft "
            "--reward_model out/seed_1/rm --prompts out/seed_1/data/prompts.jsonl "
            "--out out/seed_1/ppo --seed 1"],
    "dpo": ["python train_dpo.py --init out/seed_1/sft --data out/seed_1/preferences.jsonl "
            "--out out/seed_1/dpo --seed 1"],
    "evaluate": ["python evaluate.py --judge data/toy/judge.py:judge --base out/seed_1/pretrain "
                 "--reward_model out/seed_1/rm --preferences out/seed_1/heldout_preferences.jsonl "
                 "--seed 1 --models out/seed_1/ppo,out/seed_1/dpo --against out/seed_1/sft "
                 "--prompts out/seed_1/data/heldout.jsonl --out out/seed_1/eval"],
    "overoptimize": ["python train_ppo.py --judge data/toy/judge.py:judge --beta 0 --stop_kl 0 "
                     "--score_clip 0 --lr 1e-3 --num_steps 60 --out out/seed_1/overoptimize "
                     "--init out/seed_1/sft --reward_model out/seed_1/rm "
                     "--prompts out/seed_1/data/prompts.jsonl --seed 1"],
}


def test_the_commands_of_a_road_by_hand():
    """Bugs: the models are evaluated on training prompts; the reward model is measured on the pairs
    that it was trained on; a stage starts from another stage's model, or from another road's."""
    assert {stage: speedrun.commands(stage, 1, "out/seed_1", False)
            for stage in speedrun.STAGES} == BY_HAND
    assert list(BY_HAND) == speedrun.STAGES


def test_the_first_road_evaluates_on_held_out_prompts_and_pairs():
    """Bug: its command leaves the files out, and the script's defaults are the training ones."""
    (line,) = speedrun.commands("evaluate", 0, "out", False)
    cfg = parse_config(evaluate.Config, shlex.split(line)[2:])
    assert cfg.prompts == "data/toy/heldout.jsonl"
    assert cfg.preferences == "out/heldout_preferences.jsonl"
    assert (cfg.models, cfg.against, cfg.base) == ("out/ppo,out/dpo", "out/sft", "out/pretrain")
    assert (cfg.reward_model, cfg.out, cfg.limit) == ("out/rm", "out/eval", 0)
    for stage, script in (("sft", "train_sft"), ("rm", "train_rm"), ("ppo", "train_ppo"),
                          ("dpo", "train_dpo")):
        (line,) = speedrun.commands(stage, 0, "out", False)
        cfg = parse_config(__import__(script).Config, shlex.split(line)[2:])
        assert not any("heldout" in str(value) for value in vars(cfg).values()), stage


def test_a_folder_with_spaces_is_one_word():
    """Bug: a path is cut at its spaces, and the stage writes into another folder."""
    for stage in speedrun.STAGES:
        for line in speedrun.commands(stage, 1, "/my  roads/it's", False):
            words = shlex.split(line)
            assert sum("/my  roads/it's/" in word for word in words) >= 1, line
            assert not [word for word in words if word.startswith(("roads", "it"))]


# ---------------------------------------------------------------- the bookkeeping, by hand

class Machine:
    """Stands for `speedrun.Stop`: notes each command, and does on the disk what it would do.

    before: {stage: what to call before its command opens its folder}; after: the same, with the
    folder opened and a checkpoint written, but before the last one.
    """

    def __init__(self):
        self.ran, self.before, self.after, self.number = [], {}, {}, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def leave(self, stage):
        pass

    def run(self, words, env):
        self.ran.append(" ".join(words[1:]).replace("--out ", ""))
        assert env["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")
        folder = Path(words[words.index("--out") + 1])
        self.before.get(folder.name, lambda: None)()
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name == "evaluate":
            (folder.parent / "eval").mkdir(exist_ok=True)
            for path in speedrun.outputs("evaluate", 0, folder.parent.as_posix(), False):
                path.write_text('{"reward_model": {"ceiling": 0.8}}', encoding="utf-8")
            return 0, 0.5, 0.25
        if "--resume" not in words:
            (folder / "ckpt.pt").unlink(missing_ok=True)
        (folder / "config.json").touch()
        (folder / "metrics.jsonl").touch()
        (folder / "ckpt.pt").write_text(f"step 1 of command {len(self.ran)}", encoding="utf-8")
        self.after.get(folder.name, lambda: None)()
        (folder / "ckpt.pt").write_text(f"the end of command {len(self.ran)}", encoding="utf-8")
        return 0, 0.5, 0.25


class Killed(BaseException):
    """speedrun.py itself is killed: nothing more is written."""


def kill():
    raise Killed


SHORT = ["sft", "rm", "ppo", "evaluate", "overoptimize"]


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(speedrun, "Stop", lambda: machine)
    monkeypatch.setattr(speedrun, "STAGES", SHORT)
    monkeypatch.setattr(speedrun, "commands", lambda stage, seed, out, quick: [
        f"python {stage} --out {out}/{stage}"])
    machine.drawn, machine.roads = [], []
    monkeypatch.setattr(speedrun, "draw_road", lambda *args: machine.drawn.append(args))
    monkeypatch.setattr(speedrun, "draw_reward_against_kl",
                        lambda *args: machine.drawn.append(args))
    monkeypatch.setattr(speedrun, "finish", lambda cfg, roads, started: machine.roads.append(roads))
    monkeypatch.chdir(ROOT)
    return machine


@pytest.fixture
def walk(machine, tmp_path):
    """walk(**options) -> the stages that ran, each with its flag."""
    def walk(**options):
        machine.ran.clear(), machine.drawn.clear(), machine.roads.clear()
        speedrun.main(speedrun.Config(out=str(tmp_path), **options))
        return stages()

    def stages():
        return [" ".join([line.split()[0], *line.split()[2:]]) for line in machine.ran]

    walk.stages = stages
    return walk


def log_of(folder):
    return json.loads((folder / "speedrun.json").read_text(encoding="utf-8"))


def test_a_road_walks_every_stage_once_and_goes_on_where_it_stopped(walk, machine, tmp_path):
    assert walk() == ["sft", "rm", "ppo", "evaluate"]  # no overoptimisation unasked
    out = tmp_path.as_posix()
    assert machine.drawn == [(out, f"{out}/curves.png", 0.8),
                             ({"PPO with its KL penalty": f"{out}/ppo"}, f"{out}/reward_kl.png")]
    [[(folder, log, results)]] = machine.roads
    assert (folder, results) == (out, {"reward_model": {"ceiling": 0.8}})
    assert log == log_of(tmp_path) and log["running"] == ""
    assert log["cpu_minutes"] == dict.fromkeys(["sft", "rm", "ppo", "evaluate"], 0.5)
    assert log["peak_gb"]["rm"] == 0.25
    assert log["commands"]["rm"] == [f"python rm --out {out}/rm"]
    assert walk() == []
    assert walk(from_="ppo") == ["ppo --overwrite", "evaluate"]
    assert walk(overoptimize=True) == ["overoptimize"]
    assert f"{out}/overoptimize" in machine.drawn[1][0].values()
    assert walk(overoptimize=True, from_="overoptimize") == ["overoptimize --overwrite"]
    with pytest.raises(UserError, match="--from overoptimize: expected one of sft.*--overoptimize"):
        walk(from_="overoptimize")


def test_a_stage_that_is_done_again_and_killed_before_it_begins_does_not_pass_for_done(
        walk, machine, tmp_path):
    """Bug: killed before its command opened the folder, the stage was taken up with --resume, which
    went on with the old, finished run and said that all was done."""
    walk()
    old = (tmp_path / "rm" / "ckpt.pt").read_text(encoding="utf-8")
    machine.before["rm"] = kill
    with pytest.raises(Killed):
        walk(from_="rm")
    assert (tmp_path / "rm" / "ckpt.pt").read_text(encoding="utf-8") == old
    with pytest.raises(Killed):  # and once more at the same place
        walk()
    machine.before.clear()
    assert walk() == ["rm --overwrite", "ppo --overwrite", "evaluate"]
    assert (tmp_path / "rm" / "ckpt.pt").read_text(encoding="utf-8") == "the end of command 1"


def test_a_stage_killed_after_its_first_checkpoint_goes_on(walk, machine, tmp_path):
    machine.after["rm"] = kill
    with pytest.raises(Killed):
        walk()
    assert walk.stages() == ["sft", "rm"] and list(log_of(tmp_path)["done"]) == ["sft"]
    machine.after.clear()
    assert walk() == ["rm --resume", "ppo", "evaluate"]
    machine.after["rm"] = kill
    with pytest.raises(Killed):
        walk(from_="rm")
    machine.after.clear()
    assert walk() == ["rm --resume", "ppo --overwrite", "evaluate"]


def test_an_older_checkpoint_beside_the_new_ones_place_is_still_the_old_run(tmp_path):
    """Bug: killed while it cleared the old run away, a stage went on with what was left of it."""
    log = {"running": "", "replaced": [], "spent": 0.0}
    (tmp_path / "ckpt.pt").write_text("old, last", encoding="utf-8")
    (tmp_path / "ckpt_previous.pt").write_text("old, before", encoding="utf-8")
    assert speedrun.how_to_start("rm", tmp_path, log) == ["--overwrite"]
    (tmp_path / "ckpt.pt").unlink()
    assert speedrun.how_to_start("rm", tmp_path, log) == ["--overwrite"]
    (tmp_path / "ckpt.pt").write_text("new", encoding="utf-8")
    assert speedrun.how_to_start("rm", tmp_path, log) == ["--resume"]
    assert speedrun.how_to_start("ppo", tmp_path, log) == ["--overwrite"]
    assert speedrun.how_to_start("sft", tmp_path / "none", log) == []
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").touch()
    assert speedrun.how_to_start("sft", tmp_path / "none", log) == ["--overwrite"]


def test_all_roads_begin_again_even_if_the_first_is_broken_off(walk, machine, tmp_path):
    """Bug: of --seeds 2 --from rm, killed in the first road, the second road stayed done."""
    assert len(walk(seeds=2)) == 8
    machine.before["rm"] = kill
    with pytest.raises(Killed):
        walk(seeds=2, from_="rm")
    machine.before.clear()
    assert walk(seeds=2) == ["rm --overwrite", "ppo --overwrite", "evaluate"] * 2


@pytest.mark.parametrize("path, stage", [("sft/ckpt.pt", "sft"), ("ppo/metrics.jsonl", "ppo"),
                                         ("eval/ppo.jsonl", "evaluate")])
def test_a_stage_whose_files_are_gone_or_changed_is_not_done(path, stage, walk, tmp_path):
    """Bug: a road with a stage's outputs deleted, or replaced, was called done."""
    walk()
    (tmp_path / path).write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=f"{path} is not as {stage} left it; --from {stage} does"):
        walk()
    (tmp_path / path).unlink()
    with pytest.raises(UserError, match=f"{path} is missing, which {stage} makes; --from {stage}"):
        walk()
    walk(from_=stage)
    assert walk() == []


def test_a_file_edited_by_hand_is_gone_on_with_where_that_is_asked_for(walk, tmp_path):
    """Labels put in by hand: --from at the next stage takes them as they are. Results are not."""
    walk()
    (tmp_path / "sft" / "ckpt.pt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="--from rm goes on with the file as it is"):
        walk()
    assert walk(from_="rm") == ["rm --overwrite", "ppo --overwrite", "evaluate"]
    assert (tmp_path / "sft" / "ckpt.pt").read_text(encoding="utf-8") == "mine" and walk() == []
    (tmp_path / "eval" / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="results.json is not as evaluate left it; --from evaluate"):
        walk(overoptimize=True, from_="overoptimize")


def test_a_later_stage_is_not_begun_on_one_that_was_broken_off(walk, machine, tmp_path):
    """Bug: --from ppo trained on the half of a reward model that a kill had left."""
    machine.after["rm"] = kill
    with pytest.raises(Killed):
        walk()
    with pytest.raises(UserError, match="--from ppo: rm has not been done to its end"):
        walk(from_="ppo")
    assert list(log_of(tmp_path)["done"]) == ["sft"]


def test_a_road_walked_by_hand_can_be_gone_on_with(walk, tmp_path):
    """Without a log the files themselves have to do."""
    walk()
    (tmp_path / "speedrun.json").unlink()
    assert walk(from_="ppo") == ["ppo --overwrite", "evaluate"] and walk() == []


@pytest.mark.parametrize("code, says", [(3, "ended with exit code 3"),
                                        (-9, "was killed by signal 9")])
def test_a_command_that_fails_ends_the_road_where_it_can_go_on(code, says, walk, machine, tmp_path):
    run, machine.run = machine.run, lambda words, env: (code, 0.5, 0.25)
    with pytest.raises(UserError, match=f"{says}; after mending the cause, .*without --from"):
        walk()
    assert log_of(tmp_path)["running"] == "sft" and log_of(tmp_path)["done"] == {}
    machine.run = run
    assert walk() == ["sft", "rm", "ppo", "evaluate"]


def test_the_minutes_of_a_stage_are_those_of_all_its_parts(walk, machine, tmp_path):
    """Bug: of a stage that was resumed only the last part was counted."""
    run = machine.run

    def stopped(words, env):
        return (130, *run(words, env)[1:])

    machine.run = stopped
    for _ in range(2):
        with pytest.raises(UserError):
            walk()
    machine.run = run
    walk()
    assert log_of(tmp_path)["cpu_minutes"] == {"sft": 1.5, "rm": 0.5, "ppo": 0.5, "evaluate": 0.5}
    walk(from_="sft")
    assert log_of(tmp_path)["cpu_minutes"]["sft"] == 0.5


def test_what_a_system_does_not_tell_is_left_out_and_said(monkeypatch, tmp_path, capsys):
    """Bug: os.wait4 is missing on Windows, and the first stage ended in a traceback."""
    # Linux counts what a child was before it became another program: a copy of this process.
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # GB
    with speedrun.Stop() as stop:
        code, minutes, gb = stop.run(["python", "-c", "sum(i * i for i in range(2_000_000))"],
                                     dict(os.environ))
        assert code == 0 and 0 < minutes < 0.5 and 0.001 < gb < max(1, 1.01 * ours)
        monkeypatch.delattr(os, "wait4")
        assert stop.run(["python", "-c", "raise SystemExit(3)"], dict(os.environ)) == (3, None, None)
    log = {"cpu_minutes": {}, "peak_gb": {}}
    speedrun.print_table(speedrun.summarise([("a", log, evaluated(0))]), [("a", log, evaluated(0))])
    assert "CPU-minutes of a: not known" in capsys.readouterr().out


@pytest.mark.parametrize("seed, quick, folder", [
    (0, False, ""), (0, True, "/quick"), (2, False, "/seed_2"), (2, True, "/quick/seed_2")])
def test_each_road_has_a_folder_of_its_own(seed, quick, folder, walk, machine, tmp_path):
    walk(first_seed=seed, quick=quick)
    [[(out, *_)]] = machine.roads
    assert out == f"{tmp_path.as_posix()}{folder}" and Path(out, "speedrun.json").exists()


def test_out_counts_from_where_one_stands(machine, tmp_path, monkeypatch):
    """Bug: --out roads, given elsewhere, made a folder beside speedrun.py."""
    monkeypatch.chdir(tmp_path)
    speedrun.main(speedrun.Config(out="roads"))
    assert (tmp_path / "roads" / "speedrun.json").exists() and not (ROOT / "roads").exists()
    monkeypatch.chdir(ROOT)
    for name in ("out", "out/", "./out", str(ROOT / "out")):
        assert speedrun.checked(speedrun.Config(out=name)).out == "out"  # the short commands hold


# ---------------------------------------------------------------- signals

CHILD = """import os, signal, sys, time
def save(number, frame):
    print("child got", number, flush=True)
    if "slow" in sys.argv:
        return
    time.sleep(0.3)
    print("child saved", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGINT, save), signal.signal(signal.SIGTERM, save)
print("child", os.getpid(), flush=True)
while True:
    time.sleep(0.01)
"""


@contextlib.contextmanager
def road_at_work(tmp_path, *words):
    """speedrun.py with a stage that never ends: (its process, the stage's process id)."""
    (tmp_path / "child.py").write_text(CHILD, encoding="utf-8")
    command = shlex.join(["python", str(tmp_path / "child.py"), *words])
    (tmp_path / "road.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport speedrun\n"
        f"speedrun.commands = lambda *_: [{command!r}]\n"
        f"speedrun.main(speedrun.Config(out={str(tmp_path / 'out')!r}))\n", encoding="utf-8")
    process = subprocess.Popen([sys.executable, tmp_path / "road.py"], text=True, encoding="utf-8",
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    assert process.stdout.readline() == "\n" and process.stdout.readline() == f"$ {command}\n"
    child = int(process.stdout.readline().split()[1])
    try:
        yield process, child
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def ended(process):
    """What it printed, (stdout, stderr), once it ended."""
    try:
        return process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        pytest.fail("the road did not end")


def alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] != "Z"
    return False


@pytest.mark.parametrize("number, to_all", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_is_handed_on_to_the_stage_which_ends_first(number, to_all, tmp_path):
    """Bugs: the stage lived on, and a road walked again set a second one beside it; a terminal's
    Ctrl-C, which all of its processes get, reached the stage twice."""
    with road_at_work(tmp_path) as (process, child), contextlib.chdir(ROOT):
        with pytest.raises(UserError, match="in use by another"):  # a second road waits
            speedrun.main(speedrun.Config(out=str(tmp_path / "out")))
        (os.killpg if to_all else os.kill)(process.pid, number)
        out, err = ended(process)
        assert process.returncode == 128 + number
        assert out == f"child got {int(number)}\nchild saved\n" and not alive(child)
    assert "stopped at prepare; the same speedrun command, without --from, goes on" in err
    assert "Traceback" not in err
    assert log_of(tmp_path / "out")["running"] == "prepare"


def test_a_second_signal_ends_both_at_once(tmp_path):
    with road_at_work(tmp_path, "slow") as (process, child):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == f"child got {int(signal.SIGINT)}\n"
        time.sleep(0.1)
        assert process.poll() is None and alive(child)
        process.send_signal(signal.SIGINT)
        ended(process)
        assert process.returncode == 130
        for _ in range(100):
            if alive(child):
                time.sleep(0.05)
        assert not alive(child)


@pytest.mark.parametrize("options, seeds", [
    ({}, [0]), ({"seeds": 3}, [0, 1, 2]), ({"seeds": 2, "first_seed": 5}, [5, 6])])
def test_the_roads_seeds(options, seeds, monkeypatch, tmp_path):
    asked = []

    monkeypatch.setattr(speedrun, "walk", lambda seed, *_: asked.append(seed))
    monkeypatch.setattr(speedrun, "finish", lambda *_: None)
    with contextlib.chdir(ROOT):
        speedrun.main(speedrun.Config(out=str(tmp_path), **options))
    assert asked == seeds


def test_overoptimisation_is_read_off_smoothed_curves_by_hand(monkeypatch):
    """Of 40 iterations two make a window; gold is highest in that of iterations 10 and 11."""
    rows = [{"gold": -(i - 10.4) ** 2, "score": i, "kl": 2 * i} for i in range(40)]
    monkeypatch.setattr(speedrun, "metrics_of", lambda folder, *keys: rows)
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


def test_a_rates_interval_takes_in_that_seeds_differ_by_hand():
    """Bug: 3 seeds' answers pooled as if they were one model's, which makes the interval too narrow.

    Shares 0.8, 0.9 and 1.0 have the mean 0.9 and the deviation 0.1; Student's t for 2 degrees of
    freedom is 4.303, so the half-width is 4.303 * 0.1 / sqrt(3) = 0.24843, cut at 1.
    """
    def rate(*shares, of=1000):
        return speedrun.over_seeds([{"players": {"ppo": {"right": {
            "count": round(share * of), "of": of, "share": share}}}} for share in shares],
            "ppo", "right")

    found = rate(0.8, 0.9, 1.0)
    assert found["share"] == pytest.approx(0.9) and found["each"] == [0.8, 0.9, 1.0]
    assert found["low"] == pytest.approx(0.9 - 0.24843, abs=1e-5) and found["high"] == 1.0
    assert (found["count"], found["of"]) == (2700, 3000)
    found = rate(0.5, 0.51)  # 1 degree of freedom: 12.706 * 0.0070711 / sqrt(2) = 0.06353
    assert (found["low"], found["high"]) == (pytest.approx(0.505 - 0.06353, abs=1e-5),
                                             pytest.approx(0.505 + 0.06353, abs=1e-5))
    # Three seeds without a single case still allow some: Wilson's 3.8416 / (n + 3.8416), n = 3000.
    assert rate(0.0, 0.0, 0.0)["high"] == pytest.approx(0.0012789, abs=1e-6)
    assert rate(1.0, 1.0, 1.0)["low"] == pytest.approx(1 - 0.0012789, abs=1e-6)
    alone = rate(0.3)
    assert (alone["low"], alone["high"]) == wilson(300, 1000)
    many = rate(*[0.4, 0.6] * 10)  # 20 seeds take the last t, 2.262; the deviation is 0.1025978
    assert many["high"] == pytest.approx(0.5 + 2.262 * 0.1025978 / 20**0.5, abs=1e-6)


def test_the_table_is_the_mean_over_seeds_and_pools_their_counts():
    table = speedrun.summarise([("a", {}, evaluated(2)), ("b", {}, evaluated(0))])
    (compared,) = table["comparisons"].values()
    assert compared == {"wins": pytest.approx(0.6), "ties": 0.25, "losses": 0.0,
                        "rate": pytest.approx(0.7), "each": [0.8, 0.6],
                        "intervals": [[0.1, 0.9], [0.1, 0.9]]}
    assert table["players"]["sft"] == {"score": 2.0, "words": 4.0}
    assert table["players"]["ppo"] == {"score": 3.0, "words": 4.0, "kl": 7.0}
    assert table["rates"]["sft"]["right"] == {  # t's half-width, 12.706 * 0.1, is beyond 0
        "count": 8, "of": 20, "share": 0.4, "low": 0.0, "high": 1.0, "each": [0.5, 0.3]}
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
    # Of the shares 75% and 25% t allows everything; no case in 8, 3.8416 / 11.8416. No row for sft,
    # which lacks two rates.
    assert lines[2] == "ppo 3.00 7.00 4.0 40.0% 10.0% 50.0% [0.0%, 100.0%] 0.0% [0.0%, 32.4%]"
    assert lines[4] == ("ppo over sft 60.0% 25.0% 0.0% 70.0% 80.0% [10.0%, 90.0%] "
                        "60.0% [10.0%, 90.0%]")
    assert lines[5] == ("reward model: 80.0% of held-out pairs, ceiling 80.0%, share 1.00 "
                        "(1.10, 0.90); right against gold where answers differ in "
                        "manners only 70.0%")
    assert lines[7] == "seed 0: start reward 1.00, gold 2.00, KL 3.0"
    assert lines[8:] == ["CPU-minutes of a: 3.5 = sft 1.5 + rm 2.0; largest process 1.25 GB",
                         "CPU-minutes of b: not known, this system does not tell what a child took"]


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
