"""What one worker process shares. It hangs on the Celery app, from where steps, requests and tasks get it."""

from __future__ import annotations

from stoker.errors import WorkerUnavailable
from stoker.settings import Settings
from workers.capacity import Lanes
from workers.deliveries import Deliveries, Health
from workers.services.runtime import Runtime


class WorkerContext:
    """Made with the app, also in Flower's process, which runs no jobs. The boot step installs the runtime."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lanes = Lanes()
        self.deliveries = Deliveries(Health(settings.lease))
        self._runtime: Runtime | None = None

    @property
    def runtime(self) -> Runtime:
        if self._runtime is None:
            raise WorkerUnavailable("this process has no engine: start workers with `stoker worker`.")
        return self._runtime

    def install(self, runtime: Runtime | None) -> None:
        self._runtime = runtime
