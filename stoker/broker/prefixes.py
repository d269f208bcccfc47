"""Pinned prefixes in the broker: one durable hash a model, which its workers read when it has changed.

Its fields are the names, with a `PinnedPrefix` as JSON each; and `:changed`, which is another text after each change:
a worker that looks every second reads the whole hash no more often than it has to.

The functions that take a pipeline put their commands into it, for the blocking and the asyncio client alike.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from stoker.broker import keys
from stoker.contract.names import Rule, follows
from stoker.contract.prefixes import MOST_PREFIXES, PinnedPrefix
from stoker.contract.presence import PrefixState, Presence
from stoker.errors import InvalidRequest

#: The field that says whether anything has changed: no prefix has such a name.
CHANGED = ":changed"


@dataclass(frozen=True)
class PrefixEntry:
    """A pinned prefix. `workers`: as each worker that is alive and holds the model has it."""

    model: str
    name: str
    prefix: PinnedPrefix
    workers: Mapping[str, PrefixState] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of the prefix; 0: no worker has said it yet."""
        return max((state.tokens for state in self.workers.values()), default=0)


def parse(raw: Mapping[bytes, bytes]) -> dict[str, PinnedPrefix]:
    """From the model's hash, the oldest first. What no release of Stoker wrote there is left out."""
    found = {name.decode(errors="replace"): _read(value) for name, value in raw.items()}
    known = {name: prefix for name, prefix in found.items() if prefix is not None and follows(Rule.NAME, name)}
    return dict(sorted(known.items(), key=lambda item: (item[1].time, item[0])))


def _read(raw: bytes) -> PinnedPrefix | None:
    try:
        return PinnedPrefix.model_validate_json(raw)
    except ValidationError:
        return None


def pin(pipeline: Any, model: str, name: str, text: str) -> Any:
    """Add a prefix. A name that is there already stays as it was. The second reply is what is pinned then: the first
    says nothing of it where the commands were sent again, because their answer was lost."""
    key = keys.prefixes(model)
    return pipeline.hsetnx(key, name, text).hget(key, name).hset(key, CHANGED, uuid.uuid4().hex)


def pinned(redis: Any, model: str, name: str) -> Any:
    """What lies there under this name; None where nothing does. By either client."""
    return redis.hget(keys.prefixes(model), name)


def unpin(pipeline: Any, model: str, name: str) -> Any:
    """Let go of a name, if there is one."""
    key = keys.prefixes(model)
    return pipeline.hdel(key, name).hset(key, CHANGED, uuid.uuid4().hex)


def check_number(names: Iterable[str], name: str, model: str) -> None:
    """Raise `InvalidRequest` for a name that is taken, and for one too many. `names`: those that are pinned."""
    taken = sorted(names)
    if name in taken:
        raise InvalidRequest(
            f"prefix: {name!r} given, which is taken. `stoker prefix unpin {name}` first, or name it otherwise."
        )
    if len(taken) >= MOST_PREFIXES:
        raise InvalidRequest(
            f"prefix: {model} has {len(taken)}; at most {MOST_PREFIXES} may be pinned. Unpin one: {', '.join(taken)}."
        )


def entries(model: str, pinned: Mapping[str, PinnedPrefix], alive: Iterable[Presence]) -> list[PrefixEntry]:
    """Each prefix with what the workers say of it."""
    said = {(state.id, worker.worker): state for worker in alive for state in worker.prefixes if state.model == model}
    return [
        PrefixEntry(model, name, prefix, {worker: state for (pin, worker), state in said.items() if pin == prefix.id})
        for name, prefix in pinned.items()
    ]
