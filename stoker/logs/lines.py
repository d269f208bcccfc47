"""What the log says of a job."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

#: The attribute of a `LogRecord` that holds the fields of its event.
FIELDS = "stoker_fields"


@dataclass(frozen=True)
class JobLine:
    """An event of a job, and nothing of what was asked for or made. `wait`, `duration`: seconds. `error`: a class."""

    event: str
    job: str
    kind: str
    model: str
    client: str
    attempt: int
    wait: float
    duration: float | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None
    outcome: str | None = None
    error: str | None = None

    def write(self, log: logging.Logger, level: int) -> None:
        """Without the caller's file and line, which are the same for all: looking for them took a third of the time."""
        if not log.isEnabledFor(level):
            return
        record = logging.LogRecord(log.name, level, "", 0, "%s", (self,), None)
        fields = {name: _rounded(value) for name, value in vars(self).items() if value not in (None, "")}
        setattr(record, FIELDS, fields)
        log.handle(record)

    def __str__(self) -> str:
        """For people."""
        said = [f"job {self.job} {self.outcome or self.event}: {self.kind} on {self.model} for {self.client}"]
        if self.attempt > 1:
            said.append(f"attempt {self.attempt}")
        said.append(f"waited {self.wait:.3f} s")
        if self.duration is not None:
            said.append(f"took {self.duration:.3f} s")
        if self.tokens:
            said.append(f"{self.tokens} tokens")
        if self.error:
            said.append(self.error)
        return ", ".join(said)


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
