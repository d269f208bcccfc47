# Generated from stoker/client/_async/adapters.py by `make format`: edit that file.
"""The registry of adapters as clients see it: `client.adapters`."""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import Unpack

from stoker.adapters import Folder
from stoker.broker import registry
from stoker.broker.registry import AdapterEntry, Verb
from stoker.client import requests
from stoker.client._sync.jobs import AdapterJob
from stoker.client._sync.link import Link
from stoker.client._sync.sending import send
from stoker.client.blocking import Chooser, in_thread
from stoker.client.options import AdapterOptions, checked_options
from stoker.contract import bundle
from stoker.contract.base import parse_adapter
from stoker.contract.kinds import ADAPTERS
from stoker.errors import UnknownAdapter


class Adapters:
    """Lists, loads, promotes and takes back. `model` may be left out where just one model generates.

    A version is named `name@version`. What is changed here holds at once for every worker; jobs that have begun keep
    the version that they began with. A name or version that there is not raises `UnknownAdapter`; what cannot be done,
    such as taking out the version that serves, raises `InvalidRequest`.
    """

    def __init__(self, link: Link, choose_model: Chooser) -> None:
        self._link, self._choose_model = link, choose_model

    def list(self, model: str | None = None) -> list[AdapterEntry]:
        """Every adapter of the model, by name."""
        return self._link.adapters(self._model(model))

    def get(self, name: str, model: str | None = None) -> AdapterEntry:
        """One adapter; raises `UnknownAdapter`."""
        model, (name, _) = self._model(model), parse_adapter(name)
        return self._link.adapter(model, name)

    def load(
        self,
        name: str,
        folder: Folder,
        *,
        model: str | None = None,
        job_id: str | None = None,
        **options: Unpack[AdapterOptions],
    ) -> AdapterJob:
        """Take an adapter that was made elsewhere into the registry: PEFT's folder, mlx-lm's, or a checkpoint of a
        run. A worker checks it against the model; the job's result says which version it has become.

        Options and their defaults: promote=True (serve it as soon as it is there), priority=5, deadline=None.
        """
        fields = checked_options(options, AdapterOptions, ("model", "job_id"))
        data = in_thread(bundle.read_folder, bundle.folder_of(folder), named=True)
        named = requests.checked_job_id(job_id)
        request = requests.adapter_request(self._model(model), name, named, fields)
        send(self._link, request, named, data, made=job_id is None)
        return AdapterJob(self._link, named)

    def promote(self, adapter: str, model: str | None = None) -> AdapterEntry:
        """Let `name@version` serve every request for `name`."""
        return self._change("promote", adapter, model, version=True)

    def rollback(self, name: str, model: str | None = None) -> AdapterEntry:
        """Let the version serve that served before."""
        return self._change("rollback", name, model, version=False)

    def deactivate(self, name: str, model: str | None = None) -> AdapterEntry:
        """Let no version serve; `name@version` can still be asked for."""
        return self._change("deactivate", name, model, version=False)

    def unload(self, adapter: str, model: str | None = None) -> AdapterEntry:
        """Take `name@version`, which must not serve now, out of the registry and the broker. After the last one the
        adapter is unknown; the entry that is returned then has no versions."""
        return self._change("unload", adapter, model, version=True)

    def _change(self, verb: Verb, adapter: str, model: str | None, *, version: bool) -> AdapterEntry:
        name, number = registry.wanted(adapter, version=version)
        before = self.get(name, model)
        done = self._link.change_adapter(before.model, verb, name, number)
        entry = self._as_it_is(before)
        # Where the answer was lost it was asked twice, and the second time there was nothing left to do.
        taken_out = verb == "unload" and number in before.versions and number not in entry.versions
        if not done and not taken_out:
            raise registry.explain(entry, verb, number)
        return entry

    def _as_it_is(self, before: AdapterEntry) -> AdapterEntry:
        try:
            return self.get(before.name, before.model)
        except UnknownAdapter:
            # Its last version is gone.
            return replace(before, serving=None, versions={})

    def _model(self, model: str | None) -> str:
        return self._choose_model(model, ADAPTERS.name)
