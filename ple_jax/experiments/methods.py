"""The methods that are compared, and what gives all of them one budget."""

from typing import NamedTuple

from ple_jax.core.errors import UserError, suggestion


class Method(NamedTuple):
    """How a method differs from the config; `samples` of a query make its number of queries (of offline ones: see above)."""

    samples: int
    keys: dict[str, str]
    data: str = ""  # "pairs" or "sft": it trains on these
    ablation: bool = False
    trl: bool = False


_PERCENTILE = {  # the authors' released code is DPO, without a likelihood term
    "ple.selection": "percentile", "ple.samples": "8",
    "ple.rank": "dpo", "ple.rank_beta": "0.1", "ple.rank_sft_weight": "0.0",
}  # fmt: skip

METHODS = {
    "ple": Method(2, {}),
    "ple_no_ranking": Method(2, {"ple.rank_weight": "0.0"}, ablation=True),
    "ple_all_blended": Method(2, {"ple.tau_0": "inf"}, ablation=True),
    "ple_no_blend": Method(2, {"ple.blend_weight": "0.0"}, ablation=True),
    "ple_constant_tau": Method(2, {"ple.alpha": "1.0"}, ablation=True),
    "ple_uniform": Method(2, {"ple.blend": "uniform"}, ablation=True),
    "ple_percentile": Method(8, _PERCENTILE, ablation=True),
    "context_distillation": Method(1, {"algorithm": "context_distillation"}),
    "self_distillation": Method(1, {"algorithm": "self_distillation"}),
    "raft": Method(4, {"algorithm": "raft", "raft.samples": "4"}),
    "dpo_iterative": Method(2, {"algorithm": "dpo", "dpo.samples": "2"}),
    "dpo_offline": Method(2, {"algorithm": "dpo", "dpo.samples": "0"}, data="pairs"),
    "sft": Method(2, {"algorithm": "sft"}, data="sft"),
    "ppo": Method(1, {"algorithm": "ppo", "ppo.samples": "1"}),
    "rloo": Method(4, {"algorithm": "rloo", "rloo.samples": "4"}),
    "grpo": Method(4, {"algorithm": "grpo", "grpo.samples": "4"}),
    "trl_sft": Method(2, {"algorithm": "sft"}, data="sft", trl=True),
    "trl_dpo": Method(2, {"algorithm": "dpo", "dpo.samples": "0"}, data="pairs", trl=True),
    "trl_rloo": Method(4, {"algorithm": "rloo", "rloo.samples": "4"}, trl=True),
    "trl_grpo": Method(4, {"algorithm": "grpo", "grpo.samples": "4"}, trl=True),
}


def chosen(text: str) -> list[str]:
    """The methods that `main` (without ablations), `all` or a list of names means, in the order of the table.

    Raises:
        UserError: a name that is none.
    """
    if text in ("main", "all"):
        return [name for name, method in METHODS.items() if text == "all" or not method.ablation]
    wanted = [name.strip() for name in text.split(",")]
    if unknown := [name for name in wanted if name not in METHODS]:
        known = ("main", "all", *METHODS)
        raise UserError(f"--methods: {unknown[0]!r} is none of {', '.join(known)}{suggestion(unknown[0], known)}")
    return [name for name in METHODS if name in wanted]


def budget(name: str, *, responses: int, steps: int, micro: int) -> dict[str, str]:
    """Queries of an iteration, of an optimiser step and of a pass over the model (`micro` at most).

    Raises:
        UserError: an iteration's responses are no equal batches.
    """
    samples = METHODS[name].samples
    if responses % (samples * steps):
        raise UserError(
            f"--responses={responses} must be a multiple of {samples * steps}: {name} takes {samples} a query, in"
            f" --steps={steps} equal batches"
        )
    batch = responses // samples // steps
    return {
        "queries_per_iteration": str(batch * steps),
        "optimizer.batch_queries": str(batch),
        "optimizer.micro_queries": str(max(n for n in range(1, micro + 1) if batch % n == 0)),
    }
