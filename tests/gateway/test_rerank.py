"""`/v1/rerank`."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from stoker.errors import TextTooLong
from stoker.gateway.app import Gateway
from stoker.gateway.rerank import RerankBody
from stoker.testing import AsyncFakeClient
from tests.docs.pages import code, rows
from tests.gateway.machinery import Served

MODEL, DOCUMENTS = "bge", ["a cold start", "a warm model", "the model is warm"]


@pytest.fixture
def reranks(running: Served) -> AsyncFakeClient:
    fake = AsyncFakeClient(models={MODEL: ["rerank"], "mini": ["embed"]})
    running.over(Gateway(fake))
    return fake


def asked(running: Served, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
    body = {"model": MODEL, "query": "which?", "documents": DOCUMENTS, **fields}
    return httpx2.post(f"{running.url}/v1/rerank", json=body, headers=headers, timeout=20)


def test_documents_come_best_first_and_leave_the_broker(running: Served, reranks: AsyncFakeClient) -> None:
    reranks.script.rerank([0.25, 0.75, 0.5], times=None)
    answer = asked(running)
    assert answer.status_code == 200
    made = answer.json()
    assert made["results"] == [
        {"index": 1, "relevance_score": 0.75}, {"index": 2, "relevance_score": 0.5},
        {"index": 0, "relevance_score": 0.25},
    ]  # fmt: skip
    assert (made["model"], made["id"]) == (MODEL, answer.headers["x-request-id"])
    assert made["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    objects = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, {"text": DOCUMENTS[2]}]
    (best,) = asked(running, documents=objects, top_n=1, return_documents=True, user="team").json()["results"]
    assert best == {"index": 1, "relevance_score": 0.75, "document": {"text": "a warm model"}}
    assert [job.client for job in reranks.sent.jobs] == ["default", "team"]
    assert not reranks._memory._blobs  # noqa: SLF001  no public word says what is kept


def test_what_is_asked_for_is_what_the_job_is(running: Served, reranks: AsyncFakeClient) -> None:
    options = {"truncation": "end", "normalize": False, "prompt": "judge", "priority": 2, "deadline": 9.0}
    assert asked(running, {"idempotency-key": "once"}, **options).status_code == 200
    assert asked(running, {"idempotency-key": "once"}, **options).json()["id"] == "once"
    (sent,) = reranks.sent.rerank
    assert {name: getattr(sent, name) for name in options} == options
    assert (sent.query, sent.texts) == ("which?", tuple(DOCUMENTS))


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [({"query": " "}, 400, "query"), ({"query": ["a"]}, 400, "query"), ({"query": None}, 400, "query"),
     ({"documents": []}, 400, "documents"), ({"documents": "a"}, 400, "documents"),
     ({"documents": ["a", 1]}, 400, "documents"), ({"documents": [{"title": "a"}]}, 400, "documents"),
     ({"documents": ["a", ""]}, 400, "documents.1"), ({"top_n": 0}, 400, "top_n"), ({"top_n": True}, 400, "top_n"),
     ({"return_documents": 1}, 400, "return_documents"), ({"truncation": "start"}, 400, "truncation"),
     ({"priority": 10}, 400, "priority"), ({"rank_fields": ["a"]}, 400, "rank_fields"), ({"topn": 1}, 400, "topn"),
     ({"model": "mini"}, 404, "model"), ({"model": "other"}, 404, "model"), ({"model": "bge:style"}, 404, "model")],
)  # fmt: skip
def test_what_cannot_be_ranked_is_refused_by_name(
    running: Served, reranks: AsyncFakeClient, fields: dict[str, Any], status: int, param: str
) -> None:
    answer = asked(running, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert reranks.sent.jobs == []


def test_a_worker_names_the_document_that_is_too_long(running: Served, reranks: AsyncFakeClient) -> None:
    reranks.script.rerank(error=TextTooLong("texts.1: 700 tokens given with the query; bge takes 512."))
    error = asked(running).json()["error"]
    assert (error["param"], error["code"]) == ("documents.1", "context_length_exceeded")
    assert error["message"].startswith("documents.1: 700 tokens")
    assert asked(running, {"last-event-id": "job:1"}).status_code == 400


def test_each_field_is_in_the_table_as_it_is_taken_or_refused() -> None:
    said = {code(row[0])[0]: row[1] for row in rows("docs/gateway.md", "rerank field")}
    assert {name for name, cell in said.items() if cell == "refused"} == set(RerankBody.REFUSED)
    assert {name for name, cell in said.items() if cell != "refused"} == set(RerankBody.model_fields)
