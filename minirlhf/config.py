"""A flat dataclass becomes a command line: one option per field, its comment the help text."""

import argparse
import dataclasses
import difflib
import inspect
import re
import sys


class UserError(ValueError):
    """Something a user can cause and mend: the message says what, where and how to mend it.

    `command_line` prints it and exits with 2. Any other exception is a bug and keeps its traceback.
    """


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
    `--no_name`; a field `from_` is the option `--from`, since `from` is a word of Python. Raises UserError on an unknown option, naming close matches, and on a value of the
    wrong type. Fields are int, float, str or bool, with a default each.
    """
    parser = _Parser(description=description, allow_abbrev=False,
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
            parser.set_defaults(**{field.name: field.default})
        else:
            parser.add_argument(option, dest=field.name, type=field.type, default=field.default,
                                metavar=field.type.__name__.upper(), help=text)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "--help lists every option"
        raise UserError(f"unknown option {unknown[0]}; {hint}")
    return config_class(**vars(args))


def command_line(main, config_class, description=None):
    """Parse the command line, run main(cfg), and end with exit code 2 on a UserError."""
    try:
        main(parse_config(config_class, None, description))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
