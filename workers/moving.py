"""Training runs that move: their checkpoints go to the store in a thread of their own, and a worker that gets a run
goes on where the store, or its own disk, has it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from redis.exceptions import RedisError

from engine.training import carried
from stoker.address import Address
from stoker.contract import TrainRequest
from stoker.contract.kinds import TRAIN
from stoker.contract.names import Rule, checked
from stoker.errors import JobDead, StokerError, WorkerUnavailable
from stoker.settings import Settings
from workers.artifacts import StoreTrouble
from workers.job import Job
from workers.others import others
from workers.run_manifest import Manifest
from workers.run_parts import NoRoom
from workers.run_store import Damaged, RunStore
from workers.services.background import Background
from workers.services.runtime import Fenced, Runtime

log = logging.getLogger(__name__)

#: Seconds until an upload that failed is tried again.
RETRY_EVERY = 5.0
#: An upload is followed by a pause this many times as long: so it takes a tenth of the time, of the broker's too.
REST = 9.0
#: Seconds that a worker which gives a run back takes to put it into the store as it is.
FLUSH = 10.0


class _Unwanted(Exception):
    """The run has ended while its checkpoint was on its way."""


def run_folder(job: Job) -> Path:
    return Path(job.runtime.settings.runs / checked(Rule.JOB_ID, "job id", job.id))


def resume(job: Job, request: TrainRequest) -> None:
    """Bring the run's folder to where the store has the run, if that is further."""
    store, run = RunStore(job.lease), run_folder(job)
    manifest = store.manifest()
    if manifest is None or not _is_further(manifest, run) or not _fits(job, request, manifest):
        return
    began = time.perf_counter()
    try:
        store.install(manifest, run)
    except Damaged as error:
        log.warning("job %s: its checkpoints in the store cannot be used (%s): it goes on without", job.id, error)
        return
    took = time.perf_counter() - began
    log.info("job %s goes on behind report %d, from the store, in %.3f s", job.id, manifest.reports, took)


def _is_further(manifest: Manifest, run: Path) -> bool:
    here = carried.newest(run)
    return here is None or here.position < manifest.position


def _fits(job: Job, request: TrainRequest, manifest: Manifest) -> bool:
    """Whether the run would make the same here: another worker may hold the model in another precision."""
    try:
        base = job.runtime.engine.model(request.model).digest
    except KeyError:
        # The engine says so when it gets the job.
        return False
    wanted = {"model": request.model, "base": base, "request": _asked(request, manifest)}
    differing = [name for name, value in wanted.items() if manifest.made_of.get(name) != value]
    if differing:
        log.warning(
            "job %s: its checkpoints in the store were made of another %s than this worker has: it begins without",
            job.id,
            " and ".join(differing),
        )
    return not differing


def _asked(request: TrainRequest, manifest: Manifest) -> dict[str, Any]:
    """The request as its checkpoints have it. Of one in epochs the dataset says the steps: the engine knows them."""
    fields, made_of = request.model_dump(mode="json"), manifest.made_of.get("request")
    if request.epochs is not None and isinstance(made_of, dict):
        fields["steps"] = made_of.get("steps")
    return fields


class RunMirror:
    """Puts the checkpoints of one run into the store, while the run is here. The engine calls `kept`, which returns at
    once; hashing, reading and sending are this thread's."""

    def __init__(self, job: Job, request: TrainRequest) -> None:
        self._job_id, self._runtime, self._model = job.id, job.runtime, request.model
        self._run, self._store = run_folder(job), RunStore(job.lease)
        self._new, self._stopped = threading.Event(), threading.Event()
        #: What the store has.
        self._sent: carried.Position | None = None
        self._behind, self._said = False, ""
        self._thread = Background(f"checkpoints of {job.id}", self._round, stopped=self._stopped)

    def kept(self) -> None:
        """There is a new checkpoint."""
        self._new.set()

    @property
    def runs(self) -> bool:
        """Whether checkpoints are sent still: not of a run that another worker has."""
        return not self._stopped.is_set()

    def __enter__(self) -> RunMirror:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The run has ended, or goes to another worker: then it is put into the store as it is."""
        end = time.monotonic() + FLUSH
        self._stopped.set()
        self._new.set()
        self._thread.join(FLUSH)
        if isinstance(error, WorkerUnavailable):
            if not isinstance(error, Fenced):
                self._flush(end)
        elif error is None or (isinstance(error, StokerError) and not isinstance(error, JobDead)):
            self._store.clear()

    def _flush(self, end: float) -> None:
        """Until then, by `time.monotonic`."""

        def go_on() -> None:
            if self._thread.alive or time.monotonic() > end:
                raise TimeoutError(f"the worker stops, and {FLUSH:g} s were not enough")

        try:
            self._upload(go_on)
        except Exception:
            # What ends the job is said by what did; this must not take its place.
            log.exception("job %s: its checkpoint was not put into the store", self._job_id)

    def _round(self) -> None:
        # A limit, so that what failed is tried again.
        self._new.wait(RETRY_EVERY)
        if self._stopped.is_set() or not (self._new.is_set() or self._behind):
            return
        self._new.clear()
        began = time.monotonic()
        with suppress(_Unwanted):
            self._behind = not self._upload(self._go_on)
        took = time.monotonic() - began
        self._stopped.wait(max(self._runtime.settings.checkpoint_pause, REST * took))

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise _Unwanted

    def _upload(self, go_on: Callable[[], object]) -> bool:
        """Whether there is nothing to be done until the next checkpoint."""
        try:
            self._send(go_on)
        except Fenced:
            self._stopped.set()
        except NoRoom as error:
            self._say(error)
        except (RedisError, StoreTrouble, Damaged, OSError) as error:
            self._say(error)
            return False
        return True

    def _send(self, go_on: Callable[[], object]) -> None:
        if not wanted(self._runtime, self._model):
            return
        with ExitStack() as resources:
            found = carried.snapshot(self._run, resources)
            if found is not None and (self._sent is None or self._sent < found.notes.position):
                self._store.put(found, go_on)
                self._sent, self._said = found.notes.position, ""

    def _say(self, error: Exception) -> None:
        """Once for errors of one kind, until another upload has succeeded: sizes change with each checkpoint."""
        kind = type(error).__name__
        if kind != self._said:
            what = str(error) if isinstance(error, NoRoom) else f"{kind}: {error}"
            log.warning("job %s: its newest checkpoint is on this machine alone: %s", self._job_id, what)
        self._said = kind


def wanted(runtime: Runtime, model: str) -> bool:
    """Whether checkpoints go to the store. By default, except where nobody would gain: this worker's broker is that of
    its own home, which goes with the same disk, and no other worker trains this model."""
    how = runtime.settings.checkpoints
    if how != "auto":
        return how == "always"
    return not _shares_its_home(runtime.settings) or _others_train(runtime, model)


def _shares_its_home(settings: Settings) -> bool:
    own = settings.running_broker
    return own is not None and Address.parse(own.url).shown == settings.address.shown


def _others_train(runtime: Runtime, model: str) -> bool:
    alive = others(runtime.redis, runtime.name)
    return any(card.takes(model, TRAIN.name) for presence in alive for card in presence.models)
