"""A worker's runtime before its first job."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from stoker.broker.connection import connect
from stoker.broker.ledger.transitions import LIBRARY
from stoker.settings import Settings
from workers.services.runtime import Runtime


class Engine:
    """Does nothing, and has no model."""

    observe: Any = None
    cards: tuple[Any, ...] = ()

    def start(self) -> None: ...

    def stop(self) -> None: ...


def test_a_worker_that_starts_loads_the_ledgers_functions_for_the_clients(broker: Settings) -> None:
    runtime = Runtime(broker, "w@here", lambda publish: Engine())  # type: ignore[arg-type, return-value]
    with closing(connect(broker)) as client:
        client.function_flush()
        runtime.start()
        try:
            assert LIBRARY.name.encode() in str(client.function_list()).encode()
        finally:
            runtime.stop()
