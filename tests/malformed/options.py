"""Numbers, names and paths on the command line."""

from malformed import Case

CASES = [
    Case("an unknown option", lambda road, folder: ["train_sft.py", "--sede", "1"],
         "did you mean --seed"),
]
