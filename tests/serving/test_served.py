"""Roll-outs by a server: whole runs through one that speaks vLLM's API, and what happens when it does not do its part."""

import itertools
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from patience import LAST_RESORT
from test_loop import rollouts, train
from vllm_server import Loaded, Sampler, Vllm, noise

from configs import tiny as tiny_config
from ple_jax import modes
from ple_jax.backend import backend, generate, lora
from ple_jax.core.config import validate
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_sealed
from ple_jax.core.types import Response, Sampling
from ple_jax.models import adapters, peft
from ple_jax.serving import protocol, served

EOS = 256
SAMPLING = Sampling(6, (EOS,))
PROMPTS = [(1, 2, 3), (4, 5), (6,), (7, 8, 9, 10), (11,), (12, 13), (14,), (15,)]
UNIFORMS = np.random.default_rng(0).random((len(PROMPTS), 6), np.float32)


@pytest.fixture
def vllm(monkeypatch):
    """Starts servers; they end with the test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(sample: Sampler = noise, **options) -> Vllm:
        server = Vllm(sample, **options)
        servers.append((server, thread := threading.Thread(target=server.serve_forever, args=(0.01,))))
        thread.start()
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


class Policy:
    """A backend of which a test changes the adapter."""

    def __init__(self):
        self.tensors = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": np.zeros(shape, np.float32)
                        for side, shape in {"A": (8, 32), "B": (32, 8)}.items()}  # fmt: skip
        self.updates = []

    def adapter(self):
        return self.tensors

    def update(self, batches, loss, **how):
        self.updates.append((batches, loss, how))
        self.tensors = {name: tensor + np.float32(how["lr"]) for name, tensor in self.tensors.items()}
        return {"loss": 0.0, "grad_norm": 0.0}

    def restore(self, path):
        self.tensors = {name: np.full_like(tensor, float(path.name)) for name, tensor in self.tensors.items()}
        return {}

    def logprobs(self, batch, **how):
        return batch, how

    def environment(self):
        return {"python": "3.11"}


def connect(server: Vllm | str, folder: Path, inner=None, *, retries=1, log=print, **options):
    """A policy, and the backend that samples from it by a server."""
    config = tiny_config.get_config()
    config.sampling.server = server if isinstance(server, str) else server.url
    for name in list(options):
        if name in config.sampling:
            setattr(config.sampling, name, options.pop(name))
    inner = inner or Policy()
    backend = served.connect(
        FrozenConfigDict(config), inner, folder=folder / "serving", base_model="tiny", vocab=258, transposed=False, log=log
    )
    backend.server.patience = backend.server.patience._replace(retries=retries, backoff=0.001)
    return inner, backend


def sample(backend, prompts=PROMPTS, uniforms=UNIFORMS, sampling=SAMPLING, prefix=()):
    return backend.generate(prompts, uniforms[:, : sampling.max_new_tokens], sampling=sampling, prefix=prefix)


# ---------------------------------------------------------------- whole runs


def policy(config) -> object:
    """A sampler that computes what the adapter in the served folder, on the tiny model, would say."""
    loaded = backend.load(config)
    built = backend.build(config, loaded)
    fused: dict[str, object] = {}
    lock = threading.Lock()  # or the first requests would compile at once

    greedy, noise = Sampling(8, (EOS,), temperature=0.0), np.zeros(8, np.float32)

    def draw(adapter: Loaded, body):
        assert body["temperature"] == 0
        with lock:
            if adapter.digest not in fused:
                settings = adapters.settings(config)
                read = adapters.read(adapter.path, loaded.config, settings)
                fused[adapter.digest] = lora.fuse(built.model, read, settings)
            prompt, policy = np.array(body["prompt"], np.int32), (built.model, built.base, fused[adapter.digest])
            return iter(list(generate.stream(*policy, prompt, noise, sampling=greedy)))

    return draw


def responses(workdir: Path) -> dict[str, list]:
    return {
        str(file.relative_to(workdir)): [[r["tokens"], r["finished"]] for line in file.read_text().splitlines()
                                         for r in json.loads(line)["responses"]]
        for kind in ("rollouts", "evaluations") for file in sorted((workdir / kind).iterdir())
    }  # fmt: skip


@pytest.mark.slow
def test_a_greedy_run_is_the_one_in_process(vllm, tmp_path):
    """The same tokens, hence the same weights to the last bit: every iteration samples from the adapter of that moment."""
    greedy = {"iterations": 2, "sampling.temperature": 0.0, "ple.tau_0": 0.0, "checkpoint.use": "newest"}
    ours = train(tmp_path / "process", **greedy)
    server = vllm(policy(FrozenConfigDict(tiny_config.get_config())))
    theirs = train(tmp_path / "server", **greedy, **{"sampling.server": server.url})
    found = responses(tmp_path / "process")
    assert responses(tmp_path / "server") == found
    changed = [found["evaluations/iter_0000.jsonl"][::2], found["evaluations/iter_0002.jsonl"]]
    assert changed[0] != changed[1]  # of the plain prompts: training changed what is sampled
    assert [line["heldout_reward"] for line in theirs] == [line["heldout_reward"] for line in ours]
    kl = [[line["heldout_kl_response"] for line in lines] for lines in (ours, theirs)]
    assert kl[1] == pytest.approx(kl[0], rel=1e-3, abs=1e-5) and kl[0][2] > 1e-3
    a, b = ((tmp_path / name / "adapter" / peft.WEIGHTS).read_bytes() for name in ("process", "server"))
    assert a == b
    assert list(dict.fromkeys(server.used)) == sorted(set(server.used), key=server.used.index)  # never an old one again
    assert len(set(server.used)) == 3  # at the start, and after every iteration
    last = Loaded(tmp_path, *peft.read(tmp_path / "server" / "adapter"))
    assert server.used[-1] == last.digest
    assert not server.registry and not (tmp_path / "server" / "serving").exists()
    assert json.loads((tmp_path / "server" / "environment.json").read_text())["vllm"] == "0.23.0"


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_adapter_of_its_checkpoint(vllm, tmp_path, monkeypatch):
    server = vllm()
    train(tmp_path / "whole", iterations=2, **{"sampling.server": server.url})
    whole, server.used[:] = list(server.used), []

    def close(backend):
        """A process that is killed does not get to this."""

    with monkeypatch.context() as patch:
        patch.setattr(served.Served, "close", close)
        served_update = served.Served.update

        def update(backend, *args, **kwargs):
            if len(set(server.used)) == 2:  # inside the update of iteration 1
                raise Killed
            return served_update(backend, *args, **kwargs)

        patch.setattr(served.Served, "update", update)
        with pytest.raises(Killed):
            train(tmp_path / "run", iterations=2, **{"sampling.server": server.url})
    assert len(server.registry) == 1 and len(list((tmp_path / "run" / "serving").iterdir())) == 1
    before = len(server.used)
    train(tmp_path / "run", iterations=2, **{"sampling.server": server.url})
    assert responses(tmp_path / "run") == responses(tmp_path / "whole")
    for name in ("adapter/adapter_model.safetensors", "rollouts/iter_0001.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert 0 < before < len(whole) and server.used == whole  # nothing that was finished is sampled again
    assert not server.registry


def test_a_server_that_is_gone_costs_no_rollouts(vllm, tmp_path, monkeypatch):
    """The run stops with a line; the same command, and another server at another address, go on."""
    monkeypatch.setattr(served, "PATIENCE", served.PATIENCE._replace(backoff=0.001))
    first, second = vllm(), vllm(version="0.24.0")
    first.fault = lambda path, body: "hang up" if len(first.used) >= 40 else None
    with pytest.raises(UserError, match=f"{first.url}/v1/.*same command again"):
        train(tmp_path, iterations=2, **{"sampling.server": first.url})
    lines = train(tmp_path, iterations=2, **{"sampling.server": second.url + "/v1/"})
    total = sum(map(len, responses(tmp_path).values()))
    # all 40 but the unit in hand, of at most 8, were kept
    assert len(lines) == 3 and total - 40 <= len(second.used) <= total - 32
    with pytest.raises(UserError, match="belongs to another config, differing in sampling.server;"):
        train(tmp_path, iterations=2)
    assert json.loads((tmp_path / "config.json").read_text())["sampling"]["server"] == "vllm"
    # how it is asked is no part of the run
    train(tmp_path, iterations=2, **{"sampling.server": second.url, "sampling.server_sleep": True})


def test_likelihoods_are_the_trainers_whatever_a_server_says_of_its_tokens(vllm, tmp_path):
    config = tiny_config.get_config()
    config.sinks, config.generate.policy, config.generate.max_queries, config.sampling.server = (), "start", 2, vllm().url
    assert modes.generate(FrozenConfigDict(config), tmp_path, "torch") == 0
    lines = read_sealed(tmp_path / "responses" / "start" / "iter_0000.scores.jsonl", remedy="")
    assert len(lines) == 2
    for line in lines:  # policy and base are one model
        assert line["logprob"] == pytest.approx(line["base_logprob"])
        assert line["kl"] == pytest.approx([0.0] * 4, abs=1e-6)


@pytest.mark.slow
def test_a_finished_run_needs_no_server(vllm, tmp_path):
    server = vllm()
    train(tmp_path, **{"sampling.server": server.url})
    config = tiny_config.get_config()
    config.sinks, config.iterations, config.sampling.server = (), 1, "http://127.0.0.1:9"
    (tmp_path / "adapter" / peft.WEIGHTS).unlink()
    assert modes.export(FrozenConfigDict(config), tmp_path, "torch") == 0
    assert (tmp_path / "adapter" / peft.WEIGHTS).exists()


def test_what_no_server_can_serve_is_refused_first(tmp_path):
    wrong = {"lora.dora": True, "lora.rank_pattern": (("q_proj", 4),), "lora.alpha_pattern": (("q_proj", 1.0),)}
    for key, value in wrong.items():
        with pytest.raises(UserError, match=f"config.{key} is .* vLLM serves no .*unset it or config.sampling.server"):
            train(tmp_path, **{key: value, "sampling.server": "http://127.0.0.1:9"})
    with pytest.raises(UserError, match="algorithm 'reward' samples nothing .*unset it"):
        train(tmp_path, algorithm="reward", **{"sampling.server": "http://127.0.0.1:9"})
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://a:b", "http://a?x=1", 8000, ""])
def test_addresses_that_are_none(url):
    config = tiny_config.get_config()
    with config.ignore_type():
        config.sampling.server = url
    with pytest.raises(UserError, match="config.sampling.server is .* must be unset or the address of a server, http"):
        validate(config)


def test_settings_of_a_server():
    config = tiny_config.get_config()
    for url in ("http://localhost:8000", "https://[::1]:8000/v1", "http://vllm.example/a/"):
        config.sampling.server = url
        validate(config)
    config.sampling.server = "http://me:secret@host"
    with pytest.raises(UserError, match="without a user name: .* as sampling.server_key_env"):
        validate(config)
    config.sampling.server, config.sampling.server_key_env = None, "no name"
    with pytest.raises(UserError, match="config.sampling.server_key_env is 'no name' .*environment variable"):
        validate(config)


def test_the_module_stands_alone():
    """Importing it first works, and imports neither jax nor torch."""
    code = "import sys; from ple_jax.serving import served; print([m for m in ('jax', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.stdout, done.stderr) == ("[]\n", "")


# ---------------------------------------------------------------- requests


def test_the_server_is_asked_for_log_probabilities(vllm, tmp_path):
    """Of every token that it sampled; where it says nothing, or not of all, there are none."""
    server = vllm()
    _, backend = connect(server, tmp_path)
    found = sample(backend)
    assert all(r.logprobs == tuple(-(token % 7) / 4 for token in r.tokens) for r in found)
    for said in (None, {"token_logprobs": None}, {"token_logprobs": [-1.0]}, {"token_logprobs": [None] * 6}, [1]):
        server.alter = lambda choice, body, said=said: choice.update(logprobs=said)
        again = sample(backend)
        assert [r.tokens for r in again] == [r.tokens for r in found]
        assert all(r.logprobs == () for r in again if len(r.tokens) > 1)


def test_requests_say_everything(vllm, tmp_path):
    server = vllm()
    _, backend = connect(server, tmp_path)
    sampling = Sampling(6, (EOS, 9), temperature=0.7, top_k=50, top_p=0.9, min_p=0.05)
    sample(backend, [[90, 91, *PROMPTS[0]]], UNIFORMS[:1], sampling, prefix=(90, 91))
    (body,) = server.bodies()
    assert body == {
        "model": next(iter(server.registry)), "prompt": [90, 91, 1, 2, 3], "max_tokens": 6, "temperature": 0.7, "top_k": 50,
        "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "stop_token_ids": [EOS, 9], "ignore_eos": True, "seed": protocol.seed(UNIFORMS[0]), "return_token_ids": True,
        "logprobs": 0,
    }  # fmt: skip
    assert backend.generate([], UNIFORMS[:0], sampling=sampling) == []
    assert backend.environment() == {"python": "3.11", "vllm": "0.23.0"}


def test_a_response_depends_on_its_noise_and_not_on_its_place(vllm, tmp_path):
    server = vllm()
    _, backend = connect(server, tmp_path)
    whole = sample(backend)
    order = [5, 2, 7, 0]
    assert sample(backend, [PROMPTS[i] for i in order], UNIFORMS[order]) == [whole[i] for i in order]
    other = sample(backend, uniforms=1 - UNIFORMS)
    assert all(a != b for a, b in zip(whole, other, strict=True))
    greedy = SAMPLING._replace(temperature=0.0)
    assert sample(backend, sampling=greedy) == sample(backend, uniforms=1 - UNIFORMS, sampling=greedy)


def test_seeds():
    rows = np.random.default_rng(1).random((2000, 8), np.float32)
    seeds = [protocol.seed(row) for row in rows]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**53 for s in seeds) and max(seeds) > 2**52
    assert protocol.seed(rows[0]) == protocol.seed(np.asfortranarray(rows)[0]) == protocol.seed(rows[0].astype(">f4"))
    assert json.loads(json.dumps(float(seeds[0]))) == seeds[0]
    assert protocol.seed(np.zeros(2, np.float32)) == 872502092594497  # by b2sum -l 64: it must not change


def test_requests_are_under_way_at_once_but_no_more(vllm, tmp_path):
    server = vllm()
    _, backend = connect(server, tmp_path, width=3)
    together = threading.Barrier(3, timeout=LAST_RESORT)
    prompts = [*PROMPTS, (16,)]

    def waits(path, body):
        if path == "/v1/completions":
            together.wait()  # for two others

    server.fault = waits
    noise = np.random.default_rng(2).random((9, 6), np.float32)
    found = sample(backend, prompts, noise)
    assert server.most == 3 and len(found) == 9
    server.fault = lambda path, body: time.sleep(0.02 * (body["prompt"][0] % 3)) if body else None
    assert sample(backend, prompts, noise) == found  # in order, however late each was


# ---------------------------------------------------------------- EOS, and answers that are none


def answer(**choice) -> bytes:
    return json.dumps({"choices": [{"finish_reason": "stop", "stop_reason": None, **choice}]}).encode()


@pytest.mark.parametrize(
    ("choice", "tokens", "finished"),
    [
        ({"token_ids": [5, EOS], "stop_reason": EOS}, (5, EOS), True),
        ({"token_ids": [5, EOS]}, (5, EOS), True),  # vLLM's own EOS has no stop_reason
        ({"token_ids": [5], "stop_reason": EOS}, (5, EOS), True),  # kept to itself
        ({"token_ids": [], "stop_reason": 9}, (9,), True),
        ({"token_ids": [EOS], "stop_reason": EOS}, (EOS,), True),
        ({"token_ids": [5, 9], "stop_reason": 9}, (5, 9), True),  # the other EOS
        ({"token_ids": [1, 2, 3, 4], "finish_reason": "length"}, (1, 2, 3, 4), False),
        ({"token_ids": [1, 2, 3, EOS], "finish_reason": "length"}, (1, 2, 3, EOS), True),  # sampled as the last
        ({"token_ids": [1, EOS, 3, 4], "finish_reason": "length"}, (1, EOS), True),  # it did not stop there
        ({"token_ids": [1, 2, 3, EOS], "stop_reason": EOS}, (1, 2, 3, EOS), True),
    ],
    ids=str,
)
def test_eos_is_the_last_token_if_it_was_sampled(choice, tokens, finished):
    assert protocol.response(answer(**choice), eos=(EOS, 9), limit=4, vocab=258) == Response(tokens, finished)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (answer(token_ids=[5], stop_reason=13), "stopped at 13, which is no EOS of this run .256, 9.*--generation-config"),
        (answer(token_ids=[5], stop_reason="\n"), r"stopped at '\\n'"),
        (answer(token_ids=[5, 6], finish_reason="length"), "sampled 2 of 4 tokens and no EOS: .*max-model-len"),
        (answer(token_ids=[5] * 5, finish_reason="length"), "sampled 5 of 4 tokens"),
        (answer(token_ids=[5] * 4 + [EOS]), "sampled 5 of 4 tokens"),
        (answer(token_ids=[5, 300, EOS]), "sampled token 300 of 258: it serves another base model"),
        (answer(token_ids=[-1, EOS]), "another base model"),
        (answer(text="abc"), "no token_ids: vLLM has them since 0.10.2"),
        (answer(token_ids=None), "no token_ids"),
        (answer(token_ids=[], finish_reason="length"), "the completion is empty"),
        (answer(token_ids=[float("nan")], finish_reason="length"), r"token_ids are no token ids: \[nan\]"),
        (answer(token_ids=[1.0]), "no token ids"),
        (answer(token_ids=[True]), "no token ids"),
        (answer(token_ids="5"), "no token ids"),
        (answer(token_ids=[5], finish_reason="abort"), "ended with finish_reason 'abort'"),
        (answer(token_ids=[5], finish_reason=None), "ended with finish_reason None"),
        (b'{"choices": []}', "this is no completion: {'choices': "),
        (b'{"choices": [5]}', "this is no completion"),
        (b'{"object": "error"}', "this is no completion"),
        (b"[]", "this is no completion"),
        (b"", "JSONDecodeError"),
        (b"<html>", "JSONDecodeError"),
    ],
    ids=itertools.count(),
)
def test_answers_that_are_none(content, says, vllm, tmp_path):
    server = vllm()
    _, backend = connect(server, tmp_path, retries=1)
    server.fault = lambda path, body: (200, content.decode()) if path == "/v1/completions" else None
    with pytest.raises(UserError, match=rf"^{server.url}/v1/completions: .*{says}.*same command again: what was sampled is"):
        sample(backend, sampling=Sampling(4, (EOS, 9)))


# ---------------------------------------------------------------- adapters


def test_the_adapter_changes_with_update_and_restore(vllm, tmp_path):
    server = vllm()
    inner, backend = connect(server, tmp_path)
    digests, names = [], []
    for change in (lambda: None, lambda: backend.update([], None, lr=0.5), lambda: None, lambda: backend.restore(Path("7")),
                   lambda: backend.update([], None, lr=0.0)):  # fmt: skip
        change()
        sample(backend)
        assert set(server.used[-len(PROMPTS) :]) == {Loaded(tmp_path, inner.tensors, {}).digest}  # the weights as they are
        (name,) = server.registry
        assert server.engine == [name] == [p.name for p in (tmp_path / "serving").iterdir()]
        digests.append(server.used[-1])
        names.append(name)
    assert [a == b for a, b in zip(digests, digests[1:], strict=False)] == [False, True, False, True]
    assert [a == b for a, b in zip(names, names[1:], strict=False)] == [False, True, False, True]  # a name is its weights
    assert len(server.bodies("/v1/load_lora_adapter")) == 3  # none is loaded twice
    adapter = server.registry[name]
    assert adapter.config["base_model_name_or_path"] == "tiny" and adapter.config["r"] == 8
    assert adapter.config["target_modules"] == ["q_proj"] and adapter.path.is_absolute()
    backend.close()
    assert not server.registry and not (tmp_path / "serving").exists()


def test_old_weights_that_come_back_have_their_old_name(vllm, tmp_path):
    """Which is why it may be used again: what the server kept under it is theirs."""
    server = vllm()
    inner, backend = connect(server, tmp_path)
    first = sample(backend)
    old = inner.tensors
    backend.update([], None, lr=0.5)
    second = sample(backend)
    backend.update([], None, lr=0.0)
    inner.tensors = old
    assert sample(backend) == first != second
    assert server.used[-1] == server.used[0]


def test_other_runs_and_other_adapters_are_left_alone(vllm, tmp_path):
    server = vllm()
    _, one = connect(server, tmp_path / "one")
    _, two = connect(server, tmp_path / "two")
    server.registry["theirs"] = Loaded(tmp_path, {}, {})
    a, b = sample(one), sample(two)
    assert a == b and len(server.registry) == 3  # the same weights, under a name for each
    server.engine = list(server.registry)
    one.close()
    assert len(server.registry) == 2 and "theirs" in server.registry
    assert sample(two) == b


def test_a_server_that_was_started_anew_gets_the_adapter_again(vllm, tmp_path):
    server = vllm()
    _, backend = connect(server, tmp_path)
    first = sample(backend)
    server.registry.clear()
    assert sample(backend) == first
    server.fault = lambda path, body: server.registry.clear() if path == "/v1/completions" else None
    with pytest.raises(UserError, match="status 404: .*does not exist.*the adapter is gone: was the server started again"):
        sample(backend)


def test_an_adapter_that_was_loaded_and_not_confirmed(vllm, tmp_path):
    server = vllm()
    _, backend = connect(server, tmp_path)

    def loses_the_answer(path, body):
        if path == "/v1/load_lora_adapter" and not server.registry:
            server.load(body["lora_name"], Path(body["lora_path"]))
            return "hang up"
        return None

    server.fault = loses_the_answer
    assert len(sample(backend)) == len(PROMPTS)
    assert server.paths("/v1/load_lora_adapter") == ["/v1/load_lora_adapter"] * 2  # of which the second was refused


def test_weights_that_are_not_finite_are_not_served(vllm, tmp_path):
    server = vllm()
    inner, backend = connect(server, tmp_path)
    inner.tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][3, 3] = np.nan
    with pytest.raises(UserError, match="the adapter is not finite .*q_proj.lora_B.weight.*lower"):
        sample(backend)
    assert server.paths("/v1/load_lora_adapter", "/v1/completions") == []


def test_a_server_of_another_model_is_said_once(vllm, tmp_path):
    for base, warned in {"someone/Tiny": 0, "/models/tiny": 0, "llama": 1}.items():
        server, said = vllm(base=base), []
        _, backend = connect(server, tmp_path, log=said.append)
        sample(backend)
        sample(backend)
        assert len(said) == warned
    assert said == [f"warning: {server.url} serves llama, and this run trains tiny: both must be the same weights"]


def test_all_but_sampling_is_asked_of_the_other_backend_as_it_was_asked(vllm, tmp_path):
    inner, backend = connect(vllm(), tmp_path)
    how = {"reference": True, "base": True, "temperature": 0.7, "entropy": True}
    assert backend.logprobs("batch", **how) == ("batch", how)
    backend.update(["batch"], "loss", lr=0.5, temperature=0.7)
    assert inner.updates == [(["batch"], "loss", {"lr": 0.5, "temperature": 0.7})]


# ---------------------------------------------------------------- sleep


def test_the_server_sleeps_while_something_is_computed_here(vllm, tmp_path):
    server = vllm()
    inner, backend = connect(server, tmp_path, server_sleep=True)
    assert backend.logprobs("batch")[0] == "batch" and server.asleep
    first = sample(backend)
    assert sample(backend) == first and not server.asleep  # nothing in between: it stays awake
    backend.update([], None, lr=0.5)
    backend.logprobs("batch")
    assert server.asleep and len(inner.updates) == 1
    assert sample(backend) != first
    assert server.paths("/sleep", "/wake_up") == ["/sleep", "/wake_up", "/sleep", "/wake_up"]
    backend.update([], None, lr=0.5)
    backend.close()
    assert not server.asleep and not server.registry


@pytest.mark.slow
def test_a_whole_run_with_a_server_that_sleeps(vllm, tmp_path):
    server = vllm()
    awake = train(tmp_path / "awake", **{"sampling.server": server.url})
    assert server.paths("/sleep", "/wake_up") == []
    slept = train(tmp_path / "slept", **{"sampling.server": server.url, "sampling.server_sleep": True})
    assert rollouts(tmp_path / "slept") == rollouts(tmp_path / "awake")
    assert [line["heldout_reward"] for line in slept] == [line["heldout_reward"] for line in awake]
    assert server.paths("/sleep", "/wake_up")[:2] == ["/wake_up", "/sleep"] and not server.asleep


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loading": False}, "load_lora_adapter: .*404.*it does not load adapters: start it with"
         " VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora --max-lora-rank 8"),
        ({"max_lora_rank": 0}, "LoRA is not enabled.*on the run's base model, with VLLM_ALLOW.*--enable-lora"),
        ({"max_lora_rank": 4}, "LoRA rank 8 is greater than max_lora_rank 4.*--max-lora-rank 8"),
        ({"key": "sesame"}, "401: .*name the environment variable with its key, --config.sampling.server_key_env=NAME"),
        ({"max_model_len": 9}, "takes 9 tokens, and the longest prompt and its response are 10: .*--max-model-len 10 or"),
        ({"dev": False}, "wake_up: .*404.*VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode, or unset .*server_sleep"),
    ],
    ids=str,
)  # fmt: skip
def test_servers_that_were_started_without_something(options, says, vllm, tmp_path):
    server = vllm(**options)
    _, backend = connect(server, tmp_path, server_sleep="dev" in options)
    with pytest.raises(UserError, match=rf"^{server.url}.*{says}.*and give the same command again"):
        sample(backend)
    assert server.bodies() == []


def test_a_folder_that_the_server_does_not_see(vllm, tmp_path):
    server = vllm()
    _, backend = connect(server, tmp_path)
    sample(backend)
    server.registry.clear()
    (written,) = (tmp_path / "serving").iterdir()
    shutil.rmtree(written)
    with pytest.raises(UserError, match=f"No adapter found for .*it does not see {tmp_path}/serving: run it on this"):
        sample(backend)


def test_nobody_there(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        _, backend = connect(url, tmp_path)
        for ask in (lambda: sample(backend), backend.environment):
            with pytest.raises(UserError, match=f"^{url}/.*refused.*see that vLLM runs there .*same command again"):
                ask()
        backend.close()


def test_keys_come_from_the_environment(vllm, tmp_path, monkeypatch):
    server = vllm(key="sesame")
    with pytest.raises(UserError, match="server_key_env: the environment variable 'MY_KEY' is not set"):
        connect(server, tmp_path, server_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "sesame\n")
    _, backend = connect(server, tmp_path, server_key_env="MY_KEY")
    assert len(sample(backend)) == len(PROMPTS)
    server.fault = lambda path, body: (400, "no sesame here") if path == "/v1/completions" else None
    with pytest.raises(UserError, match=r"status 400: no \*\*\* here"):
        sample(backend)


@pytest.mark.parametrize("fault", [(500, "EngineCore"), (503, ""), (429, "busy"), (200, "{"), "hang up"], ids=str)
@pytest.mark.parametrize("where", ["/v1/completions", "/v1/models", "/version", "/v1/load_lora_adapter"])
def test_faults_that_pass(fault, where, vllm, tmp_path):
    if (fault, where) == ((200, "{"), "/v1/load_lora_adapter"):
        fault = (502, "")  # it answers in words, of which any will do
    server = vllm()
    _, backend = connect(server, tmp_path)
    expected, version = sample(backend), backend.environment()
    _, backend = connect(server, tmp_path / "again")
    left = [fault]
    server.fault = lambda path, body: left.pop() if path == where and left else None
    assert sample(backend) == expected and backend.environment() == version and not left


def test_faults_that_stay_end_all(vllm, tmp_path):
    """The first failure is told, and nothing more is asked."""
    server = vllm()
    _, backend = connect(server, tmp_path, width=1, retries=2)
    bad = {7}
    server.fault = lambda path, body: (500, "EngineCore died") if body and bad & set(body.get("prompt", ())) else None
    with pytest.raises(UserError, match="status 500: EngineCore died; see that vLLM runs there"):
        sample(backend)
    asked = [body["prompt"] for body in server.bodies()]
    assert asked == [[1, 2, 3], [4, 5], [6], *[[7, 8, 9, 10]] * 3]
    bad.clear()
    assert len(sample(backend)) == len(PROMPTS)  # and it is of use again


def test_a_refusal_is_told_at_once(vllm, tmp_path):
    server = vllm()
    _, backend = connect(server, tmp_path, width=1, retries=5)
    server.fault = lambda path, body: (400, "min_p is not supported") if path == "/v1/completions" else None
    with pytest.raises(UserError, match="status 400: min_p is not supported; mend that, and give the same command again"):
        sample(backend)
    assert len(server.bodies()) == 1


def test_the_end_of_a_run_does_not_wait_for_a_server_that_is_gone(vllm, tmp_path):
    server, said = vllm(), []
    _, backend = connect(server, tmp_path, log=said.append, retries=50)
    sample(backend)
    server.fault = lambda path, body: "hang up"
    started = time.monotonic()
    backend.close()
    assert time.monotonic() - started < 60 and "may still be loaded" in said[0]
    assert not (tmp_path / "serving").exists()
