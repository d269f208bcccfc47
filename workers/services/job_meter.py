"""Counting the jobs of a worker, in the threads that run them: when one begins here, and when it is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection

from stoker.contract import ModelCard
from stoker.contract.kinds import KINDS
from stoker.monitor import metrics
from stoker.monitor.metrics import OTHER
from stoker.monitor.numbers import Numbers
from workers.account import DeliveryEnd, JobAccount

#: Ends of the job itself, which are counted by outcome.
ENDS = (DeliveryEnd.SUCCEEDED, DeliveryEnd.FAILED, DeliveryEnd.CANCELLED, DeliveryEnd.DEAD)


#: Ends of a delivery behind which the job goes on → what counts them.
BACK = {DeliveryEnd.RETURNED: metrics.RETURNED, DeliveryEnd.PASSED_ON: metrics.PASSED_ON}


class JobMeter:
    """An `Observer`. `models`: those that this worker serves. One lock: a job comes by twice, a token never."""

    def __init__(
        self, numbers: Numbers, models: Callable[[], Collection[str]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._numbers, self._models, self._clock = numbers, models, clock
        self._lock = threading.Lock()
        #: Job that runs here → when it was submitted, by this process's clock: what a first token's time counts from.
        self._submitted: dict[str, float] = {}

    def expect(self, cards: Collection[ModelCard]) -> None:
        """Make the series of what is served: a rate needs the zero before the first count."""
        for card in cards:
            for kind in card.kinds:
                for metric in (metrics.ATTEMPTS, metrics.RESUMED, metrics.INPUT_TOKENS, *BACK.values()):
                    self._numbers.of(metric, card.model, kind)
                for outcome in ENDS:
                    self._numbers.of(metrics.JOBS, card.model, kind, outcome)

    def submitted(self, job_id: str) -> float | None:
        """When a job that runs here was submitted. From any thread."""
        return self._submitted.get(job_id)

    def begun(self, account: JobAccount) -> None:
        labels = self._labels(account)
        self._submitted[account.job] = self._clock() - account.wait
        with self._lock:
            self._numbers.of(metrics.ATTEMPTS, *labels).add()
            if account.attempt > 1:
                self._numbers.of(metrics.RESUMED, *labels).add()
            elif not account.passed:
                self._numbers.of(metrics.QUEUE_WAIT, *labels).observe(account.wait)

    def ended(self, account: JobAccount) -> None:
        if account.outcome is DeliveryEnd.DROPPED:
            # The job may run here all the same, by another delivery.
            return
        labels, submitted = self._labels(account), self._submitted.pop(account.job, None)
        with self._lock:
            if account.outcome in ENDS:
                self._numbers.of(metrics.JOBS, *labels, account.outcome).add()
                if submitted is not None:
                    self._numbers.of(metrics.DURATION, *labels).observe(self._clock() - submitted)
            elif account.outcome in BACK:
                self._numbers.of(BACK[account.outcome], *labels).add()

    def close(self) -> None: ...

    def _labels(self, account: JobAccount) -> tuple[str, str]:
        model = account.model if account.model in self._models() else OTHER
        return model, account.kind if account.kind in KINDS else OTHER
