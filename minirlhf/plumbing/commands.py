"""What scripts share that read options by hand or write files: one-line errors, outputs checked."""

import json
import sys
from contextlib import contextmanager

from minirlhf.plumbing import signals
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import check_output

MOST_SAMPLES = 5_000_000  # about 10 GB of short answers as Python lists
MOST_SEQUENCES = 100_000  # of a batch: even a tiny model's cache then takes tens of GB


@contextmanager
def one_line_errors():
    """End the program with exit code 2 and one line on a UserError; with 130 on Ctrl-C, 143 on
    SIGTERM. Any other exception is a bug and keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a console that lacks a character shows its number
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except signals.Stopped as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(128 + stop.number) from None


def run_command(parser, argv, main):
    """Run main(args) on an argparse parser's options, each mistake one line.

    `config.command_line` does the same where the options are a dataclass.
    """
    def refuse(message):  # argparse itself would print its usage, on several lines
        raise UserError(f"{message}; --help lists every option")

    parser.error = refuse
    with one_line_errors():
        return main(parser.parse_args(argv))


def check_file(option, path, ours, endings=()):
    """Refuse, before any work is done, an output that can't be written or isn't ours to replace.

    option: how the user named it, for the message; ours(text) is true of a file that this project
    wrote; endings: what the name has to end in, where the readers ask for it.
    """
    if endings and not str(path).endswith(tuple(endings)):
        raise UserError(f"{option} {path}: expected a name in {' or '.join(endings)}; rename it")
    check_output(path, ours)


def check_amount(num_prompts, num_samples, batch_size, option="--num_samples"):
    """Refuse more samples, or a larger batch, than any memory holds: else it would fill up first.

    option: which one says how many samples there are of each prompt.
    """
    if num_prompts * num_samples > MOST_SAMPLES:
        raise UserError(f"{option} {num_samples}: with {num_prompts:,} prompts that is more than "
                        f"{MOST_SAMPLES:,} samples in memory; give fewer, or --limit the prompts")
    if min(batch_size, num_prompts * num_samples) > MOST_SEQUENCES:
        raise UserError(f"--batch_size {batch_size}: expected at most {MOST_SEQUENCES:,} sequences "
                        "in a batch")


def has_keys(*keys):
    """A test for `check_file`: whether a text begins with a JSON object that has these keys."""
    def ours(text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and set(keys) <= set(value)
    return ours
