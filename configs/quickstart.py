"""The quickstart: SmolLM2-135M learns to continue openings of movie reviews in a positive tone.

Paper: Progressively Label Enhancement for Large Language Model Alignment, ICML 2025, arXiv:2408.02599. The task is in
the style of its IMDb task, at a size that two CPU cores can train; the reward is VADER's compound score.

Command: python -m ple_jax.main --config configs/quickstart.py --workdir runs/quickstart --backend=jax --mode=train
Expected metric: held-out reward 0.178 before training, 0.454 after iteration 2, 0.913 after iteration 5 (seed 0, JAX, 2 CPU
cores, 2026-11-29; docs/quickstart.md has other seeds and torch, and says why they differ)
Run time: about 4 minutes and 3.5 GB on 2 CPU cores with nothing beside it
"""

from ml_collections import ConfigDict

from ple_jax.configs import default


def get_config() -> ConfigDict:
    c = default.get_config()  # the defaults are this task
    # the hinge alone lowers the likelihood of both responses; with this term the text stays more fluent
    c.ple.rank_sft_weight = 1.0
    return c
