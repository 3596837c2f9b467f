"""Sums of two digits, with the record's answer as the reward: a task that is right or wrong, small enough for a test.

Paper: Progressively Label Enhancement for Large Language Model Alignment, ICML 2025, arXiv:2408.02599. The task is ours: a
prompt has two sums with their results and one without, and the reward is 1 where the number that follows is the record's.
The 81 pairs of digits are parted into 57 to train on and 24 held out.

Command: python -m ple_jax.main --config configs/sums.py --workdir runs/sums --backend=jax --mode=train
"""

from ml_collections import ConfigDict

from ple_jax.configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.task.train = "sums_train"
    c.task.heldout = "sums_heldout"
    c.principles = "sums"
    c.reward.name = "numeric"
    c.sampling.max_new_tokens = 3
    c.ple.tau_0 = 0.5  # rewards are 0 or 1
    # what is right is learned, and of a blended pair that alone; what is wrong is hardly unlearned (configs/quickstart.py)
    c.ple.rank_weight = 0.2
    c.ple.rank_sft_weight = 5.0
    c.ple.blend_temperature = 0.1
    c.ple.candidates = 3  # one of which is more often right than a single one
    c.eval.samples = 4
    return c
