"""Models that come and go while the worker runs: by command, by a job that waits, by being idle, or to make room.

One thread does all of it, one after the other (`model_commands.py`); the others read `residency`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from redis.exceptions import RedisError

from stoker.broker import keys
from stoker.contract import ModelCard
from stoker.contract.kinds import KINDS
from stoker.contract.presence import ModelState
from stoker.errors import InvalidRequest, ModelError, StokerError, UnknownModel, to_wire
from workers.capacity import queues_of
from workers.deliveries import Deliveries
from workers.residents import Origin, Resident, Residents
from workers.services.orphans import Orphans
from workers.services.runtime import Runtime

if TYPE_CHECKING:
    from engine.checkpoints.prospect import Prospect

log = logging.getLogger(__name__)

#: Seconds that a job which has just ended has to leave the worker before its model counts as in use.
LEAVE_WITHIN = 2.0
#: Models that could not be loaded of which the worker says why.
REFUSED_SHOWN = 16
Sources = tuple[str, ...]


class Doors(Protocol):
    """What decides from which queues this worker takes jobs."""

    def serve(self, queues: Mapping[str, Sequence[str]]) -> None: ...


@dataclass(frozen=True)
class Residency:
    """What the worker's presence says of it."""

    offers: tuple[ModelCard, ...] = ()
    states: tuple[ModelState, ...] = ()
    limit: int = 0


class ModelKeeper:
    """`beat` reports the worker's presence at once."""

    def __init__(
        self,
        runtime: Runtime,
        residents: Residents,
        deliveries: Deliveries,
        doors: Doors,
        beat: Callable[[], object],
        orphans: Orphans,
    ) -> None:
        self._runtime, self.residents, self._deliveries = runtime, residents, deliveries
        self._doors, self._beat, self._orphans = doors, beat, orphans
        self._loading = ""
        #: Models that this worker may load, and where they are; the cards of those that could be looked at.
        self.may_load: dict[str, Sources] = {}
        self.offers: dict[str, ModelCard] = {}
        #: Model → why it could not be loaded.
        self.refused: dict[str, str] = {}

    @property
    def residency(self) -> Residency:
        """From any thread."""
        warm = [self._state(resident) for resident in self.residents]
        there = {state.model for state in warm}
        offers = tuple(card for card in list(self.offers.values()) if card.model not in there)
        loading = [ModelState(model=self._loading, state="loading")] if self._loading else []
        refused = [
            ModelState(model=model, state="refused", why=why)
            for model, why in list(self.refused.items()) if model not in there and model != self._loading
        ]  # fmt: skip
        said = there | {state.model for state in (*loading, *refused)}
        offered = [ModelState(model=card.model, state="offered") for card in offers if card.model not in said]
        return Residency(offers, (*warm, *loading, *offered, *refused), self.residents.limit)

    def report(self) -> None:
        """Say at once how it is. A broker that is away hears it with the next beat."""
        try:
            self._beat()
        except RedisError as error:
            log.warning("the broker does not hear yet what is warm: %s", error)

    def _state(self, resident: Resident) -> ModelState:
        idle = 0.0 if self.held(resident.model) else max(0.0, self.residents.clock() - self.last_used(resident))
        return ModelState(
            model=resident.model,
            state="warm",
            pinned=resident.pinned,
            bytes=resident.bytes,
            idle=round(idle, 1),
            shared=self._runtime.engine.shares(resident.model),
        )

    def load(self, model: str, sources: Sources, origin: Origin) -> tuple[str, ...]:
        """Make a model warm; return those that made way. Raises `ModelError`, and then all is as it was."""
        held = self.residents.get(model)
        if held is not None:
            return self._keep(held, sources, origin)
        self._loading = model
        self.report()
        try:
            return self._load(model, sources, origin)
        except StokerError as error:
            self.refuse(model, error)
            raise
        finally:
            self._loading = ""
            self.report()

    def prospect(self, model: str, sources: Sources, *, download: bool = False) -> Prospect:
        """What a model would be here. Raises `ModelError` for all that is wrong with its files: it is about this model
        alone."""
        try:
            return self._runtime.engine.prospect(model, sources, download=download)
        except StokerError:
            raise
        except Exception as error:
            why = f"model {model}: it could not be looked at ({type(error).__name__}: {error})"
            if self.refused.get(model) != why:
                log.exception("model %s could not be looked at", model)
            raise ModelError(why) from error

    def refuse(self, model: str, error: StokerError) -> None:
        """Say why it could not be loaded, of the last few alone: a command may name anything."""
        self.refused.pop(model, None)
        self.refused[model] = str(error)
        for oldest in list(self.refused)[:-REFUSED_SHOWN]:
            del self.refused[oldest]

    @staticmethod
    def _keep(held: Resident, sources: Sources, origin: Origin) -> tuple[str, ...]:
        if held.sources != sources:
            raise InvalidRequest(
                f"another model is called {held.model} here ({held.sources[0]}). Unload it first, or give the new one "
                f"another name: NAME={sources[0]}"
            )
        if origin is Origin.COMMANDED and held.origin is Origin.DEMANDED:
            held.origin = origin
        return ()

    def _load(self, model: str, sources: Sources, origin: Origin) -> tuple[str, ...]:
        engine = self._runtime.engine
        found = self.prospect(model, sources, download=origin is Origin.COMMANDED)
        for resident in self.residents:
            resident.used = self.last_used(resident)
        leaving = self.residents.makes_way(model, found.bytes, self.busy)
        left: list[Resident] = []
        try:
            for name in leaving:
                left.append(self._let_go(name))
            loaded = engine.load(model, sources)
        except Exception as error:
            for resident in reversed(left):
                self._bring_back(resident)
            if isinstance(error, StokerError):
                raise
            log.exception("model %s could not be loaded", model)
            raise ModelError(f"model {model}: it could not be loaded ({type(error).__name__}: {error})") from error
        for resident in left:
            # It comes back when a job for it waits.
            self.may_load[resident.model] = resident.sources
        self.residents.add(model, sources, origin, loaded.bytes)
        self.refused.pop(model, None)
        self._runtime.job_meter.expect([card for card in engine.cards if card.model == model])
        self._doors.serve(self._queues())
        return tuple(leaving)

    def _bring_back(self, resident: Resident) -> None:
        """One that made way for a model that could not be loaded."""
        try:
            self._runtime.engine.load(resident.model, resident.sources)
        except Exception as error:
            log.exception("model %s made way in vain and could not be loaded again", resident.model)
            self.refuse(resident.model, to_wire(error))
            self.may_load[resident.model] = resident.sources
            return
        # It was not pinned, for then it would not have made way.
        back = self.residents.add(resident.model, resident.sources, resident.origin, resident.bytes)
        back.used = resident.used
        self._doors.serve(self._queues())

    def unload(self, model: str, demanded: frozenset[str] = frozenset()) -> None:
        """Let go of a model. `demanded`: those that come back when a job for one waits. Jobs that wait for another end
        with an error if no worker holds it nor may load it. Raises `InvalidRequest` while it is pinned or in use."""
        resident = self._resident(model)
        if resident.pinned:
            raise InvalidRequest(f"model {model!r} is pinned. `stoker models unpin {model}` lets it be unloaded.")
        if self._runtime.engine.shares(model):
            raise InvalidRequest(
                f"model {model!r} is shared by the ranks of this group, and stays for as long as it runs."
            )
        card = self._card(model)
        self._let_go(model)
        self.report()
        if model in demanded:
            return
        self.may_load.pop(model, None)
        self.offers.pop(model, None)
        self.report()
        why = f"model {model!r} was unloaded, and no worker holds it or may load it."
        self._orphans.leave(card, UnknownModel(f"{why} `stoker models load {model}` loads it."))

    def pin(self, model: str, *, on: bool) -> None:
        """A model that is pinned neither makes way nor is unloaded."""
        self._resident(model).pinned = on
        self.report()

    def leave_idle(self, model: str) -> None:
        """Let go of one that comes back when a job for it waits."""
        try:
            self._let_go(model)
        except InvalidRequest:
            # A job came in this very moment.
            return
        log.info("model %s made way: it was idle", model)
        self.report()

    def _let_go(self, model: str) -> Resident:
        """Close its queues, see that no job of it is here, and free it."""
        card = self._card(model)
        self._doors.serve(self._queues(without=model))
        gone = self._is_free(model) and self._runtime.engine.unload(model)
        if not gone:
            self._doors.serve(self._queues())
            held = self.held(model) or 1
            raise InvalidRequest(f"model {model!r} is in use: {_jobs(held)} of it here. Wait for them, or cancel them.")
        self.offers[model] = card
        return self.residents.remove(model)

    def _is_free(self, model: str) -> bool:
        """A job whose client has its result may be here for a moment yet."""
        until = time.monotonic() + LEAVE_WITHIN
        while self.held(model) and time.monotonic() < until:
            time.sleep(0.02)
        return not self.held(model)

    def busy(self, model: str) -> str:
        """Why it cannot make way; "" if it can."""
        if self._runtime.engine.shares(model):
            return "shared by the ranks of this group"
        held = self.held(model)
        waiting = self.waiting(model)
        if held or waiting:
            return f"in use: {_jobs(held)} of it here, {waiting} not ended"
        return ""

    def held(self, model: str) -> int:
        """Jobs of the model that this worker has taken and not ended."""
        return self._deliveries.held_of(_every_queue_of(model))

    def waiting(self, model: str) -> int:
        """Jobs of the model that have not ended, here or elsewhere."""
        pipeline = self._runtime.redis.pipeline(transaction=False)
        for queue in _every_queue_of(model):
            pipeline.zcard(keys.open_jobs(queue))
        return sum(pipeline.execute())

    def last_used(self, resident: Resident) -> float:
        return max(resident.used, self._deliveries.last_of(_every_queue_of(resident.model)))

    def _resident(self, model: str) -> Resident:
        found = self.residents.get(model)
        if found is None:
            warm = ", ".join(sorted(resident.model for resident in self.residents)) or "none"
            raise UnknownModel(f"model {model!r} given; this worker holds {warm}.")
        return found

    def _card(self, model: str) -> ModelCard:
        return next(card for card in self._runtime.engine.cards if card.model == model)

    def _queues(self, without: str = "") -> dict[str, list[str]]:
        return queues_of(card for card in self._runtime.engine.cards if card.model != without)


def _every_queue_of(model: str) -> list[str]:
    return [keys.queue(model, kind) for kind in KINDS]


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"
