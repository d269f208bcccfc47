"""Flower's memory of tasks, with what only the ledger knows of them.

Workers' events say when a job was received, started and ended. They come only from workers that are asked to send them,
they know nothing of a job that waits, and Celery ranks any state of its own making above every end. So the ledger has
the last word here: `JobMemory.hear` takes in what the ledger says of a task, and a worker's event never overrules an
end. Neither prompts nor results are taken in.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from celery import states
from celery.events.state import Task
from flower.events import Events, EventsState

from stoker.contract.kinds import task_name
from stoker.logs.redaction import shown
from stoker.monitor.notices import Ended, Known, Progress, Started, TaskNotice, WaitsAgain

log = logging.getLogger(__name__)

#: What an event of a worker says of a job that the ledger says better, or that nobody is to read.
LEFT_OUT = frozenset({"args", "kwargs", "result"})


class MonitoredJob(Task):
    """A task that is a job of Stoker's. `progress`: how far it is, in words."""

    progress: str | None = None
    state: str
    sent: float | None
    timestamp: float | None
    _fields = (*Task._fields, "progress")

    def event(
        self,
        type_: str,
        timestamp: float | None = None,
        local_received: float | None = None,
        fields: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> None:
        """What a worker says."""
        said = {name: value for name, value in (fields or {}).items() if name not in LEFT_OUT}
        if type_ == "progress":
            share = said.get("progress")
            self.progress = f"{share:.0%}" if isinstance(share, float) else self.progress
            return
        super().event(type_, timestamp, local_received, said, **named)

    def hear(self, notice: TaskNotice, worker: Any) -> None:
        """What the ledger says."""
        match notice:
            case Known():
                self._describe(notice)
            case Started(time=time):
                self._move(states.STARTED, time, started=self.started or time, worker=worker or self.worker)
            case WaitsAgain(time=time, crashes=crashes):
                self._move(states.RETRY, time, retried=time, retries=crashes)
            case Progress(text=text):
                self.progress = text
            case Ended() if self.state not in states.READY_STATES:
                self._end(notice)

    def _describe(self, job: Known) -> None:
        if self.state in states.READY_STATES and self.sent not in (None, job.submitted):
            # A dead letter that was sent again, under its own id.
            self._move(states.RETRY, job.submitted, retried=job.submitted, progress=None, exception=None, runtime=None)
        arguments = {name: value for name, value in job.shown().items() if value != ""}
        self.name, self.client, self.sent = task_name(job.kind), job.client, job.submitted
        self.args, self.kwargs, self.retries = f"({job.model})", repr(arguments), job.crashes
        self.timestamp = self.timestamp or job.submitted

    def _end(self, end: Ended) -> None:
        moment = {"SUCCESS": "succeeded", "FAILURE": "failed", "REVOKED": "revoked"}[end.state]
        runtime = end.time - self.started if self.started and not self.runtime else self.runtime
        self._move(end.state, end.time, **{moment: end.time, "runtime": runtime, "exception": end.error or None})

    def _move(self, state: str, time: float, **fields: Any) -> None:
        self.__dict__.update(fields, state=state, timestamp=time)


class JobMemory(EventsState):
    Task = MonitoredJob

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        #: Ids of tasks whose events came before the ledger described them.
        self.strangers: set[str] = set()

    def event(self, event: Any) -> None:
        """What Celery reports. Every program that reaches the broker may report: what cannot be read is left out."""
        try:
            super().event(event)
            if event["type"].startswith("task-") and self.tasks.data[event["uuid"]].sent is None:
                self.strangers.add(event["uuid"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            log.warning("an event that cannot be read was left out (%s)", shown(error))

    def hear(self, notices: list[TaskNotice]) -> None:
        """What the ledger says, in order. Called in the thread of the loop."""
        for notice in notices:
            with self._mutex:
                self._hear(notice)

    def _hear(self, notice: TaskNotice) -> None:
        evicted = self._eviction_candidate(notice.id)
        task, _ = self.get_or_create_task(notice.id)
        worker = None
        if isinstance(notice, Started):
            worker, _ = self.get_or_create_worker(notice.node)
        task.hear(notice, worker)
        if task.name:
            self._seen_types.add(task.name)
        self._index_task(task, evicted)

    def meet_strangers(self, limit: int) -> list[str]:
        """Ids of tasks that the ledger has to describe, each once: what it does not know is not ours."""
        found = sorted(self.strangers)[:limit]
        self.strangers.difference_update(found)
        return found

    def unfinished(self) -> set[str]:
        """Ids of the tasks that have not ended, as far as is known here."""
        return {name for name, task in self.tasks.items() if not task.ready}


class JobEvents(Events):
    """Flower's thread that hears events, with `JobMemory`."""

    state: Any

    def __init__(self, capp: Any, io_loop: Any, *, max_tasks_in_memory: int, **named: Any) -> None:
        super().__init__(capp, io_loop, max_tasks_in_memory=max_tasks_in_memory, **named)
        if not isinstance(self.state, JobMemory):
            self.state = JobMemory(max_tasks_in_memory=max_tasks_in_memory)

    def start(self) -> None:
        super().start()
        # At once: what workers do until Flower's first round would not be reported.
        self.io_loop.add_callback(self.on_enable_events)

    def on_event(self, event: Any) -> None:
        super().on_event(event)
        if event.get("type") == "worker-online":
            self.io_loop.add_callback(self.on_enable_events)
