"""Bodies of requests: JSON objects whose fields are all known, or refused by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from stoker.contract.shown import as_json, brief, cut
from stoker.contract.wording import refusal
from stoker.gateway.errors import Refused

B = TypeVar("B", bound="Body")
T = TypeVar("T")

#: Items of a list: as many as a job has messages.
MOST_ITEMS = 4096
#: Entries of `metadata`.
MOST_METADATA = 16
#: A list that is looked through up to its first wrong item: one of millions would hold up all streams of the gateway.
Items: TypeAlias = Annotated[list[T], Field(max_length=MOST_ITEMS, fail_fast=True)]


def at_most(most: int) -> BeforeValidator:
    """So many entries of an object, counted before any is looked at."""

    def checked(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"{len(value)} entries given; at most {most} are allowed")
        return value

    return BeforeValidator(checked)


class Body(BaseModel):
    """What an endpoint takes. A field that is null counts as not given; so does one that asks for nothing (`IDLE`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        given = cls.asked(fields)
        known = {field.alias or name for name, field in cls.model_fields.items()}
        # One that is not known is enough to be refused.
        unknown = next((name for name in given if name not in known), None)
        return {name: value for name, value in given.items() if name in known or name == unknown}

    #: Fields of the vendor's interface that Stoker does not have: name → what to do instead.
    REFUSED: ClassVar[Mapping[str, str]] = {}
    #: Values of such fields by which programs ask for what is done anyway.
    IDLE: ClassVar[Mapping[str, object]] = {}

    #: Values of fields that ask for what is done without them too, and are not their defaults.
    USUAL: ClassVar[Mapping[str, object]] = {}

    @classmethod
    def asked(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `fields` that ask for something."""
        return {name: value for name, value in fields.items() if value is not None and not cls._is_idle(name, value)}

    @classmethod
    def _is_idle(cls, name: str, value: object) -> bool:
        # For Python `True` is 1, and for JSON it is not.
        return name in cls.IDLE and type(value) is type(cls.IDLE[name]) and value == cls.IDLE[name]

    def work(self) -> dict[str, Any]:
        """What is asked for, as values by name: the same for two bodies that ask for the same, whether they say what is
        usual or leave it out."""
        fields = self.model_dump().items()
        return {name: value for name, value in fields if value not in (None, [], {}) and value != self.USUAL.get(name)}


def parse(body: type[B], raw: bytes) -> B:
    """Raises `Refused` for what is no JSON object, and for the first field that is wrong."""
    try:
        # `json.loads` would take bytes that are half a surrogate pair.
        text = raw.decode(json.detect_encoding(raw))
        given = json.loads(text)
        if "\\ud" in text.lower():
            # Half a surrogate pair is JSON and no text: no model has a token for it, and no log can show it.
            json.dumps(given, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body cannot be read as JSON ({cut(error, 200)}); expected a JSON object.") from None
    if not isinstance(given, dict):
        raise Refused(400, f"the body is {as_json(given)}; expected a JSON object.")
    return checked_body(body, given)


def checked_body(body: type[B], given: Mapping[str, Any]) -> B:
    """Raises `Refused` for the first field that is wrong."""
    for name in body.asked(given):
        _check_known(body, name)
    try:
        return body.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None


def check_schema(name: str, kind: str, *, given: bool) -> None:
    """Raise `Refused` for a form of answers of the type `kind` that lacks its schema, the field `name`, or has one that
    it does not take."""
    if not given and kind == "json_schema":
        message = f"{name}: missing; with type json_schema it has to be given."
        raise Refused(400, message, param=name, code="missing_required_parameter")
    if given and kind != "json_schema":
        message = f"{name}: given with type {kind}; leave it out, or say type json_schema."
        raise Refused(400, message, param=name, code="invalid_value")


def _check_known(body: type[Body], name: str) -> None:
    if name in body.model_fields:
        return
    if name in body.REFUSED:
        raise Refused(
            400, f"{name}: not supported by Stoker; {body.REFUSED[name]}.", param=name, code="unsupported_parameter"
        )
    close = difflib.get_close_matches(name[:60], body.model_fields, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    shown = brief(name, 60).strip("'\"")
    allowed = ", ".join(body.model_fields)
    raise Refused(400, f"{shown}: no such field{hint} Allowed: {allowed}.", param=shown, code="unknown_parameter")


def _refusal(error: ValidationError) -> Refused:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"] if not _is_branch(part))
    if problem["type"] == "extra_forbidden":
        message = f"{where}: not supported; leave it out."
        return Refused(400, message, param=where, code="unsupported_parameter")
    code = "missing_required_parameter" if problem["type"] == "missing" else "invalid_value"
    return Refused(400, f"{where}: {refusal(problem, as_json)}.", param=where, code=code)


def _is_branch(part: object) -> bool:
    """Whether pydantic names a member of a union here, and no field."""
    return isinstance(part, str) and (not part.isidentifier() or part in ("str", "int", "float", "bool"))
