"""What one worker process shares. It hangs on the Celery app, from where steps, requests and tasks get it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stoker.errors import WorkerUnavailable
from stoker.settings import Settings
from workers.capacity import Lanes
from workers.deliveries import Deliveries, Health
from workers.machine import make_engine
from workers.services.revoking import Revocations
from workers.services.runtime import Runtime

if TYPE_CHECKING:
    from engine.engine import Engine

#: From settings, what gets a step's entries, and what is called if the engine dies.
MakeEngine = Callable[[Settings, Callable[..., None], Callable[[], None]], "Engine"]


def _ignore(consumer: Any) -> None: ...


class WorkerContext:
    """Made with the app, also for Celery's own commands, which run no jobs. The boot step installs the runtime."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        #: Makes the engine when the worker starts: a test may put another in here before.
        self.make_engine: MakeEngine = make_engine
        self.lanes = Lanes()
        self.deliveries = Deliveries(Health(settings.lease))
        self.revocations = Revocations()
        #: Hears of each start of Celery's consumer, which comes with each connection to the broker.
        self.consumer_started: Callable[[Any], object] = _ignore
        self._runtime: Runtime | None = None

    @property
    def runtime(self) -> Runtime:
        if self._runtime is None:
            raise WorkerUnavailable("this process has no engine: start workers with `stoker worker`.")
        return self._runtime

    @property
    def worker(self) -> str:
        """The name of this process in the ledger; "" for one without an engine."""
        return self._runtime.name if self._runtime is not None else ""

    def install(self, runtime: Runtime | None) -> None:
        self._runtime = runtime
