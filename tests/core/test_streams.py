"""Streams whose reader has gone are written to without a word; everything else is as it was."""

import io
import os
from pathlib import Path

import pytest

from ple_jax.core.streams import lasting


def test_a_reader_that_goes_ends_nothing():
    """A pipe as `| head -1` leaves it: one line is read, then nobody is there."""
    read, write = os.pipe()
    with os.fdopen(write, "w") as own:
        stream = lasting(own)
        print("first", file=stream, flush=True)
        assert os.read(read, 100) == b"first\n"
        os.close(read)
        for _ in range(3):
            print("x" * 100_000, file=stream, flush=True)
        stream.write("left at the end")
        stream.flush()


@pytest.mark.parametrize("unbuffered", [False, True])
def test_what_is_written_is_the_same(unbuffered, tmp_path):
    file = tmp_path / "out"
    with open(file, "w", encoding="utf-8") as own:
        if unbuffered:
            own.reconfigure(write_through=True)
        stream = lasting(own)
        assert (stream.encoding, stream.errors, stream.isatty(), stream.fileno()) == ("utf-8", "strict", False, own.fileno())
        print("é", file=stream)
        assert file.read_bytes() == ("é\n".encode() if unbuffered else b"")
        stream.flush()
    assert file.read_bytes() == "é\n".encode()


def test_an_error_that_is_the_writers_is_raised():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as own:
        stream = lasting(own)
        stream.write("x")
        with pytest.raises(OSError, match="No space left"):
            stream.flush()


def test_what_is_no_file_stays_as_it_is():
    text = io.StringIO()
    assert lasting(text) is text and lasting(None) is None
