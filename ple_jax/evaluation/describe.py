"""What is measured of the responses that one model gave."""

import math
from collections.abc import Sequence

import numpy as np

from ple_jax.core.extras import need
from ple_jax.evaluation.responses import Generated
from ple_jax.formulas.texts import bleu, distinct_n, floats, mean, msttr, refusal_rate, repetition, rouge, words


def check_installed() -> None:
    """Raises a UserError where a library that references need is not installed: before anything is sampled."""
    need("eval", "BLEU", "sacrebleu")
    need("eval", "ROUGE", "rouge_score")


def perplexity(logprob_sums: Sequence[float | None] | np.ndarray, token_counts: Sequence[int] | np.ndarray) -> float:
    """exp(-sum of log-probabilities / number of tokens), over all texts together.

    Args:
      logprob_sums: of each text's tokens, nats; where it is None or nan the text is left out.
      token_counts: of each text.

    Returns:
      nan where there is no token.
    """
    sums, counts = floats(logprob_sums), floats(token_counts)
    known = ~np.isnan(sums)
    if not counts[known].sum():
        return math.nan
    with np.errstate(over="ignore"):  # inf is the answer
        return float(np.exp(-sums[known].sum() / counts[known].sum()))


def describe(generated: Generated) -> dict[str, float]:
    """Every measure of one set of responses: what --mode=compare tabulates for one seed of one method.

    | key | of |
    |---|---|
    | reward, reward_second | mean of the finite rewards: the one trained on, and the one held out |
    | bad_reward | share of responses without a finite reward |
    | perplexity, perplexity_references | of responses and of references under the base model and the plain prompt |
    | kl, kl_token | KL(policy, base), nats, mean per response and per token |
    | length, length_words | mean tokens (with an EOS that was sampled) and words of a response |
    | distinct_1, distinct_2, distinct_3, msttr | diversity in words, of all responses together |
    | bleu, rouge1, rouge2, rougeL | beside the references; every response of a query has the same one |
    | repetition, refusal, empty, truncated | shares; truncated: not finished, and as long as max_new_tokens |

    Distinct-n falls with the number of words, and MSTTR is of so few where there is no whole segment that it says little:
    compare them at equal numbers of responses and about equal lengths. A key whose inputs are absent (no second reward, no
    reference ...) is left out.

    Raises:
      UserError: there are references, and sacrebleu or rouge_score is not installed.
    """
    rollouts, scores = generated.rollouts, generated.scores
    responses = [response for rollout in rollouts for response in rollout.responses]
    texts, said = [r.text for r in responses], [words(r.text) for r in responses]
    tokens = np.array([len(r.tokens) for r in responses])
    reward = np.array([r.reward for r in responses])
    limit = generated.settings["max_new_tokens"]

    def per_response(key: str) -> np.ndarray:
        absent = [[None] * len(rollout.responses) for rollout in rollouts]
        return floats([x for line, none in zip(scores, absent, strict=True) for x in line.get(key, none)])

    def per_query(key: str) -> np.ndarray:
        return floats([line.get(key) for line in scores])

    references = [line.get("reference", "") for line, r in zip(scores, rollouts, strict=True) for _ in r.responses]
    kl = per_response("kl")
    measured = np.isfinite(kl)
    found = {
        "reward": mean(reward),
        "reward_second": mean(per_response("second")),
        "perplexity": perplexity(per_response("base_logprob"), tokens),
        "perplexity_references": perplexity(per_query("reference_logprob"), per_query("reference_tokens")),
        "kl": mean(kl),
        "kl_token": float(kl[measured].sum() / tokens[measured].sum()) if tokens[measured].any() else math.nan,
        "length": mean(tokens),
        "length_words": mean([len(some) for some in said]),
        **{f"distinct_{n}": distinct_n(said, n) for n in (1, 2, 3)},
        "msttr": msttr(texts),
        "bleu": bleu(texts, references),
        **rouge(texts, references),
        "repetition": repetition(texts),
        "refusal": refusal_rate(texts),
        "empty": mean([not text.strip() for text in texts]),
        "truncated": mean([not r.finished and len(r.tokens) >= limit for r in responses]),
        "bad_reward": mean(~np.isfinite(reward)),
    }
    return {key: value for key, value in found.items() if not math.isnan(value)}
