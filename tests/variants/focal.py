"""PLE with a focal ranking loss, (1 - p)^gamma * -log p with p = sigmoid(beta * lead): pairs already in order fade out.

Run it with --config.algorithm=tests/variants/focal.py --config.algorithm_kwargs="{'gamma': 2.0}".
"""

from array_api_compat import array_namespace

from ple_jax import losses
from ple_jax.algorithms import ple
from ple_jax.algorithms.ple import *  # noqa: F403
from ple_jax.core import rules

DEFAULTS, RULES = {"gamma": 2.0}, {"gamma": rules.not_negative}  # of config.algorithm_kwargs


def make_loss(config):
    gamma, beta, base = config.algorithm_kwargs["gamma"], config.ple.rank_beta, ple.make_loss(config)

    def loss(outputs, batch):
        value, metrics = base(outputs, batch)
        lp = losses.mean_logprob(outputs.logprobs, batch.response_mask)
        right = losses.sigmoid(lp[:, 0], lp[:, 1], beta=beta)  # -log p
        wrong = losses.sigmoid(lp[:, 1], lp[:, 0], beta=beta)  # -log (1 - p)
        focal = metrics["ranked"] * array_namespace(lp).exp(-gamma * wrong) * right
        return value - config.ple.rank_weight * (metrics["rank_loss"] - focal), {**metrics, "rank_loss": focal}

    return loss
