"""Labelled responses as records of data sets, which our own formats and TRL read.

preference         prompt, chosen, rejected: the pairs that are ranked, or in which one response is better; for an
                   algorithm that learns from the records' own pairs, these
sft                prompt, completion: the best response to every query, or the record's own
prompt_completion  prompt, completion, and what was decided of it: every response of the policy

Prompt and answers are lists of turns if the prompt is a conversation or the run has config.task.chat. Otherwise they are
texts, and an answer continues its prompt. Responses without a text are left out, as no format takes them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ple_jax.algorithms import Algorithm
from ple_jax.core.conversation import Conversation
from ple_jax.core.files import plain
from ple_jax.core.types import Response, Rollout

_UNDECIDED = ("blended", "dropped")  # decisions by which no response is better than another


def of(labelled: Mapping[int, Sequence[Rollout]], algorithm: Algorithm, config: Any) -> dict[str, list[dict[str, Any]]]:
    """Makes the records of each data set from labelled rollouts.

    Args:
        labelled: the rollouts of each iteration, by its number.
        algorithm, config: what labelled them.

    Returns:
        Name of a data set -> its records.
    """
    found: dict[str, list[dict[str, Any]]] = {"preference": [], "sft": [], "prompt_completion": []}
    for number, rollouts in labelled.items():
        for rollout in rollouts:
            for name, record in _records(f"{number}/{rollout.query_id}", rollout, algorithm, config):
                found[name].append(plain(record))
    return found


def _records(name: str, rollout: Rollout, algorithm: Algorithm, config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    turns = isinstance(rollout.prompt, Conversation) or config.task.chat
    prompt: Any = rollout.prompt if isinstance(rollout.prompt, Conversation) else str(rollout.prompt)
    if turns:
        prompt = list(prompt.messages) if isinstance(prompt, Conversation) else [{"role": "user", "content": prompt}]
    tools = (
        {"tools": list(rollout.prompt.tools)} if isinstance(rollout.prompt, Conversation) and rollout.prompt.tools else {}
    )

    def said(response: Response) -> Any:
        return [{"role": "assistant", "content": response.text.strip()}] if turns else response.text

    learned = algorithm.learned(rollout, config) if algorithm.learned is not None else rollout.responses
    # the records' own come first: whatever their rewards, they are what is learned
    ordered = sorted((r for r in learned if r.text.strip()), key=lambda r: (r.source == "completion", r.score), reverse=True)
    if ordered:
        best, worst = ordered[0], ordered[-1]
        if len(learned) == 1:  # of an algorithm that imitates the best, all others are worse
            worst = min((r for r in rollout.responses if r.text.strip()), key=lambda r: r.score)
        yield "sft", {"id": name, "prompt": prompt, "completion": said(best), **tools, "reward": best.reward}
        better = best.score > worst.score or (best.source, worst.source) == ("completion", "rejected")
        differ = better and best.text.strip() != worst.text.strip()
        if rollout.decision not in _UNDECIDED and differ:
            pair = {"chosen": said(best), "rejected": said(worst)}
            yield "preference", {"id": name, "prompt": prompt, **pair, **tools, "margin": best.score - worst.score}
    for r in rollout.responses:
        if r.source == "policy" and r.text.strip():
            labels = {"reward": r.reward, "score": r.score, "weight": r.weight, "decision": rollout.decision}
            number = {"id": f"{name}/{r.kind}/{r.sample}", "kind": r.kind, "principled": r.principled}
            yield "prompt_completion", {**number, "prompt": prompt, "completion": said(r), **tools, **labels}
