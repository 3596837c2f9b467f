"""Rewards of a server, asked for while responses are still being sampled.

What it gives goes into the cache of the run, where scoring finds it. Whatever fails here is left to scoring, which asks
again, and says what is wrong.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ple_jax import rewards
from ple_jax.core.answers import Cache
from ple_jax.core.types import Reward
from ple_jax.training.run import Session

Asked = tuple[str, str, Mapping[str, Any]]  # a prompt, a response and the record, as the reward is told them
Ask = Callable[[Sequence[Asked]], None]


def nobody(asked: Sequence[Asked]) -> None:
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
    waiting: queue.SimpleQueue[Sequence[Asked] | None] = queue.SimpleQueue()
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


def _ask(served: Sequence[Reward], path: Path, waiting: "queue.SimpleQueue[Sequence[Asked] | None]") -> None:
    """Scores what comes until None does, all that waits at once, or until a server fails."""
    with contextlib.suppress(Exception), Cache(path) as cache:
        more = True
        while more:
            found = [waiting.get()]
            while not waiting.empty():
                found.append(waiting.get())
            more = None not in found
            asked = [one for some in found if some is not None for one in some]
            for reward in served if asked else ():
                prompts, responses, records = map(list, zip(*asked, strict=True))
                rewards.score(reward, prompts, responses, records=records, cache=cache)
