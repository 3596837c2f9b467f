"""The tests themselves: a quick run has something of every file."""

import conftest
import pytest
from speed import quick


def test_every_file_has_a_quick_test(request):
    """Of the files that were collected, which are all of them unless some were named."""
    files = request.config.stash[conftest.QUICK]
    assert files and not [file for file, has_one in files.items() if not has_one]


def test_all_but_the_chosen_values_are_slow():
    one, two, three = quick(["a", "b", "c"], "b")
    assert two == "b" and [parameter.values for parameter in (one, three)] == [("a",), ("c",)]
    assert {mark.name for parameter in (one, three) for mark in parameter.marks} == {"slow"}
    with pytest.raises(ValueError, match="'d'"):
        quick("abc", "b", "d")
