"""Several servers: requests spread by load, an adapter everywhere, and what happens when one of them dies."""

import threading
from collections import Counter

import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from test_served import PROMPTS, SAMPLING, UNIFORMS, Policy, sample, vllm  # noqa: F401
from vllm_server import noise

from configs import tiny as tiny_config
from ple_jax.core.config import validate
from ple_jax.core.errors import UserError
from ple_jax.serving import served


def connect(servers, folder, log=print, **options):
    config = tiny_config.get_config()
    config.sampling.server = tuple(server if isinstance(server, str) else server.url for server in servers)
    for name, value in options.items():
        setattr(config.sampling, name, value)
    validate(config)
    backend = served.connect(
        FrozenConfigDict(config), Policy(), folder=folder / "serving", base_model="tiny", vocab=258, transposed=False,
        log=log,
    )  # fmt: skip
    backend.server.patience = backend.server.patience._replace(retries=1, backoff=0.001)
    return backend


def completions(server) -> int:
    return len(server.bodies())


def test_requests_are_spread_and_answered_as_by_one(vllm, tmp_path):  # noqa: F811
    alone = sample(connect([vllm()], tmp_path / "one"))
    servers = [vllm(), vllm(), vllm()]
    backend = connect(servers, tmp_path / "three", width=6)
    assert sample(backend) == alone
    counts = [completions(server) for server in servers]
    assert sum(counts) == len(PROMPTS) and min(counts) >= 1
    backend.close()
    assert all(not server.registry for server in servers)
    assert not backend.server.folder.exists()


def test_a_slow_server_gets_fewer(vllm, tmp_path):  # noqa: F811
    wait = threading.Event()

    def slow(adapter, body):
        wait.wait(0.3)
        return noise(adapter, body)

    servers = [vllm(slow), vllm()]
    backend = connect(servers, tmp_path, width=2)
    prompts = [(i,) for i in range(1, 41)]
    uniforms = np.random.default_rng(1).random((40, 6), np.float32)
    found = backend.generate(prompts, uniforms, sampling=SAMPLING)
    assert len(found) == 40 and completions(servers[0]) < 15 < completions(servers[1])


def test_the_adapter_is_everywhere_before_sampling_begins(vllm, tmp_path):  # noqa: F811
    servers = [vllm(), vllm()]
    backend = connect(servers, tmp_path)
    sample(backend)
    backend.update([], None, lr=0.5)
    sample(backend)
    for server in servers:
        paths = server.paths("/v1/load_lora_adapter", "/v1/completions")
        assert paths[0] == "/v1/load_lora_adapter" and paths.count("/v1/load_lora_adapter") == 2
        assert len(server.registry) == 1 and server.used[0] != server.used[-1]
    assert [*servers[0].registry] == [*servers[1].registry]
    assert {*servers[0].used} == {*servers[1].used}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_server_that_dies_is_left_out(when, vllm, tmp_path):  # noqa: F811
    """None of its requests is lost, none is answered twice."""
    alone = sample(connect([vllm()], tmp_path / "one"))
    dying, other = vllm(), vllm()
    answered = Counter()
    said: list[str] = []
    backend = connect([dying, other], tmp_path / "two", log=said.append, width=4)
    dying.fault = lambda path, body: "hang up" if when == "before" or path == "/v1/completions" else None
    found = backend.generate(PROMPTS, UNIFORMS, sampling=SAMPLING, tell=lambda ended: answered.update(ended.keys()))
    assert found == alone
    assert answered == Counter(range(len(PROMPTS)))
    assert completions(other) == len(PROMPTS)
    (line,) = [line for line in said if "left out" in line]
    assert line.startswith(f"warning: {dying.url}") and "the other servers answer in its place" in line
    # back again, it is asked again
    dying.fault = lambda path, body: None
    before = completions(dying)
    assert sample(backend) == alone
    assert completions(dying) > before, (said, dying.log[-5:])


def test_where_all_are_gone_the_last_one_says_what_to_do(vllm, tmp_path):  # noqa: F811
    backend = connect(["http://127.0.0.1:9", "http://127.0.0.1:19"], tmp_path)
    with pytest.raises(UserError, match="http://127.0.0.1:19/v1/models: .*see that vLLM runs there"):
        sample(backend)


def test_a_server_that_refuses_ends_all(vllm, tmp_path):  # noqa: F811
    """It will again, and the user can mend it."""
    backend = connect([vllm(), vllm(loading=False)], tmp_path)
    with pytest.raises(UserError, match="does not load adapters: start it with"):
        sample(backend)


@pytest.mark.parametrize("value", [(), ("http://a:1", "http://a:1"), ("http://a:1", None), ("http://a:1", "b")])
def test_no_servers(value):
    config = tiny_config.get_config()
    config.sampling.server = value
    with pytest.raises(UserError, match="config.sampling.server is .* must be unset"):
        validate(config)
