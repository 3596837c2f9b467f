"""Baselines by TRL's own trainers (config.trainer="trl"): SFT, DPO, GRPO and RLOO from the same config, data and start.

`train` is `training.loop.train` with another update. What an iteration trains on, evaluation, commits and all files are
still the loop's. In between, TRL's trainer takes the iteration's optimiser steps on a PEFT model of its own, which before
them gets the adapter and Adam's moments from the `TorchBackend`, and afterwards gives them back. So the backend's checkpoint
is all that a run needs to go on, held-out queries are answered by one sampler whichever trainer is used, and TRL writes
nothing. The price is memory: the base is on the device twice.

These are the same as in our own loop: the start, the reference, the order of the data, every token, AdamW, its schedule and
clipping, and the losses of SFT and DPO. So DPO's curve is the same, to rounding. SFT's differs in what a step is divided by:
TRL takes the tokens of the optimiser batch, ours as many answers of the mean length of all records. (Where queries were
quarantined, batches are cut elsewhere.) GRPO and RLOO learn from what TRL samples: all responses of an iteration at once, by
transformers, with noise of its own from config.seed. Their losses differ from ours in two points:

- an optimiser batch consists of responses: those of a query need not be in one batch, and all epochs have the same batches;
- with grpo.loss=dapo tokens are divided by the mean length in the iteration, where ours takes that in the optimiser batch.

A warm-up (config.warm_up.data) is done by our own code. TRL's telemetry and reports are off.
"""

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, logging

from ple_jax import prompts
from ple_jax.algorithms import Algorithm, Context
from ple_jax.core.answers import AGAIN
from ple_jax.core.errors import UserError
from ple_jax.core.extras import need
from ple_jax.core.types import Query, Response, Rollout
from ple_jax.data.mixture import draw_queries
from ple_jax.models import adapters
from ple_jax.training import costs, loop, measures, points, scoring, steps
from ple_jax.training.journal import Journal, read
from ple_jax.training.run import Run
from ple_jax.training.state import State
from torch_ascend import backend, lora, sharding
from torch_ascend import model as models
from torch_ascend.train import decaying

VERSION = "1.16"  # of TRL: what is overridden here is no public interface
SAMPLE = ("grpo", "rloo")
ALGORITHMS = ("sft", "dpo", *SAMPLE)


def check(config: Any) -> None:
    """Refuses what TRL's trainers cannot do, before anything is loaded.

    Raises:
        UserError: another algorithm, an option that TRL lacks or understands differently, or no TRL of this version.
    """
    name, dpo = config.algorithm, config.dpo
    if name not in ALGORITHMS:
        raise UserError(
            f"config.trainer is 'trl', which trains {', '.join(ALGORITHMS)}, and config.algorithm is {name!r}: that is this"
            " project's own, in PyTorch too; leave config.trainer at own"
        )
    wrong = {
        f"dpo.samples={dpo.samples}, as TRL takes the records' own pairs": name == "dpo" and dpo.samples,
        f"dpo.label_smoothing={dpo.label_smoothing:g}, as TRL's sigmoid loss ignores it": (
            name == "dpo" and dpo.loss == "sigmoid" and dpo.label_smoothing
        ),
        f"lora.dropout={config.lora.dropout:g} (but for sft), as TRL applies it to what it compares with, too": (
            name != "sft" and config.lora.dropout
        ),
        "sampling.temperature=0, as TRL never samples greedily": name in SAMPLE and config.sampling.temperature == 0,
        f"sampling.importance_cap={config.sampling.importance_cap:g}, as TRL has it for vLLM alone": (
            name in SAMPLE and config.sampling.importance_cap
        ),
        f"model.quantize={config.model.quantize}": config.model.quantize != "none",
        "sampling.server, as TRL samples by itself": config.sampling.server is not None,
        f"eval.points={config.eval.points}, as TRL's steps are its own": config.eval.points > 1,
        "several processes or a config.mesh of several": (
            math.prod(config.mesh.to_dict().values()) > 1 or sharding.world().size > 1
        ),
    }
    if found := [what for what, present in wrong.items() if present]:
        raise UserError(f"config.trainer is 'trl', which does not go with {found[0]}; change that, or leave trainer at own")
    need("trl", "config.trainer='trl'")
    if not (found := version("trl")).startswith(f"{VERSION}."):
        raise UserError(f"config.trainer is 'trl', which needs TRL {VERSION}, not {found}; pip install 'ple_jax[trl]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences messages that a user can do nothing about: how tokens are aligned, and which deprecated name is called."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".\w*gradient_checkpointing\w*. is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)


@_quiet()
def train(run: Run[Algorithm]) -> State:
    """Trains for all iterations, or those that are left; returns the final state, as `training.loop.train` does."""
    state = loop.begin(run)
    if points.ended(run.config, state):
        return loop.at_the_end(run, state)
    trl = Trl(run, state)
    while not points.ended(run.config, state):
        state = loop.one_iteration(run, state, trl.learn)
    return loop.at_the_end(run, state)


class Trl:
    """TRL's side of a run: a PEFT model, its optimizer and its trainer, which stay from one iteration to the next."""

    def __init__(self, run: Run[Algorithm], state: State):
        self.run, self.backend = run, run.backend
        self.state = state  # TRL calls back from the middle of an iteration: what that counts is counted here
        self.queries: list[Query] = []  # of the iteration, where TRL samples, and what it sampled
        self.rollouts: list[Rollout] = []
        self.context = loop.context_of(run, state, math.nan)
        options = run.config.optimizer
        model = _peft_model(run)
        named = dict(model.named_parameters())
        self.parameters = {  # "path/kind", as the backend calls it -> PEFT's
            leaf: named[f"base_model.model.{_module(leaf)}.{_PEFT[leaf.rpartition('/')[2]]}"] for leaf in self.backend.leaves
        }
        self._load(lora.leaves(self.backend.reference))  # TRL's reference is what the model is when the trainer is made
        self.optimizer = torch.optim.AdamW(
            decaying(self.parameters, options.weight_decay), lr=options.lr, betas=(0.9, 0.999), eps=1e-8
        )
        done = state.step
        total = steps.planned(run.config, run.config.iterations)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: steps.share_of_rate(options, done + step, total)
        )
        self.watch = Watch(self)
        self.trainer = trainer(run, model, (self.optimizer, schedule), self)
        # while it has no state: accelerate would move Adam's counters to the device, where each is waited for
        self.trainer.optimizer = self.trainer.accelerator.prepare(self.optimizer)
        self._load(self.backend.leaves)
        for own, parameter in self._pairs():
            moments = self.backend.optimizer.state[own]
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.backend.steps)),
                **{name: _turned(moments[name]).clone() for name in ("exp_avg", "exp_avg_sq")},
            }

    def _pairs(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """Yields every trained tensor of the backend with TRL's parameter for it."""
        return zip(self.backend.leaves.values(), self.parameters.values(), strict=True)

    @torch.no_grad()
    def _load(self, leaves: dict[str, Tensor]) -> None:
        for leaf, parameter in self.parameters.items():
            parameter.copy_(_turned(leaves[leaf]))

    @torch.no_grad()
    def store(self) -> None:
        """Copies what TRL trained into the backend's policy, and its moments into the backend's optimizer."""
        for own, parameter in self._pairs():
            moments, found = self.backend.optimizer.state[own], self.optimizer.state[parameter]
            own.copy_(_turned(parameter))
            for name in ("exp_avg", "exp_avg_sq", "step"):
                moments[name].copy_(_turned(found[name]))
        self.backend.steps += len(self.watch.logged)

    # ---------------------------------------------------------------- an iteration

    def learn(self, state: State) -> tuple[State, list[Rollout], dict[str, float]]:
        """Trains for one iteration with TRL, as a `loop.Learn`: returns the next state, the rollouts and the metrics."""
        self.state, run = state, self.run
        context = loop.context_of(run, state, math.nan)
        if run.config.algorithm in SAMPLE:
            rollouts, found = self.sample_and_update(context)
            slots = run.algorithm.collect(run.config)
            self.state = self.state._replace(costs=loop.counted(run, self.queries, rollouts, slots, self.state.costs))
        else:
            self.state, rollouts = loop.collect(run, context, state)
            found = self.update(rollouts)
        self.store()
        self.count(rollouts)
        return self.state, rollouts, found | measures.summarise(rollouts, run)

    def update(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Takes the iteration's optimiser steps on the records' own answers, in the order of `steps.update`.

        Returns their metrics.
        """
        config = self.run.config
        parts = np.array_split(np.arange(len(rollouts)), -(-len(rollouts) // config.optimizer.batch_queries))
        groups = list(parts)
        for epoch in range(1, config.optimizer.epochs):
            order = np.random.default_rng([config.seed, self.state.iteration, epoch]).permutation(len(parts))
            groups += [parts[i] for i in order]
        self.run.session.progress.phase("update", len(groups))
        return self._train([_EXAMPLES[config.algorithm](rollouts[i]) for group in groups for i in group])

    def sample_and_update(self, context: Context) -> tuple[list[Rollout], dict[str, float]]:
        """Lets TRL sample from the iteration's queries and take its optimiser steps; returns rollouts and metrics."""
        run, config, iteration = self.run, self.run.config, self.state.iteration
        self.context = context
        self.queries = draw_queries(config, run.data.train, iteration)
        run.session.progress.phase("generate", 1)
        values = self._train([{"prompt": str(i)} for i in range(len(self.queries))])
        # the backend still has the policy that sampled
        return self.rollouts, values | steps.diagnose(run, self.rollouts[: config.eval.diagnostic_queries])

    def _train(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        from datasets import Dataset

        self.trainer.train_dataset = Dataset.from_list(rows)
        self.watch.logged.clear()
        # on this alone depends all noise from here on, of sampling and dropout: an iteration that is begun again is the same
        torch.manual_seed(np.random.SeedSequence([self.run.config.seed, self.state.iteration]).generate_state(1)[0])
        started, before = time.perf_counter(), sum(self.state.costs.seconds.values())
        self.trainer.train()
        elsewhere = sum(self.state.costs.seconds.values()) - before
        self.took("update", time.perf_counter() - started - elsewhere)  # with what TRL prepares
        logged, size = self.watch.logged, self.run.config.optimizer.batch_queries
        sizes = [size] * (len(logged) - 1) + [len(rows) % size or size]  # what is left is in the last step
        return steps.over_queries(logged, sizes) | {"lr": logged[-1]["lr"]}

    def count(self, rollouts: Sequence[Rollout]) -> None:
        """Adds to the state what the updates cost: tokens as `training.loop` counts them, operations as TRL does them."""
        config, parameters = self.run.config, self.run.base.parameters
        epochs = config.optimizer.epochs
        responses = sum(len(r.tokens) for rollout in rollouts for r in rollout.responses)
        trained = epochs * (responses + sum(len(rollout.prompt_tokens) for rollout in rollouts))
        # every response has the prompt to itself
        rows = responses + sum(len(rollout.prompt_tokens) * len(rollout.responses) for rollout in rollouts)
        moves = config.queries_per_iteration * epochs > config.optimizer.batch_queries  # before the last step
        compared = {  # how often log-probabilities are computed without a gradient
            "sft": 0, "dpo": epochs, "grpo": moves + (config.grpo.beta > 0), "rloo": 1 + (config.rloo.beta > 0),
        }[config.algorithm]  # fmt: skip
        flops = costs.update_flops(parameters, rows) * epochs + costs.forward_flops(parameters, rows) * compared
        self.state = self.state._replace(costs=self.state.costs.plus(training_tokens=trained, flops=flops))

    def took(self, phase: str, seconds: float) -> None:
        """Adds seconds of a phase to the state's costs."""
        self.state = self.state._replace(costs=self.state.costs.took(phase, seconds))

    # ---------------------------------------------------------------- what TRL asks for while it samples

    def prompt_ids(self, numbers: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of prompts as we make them. TRL knows prompts by their number in the iteration."""
        return [self.run.prompts.of(self.queries[int(i)], False)[1] for i in numbers]

    def score(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """Scores all responses of an iteration and writes their rollouts, as TRL's reward function.

        Raises:
            UserError: a reward is not finite, since TRL cannot leave a query out.
        """
        run, config = self.run, self.run.config
        run.session.progress.advance(1, tokens=sum(map(len, completion_ids)))
        count = len(completion_ids) // len(self.queries)
        groups = [completion_ids[i : i + count] for i in range(0, len(completion_ids), count)]
        started = time.perf_counter()
        sampled = [self._rollout(*of) for of in zip(self.queries, groups, strict=True)]
        scored = scoring.score(sampled, run.reward, run.session)
        if bad := [(rollout, r) for rollout in scored for r in rollout.responses if math.isnan(r.reward)]:
            raise UserError(
                f"reward {run.reward.name} is not finite for {len(bad)} responses, such as prompt"
                f" {bad[0][0].prompt[:80]!r}, response {bad[0][1].text[:80]!r}, and TRL leaves no query out:"
                f" {AGAIN}; or leave config.trainer at own, in another --workdir"
            )
        kept = scoring.transformed(scored, config.reward)
        journal = Journal(run.session.workdir / "rollouts", self.state.iteration)
        journal.complete(run.algorithm.label(kept, self.context))
        self.rollouts = read(journal.path)
        self.took("score", time.perf_counter() - started)
        run.session.progress.phase("update", len(self.queries) * config.optimizer.epochs // config.optimizer.batch_queries)
        return [r.score for rollout in self.rollouts for r in rollout.responses]

    def _rollout(self, query: Query, sampled: Sequence[Sequence[int]]) -> Rollout:
        run, task = self.run, self.run.config.task
        text, ids = run.prompts.of(query, False)
        how = {"prompt": text, "thinking": task.thinking, "chat": task.chat}
        shown = [prompts.answer(tokens, run.base.tokenizer, **how) for tokens in sampled]
        responses = (
            Response(tuple(tokens), tokens[-1] in run.base.eos, sample=i, text=shown[i]) for i, tokens in enumerate(sampled)
        )
        return Rollout(query.id, query.prompt, tuple(ids), tuple(responses), record=query.record)


class Watch(TrainerCallback):
    """A callback that stops training when that was asked for, and keeps each optimiser step's log under our loop's names."""

    NAMES = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr", "clip_ratio/region_mean": "clipped"}
    # not of IPO, where ours are of means over tokens
    DPO = {"rewards/accuracies": "reward_accuracy", "rewards/margins": "reward_margin"}

    def __init__(self, trl: Trl):
        self.trl = trl
        self.names = self.NAMES | (self.DPO if trl.run.config.dpo.loss == "sigmoid" else {})
        self.logged: list[dict[str, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.trl.run.session.stop.check()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.trl.run.session.stop.check()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" not in logs:  # the totals of one call of `train`
            return
        values = {ours: float(logs[theirs]) for theirs, ours in self.names.items() if theirs in logs}
        step, config = self.trl.state.step, self.trl.run.config
        self.logged.append(steps.check_finite(values, f"optimiser step {step}", values["lr"], "optimizer.lr", config))
        self.trl.state = self.trl.state._replace(step=step + 1)
        self.trl.run.session.progress.advance(1)


# ---------------------------------------------------------------- the model


def _peft_model(run: Run[Algorithm]) -> Any:
    """Returns transformers' model with an fp32 PEFT adapter for the same modules as the backend's.

    The values of that adapter do not matter yet.
    """
    from peft import LoraConfig, get_peft_model

    settings = adapters.settings(run.config)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, use_rslora=settings.rslora, use_dora=settings.dora,
        rank_pattern=dict(settings.rank_pattern), alpha_pattern=dict(settings.alpha_pattern),
        target_modules=list(dict.fromkeys(map(_module, run.backend.leaves))),  # whole paths: names could say too much
        lora_dropout=settings.dropout, fan_in_fan_out=run.base.transposed, task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(_base(run), config)


def _base(run: Run[Algorithm]) -> PreTrainedModel:
    """Returns the frozen base on the backend's device, with transformers' own attention.

    It has no dropout of its own, like the backend's.
    """
    loaded, own = backend.load(run.config), run.backend.model
    made = models.create(loaded.config, loaded.raw, dtype=own.dtype, device=own.device, ops=own.ops)
    models.fill(made, loaded.weights)
    backend.forget()  # the host's copy may go
    base = made.module
    base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
    for part in base.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0
    return base


_PEFT = {"a": "lora_A.default.weight", "b": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}


def _module(leaf: str) -> str:
    """Returns the path, in transformers' tree, of the module that a leaf belongs to."""
    return models.our_names(leaf.rpartition("/")[0])


def _turned(x: Tensor) -> Tensor:
    """Turns a tensor from our layout into PEFT's, or back: matrices are transposed."""
    return x.T if x.ndim == 2 else x


# ---------------------------------------------------------------- TRL's trainers


def _sft(rollout: Rollout) -> dict[str, Any]:
    prompt, tokens = list(rollout.prompt_tokens), list(rollout.responses[0].tokens)
    return {"input_ids": prompt + tokens, "labels": [-100] * len(prompt) + tokens}


def _dpo(rollout: Rollout) -> dict[str, Any]:
    rejected, chosen = (list(response.tokens) for response in rollout.responses)
    return {"prompt_ids": list(rollout.prompt_tokens), "chosen_ids": chosen, "rejected_ids": rejected}


_EXAMPLES: dict[str, Callable[[Rollout], dict[str, Any]]] = {"sft": _sft, "dpo": _dpo}  # rows of TRL's data, as tokens


class _Ours:
    """A mixin that overrides parts of TRL's trainers: data come as tokens, and nothing is sent anywhere."""

    ours: Trl

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _send_telemetry(self) -> None:
        pass

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return self.ours.prompt_ids(prompts), None, {}

    def _generate(self, prompts: list[str]) -> Any:
        started = time.perf_counter()
        generated = super()._generate(prompts)  # type: ignore[misc]
        self.ours.took("generate", time.perf_counter() - started)
        return generated


def trainer(run: Run[Algorithm], model: Any, optimizers: tuple[Any, Any], ours: Trl) -> Any:
    """Makes TRL's trainer for the config's algorithm. It starts with one placeholder row; each iteration sets its data."""
    import trl
    from datasets import Dataset

    config, name, cpu = run.config, run.config.algorithm, run.backend.model.device.type == "cpu"
    if run.base.tokenizer.eos_token_id is None:
        raise UserError(f"config.trainer is 'trl', which needs a tokenizer with an EOS token; {run.base.name}'s has none")
    if name in SAMPLE and run.backend.model.config.family == "gpt2":
        raise UserError(
            f"config.trainer is 'trl', whose {name} counts the padding before a prompt among the positions that GPT-2 has"
            " learned: take another model, or leave trainer at own"
        )
    kind = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "grpo": trl.GRPOTrainer, "rloo": trl.RLOOTrainer}[name]
    settings = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig}[name]
    args = settings(
        **_options(config, run.base.eos),
        gradient_accumulation_steps=config.optimizer.batch_queries // config.optimizer.micro_queries,
        max_grad_norm=config.optimizer.clip_norm, num_train_epochs=1, seed=config.seed,
        use_cpu=cpu, dataloader_pin_memory=not cpu,
        bf16=False,  # no mixed precision: config.model.dtype is the base's and the activations'
        activation_checkpointing=config.model.remat != "none", router_aux_loss_coef=0.0,
        output_dir=str(run.session.workdir), save_strategy="no", report_to="none", disable_tqdm=True,  # nothing is written
        logging_steps=1, logging_nan_inf_filter=False,  # `Watch` looks at every step
    )  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # the backend's device: TRL refuses to run where a process sees several
    kind = type(kind.__name__, (_Ours, kind), {})
    blank = Rollout("", "", (0,), (Response((0,), True),) * 2)
    made = kind(
        model=model,
        args=args,
        train_dataset=Dataset.from_list([_EXAMPLES[name](blank) if name in _EXAMPLES else {"prompt": ""}]),
        processing_class=copy.deepcopy(run.base.tokenizer),  # which gets a padding token, if it has none
        optimizers=optimizers,
        callbacks=[ours.watch],
        **({"reward_funcs": ours.score} if name in SAMPLE else {}),
    )
    made.remove_callback(PrinterCallback)
    made.ours, made.eos_token_ids = ours, list(run.base.eos)
    return made


def _options(config: Any, eos: Sequence[int]) -> dict[str, Any]:
    """Returns a config's settings of its algorithm as options of TRL's."""
    name, micro = config.algorithm, config.optimizer.micro_queries
    if name not in SAMPLE:
        pairs = {"loss_type": [config.dpo.loss], "beta": config.dpo.beta} if name == "dpo" else {}
        order = {"train_sampling_strategy": "sequential", "max_length": None}
        return {"per_device_train_batch_size": micro, **order, **pairs}
    own, how = config[name], config.sampling
    options = {
        "per_device_train_batch_size": micro * own.samples, "num_generations": own.samples, "beta": own.beta,
        # all of an iteration is sampled before its first step, and then trained on so many times
        "steps_per_generation": config.queries_per_iteration // micro, "num_iterations": config.optimizer.epochs,
        "shuffle_dataset": False,
        "max_completion_length": how.max_new_tokens, "temperature": how.temperature, "top_k": how.top_k,
        "top_p": how.top_p, "min_p": how.min_p or None,
        "generation_kwargs": {"eos_token_id": list(eos) or None},  # TRL would add the tokenizer's
    }  # fmt: skip
    if name == "rloo":
        return {**options, "epsilon": own.clip, "normalize_advantages": False}
    return {
        **options, "epsilon": own.clip_low, "epsilon_high": own.clip_high, "loss_type": own.loss,
        "scale_rewards": "none" if own.loss == "dr_grpo" else "group",
        "use_bias_correction_kl": False,  # the KL as in the GRPO paper and in ours
    }  # fmt: skip
