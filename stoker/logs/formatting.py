"""A record of the log as a line: for people, or JSON."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterator
from functools import lru_cache

from stoker.logs.lines import FIELDS
from stoker.logs.redaction import Redactor, shown

#: Characters of a message, and of a traceback, that a line shows.
LONGEST, LONGEST_TRACEBACK = 4000, 16_000


class Lines(logging.Formatter):
    """The parts that both forms share. One record is one line; a traceback is part of it."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redact = redactor

    def said(self, record: logging.LogRecord) -> str:
        """The message, without secrets and without control characters, which could move a terminal's cursor."""
        text = " ".join(self._bounded(record.getMessage(), LONGEST).split())
        return text if text.isprintable() else "".join(_visible(text))

    def trace(self, record: logging.LogRecord) -> str:
        """The traceback; "" if there is none."""
        error = record.exc_info[1] if record.exc_info else None
        return "" if error is None else self._bounded("\n".join(_traced(error)), LONGEST_TRACEBACK)

    def _bounded(self, text: str, longest: int) -> str:
        """The text without secrets, cut. In this order: half of a secret, or one whose characters were changed, is not
        known as one. What is far behind the end is not looked at."""
        return _cut(self._redact(text[: 2 * longest]), longest, len(text))


class HumanLines(Lines):
    """`2026-11-26 23:09:49 WARNING stoker.jobs: …`, and the traceback indented below."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{when} {record.levelname} {record.name}: {self.said(record)}"
        trace = self.trace(record)
        return line + "".join(f"\n  {below}" for below in trace.splitlines())


class JsonLines(Lines):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `message`, the fields of an event, `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        when = _utc(int(record.created))
        fields = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self.said(record),
            **{name: self._field(value) for name, value in getattr(record, FIELDS, {}).items()},
        }
        if trace := self.trace(record):
            fields["traceback"] = trace
        return _encoded(fields)

    def _field(self, value: object) -> object:
        return self._bounded(value, LONGEST) if isinstance(value, str) else value


#: Made once: `json.dumps` makes an encoder at each call, as ours is not the usual one.
_encoded = json.JSONEncoder(ensure_ascii=False).encode


@lru_cache(2)
def _utc(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _visible(text: str) -> Iterator[str]:
    for letter in text:
        yield letter if letter.isprintable() else f"\\u{ord(letter):04x}"


def _cut(text: str, longest: int, whole: int) -> str:
    """`whole`: characters that the text had."""
    return text if len(text) <= longest and whole <= 2 * longest else f"{text[:longest]}… ({whole} characters)"


def _traced(error: BaseException) -> Iterator[str]:
    """As Python's own, except for the words of errors that may quote what a user sent, and without lines of code."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and cause is not error:
        yield from _traced(cause)
        yield "and then:" if error.__cause__ is None else "which led to:"
    yield "Traceback (most recent call last):"
    for frame in traceback.extract_tb(error.__traceback__):
        yield f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}'
    yield shown(error)
