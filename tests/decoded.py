"""Responses of a JAX model without a backend around it: `refill.sample` over its pure functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ple_jax.backend import generate
from ple_jax.core import refill


class Engine:
    """A `refill.Engine` of a model, its base and a fused adapter; `calls` has what was asked of it."""

    def __init__(self, model, base, fused=None):
        self.model, self.given, self.calls = model, (base, fused or {}), []

    def open(self, shape, sampling):
        self.prefix, how = None, {"static_argnames": "sampling"}
        if shape.prefix:
            self.prefix = jax.jit(functools.partial(generate.read_prefix, self.model))(*self.given, np.int32(shape.prefix))
        dtype, self.sampling = self.given[0]["embed"].dtype, sampling
        self.rows = generate.empty_rows(self.model, shape.rows, shape.room, shape.new, dtype)
        self.reads = jax.jit(functools.partial(generate.begin, self.model), **how)
        self.steps = jax.jit(functools.partial(generate.decode, self.model), **how)

    def begin(self, group):
        self.calls.append(group)
        prefix, rest = self.prefix if group.shared else None, (group.tokens, group.lengths, group.prompt, group.row)
        self.rows = self.reads(*self.given, prefix, self.rows, *rest, group.uniforms, sampling=self.sampling)

    def decode(self, free):
        self.calls.append(free)
        limits = jnp.int32(free), jnp.int32(refill.STEPS)
        self.rows = self.steps(*self.given, self.prefix, self.rows, *limits, sampling=self.sampling)
        return refill.Decoded(*map(np.asarray, (self.rows.done, self.rows.length, *self.rows.out)))

    def close(self):
        pass


def responses(model, base, fused, prompts, noise, *, sampling, prefix=(), width=None, smallest=16, **how):
    """One to every prompt, whole ones where there is a prefix."""
    requests = refill.Requests([tuple(map(int, p)) for p in prompts], np.asarray(noise), sampling, tuple(prefix))
    engine = Engine(model, base, fused)
    return refill.sample(engine, requests, width=width or len(prompts), smallest=smallest, **how)


def unpadded(tokens, mask):
    """The rows of padded prompts."""
    return [tuple(row[seen].tolist()) for row, seen in zip(np.asarray(tokens), np.asarray(mask), strict=True)]
