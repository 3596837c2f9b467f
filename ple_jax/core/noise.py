"""Sampling noise as data: it is a function of what a response is for, and of nothing else."""

import hashlib
import json

import numpy as np
from jaxtyping import Float32

# The streams: training draws with the number of its iteration, from 0 on; what is no iteration's has a number below 0.
HELDOUT = -1  # evaluations while a run trains: all of them draw with the same
RESPONSES = -2  # --mode=generate: the same for every checkpoint
CHAT = -3  # the lines of a conversation
PROBE = -4  # --mode=probe: the same for every prompt that it tries
HARNESS = -5  # --mode=harness, where a task samples


def uniforms(seed: int, iteration: int, query_id: str, kind: str, sample: int, n: int) -> Float32[np.ndarray, " n"]:
    """Returns the noise of one response, in [0, 1): a function of all these arguments and of nothing else.

    It comes from numpy's Philox, keyed by a hash of the arguments. Each number has 24 random bits: float32 holds them
    exactly, so that none rounds up to 1.

    Args:
        iteration: of training, from 0 on, or one of this module's streams (HELDOUT, RESPONSES ...), which are below 0.
        n: how many numbers.
    """
    what = json.dumps([seed, iteration, query_id, kind, sample]).encode()
    key = int.from_bytes(hashlib.blake2b(what, digest_size=16).digest(), "little")
    # raw bits: what numpy's Generator makes of them may change between versions
    bits = np.random.Philox(key=key).random_raw(n) >> np.uint64(40)
    return bits.astype(np.float32) * np.float32(2.0**-24)
