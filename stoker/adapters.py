"""What clients read from the registry of adapters; `client.adapters` does the asking."""

from __future__ import annotations

import os
from collections.abc import Mapping

from stoker.broker import registry
from stoker.broker.registry import AdapterEntry
from stoker.errors import UnknownAdapter

Folder = str | os.PathLike[str]


def found(model: str, name: str, raw: Mapping[bytes, bytes]) -> AdapterEntry:
    """The adapter of this hash. Raises `UnknownAdapter` where there is no version: a run that failed leaves a number
    alone there."""
    return existing(registry.parse(model, name, raw))


def existing(entry: AdapterEntry) -> AdapterEntry:
    """`entry`, if it has a version. Raises `UnknownAdapter`."""
    if not entry.versions:
        raise UnknownAdapter(
            f"adapter {entry.name!r} given; {entry.model} has none of that name. `stoker adapters list` shows those "
            "there are."
        )
    return entry


def facts(known: Mapping[str, object]) -> str:
    """A version's facts as one line."""
    parts = [str(known.get("method", "lora")), f"rank {known.get('rank', '?')}"]
    for name, said in (("loss", "loss"), ("held_out_loss", "held out")):
        value = known.get(name)
        if isinstance(value, int | float):
            parts.append(f"{said} {value:.3f}")
    return ", ".join([*parts, str(known.get("source", ""))])
