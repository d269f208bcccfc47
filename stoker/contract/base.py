"""The base of every message, and the names that may travel in one."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints


class Message(BaseModel):
    """Frozen; a field that it does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


#: Models, adapters, runs: never a path.
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]

#: An adapter in a request: its name, for the version that serves now, or `name@version`.
Adapter = Annotated[str, StringConstraints(pattern=rf"{NAME_PATTERN[:-1]}(@[1-9][0-9]{{0,8}})?$")]


def parse_adapter(adapter: str) -> tuple[str, int | None]:
    """`name` or `name@version` as (name, version or None)."""
    name, _, version = adapter.partition("@")
    return name, int(version) if version else None
