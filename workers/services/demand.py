"""Models that a worker loads when a job for one waits and nobody holds it, and that leave when they are idle."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from stoker.broker import keys
from stoker.contract import ModelCard
from stoker.errors import ModelError, StokerError
from workers.others import others
from workers.residents import NoRoom, Origin
from workers.services.keeper import ModelKeeper, Sources
from workers.services.orphans import Orphans, has_home
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)

#: Seconds before the next try at a model for which there was no room, and at one that could not be loaded.
NO_ROOM_FOR, REFUSED_FOR = 2.0, 60.0


class Demand:
    """`named`: models of STOKER_ON_DEMAND. `idle`: seconds without a job after which one leaves; 0: none does."""

    def __init__(
        self, runtime: Runtime, keeper: ModelKeeper, orphans: Orphans, named: Mapping[str, Sources], idle: float
    ) -> None:
        self._runtime, self._keeper, self._orphans, self._idle = runtime, keeper, orphans, idle
        self.named = frozenset(named)
        keeper.may_load.update(named)
        #: Model → when it may be tried again, by the clock of `Residents`.
        self._again: dict[str, float] = {}

    def round(self) -> None:
        if self._runtime.stopping:
            return
        self._look_at_offers()
        self._leave_idle()
        for model in list(self._keeper.offers):
            if self._keeper.residents.get(model) is None and self._is_due(model) and self._is_mine(model):
                self._load(model)

    def _look_at_offers(self) -> None:
        """The cards of models that could not be looked at before: their files may be there now."""
        keeper = self._keeper
        for model, sources in list(keeper.may_load.items()):
            if model in keeper.offers or keeper.residents.get(model) is not None or not self._is_due(model):
                continue
            try:
                keeper.offers[model] = keeper.prospect(model, sources).card
                keeper.refused.pop(model, None)
            except ModelError as error:
                self._refuse(model, error)

    def _refuse(self, model: str, error: ModelError) -> None:
        if self._keeper.refused.get(model) != str(error):
            log.warning("model %s cannot be loaded on demand: %s", model, error)
        self._keeper.refuse(model, error)
        self._wait(model, REFUSED_FOR)

    def _is_due(self, model: str) -> bool:
        return self._keeper.residents.clock() >= self._again.get(model, 0.0)

    def _wait(self, model: str, seconds: float) -> None:
        self._again[model] = self._keeper.residents.clock() + seconds

    def _is_mine(self, model: str) -> bool:
        """Whether a job waits, nobody who takes jobs holds or loads the model, and of those that may, this one does."""
        if not self._keeper.waiting(model):
            return False
        redis, name = self._runtime.redis, self._runtime.name
        holders = [worker.model_copy(update={"offers": ()}) for worker in others(redis, name) if not worker.stopping]
        if has_home(model, holders):
            return False
        return bool(redis.set(keys.loading(model), name, nx=True, ex=keys.PRESENCE_TTL))

    def _load(self, model: str) -> None:
        keeper, card = self._keeper, self._keeper.offers[model]
        try:
            keeper.load(model, keeper.may_load[model], Origin.DEMANDED)
        except NoRoom as error:
            log.info("a job for %s waits, and there is no room: %s", model, error)
            self._wait(model, NO_ROOM_FOR)
        except ModelError as error:
            self._give_up(card, error)
        except StokerError as error:
            log.warning("a job for %s waits, and it cannot be loaded now: %s", model, error)
            self._wait(model, NO_ROOM_FOR)
        finally:
            self._runtime.redis.delete(keys.loading(model))

    def _give_up(self, card: ModelCard, error: ModelError) -> None:
        """Files that cannot be loaded: no offer any more until they are looked at again."""
        self._refuse(card.model, error)
        self._keeper.offers.pop(card.model, None)
        self._keeper.report()
        self._orphans.leave(card, error)

    def _leave_idle(self) -> None:
        if not self._idle:
            return
        keeper = self._keeper
        now = keeper.residents.clock()
        for resident in keeper.residents:
            if resident.origin is not Origin.DEMANDED or resident.pinned or keeper.busy(resident.model):
                continue
            if now - keeper.last_used(resident) >= self._idle:
                keeper.leave_idle(resident.model)
