"""The lines of a batch: read one by one, and what becomes of each, as OpenAI writes it."""

from __future__ import annotations

import hashlib
import json
import secrets
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stoker.client.asynchronously import in_thread
from stoker.contract.shown import as_json, cut
from stoker.gateway.bodies import MOST_BYTES
from stoker.gateway.errors import Refused

#: Lines of a batch.
MOST_LINES = 1_000_000
#: Characters of a `custom_id`.
LONGEST_ID = 512
_FIELDS = ("custom_id", "method", "url", "body")


class WrongLine(Exception):
    """A line that asks nothing that could be answered."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.custom_id = code, custom_id


@dataclass(frozen=True)
class Line:
    """`number`: in the file, from 1; `index`: among those that are not blank, from 0. `data`: None for one that is too
    long."""

    number: int
    index: int
    data: bytes | None

    def asked(self, endpoint: str, *, duplicate: bool) -> tuple[str, bytes]:
        """Its `custom_id`, and the body of its request. Raises `WrongLine`."""
        row = self._row()
        custom_id = _custom_id(row)
        if custom_id is None:
            given = f"{as_json(row['custom_id'])} given; " if "custom_id" in row else "missing; "
            raise WrongLine("invalid_custom_id", f"custom_id: {given}expected a text of 1 to {LONGEST_ID} characters.")
        for code, message in self._troubles(row, endpoint, duplicate=duplicate):
            raise WrongLine(code, message, custom_id)
        return custom_id, json.dumps(row["body"]).encode()

    def _row(self) -> dict[str, Any]:
        if self.data is None:
            raise WrongLine(
                "invalid_json_line", f"line {self.number}: more than {MOST_BYTES} bytes, the most of a line."
            )
        try:
            row = json.loads(self.data)
        except (ValueError, RecursionError) as error:
            raise WrongLine("invalid_json_line", f"line {self.number}: not JSON ({cut(error, 200)}).") from None
        if not isinstance(row, dict):
            raise WrongLine("invalid_json_line", f"line {self.number}: {as_json(row)} given; expected a JSON object.")
        return row

    def _troubles(self, row: dict[str, Any], endpoint: str, *, duplicate: bool) -> Iterator[tuple[str, str]]:
        if duplicate:
            yield "duplicate_custom_id", f"custom_id: line {self.number} has that of a line before it; give it its own."
        for name in row:
            if name not in _FIELDS:
                yield "invalid_request", f"{as_json(name)}: no such field. Allowed: {', '.join(_FIELDS)}."
        if row.get("method") != "POST":
            yield "invalid_method", f"method: {as_json(row.get('method'))} given; expected POST."
        if row.get("url") != endpoint:
            yield "invalid_url", f"url: {as_json(row.get('url'))} given; the endpoint of this batch is {endpoint}."
        body = row.get("body")
        if not isinstance(body, dict):
            yield "invalid_body", f"body: {as_json(body)} given; expected a JSON object."
        elif body.get("stream"):
            yield "invalid_body", "stream: given; nobody follows a batch. Leave it out."
        elif body.get("priority") is not None or body.get("service_tier") == "priority":
            yield "invalid_body", "priority: given; batches are served behind all others. Leave it out."


def _custom_id(row: dict[str, Any]) -> str | None:
    found = row.get("custom_id")
    if not isinstance(found, str) or not 1 <= len(found) <= LONGEST_ID:
        return None
    return None if any("\ud800" <= letter <= "\udfff" for letter in found) else found


async def lines_of(parts: AsyncIterator[bytes]) -> AsyncGenerator[Line]:
    """The lines that are not blank. One that is too long is not kept while the rest of it comes."""
    number = index = 0
    async for whole in _split(parts):
        number += 1
        if number == 1 and whole is not None:
            whole = whole.removeprefix(b"\xef\xbb\xbf")
        if whole is None or whole.strip():
            yield Line(number, index, whole)
            index += 1


async def _split(parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes | None]:
    """Each line without its end; None for one that is too long."""
    rest, too_long = b"", False
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield None if too_long or len(line) > MOST_BYTES else line
            too_long = False
        if len(rest) > MOST_BYTES:
            rest, too_long = b"", True
    if rest or too_long:
        yield None if too_long else rest


@dataclass(frozen=True)
class Survey:
    """What a file holds: how many lines, and which of them have the `custom_id` of one before."""

    total: int
    duplicates: np.ndarray

    def duplicate(self, line: Line) -> bool:
        return bool(self.duplicates[line.index])


async def survey(parts: AsyncIterator[bytes]) -> Survey:
    """Raises `Refused` for a file without lines, or with too many. Eight bytes of each id are kept."""
    hashes, indices, total = array("Q"), array("q"), 0
    key, pending = secrets.token_bytes(16), list[Line]()

    async def take() -> None:
        for index, found in await in_thread(_hashed, pending, key):
            indices.append(index)
            hashes.append(found)
        pending.clear()

    async for line in lines_of(parts):
        total += 1
        pending.append(line)
        if total > MOST_LINES:
            raise Refused(400, f"file: more than {MOST_LINES} lines; send several batches.", code="too_many_lines")
        if len(pending) == 1000:
            await take()
    await take()
    if not total:
        raise Refused(400, "file: no line in it.", code="empty_file")
    return Survey(total, await in_thread(_duplicates, total, hashes, indices))


def _hashed(lines: list[Line], key: bytes) -> list[tuple[int, int]]:
    found = []
    for line in lines:
        try:
            row = json.loads(line.data or b"")
        except (ValueError, RecursionError):
            continue
        custom_id = _custom_id(row) if isinstance(row, dict) else None
        if custom_id is not None:
            digest = hashlib.blake2b(custom_id.encode(), digest_size=8, key=key).digest()
            found.append((line.index, int.from_bytes(digest, "little")))
    return found


def _duplicates(total: int, hashes: array[int], indices: array[int]) -> np.ndarray:
    found = np.zeros(total, bool)
    _, first = np.unique(np.array(hashes, np.uint64), return_index=True)
    again = np.ones(len(hashes), bool)
    again[first] = False
    found[np.array(indices, np.int64)[again]] = True
    return found


@dataclass(frozen=True)
class Outcome:
    """What became of a line. `right`: whether it is an answer. `job_id`: of the job that answered it, whose result can
    go from the broker once the line is written; "": none did."""

    line: bytes
    right: bool
    job_id: str = ""


def answered(name: str, custom_id: str, job_id: str, answer: bytes) -> Outcome:
    """`answer`: JSON, which is long for vectors, and is not read once more."""
    line, response = _json({"id": name, "custom_id": custom_id}), _json({"status_code": 200, "request_id": job_id})
    before = line[:-1] + b', "response": ' + response[:-1] + b', "body": '
    return Outcome(before + answer + b'}, "error": null}\n', True, job_id)


def refused(name: str, custom_id: str, job_id: str, refusal: Refused) -> Outcome:
    """A request that a client who had sent it alone would have been refused."""
    response = {"status_code": refusal.status, "request_id": job_id, "body": refusal.openai()}
    return Outcome(_written(name, custom_id, response, None), False)


def failed(name: str, custom_id: str | None, code: str, message: str) -> Outcome:
    """A line that was never a request, or that is not asked any more."""
    return Outcome(_written(name, custom_id, None, {"code": code, "message": message}), False)


def _written(name: str, custom_id: str | None, response: object, error: object) -> bytes:
    return _json({"id": name, "custom_id": custom_id, "response": response, "error": error}) + b"\n"


def _json(said: dict[str, object]) -> bytes:
    return json.dumps(said, ensure_ascii=False).encode("utf-8", "backslashreplace")
