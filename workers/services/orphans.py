"""Jobs of models that no worker holds any more and none may load: they end with an error, none is lost."""

from __future__ import annotations

import logging

from stoker.broker import keys, ledger
from stoker.contract import ModelCard, Presence
from stoker.contract.names import Rule, follows
from stoker.errors import StokerError, UnknownModel
from workers import clock
from workers.others import others
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)


def has_home(model: str, workers: list[Presence]) -> bool:
    """Whether one of them holds the model, loads it, or may."""
    return any(
        model in {card.model for card in (*worker.models, *worker.offers)}
        or any(state.model == model and state.state == "loading" for state in worker.states)
        for worker in workers
    )


class Orphans:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def leave(self, card: ModelCard, error: StokerError) -> int:
        """This worker neither holds the model nor may load it: if no other does, clients read why, and the jobs that
        wait for it end with `error`; return how many. If another does, they wait for that one.

        Called when this worker's own presence says so: of two workers that leave a model at once, one sees both.
        """
        if self._has_another_home(card.model):
            return 0
        redis = self._runtime.redis
        gone = card.model_copy(update={"gone": str(error), "seen": clock.now(redis)})
        redis.hset(keys.MODELS, f"{card.model}/{card.contract}", gone.model_dump_json())
        return self._end_waiting(card, error)

    def sweep(self, card: ModelCard) -> int:
        """Jobs that came after the end: their clients had chosen the model a moment before. `card.gone`: why."""
        if not card.gone or card.model in self._runtime.engine.models or self._has_another_home(card.model):
            return 0
        return self._end_waiting(card, UnknownModel(card.gone))

    def _has_another_home(self, model: str) -> bool:
        return has_home(model, others(self._runtime.redis, self._runtime.name))

    def _end_waiting(self, card: ModelCard, error: StokerError) -> int:
        redis, ended = self._runtime.redis, 0
        for kind in card.kinds:
            queue = keys.queue(card.model, kind)
            for raw in redis.zrange(keys.open_jobs(queue), 0, -1):
                job_id = raw.decode(errors="replace")
                if follows(Rule.JOB_ID, job_id) and ledger.refuse(redis, job_id, queue, ledger.failure(job_id, error)):
                    log.info("job %s ends: nobody holds or may load %s", job_id, card.model)
                    ended += 1
        return ended
