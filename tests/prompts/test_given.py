"""Answers that the data give: the tokens that the chat template, or prompt and answer as one text, have for them."""

from datetime import date

import pytest
from test_prompts import CHATML, GEMMA, LLAMA3, MISTRAL, PHI3, QWEN3, TEMPLATES, TOOL, TURNS, ZEPHYR, system, tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ple_jax import prompts
from ple_jax.core.conversation import Answer, Conversation
from ple_jax.core.errors import Unusable
from ple_jax.core.types import Query
from ple_jax.prompts import template as templates

SAID = "At eight."
MARKUP = ("<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<think>", "</think>", "<|call|>")
OPENS = (  # thoughts, in the prompt; and leaves those of answers out
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
CLOSES = (  # thoughts, in the prompt; and writes an answer as it is
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}"
)
THINKS = (  # as Qwen3 does: an answer has thoughts, if only empty ones
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
CALLS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def made(template, **options):
    return tokenizer(template=template, special=MARKUP, **options)


def text_of(tok, prompt, said, *, stops=None, **options):
    """What is trained on, as text."""
    stops = stops if stops is not None else tuple(tok.convert_tokens_to_ids([tok.eos_token, *MARKUP[1:4]]))
    found = prompts.given(prompt, said, tok, stops=stops, **{"chat": True} | options)
    return tok.decode(found.tokens, skip_special_tokens=False)


@pytest.mark.parametrize("turns", [TURNS[:1], TURNS, (system("You sell films."), *TURNS)], ids=["one", "three", "system"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chatml", f"{SAID}<|im_end|>"),
        ("default system", f"{SAID}<|im_end|>"),
        ("refuses", f"{SAID}<|im_end|>"),
        ("llama 3", f"{SAID}<|eot_id|>"),
        ("gemma", f"{SAID}<end_of_turn>"),
        ("phi 3", f"{SAID}<|end|>"),  # it closes every conversation with EOS too, which is behind the end of the turn
        ("zephyr", f"{SAID}<|im_end|>"),
        ("mistral", f" {SAID}<|im_end|>"),  # which puts a blank before an answer
        ("drops", f"{SAID}<|im_end|>"),  # it writes nothing behind an answer: EOS
        ("qwen 3", f"{SAID}<|im_end|>"),  # its prompt has closed the thoughts that it leaves out of answers
    ],
)
def test_an_answer_ends_as_the_template_ends_a_turn(name, said, turns):
    tok = made(TEMPLATES[name][0])
    assert text_of(tok, Conversation(turns), SAID) == said


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, ZEPHYR, THINKS], ids=range(5))
def test_prompt_and_answer_are_the_templates_own_tokens(template):
    """Of the whole conversation, by transformers, up to the end of the turn."""
    tok = made(template)
    for turns in (TURNS[:1], TURNS):
        ends = tuple(tok.convert_tokens_to_ids(["<|im_end|>", "<end_of_turn>", "<|eot_id|>"]))
        _, prompt = prompts.render(Query("q", Conversation(turns)), None, tok, chat=True)
        answer = prompts.given(Conversation(turns), SAID, tok, stops=ends, chat=True)
        whole = tok.apply_chat_template([*turns, {"role": "assistant", "content": SAID}], tokenize=True, return_dict=False)
        ours = [*prompt, *answer.tokens]
        assert ours == list(whole)[: len(ours)] and ours[-1] in ends and answer.text == SAID
        assert not tok.decode(whole[len(ours) :]).strip()  # at most the template's line end is left


def test_of_several_stops_it_is_the_templates():
    tok = made(GEMMA)
    eos, turn = tok.eos_token_id, tok.convert_tokens_to_ids("<end_of_turn>")
    for stops in ((eos, turn), (turn, eos)):
        assert prompts.given("Well?", SAID, tok, stops=stops, chat=True).tokens[-1] == turn
    # what stops nothing is followed by what does
    assert text_of(tok, "Well?", SAID, stops=(eos,)) == f"{SAID}<end_of_turn><|im_end|>"
    assert text_of(tok, "Well?", SAID, stops=(), chat=False) == SAID


def blank_first(template=None):
    """A tokenizer that puts a blank before every text, as Llama 2's does."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"])}
    for letter in map(chr, range(33, 127)):
        vocab.setdefault(letter, len(vocab))
    merges, words = [], ("▁great", "▁film")
    for word in words:
        for end in range(2, len(word) + 1):
            vocab.setdefault(word[:end], len(vocab))
            merges.append((word[: end - 1], word[end - 1]))
    backend = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)


@pytest.mark.parametrize(
    ("prompt", "said", "pieces"),
    [
        ("A film", " great", ["▁great", "</s>"]),
        ("A film", " great film", ["▁great", "▁film", "</s>"]),
        ("A film", "s", ["s", "</s>"]),
        ("A film ", "great", ["g", "r", "e", "a", "t", "</s>"]),  # the blank is the prompt's
    ],
)
def test_a_plain_answer_has_no_second_blank(prompt, said, pieces):
    tok = blank_first()
    found = prompts.given(prompt, said, tok, stops=(2,), chat=False)
    assert tok.convert_ids_to_tokens(list(found.tokens)) == pieces and found.text == said


def test_what_was_sampled_has_the_blank_before_its_first_word():
    """As an answer of the data has, though the decoder drops the blank of a text that it begins."""
    tok = blank_first()
    ids = tok.convert_tokens_to_ids(["▁great", "▁film", "</s>"])
    assert prompts.answer(ids, tok, prompt="A", thinking=False, chat=False) == " great film"
    assert prompts.answer(ids[1:], tok, prompt="A great", thinking=False, chat=False) == " film"
    assert prompts.answer(tok.convert_tokens_to_ids(["s", "</s>"]), tok, prompt="A film", thinking=False, chat=False) == "s"
    assert prompts.answer(ids, tok, prompt="A", thinking=False) == "great film"
    assert prompts.decoded((), tok, chat=False) == ""


def test_a_chat_answer_has_no_blank_of_its_own():
    tok = blank_first(ZEPHYR)
    found = prompts.given("A film", "great", tok, stops=(2,), chat=True)
    assert tok.convert_ids_to_tokens(list(found.tokens)) == ["g", "r", "e", "a", "t", "</s>"]


def test_tokens_that_would_grow_together_with_the_prompts():
    """What follows the prompt's own tokens, with the text of the whole."""
    tok = made(None)
    for prompt, said in (("The fi", "lm begins"), ("The film ", "begins"), ("The film\n", "\nbegins")):
        before = prompts.render(Query("q", prompt), None, tok, chat=False)[1]
        found = prompts.given(prompt, said, tok, stops=(tok.eos_token_id,), chat=False).tokens
        assert tok.decode([*before, *found[:-1]]) == prompt + said and found[-1] == tok.eos_token_id


def test_a_transcript_goes_on_with_a_blank_and_an_eos_that_is_there_is_not_doubled():
    tok = made(None, adds="<s> $A <|im_end|>")
    assert text_of(tok, Conversation(TURNS[:1]), SAID, chat=False) == f" {SAID}<|im_end|>"
    assert text_of(tok, "The film", f" begins{tok.eos_token}", chat=False) == " begins<|im_end|>"
    assert text_of(made(CHATML), "The film", f"{SAID}<|im_end|>") == f"{SAID}<|im_end|>"


# ---------------------------------------------------------------- headers


HEADLESS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CLOSED = HEADLESS + "{{ eos_token }}"
ALWAYS = HEADLESS + "{{ '<|im_start|>assistant\n' }}"


@pytest.mark.parametrize("template", [HEADLESS, CLOSED, ALWAYS, CHATML], ids=["none", "closed", "always", "asked"])
def test_a_prompt_ends_with_what_stands_before_an_answer(template):
    tok = made(template)
    assert templates.writes_header(tok) == (template == CHATML)
    for rules, before in ((None, ""), ("Be kind.", "<|im_start|>system\nBe kind.<|im_end|>\n")):
        text, _ = prompts.render(Query("q", Conversation(TURNS[:1])), rules, tok, chat=True)
        assert text == f"{before}<|im_start|>user\nWhich film?<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(tok, Conversation(TURNS[:1]), SAID) == f"{SAID}<|im_end|>"


def test_a_blank_is_no_header():
    tok = made(MISTRAL)
    assert not templates.writes_header(tok)
    assert prompts.render(Query("q", Conversation(TURNS[:1])), None, tok, chat=True)[0] == "<s>[INST] Which film?[/INST]"


@pytest.mark.parametrize(
    ("template", "token"),
    [(CHATML, "<|im_end|>"), (GEMMA, "<end_of_turn>"), (LLAMA3, "<|eot_id|>"), (PHI3, "<|end|>"), (QWEN3, "<|im_end|>")]
    + [(ALWAYS, "<|im_end|>"), (TEMPLATES["drops"][0], None), ("{{ raise_exception('no') }}", None), (None, None)],
)
def test_the_token_that_ends_a_turn(template, token):
    tok = made(template)
    assert templates.end_of_turn(tok) == (None if token is None else tok.convert_tokens_to_ids(token))


COMMAND_R = (  # closes its text, and then the turn
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
PHI4 = PHI3.replace("<|end|>\n", "<|end|>")  # the turn, and then the conversation
ALWAYS_LLAMA = LLAMA3.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")


@pytest.mark.parametrize(
    ("template", "token"), [(COMMAND_R, "<|im_end|>"), (PHI4, "<|end|>"), (ALWAYS_LLAMA, "<|eot_id|>")], ids=range(3)
)
def test_of_several_tokens_in_a_row_one_ends_the_turn(template, token):
    tok = tokenizer(template=template, special=(*MARKUP, "<|start_header_id|>", "<|end_header_id|>"))
    assert templates.end_of_turn(tok) == tok.convert_tokens_to_ids(token)
    ends = tok.convert_tokens_to_ids(token)
    assert prompts.given("Well?", SAID, tok, stops=(ends,), chat=True).tokens[-1] == ends
    assert text_of(tok, "Well?", SAID, stops=(ends,)).endswith({"<|im_end|>": f"{SAID}<|end|>"}.get(token, SAID) + token)


# ---------------------------------------------------------------- more than a text


def thinking(thoughts="because", said=SAID):
    return Answer({"role": "assistant", "content": said, "reasoning_content": thoughts})


def calling(said="", arguments=None):
    call = {"type": "function", "function": {"name": "programme", "arguments": arguments or {"film": "blue"}}}
    return Answer({"role": "assistant", "content": said, "tool_calls": [call]})


def test_thoughts_are_trained_on():
    tok = made(THINKS)
    assert text_of(tok, "Well?", thinking(), thinking=True) == f"<think>\nbecause\n</think>\n\n{SAID}<|im_end|>"
    assert text_of(tok, "Well?", SAID, thinking=True) == f"<think>\n\n</think>\n\n{SAID}<|im_end|>"
    assert text_of(tok, "Well?", SAID) == f"{SAID}<|im_end|>"  # the prompt has the empty ones
    found = prompts.given("Well?", thinking(), tok, stops=(tok.eos_token_id,), chat=True, thinking=True)
    assert found.text == SAID  # as a reward sees the policy's own


def test_calls_are_trained_on():
    tok = made(CALLS)
    prompt = Conversation(TURNS[:1], [TOOL])
    assert text_of(tok, prompt, calling()) == '<call>programme{"film": "blue"}</call><|im_end|>'
    assert text_of(tok, prompt, calling("One moment.")) == 'One moment.<call>programme{"film": "blue"}</call><|im_end|>'
    found = prompts.given(prompt, calling(), tok, stops=(tok.eos_token_id,), chat=True)
    assert found.text == '<call>programme{"film": "blue"}</call>'


@pytest.mark.parametrize(
    ("template", "said", "options", "says"),
    [
        (CHATML, thinking(), {"thinking": True}, "does not hold: it leaves out 'because'"),
        (CHATML, calling(), {}, "does not hold: it leaves out 'programme'"),
        (CALLS.replace(" + (c.function.arguments | tojson)", ""), calling(), {}, "it leaves out 'blue'"),
        (THINKS, thinking(), {}, "does not hold: it .*; set --config.task.thinking=True"),
        (OPENS, SAID, {}, "it opens thoughts in the prompt, and writes this answer without any"),
        (OPENS, f"<think>because</think>{SAID}", {}, "does not hold"),
        (OPENS.replace("<think>", "<|channel>thought"), SAID, {}, "it opens thoughts in the prompt"),
        (CLOSES, f"<think>because</think>{SAID}", {}, "it writes something else .*; set --config.task.thinking=True"),
        (None, thinking(), {"chat": False}, "reasoning_content, which plain text cannot hold: set --config.task.chat=True"),
        (None, calling("Look."), {"chat": False}, "tool_calls, which plain text cannot hold"),
        (CHATML, "It is <|im_end|> over.", {}, "spells '<|im_end|>' before its end"),
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), SAID, {}, "refused|leaves out"),
    ],
)
def test_what_cannot_be_trained_on_whole_is_refused(template, said, options, says):
    with pytest.raises(Unusable, match=says):
        text_of(made(template), "Well?", said, **options)


def test_a_conversation_that_the_template_refuses_is_one_record():
    with pytest.raises(Unusable) as refused:
        prompts.render(Query("q", Conversation([TURNS[0], TURNS[0]])), None, made(GEMMA), chat=True)
    assert refused.value.kind == "template"
    assert refused.value.reason.startswith("is refused by the tokenizer's chat template")


def test_a_reward_models_conversation_has_the_whole_answer():
    tok = made(CALLS)
    prompt = Conversation(TURNS[:1], [TOOL])
    assert '{"film": "blue"}' in tok.decode(prompts.dialogue(prompt, calling(), tok))
    with pytest.raises(Unusable, match="leaves out 'because'"):
        prompts.dialogue(prompt, thinking(), tok)
    with pytest.raises(Unusable, match="plain text cannot hold"):
        prompts.dialogue("Well?", calling("x"), made(None))


# ---------------------------------------------------------------- the day


@pytest.mark.parametrize("day", ["2026-11-28", "2027-01-05", "2024-02-29"])
def test_the_clock_of_a_template_stands_still(day):
    formats = ["%d %b %Y", "%Y-%m-%d", "%A, %B %d", "%H:%M:%S", "%j %U %y %%", "%e. %m", "no date"]
    source = "".join(f"{{{{ strftime_now({format!r}) }}}}|" for format in formats) + CHATML
    text, _ = prompts.render(Query("q", "Well?"), None, made(source), chat=True, date=day)
    wanted = "|".join(date.fromisoformat(day).strftime(format) for format in formats)
    assert text.startswith(f"{wanted}|<|im_start|>")
    year, month, number = map(int, day.split("-"))
    text, _ = prompts.render(Query("q", "Well?"), None, made("{{ strftime_now('%-d.%-m.') }}" + CHATML), chat=True, date=day)
    assert text.startswith(f"{number}.{month}.<|im_start|>")


def test_a_template_that_asks_for_the_day_as_llama_does():
    source = (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now(\"%d %b %Y\") %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
        "{%- endif %}\n{{- 'Today: ' + date_string + '\n' }}" + CHATML
    )
    text, _ = prompts.render(Query("q", "Well?"), None, made(source), chat=True, date="2026-11-28")
    assert text.startswith("Today: 28 Nov 2026\n<|im_start|>user")
    inner = "{% macro day() %}{{ strftime_now(format='%Y') }}{% endmacro %}{{ day() }}" + CHATML
    assert prompts.render(Query("q", "Well?"), None, made(inner), chat=True, date="2026-11-28")[0].startswith("2026<")
    ids = prompts.dialogue("Well?", SAID, made(source))  # of no run: the same on every day
    assert made(source).decode(ids).startswith("Today: 26 Jul 2024")


def test_a_template_without_a_clock_is_left_alone():
    tok = made("\n " + CHATML)
    asked = [{"role": "user", "content": "Well?"}]
    wanted = tok.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompts.render(Query("q", "Well?"), None, tok, chat=True)[0] == wanted
    dated = made("\n " + CHATML + "{# strftime_now #}")  # nor is its beginning
    assert prompts.render(Query("q", "Well?"), None, dated, chat=True)[0] == wanted
