"""Dead letters, as the broker keeps them (`stoker.keys.DEAD`): jobs that wait for a person, and messages that no worker
can read. Read without trust: one that is spoiled must not hide the others."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from stoker.contract.names import Rule, follows

#: The kind of a letter that is no job's.
MESSAGE = "message"
#: Bytes of a message that its letter has, base64.
KEPT = 4096


def parse(raw: Mapping[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """From the hash: id → kind, model, history."""
    return {name.decode(errors="backslashreplace"): _letter(value) for name, value in raw.items()}


def _letter(value: bytes) -> dict[str, Any]:
    try:
        letter = json.loads(value)
        texts = [letter["kind"], letter["model"], *(crash["worker"] for crash in letter["history"])]
    except (ValueError, TypeError, KeyError, RecursionError):
        return spoiled(value)
    return letter if all(isinstance(text, str) for text in texts) else spoiled(value)


def spoiled(value: bytes) -> dict[str, Any]:
    """Of a letter that cannot be read."""
    return {"kind": MESSAGE, "model": "", "request": "", "client": "", "history": [], **shown(value)}


def request(letter: Mapping[str, Any]) -> str:
    """What was asked, as JSON; for `codec.read`, which says what is wrong with it."""
    return str(letter.get("request", ""))


def sender(letter: Mapping[str, Any]) -> str | None:
    """The key of the client that sent the job; None where the letter has none that could be one."""
    key = letter.get("client")
    return key if isinstance(key, str) and follows(Rule.NAME, key) else None


def shown(raw: bytes) -> dict[str, Any]:
    """The bytes of a message, as a letter has them."""
    return {"bytes": len(raw), "message": base64.b64encode(raw[:KEPT]).decode()}
