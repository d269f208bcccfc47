"""A real worker whose engine does nothing: what is left is the queue. `celery -A bench.idle_worker worker …`.

A generation request of `max_tokens=1` ends at once. A longer one makes an entry every `top_k` steps (0: each one), each
with the time at which it was handed to the publisher in its `logit`: a reader can tell how long it was on its way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from engine.ticket import Entry, Ticket
from stoker.contract import GenerateRequest, GenerateResult, ModelCard, StreamToken, Usage
from workers import boot
from workers.app import app

MODEL = "idle"
#: Steps a second.
RATE = 20.0

__all__ = ["app"]


class IdleEngine:
    """What `workers.runtime` asks of an engine."""

    device, adapters, memory_bytes, step_began = "none", {}, 0, None

    def __init__(self, publish: Callable[[list[Entry]], None]) -> None:
        self._publish = publish
        self._running: dict[Ticket, tuple[GenerateRequest, int]] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.cards = [ModelCard(model=MODEL, architecture="none", kinds=("generate",), context=10**6, parameters=0)]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None: ...

    def wake(self) -> None: ...

    def submit(
        self, job_id: str, request: GenerateRequest, data: Any = None, *, deadline: float | None = None
    ) -> Ticket:
        ticket = Ticket(job_id, request.kind, deadline)
        if request.max_tokens == 1:
            ticket.resolve(_result(request))
        else:
            with self._lock:
                self._running[ticket] = (request, len(data or ()))
        return ticket

    def _run(self) -> None:
        due, turn = time.monotonic(), 0
        while True:
            due, turn = due + 1 / RATE, turn + 1
            time.sleep(max(0.0, due - time.monotonic()))
            with self._lock:
                held = list(self._running.items())
            running = [(ticket, work) for ticket, work in held if turn % max(1, work[0].top_k) == 0]
            entries: list[Entry] = []
            for ticket, (request, index) in running:
                last = index + 1 == request.max_tokens
                if not ticket.stopping:
                    entries.append((ticket.job_id, token(index, last)))
                with self._lock:
                    if last or ticket.stopping:
                        del self._running[ticket]
                    else:
                        self._running[ticket] = (request, index + 1)
            if entries:
                self._publish(entries)
            for ticket, (request, index) in running:
                if ticket.stopping:
                    ticket.fail_stopped()
                elif index + 1 == request.max_tokens:
                    ticket.resolve(_result(request))


def token(index: int, last: bool) -> StreamToken:
    return StreamToken(
        index=index,
        token_id=7,
        text=" the",
        logit=time.time(),
        logprob=-1.0,
        probability=0.4,
        is_eos=False,
        finish_reason="length" if last else None,
    )


def _result(request: GenerateRequest) -> GenerateResult:
    return GenerateResult(
        model=request.model, adapter=None, text="", token_ids=(), finish_reason="length", usage=Usage()
    )


boot._make_engine = lambda settings, publish: IdleEngine(publish)  # type: ignore[assignment,return-value]
