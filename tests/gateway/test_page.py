"""The table of docs/gateway.md is what the gateway does."""

from __future__ import annotations

import pytest

from stoker.gateway.anthropic import MessagesBody
from stoker.gateway.batches import BatchBody
from stoker.gateway.chat import ChatBody
from stoker.gateway.completions import CompletionBody
from stoker.gateway.embeddings import EmbeddingBody
from stoker.gateway.fields import Body
from stoker.gateway.responses import ResponsesBody
from tests.docs.pages import code, rows

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
