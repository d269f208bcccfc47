"""The base of every message, and the names that may travel in one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints

from stoker.contract.names import Rule, checked
from stoker.contract.shown import brief
from stoker.errors import InvalidRequest

#: Characters of a text that a `repr` shows.
LONGEST_SHOWN = 40


class Message(BaseModel):
    """Frozen; a field that it does not know is refused. Its `repr` is short: a line of a log or of a traceback."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Fields that differ from their defaults; long texts are cut, and what holds many values is counted."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.is_required() or value != field.default:
                yield name, _Shown(value)


class _Shown:
    """A field's value as a `repr` shows it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        value = self._value
        if isinstance(value, str | bytes):
            return repr(value) if len(value) <= LONGEST_SHOWN else f"{value[: LONGEST_SHOWN - 1]!r}…"
        if isinstance(value, Message):
            return f"{type(value).__name__}(…)"
        if isinstance(value, tuple | list | Mapping) and (len(value) > 1 or len(repr(value)) > LONGEST_SHOWN):
            return f"<{len(value)} {'entries' if isinstance(value, Mapping) else 'items'}>"
        return f"{value:.5g}" if isinstance(value, float) else repr(value)


#: Models, adapters, runs: never a path.
NAME_PATTERN = rf"^{Rule.NAME.pattern}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]

#: An adapter in a request: its name, for the version that serves now, or `name@version`.
Adapter = Annotated[str, StringConstraints(pattern=rf"^{Rule.NAME.pattern}(@{Rule.VERSION.pattern})?$")]


def parse_adapter(adapter: str) -> tuple[str, int | None]:
    """`name` or `name@version` as (name, version or None). Raises `InvalidRequest`."""
    if not isinstance(adapter, str):
        raise InvalidRequest(f"adapter: {brief(adapter)} given; expected a name, or name@version.")
    name, separator, version = adapter.partition("@")
    checked(Rule.NAME, "adapter", name)
    return name, int(checked(Rule.VERSION, f"version of adapter {name}", version)) if separator else None
