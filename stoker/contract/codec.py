"""From a message to what travels, and back, with one clear error for each wrong input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from stoker.contract.base import Message
from stoker.contract.shown import brief
from stoker.contract.wording import Show, refusal
from stoker.errors import InvalidRequest

#: The version of this contract: any change of a message's fields is another one. Its jobs have queues of their own, so
#: that two generations of workers and clients may run side by side; a worker refuses any other, naming both.
CONTRACT = 1

#: What an error names that is of several fields together.
WHOLE = "request"

M = TypeVar("M", bound=Message)


def build(message: type[M], fields: Mapping[str, Any], show: Show = brief) -> M:
    """Make a message; a wrong field raises `InvalidRequest` that says what was given and what is allowed. `show`: how
    values are spelled, as Python does or, with `as_json`, as JSON."""
    try:
        return message(**fields)
    except ValidationError as error:
        raise InvalidRequest(_explain(error, list(message.model_fields), show)) from None


def encode(message: Message) -> dict[str, Any]:
    """The JSON object that travels: the message's fields and the contract's version."""
    return {"contract": CONTRACT, **message.model_dump(mode="json")}


def decode(message: type[M], payload: Any) -> M:
    """The inverse of `encode`; raises `InvalidRequest` for another version or a wrong field."""
    if not isinstance(payload, Mapping):
        raise InvalidRequest(f"{message.__name__}: a {type(payload).__name__} given; expected a JSON object.")
    fields = dict(payload)
    version = fields.pop("contract", None)
    if version != CONTRACT:
        raise InvalidRequest(
            f"contract version {brief(version)} given; this side speaks version {CONTRACT}. "
            "Run the same release of Stoker on clients and workers."
        )
    return build(message, fields)


def read(message: type[M], text: str) -> M:
    """`decode` from JSON; raises `InvalidRequest` for what is none, too."""
    try:
        payload = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{message.__name__}: {brief(text)} given; expected JSON ({error}).") from None
    return decode(message, payload)


def _explain(error: ValidationError, allowed: list[str], show: Show) -> str:
    problems = []
    for problem in _root_causes(error)[:3]:
        # pydantic says of a key of an object that it is one.
        where = ".".join(str(part) for part in problem["loc"] if part != "[key]") or WHOLE
        if problem["type"] == "extra_forbidden":
            problems.append(f"{where}: no such field; allowed: {', '.join(allowed)}")
        else:
            problems.append(f"{where}: {refusal(problem, show)}")
    return "; ".join(problems) + "."


def _root_causes(error: ValidationError) -> list[ErrorDetails]:
    """Without what only follows: a list that is "too short" because its items, or what is in them, are wrong."""
    problems = error.errors()
    inner = {problem["loc"][:end] for problem in problems for end in range(1, len(problem["loc"]))}
    return [problem for problem in problems if problem["loc"] not in inner]
