"""Bugs to plant into minirlhf/plumbing/judges.py."""

from bugs import Bug

FILE = "minirlhf/plumbing/judges.py"
BUGS = [
    Bug("blaming", "(Exception, SystemExit)", "Exception", "test_a_judge_that_fails",
        "a judge that calls sys.exit(0) ends the training with a success"),
    Bug("checked_verdict", "not math.isfinite(verdict[name])", "False",
        "test_a_verdict_that_is_none", "a judge's NaN is a score"),
    Bug("checked_verdict", " and not isinstance(value, bool)", "", "test_a_verdict_that_is_none",
        "a judge's True is a score of 1"),
    Bug("load_checked", "copy.deepcopy(given(row))", "given(row)", "test_a_judge_cannot_change",
        "a judge may change the rows that are trained on"),
    Bug("load_function", "sys.modules[module.__name__] = module", "pass",
        "test_a_judge_of_any_kind", "a judge's file can't hold a dataclass"),
    Bug("blaming", "lines[-1]", "lines[0]", "test_a_judge_that_fails",
        "the line that is named is where the judge calls what fails"),
]
