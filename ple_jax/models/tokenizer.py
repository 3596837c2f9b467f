"""Tokenizers without torch: from GGUF metadata, from a Hugging Face folder, and the project's own byte-level one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ple_jax.core.errors import UserError
from ple_jax.prompts.template import end_of_turn


class _Pre(NamedTuple):
    """The settings of the model's own tokenizer.json that a value of `tokenizer.ggml.pre` stands for."""

    split: pre_tokenizers.PreTokenizer
    nfc: bool = False
    whole: bool = False  # a word of the vocabulary is one token, whatever the merges say
    bos: bool = False  # where the file does not say


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    """Returns a pre-tokenizer with OpenAI's cl100k pattern, in which `digits` quantifies the digits of one word."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    isolated = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([isolated, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_LLAMA3 = _Pre(_words("{1,3}"), whole=True, bos=True)
_PRES = {
    "gpt-2": _Pre(_GPT2),
    # SmolLM cuts every digit off before GPT-2's pattern sees the text; transformers' GGUF reader knows only that pattern
    "smollm": _Pre(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    "smaug-bpe": _LLAMA3._replace(bos=False),  # SmolLM 3 has Llama 3's vocabulary
    "dbrx": _Pre(_words("{1,3}")),  # OLMo 2
    "qwen2": _Pre(_words(""), nfc=True),
    **dict.fromkeys(("olmo", "mpt"), _Pre(_GPT2, nfc=True)),  # llama.cpp's converter takes GPT-NeoX's for these
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # gguf.TokenType
_SPECIAL = {  # transformers' name -> GGUF's key
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_BESIDE = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_BLANK = "▁"  # sentencepiece's space

_BYTE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def from_gguf(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Builds the tokenizer that the metadata of a GGUF file describe, with its chat template.

    Byte-level BPE with a known pattern of words and sentencepiece's BPE are supported.

    Args:
        metadata: GGUF key -> value, "general.architecture" and all "tokenizer.*", e.g. "tokenizer.ggml.tokens" ->
            list of strings.

    Raises:
        UserError: if it is another kind of tokenizer, a field that it needs is missing, or the id of a special token is
            none of its tokens.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "llama" and (kind != "gpt2" or pre not in _PRES):
        raise UserError(
            f"GGUF tokenizer model={kind!r} pre={pre!r} is not supported (model 'llama', or 'gpt2' with pre one of "
            f"{', '.join(sorted(_PRES))}); use the model's Hugging Face folder with its tokenizer.json instead"
        )
    needed = ("tokens", "token_type", "merges" if kind == "gpt2" else "scores")
    if missing := [k for k in needed if f"tokenizer.ggml.{k}" not in metadata]:
        raise UserError(f"GGUF tokenizer has no tokenizer.ggml.{missing[0]}; convert the model again with llama.cpp")
    backend = _sentencepiece(metadata) if kind == "llama" else _byte_level(metadata)
    backend.add_tokens(_added(metadata, backend.get_vocab()))
    tokens = metadata["tokenizer.ggml.tokens"]
    if wrong := [key for key in _SPECIAL.values() if not 0 <= metadata.get(key, 0) < len(tokens)]:
        raise UserError(f"GGUF tokenizer has {wrong[0]} = {metadata[wrong[0]]}, and tokens 0 to {len(tokens) - 1}")
    special = {name: tokens[metadata[key]] for name, key in _SPECIAL.items() if key in metadata}
    bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or _PRES[str(pre)].bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=bos and "bos_token" in special,
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
        **special,
    )


def _added(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> list[AddedToken]:
    """Returns the special and the user-defined tokens, which are found in a text before it is split into words."""
    phi3 = metadata["tokenizer.ggml.model"] == "llama" and metadata["general.architecture"] == "phi3"
    return [
        AddedToken(
            token,
            normalized=False,
            special=role == _CONTROL,
            # not in the file; llama.cpp knows it too
            rstrip=phi3 and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for token, role in zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
        if role in (_CONTROL, _USER_DEFINED) and token in vocab
    ]


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    pre = _PRES[metadata["tokenizer.ggml.pre"]]
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.whole))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.split
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds BPE over characters, with tokens <0x00> to <0xFF> for the bytes of characters outside the vocabulary."""
    architecture, scores = metadata["general.architecture"], metadata["tokenizer.ggml.scores"]
    # llama.cpp's converter writes added tokens of blanks with real ones
    tokens = [token if token.strip(" ") else _BLANK * len(token) for token in metadata["tokenizer.ggml.tokens"]]
    if "tokenizer.ggml.merges" in metadata:
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    else:
        # The converter overwrites the scores of added tokens (many in Gemma's vocabulary), and all of them where it had
        # no sentencepiece model at hand; then the order of the tokens is that of the merges.
        types = metadata["tokenizer.ggml.token_type"]
        told = {score for score, role in zip(scores, types, strict=True) if role == _NORMAL}
        ordered = architecture.startswith("gemma") or len(told) == 1
        merges = merges_of(tokens, range(len(tokens)) if ordered else [-score for score in scores])
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    decoding = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    blanks = normalizers.Replace(" ", _BLANK)
    if not metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = blanks
    else:
        decoding.append(decoders.Strip(" ", 1, 0))
        if architecture == "phi3":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), blanks])
        else:  # a text that starts with a blank gets no second one
            backend.pre_tokenizer = pre_tokenizers.Metaspace(_BLANK, "first", split=False)
    backend.decoder = decoders.Sequence(decoding)
    return backend


def merges_of(tokens: Sequence[str], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """Returns every way to compose a token of two others, as (left, right).

    The lowest rank comes first, and within one rank the longest left part.
    """
    vocab = set(tokens)
    pairs = [
        (rank, token[:cut], token[cut:])
        for token, rank in zip(tokens, ranks, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: (pair[0], -len(pair[1]), -len(pair[2])))]


def from_folder(path: str | Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a local Hugging Face folder: tokenizer.json, tokenizer_config.json, chat_template.jinja.

    Raises:
        UserError: if there is no tokenizer.json, or one of these files cannot be read.
    """
    # PreTrainedTokenizerFast and not AutoTokenizer: that one imports torch where it is installed.
    if not (Path(path) / "tokenizer.json").is_file():
        raise UserError(
            f"{path} has no tokenizer.json; write one with transformers: "
            f"AutoTokenizer.from_pretrained(...).save_pretrained({str(path)!r})"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        tokenizer("a")  # some settings are read at the first text
        return tokenizer
    except BaseException as error:  # the Rust parser raises bare Exception
        if not failed(error):
            raise
        raise UserError(f"{path}/{_at_fault(Path(path))} cannot be read ({error}); copy the file again") from error


def _at_fault(folder: Path) -> str:
    """Returns the name of the file that a tokenizer cannot be built from, for an error.

    It is tokenizer.json if that cannot be read by itself. If it can, the fault is in one of the files beside it, all of
    which are named.
    """
    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    except BaseException as error:
        if not failed(error):
            raise
        return "tokenizer.json"
    beside = [name for name in _BESIDE if (folder / name).exists()]
    return " or ".join(beside) or "tokenizer.json"


def failed(error: BaseException) -> bool:
    """Says whether an exception is an error, and not a request to stop such as Ctrl-C.

    A panic of Rust code is an error, although its class is no subclass of Exception.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tiny model's tokenizer: a token id is a byte of the UTF-8 text; 256 is <|eos|>, 257 is <|pad|>."""
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
    """Returns the token ids that end a response, each once; empty if there are none.

    They are those of generation_config.json, the tokenizer's EOS, and the chat template's end of turn. A chat model often
    has several, and no file names all of them: generation_config.json may have only the end of a text, and the chat
    template only the end of a turn.

    Raises:
        UserError: if `eos_token_id` of generation_config.json is not a token id or a list of them.
    """
    stated = (generation_config or {}).get("eos_token_id")
    ids = list(stated) if isinstance(stated, list | tuple) else [stated]
    if wrong := [i for i in ids if type(i) is not int and i is not None]:
        raise UserError(f"eos_token_id {wrong[0]!r} is not a token id; mend generation_config.json or config.json")
    more = [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return tuple(dict.fromkeys(i for i in (*ids, *more) if i is not None))
