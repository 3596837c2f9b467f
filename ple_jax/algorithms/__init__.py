"""The algorithms, one file each. This file defines what an algorithm is, and finds one by its name or in a file of your own.

An algorithm is a module of functions. One that samples has the functions of `Algorithm`; those without a default must be
there. One that trains on the records alone has those of `OfflineAlgorithm`. `load` reads a module into such a tuple once,
and nothing else looks into the module again.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from ple_jax.core.errors import SLIP, UserError, suggestion
from ple_jax.core.plugins import built_in, load_module
from ple_jax.core.rules import Rule
from ple_jax.core.types import Array, Backend, Batch, Loss, Query, Response, Rollout, Slot, Tokenizer

Config = Any  # the whole configuration, frozen
Metrics = Mapping[str, float]


class Needs(NamedTuple):
    """What a loss needs besides the policy that is trained.

    It may compare the policy with log-probabilities computed before the iteration's first step, and train a head beside the
    adapter.
    """

    reference: bool = False  # data["reference_logprobs"] [query, k, response_len]: of the frozen reference
    # data["old_logprobs"], and data["old_values"] where there is a head of values. All log-probabilities are then those of
    # the policy that sampled, at sampling.temperature, and there is no dropout: both would move a ratio to these
    old_logprobs: bool = False
    teacher: bool = False  # data["teacher_logprobs"]: of the same tokens after the principled prompt
    head: Literal["score", "value"] | None = None  # a reward model's, or PPO's


class Context(NamedTuple):
    """What an algorithm is told about an iteration besides its rollouts."""

    config: Config
    iteration: int = 0  # counted from 0
    tau: float = math.nan  # the threshold of this iteration, in units of the score; nan without one
    mean_length: float = math.nan  # C, tokens of a response: the mean over what an earlier sample would be trained on
    controller: Metrics = {}  # what the algorithm carries from one iteration to the next (`Algorithm.control`)


def no_threshold(config: Config) -> Callable[[int], float]:
    """Returns a schedule for algorithms without a threshold: tau is nan in every iteration, which is not logged."""
    return lambda iteration: math.nan


def needs_nothing(config: Config) -> Needs:
    """Returns the needs of a loss that reads nothing but the policy."""
    return Needs()


def as_it_is(batch: Batch, context: Context) -> Batch:
    """Returns the batch unchanged, as nothing has to be added to it."""
    return batch


def means_of_steps(means: Metrics, before: Mapping[str, Array], after: Mapping[str, Array]) -> dict[str, float]:
    """Returns the loss's own metrics as means over the optimiser steps, and adds none."""
    return dict(means)


def starts_with_nothing(config: Config) -> Metrics:
    """Returns an empty mapping, for algorithms that carry nothing from one iteration to the next."""
    return {}


def carries_on(controller: Metrics, metrics: Metrics, config: Config) -> Metrics:
    """Returns the carried values unchanged, for the next iteration."""
    return controller


class Algorithm(NamedTuple):
    """An algorithm that samples: which responses it asks for, how it labels them, what it trains on, and with which loss."""

    name: str  # as the config has it
    about: str  # the first sentence of its file
    collect: Callable[[Config], tuple[Slot, ...]]  # the responses to ask for of every query
    label: Callable[[Sequence[Rollout], Context], list[Rollout]]  # fills tau, margin, decision and weights
    batch: Callable[[Sequence[Rollout], Context], Batch]  # one optimiser batch of labelled rollouts
    make_loss: Callable[[Config], Loss]  # called once a run
    schedule: Callable[[Config], Callable[[int], float]] = no_threshold  # iteration -> tau
    needs: Callable[[Config], Needs] = needs_nothing
    # of a scored rollout, or of a held-out query's responses, those that a step would learn from: their mean length over an
    # earlier sample is Context.mean_length. None: nothing reads it
    learned: Callable[[Rollout, Config], Sequence[Response]] | None = None
    prepare: Callable[[Batch, Context], Batch] = as_it_is  # a batch that has what `needs` asks for gets what follows from it
    # (means over the steps, and of the diagnosed queries the loss's metrics [query] before and after them) -> metrics to log
    measures: Callable[[Metrics, Mapping[str, Array], Mapping[str, Array]], dict[str, float]] = means_of_steps
    controller: Callable[[Config], Metrics] = starts_with_nothing  # what is carried, at the start
    control: Callable[[Metrics, Metrics, Config], Metrics] = carries_on  # (carried, the iteration's metrics) -> carried on
    defaults: Mapping[str, Any] = {}  # DEFAULTS of its file: knobs of its own, set in config.algorithm_kwargs
    rules: Mapping[str, Rule] = {}  # RULES of its file: what they may hold (`core.rules`)


class OfflineAlgorithm(NamedTuple):
    """An algorithm that samples nothing and trains on examples that it makes from the records (`training.offline`)."""

    name: str
    about: str
    records: str  # RECORDS of its file, what a record must have: prompt, completion or pair
    encode: Callable[[Query, Tokenizer, Config], Any]  # an example; raises Unusable where the record cannot be one
    batches: Callable[..., list[list[int]]]  # (examples, size, *, seed, epoch) -> which are trained on together
    batch: Callable[[Sequence[Any]], Batch]
    make_loss: Callable[[Config], Loss]
    judge: Callable[[Backend, Sequence[Any], Config], dict[str, Any]]  # measures of held-out examples
    needs: Callable[[Config], Needs] = needs_nothing
    defaults: Mapping[str, Any] = {}
    rules: Mapping[str, Rule] = {}


_CONSTANTS = {"DEFAULTS": "defaults", "RULES": "rules", "RECORDS": "records"}  # of a file -> of the tuple


def load(name: str) -> Algorithm | OfflineAlgorithm:
    """Loads an algorithm by name (a file of ple_jax/algorithms), from a Python file, or by a dotted path.

    Raises:
        UserError: the module cannot be imported, lacks a required function, or has one of nearly such a name.
    """
    module = vars(built_in("algorithms", name) or load_module(name, "algorithm"))
    about = next(iter((module["__doc__"] or "").strip().splitlines()), "")
    found = {"name": name, "about": about}
    found |= {ours: module[theirs] for theirs, ours in _CONSTANTS.items() if theirs in module}
    kind = OfflineAlgorithm if "encode" in module else Algorithm
    functions = [field for field in kind._fields if field not in ("name", "about", *_CONSTANTS.values())]
    found |= {function: module[function] for function in functions if function in module}
    if missing := [field for field in kind._fields if field not in found and field not in kind._field_defaults]:
        raise UserError(
            f"config.algorithm {name!r} lacks {', '.join(missing)}; start it with `from ple_jax.algorithms.ple import *`"
        )
    _check_names(name, module, functions)
    return kind(**found)  # type: ignore[arg-type]


def _check_names(name: str, module: Mapping[str, Any], functions: Sequence[str]) -> None:
    """Raises a UserError for a function that nothing calls, and whose name is a slip for one that is called."""
    own = [key for key, value in module.items() if inspect.isfunction(value) and value.__module__ == module["__name__"]]
    unknown = [key for key in own if key not in functions and not key.startswith("_")]
    text = Path(module["__file__"]).read_text(encoding="utf-8") if unknown else ""
    for key in unknown:
        named = len(re.findall(rf"\b{key}\b", text)) > 1  # a helper, which the file itself calls
        if not named and (near := suggestion(key, functions, least=SLIP)):
            raise UserError(f"config.algorithm {name!r} has the function {key}, which nothing calls{near}")


def records(slots: Sequence[Slot]) -> str:
    """Returns what a record must have for an algorithm that samples: "prompt", "completion" or "pair".

    A record needs its own answers only where they are among the responses that the slots ask for.
    """
    sources = {slot.source for slot in slots}
    return "pair" if "rejected" in sources else "completion" if "completion" in sources else "prompt"


def given_sources(slots: Sequence[Slot]) -> list[str]:
    """Returns which of a record's own answers are among the responses: "completion", "rejected"."""
    return [slot.source for slot in slots if slot.source != "policy"]


def with_defaults(algorithm: Algorithm | OfflineAlgorithm, config: Config) -> Config:
    """Returns the config with the algorithm's own knobs (config.algorithm_kwargs) filled in, where its file declares any.

    Raises:
        UserError: config.algorithm_kwargs has a knob that the file does not declare, or a value that its rules refuse.
    """
    if not algorithm.defaults:
        return config
    given = config.algorithm_kwargs.to_dict()
    known = list(algorithm.defaults)
    for key in given:
        if key not in known:
            raise UserError(
                f"config.algorithm_kwargs has {key!r}, and {Path(algorithm.name).name} declares {', '.join(known)}"
                f"{suggestion(key, known)}"
            )
    filled = dict(algorithm.defaults) | given
    for key, rule in algorithm.rules.items():
        if says := rule(filled[key]):
            raise UserError(f"config.algorithm_kwargs[{key!r}] is {filled[key]!r} but must be {says}")
    whole = ConfigDict(config.to_dict())
    whole.algorithm_kwargs = ConfigDict(filled)
    return FrozenConfigDict(whole)
