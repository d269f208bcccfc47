"""What a worker is asked about its models, one command after the other: `stoker models load | unload | pin | unpin`.

A command is taken off its list before it begins, so one that ends the process is not repeated by the next.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from redis.exceptions import RedisError

from stoker.broker import keys
from stoker.catalogue import parse_model
from stoker.contract.codec import read
from stoker.contract.control import ModelCommand, ModelReport
from stoker.contract.names import Rule, follows
from stoker.errors import InvalidRequest, StokerError, to_wire
from workers.residents import Origin
from workers.services.demand import Demand
from workers.services.keeper import ModelKeeper, Sources
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)


class ModelCommands:
    """`known`: the sources of the models in the worker's own settings."""

    def __init__(self, runtime: Runtime, keeper: ModelKeeper, demand: Demand, known: Mapping[str, Sources]) -> None:
        self._runtime, self._keeper, self._demand, self._known = runtime, keeper, demand, known

    def next(self, wait: int = 1) -> None:
        """Wait a moment for a command, and follow it."""
        found: Any = self._runtime.redis.brpop([keys.commands(self._runtime.name)], timeout=wait)
        if found is not None:
            self.hear(found[1])

    def hear(self, raw: bytes) -> None:
        text = raw.decode(errors="replace")
        try:
            command = read(ModelCommand, text)
        except InvalidRequest as error:
            self._refuse(text, error)
            return
        if self._runtime.redis.exists(keys.command(command.id)):
            # Its client has sent it twice: the answer to the first sending was lost.
            return
        log.info("asked to %s %s", command.verb, command.model)
        self._report(command, "begun")
        began = time.monotonic()
        try:
            was_warm = self._is_warm(command)
            made_way = self._follow(command)
        except RedisError as error:
            self._report(command, "failed", error=InvalidRequest(f"the broker broke it off: {error}"))
            raise
        except Exception as error:
            if not isinstance(error, StokerError):
                log.exception("a command could not be followed")
            log.warning("%s %s: %s", command.verb, command.model, error)
            self._report(command, "failed", seconds=time.monotonic() - began, error=to_wire(error))
        else:
            self._report(command, "done", seconds=time.monotonic() - began, made_way=made_way, was_warm=was_warm)

    def _follow(self, command: ModelCommand) -> tuple[str, ...]:
        keeper = self._keeper
        if command.verb == "load":
            name, sources = self._named(command.model)
            return keeper.load(name, sources, Origin.COMMANDED)
        if command.verb == "unload":
            keeper.unload(command.model, self._demand.named)
        else:
            keeper.pin(command.model, on=command.verb == "pin")
        return ()

    def _is_warm(self, command: ModelCommand) -> bool:
        """Whether a model that is to be loaded is here."""
        return command.verb == "load" and self._keeper.residents.get(self._named(command.model)[0]) is not None

    def _named(self, model: str) -> tuple[str, Sources]:
        sources = self._known.get(model) or self._keeper.may_load.get(model)
        return (model, sources) if sources else parse_model(model)

    def _report(
        self,
        command: ModelCommand,
        phase: Any,
        *,
        seconds: float = 0.0,
        made_way: tuple[str, ...] = (),
        was_warm: bool = False,
        error: StokerError | None = None,
    ) -> None:
        report = ModelReport(
            id=command.id,
            worker=self._runtime.name,
            verb=command.verb,
            model=command.model,
            phase=phase,
            seconds=round(seconds, 3),
            made_way=made_way,
            was_warm=was_warm,
            memory_bytes=self._runtime.engine.memory_bytes,
            error=_name(error) if error else "",
            message=str(error or ""),
        )
        self._runtime.redis.set(keys.command(command.id), report.model_dump_json(), ex=keys.COMMAND_TTL)

    def _refuse(self, text: str, error: InvalidRequest) -> None:
        """What is no command of this contract gets an answer if it says where to."""
        log.warning("a command that cannot be read: %s", error)
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            return
        command_id = given.get("id") if isinstance(given, dict) else None
        if follows(Rule.JOB_ID, command_id):
            command = ModelCommand.model_construct(id=str(command_id), verb="load", model="?")
            self._report(command, "failed", error=error)


def _name(error: StokerError) -> str:
    """The class that clients know."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == StokerError.__module__)
