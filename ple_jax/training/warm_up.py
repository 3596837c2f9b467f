"""Step 0 of Algorithm 1: supervised fine-tuning, after which the policy is the reference."""

from typing import Any

import numpy as np

from ple_jax import losses
from ple_jax.core.batches import micro_batches, pack
from ple_jax.core.types import Batch, Outputs, Rollout, Slot
from ple_jax.data.load import load_warm_up
from ple_jax.data.queries import disjoint
from ple_jax.training import costs
from ple_jax.training.prompting import check_context, prompt_of, write_bad
from ple_jax.training.run import Run
from ple_jax.training.sampling import given


def warm_up(run: Run, state: dict[str, Any]) -> None:
    """Step 0 of Algorithm 1: fine-tunes on the SFT set, if there is one; the policy then becomes the reference."""
    sft = run.config.sft
    if sft.data is None:
        return
    found = load_warm_up(run.config)
    examples, both = disjoint(found.queries, run.heldout)
    run.bad["sft"] = found.bad + both
    write_bad(run)
    size, wanted = run.config.optimizer.batch_queries, Slot("reference", source="completion")
    rollouts = [
        Rollout(query.id, query.prompt, tuple(prompt_of(run, query, False)[1]), (given(run, query, wanted),))
        for query in examples
    ]
    longest = max(len(r.responses[0].tokens) for r in rollouts)
    check_context(run, examples, max(len(r.prompt_tokens) + len(r.responses[0].tokens) for r in rollouts))
    run.progress.phase("warm-up", -(-len(rollouts) // size) * sft.epochs)
    for epoch in range(sft.epochs):
        order = np.random.default_rng([run.config.seed, epoch]).permutation(len(rollouts))
        for start in range(0, len(order), size):
            run.stop.check()
            chosen = [rollouts[i] for i in order[start : start + size]]
            batch = pack(chosen, [(0,)] * len(chosen), prompt_multiple=run.config.sampling.bucket, response_len=longest)
            batch.data["normaliser"] = np.full(len(chosen), batch.response_mask.sum() / len(chosen), np.float32)
            with costs.timed(state, "update"):
                run.backend.update(micro_batches(batch, run.config.optimizer.micro_queries), sft_loss, lr=sft.lr)
            state["training_tokens"] += costs.tokens(batch)
            state["flops"] += costs.update_flops(run.parameters, costs.tokens(batch))
            run.progress.advance(1)
    run.backend.freeze_reference()


def sft_loss(outputs: Outputs, batch: Batch) -> tuple[Any, dict[str, Any]]:
    """Cross-entropy per response token of the optimiser batch."""
    return losses.nll(outputs.logprobs[:, 0], batch.response_mask[:, 0], normaliser=batch.data["normaliser"]), {}
