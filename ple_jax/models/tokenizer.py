"""Tokenizers without torch: from GGUF metadata, from a Hugging Face folder, and the project's own byte-level one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ple_jax.core.config import UserError

# What `tokenizer.ggml.pre` stands for. SmolLM cuts every digit off before GPT-2's pattern sees the text, as its own
# tokenizer.json and llama.cpp's LLAMA_VOCAB_PRE_TYPE_SMOLLM do; transformers' GGUF reader knows only GPT-2's pattern.
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_SPLITS = {
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
}
_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType

_BYTE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def from_gguf(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer that the `tokenizer.*` fields of a GGUF file describe, chat template included.

    Args:
        metadata: GGUF key -> value, e.g. "tokenizer.ggml.tokens" -> list of strings.

    Raises:
        UserError: another kind of tokenizer, or a field that such a tokenizer needs is missing.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _SPLITS:
        raise UserError(
            f"GGUF tokenizer model={kind!r} pre={pre!r} is not supported (model 'gpt2' with pre one of "
            f"{', '.join(sorted(_SPLITS))}); use the model's Hugging Face folder with its tokenizer.json instead"
        )
    if missing := [k for k in ("tokens", "merges", "token_type") if f"tokenizer.ggml.{k}" not in metadata]:
        raise UserError(f"GGUF tokenizer has no tokenizer.ggml.{missing[0]}; convert the model again with llama.cpp")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]

    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = _SPLITS[pre]
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=role == _CONTROL)
            for token, role in zip(tokens, types, strict=True)
            if role in (_CONTROL, _USER_DEFINED)
        ]
    )
    special = {
        name: tokens[metadata[key]]
        for name, key in (
            ("bos_token", "tokenizer.ggml.bos_token_id"),
            ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("unk_token", "tokenizer.ggml.unknown_token_id"),
            ("pad_token", "tokenizer.ggml.padding_token_id"),
        )
        if key in metadata
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", False),
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
        **special,
    )


def from_folder(path: str | Path) -> PreTrainedTokenizerFast:
    """Tokenizer of a local Hugging Face folder: tokenizer.json, tokenizer_config.json, chat_template.jinja.

    Raises:
        UserError: no tokenizer.json, or one that cannot be read.
    """
    # PreTrainedTokenizerFast and not AutoTokenizer: that one imports torch where it is installed.
    if not (Path(path) / "tokenizer.json").is_file():
        raise UserError(
            f"{path} has no tokenizer.json; write one with transformers: "
            f"AutoTokenizer.from_pretrained(...).save_pretrained({str(path)!r})"
        )
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the Rust parser raises bare Exception
        raise UserError(f"{path}/tokenizer.json cannot be read ({error}); copy the file again") from error


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny model's tokenizer: token id = byte of the UTF-8 text; 256 is <|eos|>, 257 is <|pad|>."""
    # GPT-2's printable stand-ins: bytes that print as themselves, the others from U+0100 on. (A decoder of byte fallback
    # would give nothing but replacement characters for a text with one invalid byte.)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    backend = Tokenizer(models.BPE({stand_in[byte]: byte for byte in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, normalized=False, special=True) for token in ("<|eos|>", "<|pad|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        chat_template=_BYTE_CHAT_TEMPLATE,
    )


def eos_ids(tokenizer: PreTrainedTokenizerFast, generation_config: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Token ids that end a response: those of generation_config.json, where it names any, else the tokenizer's EOS.

    Chat models often have several there (end of text, end of turn), the tokenizer only one. Empty if there is none.
    """
    stated = (generation_config or {}).get("eos_token_id")
    ids = stated if stated is not None else tokenizer.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
