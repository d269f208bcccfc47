"""Configuration fields, read with a clear error for each that is absent, wrong or not supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stoker.errors import ModelError

_LARGEST = 1 << 31


def renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`config` with other names for some of its fields. Raises `ModelError` where one is given twice, differently."""
    found = {name: value for name, value in config.items() if name not in names}
    for original, name in names.items():
        value = config.get(original)
        if value is not None and found.setdefault(name, value) != value:
            raise ModelError(f"config.json: {original} is {value!r}, and {name}, which is the same, {found[name]!r}")
    return found


class Fields:
    """A view of `values` (parsed JSON or GGUF metadata); `where` is what messages call it."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values, self._where = values, where

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._values.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _LARGEST:
            raise ModelError(f"{self._where}: {name} is {value!r}, not a positive integer")
        return value

    def index(self, name: str, default: int) -> int:
        """An integer from 0 on."""
        value = self._values.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST:
            raise ModelError(f"{self._where}: {name} is {value!r}, not an integer from 0 on")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._values.get(name)
        if value is None:
            value = default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ModelError(f"{self._where}: {name} is {value!r}, not a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(f"{self._where}: {name} is {value!r}, not true or false")
        return value

    def only(self, name: str, allowed: object) -> None:
        """Refuse any value except `allowed`; absent and null count as allowed."""
        value = self._values.get(name)
        if value is not None and value != allowed:
            raise ModelError(f"{self._where}: {name} = {value!r} is not supported; only {allowed!r} is")
