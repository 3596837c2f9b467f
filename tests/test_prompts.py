"""Plain and principled prompts, raw and with a chat template."""

import pytest

from ple_jax.core import principles, prompts
from ple_jax.core.config import UserError
from ple_jax.core.types import Query
from ple_jax.models import checkpoint, tokenizer

QUERY = Query("q", "The film begins")


@pytest.fixture(scope="module")
def smollm2():
    return checkpoint.load("smollm2-135m").tokenizer


def test_raw():
    tokens = tokenizer.byte_tokenizer()
    assert prompts.render(QUERY, None, tokens, chat=False) == ("The film begins", list(b"The film begins"))
    assert prompts.render(QUERY, "Be kind.", tokens, chat=False)[0] == "Be kind.\n\nThe film begins"


def test_chat(smollm2):
    text, ids = prompts.render(QUERY, "Be kind.", smollm2, chat=True)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nThe film begins<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.decode(ids) == text and len(ids) < len(text) / 2  # markup is single tokens
    plain, _ = prompts.render(QUERY, None, smollm2, chat=True)
    assert "Be kind." not in plain and plain.endswith("assistant\n")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", ["positive_review", "helpful_harmless", "faithful_summary"])
def test_the_plain_prompt_never_holds_the_principles(name, chat, smollm2):
    text = principles.load(name)
    assert not text.startswith("#") and 20 < len(smollm2.encode(text)) < 150
    assert text in prompts.render(QUERY, text, smollm2, chat=chat)[0]
    plain = prompts.render(QUERY, None, smollm2, chat=chat)[0]
    assert all(line not in plain for line in text.splitlines() if line)


def test_a_template_that_refuses_is_a_clear_error():
    tokens = tokenizer.byte_tokenizer()
    tokens.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}x"
    assert prompts.render(QUERY, None, tokens, chat=True)[0] == "x"
    with pytest.raises(UserError, match="'q' with a system turn: no system turn"):
        prompts.render(QUERY, "Be kind.", tokens, chat=True)
    tokens.chat_template = None
    with pytest.raises(UserError, match="config.task.chat=False"):
        prompts.render(QUERY, None, tokens, chat=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], [1, 2]),
        ([[1, 2], [1, 2, 3]], [1]),  # every prompt keeps a token of its own
        ([[1, 2], [1, 2]], [1]),
        ([[1], [1]], []),
        ([[1, 2], [3, 2]], []),
    ],
)
def test_common_prefix(given, expected):
    assert prompts.common_prefix(given) == expected


def test_principles_of_your_own(tmp_path):
    (tmp_path / "mine.txt").write_text("# version: 7\n\nBe brief.\n")
    assert principles.load(str(tmp_path / "mine.txt")) == "Be brief."
    (tmp_path / "empty.txt").write_text("# version: 7\n")
    with pytest.raises(UserError, match="is empty"):
        principles.load(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="did you mean 'positive_review'"):
        principles.load("positive_reviews")
