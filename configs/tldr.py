"""PLE on Reddit TL;DR: summaries of posts, principles of faithfulness, a trained reward model.

Paper: Progressively Label Enhancement for Large Language Model Alignment, ICML 2025, arXiv:2408.02599. A reward model from
the published comparisons of summaries, openai/summarize_from_feedback. Its repository has a loading script, which datasets
runs no more: download its Parquet files (branch refs/convert/parquet, folder comparisons), and give them:
python -m ple_jax.main --config configs/reward_hh.py --workdir runs/reward_tldr --config.task.format=tldr \
    --config.task.train=comparisons --config.task.heldout=comparisons --config.task.heldout_split=validation \
    --config.task.subsets="()"

Command: python -m ple_jax.main --config configs/tldr.py --workdir runs/tldr
"""

from ml_collections import ConfigDict

from ple_jax.configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.iterations = 8
    c.queries_per_iteration = 128
    c.task.format = "tldr"
    c.task.train = "trl-lib/tldr"  # or the folder that it was downloaded to, or files of it
    c.task.heldout = "trl-lib/tldr"
    c.task.max_heldout = 128
    c.task.max_prompt_tokens = 512  # longer posts are cut between paragraphs, as in arXiv:2009.01325
    c.task.chat = True
    c.principles = "faithful_summary"
    c.reward.name = "model"
    c.reward.kwargs = {"path": "runs/reward_tldr/reward_model"}
    c.sampling.max_new_tokens = 64
    c.optimizer.lr = 2e-4
    c.ple.rank_sft_weight = 1.0
    return c
