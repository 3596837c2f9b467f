"""Measures what alignment costs: tasks of lm-evaluation-harness before and after training, by our own sampler.

WORKDIR/harness/start.json and trained_iter_NNNN.json (or trained_step_N.json) hold the figures of every task, from our own
sampler and log-probabilities. The answers are kept beside them, under a name that stands for all that they depend on, so
that a command that is given again asks only what is new.
"""

import contextlib
import functools
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ple_jax import prompts
from ple_jax.core import identity
from ple_jax.core.batches import bucket, pack
from ple_jax.core.config import flatten
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError, suggestion
from ple_jax.core.extras import need
from ple_jax.core.files import read_json, write_json
from ple_jax.core.noise import HARNESS, uniforms
from ple_jax.core.types import Response, Rollout, Sampling
from ple_jax.prompts import template
from ple_jax.training.run import Run
from ple_jax.training.workdir import recorded

FOLDER = "harness"  # of a work directory
_SURE = math.log(0.5)  # a token above it has more than all others
# keys of config.json that an answer depends on, beside the adapter's weights
_ANSWERS = ("backend", "inputs.model", "inputs.adapter", "model.dtype", "model.quantize", "task.chat", "task.thinking",
            "task.date", "seed")  # fmt: skip
_SAMPLER = ("top_p", "top_k", "min_p")  # options of a task that our sampler has
_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", *_SAMPLER)


# ---------------------------------------------------------------- the tasks


def check(config: Any) -> None:
    """Raises a UserError if no task is named, a task is not known, or lm-evaluation-harness is not installed."""
    need("harness", "--mode=harness")
    options = config.harness
    if not options.tasks:
        raise UserError(
            "config.harness.tasks is empty: name tasks of lm-evaluation-harness, --config.harness.tasks=\"('arc_easy',)\","
            " or of your own in config.harness.include, a folder of their YAML files"
        )
    known = _manager(options.include, options.tasks).all_tasks
    if unknown := [name for name in options.tasks if name not in known]:
        raise UserError(
            f"config.harness.tasks has {unknown[0]!r}, which is no task{suggestion(unknown[0], known)}; one of your own"
            " needs config.harness.include, the folder of its YAML file"
        )


@functools.cache
def _manager(include: str | None, tasks: Sequence[str]) -> Any:
    """Returns the harness's task manager.

    It has the user's own tasks alone if these are all that is asked for; else also the thousands of the harness.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include is not None and set(tasks) <= set(
        (own := TaskManager(include_path=include, include_defaults=False)).all_tasks
    ):
        return own
    return TaskManager(include_path=include)


def _loaded(config: Any) -> dict[str, Any]:
    """Loads the tasks of config.harness with their data, by name.

    Raises:
        UserError: a task or its data cannot be loaded.
    """
    try:
        return _manager(config.harness.include, config.harness.tasks).load(list(config.harness.tasks))["tasks"]
    except Exception as error:  # of `datasets`, of the hub's client, or of a task's YAML
        brief = " ".join(str(error).split())[:300]
        raise UserError(
            f"a task of config.harness.tasks cannot be asked ({type(error).__name__}: {brief}); without a network its data"
            " must be in the cache of `datasets`, or be local files that a task of your own names (docs/compare.md)"
        ) from error


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keeps the harness from starting processes inside the context, since JAX does not survive them."""
    name, before = "DISABLE_MULTIPROC", os.environ.get("DISABLE_MULTIPROC")
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# ---------------------------------------------------------------- the figures


def file_of(workdir: Path, point: Mapping[str, Any] | None) -> Path:
    """Returns the path of the figures of the policy at an evaluation, or of the start model if `point` is None.

    Args:
        point: the evaluation, of which `within` and then `step` or `iteration` are read.
    """
    if point is None:
        return workdir / FOLDER / "start.json"
    name = f"step_{point['step']}" if point["within"] else f"iter_{point['iteration']:04d}"
    return workdir / FOLDER / f"trained_{name}.json"


def evaluate(run: Run[Any], file: Path) -> dict[str, Any]:
    """Evaluates the run's policy as it is now, and writes its figures to the file, beside those of other tasks there.

    Returns:
        What the file then holds: a digest of what the answers depend on, and by task: settings, version, a digest of its
        questions, how many there are, and of every measure value and standard error (None where the harness gives none).

    Raises:
        UserError: the data of a task cannot be had, or the tokenizer has neither a BOS nor an EOS.
    """
    from lm_eval import simple_evaluate

    if not run.base.eos and run.base.tokenizer.bos_token_id is None:
        raise UserError(f"{run.base.name} has neither a BOS nor an EOS, with which the harness begins what has no context")
    options, answers = run.config.harness, _of_answers(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "fewshot_random_seed"), run.config.seed)
    with alone():
        greedy = frozenset(name for name, task in _loaded(run.config).items() if _asks_for_greedy(task))
        # the same request may come from a task that asks whether an answer is the likeliest, and from one that does not
        cache = identity.digest([answers.encode(), *(name.encode() for name in sorted(greedy))]) if greedy else answers
        found = simple_evaluate(
            model=policy(run, greedy), tasks=list(options.tasks), num_fewshot=options.fewshot, limit=options.limit or None,
            task_manager=_manager(options.include, options.tasks), apply_chat_template=run.config.task.chat,
            use_cache=str(file.parent / f"answers_{cache}"), bootstrap_iters=1000, torch_random_seed=None, **seeds,
        )  # fmt: skip
    settings = {"answers_to": options.limit, "fewshot": options.fewshot, "chat": run.config.task.chat}
    settings |= {key: value for key, value in _depends(run).items() if key != "inputs.adapter"}
    before = read_json(file) or {}
    kept = before.get("tasks", {}) if before.get("answers") == answers else {}
    result = {"answers": answers, "tasks": kept | {name: {"settings": settings, **of} for name, of in _figures(found)}}
    write_json(file, result)
    return result


def _depends(run: Run[Any]) -> dict[str, Any]:
    kept = flatten(recorded(run.session.workdir) or {})
    return {key: kept.get(key) for key in _ANSWERS}


def _of_answers(run: Run[Any]) -> str:
    """Computes the digest by which the answers of this policy are kept: of the adapter and the keys that they depend on."""
    adapter = [name.encode() + tensor.tobytes() for name, tensor in sorted(run.backend.adapter().items())]
    return identity.digest([json.dumps(_depends(run), sort_keys=True).encode(), *adapter])


def _asks_for_greedy(task: Any) -> bool:
    """Says whether a task asks if its answers are the likeliest ones.

    A task with one answer (loglikelihood) always does, a task with several only if it measures exact_match.
    """
    measures = [of.get("metric") for of in task.config.metric_list or ()]
    return task.OUTPUT_TYPE == "loglikelihood" or (task.OUTPUT_TYPE == "multiple_choice" and "exact_match" in measures)


def _figures(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the figures of every task, and of groups of tasks, from the harness's result."""
    for task, values in found["results"].items():
        measures = {}
        for key, value in values.items():
            measure, comma, filtered = key.partition(",")
            if comma and not measure.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{measure}_stderr,{filtered}")
                name = measure if filtered == "none" else f"{measure} ({filtered})"
                measures[name] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
        samples = found.get("samples", {}).get(task, [])
        hashes = [f"{one['doc_hash']} {one['prompt_hash']} {one['target_hash']}".encode() for one in samples]
        asked = (found.get("n-samples", {}).get(task) or {}).get("effective")
        version = found.get("versions", {}).get(task)
        yield task, {"version": version, "digest": identity.digest(hashes), "questions": asked, "measures": measures}


# ---------------------------------------------------------------- the model, as the harness asks it


# one piece: the class is made where the harness is imported, which no other mode needs
def policy(run: Run[Any], greedy: frozenset[str] = frozenset()) -> Any:
    """Wraps the run's policy as one of the harness's models.

    Tokens and texts are those of training. The tokenizer adds its own special tokens, except for an EOS at the end of a text
    that is to be continued. With a chat template, prompts are as it writes them, and answers come without thoughts.

    Args:
        greedy: tasks that ask whether an answer is the likeliest there is. For other tasks the result is that it is not,
            unless its log-probabilities alone show that it is.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    config, tokenizer = run.config, run.base.tokenizer
    form = template.Form(tokenizer, config.task.thinking, config.task.date or prompts.DATE)

    class Policy(TemplateLM):
        tokenizer_name = run.base.name

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self.asked: list[bool] = []  # of the requests under way, whether their answers may be the likeliest

        @property
        def eot_token_id(self) -> int:
            return run.base.eos[0] if run.base.eos else self.prefix_token_id

        @property
        def prefix_token_id(self) -> int:
            return run.base.eos[0] if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            special = not config.task.chat if add_special_tokens is None else add_special_tokens
            if special:
                return prompts.open_ended(string, tokenizer) or [self.prefix_token_id]
            return list(tokenizer.encode(string, add_special_tokens=False))

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            turns = [dict(turn) for turn in chat_history]
            begun = turns.pop()["content"] if not add_generation_prompt else ""  # of the answer
            return opened(turns, form) + begun

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return tokenizer.chat_template if chat_template else ""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.asked = [request.task_name in greedy for request in requests]
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            pairs = [_fitting(context, answer, run.base.context) for _, context, answer in requests]
            found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
            open_: list[int] = []
            for i, logprobs in scored(run, pairs):
                found[i] = (float(logprobs.sum()), bool((logprobs > _SURE).all()))
                if self.asked[i] and not found[i][1]:
                    open_.append(i)
                else:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
            for i, likeliest in zip(open_, _likeliest(run, [pairs[i] for i in open_]), strict=True):
                found[i] = (found[i][0], likeliest)
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows = []
            for number, (text,) in enumerate(request.args for request in requests):
                tokens = self.tok_encode(text, add_special_tokens=False)
                for window in get_rolling_token_windows(tokens, self.prefix_token_id, run.base.context - 1, 1):
                    windows.append((number, make_disjoint_window(window)))
            sums = [0.0] * len(requests)
            for i, logprobs in scored(run, [pair for _, pair in windows]):
                sums[windows[i][0]] += float(logprobs.sum())
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            texts = [""] * len(requests)
            groups: dict[str, list[int]] = {}
            options = [normalize_gen_kwargs(request.args[1]) for request in requests]
            for number, of in enumerate(options):
                if unknown := [key for key in of if key not in _KNOWN]:
                    run.session.progress.log(f"warning: a task asks for {unknown[0]}, which this sampler does not have")
                how = {key: of[key] for key in ("max_gen_toks", "temperature", *_SAMPLER) if key in of}
                groups.setdefault(json.dumps(how, sort_keys=True), []).append(number)
            for key, some in groups.items():
                asked = [requests[i].args[0] for i in some]
                for i, response in zip(some, _answers(run, list(map(self.tok_encode, asked)), json.loads(key)), strict=True):
                    opening = requests[i].args[0]
                    how = {"thinking": config.task.thinking, "chat": config.task.chat}
                    said = prompts.answer(response.tokens, tokenizer, prompt=opening, **how)
                    texts[i] = _until(said, options[i]["until"])
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
            return texts

    return Policy()


def opened(turns: list[dict[str, Any]], form: template.Form) -> str:
    """Renders the turns with the chat template, open for an answer.

    A system turn takes the place of the principles, so it also works under a template that takes no system turn.

    Raises:
        UserError: the template refuses the turns.
    """
    system = turns[0]["content"] if turns[0]["role"] == "system" and len(turns) > 1 else None
    try:
        return template.opened(Conversation(turns if system is None else turns[1:]), system, form)
    except ValueError as error:
        raise UserError(
            f"the chat template refuses the turns of a task: {error}; take a task without such turns, or set"
            " --config.task.chat=False"
        ) from error


def _fitting(context: Sequence[int], answer: Sequence[int], most: int) -> tuple[list[int], list[int]]:
    """Drops leading tokens until context and answer fit into `most` tokens; at least one token of the context stays."""
    answer = list(answer)[-(most - 1) :]
    return list(context)[-(most - len(answer)) :], answer


def scored(run: Run[Any], pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the number of each pair of a context and an answer, and its answer tokens' log-probabilities (float64, nats).

    Answers to one context share its row, so that it is computed once for them, as long as they are together not longer than
    the context. Long rows come first, so that what does not fit into the memory shows at once.
    """
    rows = sorted(_rows(pairs), key=lambda row: (-len(row[1]), -len(row[0]), row[1]))
    shape, size = run.config.sampling.bucket, run.config.optimizer.micro_queries
    run.session.progress.phase("log-probabilities", len(rows))
    at = 0
    while at < len(rows):
        run.session.stop.check()
        some = [row for row in rows[at : at + size] if len(row[1]) == len(rows[at][1])]  # as many answers each
        longest = max(len(pairs[i][1]) for _, numbers in some for i in numbers)
        answers = [tuple(Response(tuple(pairs[i][1]) or (0,), True) for i in numbers) for _, numbers in some]
        rollouts = [Rollout("", "", context, own) for (context, _), own in zip(some, answers, strict=True)]
        picks = [range(len(own)) for own in answers]
        batch = pack(rollouts, picks, prompt_multiple=shape, response_len=bucket(longest, shape))
        logprobs = run.backend.logprobs(batch).logprobs
        for row, (_, numbers) in enumerate(some):
            for k, i in enumerate(numbers):
                yield i, np.asarray(logprobs[row, k, : len(pairs[i][1])], np.float64)
        at += len(some)
        run.session.progress.advance(len(some))


def _rows(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Yields each context with the numbers of the answers that share its row."""
    contexts: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        contexts.setdefault(tuple(context), []).append(i)
    for context, numbers in contexts.items():
        row: list[int] = []
        for i in numbers:
            if row and sum(len(pairs[j][1]) for j in (*row, i)) > len(context):
                yield context, row
                row = []
            row.append(i)
        yield context, row


def _likeliest(run: Run[Any], pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[bool]:
    """Says for each answer whether it is what greedy decoding gives after its context."""
    if not pairs:
        return []
    new = max(len(answer) for _, answer in pairs)
    said = _sampled(run, [context for context, _ in pairs], Sampling(new, (), temperature=0.0))
    return [list(r.tokens[: len(answer)]) == list(answer) for r, (_, answer) in zip(said, pairs, strict=True)]


def _answers(run: Run[Any], asked: Sequence[Sequence[int]], how: Mapping[str, Any]) -> list[Response]:
    """Samples responses with the options that a task gives.

    Where prompts and answers are together longer than the model's context, answers are limited to the room that the longest
    prompt leaves, or to half of the context if that is more. Prompts then keep their last tokens, at least half of what
    fits.
    """
    context, longest = run.base.context, max(map(len, asked))
    new = how["max_gen_toks"]
    if longest + new > context:
        new = min(new, max(context - longest, context // 2))
        run.session.progress.log(
            f"warning: prompts of up to {longest} tokens and answers of {how['max_gen_toks']} are more than {run.base.name}"
            f" takes at once ({context}): answers have at most {new}, and prompts lose what is before their last"
            f" {context - new}"
        )
    options = {key: how[key] for key in _SAMPLER if key in how}
    sampling = Sampling(new, run.base.eos, temperature=float(how.get("temperature", 0.0)), **options)
    return _sampled(run, [list(tokens)[-(context - new) :] for tokens in asked], sampling)


def _sampled(run: Run[Any], asked: Sequence[Sequence[int]], sampling: Sampling) -> list[Response]:
    new = sampling.max_new_tokens
    noise = np.stack([uniforms(run.config.seed, HARNESS, str(i), "plain", 0, new) for i in range(len(asked))])
    run.session.progress.phase("evaluate", len(asked))

    def tell(ended: Mapping[int, Response]) -> None:
        run.session.stop.check()
        run.session.progress.advance(len(ended), tokens=sum(len(r.tokens) for r in ended.values()))

    return run.backend.generate(asked, noise, sampling=sampling, tell=tell)


def _until(text: str, stops: Sequence[str]) -> str:
    """Returns the text before the first of the stop strings."""
    for stop in filter(None, stops):
        text = text.split(stop, 1)[0]
    return text


# ---------------------------------------------------------------- before and after


def rows(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Makes a row for each measure of each task: before, after, their difference and its standard error; None if not known.

    The standard error treats the two values as independent although they answer the same questions, so it is too large
    rather than too small. A value before training counts as unknown if it is of other questions, another version or other
    settings than the one after it.
    """
    earlier, later = (found["tasks"] if found else {} for found in (before, after))
    found = []
    for task, of in (later or earlier).items():
        was = earlier.get(task)
        if later and was and any(was[key] != of[key] for key in ("settings", "version", "digest")):
            was = None
        for measure, now in of["measures"].items():
            old = (was or {}).get("measures", {}).get(measure)
            row = {"task": task, "measure": measure, "questions": of["questions"], "before": None, "after": None}
            row |= {"difference": None, "error": None, "settings": {key: of["settings"][key] for key in _NAMED}}
            if later:
                row["after"] = now["value"]
            if old is not None:
                row["before"] = old["value"]
            if later and old is not None:
                row["difference"] = now["value"] - old["value"]
                if now["stderr"] is not None and old["stderr"] is not None:
                    row["error"] = math.hypot(now["stderr"], old["stderr"])
            found.append(row)
    return found


_NAMED = ("answers_to", "fewshot")  # settings that a figure is told with


def said(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the rows as lines of text."""
    for row in found:
        values = " -> ".join(f"{value:.4f}" for value in (row["before"], row["after"]) if value is not None)
        change = "" if row["difference"] is None else f" ({row['difference']:+.4f})"
        error = "" if row["error"] is None else f", standard error of that {row['error']:.4f}"
        asked = "" if row["questions"] is None else f", {row['questions']} questions"
        yield f"{row['task']}, {row['measure']}: {values}{change}{error}{asked}"


def of_workdir(workdir: Path, point: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Reads what is known of a run and one of its checkpoints, as `rows`; if `point` is None, of the start model alone."""
    before = read_json(file_of(workdir, None))
    return rows(before, None if point is None else read_json(file_of(workdir, point)))


def newest(workdir: Path, point: Mapping[str, Any] | None) -> tuple[list[dict[str, Any]], str]:
    """Reads the rows of a run's report, and names the checkpoint that they are of, such as "iteration 0004".

    It is the checkpoint of `point` if there are figures of it, or else the one with the newest figures; the name is "" if no
    checkpoint has figures.
    """
    files = sorted((workdir / FOLDER).glob("trained_*.json"), key=lambda file: file.stat().st_mtime)
    wanted = file_of(workdir, point) if point is not None else None
    if wanted is None or not wanted.exists():
        wanted = files[-1] if files else None
    name = (
        ""
        if wanted is None
        else wanted.stem.removeprefix("trained_").replace("iter_", "iteration ").replace("step_", "step ")
    )
    return rows(read_json(file_of(workdir, None)), None if wanted is None else read_json(wanted)), name
