"""Conversations through two workers that share no disk: with jobs that go to the worker which has their beginning, and
with jobs that go to the one which asks first.

Each side has two workers of its own, which are idle while the other side's work. A turn is a few conversations at once,
each about a text of its own, and each asks its next question when it has the last answer.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from bench.report import Record, Row, by_turns, parser, ratio, row
from bench.texts import WORDS
from stoker import Client
from stoker.catalogue import CATALOGUE
from stoker.local.stack import Stack
from stoker.settings import Settings, load_settings

DEMO = "smollm2-135m-instruct"
#: Each side's name of the model, and the seconds that a job waits there.
SIDES = {"placed": Settings().placement, "first come": 0.0}
#: Words of a conversation's text, questions about it, and tokens of an answer.
TEXT, QUESTIONS, ANSWER = 900, 4, 16
ROUNDS, QUICK = 5, 2
WORKERS = 2


@dataclass(frozen=True)
class Turn:
    """`seconds` of all conversations; milliseconds to the first token of a question that is not the first, at the
    median; what part of the tokens of those prompts had been there."""

    seconds: float
    first_token: float
    cached: float


def model_of(side: str) -> str:
    return side.replace(" ", "-")


def turn(client: Client, model: str, numbers: count[int], conversations: int) -> Turn:
    began = time.perf_counter()
    seeds = [next(numbers) for _ in range(conversations)]
    with ThreadPoolExecutor(conversations) as pool:
        asked = [question for held in pool.map(partial(conversation, client, model), seeds) for question in held]
    seconds = time.perf_counter() - began
    cached, prompts = (sum(each[place] for each in asked) for place in (1, 2))
    return Turn(seconds, 1000 * statistics.median(each[0] for each in asked), cached / prompts)


def conversation(client: Client, model: str, seed: int) -> list[tuple[float, int, int]]:
    """Of each question behind the first: seconds to its first token, tokens that had been there, and all."""
    text = " ".join(np.random.default_rng(seed).choice(WORDS, TEXT))
    messages: list[dict[str, str]] = []
    found = []
    for number in range(QUESTIONS):
        question = f"{text if number == 0 else ''}\nWhat is word {number} of it?"
        messages.append({"role": "user", "content": question})
        began = time.perf_counter()
        job = client.generate(messages=messages, model=model, max_tokens=ANSWER, ignore_eos=True, lookup=False)
        stream = job.stream()
        next(stream)
        first = time.perf_counter() - began
        for _ in stream:
            pass
        result = job.result()
        messages.append({"role": "assistant", "content": result.text})
        if number:
            found.append((first, result.usage.cached_tokens, result.usage.prompt_tokens))
    return found


def rows_of(client: Client, conversations: int, rounds: int) -> list[Row]:
    numbers = count()
    measured = {side: partial(turn, client, model_of(side), numbers, conversations) for side in SIDES}
    found = by_turns(measured, rounds)
    name = f"{conversations} conversations"
    rows = []
    for side, turns in found.items():
        rows.append(row(f"{name}: time of a turn, {side}", "s", [made.seconds for made in turns]))
        rows.append(row(f"{name}: first token, {side}", "ms", [made.first_token for made in turns]))
        rows.append(
            row(f"{name}: tokens of a prompt that were there, {side}", "times", [made.cached for made in turns])
        )
    return [*rows, *(_gain(name, what, found) for what in ("seconds", "first_token"))]


def _gain(name: str, what: str, found: dict[str, list[Turn]]) -> Row:
    first_come, placed = ([getattr(made, what) for made in found[side]] for side in ("first come", "placed"))
    named = {"seconds": "time of a turn", "first_token": "first token"}[what]
    return ratio(f"{name}: {named}, first come / placed", first_come, placed)


def started(leaving: ExitStack, folder: Path) -> Settings:
    """Of the first worker, which has the broker. Each has a home of its own, as on a machine of its own."""
    first: Settings | None = None
    stacks: list[Stack] = []
    for side, wait in SIDES.items():
        models = (f"{model_of(side)}={CATALOGUE[DEMO][0]}",)
        for number in range(WORKERS):
            home = folder / f"{model_of(side)}-{number}"
            url = first.address.url if first is not None else None
            settings = load_settings(home=home, url=url, models=models, placement=wait, grace=5.0)
            stack = leaving.enter_context(Stack(settings, flower=False, own_broker=first is None))
            first = first or stack.settings
            stacks.append(stack)
    _wait(stacks)
    assert first is not None
    return first


def _wait(stacks: Sequence[Stack]) -> None:
    for stack in stacks:
        stack.wait_until_warm()


def main() -> int:
    options = parser(__doc__).parse_args()
    record = Record("placement", options.out)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as leaving:
        settings = started(leaving, Path(folder))
        with Client(settings=settings) as client:
            for conversations in (1, 3):
                rounds = QUICK if options.quick else ROUNDS
                record.part(f"{conversations}", partial(rows_of, client, conversations, rounds))
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
