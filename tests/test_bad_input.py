"""A user's mistake ends with one clear message and exit code 2, before any training time is spent.

Every case runs a script's real command line: what, where, and how to mend it have to be in the
message, no traceback, and no run folder may be left behind.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_road import SCRIPTS, chat, write_rows

import evaluate
import sample
import speedrun
from minirlhf.model import GPT, ModelConfig, ScalarModel
from minirlhf.tokenizer import Tokenizer
from minirlhf.plumbing import runs
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.checkpoints import load_checkpoint

ALL = {**SCRIPTS, "sample": sample, "evaluate": evaluate, "speedrun": speedrun}
ROOT = Path(__file__).parent.parent


@pytest.fixture
def refused(road, tmp_path, monkeypatch, capsys):
    """refused(script, **options) -> the message, after exit code 2 and without any training."""
    def work(*args, **kwargs):
        raise AssertionError("training or sampling began before the mistake was found")

    def run(script, *argv, **options):
        module = ALL[script]
        if script in SCRIPTS:
            options = {**vars(road.config(script, tmp_path / "run")), **options}
            for name in ("resume", "overwrite", "share_critic", "whiten", "bias", "tied",
                         "tensorboard"):
                if name in options and options.pop(name):
                    argv = (*argv, f"--{name}")
        if script == "sample":
            options = {"model": road.folder / "sft", **options}
        if script == "evaluate":
            options = dict(models="", against=road.folder / "sft", prompts=road.prompts,
                           out=tmp_path / "run", reward_model=road.folder / "rm") | options
        words = [f"--{name}={value}" for name, value in options.items()]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *words, *argv])
            patch.setattr(runs.Run, "log", work)
            if script in ("sample", "evaluate"):
                patch.setattr(module, "sample_prompts", work)
            with pytest.raises(SystemExit) as stop:
                command_line(module.main, module.Config)
        message = capsys.readouterr().err
        assert stop.value.code == 2
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    return run


def data_option(stage):
    return {"pretrain": "text", "ppo": "prompts"}.get(stage, "data")


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_missing_or_an_empty_file(stage, refused, tmp_path):
    option = data_option(stage)
    path = tmp_path / "data.jsonl"
    assert f"{path}: no such file" in refused(stage, **{option: path})
    path.write_text("", encoding="utf-8")
    assert f"{path}: expected text, found an empty file" in refused(stage, **{option: path})
    assert not (tmp_path / "run").exists()


GOOD = {
    "sft": {"messages": chat("cow?", "moo")}, "rm": {"prompt": "cow?", "chosen": "moo",
                                                     "rejected": "woof"},
    "ppo": {"prompt": "cow?"}, "pretrain": {"text": "A cow says moo."},
}
GOOD["dpo"] = GOOD["rm"]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_broken_json_in_line_7(stage, refused, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text((json.dumps(GOOD[stage]) + "\n") * 6 + '{"prompt": "cow?", \n', encoding="utf-8")
    message = refused(stage, **{data_option(stage): path})
    assert f"{path}, line 7: " in message and "broken JSON" in message


@pytest.mark.parametrize("stage, row, words", [
    ("sft", {"dialogue": []}, "expected the key messages"),
    ("rm", {"prompt": "cow?", "chosen": "moo"}, "expected chosen and rejected"),
    ("dpo", {"chosen": "moo", "rejected": "baa"}, "expected a prompt under"),
    ("ppo", {"question": "cow?"}, "expected exactly one of the keys prompt, messages"),
    ("pretrain", {"content": "moo"}, 'the key "text"'),
    ("sft", {"messages": chat("cow?", "moo")[::-1]}, "role"),
    ("sft", {"messages": chat("cow?")}, "a demonstration ends with the assistant"),
    ("ppo", {"messages": chat("cow?", "moo")}, "a prompt with the user"),
    ("rm", {"prompt": "", "chosen": "moo", "rejected": "baa"}, "to have text in it"),
])
def test_a_missing_key_or_a_wrong_role_order(stage, row, words, refused, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [GOOD[stage], row])
    message = refused(stage, **{data_option(stage): path})
    assert f"{path}, line 2: " in message and words in message


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_an_answer_longer_than_the_context(stage, refused, tmp_path):
    long = "moo " * 90
    row = {"messages": chat("cow?", long)} if stage == "sft" else {
        "prompt": "cow?", "chosen": long, "rejected": "baa"}
    path = write_rows(tmp_path / "data.jsonl", [GOOD[stage], row])
    message = refused(stage, data=path)
    assert str(path) in message and " 2" in message and "64 fit" in message
    assert "--too_long drop" in message and "--too_long cut" in message


def test_a_prompt_that_fills_the_whole_context(refused, tmp_path, road):
    prompt = "What does a cow say? " * 40
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "cow?"}, {"prompt": prompt}])
    for script, options in (("ppo", dict(prompts=path)), ("evaluate", dict(prompts=path)),
                            ("sample", dict(prompts=path, save=tmp_path / "s.jsonl"))):
        message = refused(script, **options)
        assert f"{path}: prompt 2 has " in message and "fills the whole context of 64" in message
    assert "fills the whole context" in refused("sample", prompt=prompt)
    assert "leave room for a response" in refused_plain(road, prompt)


def refused_plain(road, prompt):
    """--plain meets its limit in `generate`, which `refused` does not let happen."""
    command = [sys.executable, "sample.py", "--model", road.folder / "sft", "--plain"]
    done = subprocess.run([*command, "--prompt", prompt], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr


def test_too_little_data(refused, tmp_path):
    (tmp_path / "text.txt").write_text("A cow says moo.\n", encoding="utf-8")
    assert "fewer than one block of 64" in refused("pretrain", text=tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text("A cow says moo. " * 100, encoding="utf-8")
    assert "needs 64 of them: give about 3200 tokens or more" in refused("pretrain", text=tmp_path / "text.txt")
    for stage in ("sft", "rm", "dpo"):
        path = write_rows(tmp_path / "data.jsonl", [GOOD[stage]])
        assert "too few" in refused(stage, data=path)
    same = write_rows(tmp_path / "same.jsonl", [{"prompt": "cow?", "chosen": "moo",
                                                 "rejected": "moo"}] * 9)
    assert "too few" in refused("rm", data=same) and "too few" in refused("dpo", data=same)


# ---------------------------------------------------------------- options

@pytest.mark.parametrize("script", ALL)
def test_an_unknown_option_or_an_ill_typed_one(script, refused):
    assert "unknown option --sede; did you mean --seed" in refused(script, "--sede", "1")
    option = {"speedrun": "seeds"}.get(script, "seed")
    assert f"--{option}: invalid int value: 'x'" in refused(script, f"--{option}", "x")


@pytest.mark.parametrize("script, option, values", [
    ("pretrain", "num_steps", [0, -1]), ("ppo", "num_steps", [0]), ("sft", "num_epochs", [0]),
    *((stage, "batch_size", [0, -8]) for stage in ("pretrain", "sft", "rm", "dpo", "sample")),
    ("ppo", "rollout_size", [0]), ("ppo", "minibatch_size", [0]), ("ppo", "micro_batch_size", [-1]),
    ("sample", "temperature", [-0.5, "nan", "inf"]), ("ppo", "temperature", [-1.0, 0.0]),
    ("sample", "num_samples", [0]), ("sample", "max_new_tokens", [0]),
    ("sample", "top_p", [0.0, 2.0]),
    ("ppo", "max_new_tokens", [0]), ("evaluate", "max_new_tokens", [0]), ("sample", "limit", [-1]),
    ("pretrain", "lr", [-1.0, "nan"]), ("pretrain", "block_size", [0]), ("sft", "eval_every", [0]),
    ("sft", "save_every", [0]), ("rm", "held_out", [1.5, -0.1]), ("ppo", "gamma", [1.1]),
    ("ppo", "grad_clip", [0.0]), ("pretrain", "dropout", [2.0]), ("speedrun", "seeds", [0, -2]),
    ("ppo", "missing_end_score", ["nan"]),
])
def test_numbers_that_make_no_sense(script, option, values, refused, road, tmp_path):
    options = dict(prompts=road.prompts, save=tmp_path / "s.jsonl") if script == "sample" else {}
    for value in values:
        assert f"error: --{option} " in refused(script, **{**options, option: value})


@pytest.mark.parametrize("script, option, words", [
    ("sft", "too_long", "refuse, drop, cut"), ("ppo", "kl_kind", "k1, k2, k3"),
    ("dpo", "pairs", "best_worst, all"), ("pretrain", "norm", "layernorm, rmsnorm"),
    ("pretrain", "dtype", "auto, float32, bfloat16, float16"), ("pretrain", "size", "gpt2-xl"),
    ("sample", "dtype", "auto, float32, bfloat16"), ("speedrun", "from", "prepare, tokenizer"),
])
def test_a_name_that_is_no_choice_is_answered_with_the_choices(script, option, words, refused,
                                                               tmp_path, monkeypatch):
    extra = {"out": tmp_path} if script == "speedrun" else {}
    monkeypatch.chdir(ROOT)  # speedrun changes there itself
    message = refused(script, **{option: "banana"}, **extra)
    assert "banana" in message and words in message.replace("'", "")


@pytest.mark.parametrize("options, words", [
    (dict(n_embd=30, n_head=4), "n_embd 30 must be a multiple of n_head 4"),
    (dict(n_embd=12, n_head=4, positions="rope"), "a head has 12 / 4, an odd number"),
    (dict(device="banana"), "--device banana: no such device"),
    (dict(tokenizer="missing.json"), "missing.json: no such file"),
])
def test_a_model_that_cannot_be_built(options, words, refused):
    assert words in refused("pretrain", **options)


def test_sample_wants_one_thing_to_do(refused, road, tmp_path):
    assert "give one of --prompt TEXT, --chat" in refused("sample")
    assert "give one of" in refused("sample", "--chat", prompt="cow?")
    assert "go together" in refused("sample", prompts=road.prompts)
    assert "go together" in refused("sample", prompt="cow?", save=tmp_path / "s.jsonl")
    assert "--plain goes with --prompt" in refused("sample", "--plain", "--chat")


def test_evaluate_wants_somebody_to_score(refused, road, tmp_path):
    assert "nobody to score" in refused("evaluate", reward_model="")
    assert "is no function" in refused("evaluate", judge="judge.py")
    assert "no such file" in refused("evaluate", preferences=tmp_path / "p.jsonl")
    twin = tmp_path / "sft"
    twin.symlink_to(road.folder / "sft")
    assert "have the same last name" in refused("evaluate", models=twin)
    tied = {"prompt": "cow?", "output": ["moo", "Moo."], "ranks": [0, 0]}
    ties = write_rows(tmp_path / "ties.jsonl", [tied])
    assert "holds ties only" in refused("evaluate", preferences=ties)
    one = write_rows(tmp_path / "one.jsonl", [tied, {**tied, "ranks": [0, 1]}])
    with pytest.raises(AssertionError, match="training or sampling began"):  # that is enough
        refused("evaluate", preferences=one)
    long = write_rows(tmp_path / "long.jsonl", [{**tied, "output": ["moo", "moo " * 99]}])
    assert "has an answer that ends at token" in refused("evaluate", preferences=long)


def test_the_reward_model_wants_two_prompts_to_measure_its_scores_on(refused):
    assert "at least 2 prompts are needed" in refused("rm", num_normalize=1)
    with pytest.raises(AssertionError, match="training or sampling began"):  # two are enough
        refused("rm", num_normalize=2)


# ---------------------------------------------------------------- run folders and checkpoints

@pytest.mark.parametrize("script, option, stage", [
    ("sft", "init", "pretrain"), ("rm", "init", "sft"), ("ppo", "init", "sft"),
    ("ppo", "reward_model", "rm"), ("dpo", "init", "sft"), ("sample", "model", "sft"),
    ("evaluate", "models", "dpo"), ("evaluate", "against", "sft"),
    ("evaluate", "reward_model", "rm"), ("evaluate", "base", "pretrain")])
def test_a_missing_stage_names_the_command_that_makes_it(script, option, stage, refused, tmp_path):
    options = {"prompt": "cow?"} if script == "sample" else {}
    message = refused(script, **{option: tmp_path / "out" / stage}, **options)
    assert "ckpt.pt does not exist; make it with: python train_" + stage in message


def test_a_folder_in_use(refused, road, tmp_path):
    road.run("sft", tmp_path / "run")
    message = refused("sft")
    assert f"{tmp_path / 'run'} already holds a run" in message and "--overwrite" in message
    assert "differ" in refused("sft", "--resume", lr=0.5)
    assert "holds no run to go on with" in refused("sft", "--resume", out=tmp_path / "new")
    for init in (tmp_path / "run", tmp_path / "run" / ".." / "run"):
        assert "the run would replace what it starts from" in refused(
            "sft", "--overwrite", init=init)


def test_a_truncated_checkpoint_and_one_of_the_wrong_kind(refused, road, tmp_path):
    for name in ("sft", "rm"):
        (tmp_path / name).mkdir()
        whole = (road.folder / name / "ckpt.pt").read_bytes()
        (tmp_path / name / "ckpt.pt").write_bytes(whole[: len(whole) // 2])
    for script, option, name in (("rm", "init", "sft"), ("ppo", "reward_model", "rm"),
                                 ("sample", "model", "sft"), ("evaluate", "reward_model", "rm")):
        options = {"prompt": "cow?"} if script == "sample" else {}
        message = refused(script, **{option: tmp_path / name}, **options)
        assert f"{tmp_path / name / 'ckpt.pt'} cannot be read" in message
    assert "holds a gpt model, a scalar model is needed" in refused(
        "ppo", reward_model=road.folder / "sft")
    assert "holds a scalar model, a gpt model is needed" in refused("dpo", init=road.folder / "rm")
    torch.save({"weights": 1}, tmp_path / "sft" / "ckpt.pt")
    assert "is no checkpoint of minirlhf" in refused("dpo", init=tmp_path / "sft")


@pytest.fixture
def other(road, tmp_path):
    """A folder with an SFT and a reward model, untrained, of another vocabulary."""
    tokenizer = Tokenizer.train(road.text.read_text(encoding="utf-8"), 300)
    for stage, kind in (("sft", GPT), ("rm", ScalarModel)):
        checkpoint = load_checkpoint(road.folder / stage)
        cfg = ModelConfig(**{**checkpoint["model_config"], "vocab_size": tokenizer.n_vocab})
        checkpoint.update(model=kind(cfg).state_dict(), model_config=dataclasses.asdict(cfg),
                          tokenizer=tokenizer.to_dict())
        (tmp_path / stage).mkdir()
        torch.save(checkpoint, tmp_path / stage / "ckpt.pt")
    return tmp_path


def test_a_checkpoint_of_another_vocabulary(refused, other):
    assert "another vocabulary than --init" in refused("ppo", reward_model=other / "rm")
    assert "another vocabulary" in refused("evaluate", against=other / "sft")
    assert "another vocabulary" in refused("evaluate", reward_model=other / "rm")


def test_a_checkpoint_of_another_vocabulary_of_the_same_size(refused, road, tmp_path):
    checkpoint = load_checkpoint(road.folder / "rm")
    checkpoint["tokenizer"] = Tokenizer.train(road.text.read_text(encoding="utf-8").upper(),
                                              road.tokenizer.n_vocab).to_dict()
    (tmp_path / "rm").mkdir()
    torch.save(checkpoint, tmp_path / "rm" / "ckpt.pt")
    assert "another vocabulary than --init" in refused("ppo", reward_model=tmp_path / "rm")


def test_the_command_itself_prints_one_line_and_exits_with_2(tmp_path):
    """Once in a process of its own, as a user meets it."""
    done = subprocess.run(
        [sys.executable, "train_sft.py", "--init", tmp_path / "out" / "pretrain",
         "--out", tmp_path / "out" / "sft"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (f"error: {tmp_path}/out/pretrain/ckpt.pt does not exist; make it with: "
                           "python train_pretrain.py\n")
