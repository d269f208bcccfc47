"""What a worker is asked about its models: which worker is meant, the command, and what its report means. No input or
output."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from pydantic import ValidationError

from stoker.catalogue import asked_of_worker, model_name
from stoker.client.following import checked_timeout
from stoker.contract.codec import build
from stoker.contract.control import ModelCommand, ModelReport, ModelVerb
from stoker.contract.presence import Presence, node_of
from stoker.contract.shown import brief
from stoker.errors import InvalidRequest, JobTimeout, UnknownModel, WorkerUnavailable, from_wire

#: Seconds between two looks at what has become of a command: at first, and at the longest.
FIRST_LOOK, LONGEST_LOOK = 0.02, 0.5


def command_of(verb: ModelVerb, model: str) -> ModelCommand:
    """Raises `InvalidRequest` or `ConfigError` for a model that cannot be one."""
    if not isinstance(model, str) or not model:
        raise InvalidRequest(f"model: {brief(model)} given; expected a name, for load also a source, or NAME=SOURCE.")
    named = asked_of_worker(model) if verb == "load" else model_name(model)
    return build(ModelCommand, {"id": uuid.uuid4().hex, "verb": verb, "model": named})


def worker_for(command: ModelCommand, worker: str | None, alive: Sequence[Presence]) -> str:
    """The process that is meant: the one that was named, or the only one that it can be. Raises `WorkerUnavailable` for
    a worker that is away, `UnknownModel` where none holds the model, `InvalidRequest` where several might be meant."""
    names = ", ".join(sorted(each.worker for each in alive)) or "none"
    if worker is not None:
        found = [each.worker for each in alive if worker in (each.worker, node_of(each.worker), _short(each.worker))]
        if len(found) == 1:
            return found[0]
        if found:
            raise InvalidRequest(f"worker: {brief(worker, 160)} given, which several are called; write one of {names}.")
        raise WorkerUnavailable(f"worker: {brief(worker, 160)} given, which is not alive; those that are: {names}.")
    if not alive:
        raise WorkerUnavailable("no worker is alive. Start one with `stoker up` or `stoker worker`.")
    able = [each.worker for each in alive if command.verb == "load" or _holds(each, command.model)]
    if len(able) == 1:
        return able[0]
    if not able:
        held = sorted({card.model for each in alive for card in each.models})
        raise UnknownModel(f"model {command.model!r} given; no worker holds it. They hold {', '.join(held) or 'none'}.")
    raise InvalidRequest(f"worker: not given, and {len(able)} may be meant: name one of {', '.join(sorted(able))}.")


def _holds(worker: Presence, model: str) -> bool:
    return any(card.model == model for card in worker.models)


def _short(worker: str) -> str:
    return node_of(worker).partition("@")[0]


class Waiting:
    """For the end of a command. `timeout`: seconds; None: as long as the worker lives."""

    def __init__(self, command: ModelCommand, worker: str, timeout: float | None) -> None:
        self._command, self._worker = command, worker
        self._timeout = checked_timeout(timeout)
        self._until = None if timeout is None else time.monotonic() + timeout
        self._pause = FIRST_LOOK
        self._begun = False

    def heard(self, raw: bytes | None, alive: bool) -> ModelReport | None:
        """The report, once the command is done. Raises what it failed of, and `WorkerUnavailable` for a worker that is
        away."""
        report = None
        if raw is not None:
            try:
                report = ModelReport.model_validate_json(raw)
            except ValidationError:
                raise WorkerUnavailable(
                    f"worker {self._worker} answered in a form that is not known here: run the same release of Stoker "
                    "on both sides."
                ) from None
        if report is not None and report.phase == "failed":
            raise from_wire(report.error, report.message)
        if report is not None and report.phase == "done":
            return report
        self._begun = report is not None
        if not alive:
            where = "in the middle of it" if self._begun else "before it began"
            raise WorkerUnavailable(
                f"worker {self._worker} went away {where}: {self._what}. When it is started again, it holds what its "
                "settings say."
            )
        return None

    @property
    def _what(self) -> str:
        return f"{self._command.verb} {self._command.model}"

    def pause(self) -> float | None:
        """Seconds until the next look; None: the time is over."""
        if self._until is not None and time.monotonic() >= self._until:
            return None
        self._pause = min(LONGEST_LOOK, self._pause * 1.3)
        return self._pause

    def over(self, *, taken_back: bool) -> JobTimeout:
        """`taken_back`: the worker had not begun, and will not."""
        rest = "the worker was busy with other commands; nothing was done" if taken_back else "it goes on"
        return JobTimeout(f"{self._what}: not done within {self._timeout:g} s; {rest}. See `stoker status`.")
