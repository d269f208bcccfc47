"""Pinned prefixes at this worker: what the broker says is pinned, and how far the engine is with it.

A round looks whether anything has changed, and goes on with what is not ready: while no job runs, or after `PATIENCE`,
by a job of the lowest priority that no client has sent.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from stoker.broker import keys, prefixes, registry
from stoker.contract.base import parse_adapter
from stoker.contract.kinds import GENERATE
from stoker.contract.prefixes import MOST_PREFIXES, PinnedPrefix
from stoker.contract.presence import READY, REFUSED, WAITING, PrefixState
from stoker.errors import StokerError, WorkerUnavailable
from workers.services.fetching import fetch
from workers.services.runtime import Runtime

if TYPE_CHECKING:
    from engine.checkpoints.loading import LoadedModel
    from engine.generation.pinning import Pinning
    from engine.prefixes.pins import Beginning
    from engine.ticket import Ticket
    from stoker.contract import GenerateRequest, GenerateResult

log = logging.getLogger(__name__)

#: Seconds between two looks.
EVERY = 1.0
#: Seconds that a prefix waits for a moment without jobs.
PATIENCE = 60.0
#: Seconds between two tries to prefill one, or to write it: one that a full memory or disk does not keep is no loop.
AGAIN = 60.0
#: Seconds after which all is read again, and the disk hears again what stays.
RENEW = 3600.0


@dataclass
class _Pin:
    """`beginning`: None for one that is refused. By the service's clock: `due`, when it is prefilled at the latest;
    `prefill_after`, `save_after`: until then nothing is tried again."""

    name: str
    prefix: PinnedPrefix
    due: float
    beginning: Beginning | None = None
    state: str = WAITING
    why: str = ""
    ticket: Ticket[GenerateResult] | None = None
    prefill_after: float = 0.0
    save_after: float = 0.0

    def shown(self, model: str) -> PrefixState:
        tokens, nbytes = (0, 0) if self.beginning is None else (len(self.beginning.ids), self.beginning.nbytes)
        return PrefixState(
            model=model, name=self.name, id=self.prefix.id, state=self.state, tokens=tokens, bytes=nbytes, why=self.why
        )


@dataclass
class _Pins:
    """Those of one model as it is in memory now. `said`: what the hash was when they were read, and `versions`, which
    versions of adapters they are of; None: they were never read. `renew`: when they are read again in any case."""

    of: weakref.ref[LoadedModel]
    said: bytes | None = None
    versions: Mapping[str, int] | None = None
    pins: tuple[_Pin, ...] = ()
    renew: float = 0.0


class PinnedPrefixes:
    """`beat`: reports the worker's presence at once."""

    def __init__(
        self, runtime: Runtime, beat: Callable[[], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runtime, self._beat, self._clock = runtime, beat, clock
        self._models: dict[str, _Pins] = {}

    @property
    def states(self) -> tuple[PrefixState, ...]:
        """From any thread."""
        return tuple(pin.shown(model) for model, held in list(self._models.items()) for pin in held.pins)

    def round(self) -> None:
        """Look at every model; what the broker refuses of one does not hold up the others."""
        before, troubles = self.states, []
        models = {name: model for name, model in self._runtime.engine.models.items() if model.kind == GENERATE.name}
        for name, model in models.items():
            try:
                self._look(name, model)
            except WorkerUnavailable as error:
                log.info("the prefixes of %s are left: %s", name, error)
            except RedisError as error:
                troubles.append(error)
        self._models = {name: held for name, held in self._models.items() if name in models}
        if self.states != before:
            self._beat()
        if troubles:
            raise troubles[0]

    def _look(self, name: str, model: LoadedModel) -> None:
        held = self._models.get(name)
        if held is None or held.of() is not model:
            held = self._models[name] = _Pins(weakref.ref(model))
        said: bytes | None = self._runtime.redis.hget(keys.prefixes(name), prefixes.CHANGED)
        pinning = self._runtime.engine.pinning(name)
        if (said, self._versions(name, held)) != (held.said, held.versions) or self._clock() >= held.renew:
            held.pins = self._read(name, pinning)
            held.said, held.versions, held.renew = said, self._versions(name, held), self._clock() + RENEW
            if pinning is not None:
                _keep(pinning, held.pins)
        if pinning is not None:
            for pin in held.pins:
                self._advance(pin, pinning)

    # --- what is pinned ---

    def _versions(self, model: str, held: _Pins) -> dict[str, int]:
        """Which version serves of each adapter that prefixes name without one."""
        named = {pin.prefix.adapter for pin in held.pins if pin.prefix.adapter and "@" not in pin.prefix.adapter}
        entries = [
            registry.parse(model, name, self._runtime.redis.hgetall(keys.adapter(model, name))) for name in named
        ]
        return {entry.name: entry.serving or 0 for entry in entries}

    def _read(self, model: str, pinning: Pinning | None) -> tuple[_Pin, ...]:
        """What the hash has now; each is refused that this worker cannot keep next to those before it."""
        raw = self._runtime.redis.hgetall(keys.prefixes(model))
        found: list[_Pin] = []
        for name, prefix in list(prefixes.parse(raw).items())[:MOST_PREFIXES]:
            pin = _Pin(name, prefix, due=self._clock() + PATIENCE)
            found.append(pin)
            try:
                pin.beginning = self._beginning(model, prefix, pinning, _beginnings(found))
            except RedisError:
                raise
            except Exception as error:
                pin.state, pin.why = REFUSED, _words(error)
                log.warning("the prefix %s of %s is not kept here: %s", name, model, pin.why)
        return tuple(found)

    def _beginning(
        self, model: str, prefix: PinnedPrefix, pinning: Pinning | None, before: list[Beginning]
    ) -> Beginning:
        if pinning is None:
            raise WorkerUnavailable(f"ranks share {model} here; what each keeps has to be the same, so none is pinned.")
        beginning = pinning.beginning(self._resolved(model, prefix))
        pinning.check(beginning, before)
        return beginning

    def _resolved(self, model: str, prefix: PinnedPrefix) -> GenerateRequest:
        """With the version of its adapter that serves now, its files on this disk."""
        request = prefix.request(model)
        if request.adapter is None:
            return request
        name, version = parse_adapter(request.adapter)
        raw = self._runtime.redis.hgetall(keys.adapter(model, name))
        if not raw:
            # One that only this disk knows: then the engine chooses.
            return request
        number = registry.parse(model, name, raw).version(version)
        fetch(self._runtime, model, name, number)
        return request.model_copy(update={"adapter": f"{name}@{number}"})

    # --- how far it is ---

    def _advance(self, pin: _Pin, pinning: Pinning) -> None:
        """A step towards being ready."""
        beginning, now = pin.beginning, self._clock()
        if beginning is None or self._runs(pin):
            return
        here, on_disk = pinning.in_memory(beginning), pinning.on_disk(beginning)
        pin.state = READY if here or on_disk else WAITING
        if here and not on_disk and now >= pin.save_after:
            pin.why, pin.save_after = _saved(pinning, beginning), now + AGAIN
        elif not here and now >= pin.prefill_after and (self._runtime.engine.idle or (not on_disk and now >= pin.due)):
            pin.prefill_after = now + AGAIN
            self._prefill(pin, pinning, beginning)

    def _runs(self, pin: _Pin) -> bool:
        """Whether a job of this prefix is under way."""
        if pin.ticket is None or not pin.ticket.done:
            return pin.ticket is not None
        self._note(pin, pin.ticket.error)
        pin.ticket = None
        return False

    def _prefill(self, pin: _Pin, pinning: Pinning, beginning: Beginning) -> None:
        try:
            pin.ticket = pinning.prefill(beginning)
        except Exception as error:
            self._note(pin, error)

    def _note(self, pin: _Pin, error: BaseException | None) -> None:
        pin.why = "" if error is None else f"it was not prefilled: {_words(error)}"
        if error is not None:
            log.warning("the pinned prefix %s waits: %s", pin.name, pin.why)


def _keep(pinning: Pinning, pins: Iterable[_Pin]) -> None:
    """Say to memory and disk what stays."""
    try:
        pinning.pin(_beginnings(pins))
    except OSError as error:
        log.warning("pinned prefixes are in memory alone: %s", error)


def _words(error: BaseException) -> str:
    """Why a prefix is not kept; a defect, which has its traceback in the log, hurts the others as little."""
    if not isinstance(error, StokerError):
        log.error("a pinned prefix met a defect", exc_info=error)
        return f"{type(error).__name__}: {error}"
    return str(error)


def _beginnings(pins: Iterable[_Pin]) -> list[Beginning]:
    return [pin.beginning for pin in pins if pin.beginning is not None]


def _saved(pinning: Pinning, beginning: Beginning) -> str:
    """Let the disk have it; why it has not."""
    try:
        pinning.save(beginning)
    except OSError as error:
        return f"in memory alone: {error}"
    return ""
