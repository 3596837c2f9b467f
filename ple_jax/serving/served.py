"""Rollouts by a separate server: vLLM or vllm-ascend, in its own environment, over its OpenAI-compatible HTTP API.

`Served` is a backend around another one. It samples by HTTP, token ids in and token ids out, from the policy as it is at
that moment: the adapter is written in PEFT's layout where the server can read it, and loaded there. The other backend
does all the rest. The endpoints that a server must have (vLLM from 0.10.2 on): /v1/models, /v1/load_lora_adapter,
/v1/unload_lora_adapter, /v1/completions, /version, and with `sleeps` /sleep and /wake_up.
"""

import contextlib
import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from ple_jax.core.errors import UserError
from ple_jax.core.secrets import from_environment
from ple_jax.core.types import Backend, Batch, Compiled, Loss, Outputs, Response, Sampling, Tell
from ple_jax.models import adapters, peft
from ple_jax.serving import commands
from ple_jax.serving.fleet import Fleet
from ple_jax.serving.protocol import request, response, same
from ple_jax.serving.server import AGAIN, PATIENCE, Server

Write = Callable[[Path, Mapping[str, np.ndarray]], None]  # (folder, adapter): PEFT's files


class Served:
    """A `Backend` that samples from a server and leaves the rest to `inner`."""

    def __init__(
        self,
        inner: Backend,
        server: Fleet,
        *,
        write: Write,
        base_model: str,
        vocab: int,
        width: int,
        log: Callable[[str], None] = print,
    ):
        """Wraps `inner`. Nothing is asked of the server before the first `generate` or `environment`.

        Args:
            server: one or more; their folder, where adapters are written, belongs to this object.
            write: writes an adapter into a folder.
            base_model: the run's base model, to compare with the server's.
            vocab: the size of the vocabulary; token ids are below it.
            width: the number of requests under way at once.
            log: takes a message about what may be a mistake.
        """
        self.inner, self.server, self.width = inner, server, width
        self._write, self._base_model, self._vocab, self._log = write, base_model, vocab, log
        # adapters of this work directory, and of no other one, begin with it
        self._family = f"ple-{hashlib.sha256(str(server.folder).encode()).hexdigest()[:8]}-"
        self._name: str | None = None  # of the adapter as it is now; None: not written yet
        self._loaded = False  # whether the server may hold an adapter of ours
        self._compared: set[str] = set()  # the servers whose base model was

    # -------------------------------------------------------------- Backend

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Float32[np.ndarray, "row max_new"],
        *,
        sampling: Sampling,
        prefix: Sequence[int] = (),
        known: Mapping[int, Response] | None = None,
        tell: Tell | None = None,
    ) -> list[Response]:
        """Samples one response per prompt, with `width` requests under way at once. A row's noise seeds its request.

        A response depends on its prompt, its noise and the adapter, not on its place among the prompts, as far as the
        server's arithmetic does not depend on what it computes together. What prompts share is left to the server's prefix
        cache.
        """
        found = dict(known or {})
        if len(found) < len(prompts):
            limit = sampling.max_new_tokens
            name = self._current(max(map(len, prompts)) + limit)
            read = functools.partial(response, eos=sampling.eos, limit=limit, vocab=self._vocab)
            bodies = {
                i: request(list(prompt), noise, model=name, sampling=sampling)
                for i, (prompt, noise) in enumerate(zip(prompts, uniforms, strict=True))
                if i not in found
            }
            with contextlib.closing(self.server.complete(bodies, read=read, width=self.width, tokens=limit)) as completions:
                for ended in completions:
                    found |= ended
                    if tell is not None:
                        tell(ended)
        return [found[i] for i in range(len(prompts))]

    def stream(
        self, prompt: Sequence[int], uniforms: Float32[np.ndarray, " max_new"], *, sampling: Sampling, base: bool = False
    ) -> Iterator[int]:
        """Streams a response from `inner`: it is for a person who talks to a finished run, where there need be no server."""
        return self.inner.stream(prompt, uniforms, sampling=sampling, base=base)

    def logprobs(
        self,
        batch: Batch,
        *,
        reference: bool = False,
        base: bool = False,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Outputs:
        self.server.rest()
        return self.inner.logprobs(batch, reference=reference, base=base, temperature=temperature, entropy=entropy)

    def scores(self, batch: Batch) -> Float32[np.ndarray, "query k"]:
        self.server.rest()
        return self.inner.scores(batch)

    def update(self, batches: Sequence[Batch], loss: Loss, *, lr: float, temperature: float = 1.0) -> dict[str, float]:
        self.server.rest()
        self._name = None
        return self.inner.update(batches, loss, lr=lr, temperature=temperature)

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
        """Returns the environment of `inner` with the server's version.

        The server's address is left out: it may change when a run goes on.
        """
        return {**self.inner.environment(), "vllm": self.server.version}

    def profile(self, folder: Path) -> contextlib.AbstractContextManager[None]:
        return self.inner.profile(folder)

    def compiled(self) -> Compiled:
        return self.inner.compiled()

    def close(self) -> None:
        """Takes the run's adapter from the server, wakes it, and removes the folder. A server that is gone is no error."""
        self.server.patience = self.server.patience._replace(timeout=10.0, retries=0)
        for server in self.server.servers:
            try:
                self._leave(server)
            except UserError as error:
                self._log(f"warning: the run's adapter may still be loaded ({error})")
        shutil.rmtree(self.server.folder, ignore_errors=True)

    def _leave(self, server: Server) -> None:
        if server.awake is False:
            server.wake()
        for name in self._ours(server.models()) if self._loaded else ():
            server.unload(name)

    # -------------------------------------------------------------- the adapter

    def _current(self, tokens: int) -> str:
        """Makes the servers hold the adapter as it is now, and no other one of this run. Returns its name there.

        It also checks that the servers take `tokens` tokens of prompt and response. They are asked every time: a server may
        have been started anew, or still hold what a killed process had loaded.
        """
        current = self._name = self._name or self._written()
        self._loaded = True
        self.server.each(lambda server: self._prepare(server, current, tokens))
        for folder in self.server.folder.iterdir():
            if folder.name != current:
                shutil.rmtree(folder)
        return current

    def _prepare(self, server: Server, current: str, tokens: int) -> None:
        """Wakes a server, and makes it hold the adapter `current` and no other one of this run."""
        server.wake()
        models = server.models()
        self._check(server, models, tokens)
        names = self._ours(models)
        # before the new one is loaded: where there is room for one, loading evicts the old one, and some versions then
        # fail to unload it
        for name in names:
            if name != current:
                server.unload(name)
        if current not in names:
            server.load(current)

    def _written(self) -> str:
        """Writes the adapter as it is now. Returns its name, which no other weights ever have.

        The name is made of a digest of the files: vLLM keeps what it computed of a prefix by the adapter's name and path, so
        other weights under an old name would be given the old weights' keys and values.
        """
        tensors = self.inner.adapter()
        if wrong := sorted(name for name, tensor in tensors.items() if not np.isfinite(tensor).all()):
            raise UserError(
                f"the adapter is not finite ({wrong[0]}), and {self.server.url} would sample noise from it; lower"
                " --config.optimizer.lr (in a new --workdir)"
            )
        new = self.server.folder / "new"
        self._write(new, tensors)
        digest = hashlib.sha256(b"".join((new / file).read_bytes() for file in (peft.CONFIG, peft.WEIGHTS))).hexdigest()
        target = self.server.folder / f"{self._family}{digest[:16]}"
        if target.exists():  # of a process that was killed: the same files
            shutil.rmtree(new)
        else:
            new.rename(target)
        return target.name

    def _ours(self, models: Sequence[Mapping[str, Any]]) -> list[str]:
        """Returns the names of the run's adapters among the models that the server has loaded."""
        return [model["id"] for model in models if model["id"].startswith(self._family)]

    def _check(self, server: Server, models: Sequence[Mapping[str, Any]], tokens: int) -> None:
        """Raises a UserError if the base model is served for fewer than `tokens` tokens.

        Warns, once for a server, if its base model seems to be another one.
        """
        base = [model for model in models if not model.get("parent")]  # an adapter has one
        limit = min((model["max_model_len"] for model in base if model.get("max_model_len")), default=tokens)
        if limit < tokens:
            raise UserError(
                f"{server.url} takes {limit} tokens, and the longest prompt and its response are {tokens}: start it"
                f" with --max-model-len {tokens} or more {AGAIN}; or lower --config.sampling.max_new_tokens, in another"
                " --workdir"
            )
        names = {str(model[key]) for model in base for key in ("id", "root") if model.get(key)}
        if server.url not in self._compared and not any(same(self._base_model, name) for name in names):
            self._log(
                f"warning: {server.url} serves {', '.join(sorted(names))}, and this run trains {self._base_model}: both"
                " must be the same weights"
            )
        self._compared.add(server.url)


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
    """Returns the backend that a config with `sampling.server` asks for, around the one that trains.

    Args:
        folder: where adapters are written for the server to load; made and removed here.
        base_model: the base_model_name_or_path of the adapters.
        vocab: the size of the vocabulary; token ids are below it.
        transposed: whether the base keeps its linear weights as [in, out].
        log: takes a message about what may be a mistake.

    Raises:
        UserError: the variable that `sampling.server_key_env` names is not set.
    """
    name = config.sampling.server_key_env
    key = None if name is None else from_environment(name, "config.sampling.server_key_env")
    rank = commands.rank_limit(config.lora.rank) or config.lora.rank
    write = functools.partial(adapters.write_peft, lora=config.lora, base_model=base_model, transposed=transposed)
    options = config.sampling
    urls = (options.server,) if isinstance(options.server, str) else options.server
    servers = [Server(url, folder.resolve(), rank, key, sleeps=options.server_sleep, patience=PATIENCE) for url in urls]
    fleet = Fleet(servers, log=log)
    return Served(inner, fleet, write=write, base_model=base_model, vocab=vocab, width=options.width, log=log)
