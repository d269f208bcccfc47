"""What a job ends with."""

from __future__ import annotations

from typing import Literal

from stoker.contract.base import Message


class Usage(Message):
    """Counts, and seconds spent in each phase on the worker."""

    worker: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: From submission until the engine began.
    queued_seconds: float = 0.0
    #: From the engine's start of this job until its end.
    run_seconds: float = 0.0
    #: Generation: until the first token was there.
    first_token_seconds: float = 0.0


class EmbedReply(Message):
    """The vectors are in the blob `blob`: safetensors bytes with one tensor `vectors`, float32 (rows, dim)."""

    blob: str
    rows: int
    dim: int
    usage: Usage


class GenerateResult(Message):
    model: str
    adapter: str | None
    text: str
    token_ids: tuple[int, ...]
    #: `stop`: an end-of-sequence token; `length`: `max_tokens` was reached.
    finish_reason: Literal["stop", "length"]
    usage: Usage


class TrainResult(Message):
    model: str
    #: The adapter's name and version; `name@version` pins this one.
    adapter: str
    version: int
    steps: int
    first_loss: float
    last_loss: float
    #: Tokens that went through the model.
    tokens: int
    usage: Usage
