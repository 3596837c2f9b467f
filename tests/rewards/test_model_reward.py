"""The neural reward: values against transformers on single texts, what reaches the model, and what is refused early."""

import json
import math
import shutil
import subprocess
import sys

import families
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import special
from tokenizers import processors

import torch_ascend.reward_model
from ple_jax import rewards
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.models import hub
from ple_jax.models.tokenizer import byte_tokenizer
from ple_jax.rewards import model as neural

CLS, SEP = 258, 259
_BERT = {
    "vocab_size": families.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 257,
}  # fmt: skip
MODELS = {
    "bert": ("BertForSequenceClassification", _BERT),
    "roberta": ("RobertaForSequenceClassification", _BERT | {"pad_token_id": 1}),
    "llama": ("LlamaForSequenceClassification", families.VARIANTS["llama"].options),
    "gpt2": ("GPT2ForSequenceClassification", families.VARIANTS["gpt2"].options),
}
RESPONSES = ["good", "", "a much longer response", "bad", "so so, I think", "fine", "no"]
PROMPTS = ["what is it?"] * len(RESPONSES)


def tokenizer(name):
    """Bytes; of encoders between [CLS] and [SEP]."""
    wrapped = byte_tokenizer()
    if name in ("bert", "roberta"):
        wrapped.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
        wrapped.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
        wrapped.chat_template = None
    return wrapped


def build(name, folder, **options):
    kind, own = MODELS[name]
    model = families.build(families.Variant(kind, own), **options)
    model.save_pretrained(folder)
    tokenizer(name).save_pretrained(folder)
    return model


def edit(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: x for key, x in raw.items() if x is not None}))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sentiment"
    names = {0: "negative", 1: "Neutral", 2: "positive"}
    model = build("bert", folder, id2label=names, label2id={name: i for i, name in names.items()})
    with torch.no_grad():
        texts = [[CLS, *text.encode(), SEP] for text in RESPONSES]
        logits = np.stack([model(torch.tensor([ids])).logits[0].numpy() for ids in texts]).astype(np.float64)
    return folder, logits


def make(path, **options):
    return neural.make(str(path), **{"framework": "torch", "with_prompt": False, **options})


@pytest.fixture
def seen(monkeypatch):
    """The calls of a model of three labels, whose logits are 0, the first and the last token."""
    calls = []

    def classifier(folder, *, dtype, rows, device):
        def classify(ids):
            assert len(ids) <= rows
            calls.append([list(row) for row in ids])
            return np.array([[0, row[0], row[-1]] for row in ids], np.float32)

        return classify

    monkeypatch.setattr(torch_ascend.reward_model, "classifier", classifier)
    return calls


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(("label", "index"), [("positive", 2), ("NEUTRAL", 1), (0, 0)])
def test_a_label_by_name_or_number(bert, label, index):
    folder, logits = bert
    reward = make(folder, label=label, rows=3)
    values = reward.score(PROMPTS, RESPONSES)
    np.testing.assert_allclose(values, special.softmax(logits, axis=1)[:, index], atol=1e-6)
    assert reward.scale == (0, 1) and reward.name == "sentiment" and reward.batch == 12
    assert all(type(value) is float for value in values)


def test_logits_and_logodds(bert):
    folder, logits = bert
    raw, odds = (make(folder, label=2, output=output) for output in ("logit", "logodds"))
    np.testing.assert_allclose(raw.score(PROMPTS, RESPONSES), logits[:, 2], atol=1e-5)
    p = special.softmax(logits, axis=1)[:, 2]
    np.testing.assert_allclose(odds.score(PROMPTS, RESPONSES), special.logit(p), atol=1e-5)
    assert raw.scale == odds.scale == (-math.inf, math.inf)


def test_huge_logits_do_not_overflow(bert, monkeypatch):
    logits = np.array([[1e4, 0, 0], [0, 0, 1e4], [-1e4, 0, 0]], np.float32)
    monkeypatch.setattr(torch_ascend.reward_model, "classifier", lambda *_, **__: lambda ids: logits[: len(ids)])
    np.testing.assert_allclose(make(bert[0], label=0).score([""] * 3, ["a"] * 3), [1, 0, 0])
    odds = make(bert[0], label=0, output="logodds").score([""] * 3, ["a"] * 3)
    np.testing.assert_allclose(odds, [1e4 - math.log(2), -1e4, -1e4 - math.log(2)])


def test_one_label_is_a_logit(tmp_path):
    model = build("llama", tmp_path, num_labels=1)
    reward = make(tmp_path, name="mine")
    with torch.no_grad():
        # an empty response is EOS alone: this tokenizer adds nothing
        ids = [list(text.encode()) or [256] for text in RESPONSES]
        wanted = [model(torch.tensor([row])).logits.item() for row in ids]
    np.testing.assert_allclose(reward.score(PROMPTS, RESPONSES), wanted, atol=1e-5)
    assert reward.name == "mine" and reward.scale == (-math.inf, math.inf)
    assert make(tmp_path, label=0).score([""], ["a"]) == make(tmp_path, label="label_0").score([""], ["a"])
    for output in ("probability", "logodds"):
        with pytest.raises(UserError, match=f"output = '{output}'.*--config.reward.transform=sigmoid"):
            make(tmp_path, output=output)


def test_labels_that_are_independent_or_no_classes(bert, tmp_path):
    folder, logits = bert
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, problem_type="multi_label_classification")
    np.testing.assert_allclose(make(tmp_path, label=1).score(PROMPTS, RESPONSES), special.expit(logits[:, 1]), atol=1e-6)
    odds = make(tmp_path, label=1, output="logodds").score(PROMPTS, RESPONSES)
    np.testing.assert_allclose(odds, logits[:, 1], atol=1e-5)
    edit(tmp_path, problem_type="regression")
    np.testing.assert_allclose(make(tmp_path, label=1).score(PROMPTS, RESPONSES), logits[:, 1], atol=1e-5)


def test_two_labels_where_the_config_names_none(tmp_path):
    build("bert", tmp_path)  # transformers leaves out what is its default
    edit(tmp_path, id2label=None, label2id=None)
    with pytest.raises(UserError, match=r"label = None.*'LABEL_0' \(0\), 'LABEL_1' \(1\)"):
        make(tmp_path)
    first, second = (np.array(make(tmp_path, label=i).score(PROMPTS, RESPONSES)) for i in (0, "LABEL_1"))
    np.testing.assert_allclose(first + second, 1)


def test_labels_stand_in_the_order_of_their_numbers():
    named = {str(i): f"l{i}" for i in (10, 9, 2, 1, 0, 3, 4, 5, 6, 7, 8)}
    assert neural.label_names({"id2label": named})[-2:] == ["l9", "l10"]


# ---------------------------------------------------------------- what reaches the model


def test_texts_of_a_length_go_together_and_come_back_in_order(bert, seen):
    values = make(bert[0], label=2, output="logit", rows=3).score([""] * 7, RESPONSES)
    assert values == [SEP] * 7
    lengths = [[len(row) - 2 for row in call] for call in seen]
    assert lengths == [[22, 14, 4], [4, 3, 2], [0]]
    seen.clear()
    reward = make(bert[0], label=2, output="logit", rows=2, max_tokens=1)  # nothing but [CLS]
    assert reward.score([""] * 3, ["x", "yy", "zzz"]) == [CLS] * 3


@pytest.mark.parametrize(
    ("name", "options", "text", "tokens"),
    [
        ("bert", {"max_tokens": 5}, "abcdefg", [CLS, *b"efg", SEP]),
        ("bert", {"max_tokens": 5}, "abc", [CLS, *b"abc", SEP]),
        ("bert", {}, "a" + "b" * 38, [CLS, *b"b" * 38, SEP]),
        ("bert", {"max_tokens": 900}, "a" + "b" * 38, [CLS, *b"b" * 38, SEP]),
        ("roberta", {}, "a" + "b" * 36, [CLS, *b"b" * 36, SEP]),  # 40 positions, of which the first two are not used
        ("gpt2", {"max_tokens": 3}, "abcdefg", [*b"efg"]),
        ("gpt2", {}, "a" + "b" * 128, [*b"b" * 128]),
        ("llama", {}, "a" + "b" * 128, [*b"b" * 128]),
    ],
)
def test_the_oldest_tokens_are_cut_off(name, options, text, tokens, tmp_path, seen):
    build(name, tmp_path, num_labels=3)
    make(tmp_path, label=0, **options).score([""], [text])
    assert seen == [[tokens]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama", b"user: Hi?\nassistant: Ho!\nuser: So?\nassistant: good\n"),
        ("bert", b"\n\nHuman: Hi?\n\nAssistant: Ho!\n\nHuman: So?\n\nAssistant: good"),
    ],
    ids=["by the model's own template", "as a transcript"],
)
def test_a_response_in_its_conversation(name, text, tmp_path, seen):
    build(name, tmp_path, num_labels=3, max_position_embeddings=100)
    turns = [("user", "Hi?"), ("assistant", "Ho!"), ("user", "So?")]
    prompt = Conversation([{"role": role, "content": content} for role, content in turns])
    make(tmp_path, label=0, with_prompt=True).score([prompt], ["good"])
    assert seen == [[[*text] if name == "llama" else [CLS, *text, SEP]]]


def test_a_response_that_continues_its_prompt(bert, seen):
    make(bert[0], label=0, with_prompt=True, max_tokens=12).score(["The film"], [" is good"])
    assert seen == [[[CLS, *b"lm is good", SEP]]]


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_the_longest_text_fits(name, tmp_path):
    model = build(name, tmp_path, num_labels=1)
    long = "b" * 200
    (value,) = make(tmp_path).score([""], [long])
    ids = {"bert": [CLS, *b"b" * 38, SEP], "roberta": [CLS, *b"b" * 36, SEP], "gpt2": [*b"b" * 128]}[name]
    with torch.no_grad():
        assert value == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.tensor([[*ids, SEP]]))


def test_bos_keeps_its_place():
    assert neural.newest([7, 1, 2, 3, 4], 3, first=(7, None)) == [7, 3, 4]
    assert neural.newest([7, 1, 2, 3, 4], 3, first=(None, 9)) == [2, 3, 4]
    assert neural.newest([7, 1, 2], 3, first=(7, None)) == [7, 1, 2]
    assert neural.newest([7, 1, 2], None, first=(7, None)) == [7, 1, 2]


# ---------------------------------------------------------------- before the weights are read


def test_weights_are_read_when_the_first_response_is_scored(bert, tmp_path):
    shutil.copytree(bert[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    reward = make(tmp_path, label=0)
    assert reward.score([], []) == []
    with pytest.raises(UserError, match="cannot be loaded"):
        reward.score(["p"], ["r"])


def test_weights_are_read_once(bert, monkeypatch):
    loads = []
    monkeypatch.setattr(
        torch_ascend.reward_model, "classifier", lambda *a, **k: loads.append(k) or (lambda ids: np.zeros((len(ids), 3)))
    )
    reward = make(bert[0], label=0, rows=2, dtype="bfloat16", device="cpu")
    reward.score(PROMPTS, RESPONSES), reward.score(PROMPTS, RESPONSES)
    assert loads == [{"dtype": "bfloat16", "rows": 2, "device": "cpu"}]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, r"label = None: give the name or number.*'negative' \(0\), 'Neutral' \(1\), 'positive' \(2\)"),
        ({"label": "happy"}, "label = 'happy'"),
        ({"label": 3}, "label = 3"),
        ({"label": 0, "output": "logits"}, "output = 'logits': choose auto, logit, probability, logodds"),
        ({"label": 0, "framework": "flax"}, "framework = 'flax': choose auto, jax, torch"),
        ({"label": 0, "framework": "jax"}, "does not know model_type 'bert'.*set framework to 'torch'"),
        ({"label": 0, "dtype": "float16"}, "dtype = 'float16': choose float32, bfloat16"),
        ({"label": 0, "device": "gpu"}, "device = 'gpu': choose auto, cpu, cuda, npu"),
        ({"label": 0, "rows": 0}, "rows = 0: give at least 1"),
        ({"label": 0, "max_tokens": 0}, "max_tokens = 0: give at least 1"),
        ({"label": 0, "revision": "v1"}, "revision = 'v1' goes with a model on a hub"),
    ],
)
def test_options_it_does_not_take(bert, options, says):
    with pytest.raises(UserError, match=says):
        make(bert[0], **options)


def test_folders_that_are_no_classifier(bert, tmp_path):
    shutil.copytree(bert[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="neither a folder nor the user/name"):
        make(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json"):
        make(tmp_path, label=0)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors; download or copy the folder again"):
        make(tmp_path, label=0)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no model\.safetensors; pickled weights are not read.*save_pretrained"):
        make(tmp_path, label=0)
    edit(tmp_path, architectures=["LlamaForCausalLM"])
    with pytest.raises(UserError, match=r"is LlamaForCausalLM and no \.\.\.ForSequence.*configs/reward_hh\.py"):
        make(tmp_path, label=0)
    edit(tmp_path, architectures=None)
    with pytest.raises(UserError, match="is of no stated architecture"):
        make(tmp_path, label=0)
    edit(tmp_path, auto_map={"AutoModel": "mine.Mine"})
    with pytest.raises(UserError, match="code of its own"):
        make(tmp_path, label=0)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        make(tmp_path, label=0)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(tmp_path):
    for name in ("bert", "llama"):
        build(name, tmp_path / name, vocab_size=250, pad_token_id=1)
        with pytest.raises(UserError, match="the tokenizer has ids from 0 to 25[79], and the model's embedding 250 rows"):
            make(tmp_path / name, label=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", ["bert"]), ("architectures", 3), ("architectures", [3]), ("id2label", ["a"]),
        ("id2label", {"a": "b"}), ("num_labels", "2"), ("max_position_embeddings", "40"), ("pad_token_id", "x"),
        ("text_config", []), ("vocab_size", -1),
    ],
)  # fmt: skip
def test_values_of_a_config_that_cannot_be(bert, tmp_path, key, value):
    shutil.copytree(bert[0], tmp_path, dirs_exist_ok=True)
    edit(tmp_path, **{key: value})
    with pytest.raises(UserError, match=rf"config\.json: {key} "):
        make(tmp_path, label=0)


@pytest.mark.parametrize(
    ("asked", "backend", "family", "missing", "framework"),
    [
        ("auto", "jax", "llama", (), "jax"),
        ("auto", "jax", "bert", (), "torch"),
        ("auto", "torch", "llama", (), "torch"),
        ("auto", "jax", "llama", ("torch",), "jax"),
        ("auto", "jax", "llama", ("jax",), "torch"),
        ("torch", "jax", "llama", (), "torch"),
        ("jax", "torch", "llama", (), "jax"),
    ],
)
def test_which_framework(monkeypatch, asked, backend, family, missing, framework):
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    assert neural.choose_framework(asked, backend, family, "m") == framework


@pytest.mark.parametrize(("asked", "backend", "family"), [("auto", "jax", "bert"), ("torch", "jax", "llama")])
def test_torch_that_is_not_installed(monkeypatch, asked, backend, family):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=rf"m \({family}\) needs torch.*pip install 'ple_jax\[torch\]'"):
        neural.choose_framework(asked, backend, family, "m")


def test_a_device_is_for_torch(tmp_path):
    build("llama", tmp_path, num_labels=1)
    with pytest.raises(UserError, match="device = 'cpu' goes with framework='torch'"):
        make(tmp_path, framework="jax", device="cpu")


def test_jax_has_no_mesh_of_torchs_processes(tmp_path):
    build("llama", tmp_path, num_labels=1)
    with pytest.raises(UserError, match="framework = 'jax' takes the run's mesh.*--backend=torch: set framework to 'torch'"):
        make(tmp_path, framework="jax", backend="torch", mesh={"data": 2, "fsdp": 1, "tensor": 1})
    for run in ({"backend": "torch", "mesh": {"data": 1}}, {"backend": "jax", "mesh": {"data": 2}}):
        assert make(tmp_path, framework="jax", **run).name == tmp_path.name


def test_the_version_says_whatever_changes_the_values(bert, tmp_path):
    folder = bert[0]
    plain = {"label": 0}
    options = [
        plain, {"label": 1}, {"label": 0, "output": "logit"}, {"label": 0, "with_prompt": True},
        {"label": 0, "max_tokens": 7}, {"label": 0, "dtype": "bfloat16"},
    ]  # fmt: skip
    versions = [make(folder, **o).version for o in options]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x + 1 for name, x in tensors.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    versions.append(make(tmp_path, label=0).version)
    assert len(set(versions)) == len(versions)
    same = [{"label": "negative"}, {"label": 0, "rows": 2}, {"label": 0, "max_tokens": 40, "output": "probability"}]
    assert {make(folder, **o).version for o in same} == {versions[0]}


def test_a_model_on_a_hub(bert, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda path, revision, setting: asked.append((path, revision)) or bert[0])
    monkeypatch.setattr(hub, "commit", lambda path, revision: f"commit of {revision}")
    old, new = (make("me/sentiment", revision=revision, label=0) for revision in (None, "v2"))
    assert asked == [("me/sentiment", None), ("me/sentiment", "v2")]
    assert old.name == new.name == "sentiment" and old.version != new.version
    assert old.score(PROMPTS, RESPONSES) == make(bert[0], label=0).score(PROMPTS, RESPONSES)


def test_until_the_first_score_neither_jax_nor_torch_is_imported(tmp_path):
    build("llama", tmp_path, num_labels=1)
    code = (
        "import sys; from ple_jax.rewards.model import make; reward = make(sys.argv[1]);"
        "print([name for name in ('jax', 'torch') if name in sys.modules], reward.name)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[] {tmp_path.name}"


# ---------------------------------------------------------------- both halves


def test_the_run_offers_its_backend_and_its_mesh(tmp_path):
    model = build("llama", tmp_path, num_labels=1)
    kwargs = {"path": str(tmp_path), "with_prompt": False, "rows": 1, "device": "cpu"}
    reward = rewards.load("model", kwargs, backend="torch", mesh={"data": 8})
    with torch.no_grad():
        wanted = [model(torch.tensor([list(text.encode())])).logits.item() for text in ("good", "so so")]
    np.testing.assert_allclose(rewards.score(reward, ["", "a"], ["good", "so so"]).values, wanted, atol=1e-5)
    assert reward.version == make(tmp_path).version


@pytest.mark.parametrize(("name", "labels"), [("llama", 1), ("gpt2", 3)])
def test_jax_and_torch_agree(name, labels, tmp_path):
    build(name, tmp_path, num_labels=labels)
    mesh = {"data": 2, "fsdp": 1, "tensor": 1}
    halves = {
        framework: make(tmp_path, framework=framework, label=labels - 1, output="logit", rows=3, mesh=mesh)
        for framework in ("jax", "torch")
    }
    ours, theirs = (np.array(reward.score(PROMPTS, RESPONSES)) for reward in halves.values())
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.ptp(ours) > 0.1


def test_it_says_which_conversations_its_template_refuses(tmp_path):
    """A run asks before it begins: such a query is a bad record, not the end of the run."""
    versions = []
    for template in (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}"
        "{% endif %}{{ m.content }}{% endfor %}",
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    ):
        folder = tmp_path / str(len(versions))
        build("llama", folder, num_labels=1)
        wrapped = byte_tokenizer()
        wrapped.chat_template = template
        wrapped.save_pretrained(folder)
        made = neural.make(str(folder), backend="torch")
        versions.append(made.version)
        turns = Conversation([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
        refused = "is refused by the reward model's chat template: take turns; take a reward model whose template takes it"
        assert made.refuses("a") == "" and made.refuses(turns) == (refused if len(versions) == 1 else "")
        assert neural.make(str(folder), backend="torch", with_prompt=False).refuses(turns) == ""
    assert len(set(versions)) == 2
