"""The tiny model's tokenizer with a chat template of a test's own."""

import pytest

from ple_jax.models import tokenizer as tokenizers
from torch_ascend import backend


def speak(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    """From here on, to the end of the test, the byte tokenizer has this template."""
    plain = tokenizers.byte_tokenizer

    def made():
        found = plain()
        found.chat_template = template
        return found

    monkeypatch.setattr(tokenizers, "byte_tokenizer", made)
    backend.forget()  # a model that an earlier test loaded in torch, with the tokenizer's own template
