"""The registry of adapters as clients see it: `client.adapters`."""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import Unpack

from stoker.adapters import Folder
from stoker.broker import registry
from stoker.broker.registry import AdapterEntry, Verb
from stoker.client import requests
from stoker.client._async.jobs import AsyncAdapterJob
from stoker.client._async.link import AsyncLink
from stoker.client._async.sending import send
from stoker.client.asynchronously import Chooser, in_thread
from stoker.client.options import AdapterOptions, checked_options
from stoker.contract import bundle
from stoker.contract.base import parse_adapter
from stoker.contract.kinds import ADAPTERS
from stoker.errors import UnknownAdapter


class AsyncAdapters:
    """Lists, loads, promotes and takes back. `model` may be left out where just one model generates.

    A version is named `name@version`. What is changed here holds at once for every worker; jobs that have begun keep
    the version that they began with. A name or version that there is not raises `UnknownAdapter`; what cannot be done,
    such as taking out the version that serves, raises `InvalidRequest`.
    """

    def __init__(self, link: AsyncLink, choose_model: Chooser) -> None:
        self._link, self._choose_model = link, choose_model

    async def list(self, model: str | None = None) -> list[AdapterEntry]:
        """Every adapter of the model, by name."""
        return await self._link.adapters(await self._model(model))

    async def get(self, name: str, model: str | None = None) -> AdapterEntry:
        """One adapter; raises `UnknownAdapter`."""
        model, (name, _) = await self._model(model), parse_adapter(name)
        return await self._link.adapter(model, name)

    async def load(
        self,
        name: str,
        folder: Folder,
        *,
        model: str | None = None,
        job_id: str | None = None,
        **options: Unpack[AdapterOptions],
    ) -> AsyncAdapterJob:
        """Take an adapter that was made elsewhere into the registry: PEFT's folder, mlx-lm's, or a checkpoint of a
        run. A worker checks it against the model; the job's result says which version it has become.

        Options and their defaults: promote=True (serve it as soon as it is there), priority=5, deadline=None.
        """
        fields = checked_options(options, AdapterOptions, ("model", "job_id"))
        data = await in_thread(bundle.read_folder, bundle.folder_of(folder), named=True)
        named = requests.checked_job_id(job_id)
        request = requests.adapter_request(await self._model(model), name, named, fields)
        await send(self._link, request, named, data, made=job_id is None)
        return AsyncAdapterJob(self._link, named)

    async def promote(self, adapter: str, model: str | None = None) -> AdapterEntry:
        """Let `name@version` serve every request for `name`."""
        return await self._change("promote", adapter, model, version=True)

    async def rollback(self, name: str, model: str | None = None) -> AdapterEntry:
        """Let the version serve that served before."""
        return await self._change("rollback", name, model, version=False)

    async def deactivate(self, name: str, model: str | None = None) -> AdapterEntry:
        """Let no version serve; `name@version` can still be asked for."""
        return await self._change("deactivate", name, model, version=False)

    async def unload(self, adapter: str, model: str | None = None) -> AdapterEntry:
        """Take `name@version`, which must not serve now, out of the registry and the broker. After the last one the
        adapter is unknown; the entry that is returned then has no versions."""
        return await self._change("unload", adapter, model, version=True)

    async def _change(self, verb: Verb, adapter: str, model: str | None, *, version: bool) -> AdapterEntry:
        name, number = registry.wanted(adapter, version=version)
        before = await self.get(name, model)
        done = await self._link.change_adapter(before.model, verb, name, number)
        entry = await self._as_it_is(before)
        # Where the answer was lost it was asked twice, and the second time there was nothing left to do.
        taken_out = verb == "unload" and number in before.versions and number not in entry.versions
        if not done and not taken_out:
            raise registry.explain(entry, verb, number)
        return entry

    async def _as_it_is(self, before: AdapterEntry) -> AdapterEntry:
        try:
            return await self.get(before.name, before.model)
        except UnknownAdapter:
            # Its last version is gone.
            return replace(before, serving=None, versions={})

    async def _model(self, model: str | None) -> str:
        return await self._choose_model(model, ADAPTERS.name)
