"""Roll-outs by a separate server: vLLM or vllm-ascend, in its own environment, over its OpenAI-compatible HTTP API.

`Served` is a backend around another one. It samples by HTTP, token ids in and token ids out, from the policy as it is at
that moment: the adapter is written in PEFT's layout where the server can read it, and loaded there. All the rest is the
other backend's. What it asks of a server (vLLM from 0.10.2 on): /v1/models, /v1/load_lora_adapter,
/v1/unload_lora_adapter, /v1/completions, /version, and with `sleep` /sleep and /wake_up.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32

from ple_jax.core import retry
from ple_jax.core.errors import UserError
from ple_jax.core.types import Backend, Batch, Loss, Outputs, Response, Sampling
from ple_jax.models import adapters, peft
from ple_jax.serving import commands
from ple_jax.serving.protocol import models, request, response, same, version

T = TypeVar("T")
Write = Callable[[Path, Mapping[str, np.ndarray]], None]  # (folder, adapter): PEFT's files

_PATIENCE = 600.0  # seconds that a server may be silent; of a completion one more for every token
_AGAIN = "and give the same command again: what was sampled is kept"


class Served:
    """A `Backend` that samples from a server and leaves the rest to `inner`."""

    def __init__(
        self,
        inner: Backend,
        url: str,
        *,
        folder: Path,
        write: Write,
        base_model: str,
        vocab: int,
        rank: int,
        width: int,
        key: str | None = None,
        sleep: bool = False,
        log: Callable[[str], None] = print,
        retries: int = 5,
        backoff: float = 1.0,
    ):
        """Nothing is asked of the server before the first `generate` or `environment`.

        Args:
            url: of the server, http://host:port.
            folder: where adapters are written; it belongs to this object, and the server must see it under the same path.
            write: how they are written.
            base_model: the run's, to compare with the server's.
            vocab: token ids are below it.
            rank: the --max-lora-rank that the server needs.
            width: requests under way at once.
            key: sent as `Authorization: Bearer ...`.
            sleep: put the server to sleep while `inner` computes.
            log: told what may be a mistake.
            retries, backoff: of every request, as `http.request` takes them.
        """
        self.inner, self.url, self.width = inner, url.rstrip("/").removesuffix("/v1"), width
        self._folder, self._write = folder.resolve(), write
        self._base_model, self._vocab, self._rank = base_model, vocab, rank
        self._key, self._sleep, self._log, self._retries, self._backoff = key, sleep, log, retries, backoff
        # adapters of this work directory, and of no other one, begin with it
        self._family = f"ple-{hashlib.sha256(str(self._folder).encode()).hexdigest()[:8]}-"
        self._name: str | None = None  # of the adapter as it is now; None: not written yet
        self._loaded = False  # whether the server may hold an adapter of ours
        self._awake: bool | None = None  # None: not known
        self._compared = False  # whether the base models were
        self._stop = threading.Event()  # set where requests under way should not be tried again
        self._patience = _PATIENCE

    # -------------------------------------------------------------- Backend

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Float32[np.ndarray, "row max_new"],
        *,
        sampling: Sampling,
        prefix: Sequence[int] = (),
    ) -> list[Response]:
        """One response per prompt, `width` requests under way at once. The noise seeds the server's own.

        A response depends on its prompt, its noise and the adapter, not on its place among the prompts, as far as the
        server's arithmetic does not depend on what it computes together. `prefix` is sent with every prompt: sharing it
        is the business of the server's prefix cache.
        """
        if not prompts:
            return []
        self._wake()
        self._load(len(prefix) + max(map(len, prompts)) + sampling.max_new_tokens)
        read = functools.partial(response, eos=sampling.eos, limit=sampling.max_new_tokens, vocab=self._vocab)
        requests = [
            request([*prefix, *prompt], noise, model=self._name, sampling=sampling)
            for prompt, noise in zip(prompts, uniforms, strict=True)
        ]
        slack = sampling.max_new_tokens
        pool = ThreadPoolExecutor(self.width)
        try:
            under_way = [
                pool.submit(self._ask, "POST", "/v1/completions", body, read=read, slack=slack) for body in requests
            ]
            for done in as_completed(under_way):
                done.result()  # the first that fails ends all
            return [done.result() for done in under_way]
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            self._stop.clear()

    def stream(
        self, prompt: Sequence[int], uniforms: Float32[np.ndarray, " max_new"], *, sampling: Sampling, base: bool = False
    ) -> Iterator[int]:
        """Of `inner`: for a person who talks to a finished run, where no server need be there."""
        return self.inner.stream(prompt, uniforms, sampling=sampling, base=base)

    def logprobs(self, batch: Batch, *, reference: bool = False, base: bool = False) -> Outputs:
        self._rest()
        return self.inner.logprobs(batch, reference=reference, base=base)

    def scores(self, batch: Batch) -> Float32[np.ndarray, "query k"]:
        self._rest()
        return self.inner.scores(batch)

    def update(self, batches: Sequence[Batch], loss: Loss, *, lr: float) -> dict[str, float]:
        self._rest()
        self._name = None
        return self.inner.update(batches, loss, lr=lr)

    def freeze_reference(self) -> None:
        self.inner.freeze_reference()

    def adapter(self) -> dict[str, np.ndarray]:
        return self.inner.adapter()

    def save(self, path: Path, step: int, meta: dict[str, Any], *, keep: int) -> None:
        self.inner.save(path, step, meta, keep=keep)

    def restore(self, path: Path) -> dict[str, Any] | None:
        self._name = None
        return self.inner.restore(path)

    def environment(self) -> dict[str, Any]:
        """What `inner` says, and the server's version: its address may change when a run goes on."""
        return {**self.inner.environment(), "vllm": self._version}

    def close(self) -> None:
        """Takes the run's adapter from the server, wakes it, and removes the folder. A server that is gone is no error."""
        self._retries, self._patience = 0, 10.0
        try:
            if self._awake is False:
                self._wake()
            for name in self._ours(self._models()) if self._loaded else ():
                self._unload(name)
        except UserError as error:
            self._log(f"warning: the run's adapter may still be loaded ({error})")
        shutil.rmtree(self._folder, ignore_errors=True)

    # -------------------------------------------------------------- the adapter

    def _load(self, tokens: int) -> None:
        """The adapter as it is now is loaded, and no other one of this run; `tokens` of prompt and response fit.

        The server is asked every time: it may have been started anew, or still hold what a killed process had loaded.
        """
        self._name = self._name or self._written()
        models = self._models()
        self._check(models, tokens)
        names = self._ours(models)
        # before the new one is loaded: where there is room for one, loading evicts the old one, and some versions then
        # fail to unload it
        for name in names:
            if name != self._name:
                self._unload(name)
        self._loaded = True
        if self._name not in names:
            body = {"lora_name": self._name, "lora_path": str(self._folder / self._name)}
            try:
                self._ask("POST", "/v1/load_lora_adapter", body, read=bytes, retries=min(self._retries, 1))
            except UserError:
                # an answer that was lost may have come after the adapter was loaded, and then another try is refused
                if self._name not in self._ours(self._models()):
                    raise
        for folder in self._folder.iterdir():
            if folder.name != self._name:
                shutil.rmtree(folder)

    def _written(self) -> str:
        """Writes the adapter as it is now. Returns its name, which no other weights ever have.

        It is made of a digest of the files: vLLM keeps what it computed of a prefix by the adapter's name and path, so
        other weights under an old name would be given the old weights' keys and values.
        """
        tensors = self.inner.adapter()
        if wrong := sorted(name for name, tensor in tensors.items() if not np.isfinite(tensor).all()):
            raise UserError(
                f"the adapter is not finite ({wrong[0]}), and {self.url} would sample noise from it; lower"
                " --config.optimizer.lr (in a new --workdir)"
            )
        new = self._folder / "new"
        self._write(new, tensors)
        digest = hashlib.sha256(b"".join((new / file).read_bytes() for file in (peft.CONFIG, peft.WEIGHTS))).hexdigest()
        target = self._folder / f"{self._family}{digest[:16]}"
        if target.exists():  # of a process that was killed: the same files
            shutil.rmtree(new)
        else:
            new.rename(target)
        return target.name

    def _ours(self, models: Sequence[Mapping[str, Any]]) -> list[str]:
        """The names of the run's adapters among what the server has loaded."""
        return [model["id"] for model in models if model["id"].startswith(self._family)]

    def _check(self, models: Sequence[Mapping[str, Any]], tokens: int) -> None:
        """Raises a UserError if the base model is served for fewer tokens; says so, once, if it seems to be another one."""
        base = [model for model in models if not model.get("parent")]  # an adapter has one
        limit = min((model["max_model_len"] for model in base if model.get("max_model_len")), default=tokens)
        if limit < tokens:
            raise UserError(
                f"{self.url} takes {limit} tokens, and the longest prompt and its response are {tokens}: start it with"
                f" --max-model-len {tokens} or more, or lower --config.sampling.max_new_tokens, {_AGAIN}"
            )
        names = {str(model[key]) for model in base for key in ("id", "root") if model.get(key)}
        if not self._compared and not any(same(self._base_model, name) for name in names):
            self._log(
                f"warning: {self.url} serves {', '.join(sorted(names))}, and this run trains {self._base_model}: both must"
                " be the same weights"
            )
        self._compared = True

    def _unload(self, name: str) -> None:
        # one that is not there any more, or cannot be unloaded now, does no harm: no name ever has other weights
        with contextlib.suppress(UserError):
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, read=bytes, retries=0)

    # -------------------------------------------------------------- sleep

    def _wake(self) -> None:
        if self._sleep and not self._awake:
            self._ask("POST", "/wake_up", read=bytes)
            self._awake = True

    def _rest(self) -> None:
        """Puts the server to sleep before something is computed here: weights to the host's memory, KV cache dropped.

        Level 1 and not 2, which drops the weights too.
        """
        if self._sleep and self._awake is not False:
            self._ask("POST", "/sleep?level=1", read=bytes)
            self._awake = False

    # -------------------------------------------------------------- requests

    @functools.cached_property
    def _version(self) -> str:
        return self._ask("GET", "/version", read=version)

    def _models(self) -> list[dict[str, Any]]:
        return self._ask("GET", "/v1/models", read=models)

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        read: Callable[[bytes], T],
        slack: float = 0.0,
        retries: int | None = None,
    ) -> T:
        """What `read` makes of the answer; a UserError that says what to do where there is none."""
        try:
            return retry.request(
                method,
                self.url + path,
                body,
                read=read,
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                timeout=self._patience + slack,
                retries=self._retries if retries is None else retries,
                backoff=self._backoff,
                stop=self._stop,
            )
        except retry.Failed as error:
            why = str(error).replace(self._key, "***") if self._key else str(error)  # a server may repeat what it was sent
            status = error.status if isinstance(error, retry.Refused) else None
            raise UserError(f"{self.url}{path}: {why}; {self._remedy(path, status, why)}, {_AGAIN}") from error

    def _remedy(self, path: str, status: int | None, why: str) -> str:
        """What to do about a request that failed; `status` is None where the server did not say that it is wrong."""
        if status == 200:  # a completion that is none for us: `why` says it all
            return "mend that"
        if status in (401, 403):
            return "name the environment variable with its key, --config.sampling.server_key_env=NAME"
        if path == "/v1/load_lora_adapter":
            options = f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora --max-lora-rank {self._rank}"
            if status in (404, 405) and "adapter" not in why.lower():
                return f"it does not load adapters: start it with {options}"
            if status == 404:
                return f"it does not see {self._folder}: run it on this machine, or where that is the same folder"
            return f"start it on the run's base model, with {options}"
        if path.startswith(("/sleep", "/wake_up")):
            return "start it with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode, or unset --config.sampling.server_sleep"
        if path == "/v1/completions" and status is not None:
            return "the adapter is gone: was the server started again?" if status == 404 else "mend that"
        return "see that vLLM runs there (or unset --config.sampling.server, which is another run)"


# ---------------------------------------------------------------- one request and its answer




# ---------------------------------------------------------------- from a config


def connect(
    config: Any,
    inner: Backend,
    *,
    folder: Path,
    base_model: str,
    vocab: int,
    transposed: bool,
    log: Callable[[str], None],
) -> Served:
    """The backend that a config with `sampling.server` asks for, around the one that trains.

    Raises:
        UserError: the variable that `sampling.server_key_env` names is not set.
    """
    name, key = config.sampling.server_key_env, None
    if name is not None and not (key := os.environ.get(name, "").strip()):
        raise UserError(
            f"config.sampling.server_key_env: the environment variable {name!r} is not set; export it with the key"
        )
    return Served(
        inner,
        config.sampling.server,
        folder=folder,
        write=functools.partial(adapters.write_peft, lora=config.lora, base_model=base_model, transposed=transposed),
        base_model=base_model,
        vocab=vocab,
        rank=commands.rank_limit(config.lora.rank) or config.lora.rank,
        width=config.sampling.width,
        key=key,
        sleep=config.sampling.server_sleep,
        log=log,
    )
