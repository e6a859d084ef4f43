"""Bugs to plant into minirlhf/plumbing/folders.py."""

from bugs import Bug

FILE = "minirlhf/plumbing/folders.py"
BUGS = [
    Bug("", "FILES = (*NAMES, ", "FILES = (", "test_overwrite_starts_anew",
        "a run that begins anew keeps the checkpoints of the one before"),
    Bug("check_same_run", "before != digest", "False", "test_a_run_does_not_go_on",
        "a run goes on with other data, or against another reference"),
    Bug("check_folder", "present and not is_run", "False", "test_what_no_run_wrote",
        "somebody's files are taken for a run's"),
    Bug("check_folder", 'source.parent if source.suffix == ".pt" else source', "source",
        "test_a_run_does_not_replace", "--init X/ckpt.pt --out X evades the guard"),
    Bug("changed_settings", "new.get(length, 0) > old[length]", "False",
        "test_a_run_may_be_made_longer", "a run can't be made longer"),
]
