"""Booting a worker: BLAS, models, queues, then the threads that speak for it. The order is the point of this file.

The engine is a worker step that starts before the pool and stops after it: an exception here ends the process with
exit code 1 (one in a signal handler would be swallowed), and running tasks can finish while the pool drains.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import Celery, bootsteps
from celery.apps import worker as celery_worker
from celery.platforms import EX_FAILURE
from celery.signals import setup_logging, worker_ready, worker_shutting_down
from celery.worker import components, state

from stoker.errors import StokerError
from stoker.local import boot_errors
from stoker.local.keeping import sent_again
from stoker.logs.redaction import Redactor, secrets_of
from stoker.logs.setup import configure
from stoker.settings import Settings
from workers import clock, run_sweep, unloaded
from workers.artifacts import Artifacts
from workers.capacity import queues_of
from workers.celery import control
from workers.celery.interrupts import Interrupts
from workers.celery.lanes import LaneStep
from workers.celery.lease import LeaseStep
from workers.celery.queues import ConsumedQueues
from workers.context import WorkerContext
from workers.services import drain, resting
from workers.services.background import Background
from workers.services.broker_check import check_broker
from workers.services.cancelling import CancelWatch
from workers.services.housekeeping import EVERY, Housekeeping
from workers.services.janitor import Janitor
from workers.services.managing import model_management
from workers.services.measuring import Measuring
from workers.services.overtaking import EVERY as LOOK_EVERY
from workers.services.overtaking import Overtaking
from workers.services.pinning import EVERY as PINS_EVERY
from workers.services.pinning import PinnedPrefixes
from workers.services.presence import Heart
from workers.services.runtime import Runtime
from workers.services.watchdog import Watchdog
from workers.unreadable import DeadMessages

log = logging.getLogger(__name__)

#: Seconds between looks at the types of keys that jobs share.
MEND_EVERY = 1.0


class EngineStep(bootsteps.StartStopStep):
    """Owns the `Runtime` of this process."""

    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._context: WorkerContext = worker.app.context
        self._runtime: Runtime | None = None
        self._heart: Heart | None = None
        self._measuring: Measuring | None = None
        self._interrupts = Interrupts()

    def start(self, worker: Any) -> None:
        with self._interrupts.starting():
            self._runtime = running = self._made_runtime(self._context.settings, _process_name(worker.hostname))
            self._context.install(running)
        self._guard_delivery(running)
        self._open_queues(worker.app, running)
        self._watch_jobs(running)
        if self._measuring is not None:
            self._measuring.start()
        heart = self._heart = Heart(running, self._context.lanes, Janitor(running))
        self._manage_models(running, heart)
        self._keep_prefixes(running, heart)
        heart.start()
        self._tidy(running)
        overtaking = Overtaking(running, self._context.lanes, running.settings.extra_slots)
        _repeat(running, "overtaking", overtaking.round, every=LOOK_EVERY)
        _repeat(running, "mending", lambda: _mend(running, heart), every=MEND_EVERY)

    def _made_runtime(self, settings: Settings, name: str) -> Runtime:
        try:
            check_broker(settings)
            Artifacts(settings, None).check()
            made = Runtime(settings, name, lambda publish: self._context.make_engine(settings, publish, _end_process))
            # Before the models, which take their time: a port that cannot be had is said at once.
            self._measuring = Measuring(made, self._context.lanes, self._context.deliveries.health)
            self._measuring.listen()
            made.start()
            return made
        except StokerError as error:
            # One line that `stoker up` and people can read, and no traceback: the message says what to do.
            said = Redactor(secrets_of(settings))(str(error))
            print(boot_errors.line_of(said), file=sys.stderr, flush=True)
            raise SystemExit(error.exit_code) from None

    def _guard_delivery(self, running: Runtime) -> None:
        """Before the first message comes: a message that cannot be read becomes a dead letter."""
        messages = DeadMessages(running.redis, running.name)
        self._context.deliveries.keep_dead(messages)
        self._context.deliveries.mend = running.mender.round
        _repeat(running, "dead messages", messages.write)

    def _open_queues(self, app: Celery, running: Runtime) -> None:
        """Consume what the models here can run. They are known only now, so no `-Q` says it."""
        queues = queues_of(running.engine.cards)
        self._context.lanes.configure(running.settings.slots, queues)
        app.amqp.queues.select([name for names in queues.values() for name in names])

    def _watch_jobs(self, running: Runtime) -> None:
        """End what is cancelled, and the process where a step hangs."""
        CancelWatch(running).start()
        _repeat(running, "revocations", partial(self._context.revocations.cancel_next, running))
        Watchdog(running, running.settings.step_limit).start()

    def _manage_models(self, running: Runtime, heart: Heart) -> None:
        """Models come and go from now on, one after the other: one thread loads and unloads."""
        queues = ConsumedQueues(self._context.lanes)
        self._context.consumer_started = queues.attach
        managed = model_management(running, self._context.deliveries, queues, heart.beat)
        heart.residency = lambda: managed.keeper.residency
        _repeat(running, "models", managed.commands.next, managed.demand.round)

    @staticmethod
    def _keep_prefixes(running: Runtime, heart: Heart) -> None:
        pinned = PinnedPrefixes(running, heart.beat)
        heart.prefixes = lambda: pinned.states
        _repeat(running, "pinned prefixes", pinned.round, every=PINS_EVERY)

    def _tidy(self, running: Runtime) -> None:
        """Give back disk and memory that nothing needs."""
        kept = Housekeeping(self._context.settings, sent_again(running.redis), partial(clock.behind, running.redis))
        sweeps = (partial(run_sweep.round_of, running), partial(unloaded.round_of, running))
        _repeat(running, "housekeeping", kept.round, *sweeps, every=EVERY)
        rest = resting.Resting.in_this_process(self._context.lanes)
        _repeat(running, "resting", rest.round, every=resting.EVERY)

    def stop(self, worker: Any) -> None:
        if self._heart is not None:
            self._heart.say_goodbye()
        if self._runtime is not None:
            self._runtime.stop()
        if self._measuring is not None:
            self._measuring.stop()
        self._context.install(None)

    terminate = stop

    def info(self, worker: Any) -> dict[str, Any]:
        """What Flower and `celery inspect stats` show."""
        if self._runtime is None:
            return {}
        engine = self._runtime.engine
        return {"stoker": {"models": [card.model for card in engine.cards], "lanes": self._context.lanes.load()}}


def _process_name(node: str) -> str:
    """The name of this process in the ledger. A worker that is started again keeps its `node`, and so its row in
    Flower; it must not be taken for the owner of what its predecessor left."""
    return f"{node}/{uuid.uuid4().hex[:8]}"


def _repeat(running: Runtime, name: str, *rounds: Callable[[], object], every: float = 0.0) -> None:
    """In a thread of its own, until the worker stops."""
    Background(name, *rounds, stopped=running.stopped, every=every).start()


def _mend(running: Runtime, heart: Heart) -> None:
    """A registry that was moved aside is empty: say at once that this worker is there."""
    if running.mender.round():
        heart.beat()


def _end_process() -> None:
    """A worker without an engine would take jobs only to give them back: end, and let the supervisor start another."""
    state.should_terminate = EX_FAILURE


def install(app: Celery, context: WorkerContext) -> None:
    """Add Stoker's steps to a Celery app, and what its context shares with them."""
    app.context = context
    control.install()
    components.Pool.requires = (*components.Pool.requires, EngineStep)
    app.steps["worker"].add(EngineStep)
    app.steps["consumer"].update((LaneStep, LeaseStep))
    # A receiver makes Celery set up no log of its own.
    setup_logging.connect(lambda **_: configure(context.settings), weak=False)
    worker_ready.connect(lambda **_: _say_ready(context), weak=False)
    # Celery says by this that it was asked to stop; our own line says more, and is a line of the log.
    celery_worker.safe_say = _leave_out
    worker_shutting_down.connect(lambda **_: _drain(context), weak=False)


def _say_ready(context: WorkerContext) -> None:
    models = ", ".join(card.model for card in context.runtime.engine.cards)
    log.info("worker %s takes jobs of %s from %s", context.runtime.name, models, context.settings.address.shown)


def _leave_out(*_: object) -> None: ...


def _drain(context: WorkerContext) -> None:
    try:
        drain.begin(context.runtime, context.deliveries, context.lanes)
    except Exception:
        # Celery swallows what a signal handler raises; without this line nobody would know.
        log.exception("draining could not begin")
