"""Loads the judge of pairs that a config names."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ple_jax.core.answers import digest
from ple_jax.core.errors import UserError
from ple_jax.core.plugins import check_types, load_function
from ple_jax.evaluation.judges import WHERE, Judge, by_reward
from ple_jax.evaluation.model_judges import endpoint, local


def load_judge(name: str, kwargs: Mapping[str, Any], *, backend: str) -> Judge:
    """Loads a judge by name, or from a function of your own as `package.module:function` or `file.py:function`.

    The names are reward (`by_reward`), endpoint and model (`model_judges.endpoint`, `model_judges.local`). A function is
    called as (prompts, first, second, **kwargs). Those of its arguments that have no default and are not in kwargs are read
    from the record.

    Args:
        name: as in config.compare.judge.
        kwargs: as in config.compare.judge_kwargs.
        backend: jax or torch: what a reward model or a local model runs on.

    Raises:
        UserError: there is no such judge, or it does not take these keyword arguments.
    """
    makers: dict[str, tuple[Callable[..., Judge], dict[str, Any]]] = {
        "reward": (by_reward, {"backend": backend}),
        "endpoint": (endpoint, {}),
        "model": (local, {"backend": backend}),
    }
    if name not in makers:
        words = ("prompts", "first", "second")
        found = load_function(name, "compare.judge", given=words, kwargs=kwargs, known=list(makers))
        return Judge(name, digest(found.source, kwargs), functools.partial(found.call, **kwargs), reads=found.asks)
    make, offered = makers[name]
    try:
        inspect.signature(make).bind(**offered, **kwargs)
        check_types(make, kwargs, WHERE)
        return make(**offered, **kwargs)
    except (TypeError, AttributeError) as error:  # a number where there should be a text
        raise UserError(f"{WHERE} {dict(kwargs)!r} of judge {name!r}: {error}") from error
    except UserError as error:  # rewards, and what requests are made with, name their own keys
        inner = f"{WHERE} kwargs" if name == "reward" else WHERE
        says = str(error).replace("config.reward.kwargs", inner).replace("config.reward.name", f"{WHERE} name")
        raise UserError(says) from error
