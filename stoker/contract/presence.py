"""What workers say of themselves: clients read it to tell which models are warm."""

from __future__ import annotations

from stoker.contract.base import Message


class ModelCard(Message):
    """A model that some worker serves."""

    model: str
    architecture: str
    kinds: tuple[str, ...]
    #: Longest input, in tokens.
    context: int
    parameters: int
    #: Length of a vector; 0 for models that make none.
    dim: int = 0
    #: When a worker last said that it serves the model, seconds since the epoch.
    seen: float = 0.0


class Presence(Message):
    """One worker, as of `time` (seconds since the epoch)."""

    worker: str
    host: str
    pid: int
    device: str
    started: float
    time: float
    models: tuple[ModelCard, ...]
    #: model → adapters in the worker's memory.
    adapters: dict[str, tuple[str, ...]]
    #: kind → jobs held now, jobs that can be held.
    lanes: dict[str, tuple[int, int]]
    memory_bytes: int
