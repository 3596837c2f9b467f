"""Exports: merged weights against transformers and PEFT, what an interruption leaves, the card, the hub, vLLM's line."""

import contextlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import families
import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
import yaml
from ml_collections import FrozenConfigDict
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from configs import default
from configs import tiny as tiny_config
from ple_jax import modes
from ple_jax.core import backends
from ple_jax.core.config import names
from ple_jax.core.errors import UserError
from ple_jax.core.types import Sampling
from ple_jax.export import card
from ple_jax.export import merged as merging
from ple_jax.models import adapters, peft, smollm2, weights
from ple_jax.models.families import read
from ple_jax.models.tokenizer import byte_tokenizer
from ple_jax.serving import commands
from ple_jax.training import opening, state

RAW = tiny.RAW | {"vocab_size": 259}  # a row for every token of the byte tokenizer
WEIGHTS = tiny.weights(read(RAW, "tiny"))
ADAPTER = adapters.to_peft(tiny.random_adapter(tiny.CONFIG))
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Hugging Face folder as transformers writes it, with things that belong to a model and things that do not."""
    folder = tmp_path_factory.mktemp("hub") / "base"
    tiny.transformers_model(RAW, WEIGHTS).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.3}')
    (folder / "LICENSE.md").write_text("terms")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_text("pickled")
    return folder


@pytest.fixture
def adapter(tmp_path) -> Path:
    peft.write(tmp_path / "adapter", ADAPTER, rank=4, alpha=6, targets=TARGETS, base_model="some/base")
    return tmp_path / "adapter"


def merged(source, adapter, folder, *, dtype="keep", shard_gb=4.0, about=None) -> Path:
    return merging.merged(
        weights.load(str(source)), adapter, folder, dtype=dtype, shard_gb=shard_gb, readme="# card", about=about or {}
    )


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.float().eval()(PROMPT).logits.numpy()


def test_merged_folder_is_base_plus_adapter(source, adapter, tmp_path):
    folder = merged(source, adapter, tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(source)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    ours = AutoModelForCausalLM.from_pretrained(folder)
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(logits(ours), expected, atol=2e-5)
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json", "LICENSE.md",
        "tokenizer_config.json", "chat_template.jinja", merging.MARKER,
    }  # fmt: skip
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "LICENSE.md"):
        same = (folder / name).read_text() == (source / name).read_text()
        assert same or json.loads((folder / name).read_text()) == json.loads((source / name).read_text()), name
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_a_merged_model_stops_where_the_run_stopped(source, adapter, tmp_path):
    """At the tokenizer's EOS and the template's end of turn too, which generation_config.json need not have."""
    eos = weights.load(str(source)).eos
    assert set(eos) > {7, 9}
    folder = merged(source, adapter, tmp_path / "merged")
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": list(eos), "temperature": 0.3}
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == list(eos)


@pytest.mark.parametrize("named", [True, False])
def test_a_reward_model_is_of_its_family_whether_the_base_names_its_class_or_not(named, source, tmp_path):
    shutil.copytree(source, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    if not named:
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"architectures": None}))
    head = {"base_model.model.score.weight": np.ones((1, tiny.CONFIG.hidden_size), np.float32)}
    peft.write(
        tmp_path / "adapter", ADAPTER | head, rank=4, alpha=6, targets=TARGETS, base_model="some/base", head="score"
    )
    folder = merging.merged(
        weights.load(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged", dtype="keep", shard_gb=4.0,
        readme="# card", about={}, head="score",
    )  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert theirs.score.weight.tolist() == [[1.0] * tiny.CONFIG.hidden_size]


def test_of_a_multimodal_model_the_text_part(tmp_path):
    """transformers loads it as a language model, whose logits are those of the whole model with the adapter."""
    variant = families.VARIANTS["gemma3"]
    families.save(families.build(variant), tmp_path / "base")
    config = weights.load(str(tmp_path / "base")).config
    adapter = adapters.to_peft(tiny.random_adapter(config))
    paths = sorted(peft.modules(adapter))
    peft.write(tmp_path / "adapter", adapter, rank=4, alpha=6, targets=paths, base_model="some/base")
    folder = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(families.build(variant), tmp_path / "adapter"))
    ours, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert type(ours).__name__ == "Gemma3ForCausalLM"
    assert not report["missing_keys"] and not report["unexpected_keys"]
    np.testing.assert_allclose(logits(ours), expected, atol=1e-4)


def test_of_gpt2_whose_matrices_are_in_by_out(tmp_path):
    """Its adapter says so, and what is merged is what PEFT makes of the adapter."""
    base, workdir = tmp_path / "base", tmp_path / "run"
    families.save(families.build(families.VARIANTS["gpt2"], n_positions=512), base)
    modes.export(exporting(a_run(workdir, model__path=str(base)), merged=True), workdir, "jax")
    assert json.loads((workdir / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert all(backends.load(name).transposed(weights.load(str(base))) for name in ("jax", "torch"))
    plain = AutoModelForCausalLM.from_pretrained(base)
    before, expected = logits(plain), logits(PeftModel.from_pretrained(plain, workdir / "adapter"))
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(logits(AutoModelForCausalLM.from_pretrained(workdir / "merged")), expected, atol=1e-4)


def test_what_is_not_adapted_is_untouched(source, tmp_path):
    one = {name: value for name, value in ADAPTER.items() if "layers.1.mlp.up_proj" in name}
    peft.write(tmp_path / "adapter", one, rank=4, alpha=6, targets=["up_proj"], base_model="some/base")
    folder = merged(source, tmp_path / "adapter", tmp_path / "merged")
    found, base = tensors(folder), WEIGHTS
    adapted = "model.layers.1.mlp.up_proj.weight"
    for name in base.keys() - {adapted}:
        np.testing.assert_array_equal(found[name], base[name], err_msg=name)
    b, a = (one[f"base_model.model.model.layers.1.mlp.up_proj.lora_{side}.weight"].astype(np.float64) for side in "BA")
    np.testing.assert_allclose(found[adapted], base[adapted] + 1.5 * b @ a, atol=1e-6)


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 23), ("bfloat16", 7), ("float16", 10)])
def test_dtype_is_rounded_to_once(source, adapter, tmp_path, dtype, digits):
    folder = merged(source, adapter, tmp_path / "merged", dtype=dtype)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    found, config = tensors(folder), peft.read(adapter)[1]
    assert {str(value.dtype) for value in found.values()} == {dtype}
    for path, module in peft.modules(ADAPTER).items():
        delta = peft.scaling(config, path) * module.b.astype(np.float64) @ module.a.astype(np.float64)
        exact = WEIGHTS[f"{path}.weight"] + delta
        step = 2.0 ** (np.floor(np.log2(np.abs(exact))) - digits)  # between neighbouring numbers of this dtype
        error = np.abs(found[f"{path}.weight"].astype(np.float64) - exact)
        assert (error <= 0.51 * step + 3e-7).all()
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == getattr(torch, dtype)


def test_a_bfloat16_base_stays_bfloat16(adapter, tmp_path):
    model = tiny.transformers_model(RAW, WEIGHTS).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    folder = merged(tmp_path / "base", adapter, tmp_path / "merged")
    assert {value.dtype for value in tensors(folder).values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_shards_hold_no_more_than_asked(source, adapter, tmp_path):
    whole = tensors(merged(source, adapter, tmp_path / "one"))
    limit = 34_000
    folder = merged(source, adapter, tmp_path / "many", shard_gb=limit / 1e9)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 3
    assert {file.name for file in folder.glob("*.safetensors")} == set(files)
    for file in files:
        with safe_open(folder / file, "numpy") as opened:
            assert {name for name, where in index["weight_map"].items() if where == file} == set(opened.keys())
            assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) <= limit
    for name, value in tensors(folder).items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)
    np.testing.assert_allclose(
        logits(AutoModelForCausalLM.from_pretrained(folder)),
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "one")),
        atol=1e-6,
    )


def test_an_interrupted_export_leaves_the_earlier_one(source, adapter, tmp_path, monkeypatch):
    folder = merged(source, adapter, tmp_path / "merged", about={"number": 1})
    calls = []

    def crash(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(*arguments, **options)

    save = safetensors.numpy.save_file
    monkeypatch.setattr("safetensors.numpy.save_file", crash)
    for target in (folder, tmp_path / "new"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            merged(source, adapter, target, shard_gb=2e-5, about={"number": 2})
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "merged"]
    assert json.loads((folder / merging.MARKER).read_text()) == {"number": 1}
    assert json.loads((merged(source, adapter, folder, about={"number": 3}) / merging.MARKER).read_text()) == {"number": 3}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "merged"]


def test_an_export_killed_at_its_end_is_found_again(source, adapter, tmp_path, monkeypatch):
    folder = merged(source, adapter, tmp_path / "merged", about={"number": 1})
    folder.rename(tmp_path / ".merged.old")  # as a kill between the two renames leaves it
    (tmp_path / ".merged.partial").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"need 0.00 GB and .* has 0.00 GB free; free some, or set --config.export.dtype"):
        merged(source, adapter, folder)
    assert json.loads((folder / merging.MARKER).read_text()) == {"number": 1}


def test_a_folder_of_someone_elses_is_not_touched(source, adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an earlier export"):
        merged(source, adapter, tmp_path / "merged")
    assert [file.name for file in (tmp_path / "merged").iterdir()] == ["notes.txt"]


def test_a_full_disk_is_a_clear_error(source, adapter, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match="merged could not be written .*No space left on device"):
        merged(source, adapter, tmp_path / "merged")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter"]


def test_values_that_the_dtype_cannot_hold(source, tmp_path):
    large = {name: value * np.float32(1e3) for name, value in ADAPTER.items()}
    peft.write(tmp_path / "adapter", large, rank=4, alpha=6, targets=TARGETS, base_model="some/base")
    with pytest.raises(UserError, match="q_proj.weight holds values that are not finite in float16"):
        merged(source, tmp_path / "adapter", tmp_path / "merged", dtype="float16")


def test_an_adapter_of_another_model(source, tmp_path):
    other = {name.replace("layers.2", "layers.3"): value for name, value in ADAPTER.items()}
    peft.write(tmp_path / "adapter", other, rank=4, alpha=6, targets=TARGETS, base_model="some/base")
    with pytest.raises(UserError, match=r"adapts model.layers.3.mlp.down_proj, which .* does not have"):
        merged(source, tmp_path / "adapter", tmp_path / "merged")


# ---------------------------------------------------------------- the hub


class FakeHub:
    """What the tests see of huggingface_hub.HfApi."""

    def __init__(self, log):
        self.log = log

    def create_repo(self, repo, **options):
        self.log.append(("create", repo, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.log.append(("upload", repo_id, sorted(file.name for file in Path(folder_path).iterdir())))


@pytest.fixture
def hub(monkeypatch):
    log: list = []
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: FakeHub(log))
    return log


def test_push(hub, adapter):
    assert merging.push(adapter, "me/mine", private=True) == "https://huggingface.co/me/mine"
    assert hub == [
        ("create", "me/mine", {"private": True, "exist_ok": True}),
        ("upload", "me/mine", [peft.CONFIG, peft.WEIGHTS]),
    ]


def test_push_without_a_hub(adapter):
    """The real client, which the tests' environment keeps offline."""
    with pytest.raises(UserError, match=r"could not push to me/mine \(.*offline.*hf auth login.*everything was exported to"):
        merging.push(adapter, "me/mine", private=True)


def test_push_without_a_token(adapter, monkeypatch):
    def refuse(self, *arguments, **options):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(UserError, match=r"could not push to me/mine \(Token is required\)"):
        merging.push(adapter, "me/mine", private=False)


# ---------------------------------------------------------------- vLLM's line


def adapter_config(**changes):
    return {"base_model_name_or_path": "some/base", "r": 8, "use_dora": False, "rank_pattern": {}} | changes


def test_line_that_serves_an_adapter():
    line = commands.serve_adapter(Path("runs/my run/adapter"), adapter_config(), name="my run")
    assert line == (
        "vllm serve some/base --enable-lora --max-lora-rank 8 --generation-config vllm"
        " --lora-modules 'my run=runs/my run/adapter'"
    )
    pinned = commands.serve_adapter(Path("a"), adapter_config(revision="f" * 40), name="a")
    assert f"serve some/base --revision {'f' * 40} --enable-lora" in pinned
    assert shlex.split(line)[-1] == "my run=runs/my run/adapter"


@pytest.mark.parametrize(("rank", "limit"), [(1, 8), (8, 8), (9, 16), (200, 256), (257, 320), (512, 512), (513, None)])
def test_rank_is_one_that_vllm_takes(rank, limit):
    line = commands.serve_adapter(Path("a"), adapter_config(r=rank), name="n")
    assert (line is None) if limit is None else f"--max-lora-rank {limit} " in line


@pytest.mark.parametrize(
    "change",
    [{"use_dora": True}, {"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"q_proj": 4}},
     {"base_model_name_or_path": "model.gguf"}, {"base_model_name_or_path": "tiny"}],
)  # fmt: skip
def test_adapters_that_vllm_cannot_serve(change):
    assert commands.serve_adapter(Path("a"), adapter_config(**change), name="n") is None


# ---------------------------------------------------------------- the mode, on a run


def a_run(workdir: Path, **overrides):
    """A work directory whose newest checkpoint is a random adapter that does something; and its config."""
    config = tiny_config.get_config()
    config.sinks = ()
    config.lora.rank, config.lora.alpha = 4, 6.0
    for key, value in overrides.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    start, targets = adapters.to_peft(tiny.random_adapter(weights.load(config.model.path).config)), list(config.lora.targets)
    config.model.adapter = str(workdir.with_name(f"{workdir.name} adapter"))
    peft.write(Path(config.model.adapter), start, rank=4, alpha=6.0, targets=targets, base_model="tiny")
    frozen = FrozenConfigDict(config)
    workdir.mkdir()
    with opening.open_run(workdir, "jax", opening.read_inputs(frozen, "jax")) as run:
        state.commit(state.State(iteration=2), run.backend, run.session)
    return frozen


def exporting(config, **export):
    plain = config.to_dict()
    plain["export"] |= export
    return FrozenConfigDict(plain)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    return a_run(workdir), workdir


def test_mode_export(run, hub, capsys):
    config, workdir = run
    asked = exporting(config, merged=True, dtype="float32", push="me/mine", private=False)
    assert modes.export(asked, workdir, "jax") == 0
    said = capsys.readouterr().out
    assert f"adapter of iteration 2: {workdir / 'adapter'} (PEFT layout, base model tiny)" in said
    vllm = f"vllm serve {workdir / 'merged'} --served-model-name tiny --generation-config vllm"
    own = f"transformers serve {workdir / 'merged'}"
    assert f"serve with vLLM:\n  {vllm}\nor with transformers, on a CPU too:\n  {own}  # pip install" in said
    assert [(what, repo) for what, repo, _ in hub] == [
        ("create", "me/mine"), ("upload", "me/mine"), ("create", "me/mine-merged"), ("upload", "me/mine-merged"),
    ]  # fmt: skip
    assert hub[0][2]["private"] is False and "README.md" in hub[1][2]

    base = {name: torch.tensor(value) for name, value in weights.load("tiny").weights.items()}
    model = AutoModelForCausalLM.from_pretrained(workdir / "merged")
    merged_logits = logits(model)
    model.load_state_dict(base, strict=False)
    adapted = PeftModel.from_pretrained(model, workdir / "adapter")
    np.testing.assert_allclose(merged_logits, logits(adapted), atol=2e-5)

    tokenizer = AutoTokenizer.from_pretrained(workdir / "merged")
    assert tokenizer.encode("né €") == list("né €".encode()) and tokenizer.eos_token_id == 256
    turns = [{"role": "user", "content": "hello"}]
    expected = byte_tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == expected
    generation = AutoModelForCausalLM.from_pretrained(workdir / "merged").generation_config
    assert generation.eos_token_id == [256] and generation.pad_token_id == 257


def test_a_foreign_folder_is_refused_before_anything_is_written(run):
    config, workdir = run
    adapter = workdir / "adapter" / "adapter_model.safetensors"
    before, kept = adapter.stat().st_mtime_ns, workdir / "kept"
    (workdir / "merged").rename(kept)
    try:
        (workdir / "merged").mkdir()
        with pytest.raises(UserError, match="is not an earlier export"):
            modes.export(exporting(config, merged=True), workdir, "jax")
        assert adapter.stat().st_mtime_ns == before
    finally:
        (workdir / "merged").rmdir()
        kept.rename(workdir / "merged")


@pytest.mark.slow
def test_merged_model_says_what_the_run_says(run):
    """Greedy tokens of our own decoder with the adapter, and of transformers on the merged folder."""
    config, workdir = run
    modes.export(exporting(config, merged=True), workdir, "jax")
    model = AutoModelForCausalLM.from_pretrained(workdir / "merged")
    prompt = list(b"Once upon a time")
    out = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=256, pad_token_id=257)
    with modes.on_run(config, workdir, "jax") as (opened, _):
        sampling = Sampling(16, (256,), temperature=0)
        ours = opened.backend.generate([prompt], np.zeros((1, 16), np.float32), sampling=sampling)[0]
    assert list(ours.tokens) == out[0, len(prompt) :].tolist()


def test_exported_adapter_is_the_checkpoints_bit_for_bit(run):
    config, workdir = run
    modes.export(config, workdir, "jax")
    read = adapters.from_peft(peft.read(workdir / "adapter")[0])
    expected = tiny.random_adapter(weights.load("tiny").config)
    assert read.keys() == expected.keys()
    for path, module in expected.items():
        for kind, value in module.items():
            np.testing.assert_array_equal(read[path][kind], value, err_msg=path)


def test_a_base_folder_is_served_with_the_adapter(source, tmp_path, capsys, monkeypatch):
    base = tmp_path / "base"
    tiny_like = weights.load("tiny")
    tiny.transformers_model(tiny_like.raw, dict(tiny_like.weights)).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    workdir = tmp_path / "run"
    config = a_run(workdir, model__path=str(base))
    modes.export(config, workdir, "jax")
    lora = f"--enable-lora --max-lora-rank 8 --generation-config vllm --lora-modules run={workdir / 'adapter'}"
    assert capsys.readouterr().out.endswith(f"serve with vLLM:\n  vllm serve {base} {lora}\n")
    monkeypatch.setattr(weights, "gguf_file", lambda path: Path("small.Q4_1.gguf"))  # as if it had been read from one
    for merged, remedy in ((False, "merge to serve these"), (True, "the second line serves these")):
        modes.export(exporting(config, merged=merged), workdir, "jax")
        assert f"the dequantised weights of a GGUF file, which differ a little: {remedy}" in capsys.readouterr().out
    loaded = AutoPeftModelForCausalLM.from_pretrained(workdir / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert np.abs(logits(loaded) - logits(plain)).max() > 0.01
    text = (workdir / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in text and "`base`" in text


# ---------------------------------------------------------------- the card


def used(card_text: str, **instead: str) -> str:
    """What the example of a card prints, with words of it replaced by what is here."""
    (code,) = re.findall(r"```python\n(.*?)```", card_text, re.DOTALL)
    for words, here in instead.values():
        assert words in code
        code = code.replace(words, here)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "card", "exec"), {})
    return printed.getvalue()


@pytest.mark.parametrize("chat", [False, True])
def test_the_example_of_a_card_runs(source, tmp_path, chat):
    """As a reader would copy it, with the folder's path; that of the base is in the adapter's config."""
    base, workdir = tmp_path / "base", tmp_path / "run"
    tiny_like = weights.load("tiny")
    tiny.transformers_model(tiny_like.raw, dict(tiny_like.weights)).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    config = a_run(workdir, model__path=str(base), task__chat=chat, sampling__max_new_tokens=5)
    modes.export(exporting(config, merged=True), workdir, "jax")
    for folder in ("adapter", "merged"):
        text = (workdir / folder / "README.md").read_text()
        assert ("apply_chat_template" in text) is chat and "max_new_tokens=5" in text
        used(text, folder=("path/to/this/folder", str(workdir / folder)))


@pytest.mark.slow
def test_the_example_of_a_card_reads_the_gguf_file(tmp_path):
    """The base that a GGUF file holds, read by transformers, with an adapter of ours on it."""
    file, folder = smollm2.file(), tmp_path / "adapter"
    text = a_card(tmp_path / "run", base_model=smollm2.NAME, sampling__max_new_tokens=3)
    start = adapters.to_peft(tiny.random_adapter(weights.load(smollm2.NAME).config))
    peft.write(folder, start, rank=4, alpha=6.0, targets=TARGETS, base_model="some/base")
    assert used(text, adapter=("path/to/this/folder", str(folder))).strip()
    elsewhere = a_card(tmp_path / "other", base_model=str(file), sampling__max_new_tokens=3)
    instead = {"base": ("folder/of/the/file", str(file.parent)), "adapter": ("path/to/this/folder", str(folder))}
    assert used(elsewhere, **instead).strip()


def a_card(
    workdir: Path, *, iteration=3, base_model="some/base", library="peft", summary=None, repo=None, head=False, point=None,
    revision=None, **changes,
) -> str:  # fmt: skip
    workdir.mkdir(exist_ok=True)
    settings = default.get_config()
    settings.lora.rank = 12
    settings.task.train = str(workdir / "queries | mine.jsonl")
    settings.model.path = base_model
    settings.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    (workdir / "config.json").write_text(json.dumps(settings.to_dict()))
    lines = [{"iteration": i, "heldout_reward": 0.1 * i, "heldout_kl": 0.0 if i == 0 else 0.05} for i in range(4)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "environment.json").write_text(json.dumps({"jax": "9.9.9", "device": "cpu", "python": "3.99"}))
    return card.render(
        workdir, library=library, base_model=base_model, iteration=iteration, summary=summary or {},
        defaults=default.get_config().to_dict(), repo=repo, head=head, point=point, revision=revision,
    )  # fmt: skip


SUMMARY = {"iterations": 3, "heldout_queries": 40, "heldout_gain_ci95": [0.123456, 0.5]}


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_card_of_an_adapter(tmp_path):
    text = a_card(tmp_path / "run", summary=SUMMARY, repo="me/mine")
    assert front_matter(text) == {
        "base_model": "some/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["ple", "lora"],
    }
    assert huggingface_hub.ModelCard(text).data.base_model == "some/base"
    for part in (
        "| held-out reward (mean) | 0 | 0.3 |",
        "| KL to the start (nats per token) | 0 | 0.05 |",
        "95% interval over 40 queries:\n0.1235 to 0.5",
        "| `lora.rank` | `12` |",
        r"| `task.train` | `queries \| mine.jsonl` |",
        'AutoPeftModelForCausalLM.from_pretrained("me/mine")',
        "vllm serve some/base --enable-lora --max-lora-rank 16 --generation-config vllm --lora-modules aligned=me/mine",
        "python 3.99, jax 9.9.9",
        "https://arxiv.org/abs/2408.02599",
    ):
        assert part in text, part
    pinned = a_card(tmp_path / "pinned", revision="f" * 40)
    assert f"at commit {'f' * 40} |" in pinned and "at commit" not in text
    assert f"vllm serve some/base --revision {'f' * 40} --enable-lora" in pinned
    assert str(tmp_path) not in text and "\n\n\n" not in text
    rows = [line for line in text.split("\n") if line.startswith("| `")]
    assert {row.split("`")[1] for row in rows} == {"lora.rank", "task.train", "model.path"}  # nothing that is as by default


def test_card_of_merged_weights_before_the_end(tmp_path):
    text = a_card(tmp_path / "run", iteration=2, library="transformers", base_model=str(tmp_path / "base"), summary=SUMMARY)
    assert front_matter(text)["library_name"] == "transformers" and "base_model" not in front_matter(text)
    assert "| held-out reward (mean) | 0 | 0.2 |" in text
    assert "interval" not in text  # the summary speaks of another iteration
    assert "AutoModelForCausalLM" in text and "peft" not in text.lower() and str(tmp_path) not in text


def test_card_of_a_run_that_was_never_better_than_its_start(tmp_path):
    says = "**these are the weights that it began with**"
    assert says in a_card(tmp_path / "run", iteration=0) and says not in a_card(tmp_path / "run", iteration=1)
    assert says not in a_card(tmp_path / "run", iteration=0, point={"within": True, "step": 1, "kl": 0.5})


def test_card_of_an_evaluation_within_an_iteration(tmp_path):
    point = {"iteration": 1, "step": 9, "within": True, "reward": 0.7, "kl": 3.0, "kl_token": 0.2, "second": None}
    text = a_card(tmp_path / "run", iteration=1, point=point, summary=SUMMARY)
    assert "after 9 optimiser steps, within iteration 2 of 5." in text
    # and not what the iteration before it had
    assert "| held-out reward (mean) | 0 | 0.7 |" in text and "| KL to the start (nats per token) | 0 | 0.2 |" in text
    assert "never sees" not in text and "interval" not in text
    text = a_card(tmp_path / "run", iteration=1, point={**point, "within": False, "step": 6})
    assert "after iteration 1 of 5." in text and "| held-out reward (mean) | 0 | 0.7 |" in text


# algorithm -> its name in the title, a part of its sentence, whether principles have a part in it
RAN = {
    "ple": ("PLE", "Progressively Label Enhancement ([arXiv:2408.02599](https://arxiv.org/abs/2408.02599), Alg. 1)", True),
    "ppo": ("PPO", "[arXiv:2203.02155](https://arxiv.org/abs/2203.02155)): a token is an action", False),
    "dpo": ("DPO", "Direct preference optimisation ([arXiv:2305.18290](https://arxiv.org/abs/2305.18290))", False),
    "grpo": ("GRPO", "GRPO ([arXiv:2402.03300](https://arxiv.org/abs/2402.03300)) and its relatives", False),
    "rloo": ("RLOO", "with a leave-one-out baseline ([arXiv:2402.14740](https://arxiv.org/abs/2402.14740))", False),
    "raft": ("RAFT", "of `raft.samples` responses the best is imitated", False),
    "sft": ("SFT", "Supervised fine-tuning on the records' own answers", False),
    "context_distillation": ("context distillation", "fine-tuning on the principled response", True),
    "self_distillation": ("self distillation", "the principles are the teacher's privileged context", True),
}


def test_a_card_for_every_algorithm_that_samples():
    assert {*RAN, "reward"} == set(names("algorithms", ".py"))


@pytest.mark.parametrize("algorithm", RAN)
def test_card_says_what_ran(tmp_path, algorithm):
    title, sentence, guided = RAN[algorithm]
    text = a_card(tmp_path / "run", algorithm=algorithm)
    assert f"\n# some/base, trained with {title}\n" in text and sentence in text
    assert front_matter(text)["tags"] == [algorithm, "lora"]
    assert ("| principles | `positive_review` |" in text) is guided
    assert ("liu2025ple" in text) is ("2408.02599" in text) is (algorithm == "ple")
    assert "TRL](" not in text


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo", "rloo"])
def test_card_of_a_baseline_by_trl(tmp_path, algorithm):
    text = a_card(tmp_path / "run", algorithm=algorithm, trainer="trl")
    assert f"\n# some/base, trained with TRL's {RAN[algorithm][0]}\n" in text and RAN[algorithm][1] in text
    assert "The optimiser steps were taken by [TRL](https://github.com/huggingface/trl)" in text
    assert front_matter(text)["tags"] == [algorithm, "lora", "trl"]


@pytest.mark.parametrize(
    ("docstring", "says"),
    [
        ('"""Mine: <b> [x](y) as `a_b` says.\n\nMore."""', r"Mine: \<b\> \[x\](y) as `a_b` says."),
        ("", None),
    ],
)
def test_card_of_an_algorithm_of_the_users(tmp_path, docstring, says):
    file = tmp_path / "my_variant.py"
    file.write_text(f"{docstring}\nfrom ple_jax.algorithms.ple import *\n")
    text = a_card(tmp_path / "run", algorithm=str(file))
    assert "\n# some/base, trained with my variant\n" in text and "| algorithm | `my_variant.py` |" in text
    assert front_matter(text)["tags"] == ["my_variant", "lora"]
    assert says is None or f"\n{says}\n" in text
    assert "More." not in text and "Progressively" not in text and "liu2025ple" not in text and "\n\n\n" not in text


def test_card_of_a_reward_model(tmp_path):
    numbers = ("heldout_accuracy", "heldout_log_loss", "heldout_brier", "heldout_calibration_error")
    summary = {"steps": 3, "heldout_examples": 9, "heldout_accuracy_ci95": [0.5, 0.75], **dict.fromkeys(numbers, 0.625)}
    for library, line in (
        ("peft", 'AutoPeftModelForSequenceClassification.from_pretrained("me/mine", num_labels=1)'),
        ("transformers", """--config.reward.name=model --config.reward.kwargs='{"path": "me/mine"}'"""),
    ):
        text = a_card(tmp_path / "run", algorithm="reward", head=True, summary=summary, library=library, repo="me/mine")
        assert front_matter(text) == {
            "base_model": "some/base", "library_name": library, "pipeline_tag": "text-classification",
            "tags": ["reward-model", "lora"],
        }  # fmt: skip
        for part in (
            "\n# A reward model from some/base\n", line,
            "A reward model from preference pairs: a scalar head on the model, trained with Bradley-Terry's loss.",
            "Accuracy on 9 held-out pairs 0.625 (95% interval\n0.5 to 0.75)",
        ):  # fmt: skip
            assert part in text, part
        assert "PLE" not in text and "\n\n\n" not in text


def test_card_of_a_mixture_names_its_sets(tmp_path):
    sets = {"tickets": {"train": "a.jsonl", "heldout": "b.jsonl"}, "questions": {"train": "c.jsonl", "heldout": "d.jsonl"}}
    text = a_card(tmp_path / "run", summary=SUMMARY, task__sets=sets)
    assert "| training queries | `questions, tickets`, " in text
    assert "| held-out queries | `questions, tickets` |" in text


def test_card_of_a_run_whose_last_line_is_torn(tmp_path):
    a_card(tmp_path / "run")
    lines = [json.dumps({"iteration": i, "heldout_reward": 0.1 * i}) for i in range(4)]
    made = tmp_path / "run" / "metrics.jsonl"
    made.write_text("\n".join(lines)[:-9])
    tree = json.loads((tmp_path / "run" / "config.json").read_text())
    text = card.render(
        tmp_path / "run", library="peft", base_model="some/base", iteration=2, summary={}, defaults=tree, repo=None,
        head=False, point=None,
    )  # fmt: skip
    assert "| held-out reward (mean) | 0 | 0.2 |" in text


def test_card_says_that_a_gguf_file_was_dequantised(tmp_path):
    file = tmp_path / "Small.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    for library in ("peft", "transformers"):
        text = a_card(tmp_path / "run", base_model=str(file), library=library)
        assert "read from the GGUF file `Small.Q4_1.gguf`, and what is quantised there was dequantised" in text
        assert ("unquantised ones" in text) is (library == "peft")
        assert "there is no hub id for it" in text and str(tmp_path) not in text
    assert "GGUF" not in a_card(tmp_path / "other")


def test_names_mean_nothing_in_a_card(tmp_path):
    base = tmp_path / "a_b *c* [d](e) <script> | `f` # g"
    text = a_card(tmp_path / "run", base_model=str(base), reward__kwargs={"x": "`|`\n# y"})
    prose = r"a\_b \*c\* \[d\](e) \<script\> \| \`f\` \# g"
    assert f"\n# {prose}, trained with PLE\n" in text
    assert r"| base model | `a_b *c* [d](e) <script> \| 'f' # g` |" in text
    assert front_matter(text).keys() == {"library_name", "pipeline_tag", "tags"}
    headings = [line for line in text.split("\n") if line.startswith("#")]
    assert headings[1:] == [f"## {name}" for name in ("Training", "Evaluation", "Use", "Versions", "Licence", "Citation")]


def test_card_is_one_that_the_hub_reads(tmp_path):
    """What huggingface_hub makes of it, and that it stays as it is when it is pushed."""
    text = a_card(tmp_path / "run", repo="me/mine", summary=SUMMARY)
    read = huggingface_hub.ModelCard(text)
    assert str(read) == text and read.text.startswith("\n# some/base, trained with PLE")
    assert (read.data.base_model, read.data.library_name, read.data.pipeline_tag) == ("some/base", "peft", "text-generation")
