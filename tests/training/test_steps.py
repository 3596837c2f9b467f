"""What the optimiser steps of an iteration are summed up to."""

from ple_jax.training.steps import over_queries


def test_metrics_of_batches_of_unequal_size_are_means_over_queries():
    """Of 3 + 2 queries, after one was quarantined, the mean of the two means would be 2.5."""
    assert over_queries([{"loss": 2.0, "lr": 0.5}, {"loss": 3.0, "lr": 0.5}], [3, 2]) == {"loss": 2.4, "lr": 0.5}
