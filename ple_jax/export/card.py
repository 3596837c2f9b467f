"""The model card of an export (README.md with the hub's front matter), and the command line that serves it."""

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ple_jax.core.config import flatten
from ple_jax.core.files import read_json, read_jsonl
from ple_jax.models.hub import is_remote
from ple_jax.serving.commands import rank_limit

_METRICS = (  # metrics.jsonl -> words
    ("heldout_reward", "held-out reward (mean)"),
    ("heldout_kl", "KL to the reference (nats per token)"),
    ("heldout_entropy", "entropy (nats per token)"),
)


def render(
    workdir: Path,
    *,
    library: str,
    base_model: str,
    iteration: int,
    summary: Mapping[str, Any],
    defaults: Mapping[str, Any],
    repo: str | None = None,
    head: bool = False,
) -> str:
    """The text of README.md for the export of one checkpoint.

    Reads config.json and, where the run has got so far, environment.json and metrics.jsonl.

    Args:
        workdir: a run's work directory.
        library: what loads the export: "peft" (the adapter) or "transformers" (merged weights).
        base_model: the base model's hub id or path; of a path the card shows the last part alone.
        iteration: the checkpoint's iteration.
        summary: what summary.json says, or {}; left out where it speaks of another iteration.
        defaults: the default config, nested: the card shows what differs from it.
        repo: hub id that the export will have, if any.
        head: whether it is a reward model.
    """
    import jinja2

    config = flatten(read_json(workdir / "config.json") or {})
    plain = flatten(json.loads(json.dumps(dict(defaults))))
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    # JSON strings are YAML strings, whatever is in them
    environment.filters |= {"yaml": lambda x: json.dumps(x, ensure_ascii=False), "cell": _cell, "number": "{:.4g}".format}
    return environment.from_string(_REWARD_CARD if head else _CARD).render(
        library=library,
        base=base_model if is_remote(base_model) else Path(base_model).name,
        on_hub=is_remote(base_model),
        name=repo or "path/to/this/folder",
        iteration=iteration,
        config=config,
        settings={k: v for k, v in config.items() if k in plain and plain[k] != v and not k.startswith("export.")},
        metrics=_metrics(workdir, iteration),
        summary=summary if summary.get("steps" if head else "iterations") == iteration else {},
        versions=_versions(workdir),
        rank=rank_limit(config["lora.rank"], *(config[f"lora.{key}"] for key in ("dora", "rank_pattern", "alpha_pattern"))),
    )


def _metrics(workdir: Path, iteration: int) -> list[tuple[str, float, float]]:
    """What is known before training and at the newest evaluation up to `iteration`."""
    path = workdir / "metrics.jsonl"
    lines = read_jsonl(path) if path.exists() else []
    rows = []
    for key, words in _METRICS:
        known = [line[key] for line in lines if line.get(key) is not None and line["iteration"] <= iteration]
        if len(known) > 1:
            rows.append((words, known[0], known[-1]))
    return rows


def _versions(workdir: Path) -> dict[str, str]:
    found = read_json(workdir / "environment.json") or {}
    names = ("python", "jax", "flax", "optax", "torch", "torch-npu", "transformers", "peft")
    try:
        ours = {"ple_jax": version("ple_jax")}
    except PackageNotFoundError:  # run from a source tree that was never installed
        ours = {}
    return ours | {name: found[name] for name in names if name in found}


def _cell(value: Any) -> str:
    """A value for a table: no absolute path of this machine, nothing that ends the cell."""
    if isinstance(value, str) and Path(value).is_absolute():
        value = Path(value).name
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "`" + text.replace("|", "\\|").replace("`", "'").replace("\n", " ") + "`"


_SETTINGS = """\
{% if settings %}
Settings that differ from the defaults:

| setting | value |
|---|---|
{% for key, value in settings.items() %}
| {{ key|cell }} | {{ value|cell }} |
{% endfor %}
{% else %}
All settings are the defaults.
{% endif %}

"""

_CARD = """\
---
{% if on_hub %}
base_model: {{ base|yaml }}
{% endif %}
library_name: {{ library }}
pipeline_tag: text-generation
tags:
- ple
- lora
---

# {{ base }}, aligned with PLE

{{ "A LoRA adapter for" if library == "peft" else "The weights, LoRA adapter merged, of" }} {{ base }} after iteration
{{ iteration }} of {{ config["iterations"] }} of [PLE](https://arxiv.org/abs/2408.02599) (Progressively Label Enhancement).
The policy samples a response to the plain prompt and one to the prompt with principles; it learns to rank the second above
the first where its reward is better by more than a threshold that falls with every iteration, and otherwise learns from
both, weighted by their rewards.

## Training

| | |
|---|---|
| base model | {{ base|cell }} |
| algorithm | {{ config["algorithm"]|cell }} |
| training queries | {{ config["task.train"]|cell }}, {{ config["queries_per_iteration"] }} per iteration |
| held-out queries | {{ config["task.heldout"]|cell }} |
| principles | {{ config["principles"]|cell }} |
| reward | {{ config["reward.name"]|cell }} with {{ config["reward.kwargs"]|cell }} |
| prompts | {{ "chat template" if config["task.chat"] else "plain text" }} |

""" + _SETTINGS + """\
{% if metrics %}
## Evaluation

| held-out queries | before | after |
|---|---|---|
{% for words, before, after in metrics %}
| {{ words }} | {{ before|number }} | {{ after|number }} |
{% endfor %}

{% if summary %}
Gain in reward, 95% bootstrap interval over {{ summary["heldout_queries"] }} queries:
{{ summary["heldout_gain_ci95"][0]|number }} to {{ summary["heldout_gain_ci95"][1]|number }}.
{% endif %}

{% endif %}
## Use

{% if library == "peft" %}
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained({{ name|yaml }})
```

{% if on_hub and rank %}
```bash
vllm serve {{ base }} --enable-lora --max-lora-rank {{ rank }} --lora-modules aligned={{ name }}
```

{% endif %}
{% else %}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (c.from_pretrained({{ name|yaml }}) for c in (AutoModelForCausalLM, AutoTokenizer))
```

```bash
vllm serve {{ name }}
```

{% endif %}
{% if not on_hub %}
The base model, {{ base|cell }}, was read from a file or folder: there is no hub id for it.

{% endif %}
## Versions

{% for package, number in versions.items() %}{{ ", " if not loop.first }}{{ package }} {{ number }}{% endfor %}


## Licence

See the base model: its licence holds for what is derived from it.

## Citation

```bibtex
@inproceedings{liu2025ple,
  title = {Progressively Label Enhancement for Large Language Model Alignment},
  author = {Liu, Biao and Xu, Ning and Geng, Xin},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  volume = {267},
  pages = {39915--39928},
  year = {2025}
}
```
"""

_REWARD_CARD = """\
---
{% if on_hub %}
base_model: {{ base|yaml }}
{% endif %}
library_name: {{ library }}
pipeline_tag: text-classification
tags:
- reward-model
- lora
---

# A reward model from {{ base }}

{{ "A LoRA adapter for" if library == "peft" else "The weights, LoRA adapter merged, of" }} {{ base }} with a head that
scores conversations, trained for {{ iteration }} steps on preference pairs with Bradley-Terry's loss: the difference of two
responses' scores is the log-odds that the first is preferred. Scores of different prompts do not compare.

## Training

| | |
|---|---|
| base model | {{ base|cell }} |
| trained | {{ "adapter and head" if config["reward_model.train"] == "lora" else "the head alone" }} |
| preference pairs | {{ config["task.train"]|cell }} ({{ config["task.format"] }}) |
| held-out pairs | {{ config["task.heldout"]|cell }} |

""" + _SETTINGS + """\
{% if summary %}
## Evaluation

Accuracy on {{ summary["heldout_examples"] }} held-out pairs {{ summary["heldout_accuracy"]|number }} (95% bootstrap interval
{{ summary["heldout_accuracy_ci95"][0]|number }} to {{ summary["heldout_accuracy_ci95"][1]|number }}), log loss
{{ summary["heldout_log_loss"]|number }}, Brier score {{ summary["heldout_brier"]|number }}, expected calibration error
{{ summary["heldout_calibration_error"]|number }}.

{% endif %}
## Use

{% if library == "peft" %}
```python
from peft import AutoPeftModelForSequenceClassification

model = AutoPeftModelForSequenceClassification.from_pretrained({{ name|yaml }}, num_labels=1)
```

{% else %}
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model, tokenizer = (c.from_pretrained({{ name|yaml }}) for c in (AutoModelForSequenceClassification, AutoTokenizer))
```

As a reward of ple_jax: `--config.reward.name=model --config.reward.kwargs="{'path': '{{ name }}'}"`.

{% endif %}
## Versions

{% for package, number in versions.items() %}{{ ", " if not loop.first }}{{ package }} {{ number }}{% endfor %}


## Licence

See the base model: its licence holds for what is derived from it.
"""
