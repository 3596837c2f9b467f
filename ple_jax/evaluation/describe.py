"""Measures of the responses that one model gave: rewards, likelihoods, lengths, diversity and overlap with references."""

import math

import numpy as np

from ple_jax.core.extras import need
from ple_jax.evaluation.responses import Generated
from ple_jax.formulas.texts import (
    bleu,
    distinct_n,
    floats,
    mean,
    msttr,
    perplexity,
    refusal_rate,
    repetition,
    rouge,
    words,
)


def check_installed() -> None:
    """Raises a UserError if a library that is needed where there are references is missing: sacrebleu or rouge_score.

    It is called before anything is sampled.
    """
    need("eval", "BLEU", "sacrebleu")
    need("eval", "ROUGE", "rouge_score")


def describe(generated: Generated) -> dict[str, float]:
    """Computes every measure of one set of responses: what --mode=compare tabulates for one seed of one method.

    | key | value |
    |---|---|
    | reward, reward_second | mean over queries of the mean of its finite rewards: the one trained on, and the one held out |
    | bad_reward | share of responses without a finite reward |
    | perplexity, perplexity_references | of responses and of references under the base model and the plain prompt |
    | kl, kl_token | KL(policy, start), nats, mean per response and per token |
    | length, length_words | mean tokens (with an EOS that was sampled) and mean words of a response |
    | distinct_1, distinct_2, distinct_3, msttr | diversity in words, of all responses together |
    | bleu, rouge1, rouge2, rougeL | against the references; every response to a query has the same one |
    | repetition, refusal, empty, truncated | shares; truncated: not finished, and as long as max_new_tokens |
    | overlap | mean share of a response's trigrams that stand in the principles |

    Distinct-n falls with the number of words, and MSTTR says little where there are too few words for a whole segment:
    compare them at equal numbers of responses and about equal lengths. A key whose inputs are absent (no second reward, no
    reference ...) is left out.

    Raises:
      UserError: there are references, and sacrebleu or rouge_score is not installed.
    """
    measured = {**_rewards(generated), **_likelihoods(generated), **_responses(generated)}
    return {key: value for key, value in measured.items() if not math.isnan(value)}


def _per_response(generated: Generated, key: str) -> np.ndarray:
    """Returns the value of a key of the scores for every response, as one flat array; nan where there is none."""
    found = zip(generated.scores, generated.rollouts, strict=True)
    return floats([x for line, rollout in found for x in line.get(key, [None] * len(rollout.responses))])


def _rewards(generated: Generated) -> dict[str, float]:
    reward = [[r.reward for r in rollout.responses] for rollout in generated.rollouts]
    second = [line.get("second", []) for line in generated.scores]
    return {"reward": mean([mean(some) for some in reward]), "reward_second": mean([mean(some) for some in second])}


def _likelihoods(generated: Generated) -> dict[str, float]:
    tokens = np.array([len(r.tokens) for rollout in generated.rollouts for r in rollout.responses])
    sums, counts = (floats([line.get(f"reference_{key}") for line in generated.scores]) for key in ("logprob", "tokens"))
    kl = _per_response(generated, "kl")
    known = np.isfinite(kl)
    return {
        "perplexity": perplexity(_per_response(generated, "base_logprob"), tokens),
        "perplexity_references": perplexity(sums, counts),
        "kl": mean(kl),
        "kl_token": float(kl[known].sum() / tokens[known].sum()) if tokens[known].any() else math.nan,
    }


def _responses(generated: Generated) -> dict[str, float]:
    pairs = list(zip(generated.scores, generated.rollouts, strict=True))
    responses = [response for _, rollout in pairs for response in rollout.responses]
    references = [line.get("reference", "") for line, rollout in pairs for _ in rollout.responses]
    texts, said = [r.text for r in responses], [words(r.text) for r in responses]
    limit = generated.settings["max_new_tokens"]
    return {
        "length": mean([len(r.tokens) for r in responses]),
        "length_words": mean([len(some) for some in said]),
        **{f"distinct_{n}": distinct_n(said, n) for n in (1, 2, 3)},
        "msttr": msttr(texts),
        "bleu": bleu(texts, references),
        **rouge(texts, references),
        "repetition": repetition(texts),
        "overlap": mean(_per_response(generated, "overlap")),
        "refusal": refusal_rate(texts),
        "empty": mean([not text.strip() for text in texts]),
        "truncated": mean([not r.finished and len(r.tokens) >= limit for r in responses]),
        "bad_reward": mean([not math.isfinite(r.reward) for r in responses]),
    }
