"""Functions that users bring: a judge, a verifier, a way to write plain prompts.

Whatever goes wrong in them ends with one line that names their file, function and line, the prompt
at work, what came and what is expected. Each is tried before any work is done, on the first prompt.
"""

import copy
import json
import math
import re
import sys
import traceback
import types
from contextlib import contextmanager
from numbers import Real
from pathlib import Path

from minirlhf.plumbing.errors import UserError

VERDICT = ('a function (row, response, ended) that returns {"score": number, ...} or a number, all '
           "of them finite")
PLAIN = "a function (messages, few_shot) that returns a text to go on with"


def shown(value, most=80):
    """A value on one line that any terminal can print, shortened: it may be a whole story."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # half a character as \\udcff
    return text if len(text) <= most else text[: most - 3] + "..."


@contextmanager
def blaming(path, place, expected):
    """Turn what user code raises, sys.exit() included, into a UserError that names its line.

    path: the user's file; place: what the message begins with. Catching everything hides nothing
    here: the code is the user's, and so is the mistake.
    """
    try:
        yield
    except UserError as error:  # it says itself what is expected
        raise UserError(f"{place}: {error}") from None
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines.append(error.lineno)
        line = f", line {lines[-1]}" if lines else ""
        raise UserError(f"{place}{line}: expected {expected}, found {type(error).__name__}: "
                        f"{shown(str(error), 300)}; mend the file") from None


def load_function(spec):
    """The function that `file.py:name` points to; UserError where there is none to be had."""
    path, _, name = spec.rpartition(":")
    if not name or not Path(path).is_file():
        raise UserError(f"{spec!r} is no function; write it as file.py:name, with a file that "
                        "exists")
    # Not under the file's own name: a user's json.py must not stand in for another module.
    module = types.ModuleType(f"user_code_{Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    with blaming(path, path, f"Python that defines {name}"):
        code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
        exec(code, module.__dict__)
    if not hasattr(module, name):
        raise UserError(f"{path} defines no function {name}")
    if not callable(getattr(module, name)):
        raise UserError(f"{path}: expected {name} to be a function, found "
                        f"{shown(getattr(module, name))}; give the name of a function")
    return getattr(module, name)


def load_checked(spec, row, expected, check, trials, given=lambda row: row):
    """The user's function, wrapped so that every fault of it is a UserError.

    row: a prompt to try it on, with each of `trials` (tuples of further arguments); expected: what
    the function has to be, for the message; check(result) returns what the caller gets, or None
    where the result is not as expected; given(row): what the function sees of a row, a copy of it,
    so that user code can't change the data. Returns a function (row, *further arguments).
    """
    function, path = load_function(spec), spec.rpartition(":")[0]

    def checked(row, *arguments):
        user = json.dumps(shown(row["messages"][-1]["content"], 60), ensure_ascii=False)
        place = f"{spec} on the prompt {user}"
        with blaming(path, place, expected):
            result = function(copy.deepcopy(given(row)), *arguments)
        value = check(result)
        if value is None:
            raise UserError(f"{place}: expected {expected}, found {shown(result)} "
                            f"({type(result).__name__}); mend the function")
        return value

    for arguments in trials:
        checked(row, *arguments)
    return checked


def checked_verdict(result):
    """A judge's result as a dict whose numbers are finite floats, or None; a bool is no number."""
    verdict = dict(result) if isinstance(result, dict) else {"score": result}
    for name, value in verdict.items():
        if isinstance(value, Real) and not isinstance(value, bool):
            try:
                verdict[name] = float(value)
            except OverflowError:  # an int beyond all floats
                return None
            if not math.isfinite(verdict[name]):
                return None
    return verdict if type(verdict.get("score")) is float else None


def load_judge(spec, row):
    """The judge(row, response, ended) -> {"score": float, ...} that `file.py:name` points to.

    row: a prompt (see `formats.read_prompts`) to try it on, once with an answer and once with an
    empty one that did not end. A judge may also return a number alone, which becomes the score.
    """
    return load_checked(spec, row, VERDICT, checked_verdict, [("An answer.", True), ("", False)])


def checked_plain(result):
    """A plain prompt, or None where it is no text, or a blank one, or holds half a character."""
    good = isinstance(result, str) and result.strip() and not re.search("[\ud800-\udfff]", result)
    return result if good else None


def load_plain(spec, row):
    """The plain(row, few_shot) -> text that `file.py:name`, a function of messages, writes."""
    return load_checked(spec, row, PLAIN, checked_plain, [(True,), (False,)],
                        given=lambda row: row["messages"])
