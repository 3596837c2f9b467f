"""A reward model from preference pairs: a scalar head on the model, trained with Bradley-Terry's loss.

It samples nothing: its loop is `training.offline`, with epochs over the pairs of config.task.train and evaluations on those
of config.task.heldout. The score is read at a response's last token, as transformers' ...ForSequenceClassification does.
Both responses of a pair are in one row, with the tokens that they have in common at its beginning.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from ple_jax import losses, prompts
from ple_jax.algorithms import Needs
from ple_jax.core.batches import bucket, pack
from ple_jax.core.errors import Unusable
from ple_jax.core.types import Array, Backend, Batch, Loss, Outputs, Query, Response, Rollout, Tokenizer
from ple_jax.formulas.calibration import measures

RECORDS = "pair"  # of config.task
_PROMPT, _RESPONSE = 64, 64  # smallest buckets, in tokens


# ---------------------------------------------------------------- pairs


class Pair(NamedTuple):
    """The tokens of two conversations that differ only at their ends; `shared` is what both begin with."""

    id: str
    shared: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """The buckets, in tokens, of the shared part and of the longer end, which decide the shape of a batch."""
        return bucket(len(self.shared), _PROMPT), bucket(max(len(self.chosen), len(self.rejected)), _RESPONSE)


def encode(query: Query, tokenizer: Tokenizer, config: Any) -> Pair:
    """Converts a preference pair to tokens, each side as `rewards.model` will see it.

    The oldest tokens of a conversation longer than reward_model.max_tokens are cut off, except a BOS. Where a conversation
    ends with the padding token, the score is read before it, so it is left out.

    Raises:
        Unusable: both sides have the same tokens, they do not begin alike, a response is too long, or as `prompts.dialogue`.
    """
    max_tokens, pad = config.reward_model.max_tokens, tokenizer.pad_token_id
    chosen, rejected = (
        without_end(prompts.dialogue(query.prompt, text, tokenizer), pad) for text in (query.completion, query.rejected)
    )
    if chosen == rejected:
        raise Unusable("pair", "has two responses that are the same to this tokenizer; remove the line")
    common = prompts.common_prefix([chosen, rejected])
    if not common:
        raise Unusable("pair", "has responses with no token in common before they differ; a prompt is needed")
    ends = chosen[len(common) :], rejected[len(common) :]
    room = max_tokens - max(map(len, ends))
    if room < 1:
        raise Unusable("over-long", f"has a response of more than the {max_tokens} tokens of config.reward_model.max_tokens")
    kept = 1 if common[0] == tokenizer.bos_token_id and len(common) > room > 1 else 0
    shared = [*common[:kept], *common[-(room - kept) :]] if len(common) > room else common
    return Pair(query.id, tuple(shared), tuple(ends[0]), tuple(ends[1]))


def without_end(tokens: list[int], pad: int | None) -> list[int]:
    end = len(tokens)
    while end > 1 and tokens[end - 1] == pad:
        end -= 1
    return tokens[:end]


def batch(pairs: Sequence[Pair]) -> Batch:
    """Packs one row [shared | chosen | rejected] per pair, padded to the largest of the pairs' buckets."""
    rollouts = [
        Rollout(pair.id, "", pair.shared, (Response(pair.chosen, True), Response(pair.rejected, True))) for pair in pairs
    ]
    longest = max(pair.shape[1] for pair in pairs)
    return pack(rollouts, [(0, 1)] * len(pairs), prompt_multiple=_PROMPT, response_len=longest)


def batches(pairs: Sequence[Pair], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Returns which pairs are trained on together in one epoch: each once, in an order drawn from (seed, epoch).

    A batch is a list of at most `size` indices of `pairs`.

    Pairs of one shape go together, so that there is little padding and few programs are compiled. What is left of each
    shape at the end is put together, and the last batch may be smaller.
    """
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(len(pairs))
    shapes, drawn = [pair.shape for pair in pairs], []
    waiting: dict[tuple[int, int], list[int]] = {}
    for i in order.tolist():
        same = waiting.setdefault(shapes[i], [])
        same.append(i)
        if len(same) == size:
            drawn.append(waiting.pop(shapes[i]))
    rest = [i for shape in sorted(waiting) for i in waiting[shape]]
    return drawn + [rest[i : i + size] for i in range(0, len(rest), size)]


# ---------------------------------------------------------------- loss and measures


def needs(config: Any) -> Needs:
    """Returns the needs: a head of scores."""
    return Needs(head="score")


def make_loss(config: Any) -> Loss:
    """Returns the Bradley-Terry loss of the pairs; metrics `accuracy` (ties count half) and `margin` (chosen - rejected)."""

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, dict[str, Array]]:
        chosen, rejected = outputs.scores[:, 0], outputs.scores[:, 1]  # type: ignore[index]
        margin = chosen - rejected
        right = 0.5 + 0.5 * array_namespace(margin).sign(margin)
        return losses.bradley_terry(chosen, rejected), {"accuracy": right, "margin": margin}

    return loss


def judge(backend: Backend, pairs: Sequence[Pair], config: Any) -> dict[str, Any]:
    """Scores held-out pairs and returns their `formulas.calibration.measures`."""
    margins = np.empty(len(pairs))
    for some in batches(pairs, config.optimizer.micro_queries, seed=0, epoch=0):
        scores = backend.scores(batch([pairs[i] for i in some])).astype(np.float64)
        margins[some] = scores[:, 0] - scores[:, 1]
    return measures(margins, seed=config.seed)
