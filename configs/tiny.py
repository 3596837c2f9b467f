"""The whole pipeline on a random model of a few thousand parameters: for tests, and for reading along.

Paper: Progressively Label Enhancement for Large Language Model Alignment, ICML 2025, arXiv:2408.02599. The reward
counts lower-case letters, so that a model without any knowledge can learn it.

Command: python -m ple_jax.main --config configs/tiny.py --workdir runs/tiny --backend=jax --mode=train
Expected metric: none; three iterations of so small a model show the pipeline, not learning
Run time: about 15 s on 2 CPU cores, compilation included
"""

from ml_collections import ConfigDict

from ple_jax.configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.iterations = 3
    c.queries_per_iteration = 8
    c.model.path = "tiny"
    c.model.dtype = "float32"  # the same everywhere
    c.task.train = "tiny_train"
    c.task.heldout = "tiny_heldout"
    c.reward.name = "letters"
    c.reward.kwargs = {"letters": "abcdefghijklmnopqrstuvwxyz"}
    c.sampling.max_new_tokens = 8
    c.sampling.width = 8
    c.sampling.bucket = 16
    c.optimizer.lr = 1e-2
    c.optimizer.batch_queries = 4
    c.optimizer.micro_queries = 2
    c.eval.diagnostic_queries = 4
    return c
