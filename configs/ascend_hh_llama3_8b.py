"""PLE on Anthropic's HH with Llama-3-8B on eight Ascend 910B: the paper's set-up, as far as it is known.

Paper: Progressively Label Enhancement for Large Language Model Alignment, ICML 2025, arXiv:2408.02599. Known are the base
model, the devices, LoRA of rank 8 and alpha 16 on all linear modules, tau_0 0.2, alpha 0.9, a warm-up on D_sft, and 161K
dialogues to train on, 8.55K to test on (all four sets of preferences); a reviewer mentions eight iterations. Ours are the
reward model, the learning rates, the sizes of iterations and batches, and the lengths.

Command: scripts/launch/ascend.sh --workdir runs/paper --config.warm_up.data=Anthropic/hh-rlhf
The warm-up (Algorithm 1, step 0) is on the chosen answers. The reward model is what this makes, or another:
    scripts/launch/ascend.sh --config configs/reward_hh.py --workdir runs/reward_llama --config.mesh.data=8 \\
        --config.model.path=meta-llama/Meta-Llama-3-8B --config.model.dtype=bfloat16 --config.model.remat=full \\
        --config.optimizer.batch_queries=16 --config.optimizer.micro_queries=16 --config.optimizer.lr=1e-4
Expected metric: not measured, neither at the first evaluation nor at the last; no 910B was at hand. docs/ascend.md has the
memory of every phase, which was computed.
Run time: not measured
"""

from ml_collections import ConfigDict

from ple_jax.configs import hh


def get_config() -> ConfigDict:
    c = hh.get_config()
    c.model.path = "meta-llama/Meta-Llama-3-8B"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"  # the longest examples of the warm-up would not fit without
    c.mesh.data = 8  # a whole base on every device

    c.task.subsets = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
    c.task.chat = False  # a base model has no template: dialogues are its transcripts
    c.task.max_heldout = 256
    c.reward.kwargs = {"path": "runs/reward_llama/reward_model", "dtype": "bfloat16"}

    c.queries_per_iteration = 2048
    c.sampling.max_new_tokens = 256
    c.sampling.width = 512  # 64 rows a device
    c.sampling.bucket = 128  # prompts of 128, 256 or 512 tokens: few shapes, each of which an NPU prepares once
    c.optimizer.lr = 1e-4
    c.optimizer.warmup_steps = 10
    c.optimizer.batch_queries = 64
    c.optimizer.micro_queries = 32  # 4 pairs a device
    c.eval.diagnostic_queries = 64
    return c
