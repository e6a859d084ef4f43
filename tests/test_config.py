"""The command line that a flat dataclass becomes."""

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from minirlhf.plumbing.config import command_line, field_comments, parse_config
from minirlhf.plumbing.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    num_steps: int = 100  # optimizer steps; above 0
    beta: float = 0.1  # weight of the KL, 100% honest
    share: float = 0.5  # of the rows; up to 1
    top_p: float = 1.0  # mass of the nucleus; above 0, up to 1
    missing_end_score: float = -3.0  # for a response that never ended; any sign
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


@pytest.mark.parametrize("argv, message", [
    (["--num_steps", "0"], "--num_steps 0: expected a number above 0"),
    (["--seed", "-1"], "--seed -1: expected a number from 0"),
    (["--beta", "nan"], "--beta nan: expected a number from 0"),
    (["--beta", "-0.1"], "--beta -0.1: expected a number from 0"),
    (["--missing_end_score=-inf"], "expected a number of any sign"),
    (["--share", "1.5"], "--share 1.5: expected a number from 0 up to 1"),
    (["--share", "-0.5"], "--share -0.5: expected a number from 0 up to 1"),
    (["--top_p", "0"], "--top_p 0.0: expected a number above 0 up to 1"),
    (["--top_p", "1.1"], "--top_p 1.1: expected a number above 0 up to 1"),
    (["--seed", str(2**63)], "--seed: expected a whole number below"),
])
def test_a_comments_end_limits_its_number(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_config(Config, argv)


def test_the_limits_themselves_are_allowed():
    cfg = parse_config(Config, ["--num_steps=1", "--seed=0", "--share=0", "--top_p=1", "--beta=0"])
    assert (cfg.num_steps, cfg.seed, cfg.share, cfg.top_p, cfg.beta) == (1, 0, 0.0, 1.0, 0.0)


def config_of(path):
    """The Config class of a script, imported by its file's path."""
    spec = importlib.util.spec_from_file_location(f"config_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # inspect looks a class's source up there
    spec.loader.exec_module(module)
    return module.Config


SCRIPTS = [path for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*/*.py")])
           if "command_line(main, Config" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_scripts_defaults_pass_its_own_limits(path):
    """Bug: the limits stood in a list elsewhere, which did not know of `--fold -1`, the default of
    data/hh_rlhf/prepare.py; so that script refused to start."""
    config = config_of(path)
    assert parse_config(config, []) == config()


def test_the_fields_comments_are_the_help_text(capsys):
    assert field_comments(Config)["num_steps"] == "optimizer steps; above 0"
    assert "bf16" not in field_comments(Config)
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, ["--help"], description="Trains\n  something.")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for words in ("Trains something.", "--num_steps INT optimizer steps; above 0 (default: 100)",
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
