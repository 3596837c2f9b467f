"""A reward model from Anthropic's HH preference pairs: a scalar head and a LoRA adapter, Bradley-Terry's loss.

Paper: Training a Helpful and Harmless Assistant with RLHF, arXiv:2204.05862 (the data); PLE, arXiv:2408.02599 (where such
a model is the reward).

Command: python -m ple_jax.main --config configs/reward_hh.py --workdir runs/reward_hh
The result, runs/reward_hh/reward_model, is a reward: configs/hh.py uses it.
Expected metric: held-out accuracy 0.58 after 320 pairs, 0.61 after 1,286 (SmolLM2-135M, reward_model.max_tokens=256)
Run time: an hour for those 1,286 on 2 CPU cores, evaluations not counted. All 42,000 pairs of harmless-base, as this config
has them, want an accelerator: --config.task.max_train=1286 --config.task.max_heldout=322 is what a CPU does
"""

from ml_collections import ConfigDict

from ple_jax.configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.algorithm = "reward"
    c.task.format = "hh"
    c.task.train = "Anthropic/hh-rlhf"  # or the folder that it was downloaded to, or files of it
    c.task.heldout = "Anthropic/hh-rlhf"
    c.task.subsets = ("harmless-base",)
    c.task.max_heldout = 512  # of 2,312: an interval of 4 points of accuracy either way
    c.offline.eval_every = 500
    c.reward_model.max_tokens = 512
    c.optimizer.lr = 5e-4
    c.optimizer.micro_queries = 2  # attention over [prompt | chosen | rejected] of 1,536 tokens takes memory
    c.optimizer.warmup_steps = 10
    return c
