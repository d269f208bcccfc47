"""The base of every message, and the names that may travel in one."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

from stoker.contract.names import Rule, checked


class Message(BaseModel):
    """Frozen; a field that it does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


#: Models, adapters, runs: never a path.
NAME_PATTERN = rf"^{Rule.NAME.pattern}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]

#: An adapter in a request: its name, for the version that serves now, or `name@version`.
Adapter = Annotated[str, StringConstraints(pattern=rf"^{Rule.NAME.pattern}(@{Rule.VERSION.pattern})?$")]


def parse_adapter(adapter: str) -> tuple[str, int | None]:
    """`name` or `name@version` as (name, version or None). Raises `InvalidRequest`."""
    name, separator, version = adapter.partition("@")
    checked(Rule.NAME, "adapter", name)
    return name, int(checked(Rule.VERSION, f"version of adapter {name}", version)) if separator else None
