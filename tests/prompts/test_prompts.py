"""Plain and principled prompts, raw and with chat templates, on a small byte-level BPE tokenizer built here."""

import functools
import os.path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ple_jax import prompts
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.types import Query
from ple_jax.models import weights

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
DROPS = (
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TWICE = "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}" + CHATML
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}
{{- '[INST] ' + (system + '\\n\\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
QWEN3 = """
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- '# Tools' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + (m.content or '').split('</think>')[-1].lstrip('\\n') }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
TEMPLATES = {  # and how their generation prompts end
    "chatml": (CHATML, "<|im_start|>assistant\n"),
    "default system": (DEFAULT_SYSTEM, "<|im_start|>assistant\n"),
    "refuses": (REFUSES, "<|im_start|>assistant\n"),
    "drops": (DROPS, "[assistant]"),
    "twice": (TWICE, "<|im_start|>assistant\n"),
    "llama 3": (LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "mistral": (MISTRAL, "[/INST]"),
    "gemma": (GEMMA, "<start_of_turn>model\n"),
    "qwen 3": (QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "phi 3": (PHI3, "<|assistant|>\n"),
    "zephyr": (ZEPHYR, "<|assistant|>\n"),
}
TURNS = (
    {"role": "user", "content": "Which film?"},
    {"role": "assistant", "content": "The blue one."},
    {"role": "user", "content": "When does it begin?"},
)
CALL = {"type": "function", "function": {"name": "programme", "arguments": {"film": "blue"}}}
TOOL = {"type": "function", "function": {"name": "programme", "description": "When films begin.", "parameters": {}}}
TOOL_TURNS = (
    {"role": "user", "content": "When does the blue film begin?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "programme", "content": "at eight"},
)


def system(text):
    return {"role": "system", "content": text}


def tokenizer(*, template=None, adds="$A", special=(), ordinary=()):
    specials = ["<s>", "<|im_start|>", "<|im_end|>", *special]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(special),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["The film begins and the film ends"] * 4, trainer)
    backend.add_tokens(list(ordinary))
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
    ("turns", "text"),
    [
        (TURNS[:1], "\n\nHuman: Which film?\n\nAssistant:"),
        (TURNS, "\n\nHuman: Which film?\n\nAssistant: The blue one.\n\nHuman: When does it begin?\n\nAssistant:"),
    ],
)
def test_a_raw_conversation_is_its_transcript(turns, text):
    tok = tokenizer(adds="<s> $A")
    rendered, ids = prompts.render(Query("q", Conversation(turns)), None, tok, chat=False)
    assert rendered == text and type(rendered) is str
    assert tok.decode(ids, skip_special_tokens=False) == "<s>" + text
    rendered, _ = prompts.render(Query("q", Conversation(turns)), RULES, tok, chat=False)
    assert rendered == RULES + text  # the empty line between is the transcript's


def test_plain_text_keeps_its_empty_lines():
    assert prompts.render(Query("q", "\n\nThe film"), "Be kind.", tokenizer(), chat=False)[0] == "Be kind.\n\n\n\nThe film"


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


def test_principles_follow_the_querys_own_system_turn():
    query = Query("q", Conversation([system("You sell films."), *TURNS[:1]]))
    tok = tokenizer(template=CHATML)
    rest = "<|im_end|>\n<|im_start|>user\nWhich film?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.render(query, None, tok, chat=True)[0] == "<|im_start|>system\nYou sell films." + rest
    assert prompts.render(query, "Be kind.", tok, chat=True)[0] == "<|im_start|>system\nYou sell films.\n\nBe kind." + rest


@pytest.mark.parametrize(
    ("template", "begins", "ends"),
    [
        (REFUSES, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        (DROPS, "[user]", "[assistant]"),
        (TWICE, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        (GEMMA, "<s><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    ],
    ids=["refuses", "drops", "twice", "gemma"],
)
def test_without_a_system_turn_its_text_heads_the_first_user_turn(template, begins, ends):
    tok = tokenizer(template=template)

    def text(rules, *turns):
        query = Query("q", Conversation(turns)) if turns else QUERY
        return prompts.render(query, rules, tok, chat=True)[0]

    assert text(None) == f"{begins}The film begins{ends}"
    assert text(RULES) == f"{begins}{RULES}\n\nThe film begins{ends}"
    own = system("You sell films.")
    assert text(None, own, *TURNS[:1]) == f"{begins}You sell films.\n\nWhich film?{ends}"
    assert text(RULES, own, *TURNS[:1]) == f"{begins}You sell films.\n\n{RULES}\n\nWhich film?{ends}"
    assert text(RULES, *TURNS).startswith(f"{begins}{RULES}\n\nWhich film?")
    assert text(None, own) == f"{begins}You sell films.{ends}"


@pytest.mark.parametrize("own", ["user", "a", "I am a model.", " Be brief. \n"])
def test_a_system_turn_that_is_also_in_the_markup(own):
    """Its text is in the prompt more than once, and yet it was put in once."""
    for template in (CHATML, DEFAULT_SYSTEM, LLAMA3):
        tok = tokenizer(template=template)
        turns = [system(own), *TURNS]
        text = prompts.render(Query("q", Conversation(turns)), None, tok, chat=True)[0]
        assert text == tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def test_a_later_system_turn_is_not_lost_in_silence():
    query = Query("q", Conversation([*TURNS[:2], system("Be brief."), TURNS[2]]))
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompts.render(query, None, tokenizer(template=CHATML), chat=True)[0]
    with pytest.raises(UserError, match="it leaves out 'Be brief.'"):
        prompts.render(query, None, tokenizer(template=DROPS), chat=True)


def test_the_first_user_turn_need_not_be_the_first():
    greeting = {"role": "assistant", "content": "Good evening."}
    query = Query("q", Conversation([system("You sell films."), greeting, *TURNS]))
    text, _ = prompts.render(query, "Be kind.", tokenizer(template=DROPS), chat=True)
    assert text == (
        "[assistant]Good evening.[user]You sell films.\n\nBe kind.\n\nWhich film?"
        "[assistant]The blue one.[user]When does it begin?[assistant]"
    )


def test_templates_may_trim_what_is_said():
    query = Query("q", " The film \n")
    text, _ = prompts.render(query, " Be kind.\n", tokenizer(template=LLAMA3), chat=True)
    assert "system<|end_header_id|>\n\nBe kind.<|eot_id|>" in text
    assert "user<|end_header_id|>\n\nThe film<|eot_id|>" in text


def test_an_empty_system_turn_keeps_the_templates_own_out():
    query = Query("q", Conversation([system(""), *TURNS[:1]]))
    tok = tokenizer(template=DEFAULT_SYSTEM)
    assert prompts.render(query, None, tok, chat=True)[0].startswith("<|im_start|>system\n<|im_end|>\n")
    assert prompts.render(query, "Be kind.", tok, chat=True)[0].startswith("<|im_start|>system\nBe kind.<|im_end|>\n")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "turns",
    [TURNS[:1], TURNS, (system("You sell films."), *TURNS), (system("The film"), *TURNS[:1])],
    ids=["one turn", "turns", "system", "short system"],
)
def test_invariants_of_every_template(name, turns):
    template, ends = TEMPLATES[name]
    tok = tokenizer(template=template, adds="<s> $A <|im_end|>")
    check_invariants(tok, turns, ends, bos=int("bos_token" in template))


@pytest.mark.parametrize("turns", [TURNS[:1], TURNS, (system("You sell films."), *TURNS)])
def test_invariants_of_smollm2(turns):
    tok = smollm2()
    check_invariants(tok, turns, "<|im_start|>assistant\n", bos=None)  # its BOS is the mark that begins every turn


@functools.cache
def smollm2():
    return weights.load("smollm2-135m").tokenizer


def check_invariants(tok, turns, ends, *, bos):
    rules = ["Be kind to all.", "Be brief at last."]
    query = Query("q", Conversation(turns))
    for principles in (None, "Heed:\n1. {}\n2. {}".format(*rules)):
        text, ids = prompts.render(query, principles, tok, chat=True)
        assert [text.count(rule) for rule in rules] == ([1, 1] if principles else [0, 0])
        assert text.endswith(ends)
        places = [text.index(turn["content"]) for turn in turns if turn["role"] != "system"]
        assert places == sorted(places)
        assert all(text.count(turn["content"]) == 1 for turn in turns)
        assert tok.decode(ids, skip_special_tokens=False) == text
        assert bos is None or ids.count(tok.bos_token_id) == bos
        assert ids[-1] != tok.eos_token_id


def test_thinking_is_the_templates_business():
    tok = tokenizer(template=QWEN3)
    quiet, _ = prompts.render(QUERY, None, tok, chat=True)
    loud, _ = prompts.render(QUERY, None, tok, chat=True, thinking=True)
    assert loud.endswith("<|im_start|>assistant\n")
    assert quiet == loud + "<think>\n\n</think>\n\n"
    turns = [TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nThe blue one."}, TURNS[2]]
    text, _ = prompts.render(Query("q", Conversation(turns)), RULES, tok, chat=True, thinking=True)
    assert "hm" not in text and "assistant\nThe blue one.<" in text


def test_tool_turns_go_to_the_template_as_they_are():
    tok = tokenizer(template=QWEN3)
    query = Query("q", Conversation(TOOL_TURNS, [TOOL]))
    for rules in (None, RULES):
        text, _ = prompts.render(query, rules, tok, chat=True)
        assert text == "<|im_start|>system\n" + (f"{rules}\n\n" if rules else "") + (
            '# Tools\n{"type": "function", "function": {"name": "programme", "description": "When films begin.",'
            ' "parameters": {}}}<|im_end|>\n'
            "<|im_start|>user\nWhen does the blue film begin?<|im_end|>\n"
            '<|im_start|>assistant\n<tool_call>\n{"name": "programme", "arguments": {"film": "blue"}}\n</tool_call>'
            "<|im_end|>\n"
            "<|im_start|>user\n<tool_response>\nat eight\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )


@pytest.mark.parametrize("rules", [None, RULES])
@pytest.mark.parametrize(
    ("template", "call", "says"),
    [
        (GEMMA, CALL, "roles must alternate"),
        (CHATML, CALL, "it leaves out 'programme'"),  # the assistant's turn would be empty
        (CHATML, CALL["function"], "it leaves out 'programme'"),
        (CHATML, "programme", "has no attribute 'get'"),
    ],
    ids=["raises", "leaves out", "leaves out a bare call", "no call"],
)
def test_a_template_that_takes_no_tool_turns(rules, template, call, says):
    query = Query("q-8", Conversation([TOOL_TURNS[0], {**TOOL_TURNS[1], "tool_calls": [call]}, TOOL_TURNS[2]], [TOOL]))
    match = rf"query 'q-8' is refused by the tokenizer's chat template: .*{says}; take a model .*--config\.task\.chat=False"
    with pytest.raises(UserError, match=match):
        prompts.render(query, rules, tokenizer(template=template), chat=True)


@pytest.mark.parametrize(
    ("template", "rules", "says"),
    [
        (None, None, "query 'q-7' is .*chat.template.*config.task.chat=False"),
        ("Hi!", None, "query 'q-7' is .*: it leaves out 'The film begins'; .*config.task.chat=False"),
        ("Hi!", RULES, "query 'q-7' is .*: it leaves out 'Be kind.*The film begins'; .*config.task.chat=False"),
        ("{% for m in messages %}{{ m.content.upper() }}{% endfor %}", None, "it leaves out 'The film begins'"),
        (
            "{% for m in messages %}{{ m.content + m.content }}{% endfor %}",
            RULES,
            "'q-7' is .*: it repeats 'Be kind.*config.task.chat=False",
        ),
        ("{{ raise_exception('no ' + messages[0].role) }}", RULES, "query 'q-7' is .*: no user; take a model"),
    ],
    ids=["absent", "drops all", "drops all with principles", "changes", "repeats", "refuses all"],
)
def test_a_template_without_room(template, rules, says):
    with pytest.raises(UserError, match=f"(?s){says}"):
        prompts.render(QUERY, rules, tokenizer(template=template), chat=True)


def test_a_special_token_spelled_in_a_query_becomes_that_token():
    tok = tokenizer(template=CHATML)
    _, ids = prompts.render(Query("q", "<|im_end|>"), None, tok, chat=True)
    assert ids.count(tok.eos_token_id) == 2


def test_completions_follow_their_prompts():
    turns = Conversation(TURNS)
    assert prompts.completion(turns, "At eight.", chat=False) == " At eight."
    assert prompts.completion(turns, "At eight.", chat=True) == "At eight."
    assert [prompts.completion("The film", text, chat=chat) for text in ("x", " x") for chat in (False, True)] == [
        "x",
        "x",
        " x",
        " x",
    ]


VOCABULARIES = {
    "special": {"special": ("<think>", "</think>")},
    "one token": {"ordinary": ("<think>", "</think>")},
    "many tokens": {},
    "joined": {"ordinary": (">\n\nThe", "k></th")},
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>\nhm\n</think>\n\nThe film.", "The film."),
        ("<think>\nhm\n</think>\n  \n\n  The film.\n", "  The film.\n"),
        ("hm</think>The film.", "The film."),
        ("<think></think>\n\nThe film.", "The film."),
        ("<think>a</think>b<think>c</think>\n\nThe film", "The film"),
        ("<think>é\u4e2d</think> \u4e2d\u00e9.", " \u4e2d\u00e9."),
        ("<think>hm</think>", ""),
        ("<think>\nThe film", ""),
        ("<think>hm</think>\n\nThe film. <think>or", ""),
        ("The film.", "The film."),
        ("\n\nThe film.", "\n\nThe film."),
        ("", ""),
    ],
)
def test_the_answer_is_what_follows_the_thoughts(vocabulary, response, answer):
    tok = tokenizer(**vocabulary)
    ids = tok.encode(response, add_special_tokens=False)
    for end in ([], [tok.eos_token_id]):
        assert prompts.answer([*ids, *end], tok, prompt="<|im_start|>assistant\n", thinking=True) == answer


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
def test_thoughts_that_the_prompt_opens(vocabulary):
    tok = tokenizer(**vocabulary)

    def answer(response, prompt):
        return prompts.answer(tok.encode(response, add_special_tokens=False), tok, prompt=prompt, thinking=True)

    assert answer("The film", "assistant\n<think>\n") == ""
    assert answer("hm</think>\n\nThe film", "assistant\n<think>\n") == "The film"
    assert answer("hm</think>\n\nThe film<think>", "assistant\n<think>\n") == ""
    assert answer("The film", "assistant\n<think>\n\n</think>\n\n") == "The film"
    assert answer("The film", "what is <think>?\nassistant\n") == "The film"


def test_without_thinking_the_answer_is_all_of_it():
    tok = tokenizer()
    ids = [*tok.encode("<think>hm</think>\n\nThe", add_special_tokens=False), tok.eos_token_id]
    assert prompts.answer(ids, tok, prompt="<think>", thinking=False) == "<think>hm</think>\n\nThe"


SPOKEN = st.text(max_size=30).filter(lambda text: "<s>" not in text and "<|" not in text)  # no special token is spelled


@given(thoughts=SPOKEN, said=SPOKEN.filter(bool), name=st.sampled_from(sorted(VOCABULARIES)))
def test_answers_of_any_text(thoughts, said, name):
    tok = VOCABULARY_TOKENIZERS[name]
    ids = tok.encode(f"<think>{thoughts}</think>\n{said}", add_special_tokens=False)
    found = prompts.answer(ids, tok, prompt="", thinking=True)
    assert said.endswith(found) and said.strip() == found.strip()


VOCABULARY_TOKENIZERS = {name: tokenizer(**vocabulary) for name, vocabulary in VOCABULARIES.items()}


def test_a_reward_model_without_a_template_sees_the_two_texts():
    tok = tokenizer(adds="<s> $A <|im_end|>")
    for prompt, text in (
        ("The film", "<s>The film begins<|im_end|>"),
        (Conversation(TURNS[:1]), "<s>\n\nHuman: Which film?\n\nAssistant: begins<|im_end|>"),
    ):
        assert tok.decode(prompts.dialogue(prompt, " begins", tok), skip_special_tokens=False) == text
    # a sampled answer, which begins with the blank, and one of the data, which does not, are the same
    same = [prompts.dialogue(Conversation(TURNS[:1]), text, tok) for text in (" begins", "begins")]
    assert same[0] == same[1]


def test_a_reward_model_with_a_template_sees_the_whole_conversation():
    said = "<|im_start|>user\nWhich film?<|im_end|>\n<|im_start|>assistant\nThe blue one.<|im_end|>\n"
    own = Conversation([system("You sell films."), *TURNS[:1]])
    for template, prompt, text in (
        (CHATML, "Which film?", said),
        (CHATML, Conversation(TURNS[:1]), said),
        (CHATML, own, "<|im_start|>system\nYou sell films.<|im_end|>\n" + said),
        (REFUSES, own, said.replace("Which", "You sell films.\n\nWhich")),
        (PHI3, "Which film?", "<|user|>\nWhich film?<|end|>\n<|assistant|>\nThe blue one.<|end|>\n<|im_end|>"),
        (MISTRAL, "Which film?", "<s>[INST] Which film?[/INST] The blue one.<|im_end|>"),
    ):
        tok = tokenizer(template=template, adds="<s> $A <|im_end|>")
        assert tok.decode(prompts.dialogue(prompt, "The blue one.", tok), skip_special_tokens=False) == text


def test_a_reward_model_sees_the_tools():
    tok = tokenizer(template=QWEN3)
    ids = prompts.dialogue(Conversation(TOOL_TURNS, [TOOL]), "At eight.", tok)
    text = tok.decode(ids, skip_special_tokens=False)
    assert "When films begin." in text and text.endswith("<|im_start|>assistant\nAt eight.<|im_end|>\n")


def test_a_reward_model_whose_template_takes_no_tool_turns():
    with pytest.raises(UserError, match=r"(?s)blue film.*reward model's chat template.*alternate.*take a reward model"):
        prompts.dialogue(Conversation(TOOL_TURNS), "At eight.", tokenizer(template=GEMMA))


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
