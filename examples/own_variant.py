"""A variant of your own: pairs are ranked only if the response that wins is not the longer one by much.

    python examples/own_variant.py --workdir runs/own_variant

An algorithm is a file of functions. This one takes all of PLE's and replaces `label`, which decides about an iteration's
pairs; the rest stays as it is. Its own knob is in config.algorithm_kwargs, with a rule that checks it.
"""

import sys

from ple_jax import pairing
from ple_jax.algorithms import ple
from ple_jax.algorithms.ple import *  # noqa: F403
from ple_jax.configs import quickstart
from ple_jax.core import rules
from ple_jax.main import cli

DEFAULTS, RULES = {"longest": 1.2}, {"longest": rules.positive}


def label(rollouts, context):
    """PLE's decisions, but a pair whose principled response is over `longest` times as long as the plain one is blended."""
    labelled, longest = [], context.config.algorithm_kwargs["longest"]
    for rollout in ple.label(rollouts, context):
        said = list(rollout.responses)  # the plain one, and ple.candidates principled ones, of which the best counts
        best = max(range(1, len(said)), key=lambda i: said[i].score)
        if rollout.decision == "ranked" and len(said[best].tokens) > longest * len(said[0].tokens):
            pair = [said[0].score, said[best].score]
            weights = pairing.softmax(pair, temperature=context.config.ple.blend_temperature)
            for i, weight in zip((0, best), weights, strict=True):
                said[i] = said[i]._replace(weight=float(weight))
            rollout = rollout._replace(decision="blended", responses=tuple(said))
        labelled.append(rollout)
    return labelled


def get_config():
    c = quickstart.get_config()
    c.algorithm = __file__
    return c


if __name__ == "__main__":
    sys.argv[1:1] = ["--config", __file__]
    cli()
