"""A broker that reads its data back from the disk: it answers `LOADING` to all that needs the data, and reports how
far it is. A client waits for it, for `STOKER_PATIENCE` seconds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import AbstractBackoff
from redis.exceptions import BusyLoadingError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from stoker.broker.asking import caller_waits
from stoker.errors import BrokerLoading, BrokerUnavailable

log = logging.getLogger(__name__)
T = TypeVar("T")

#: What `INFO` answers.
Info = Mapping[str, Any]
#: Parameters of redis-py's `Retry`.
Supported = tuple[type[RedisError], ...]
Fail = Callable[[Exception], Any] | Callable[[Exception, int], Any]
Retryable = Callable[[Exception], bool]

#: Seconds between two looks.
LOOK_EVERY = 0.1
#: Seconds without progress after which a broker that loads is given up.
STALLED = 60.0


@dataclass(frozen=True)
class LoadingProgress:
    """How much of its data a broker has read, in percent and bytes, and how many seconds it thinks it will take yet."""

    percent: float
    seconds: int
    read: int

    @classmethod
    def parse(cls, info: Mapping[str, Any]) -> LoadingProgress | None:
        """From `INFO persistence`; None for a broker that is done."""
        if not int(info.get("loading", 0)):
            return None
        percent, seconds = float(info.get("loading_loaded_perc", 0)), int(info.get("loading_eta_seconds", 0))
        # A broker that does not know the size answers other values.
        known = 0 <= percent <= 100 and seconds >= 0
        return cls(percent if known else 0.0, seconds if known else 0, int(info.get("loading_loaded_bytes", 0)))

    def __str__(self) -> str:
        return f"{self.percent:.0f} %, about {max(1, self.seconds)} s left"


class StillLoading(BusyLoadingError):
    """The broker loads, and has been waited for; `progress` says how far it is, if the broker said so."""

    def __init__(self, progress: LoadingProgress | None) -> None:
        super().__init__("the broker is loading its data")
        self.progress = progress


def still_loading(where: str, progress: LoadingProgress | None) -> BrokerLoading:
    """The error that a caller gets."""
    said = f", {progress}" if progress else ""
    return BrokerLoading(
        f"the broker at {where} is loading its data{said}. Try again then, or set STOKER_PATIENCE to wait longer."
    )


def wait_until_loaded(
    ask: Callable[[], Mapping[str, Any]],
    where: str,
    report: Callable[[str], None],
    alive: Callable[[], bool] = lambda: True,
) -> None:
    """Wait for as long as the broker makes progress, and `report` how far it is. `ask`: its `INFO persistence`.

    Raises `BrokerLoading` if it stands still for a minute, and `BrokerUnavailable` if it is not `alive` any more.
    """
    read, moved = -1, time.monotonic()
    while True:
        try:
            progress = LoadingProgress.parse(ask())
        except (RedisConnectionError, RedisTimeoutError) as error:
            # A broker that is busy with a large value answers late.
            if not alive() or time.monotonic() - moved > STALLED:
                raise BrokerUnavailable(f"the broker at {where} ended while it loaded its data ({error}).") from None
            time.sleep(LOOK_EVERY)
            continue
        except RedisError:
            # A user that may not ask.
            raise still_loading(where, None) from None
        if progress is None:
            return
        if progress.read != read:
            read, moved = progress.read, time.monotonic()
        elif time.monotonic() - moved > STALLED:
            raise still_loading(where, progress)
        report(f"the broker is loading its data, {progress}")
        time.sleep(LOOK_EVERY)


class _Wait:
    """One command's wait for a broker that loads."""

    def __init__(self, patience: float) -> None:
        self._end = time.monotonic() + (0.0 if caller_waits() else patience)
        self._reported = False

    def pause(self, progress: LoadingProgress | None) -> float:
        """Seconds until the next try; raises `StillLoading` when the patience is at its end."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise StillLoading(progress) from None
        if not self._reported and progress is not None:
            self._reported = True
            log.warning("the broker is loading its data, %s; waiting for it", progress)
        return min(left, max(LOOK_EVERY, min(1.0, (progress.seconds if progress else 0) / 4)))


class PatientRetry(Retry):
    """Commands that meet a broker which loads are sent again until it is done, for `patience` seconds.

    `ask`: its `INFO persistence`, through a connection of its own: the command's is closed by its failure.
    """

    def __init__(
        self, backoff: AbstractBackoff, retries: int, supported: Supported, *, patience: float, ask: Callable[[], Info]
    ) -> None:
        super().__init__(backoff, retries, supported)
        self._patience, self._ask = patience, ask

    def call_with_retry(
        self, do: Callable[[], T], fail: Fail, is_retryable: Retryable | None = None, with_failure_count: bool = False
    ) -> T:
        wait: _Wait | None = None
        while True:
            try:
                return super().call_with_retry(do, fail, is_retryable, with_failure_count)
            except BusyLoadingError:
                wait = wait or _Wait(self._patience)
                time.sleep(wait.pause(self._progress()))

    def _progress(self) -> LoadingProgress | None:
        try:
            return LoadingProgress.parse(self._ask())
        except RedisError:
            return None


class AsyncPatientRetry(AsyncRetry):
    """`PatientRetry` for asyncio."""

    def __init__(
        self,
        backoff: AbstractBackoff,
        retries: int,
        supported: Supported,
        *,
        patience: float,
        ask: Callable[[], Awaitable[Info]],
    ) -> None:
        super().__init__(backoff, retries, supported)
        self._patience, self._ask = patience, ask

    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[T]],
        fail: Fail,
        is_retryable: Retryable | None = None,
        with_failure_count: bool = False,
    ) -> T:
        wait: _Wait | None = None
        while True:
            try:
                return await super().call_with_retry(do, fail, is_retryable, with_failure_count)
            except BusyLoadingError:
                wait = wait or _Wait(self._patience)
                await asyncio.sleep(wait.pause(await self._progress()))

    async def _progress(self) -> LoadingProgress | None:
        try:
            return LoadingProgress.parse(await self._ask())
        except RedisError:
            return None
