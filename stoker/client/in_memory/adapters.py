"""The registry of adapters in memory: what `stoker/broker/registry.py` does in the broker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from stoker.broker.registry import AdapterEntry, Verb


class Registry:
    """`tests/stoker/test_testing.py` holds it equal to the scripts of `stoker/broker/registry.py`."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], AdapterEntry] = {}
        self._numbers: dict[tuple[str, str], int] = {}

    def register(self, model: str, name: str, known: Mapping[str, object], *, promote: bool) -> int:
        """Give a version its number, and let it serve."""
        number = self._numbers[model, name] = self._numbers.get((model, name), 0) + 1
        entry = self.get(model, name)
        self._entries[model, name] = replace(entry, versions={**entry.versions, number: dict(known)})
        if promote:
            self._serve(model, name, number)
        return number

    def get(self, model: str, name: str) -> AdapterEntry:
        """Without a version if there never was one."""
        return self._entries.get((model, name), AdapterEntry(model, name, None, (), {}))

    def list(self, model: str) -> list[AdapterEntry]:
        return [entry for (owner, _), entry in sorted(self._entries.items()) if owner == model]

    def change(self, model: str, verb: Verb, name: str, version: int | None) -> bool:
        """Whether it could be done."""
        if verb == "rollback":
            return self._rollback(model, name)
        if verb == "deactivate":
            self._serve(model, name, None)
            return True
        entry = self.get(model, name)
        if version not in entry.versions or (verb == "unload" and version == entry.serving):
            return False
        if verb == "promote":
            self._serve(model, name, version)
        else:
            left = {number: known for number, known in entry.versions.items() if number != version}
            self._entries[model, name] = replace(entry, versions=left)
        return True

    def _serve(self, model: str, name: str, version: int | None) -> None:
        entry = self.get(model, name)
        if entry.serving != version:
            served = () if entry.serving is None else (entry.serving,)
            self._entries[model, name] = replace(entry, serving=version, history=(*entry.history, *served))

    def _rollback(self, model: str, name: str) -> bool:
        entry = self.get(model, name)
        for position in reversed(range(len(entry.history))):
            version = entry.history[position]
            if version in entry.versions and version != entry.serving:
                self._entries[model, name] = replace(entry, serving=version, history=entry.history[:position])
                return True
        return False
