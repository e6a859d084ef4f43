"""A flat dataclass becomes a command line: one option per field, its comment the help text."""

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import re
from pathlib import Path

from minirlhf.plumbing import signals
from minirlhf.plumbing.commands import one_line_errors
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import read_file

LIMITS = {  # how a number's comment may end, and what is then expected of it
    "above 0": "above 0", "above 1": "above 1", "up to 1": "from 0 up to 1",
    "above 0, up to 1": "above 0 up to 1", "any sign": "of any sign",
}


def field_comments(config_class):
    """{field name: the comment on its line}, read from the class's own source."""
    comments = {}
    for line in inspect.getsource(config_class).splitlines():
        found = re.match(r"\s+(\w+): \w+ = .*?#\s*(.+)$", line)
        if found:
            comments[found[1]] = found[2]
    return comments


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists every option")


def parse_config(config_class, argv=None, description=None):
    """Build config_class from the command line (argv defaults to the program's own).

    `--lr 1` gives the float 1.0 where the field is a float; a bool field takes `--name` and
    `--no_name`; a field `from_` is the option `--from`, since `from` is a word of Python. A comment
    with `this | that` in it lists all that a str may be, and one that ends in "; above 0" says what
    a number may be (see check_numbers). Raises UserError on an unknown option, naming close
    matches, on a value of the wrong type, and on a number that makes no sense. Fields are int,
    float, str or bool, with a default each.
    """
    parser = _Parser(description=description, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS,  # only what was typed comes back
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    comments, names = field_comments(config_class), []
    for field in dataclasses.fields(config_class):
        option = f"--{field.name.rstrip('_')}"
        names += [option] + ([f"--no_{field.name}"] if field.type is bool else [])
        text = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        if field.type is bool:
            group = parser.add_mutually_exclusive_group()
            group.add_argument(option, dest=field.name, action="store_true", help=text)
            group.add_argument(f"--no_{field.name}", dest=field.name, action="store_false",
                               help=argparse.SUPPRESS if not field.default else "switch it off")
        else:
            listed = re.search(r"\w+(?: \| \w+)+", comments.get(field.name, ""))
            parser.add_argument(option, dest=field.name, type=field.type,
                                choices=listed and listed[0].split(" | "),
                                metavar=field.type.__name__.upper(), help=text)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "--help lists every option"
        raise UserError(f"unknown option {unknown[0]}; {hint}")
    typed, stored = vars(args), {}
    if typed.get("resume"):
        stored = read_settings(typed.get("out", config_class().out), config_class)
    cfg = config_class(**{**stored, **typed})
    check_numbers(cfg)
    return cfg


def read_settings(folder, config_class=None):
    """The options that a run was started with, as its config.json holds them; {} without one.

    config_class: of which they have to be; `resume` and `overwrite` are left out then.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        return {}
    try:
        settings = json.loads(read_file(path))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected the options of a run, found something else; put it back "
                        "as it was, or give another --out")
    if config_class is None:
        return settings
    types = {field.name: field.type for field in dataclasses.fields(config_class)}
    for name, value in settings.items():
        if name in types and type(value) not in (types[name], *[int] * (types[name] is float)):
            raise UserError(f"{path}: {name} is {value!r}, expected a {types[name].__name__}; put "
                            "it back as it was, or start anew with --overwrite")
    return {name: value for name, value in settings.items()
            if name in types and name not in ("resume", "overwrite")}


def check_numbers(cfg):
    """Refuse numbers that would fail, or train nothing, only after minutes: no steps, a NaN.

    A number has to be finite and at least 0, unless its comment ends in one of LIMITS. Where 0
    switches something off, the comment says so.
    """
    comments = field_comments(type(cfg))
    for field in dataclasses.fields(cfg):
        name, value = field.name, getattr(cfg, field.name)
        if field.type not in (int, float):
            continue
        if field.type is int and value >= (2**63 if name == "seed" else 10**9 + 1):
            limit = "below 2^63" if name == "seed" else "up to a billion"
            raise UserError(f"--{name}: expected a whole number {limit}")
        expected = LIMITS.get(comments.get(name, "").rpartition("; ")[2], "from 0")
        least = 1 if "above 1" in expected else 0
        too_small = value <= least if "above" in expected else value < 0 and "sign" not in expected
        too_large = "up to 1" in expected and value > 1
        if too_small or too_large or not math.isfinite(value):
            raise UserError(f"--{name} {value}: expected a number {expected}")


def command_line(main, config_class, description=None):
    """Parse the command line, run main(cfg), and end with exit code 2 on a UserError, with 130 on
    Ctrl-C and 143 on SIGTERM."""
    signals.listen()
    with one_line_errors():
        main(parse_config(config_class, None, description))
