"""The quickstart: SmolLM2-135M learns to continue openings of movie reviews in a positive tone.

Paper: Progressively Label Enhancement for Large Language Model Alignment, ICML 2025, arXiv:2408.02599. The task is in
the style of its IMDb task, at a size that two CPU cores can train; the reward is VADER's compound score.

Command: python -m ple_jax.main --config configs/quickstart.py --workdir runs/quickstart --backend=jax --mode=train
Expected metric: held-out reward 0.178 before training, 0.512 after iteration 2, 0.897 after iteration 5, 19.1 nats a
response from the start (seed 0, JAX, 2 CPU cores, 2026-11-29; docs/quickstart.md has other seeds, and says why they differ)
Run time: about 4.5 minutes and 3.5 GB on 2 CPU cores with nothing beside it
"""

from ml_collections import ConfigDict

from ple_jax.configs import default


def get_config() -> ConfigDict:
    c = default.get_config()  # the defaults are this task
    # of ranked pairs the better response is learned with weight 0.2 x 5, the worse one unlearned with 0.2: unlearning makes
    # unlikely text of a small model, and spends KL without reward (docs/quickstart.md)
    c.ple.rank_weight = 0.2
    c.ple.rank_sft_weight = 5.0
    # the same for what is unlikely under the start: more reward for as many nats
    c.ple.kl_weight = 0.1
    # beyond it the texts praise, but no longer say much (docs/quickstart.md)
    c.eval.max_kl = (20.0,)
    c.eval.second_reward = "bag_of_words"
    return c
