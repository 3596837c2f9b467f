"""What a quick run leaves out: of a test with many parameters it has some, and the slow tests are all the others."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def quick(values: Iterable[Any], *chosen: Any) -> Sequence[Any]:
    """The values as parameters of one name; all but the chosen ones are slow.

    A quick run (`pytest -m "not slow"`) tries what is said here on the chosen values alone; nothing is lost, as a whole run
    tries the others too. A chosen value that is not among them would be missed by nobody, so that is an error.
    """
    values = list(values)
    if absent := [value for value in chosen if value not in values]:
        raise ValueError(f"{absent} are not among {values}")
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in values]
