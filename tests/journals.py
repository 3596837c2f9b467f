"""Journals of two runs that are the same, as far as other arithmetic allows."""

import json
from pathlib import Path

import numpy as np


def assert_the_same(one: Path, other: Path, *, both_say: bool = True) -> None:
    """Not a token, a text or a reward differs; log-probabilities do by rounding, and with them the digests of lines.

    Args:
        both_say: whether both samplers gave log-probabilities and their noise: TRL's gives none.
    """
    (lines, said), (others, theirs) = (_parts(file, noise=both_say) for file in (one, other))
    assert lines == others, one.name
    if both_say:
        np.testing.assert_allclose(said, theirs, atol=1e-4, err_msg=one.name)


def _parts(file: Path, *, noise: bool) -> tuple[list, list[float]]:
    """The lines without log-probabilities and digests, and the log-probabilities."""
    found, said = [json.loads(line) for line in file.read_text().splitlines()], []
    for line in found:
        del line["digest"]
        for response in line["responses"]:
            said += response.pop("logprobs", [])
            if not noise:
                response.pop("noise", None)
    return found, said
