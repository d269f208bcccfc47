"""What a request is refused with: a status, OpenAI's or Anthropic's shape, and the field that is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from stoker import errors
from stoker.contract.codec import WHOLE
from stoker.errors import InvalidRequest, QueueFull, StokerError

#: Seconds after which a client may ask again when the broker or a worker is away.
AWAY = 5


class Refused(Exception):
    """A request is answered with an error. `param`: the field that is wrong. `again`: seconds after which the same
    request may succeed; None: it would not, and clients shall not repeat it by themselves. `further`: headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        again: float | None = None,
        further: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.further = further
        self.status, self.message, self.param, self.code, self.again = status, message, param, code, again

    @property
    def headers(self) -> dict[str, str]:
        return {**self._when(), **self.further}

    def _when(self) -> dict[str, str]:
        """What says whether to ask again: both vendors' clients go by the second."""
        if self.again is None:
            return {"x-should-retry": "false"} if self.status in (409, 429) or self.status >= 500 else {}
        return {"retry-after": str(max(1, math.ceil(self.again))), "x-should-retry": "true"}

    def openai(self) -> dict[str, object]:
        kind = _OPENAI_KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        said = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": said}

    def anthropic(self, request_id: str) -> dict[str, object]:
        kind = _ANTHROPIC_KINDS.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        where = f"{self.param}: " if self.param and not self.message.startswith(self.param) else ""
        return {
            "type": "error",
            "error": {"type": kind, "message": where + self.message},
            "request_id": request_id,
        }


_OPENAI_KINDS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_ANTHROPIC_KINDS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(frozen=True)
class Row:
    """What an error of Stoker's is over HTTP. `again`: seconds after which it may have passed."""

    status: int
    code: str
    param: str | None = None
    again: float | None = None


#: Each class that is answered in a way of its own; the others as the class that they derive from.
TABLE: Mapping[type[StokerError], Row] = {
    StokerError: Row(500, "server_error"),
    errors.InvalidRequest: Row(400, "invalid_value"),
    errors.TextTooLong: Row(400, "context_length_exceeded"),
    errors.DatasetError: Row(422, "invalid_dataset"),
    errors.UnknownModel: Row(404, "model_not_found", "model"),
    errors.UnknownAdapter: Row(404, "model_not_found", "model"),
    errors.BrokerUnavailable: Row(503, "broker_unavailable", again=AWAY),
    errors.WorkerUnavailable: Row(503, "worker_unavailable", again=AWAY),
    errors.QueueFull: Row(429, "queue_full", again=AWAY),
    # 409 and 5xx are asked again by clients, which would run a job anew that was cancelled on purpose.
    errors.JobCancelled: Row(410, "job_cancelled"),
    errors.JobLost: Row(404, "job_not_found"),
    errors.JobDead: Row(500, "job_dead"),
    errors.JobFailed: Row(500, "job_failed"),
    errors.OutOfMemory: Row(500, "out_of_memory"),
    errors.VectorsFull: Row(503, "vectors_full", again=AWAY),
    errors.DeadlineExceeded: Row(504, "deadline_exceeded"),
    errors.JobTimeout: Row(504, "timeout"),
}


def row_of(error: StokerError) -> Row:
    """The row of the error's class, or of the nearest that it derives from."""
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


#: The same of every endpoint.
_EVERYWHERE = {"job_id": "Idempotency-Key"}


@dataclass(frozen=True)
class Names:
    """What fields of Stoker's requests are called in those of an endpoint."""

    by_field: Mapping[str, str] = field(default_factory=dict)

    def refusal(self, error: StokerError, *, by_worker: bool = False) -> Refused:
        """`error` as it is answered. `by_worker`: the request was sent, and the worker refused it."""
        row = row_of(error)
        message = str(error)
        if by_worker and type(error) is InvalidRequest:
            row = replace(row, status=422, code="unprocessable")
        param, again = row.param, row.again
        if isinstance(error, InvalidRequest) and param is None:
            param, message = self._named(message)
        if isinstance(error, QueueFull) and error.wait:
            again = error.wait
        return Refused(row.status, message, param=param, code=row.code, again=again)

    def _named(self, message: str) -> tuple[str | None, str]:
        """The endpoint's own name for the field that a message begins with, and the message with it."""
        # Of several fields together: no field has that name.
        message = message.removeprefix(f"{WHOLE}: ")
        found = re.match(r"([a-z_]+)((?:\.[A-Za-z0-9_]+)*): ", message)
        if found is None:
            return None, message
        param = self.by_field.get(found[1], _EVERYWHERE.get(found[1], found[1])) + found[2]
        return param, f"{param}: {message[found.end() :]}"
