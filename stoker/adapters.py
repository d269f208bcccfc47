"""The registry of adapters as clients see it: `client.adapters`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import keys, registry
from stoker.connection import translated
from stoker.contract import bundle
from stoker.errors import UnknownAdapter
from stoker.registry import AdapterEntry

if TYPE_CHECKING:
    from stoker.aio import AsyncAdapterJob, AsyncClient
    from stoker.client import AdapterJob, Client

Folder = str | os.PathLike[str]


class Adapters:
    """Lists, loads, promotes and takes back. `model` may be left out where just one model generates.

    A version is named `name@version`. What is changed here holds at once for every worker; jobs that have begun keep
    the version that they began with.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, model: str | None = None) -> list[AdapterEntry]:
        """Every adapter of the model, by name."""
        model = self._model(model)
        with translated(self._client.settings):
            known = registry.names(self._client.redis.smembers(keys.adapters(model)))
            raw = [self._client.redis.hgetall(keys.adapter(model, name)) for name in known]
        return [registry.parse(model, name, fields) for name, fields in zip(known, raw, strict=True)]

    def get(self, name: str, model: str | None = None) -> AdapterEntry:
        """One adapter; raises `UnknownAdapter`."""
        model, (name, _) = self._model(model), registry.wanted(name, version=False)
        with translated(self._client.settings):
            raw = self._client.redis.hgetall(keys.adapter(model, name))
        return found(model, name, raw)

    def load(
        self, name: str, folder: Folder, *, model: str | None = None, promote: bool = True, job_id: str | None = None
    ) -> AdapterJob:
        """Take an adapter that was made elsewhere into the registry: PEFT's folder, mlx-lm's, or a checkpoint of a
        run. A worker checks it against the model; the job's result says which version it has become."""
        data = bundle.read_folder(Path(folder), named=True)
        return self._client._load_adapter(name, data, self._model(model), promote, job_id)

    def promote(self, adapter: str, model: str | None = None) -> AdapterEntry:
        """Let `name@version` serve whoever asks for `name`."""
        return self._change("promote", adapter, model, version=True)

    def activate(self, adapter: str, model: str | None = None) -> AdapterEntry:
        """The same as `promote`."""
        return self.promote(adapter, model)

    def rollback(self, name: str, model: str | None = None) -> AdapterEntry:
        """Let the version serve that served before."""
        return self._change("rollback", name, model, version=False)

    def deactivate(self, name: str, model: str | None = None) -> AdapterEntry:
        """Let no version serve; `name@version` can still be asked for."""
        return self._change("deactivate", name, model, version=False)

    def unload(self, adapter: str, model: str | None = None) -> AdapterEntry:
        """Take `name@version`, which must not serve now, out of the registry and the broker."""
        return self._change("unload", adapter, model, version=True)

    def _change(self, verb: str, adapter: str, model: str | None, *, version: bool) -> AdapterEntry:
        name, number = registry.wanted(adapter, version=version)
        entry = self.get(name, model)
        with translated(self._client.settings):
            done = registry.change(self._client.redis, entry.model, verb, name, number)
        if done is None:
            raise registry.explain(self.get(name, entry.model), verb, number)
        return self.get(name, entry.model)

    def _model(self, model: str | None) -> str:
        return self._client.choose_model(model, "adapters")


class AsyncAdapters:
    """The same for asyncio; see `Adapters`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, model: str | None = None) -> list[AdapterEntry]:
        model = await self._model(model)
        with translated(self._client.settings):
            known = registry.names(await self._client.redis.smembers(keys.adapters(model)))
            raw = [await self._client.redis.hgetall(keys.adapter(model, name)) for name in known]
        return [registry.parse(model, name, fields) for name, fields in zip(known, raw, strict=True)]

    async def get(self, name: str, model: str | None = None) -> AdapterEntry:
        model, (name, _) = await self._model(model), registry.wanted(name, version=False)
        with translated(self._client.settings):
            raw = await self._client.redis.hgetall(keys.adapter(model, name))
        return found(model, name, raw)

    async def load(
        self, name: str, folder: Folder, *, model: str | None = None, promote: bool = True, job_id: str | None = None
    ) -> AsyncAdapterJob:
        data = bundle.read_folder(Path(folder), named=True)
        return await self._client._load_adapter(name, data, await self._model(model), promote, job_id)

    async def promote(self, adapter: str, model: str | None = None) -> AdapterEntry:
        return await self._change("promote", adapter, model, version=True)

    async def activate(self, adapter: str, model: str | None = None) -> AdapterEntry:
        return await self.promote(adapter, model)

    async def rollback(self, name: str, model: str | None = None) -> AdapterEntry:
        return await self._change("rollback", name, model, version=False)

    async def deactivate(self, name: str, model: str | None = None) -> AdapterEntry:
        return await self._change("deactivate", name, model, version=False)

    async def unload(self, adapter: str, model: str | None = None) -> AdapterEntry:
        return await self._change("unload", adapter, model, version=True)

    async def _change(self, verb: str, adapter: str, model: str | None, *, version: bool) -> AdapterEntry:
        name, number = registry.wanted(adapter, version=version)
        entry = await self.get(name, model)
        with translated(self._client.settings):
            done = await registry.change(self._client.redis, entry.model, verb, name, number)
        if done is None:
            raise registry.explain(await self.get(name, entry.model), verb, number)
        return await self.get(name, entry.model)

    async def _model(self, model: str | None) -> str:
        return await self._client.choose_model(model, "adapters")


def found(model: str, name: str, raw: Mapping[bytes, bytes]) -> AdapterEntry:
    """The adapter of this hash. Raises `UnknownAdapter` where there is no version: it may hold a number alone, that a
    run which failed was given."""
    entry = registry.parse(model, name, raw)
    if not entry.versions:
        raise UnknownAdapter(
            f"adapter {name!r} given; {model} has none of that name. `stoker adapters list` shows those there are."
        )
    return entry


def facts(known: Any) -> str:
    """A version's facts as one line."""
    parts = [str(known.get("method", "lora")), f"rank {known.get('rank', '?')}"]
    for name, said in (("loss", "loss"), ("held_out_loss", "held out")):
        if known.get(name) is not None:
            parts.append(f"{said} {known[name]:.3f}")
    return ", ".join([*parts, str(known.get("source", ""))])
