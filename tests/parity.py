"""The table "Checked against" of docs/tests.md: how close each number comes to an oracle.

    python tests/parity.py            measure: run tests/test_oracles.py and print the table
    python tests/parity.py --write    and put it into docs/tests.md

The table cannot drift from the tests. A test fails where it measures a number that has no row, or a
row that states more than the test allows, and where the page has a row of it that it no longer
measures. The error itself is held to the test's tolerance, not to the page: the last digits are
another machine's as soon as its matrix products add up in another order.
"""

import argparse
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "tests.md"
TESTS = Path(__file__).parent / "test_oracles.py"
BEGIN, END = "<!-- parity -->\n", "<!-- /parity -->\n"
REWRITE = "measure the table again with: python tests/parity.py --write"

# Four texts. The error is its number, with one digit, and a unit where it has one.
Row = namedtuple("Row", "quantity oracle error test")


def relative_error(actual, expected):
    """max |a - b| / max |b| of two tensors; of two lists of tensors, the largest over its pairs.

    The largest entry is the scale, so entries that are 0 up to rounding do no harm, while one wrong
    entry shows. Where all of b is 0 only exact equality has an error, 0; NaN anywhere gives NaN.
    """
    if not isinstance(actual, (list, tuple)):
        actual, expected = [actual], [expected]
    errors = []
    for a, b in zip(actual, expected, strict=True):
        a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
        assert a.shape == b.shape, f"{tuple(a.shape)} is compared with {tuple(b.shape)}"
        gap = (a - b).abs().max()
        errors.append(gap / b.abs().max() if gap != 0 else gap)
    return torch.stack(errors).max().item()  # a tensor's max keeps a NaN, Python's may lose it


def read_table(text):
    """The rows between the page's two markers."""
    table = text.split(BEGIN)[1].split(END)[0]
    return [Row(*(cell.strip().strip("`") for cell in line.strip("|").split("|")))
            for line in table.splitlines()[2:]]


def table_of(rows):
    """Rows as Markdown."""
    lines = [f"| {row.quantity} | {row.oracle} | {row.error} | `{row.test}` |" for row in rows]
    return "\n".join(["| quantity | oracle | largest error | test |", "|---|---|---|---|", *lines])


def with_table(text, rows):
    """The page's text with these rows between its markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table_of(rows) + "\n" + END + rest.split(END)[1]


def find_fault(row, tolerance, table):
    """What is wrong with the table, where a test has measured `row`, allowing this; else None."""
    same = [r for r in table if r._replace(error="") == row._replace(error="")]
    if len(same) != 1:
        return f"docs/tests.md has {len(same)} rows {row.quantity!r}, {row.oracle!r}, {row.test}"
    if not float(same[0].error.split()[0]) <= tolerance:
        return (f"docs/tests.md states an error of {same[0].error} for {row.quantity!r}, more than "
                f"the test allows: {tolerance:.0e}")
    return None


def find_orphans(test, measured, table):
    """The quantities of those rows of a test that it has not measured."""
    known = [row._replace(error="") for row in measured]
    return [row.quantity for row in table
            if row.test == test and row._replace(error="") not in known]


@pytest.fixture
def parity(request):
    """parity(quantity, oracle, actual, expected, tolerance): compare, and hold the page to it.

    actual, expected: tensors, or lists of tensors for a quantity with several cases. Their
    `relative_error` must be within tolerance. With standard_error, a tensor, the error is the
    largest |a - b| / standard_error instead.
    """
    test, failed_before = request.function.__name__, request.session.testsfailed
    recording = getattr(request.config, "parity_rows", None)
    measured, table = [], read_table(PAGE.read_text(encoding="utf-8")) if recording is None else []

    def check(quantity, oracle, actual, expected, tolerance, standard_error=None):
        if standard_error is None:
            error = relative_error(actual, expected)
            shown = f"{error:.0e}" if error else "0"
        else:
            error = ((actual - expected).abs() / standard_error).max().item()
            shown = f"{error:.1f} standard errors"
        if not error <= tolerance:
            pytest.fail(f"{quantity}: the error is {error:.1e}, allowed is {tolerance:.0e}")
        row = Row(quantity, oracle, shown, test)
        measured.append(row)
        fault = None if recording is not None else find_fault(row, tolerance, table)
        if fault:
            pytest.fail(f"{fault}; {REWRITE}")

    yield check
    if recording is not None:
        recording.extend(measured)
    elif request.session.testsfailed == failed_before:  # else some rows were not reached
        orphans = find_orphans(test, measured, table)
        if orphans:
            pytest.fail(f"{test} does not measure docs/tests.md's {orphans}; {REWRITE}")


class Recorder:
    """A plugin of pytest that collects every row, and asks nothing of the page."""

    def __init__(self):
        self.rows = []

    def pytest_configure(self, config):
        config.parity_rows = self.rows


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure the table of oracles.")
    parser.add_argument("--write", action="store_true", help="put it into docs/tests.md")
    args = parser.parse_args(argv)
    recorder = Recorder()
    # Whether the page's rows are right is not asked while they are measured anew. In this process
    # (-n 0): in another one the recorder would not be.
    code = pytest.main([str(TESTS), "-q", "-n", "0", "-k", "not every_row_of_the_page"],
                       plugins=[recorder])
    if code or not recorder.rows:
        return code or 1  # a table of failing tests would state what does not hold
    if args.write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), recorder.rows), encoding="utf-8")
    print(table_of(recorder.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
