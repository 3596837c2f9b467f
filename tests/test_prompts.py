"""Plain and principled prompts, raw and with chat templates, on a small byte-level BPE tokenizer built here."""

import os.path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ple_jax.core import principles, prompts
from ple_jax.core.config import PACKAGE, UserError
from ple_jax.core.types import Query

QUERY = Query("q-7", "The film begins")
RULES = "Be kind.\nBe brief."
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nI am a model.<|im_end|>\n{% endif %}" + CHATML
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DROPS = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"


def tokenizer(*, template=None, adds="$A"):
    specials = ["<s>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["The film begins and the film ends"] * 4, trainer)
    ids = [(token, backend.token_to_id(token)) for token in specials]
    backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    wrapped.chat_template = template
    return wrapped


@pytest.mark.parametrize(
    ("adds", "begins"),
    [("$A", ""), ("<s> $A", "<s>"), ("<s> $A <|im_end|>", "<s>"), ("$A <|im_end|>", "")],
    ids=["nothing", "bos", "bos and eos", "eos"],
)
@pytest.mark.parametrize(
    ("rules", "text"), [(None, "The film begins"), (RULES, "Be kind.\nBe brief.\n\nThe film begins")]
)
def test_raw_has_bos_where_the_tokenizer_adds_it_and_never_eos(adds, begins, rules, text):
    tok = tokenizer(adds=adds)
    rendered, ids = prompts.render(QUERY, rules, tok, chat=False)
    assert rendered == text
    assert tok.decode(ids, skip_special_tokens=False) == begins + text


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        (None, "<|im_start|>user\nThe film begins<|im_end|>\n<|im_start|>assistant\n"),
        (
            "Be kind.",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nThe film begins<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_chat_puts_the_principles_into_the_system_turn(rules, text):
    tok = tokenizer(template=CHATML, adds="<s> $A <|im_end|>")  # what the tokenizer adds, the template has said already
    rendered, ids = prompts.render(QUERY, rules, tok, chat=True)
    assert rendered == text
    assert tok.decode(ids, skip_special_tokens=False) == text
    assert ids[0] == tok.convert_tokens_to_ids("<|im_start|>")  # markup is one token


def test_the_templates_own_system_turn_stays_in_the_plain_prompt():
    tok = tokenizer(template=DEFAULT_SYSTEM)
    assert prompts.render(QUERY, None, tok, chat=True)[0].startswith("<|im_start|>system\nI am a model.<|im_end|>\n")
    assert "I am a model." not in prompts.render(QUERY, RULES, tok, chat=True)[0]


@pytest.mark.parametrize(
    ("template", "rules", "says"),
    [
        (None, None, "does not take query 'q-7': .*config.task.chat=False"),
        (REFUSES, RULES, "'q-7' with a system turn: no system role.*config.task.chat=False"),
        (DROPS, RULES, "leaves out the system turn 'Be kind.*config.task.chat=False"),
    ],
    ids=["absent", "refuses", "drops"],
)
def test_a_template_without_room_for_the_principles(template, rules, says):
    with pytest.raises(UserError, match=says):
        prompts.render(QUERY, rules, tokenizer(template=template), chat=True)


@pytest.mark.parametrize("template", [REFUSES, DROPS])
def test_such_a_template_still_renders_plain_prompts(template):
    assert "The film begins" in prompts.render(QUERY, None, tokenizer(template=template), chat=True)[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], [1, 2]),
        ([[1, 2], [1, 2, 3]], [1]),
        ([[1, 2, 3]], [1, 2]),
        ([[1], [1]], []),
        ([[1, 2], [3, 2]], []),
    ],
)
def test_common_prefix(given, expected):
    assert prompts.common_prefix(given) == expected


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=5))
def test_common_prefix_is_the_longest_that_leaves_a_token(given):
    prefix = prompts.common_prefix(given)
    assert prefix == os.path.commonprefix(given)[: min(map(len, given)) - 1]


@pytest.mark.parametrize("name", ["positive_review", "helpful_harmless", "faithful_summary"])
def test_named_principles_are_numbered_rules_without_the_version_line(name):
    text = principles.load(name)
    assert (PACKAGE / "core" / "principles" / f"{name}.txt").read_text().startswith("# version: ")
    assert "version" not in text and "\n1. " in text and "\n3. " in text and text == text.strip()


def test_principles_of_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# version: 7\n\nBe brief.\n# a heading stays\n")
    assert principles.load(str(path)) == "Be brief.\n# a heading stays"
    path.write_text("Be brief.\n")
    assert principles.load(str(path)) == "Be brief."


def test_bad_principles(tmp_path):
    (tmp_path / "empty.txt").write_text("# version: 7\n")
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        principles.load(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="did you mean 'positive_review'"):
        principles.load("positive_reviews")
