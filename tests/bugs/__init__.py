"""The bugs that `python tests/mutants.py` plants: the field's own, in this project's code.

A file for each module, with FILE, its path, and BUGS, in the order of the checks that must catch
them. Whoever changes what is quoted here changes it here too; a text that is no longer found fails
the run.
"""

from typing import NamedTuple


class Bug(NamedTuple):
    function: str  # which holds it: "gae", "Attention.forward"; "" is the whole file
    text: str  # what stands there, once in the function: as little as tells it apart
    wrong: str  # what is planted in its place
    test: str  # how the names of the tests begin that must fail
    story: str
    file: str = ""  # FILE, once the list is read
