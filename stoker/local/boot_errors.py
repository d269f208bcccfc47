"""Why a worker could not start: the line that its process ends with, for people and for the `stoker up` above it."""

from __future__ import annotations

import re

from stoker.errors import BrokerUnavailable, ConfigError, ModelError, StokerError, WorkerUnavailable

_BEGINNING = "stoker: the worker cannot start: "
#: What the process's exit code says of the error; another code says nothing more.
_CLASSES = {each.exit_code: each for each in (ConfigError, BrokerUnavailable, ModelError)}


def line_of(message: str) -> str:
    """The line, without its end. The process's exit code is that of the error."""
    return _BEGINNING + re.sub(r"\s*\n\s*", " ", message.strip())


def error_in(output: str, exit_code: int | None) -> StokerError | None:
    """The error that the last such line of `output` gives; None: there is none."""
    lines = [line for line in output.splitlines() if line.startswith(_BEGINNING)]
    if not lines:
        return None
    kind = _CLASSES.get(exit_code or 0, WorkerUnavailable)
    return kind(lines[-1].removeprefix(_BEGINNING))
