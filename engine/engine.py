"""The warm engine: models that stay loaded, and the one thread that touches MLX.

Call `engine.platform.blas.boot()` before this module is imported: it imports MLX.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import mlx.core as mx

from engine.adapters.pool import BUDGET, AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.drafts import DraftSource, with_draft
from engine.checkpoints.loading import LoadedModel, PrecisionOptions, load
from engine.checkpoints.prospect import Prospect, prospect
from engine.delivery import Publish, deliver
from engine.errand import Errand, OwnThread
from engine.generation.lane import GenerateLane
from engine.generation.leading import LeadingLane, Sharing
from engine.generation.limits import GenerationLoad, LaneLimits
from engine.generation.pinning import Pinning
from engine.lane import AnyLane
from engine.making_way import LOOK_EVERY, MakingWay, Neighbours
from engine.models.shard import Shard
from engine.platform import heap, probe
from engine.platform.threads import collect, leave
from engine.prefixes.disk import DiskLimits, PrefixDisk
from engine.sparing import Pause, Sparing, no_pause
from engine.text import trial
from engine.ticket import StepOutput, Ticket, contained
from engine.training.memory import BUDGET as RUN_BUDGET
from engine.training.memory import RunMemory, kept_bytes
from engine.training.ranks import ALONE, Group
from engine.warm import WarmModels
from stoker.contract import (
    AdapterRequest,
    AdapterResult,
    EmbedRequest,
    GenerateRequest,
    GenerateResult,
    ModelCard,
    Request,
    StreamToken,
    TrainRequest,
    TrainResult,
)
from stoker.contract.bundle import AdapterInput
from stoker.contract.dataset import TrainInput
from stoker.contract.kinds import KINDS
from stoker.contract.vectors import Embedded
from stoker.errors import UnknownModel, WorkerUnavailable

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Tokens of a generation job that another process published.
Published: TypeAlias = Sequence[StreamToken] | None
JobData: TypeAlias = Published | TrainInput | AdapterInput
#: Hears of each step, in the engine's thread: the lane's model and kind, the seconds that it took, what it made.
Observe: TypeAlias = Callable[[str, str, float, StepOutput], None]

_END = object()


@dataclass(frozen=True)
class _Prepared:
    """What a lane has made of a job, on its way into the engine's thread."""

    model: str
    lane: AnyLane
    ticket: Ticket[Any]
    work: Any


class Engine:
    """Holds models warm and runs jobs on them.

    `models` maps a name to its sources (`engine.checkpoints.sources`). `adapters` and `runs` are folders: for trained
    adapters, and for the checkpoints and logs of training runs (default: `runs` in the same parent). `adapter_bytes`:
    what adapters of one model may take in memory; `run_bytes`: what training runs may keep there together between their
    turns. `train_share`: of the time, 0 to 1, while generation waits too.
    `publish` gets the entries of a step, from the engine's thread: it must hand them on and return, or raise and have
    taken none. Then it gets the entries of each job alone, and a job whose entries it raises for ends with this error.
    `limits`: of each model's generation. `precision`: what `load` takes. `neighbours`: workers on the same device, for
    whose streams it makes way. `prefixes`: those on disk; None: there are none. `group`: the ranks that share its
    training runs, of which it is the first; `sharing`: those that share its generating models. `drafts`: model → what
    drafts for it. `on_death` is called, from the same thread, if the loop ends by a defect: an engine does not come
    back, its process has to.
    """

    def __init__(
        self,
        models: Mapping[str, Sequence[str]],
        *,
        adapters: Path,
        runs: Path | None = None,
        adapter_bytes: int = BUDGET,
        run_bytes: int = RUN_BUDGET,
        train_share: float = 0.2,
        publish: Publish,
        limits: LaneLimits | None = None,
        precision: PrecisionOptions | None = None,
        neighbours: Neighbours | None = None,
        prefixes: DiskLimits | None = None,
        group: Group = ALONE,
        sharing: Sharing | None = None,
        drafts: Mapping[str, DraftSource] | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._sources, self._drafts = dict(models), dict(drafts or {})
        self.store = AdapterStore(adapters)
        self.run_memory = RunMemory(run_bytes)
        self._publish = publish
        self._on_death = on_death
        self._precision = precision or PrecisionOptions()
        self._inbox: queue.SimpleQueue[_Prepared | Errand[Any] | None] = queue.SimpleQueue()
        self._prefixes = PrefixDisk(prefixes, self.store, self._run_errand)
        runs = runs or adapters.parent / "runs"
        limits = limits or LaneLimits()
        self._warm = WarmModels(self.store, runs, limits, adapter_bytes, train_share, self._prefixes, group, sharing)
        self._group, self._sharing = group, sharing
        self._way = MakingWay(neighbours, train_share)
        self._sparing, self._loader = Sparing(), OwnThread("loading")
        self._ready = threading.Event()
        self._stopping = False
        self._failure: BaseException | None = None
        #: When the step that runs now began (monotonic seconds); None between steps. For a watchdog.
        self.step_began: float | None = None
        #: Called after each step; must return at once and raise nothing.
        self.observe: Observe = _ignore
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Load every model; returns when all are warm, raises `ModelError` if one cannot be."""
        heap.arrange()
        self.store.sweep()
        self._prefixes.start()
        self._thread.start()
        self._ready.wait()
        trial.end()
        if self._failure is not None:
            raise self._failure

    def stop(self, timeout: float = 10.0) -> None:
        """End the loop after its current step; jobs that still run end with `WorkerUnavailable`."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._loader.end(timeout)
        self._prefixes.end(timeout)

    @overload
    def submit(
        self, job_id: str, request: EmbedRequest, data: None = None, *, deadline: float | None = None
    ) -> Ticket[Embedded]: ...
    @overload
    def submit(
        self,
        job_id: str,
        request: GenerateRequest,
        data: Published = None,
        *,
        deadline: float | None = None,
        sent: float | None = None,
    ) -> Ticket[GenerateResult]: ...
    @overload
    def submit(
        self, job_id: str, request: TrainRequest, data: TrainInput | None, *, deadline: float | None = None
    ) -> Ticket[TrainResult]: ...
    @overload
    def submit(
        self, job_id: str, request: AdapterRequest, data: AdapterInput, *, deadline: float | None = None
    ) -> Ticket[AdapterResult]: ...
    def submit(
        self,
        job_id: str,
        request: Request,
        data: JobData = None,
        *,
        deadline: float | None = None,
        sent: float | None = None,
    ) -> Ticket[Any]:
        """Queue a job. Raises at once if the request does not fit the model.

        `data` of a generation job: the tokens that were published already; the job goes on behind them. `deadline`:
        seconds from now after which the job ends with `DeadlineExceeded`. `sent`: when its client sent it, in seconds
        since the epoch, which is the date that chat templates write; None: now.
        """
        lane = self._warm.lanes.get((request.model, request.kind))
        if lane is None:
            if request.model in self._warm.gone:
                raise _unloaded(request.model)
            warm = sorted(model for model, kind in self._warm.lanes if kind == request.kind)
            raise UnknownModel(f"model {request.model!r} given; this worker can {request.kind} with {warm}.")
        ticket: Ticket[Any] = Ticket(job_id, request.kind, deadline, priority=request.priority, sent=sent)
        self._send(lane, ticket, request, data)
        return ticket

    def _send(self, lane: AnyLane, ticket: Ticket[Any], request: Request, data: JobData) -> None:
        try:
            prepared = lane.prepare(ticket, request, data)
        except Exception:
            raise
        except BaseException as error:
            raise contained(error) from error
        self._inbox.put(_Prepared(request.model, lane, ticket, prepared))
        if self._stopping:
            # After the put: a loop that ends at this very moment may not have seen it.
            ticket.fail(_stopping())

    def pinning(self, model: str) -> Pinning | None:
        """The pinned prefixes of a model that is warm, and generates; None for another, and for one that ranks share:
        what each of them keeps has to be the same. From any thread."""
        lane = self._warm.lanes.get((model, GenerateRequest.kind))
        if not isinstance(lane, GenerateLane) or isinstance(lane, LeadingLane):
            return None

        def submit(request: GenerateRequest) -> Ticket[GenerateResult]:
            ticket: Ticket[GenerateResult] = Ticket("pinned", request.kind, priority=request.priority, quiet=True)
            self._send(lane, ticket, request, None)
            return ticket

        return Pinning(lane, self._run_errand, submit)

    @property
    def idle(self) -> bool:
        """Whether no lane has work. From any thread."""
        return not any(lane.busy for lane in self._warm.lanes.values())

    def load(self, name: str, sources: Sequence[str]) -> LoadedModel:
        """Make another model warm next to the jobs that run. For callers in other threads than the engine's, one at a
        time. Raises `ModelError`, and then nothing has changed.

        Its files are read, and its kernels compiled, in a thread of its own; the engine's warms its lanes up, a step at
        a time, between the steps of the others. Running streams are spared (`engine.sparing`).
        """
        with self._sparing.loading():
            model = self._loader.run(lambda: self._read(name, sources))
            warming = self._warm.hold(model)
            self._sparing.pause()
            while self._run_errand(lambda: _goes_on(warming)):
                self._sparing.pause()
        return model

    def _read(self, name: str, sources: Sequence[str]) -> LoadedModel:
        """A model whose kernels are compiled. In the loader's thread."""
        try:
            model = self._loaded(name, sources, self._sparing.pause)
        finally:
            trial.end()
        for _ in self._warm.rehearsing(model):
            self._sparing.pause()
        return model

    def _loaded(
        self, name: str, sources: Sequence[str], pause: Pause = no_pause, shard: Shard | None = None
    ) -> LoadedModel:
        """The model, and with it what drafts for it."""
        model, draft = load(name, sources, pause, shard, **self._precision), self._drafts.get(name)
        return model if draft is None else with_draft(model, draft, pause, **self._precision)

    def unload(self, name: str) -> bool:
        """Free all that a model takes; False, and nothing is changed, while a job of it is here. For callers in other
        threads than the engine's."""
        gone = self._run_errand(lambda: self._warm.let_go(name))
        if gone:
            # What its passes and lanes refer to goes with the cycles that they are in.
            collect()
            mx.clear_cache()
            heap.give_back()
        return gone

    def _run_errand(self, call: Callable[[], T]) -> T:
        errand = Errand(call)
        self._inbox.put(errand)
        if self._stopping:
            # After the put, as in `submit`.
            errand.fail(_stopping())
        return errand.result()

    def wake(self) -> None:
        """Make the loop look again: a ticket was cancelled."""
        self._inbox.put(None)

    def makes_way(self, priority: int) -> bool:
        """Whether jobs of this priority rest here for streams of other workers on the device. From any thread."""
        return self._way.is_behind(priority)

    def hurry(self) -> None:
        """No job rests for other workers' streams from now on: this one stops. From any thread."""
        self._way.end()
        self.wake()

    def lane(self, model: str, kind: str) -> AnyLane:
        """The lane that runs jobs of `kind` on `model`."""
        return self._warm.lanes[model, kind]

    def model(self, name: str) -> LoadedModel:
        """A model that is warm."""
        return self._warm.models[name]

    def shares(self, name: str) -> str:
        """Of what in a model other ranks have the other part: its `heads` or `layers`; "": of nothing. From any
        thread."""
        model = self._warm.models.get(name)
        return "" if model is None or model.shard is None else model.shard.split

    def kept_by(self, request: TrainRequest) -> int:
        """Bytes that a run on a model that is warm keeps between its turns. Raises `InvalidRequest`, and for
        a model that was unloaded just now what its job would meet."""
        model = self._warm.models.get(request.model)
        if model is None:
            raise _unloaded(request.model)
        return kept_bytes(model.linear_shapes, request, model.shard)

    def forget(self, model: str, name: str, version: int) -> None:
        """Let go of an adapter's version whose files have become others: jobs that run keep it, those that come get the
        new one. For callers in other threads than the engine's."""
        lane = self._warm.lanes.get((model, GenerateRequest.kind))
        if isinstance(lane, GenerateLane):
            self._run_errand(lambda: lane.forget(name, version))

    def check_files(self, model: str, name: str, version: int) -> None:
        """`forget` a version that is in memory of other files than it has now. For callers in other threads than the
        engine's."""
        pool = self._warm.pools.get(model)
        if pool is not None and pool.is_of_others(name, version):
            self.forget(model, name, version)

    def pool(self, model: str) -> AdapterPool:
        """The adapters of `model` in memory."""
        return self._warm.pools[model]

    @property
    def models(self) -> Mapping[str, LoadedModel]:
        """Those that are warm now, by name."""
        return self._warm.models

    def prospect(self, name: str, sources: Sequence[str], *, download: bool = False) -> Prospect:
        """What a model would be here, with what drafts for it. Raises `ModelError`. From any thread."""
        found, draft = prospect(name, sources, download=download, **self._precision), self._drafts.get(name)
        if draft is None:
            return found
        return replace(found, bytes=found.bytes + prospect(*draft, download=download, **self._precision).bytes)

    @property
    def cards(self) -> list[ModelCard]:
        """What this engine serves."""
        return self._warm.cards

    @property
    def adapters(self) -> dict[str, tuple[str, ...]]:
        """model → adapters in memory, as `name@version`."""
        return self._warm.adapters

    @property
    def loads(self) -> dict[str, GenerationLoad]:
        """Generating model → how full its lane is. From any thread."""
        return self._warm.loads

    @property
    def prefix_bytes(self) -> int:
        """What kept prefixes take on the disk, those of this machine's other workers too."""
        return self._prefixes.nbytes

    @property
    def ranks(self) -> int:
        """Processes that share its training runs, this one included."""
        return self._group.size

    @property
    def device(self) -> str:
        return probe.device()

    @property
    def memory_bytes(self) -> int:
        return int(mx.get_active_memory())

    def _main(self) -> None:
        try:
            self._load_all()
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._ready.set()
        try:
            while not self._stopping:
                self.step()
        except BaseException as error:
            log.critical("the engine's loop ended", exc_info=True)
            self._failure = error
            self._on_death()
        finally:
            self._stopping = True
            self._sparing.end()
            self._fail_everything()
            self._group.close()
            leave()

    def _load_all(self) -> None:
        """The models that the engine starts with, in its thread."""
        self._group.join()
        if self.ranks > 1:
            self._load_together()
            return
        for name, sources in self._sources.items():
            self._hold(self._loaded(name, sources))

    def _load_together(self) -> None:
        """All models first: a lane of a model that the ranks share is warmed up by all of them."""
        shard = None if self._sharing is None else self._sharing.shard
        models = [self._loaded(name, sources, shard=shard) for name, sources in self._sources.items()]
        self._group.hold({model.name: model.digest for model in models})
        for model in models:
            self._hold(model)

    def _hold(self, model: LoadedModel) -> None:
        for _ in self._warm.hold(model):
            pass

    def step(self) -> None:
        """One turn of the loop: take new work, drop stopped work, run the lane whose turn it is, report."""
        self._admit()
        self._drop_stopped()
        self._way.announce(self._warm.lanes)
        behind = self._way.behind(self._warm.lanes)
        turn = self._choose(behind)
        if turn is None:
            self._rest()
        else:
            self._take_turn(turn, makes_way=turn in behind)

    def _choose(self, behind: Collection[tuple[str, str]]) -> tuple[str, str] | None:
        """The lane whose turn it is; those that make way rest behind a step of theirs."""
        resting = behind if behind and self._way.rest else ()
        return self._warm.share.choose(
            key for key, lane in self._warm.lanes.items() if lane.busy and key not in resting and not self._waits(lane)
        )

    def _waits(self, lane: AnyLane) -> bool:
        """Whether a turn of the lane would wait for other ranks, and running streams with it. Ranks that share their
        models make every turn at the same time, streams' too: none is ahead."""
        return lane.kind == TrainRequest.kind and self._sharing is None and not self._group.ready

    def _take_turn(self, turn: tuple[str, str], *, makes_way: bool) -> None:
        """Run a lane by a step, and report what it made."""
        began = time.perf_counter()
        with self._warm.share.charge(turn):
            output = self._run(turn, makes_way=makes_way)
        seconds = time.perf_counter() - began
        self._sparing.stepped(turn, self._streaming())
        if makes_way:
            self._way.note(turn[1], seconds)
        deliver(output, self._publish)
        self.observe(*turn, seconds, output)

    def _streaming(self) -> list[tuple[str, str]]:
        """The lanes that run streams."""
        return [key for key, lane in self._warm.lanes.items() if lane.busy and KINDS[lane.kind].urgent]

    def _rest(self) -> None:
        """Wait for new work, for other ranks, or for the end of the rest of lanes that make way."""
        with suppress(queue.Empty):
            rest = LOOK_EVERY if any(map(self._waits, self._warm.lanes.values())) else self._way.rest
            self._take(self._inbox.get(timeout=min(rest, LOOK_EVERY)))

    def _admit(self) -> None:
        """Take everything that waits; with nothing to run, sleep until something comes."""
        if not any(lane.busy for lane in self._warm.lanes.values()):
            self._way.announce({})
            self._sparing.idle()
            self._take(self._inbox.get())
        # What is there now: what comes meanwhile waits for a step of the lanes.
        for _ in range(self._inbox.qsize()):
            self._take(self._inbox.get())

    def _take(self, item: _Prepared | Errand[Any] | None) -> None:
        """What came into the inbox; None only wakes the loop."""
        if isinstance(item, Errand):
            self.step_began = time.monotonic()
            item.run()
            self.step_began = None
        elif item is not None:
            self._hand_to_lane(item)

    def _hand_to_lane(self, prepared: _Prepared) -> None:
        if not self._warm.holds(prepared.lane):
            # It was let go of between `submit` and now.
            prepared.ticket.fail(_unloaded(prepared.model))
            return
        try:
            prepared.lane.admit(prepared.work)
        except Exception as error:
            prepared.ticket.fail(error)

    def _drop_stopped(self) -> None:
        for lane in self._warm.lanes.values():
            lane.drop_stopped()

    def _run(self, turn: tuple[str, str], *, makes_way: bool) -> StepOutput:
        lane = self._warm.lanes[turn]
        # A token that is ready waits for nobody's turn: a pass is launched ahead only if nobody else waits for one.
        lookahead = not makes_way and not any(other.busy for other in self._warm.lanes.values() if other is not lane)
        self.step_began = time.monotonic()
        try:
            return lane.run(lookahead=lookahead)
        except Exception as error:
            # The whole step failed (out of memory, a defect): that ends neither the worker nor the other lanes' jobs.
            # A job that fails by itself was ended by its lane.
            log.exception("a step of the %s lane failed", lane.kind)
            lane.fail_all(error)
            return StepOutput()
        finally:
            self.step_began = None

    def _fail_everything(self) -> None:
        """End what waits in the inbox, and every job of every lane."""
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, Errand):
                item.fail(_stopping())
            else:
                self._take(item)
        for lane in self._warm.lanes.values():
            lane.fail_all(_stopping())


def _goes_on(slices: Iterator[None]) -> bool:
    """Do the next slice; whether there was one."""
    return next(slices, _END) is not _END


def _ignore(model: str, kind: str, seconds: float, output: StepOutput) -> None: ...


def _unloaded(model: str) -> WorkerUnavailable:
    return WorkerUnavailable(f"model {model!r} was unloaded here. The job goes back to its queue.")


def _stopping() -> WorkerUnavailable:
    return WorkerUnavailable("the worker is stopping. The job goes to another one.")
