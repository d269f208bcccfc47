"""The engine of the idle worker: it does nothing, at a steady rate, so that what is left is the queue.

It serves what a worker with a decoder and an encoder serves, all kinds; with BENCH_KINDS=generate only that. A
generation request of `max_tokens=1` ends at once, an embedding job with the next of BENCH_RATE steps a second. A longer
generation makes an entry every `top_k` steps (0: each one), each with the time at which it was given to the publisher
in its `logit`: a reader can see how long it was on its way.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.idle_models import ENCODER, MODEL, token
from engine.ticket import Entry, Ticket
from stoker.contract import EmbedRequest, GenerateRequest, GenerateResult, ModelCard, Usage
from stoker.contract.vectors import Embedded

KINDS = {MODEL: ("generate", "train", "adapters"), ENCODER: ("embed",)}
ONE_KIND = {MODEL: ("generate",)}
DIM = 8
#: Steps a second.
RATE = float(os.environ.get("BENCH_RATE", "20"))


@dataclass
class Work:
    """A job that runs: how many entries it makes, one every `every` steps, and the index of the next."""

    request: GenerateRequest | EmbedRequest
    steps: int
    every: int = 1
    index: int = 0

    @classmethod
    def of(cls, request: GenerateRequest | EmbedRequest, index: int) -> Work:
        if isinstance(request, EmbedRequest):
            return cls(request, steps=1)
        return cls(request, request.max_tokens, max(1, request.top_k), index)

    @property
    def last(self) -> bool:
        return self.index + 1 == self.steps


class IdleEngine:
    """What a worker asks of an engine without a job of training or of models."""

    device, memory_bytes, prefix_bytes, step_began, ranks = "none", 0, 0, None, 1
    adapters: dict[str, tuple[str, ...]] = {}  # noqa: RUF012 -- read alone
    loads: dict[str, Any] = {}  # noqa: RUF012 -- read alone
    #: None that could come or go.
    models: dict[str, Any] = {}  # noqa: RUF012 -- read alone

    def __init__(self, publish: Callable[[list[Entry]], None]) -> None:
        self._publish = publish
        self._running: dict[Ticket[Any], Work] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        served = ONE_KIND if os.environ.get("BENCH_KINDS") == "generate" else KINDS
        self.cards = [
            ModelCard(model=model, architecture="none", kinds=kinds, context=10**6, parameters=0, dim=DIM)
            for model, kinds in served.items()
        ]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None: ...

    def wake(self) -> None: ...

    def hurry(self) -> None: ...

    def makes_way(self, priority: int) -> bool:
        return False

    def submit(
        self,
        job_id: str,
        request: GenerateRequest | EmbedRequest,
        data: Any = None,
        *,
        deadline: float | None = None,
        sent: float | None = None,
    ) -> Ticket[Any]:
        ticket: Ticket[Any] = Ticket(job_id, request.kind, deadline)
        if isinstance(request, GenerateRequest) and request.max_tokens == 1:
            ticket.resolve(_result(request))
        else:
            with self._lock:
                self._running[ticket] = Work.of(request, len(data or ()))
        return ticket

    def _run(self) -> None:
        due, turn = time.monotonic(), 0
        while True:
            due, turn = due + 1 / RATE, turn + 1
            time.sleep(max(0.0, due - time.monotonic()))
            with self._lock:
                running = [one for one in self._running.items() if one[0].stopping or turn % one[1].every == 0]
            going = [(ticket, work) for ticket, work in running if not ticket.stopping]
            entries: list[Entry] = [
                (ticket.job_id, token(work.index, work.last))
                for ticket, work in going
                if isinstance(work.request, GenerateRequest)
            ]
            if entries:
                self._publish(entries)
            self._end([(ticket, work) for ticket, work in running if ticket.stopping or work.last])
            for _, work in going:
                work.index += 1

    def _end(self, ended: list[tuple[Ticket[Any], Work]]) -> None:
        with self._lock:
            for ticket, _ in ended:
                del self._running[ticket]
        for ticket, work in ended:
            if ticket.stopping:
                ticket.fail_stopped()
            else:
                ticket.resolve(_result(work.request))


def _result(request: GenerateRequest | EmbedRequest) -> Embedded | GenerateResult:
    if isinstance(request, EmbedRequest):
        return Embedded(np.zeros((len(request.texts), DIM), np.float32), tokens=0, run_seconds=0.0)
    return GenerateResult(
        model=request.model,
        adapter=None,
        text="",
        token_ids=(),
        finish_reason="length",
        usage=Usage(completion_tokens=request.max_tokens),
    )
