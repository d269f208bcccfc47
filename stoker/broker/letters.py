"""Dead letters, as the broker keeps them (`stoker.broker.keys.DEAD`): jobs that wait for a person, and
messages that no worker can read. Read without trust: one that is spoiled must not hide the others."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import NotRequired

from typing_extensions import TypedDict

from stoker.contract.names import Rule, follows

#: The kind of a letter that is no job's.
MESSAGE = "message"
#: Bytes of a message that its letter has, base64.
KEPT = 4096


class CrashEntry(TypedDict):
    """One owner that went silent, or gave the job up. `trouble`: for what, if it could say."""

    worker: str
    time: float
    trouble: NotRequired[str]


class MessageBytes(TypedDict):
    """The bytes of a message: how many, and the first of them in base64."""

    bytes: int
    message: str


class Letter(TypedDict):
    """One dead letter. `request`: what was asked, JSON. `bytes` and `message`: of a message that cannot be read."""

    kind: str
    model: str
    request: str
    client: str
    history: list[CrashEntry]
    bytes: NotRequired[int]
    message: NotRequired[str]


def parse(raw: Mapping[bytes, bytes]) -> dict[str, Letter]:
    """From the hash: id → letter."""
    return {name.decode(errors="backslashreplace"): read(value) for name, value in raw.items()}


def read(value: bytes) -> Letter:
    """Of one job's letter. One that cannot be read is `spoiled`."""
    try:
        letter: Letter = json.loads(value)
        texts = [letter["kind"], letter["model"], *(crash["worker"] for crash in letter["history"])]
        texts.append(letter.get("message", ""))
        # Who shows a message says how long it is.
        size = letter["bytes"] if "message" in letter else 0
    except (ValueError, TypeError, KeyError, RecursionError):
        return spoiled(value)
    readable = isinstance(size, int) and all(isinstance(text, str) for text in texts)
    return letter if readable else spoiled(value)


def spoiled(value: bytes) -> Letter:
    """Of a letter that cannot be read."""
    return {"kind": MESSAGE, "model": "", "request": "", "client": "", "history": [], **shown(value)}


def request(letter: Letter) -> str:
    """What was asked, as JSON; for `codec.read`, which says what is wrong with it."""
    return str(letter.get("request", ""))


def died(letter: Letter) -> float | None:
    """When its last owner went silent, or gave the job up: seconds since the epoch, by the broker's clock. None for a
    letter that does not say so."""
    time = letter["history"][-1].get("time") if letter["history"] else None
    return float(time) if isinstance(time, int | float) and 0 < time < 2**53 else None


def sender(letter: Letter) -> str | None:
    """The key of the client that sent the job; None where the letter has none that could be one."""
    key = letter.get("client")
    return key if isinstance(key, str) and follows(Rule.NAME, key) else None


def shown(raw: bytes) -> MessageBytes:
    """The bytes of a message, as a letter has them."""
    return {"bytes": len(raw), "message": base64.b64encode(raw[:KEPT]).decode()}
