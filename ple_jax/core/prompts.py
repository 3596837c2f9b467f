"""From a query to the token ids the policy sees, plain or with the principles."""

from collections.abc import Sequence

from ple_jax.core.config import UserError
from ple_jax.core.types import Query, Tokenizer


def render(query: Query, principles: str | None, tokenizer: Tokenizer, *, chat: bool) -> tuple[str, list[int]]:
    """The prompt as text and as token ids; with `principles` it is the principled one.

    Raw: the principles stand before the query, an empty line between. Chat: they are the system turn. A plain prompt keeps
    whatever system turn the model's own template puts in.

    Raises:
        UserError: chat without a chat template, or with one that refuses the turns or leaves out the system turn.
    """
    if not chat:
        text = query.prompt if principles is None else f"{principles}\n\n{query.prompt}"
        tokens = list(tokenizer.encode(text, add_special_tokens=True))
        # some tokenizers close every text with EOS; a prompt is to be continued
        return text, tokens[:-1] if tokens[-1] == tokenizer.eos_token_id else tokens
    turns = [{"role": "user", "content": query.prompt}]
    if principles is not None:
        turns.insert(0, {"role": "system", "content": principles})
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are code of the checkpoint's: they raise what they like
        raise UserError(
            f"the tokenizer's chat template does not take query {query.id!r}"
            f"{' with a system turn' if principles else ''}: {error}; set --config.task.chat=False for raw prompts"
        ) from error
    if principles is not None and principles.strip() not in text:  # the two kinds of response would be the same
        raise UserError(
            f"the tokenizer's chat template leaves out the system turn {principles[:60]!r};"
            " take a model whose template has one, or set --config.task.chat=False for raw prompts"
        )
    return text, list(tokenizer.encode(text, add_special_tokens=False))


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, leaving every prompt at least one token of its own."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    for i in range(shortest):
        if any(prompt[i] != prompts[0][i] for prompt in prompts):
            return list(prompts[0][:i])
    return list(prompts[0][: max(shortest, 0)])
