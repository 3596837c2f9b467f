"""PLE on IMDb: reviews continued from their first 2 to 8 words, in a positive tone.

Paper: Progressively Label Enhancement for Large Language Model Alignment, ICML 2025, arXiv:2408.02599, whose sentiment
reward is not known; here it is VADER's compound score. A classifier instead, of continuation and opening together:
--config.reward.name=model --config.reward.kwargs="{'path': 'user/name', 'label': 'POSITIVE'}"

Command: python -m ple_jax.main --config configs/imdb.py --workdir runs/imdb
"""

from ml_collections import ConfigDict

from ple_jax.configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.iterations = 8
    c.queries_per_iteration = 128
    c.task.format = "imdb"
    c.task.train = "stanfordnlp/imdb"  # or the folder that it was downloaded to, or files of it
    c.task.heldout = "stanfordnlp/imdb"
    c.task.max_heldout = 256
    c.sampling.max_new_tokens = 48
    c.ple.rank_sft_weight = 1.0
    return c
