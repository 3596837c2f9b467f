"""The methods that are compared, and the settings that give all of them the same budget."""

from typing import NamedTuple

from ple_jax.core.errors import UserError, suggestion


class Method(NamedTuple):
    """How a method differs from the config.

    `samples`, the responses for one query, determine the number of queries. An offline method samples nothing while it
    trains, and takes as many queries as a method with that many samples.
    """

    samples: int
    keys: dict[str, str]
    data: str = ""  # "pairs" or "sft": it trains on these
    references: bool = False  # it trains on the answers of people
    group: str = "main"  # or "ablations", "sensitivity": of PLE, at its learning rate; "references"; "trl"
    trl: bool = False

    @property
    def of_ple(self) -> bool:
        return self.group in ("ablations", "sensitivity")


_PERCENTILE = {  # the authors' released code is DPO, without a likelihood term
    "ple.selection": "percentile", "ple.samples": "8",
    "ple.rank": "dpo", "ple.rank_beta": "0.1", "ple.rank_sft_weight": "0.0",
}  # fmt: skip


def _of_ple(group: str, keys: dict[str, str], *, samples: int = 2) -> Method:
    """Returns the variant of PLE with these keys."""
    return Method(samples, keys, group=group)


# what is called PLE here, whatever the config makes of it: the paper's pairs and loss, with the likelihood of ranked winners
PLE = {
    "ple.kl_weight": "0.0", "ple.rank_weight": "1.0", "ple.rank_sft_weight": "1.0", "ple.candidates": "1",
    "ple.selection": "threshold",
}  # fmt: skip
METHODS = {
    "ple": Method(2, {}),
    "context_distillation": Method(1, {"algorithm": "context_distillation"}),
    "self_distillation": Method(1, {"algorithm": "self_distillation"}),
    "raft": Method(4, {"algorithm": "raft", "raft.samples": "4"}),
    "dpo_iterative": Method(2, {"algorithm": "dpo", "dpo.samples": "2"}),
    "dpo_offline": Method(2, {"algorithm": "dpo", "dpo.samples": "0"}, data="pairs"),
    "sft": Method(2, {"algorithm": "sft"}, data="sft"),
    "ppo": Method(1, {"algorithm": "ppo", "ppo.samples": "1"}),
    "rloo": Method(4, {"algorithm": "rloo", "rloo.samples": "4"}),
    "grpo": Method(4, {"algorithm": "grpo", "grpo.samples": "4"}),
    "sft_references": Method(2, {"algorithm": "sft"}, references=True, group="references"),
    "ple_no_ranking": _of_ple("ablations", {"ple.rank_weight": "0.0"}),
    "ple_all_blended": _of_ple("ablations", {"ple.tau_0": "inf"}),
    "ple_no_blend": _of_ple("ablations", {"ple.blend_weight": "0.0"}),
    "ple_constant_tau": _of_ple("ablations", {"ple.alpha": "1.0"}),
    "ple_uniform": _of_ple("ablations", {"ple.blend": "uniform"}),
    "ple_empty": _of_ple("ablations", {"principles": "none"}),
    "ple_irrelevant": _of_ple("ablations", {"principles": "irrelevant"}),
    "ple_reversed": _of_ple("ablations", {"principles": "negative_review"}),
    "ple_shuffled": _of_ple("ablations", {"reward.transform": "shuffle"}),
    "ple_kl": _of_ple("ablations", {"ple.kl_weight": "0.1"}),
    "ple_soft": _of_ple("ablations", {"ple.kl_weight": "0.1", "ple.rank_weight": "0.2", "ple.rank_sft_weight": "5.0"}),
    "ple_percentile": _of_ple("ablations", _PERCENTILE, samples=8),
    "ple_tau_0": _of_ple("sensitivity", {"ple.tau_0": "0.0"}),
    "ple_tau_0.05": _of_ple("sensitivity", {"ple.tau_0": "0.05"}),
    "ple_tau_0.5": _of_ple("sensitivity", {"ple.tau_0": "0.5"}),
    "ple_tau_1": _of_ple("sensitivity", {"ple.tau_0": "1.0"}),
    "ple_alpha_0.5": _of_ple("sensitivity", {"ple.alpha": "0.5"}),
    "ple_alpha_0.7": _of_ple("sensitivity", {"ple.alpha": "0.7"}),
    "ple_candidates_2": _of_ple("sensitivity", {"ple.candidates": "2"}, samples=3),
    "ple_candidates_3": _of_ple("sensitivity", {"ple.candidates": "3"}, samples=4),
    "ple_candidates_4": _of_ple("sensitivity", {"ple.candidates": "4"}, samples=5),
    "ple_sigmoid": _of_ple("sensitivity", {"reward.transform": "sigmoid"}),
    "ple_zscore": _of_ple("sensitivity", {"reward.transform": "zscore"}),
    "trl_sft": Method(2, {"algorithm": "sft"}, data="sft", group="trl", trl=True),
    "trl_dpo": Method(2, {"algorithm": "dpo", "dpo.samples": "0"}, data="pairs", group="trl", trl=True),
    "trl_rloo": Method(4, {"algorithm": "rloo", "rloo.samples": "4"}, group="trl", trl=True),
    "trl_grpo": Method(4, {"algorithm": "grpo", "grpo.samples": "4"}, group="trl", trl=True),
}
_LEAST = 0.9  # of the responses of an iteration, where they make no equal batches
GROUPS = tuple(dict.fromkeys(method.group for method in METHODS.values()))


def chosen(text: str) -> list[str]:
    """Returns the methods that a list of groups and names with commas selects, in the order of the table.

    `all` selects every method except those that imitate people's answers, since not all data have such answers.

    Raises:
        UserError: if a name does not exist, or variants of PLE are chosen without PLE, whose learning rate they take.
    """
    wanted = {name.strip() for name in text.split(",")}
    known = ("all", *GROUPS, *METHODS)
    if unknown := sorted(wanted - set(known)):
        own = "; a file of your own is compared by ple_jax.experiments.sweep (docs/variants.md)"
        more = own if unknown[0].endswith(".py") else suggestion(unknown[0], known)
        raise UserError(f"--methods: {unknown[0]!r} is none of {', '.join(known)}{more}")
    found = [name for name, method in METHODS.items() if wanted & {method.group, name, "" if method.references else "all"}]
    if "ple" not in found and (variants := [name for name in found if METHODS[name].of_ple]):
        raise UserError(f"--methods: {variants[0]} is trained at the learning rate of ple, which is not among them: add it")
    return found


def budget(name: str, *, responses: int, steps: int, micro: int | str) -> dict[str, str]:
    """Returns the config's numbers of queries for an iteration, an optimiser step and a micro-batch.

    Args:
        responses: number of responses of an iteration.
        steps: optimiser steps of an iteration.
        micro: most queries of a micro-batch, which is one pass over the model; "auto" leaves it to each run.

    Raises:
        UserError: if neither all nor nearly all of an iteration's responses can be divided into equal batches.
    """
    samples = METHODS[name].samples
    batch = responses // (samples * steps)
    if batch * samples * steps < _LEAST * responses:
        raise UserError(
            f"--responses={responses} must be a multiple of {samples * steps}, or little more: {name} takes {samples} a"
            f" query, in --steps={steps} equal batches"
        )
    return {
        "queries_per_iteration": str(batch * steps),
        "optimizer.batch_queries": str(batch),
        "optimizer.micro_queries": micro if isinstance(micro, str) else str(_divisor(batch, micro)),
    }


def _divisor(number: int, most: int) -> int:
    return max(n for n in range(1, most + 1) if number % n == 0)
