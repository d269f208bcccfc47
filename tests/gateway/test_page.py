"""The tables and the limits of docs/gateway.md are what the gateway does."""

from __future__ import annotations

import re

import pytest

from stoker.broker import keys
from stoker.client import chunks
from stoker.gateway import (
    batch_lines,
    batch_run,
    batch_runner,
    batches,
    bodies,
    command,
    events,
    files,
    protocol,
    uploads,
)
from stoker.gateway.anthropic import MessagesBody
from stoker.gateway.batches import BatchBody
from stoker.gateway.chat import ChatBody
from stoker.gateway.completions import CompletionBody
from stoker.gateway.embeddings import EmbeddingBody
from stoker.gateway.fields import Body
from stoker.gateway.responses import ResponsesBody
from tests.docs.pages import ROOT, code, rows

COLUMNS: dict[str, type[Body]] = {
    "chat": ChatBody,
    "completions": CompletionBody,
    "embeddings": EmbeddingBody,
    "messages": MessagesBody,
    "responses": ResponsesBody,
}


def test_each_field_of_a_batch_is_in_its_table() -> None:
    assert {code(row[0])[0] for row in rows("docs/gateway.md", "of a batch")} == set(BatchBody.model_fields)


@pytest.mark.parametrize("endpoint", COLUMNS)
def test_each_field_is_in_the_table_as_it_is_taken_or_refused(endpoint: str) -> None:
    body, column = COLUMNS[endpoint], 1 + list(COLUMNS).index(endpoint)
    said = {code(row[0])[0]: row[column] for row in rows("docs/gateway.md", "field")}
    assert {name for name, cell in said.items() if cell == "refused"} == set(body.REFUSED)
    assert {name for name, cell in said.items() if cell not in ("refused", "–")} == set(body.model_fields)


WORDS = {"two": 2, "three": 3, "four": 4, "ten": 10, "a million": 1_000_000}
DAY = 24 * 3600
#: What the page says of a limit → the limit.
LIMITS = {
    r"a comment every (\w+) seconds of silence": events.KEEP_ALIVE,
    r"reads nothing for (\d+) seconds counts as gone": events.SLOW,
    r"`created_at`\), up to (\d+) MiB": uploads.MOST_BYTES / 2**20,
    r"It is kept for (\d+) days": keys.FILE_TTL / DAY,
    r"room for (\d+) files": files.MOST_FILES,
    r"files of (\d+) GiB together": files.MOST_STORED / 2**30,
    r"of at most (a million) lines": batch_lines.MOST_LINES,
    r"lines of at most (\d+) MiB": bodies.MOST_BYTES / 2**20,
    r"other hours from `1h` to `(\d+)h`": batches.LONGEST_WINDOW,
    r"A job that failed is asked (\w+) times": chunks.ATTEMPTS,
    r"Up to (\w+) batches run at a time": batch_runner.AT_ONCE,
    r"What is done is written every (\w+) seconds": batch_run.COMMIT_EVERY,
    r"within (\d+) seconds when it is killed": keys.RUNNER_TTL,
    r"Batches can be asked for (\d+) days": keys.BATCH_TTL / DAY,
    r"a client has at most (\d+) that have not ended": batches.MOST_OPEN,
    r"Headers have (\d+) seconds": protocol.HEADERS_WITHIN,
    r"Headers have \d+ seconds and (\d+) KiB": command.MOST_HEADERS / 2**10,
    r"when its connection is closed has (\d+) seconds": protocol.FLUSHED_WITHIN,
}


@pytest.mark.parametrize("said", LIMITS)
def test_a_limit_that_the_page_names_is_the_gateways(said: str) -> None:
    page = " ".join((ROOT / "docs" / "gateway.md").read_text("utf-8").split())
    (number,) = re.findall(said, page)
    assert (WORDS.get(number) or int(number)) == LIMITS[said]
