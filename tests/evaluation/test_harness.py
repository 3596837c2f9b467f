"""Tasks of lm-evaluation-harness, asked of our sampler and log-probabilities: against the harness's own model."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from ple_jax import modes
from ple_jax.configs import tiny
from ple_jax.core.errors import UserError
from ple_jax.core.types import Sampling
from ple_jax.evaluation import harness

HEAD = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {data}\nmetadata:\n  version: 1.0\n"
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "word": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "said": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["~"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Llama in a folder, with weights large enough that it has opinions."""
    import families

    folder = tmp_path_factory.mktemp("base")
    families.save(families.build(families.VARIANTS["llama"], max_position_embeddings=320), folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tasks, over local JSON."""
    found, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)

    def text(n: int) -> str:
        return "".join(rng.choice(list("abcdef gh"), n)).strip() or "a"

    docs = [
        {
            "question": text(int(rng.integers(3, 30))), "choices": [f" {text(k + 2)}" for k in range(3)][: 2 + i % 2],
            "answer": i % 2, "long": text(400 + i), "said": "x",
        }
        for i in range(7)
    ]  # fmt: skip
    (found / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, task in TASKS.items():
        (found / f"{name}.yaml").write_text(f"task: own_{name}\n" + HEAD.format(data=found / "docs.jsonl") + task)
    return found


def config(base: Path, folder: Path, **changes: Any) -> FrozenConfigDict:
    c = tiny.get_config()
    c.sinks, c.iterations, c.model.path, c.reward.kwargs = (), 1, str(base), {"letters": "abc"}
    c.harness.include, c.harness.tasks = str(folder), tuple(f"own_{name}" for name in TASKS)
    c.update_from_flattened_dict(changes)
    return FrozenConfigDict(c)


@pytest.fixture(scope="module")
def asked(base, folder, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("asked") / "w"
    c = config(base, folder)
    modes.train(c, workdir, "jax")
    modes.harness(c, workdir, "jax")
    return workdir


def instance(*args: Any, doc: int = 0, task: str = "t") -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, args, 0, (task, doc, 1))


def figures(workdir: Path, name: str = "start") -> dict[str, float]:
    found = json.loads((workdir / "harness" / f"{name}.json").read_text())["tasks"]
    return {f"{task} {key}": value["value"] for task, of in found.items() for key, value in of["measures"].items()}


@pytest.mark.slow
def test_the_start_is_what_the_harness_finds_of_transformers(base, folder, asked):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    from ple_jax.models.tokenizer import from_folder

    model = HFLM(AutoModelForCausalLM.from_pretrained(base), tokenizer=from_folder(base), device="cpu", max_length=319)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with harness.alone():
        found = simple_evaluate(model, tasks=[f"own_{name}" for name in TASKS], task_manager=manager)
    theirs = {f"{task} {k.partition(',')[0]}": v for task, of in found["results"].items() for k, v in of.items() if "," in k}
    ours = figures(asked)
    assert len(ours) == 6 and len(set(ours.values())) > 2
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.slow
def test_log_probabilities_and_answers_are_those_of_transformers(base, folder, asked):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).double()
    with modes.on_run(config(base, folder), asked, "jax", trained=False) as (run, _):
        pairs = [([97, 98], [99]), ([97, 98], [100, 101]), ([97], [98, 99, 100]), (list(range(97, 117)), [98])]
        found = dict(harness.scored(run, pairs))
        asks = harness.policy(run, frozenset({"t"}))
        pairs_of_texts = [("abc", "d"), ("", "abc"), ("a ", "b")]
        sums = asks.loglikelihood([instance(*pair, doc=i) for i, pair in enumerate(pairs_of_texts)])
        greedy = asks.generate_until([instance("abc", {"until": [], "max_gen_toks": 4})])
    for i, (context, answer) in enumerate(pairs):
        ids = torch.tensor([[*context, *answer]])
        logprobs = torch.log_softmax(model(ids).logits[0].detach(), -1)
        wanted = [float(logprobs[len(context) - 1 + k, token]) for k, token in enumerate(answer)]
        np.testing.assert_allclose(found[i], wanted, atol=1e-4)
    ids = torch.tensor([[97, 98, 99]])
    logits = model(ids).logits[0, -1].detach()
    assert sums[0][0] == pytest.approx(float(torch.log_softmax(logits, -1)[100]), abs=1e-4)
    assert sums[0][1] == (int(logits.argmax()) == 100)
    said = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=257, attention_mask=torch.ones_like(ids))
    from ple_jax.models.tokenizer import from_folder

    assert greedy == [from_folder(base).decode(said[0, 3:], skip_special_tokens=True)]


@pytest.mark.slow
def test_a_likeliest_answer_is_known_as_one(base, folder, asked, monkeypatch):
    with modes.on_run(config(base, folder), asked, "jax", trained=False) as (run, _):
        (response,) = run.backend.generate(
            [[97, 98, 99]], np.zeros((1, 3), np.float32), sampling=Sampling(3, (), temperature=0.0)
        )
        asks, tokens = harness.policy(run, frozenset({"t"})), list(response.tokens)
        other = [*tokens[:-1], (tokens[-1] + 1) % 256]
        monkeypatch.setattr(asks, "tok_encode", lambda text, **_: [int(number) for number in text.split()])
        texts = [" " + " ".join(map(str, answer)) for answer in (tokens, other)]
        found = asks.loglikelihood([instance("97 98 99", text) for text in texts])
        assert [greedy for _, greedy in found] == [True, False] and found[0][0] > found[1][0]
        found = asks.loglikelihood([instance("97 98 99", text, task="other") for text in texts])
        assert [greedy for _, greedy in found] == [False, False]  # nobody asks


@pytest.mark.slow
def test_before_and_after_are_in_the_report_and_in_comparisons(base, folder, asked, tmp_path, capsys):
    best = json.loads((asked / "summary.json").read_text())["best"]["any"]
    name = f"trained_iter_{best['iteration']:04d}"
    before, after = figures(asked), figures(asked, name)
    assert before.keys() == after.keys()
    if best["iteration"]:
        assert before != after
    page = (asked / "report.html").read_text()
    assert 'id="tax"' in page and "own_choice, acc_norm" in page
    c = config(base, folder)
    modes.generate(c, asked, "jax")
    modes.compare(c, tmp_path / "c", "jax", [str(asked)])
    method = json.loads((tmp_path / "c" / "comparison.json").read_text())["methods"][0]["measures"]
    assert method["tax own_choice acc"] == after["own_choice acc"]
    assert method["tax change own_text word_perplexity"] == pytest.approx(
        after["own_text word_perplexity"] - before["own_text word_perplexity"]
    )
    assert "Alignment tax" in (tmp_path / "c" / "table.md").read_text()


@pytest.mark.slow
def test_what_was_asked_is_not_asked_again(base, folder, asked, tmp_path, monkeypatch):
    copy = tmp_path / "w"
    shutil.copytree(asked, copy)
    before = figures(copy)
    calls = []
    real = harness.scored
    monkeypatch.setattr(harness, "scored", lambda run, pairs: calls.append(len(pairs)) or real(run, pairs))
    modes.harness(config(base, folder), copy, "jax")
    (copy / "harness" / "start.json").unlink()  # killed before the last task
    only_start = {"harness.policies": ("start",)}
    modes.harness(config(base, folder, **only_start), copy, "jax")
    assert figures(copy) == before and sum(calls) == 0 and os.environ.get("DISABLE_MULTIPROC") is None
    modes.harness(config(base, folder, **only_start, **{"harness.limit": 2, "harness.tasks": ("own_choice",)}), copy, "jax")
    tasks = json.loads((copy / "harness" / "start.json").read_text())["tasks"]
    assert tasks["own_choice"]["questions"] == 2 and tasks["own_word"]["questions"] == 7  # those of other tasks stay
    # figures of fewer questions are not set against those of all
    best = json.loads((copy / "summary.json").read_text())["best"]["any"]
    for row in harness.of_workdir(copy, best):
        assert (row["before"] is None) == (row["task"] == "own_choice")


@pytest.mark.slow
def test_the_same_question_of_a_task_that_wants_to_know_the_likeliest(base, folder, tmp_path):
    """What was kept for a task that does not is no answer to it."""
    exact = "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    found = {}
    for name in ("kept", "new"):
        tasks = tmp_path / f"tasks_{name}"
        shutil.copytree(folder, tasks)
        c = config(base, tasks, **{"harness.policies": ("start",), "harness.tasks": ("own_choice",)})
        if name == "kept":
            modes.harness(c, tmp_path / name, "jax")
        (task,) = (file for file in tasks.glob("*.yaml") if "own_choice" in file.read_text())
        task.write_text(task.read_text().replace("metric_list:\n", f"metric_list:\n{exact}"))
        modes.harness(c, tmp_path / name, "jax")
        found[name] = figures(tmp_path / name)
    assert found["kept"] == found["new"] and any("exact_match" in key for key in found["new"])


@pytest.mark.slow
def test_another_question_is_asked(base, folder, asked, tmp_path):
    copy, docs, other = tmp_path / "w", folder / "docs.jsonl", tmp_path / "tasks"
    shutil.copytree(asked, copy)
    shutil.copytree(folder, other)
    lines = docs.read_text().splitlines()
    (other / "docs.jsonl").write_text(
        "\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | {"question": "a new one"})])
    )
    for task in other.glob("*.yaml"):
        task.write_text(task.read_text().replace(str(docs), str(other / "docs.jsonl")))
    changes = {"harness.policies": ("start",), "harness.tasks": ("own_word",), "harness.include": str(other)}
    modes.harness(config(base, folder, **changes), copy, "jax")
    assert figures(copy)["own_word perplexity"] != figures(asked)["own_word perplexity"]
    best = json.loads((copy / "summary.json").read_text())["best"]["any"]
    assert {row["task"] for row in harness.of_workdir(copy, best) if row["before"] is None} == {"own_word"}


@pytest.mark.slow
def test_answers_are_those_of_their_model_alone(base, folder, asked, tmp_path):
    import families

    copy, sibling = tmp_path / "w", tmp_path / "sibling"
    shutil.copytree(base, sibling)
    shutil.copytree(asked / "harness", copy / "harness")  # answers of a fresh adapter, which is the same on any base
    model = families.build(families.VARIANTS["llama"], max_position_embeddings=320)
    for weight in model.parameters():
        weight.data.mul_(1.01)
    families.save(model, sibling)
    modes.harness(config(sibling, folder, **{"harness.policies": ("start",), "harness.tasks": ("own_word",)}), copy, "jax")
    assert figures(copy)["own_word perplexity"] != figures(asked)["own_word perplexity"]


@pytest.mark.slow
def test_answers_that_many_contexts_share_are_parted(base, folder, asked):
    with modes.on_run(config(base, folder), asked, "jax", trained=False) as (run, _):
        pairs = [([97], [98, 99, i]) for i in range(20)] + [(list(range(97, 109)), [i, i]) for i in range(8)]
        seen = []
        real = run.backend.logprobs
        run = run._replace(backend=type("Spy", (), {"logprobs": lambda _, b: seen.append(b.response.shape) or real(b)})())
        found = dict(harness.scored(run, pairs))
    assert len(found) == 28 and max(k for _, k, _ in seen) == 6  # of two tokens each beside a context of twelve
    assert all(k == 1 or k == 6 or k == 2 for _, k, _ in seen)


@pytest.mark.slow
def test_a_prompt_keeps_its_room(base, folder, asked, monkeypatch):
    with modes.on_run(config(base, folder), asked, "jax", trained=False) as (run, _):
        seen: list[Any] = []

        def generate(prompts: Any, noise: Any, *, sampling: Sampling, tell: Any) -> list[Any]:
            seen.append((list(map(len, prompts)), sampling))
            return [type("R", (), {"tokens": (97, 126, 98)})() for _ in prompts]

        spied = run._replace(backend=type("Spy", (), {"generate": staticmethod(generate)})())
        asks = harness.policy(spied)
        said = asks.generate_until(
            [instance("a" * 100, {"max_gen_toks": 2000, "until": "~"}), instance("b", {"max_new_tokens": 3}),
             instance("c", {"temperature": 0.7, "top_p": 0.9, "max_tokens": 3}), instance("d" * 900, {"max_gen_toks": 8})]
        )  # fmt: skip
    assert said == ["a", "a~b", "a~b", "a~b"]
    assert [lengths for lengths, _ in seen] == [[100], [1], [1], [312]]
    assert [s.max_new_tokens for _, s in seen] == [220, 3, 3, 8] and [s.temperature for _, s in seen] == [0, 0, 0.7, 0]
    assert seen[2][1].top_p == 0.9


CHATML = (
    "{% if messages[0].role == 'system' and not open %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.slow
def test_chat_templates_are_those_of_the_run(base, folder, asked, monkeypatch):
    with modes.on_run(config(base, folder), asked, "jax", trained=False) as (run, _):
        monkeypatch.setattr(run.base.tokenizer, "chat_template", CHATML)
        asks = harness.policy(run)
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "So?"}]
        assert asks.apply_chat_template(turns) == "<user>Be brief.\n\nSo?<assistant>"
        begun = [*turns[1:], {"role": "assistant", "content": "It"}]
        assert asks.apply_chat_template(begun, add_generation_prompt=False) == "<user>So?<assistant>It"
        with pytest.raises(UserError, match="the chat template refuses the turns of a task"):
            monkeypatch.setattr(run.base.tokenizer, "chat_template", "{{ raise_exception('never') }}")
            asks.apply_chat_template(turns)


def test_what_cannot_be_asked(base, folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="config.harness.tasks is empty: name tasks"):
        modes.harness(config(base, folder, **{"harness.tasks": ()}), tmp_path / "w", "jax")
    with pytest.raises(UserError, match="has 'own_chioce', which is no task; did you mean 'own_choice'"):
        modes.harness(config(base, folder, **{"harness.tasks": ("own_chioce",)}), tmp_path / "w", "jax")
    (folder / "gone.yaml").write_text("task: own_gone\n" + HEAD.format(data=folder / "gone.jsonl") + TASKS["choice"])
    gone = config(base, folder, **{"harness.tasks": ("own_gone",), "harness.policies": ("start",)})
    with pytest.raises(UserError, match="a task of config.harness.tasks cannot be asked .*gone.jsonl"):
        modes.harness(gone, tmp_path / "w", "jax")
    with pytest.raises(UserError, match="--mode=harness needs an algorithm that samples"):
        modes.harness(config(base, folder, algorithm="reward"), tmp_path / "v", "jax")


def test_rows():
    def side(value: float, error: float | None, limit: int = 0) -> dict[str, Any]:
        same = {"fewshot": None, "answers_to": limit, "chat": False}
        measures = {"acc": {"value": value, "stderr": error}}
        of = {"settings": same, "version": 1, "digest": "d", "questions": 5, "measures": measures}
        return {"answers": "a", "tasks": {"t": of}}

    (row,) = harness.rows(side(0.5, 0.3), side(0.4, 0.4))
    assert row["difference"] == pytest.approx(-0.1) and row["error"] == pytest.approx(0.5)
    assert list(harness.said([row])) == ["t, acc: 0.5000 -> 0.4000 (-0.1000), standard error of that 0.5000, 5 questions"]
    (row,) = harness.rows(None, side(0.4, None))
    assert list(harness.said([row])) == ["t, acc: 0.4000, 5 questions"] and row["error"] is None
    (row,) = harness.rows(side(0.5, 0.3, limit=2), side(0.4, 0.4))
    assert row["before"] is None
    assert harness.rows(None, None) == [] and math.isclose(harness.rows(side(0.5, 0.1), None)[0]["before"], 0.5)
