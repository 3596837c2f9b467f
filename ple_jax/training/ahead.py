"""Requests to reward servers that are sent while responses are still being sampled.

The values go into the run's reward cache, where scoring finds them. Whatever fails here is left to scoring, which asks again
and reports what is wrong.
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
    """Ignores the responses it is given. It is the `Ask` of rewards that no server computes."""


@contextlib.contextmanager
def scoring(reward: Reward, session: Session) -> Iterator[Ask]:
    """Yields a function that sends ended responses to the reward's servers, if it has any, while sampling goes on.

    At the end of the context it waits until everything that was sent is answered. After an error nothing more is sent, and
    nothing is waited for but the requests that are under way.
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
    """Scores the responses in the queue, all that waits in one call, until it meets None or a server fails."""
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
