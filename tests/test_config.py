"""The command line that a flat dataclass becomes."""

import sys
from dataclasses import dataclass

import pytest

from minirlhf.plumbing.config import command_line, field_comments, parse_config
from minirlhf.plumbing.errors import UserError


@dataclass
class Config:
    num_steps: int = 100  # optimizer steps
    beta: float = 0.1  # weight of the KL, 100% honest
    missing_end_score: float = -3.0  # for a response that never ended
    run: str = "sft"  # name of the run, as in "out/sft#1"
    share_critic: bool = False  # one trunk for both
    bf16: bool = True
    seed: int = 0  # of everything


def test_without_options_the_defaults_come():
    assert parse_config(Config, []) == Config()


def test_values_take_the_type_of_their_field():
    cfg = parse_config(Config, ["--beta", "1", "--num_steps", "7", "--run=x y", "--share_critic",
                                "--no_bf16", "--missing_end_score", "-2"])
    assert cfg == Config(num_steps=7, beta=1.0, missing_end_score=-2.0, run="x y",
                         share_critic=True, bf16=False)
    assert type(cfg.beta) is float and type(cfg.missing_end_score) is float


@pytest.mark.parametrize("argv, message", [
    (["--num_step", "5"], "unknown option --num_step; did you mean --num_steps"),
    (["--bta=0.2"], "unknown option --bta=0.2; did you mean --beta"),
    (["--no_share_critics"], "did you mean --no_share_critic"),
    (["--quux", "1"], "unknown option --quux; --help lists every option"),
    (["stray"], "unknown option stray"),
    (["--num_steps", "1.5"], "--num_steps.*invalid int value: '1.5'"),
    (["--beta", "much"], "--beta.*invalid float value: 'much'"),
    (["--beta"], "--beta.*expected one argument"),
    (["--bf16", "--no_bf16"], "not allowed with"),
])
def test_mistakes_are_refused_with_a_hint(argv, message):
    with pytest.raises(UserError, match=message):
        parse_config(Config, argv)


def test_the_fields_comments_are_the_help_text(capsys):
    assert field_comments(Config)["num_steps"] == "optimizer steps"
    assert "bf16" not in field_comments(Config)
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, ["--help"], description="Trains\n  something.")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for words in ("Trains something.", "--num_steps INT optimizer steps (default: 100)",
                  "weight of the KL, 100% honest (default: 0.1)", "(default: -3.0)",
                  "one trunk for both (default: False)", "--no_bf16"):
        assert words in text


def test_command_line_ends_a_users_mistake_with_one_line_and_exit_code_2(monkeypatch, capsys):
    def main(cfg):
        raise UserError(f"no run called {cfg.run!r}; train it first")

    monkeypatch.setattr(sys, "argv", ["train.py", "--run", "lost"])
    with pytest.raises(SystemExit) as stop:
        command_line(main, Config)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no run called 'lost'; train it first\n"
    monkeypatch.setattr(sys, "argv", ["train.py", "--runn", "lost"])
    with pytest.raises(SystemExit) as stop:
        command_line(main, Config)
    assert stop.value.code == 2 and "did you mean --run" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(cfg):
        raise ValueError("a bug, not a user's mistake")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ValueError, match="a bug"):
        command_line(main, Config)
