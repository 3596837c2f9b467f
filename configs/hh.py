"""PLE on Anthropic's HH: multi-turn dialogue, principles of helpfulness and harmlessness, a trained reward model.

Paper: Progressively Label Enhancement for Large Language Model Alignment, ICML 2025, arXiv:2408.02599, which aligns
Llama-3-8B on 161K dialogues; its reward model and the size of its iterations are not known, so sizes here are ours.

Command: python -m ple_jax.main --config configs/hh.py --workdir runs/hh
It needs the reward model of configs/reward_hh.py (or any other: --config.reward.kwargs="{'path': 'user/name'}").
"""

from ml_collections import ConfigDict

from ple_jax.configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.iterations = 8
    c.queries_per_iteration = 128
    c.task.format = "hh"
    c.task.train = "Anthropic/hh-rlhf"  # or the folder that it was downloaded to, or files of it
    c.task.heldout = "Anthropic/hh-rlhf"
    c.task.subsets = ("harmless-base",)
    c.task.max_heldout = 128
    c.task.max_prompt_tokens = 512
    c.task.chat = True
    c.principles = "helpful_harmless"
    c.reward.name = "model"
    c.reward.kwargs = {"path": "runs/reward_hh/reward_model"}
    c.sampling.max_new_tokens = 128
    c.optimizer.lr = 2e-4
    c.ple.rank_sft_weight = 1.0
    return c
