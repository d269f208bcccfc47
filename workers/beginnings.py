"""What a prompt begins with, named so that two workers which have the same call it the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from stoker.contract import GenerateRequest

#: Characters of a beginning that has a name, and by which the next one is longer: some 1,000 tokens of English. It
#: takes longer to prefill as many than a job waits for the worker that has them.
BLOCK = 4096
#: Beginnings of one prompt that have names.
MOST = 64


def beginnings(request: GenerateRequest) -> list[str]:
    """The names of what the prompt begins with, in steps of `BLOCK` characters, the shortest first: 32 hexadecimal
    digits each. Those of a conversation are also the first of the conversation that goes on from it. `request`: with
    the version of its adapter, whose keys and values no other has."""
    computed = [request.model, request.adapter, request.tools, request.template, request.prompt is None]
    digest = hashlib.sha256(json.dumps(computed, sort_keys=True).encode())
    names = []
    for block in _blocks(_parts(request)):
        digest.update(block.encode())
        names.append(digest.hexdigest()[:32])
        if len(names) == MOST:
            break
    return names


def _parts(request: GenerateRequest) -> Iterator[str]:
    """The prompt as text, in an order in which what comes later changes nothing of what came before."""
    if request.prompt is not None:
        yield request.prompt
    for token in request.prompt_ids or ():
        yield f"{token} "
    for message in request.messages or ():
        yield f"{message.model_dump_json()}\n"


def _blocks(parts: Iterator[str]) -> Iterator[str]:
    """Whole blocks; what is left at the end is in none."""
    waiting: list[str] = []
    length = 0
    for part in parts:
        waiting.append(part)
        length += len(part)
        if length < BLOCK:
            continue
        text = "".join(waiting)
        whole = length - length % BLOCK
        yield from (text[start : start + BLOCK] for start in range(0, whole, BLOCK))
        waiting, length = [text[whole:]], length - whole
