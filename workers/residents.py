"""Which models a worker holds, how much room they take, and which of them makes way for another. No input or output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from stoker.errors import ModelError

MEGABYTE = 2**20


class Origin(StrEnum):
    """Why a model is held."""

    STARTED = "started"
    COMMANDED = "commanded"
    DEMANDED = "demanded"


class NoRoom(ModelError):
    """Other models would have to leave first, and may not. Another moment may be better."""


@dataclass
class Resident:
    """`bytes`: of its weights. `used`: when a job of it was here last, by the clock of `Residents`."""

    model: str
    sources: tuple[str, ...]
    origin: Origin
    bytes: int
    used: float
    pinned: bool = False


class Residents:
    """`limit`: bytes that the weights of all may take together when another one comes."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.clock = limit, clock
        self._held: dict[str, Resident] = {}

    def __iter__(self) -> Iterator[Resident]:
        return iter(list(self._held.values()))

    def get(self, model: str) -> Resident | None:
        return self._held.get(model)

    def add(self, model: str, sources: Iterable[str], origin: Origin, size: int) -> Resident:
        self._held[model] = Resident(model, tuple(sources), origin, size, self.clock())
        return self._held[model]

    def remove(self, model: str) -> Resident:
        return self._held.pop(model)

    @property
    def bytes(self) -> int:
        return sum(resident.bytes for resident in list(self._held.values()))

    def makes_way(self, model: str, need: int, busy: Callable[[str], str]) -> list[str]:
        """The models that leave for one of `need` bytes, the one first whose last job is longest ago. `busy`: why a
        model cannot leave now, "" if it can. Raises `NoRoom`."""
        leaving: list[str] = []
        staying: list[str] = []
        free = self.limit - self.bytes
        for resident in sorted(self._held.values(), key=lambda each: each.used):
            if free >= need:
                break
            why = "pinned" if resident.pinned else busy(resident.model)
            if why:
                staying.append(f"{resident.model} ({resident.bytes / MEGABYTE:,.0f} MB, {why})")
            else:
                leaving.append(resident.model)
                free += resident.bytes
        if free < need:
            raise NoRoom(self._refusal(model, need, free, staying))
        return leaving

    def _refusal(self, model: str, need: int, free: int, staying: list[str]) -> str:
        asked = f"model {model}: its weights take about {need / MEGABYTE:,.0f} MB"
        if need > self.limit:
            return (
                f"{asked}, and those of all models of this worker may take {self.limit / MEGABYTE:,.0f} MB together. "
                "Raise STOKER_MODEL_MEMORY, or quantize it (STOKER_QUANTIZE)."
            )
        return (
            f"{asked}; {max(0, free) / MEGABYTE:,.0f} of {self.limit / MEGABYTE:,.0f} MB can be had. These would have "
            f"to be unloaded first: {', '.join(staying)}. Or raise STOKER_MODEL_MEMORY."
        )
