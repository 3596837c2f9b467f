"""Rewards of a server, asked for while responses are still being sampled.

What it gives goes into the cache of the run, where scoring finds it. Whatever fails here is left to scoring, which asks
again, and says what is wrong.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ple_jax import rewards
from ple_jax.core.answers import Cache
from ple_jax.core.types import Reward
from ple_jax.training.run import Session

Pair = tuple[str, str]  # a prompt, as the reward is told it, and a response
Ask = Callable[[Sequence[Pair]], None]


def nobody(pairs: Sequence[Pair]) -> None:
    """Asks nobody."""


@contextlib.contextmanager
def scoring(reward: Reward, session: Session) -> Iterator[Ask]:
    """In here responses can be given to the reward's servers, if it has any. At the end what they were asked is answered.

    On an error nothing is waited for but the requests that are under way.
    """
    served = [leaf for leaf in rewards.leaves(reward) if leaf.cancel is not None]
    if not served:
        yield nobody
        return
    waiting: queue.SimpleQueue[Sequence[Pair] | None] = queue.SimpleQueue()
    # a daemon: a process that is stopped does not wait for a server that does not answer
    asking = threading.Thread(target=_ask, args=(served, session.cache.path, waiting), name="ahead", daemon=True)
    asking.start()
    try:
        yield waiting.put
    except BaseException:
        waiting.put(None)
        for leaf in served:
            if leaf.cancel is not None:
                leaf.cancel()
        raise
    waiting.put(None)
    asking.join()


def _ask(served: Sequence[Reward], path: Path, waiting: "queue.SimpleQueue[Sequence[Pair] | None]") -> None:
    """Scores what comes until None does, all that waits at once, or until a server fails."""
    with contextlib.suppress(Exception), Cache(path) as cache:
        more = True
        while more:
            found = [waiting.get()]
            while not waiting.empty():
                found.append(waiting.get())
            more = None not in found
            pairs = [pair for some in found if some is not None for pair in some]
            for reward in served if pairs else ():
                rewards.score(reward, [prompt for prompt, _ in pairs], [text for _, text in pairs], cache=cache)
