"""`/v1/rerank`, in the form of Cohere's and Jina's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from starlette.responses import JSONResponse, Response

from stoker.broker.outcome import vectors_reply
from stoker.client._async.jobs import AsyncRerankJob
from stoker.client.options import RerankOptions
from stoker.contract import RerankResult
from stoker.contract.requests import RERANK
from stoker.contract.shown import as_json
from stoker.errors import StokerError
from stoker.gateway.answers import PATIENCE, let_go, whole
from stoker.gateway.attendance import Attendance
from stoker.gateway.calls import Call, parsed, sent
from stoker.gateway.errors import Names, Refused
from stoker.gateway.fields import Body, Items
from stoker.gateway.waiting import Waiter

NAMES = Names({"texts": "documents"})
PRIORITY = 5


def _texts(value: Any) -> Any:
    """Texts, or objects that each have one."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{as_json(value)} given; expected a list of texts")
    for index, item in enumerate(value):
        text = item.get("text") if isinstance(item, dict) and set(item) == {"text"} else item
        if not isinstance(text, str):
            raise ValueError(f'item {index} is {as_json(item)}; expected a text, or an object {{"text": …}}')
    return [item["text"] if isinstance(item, dict) else item for item in value]


class RerankBody(Body):
    """Fields behind `user` are Stoker's own."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "max_chunks_per_doc": "a document is scored as a whole",
        "max_tokens_per_doc": 'documents are cut where the model takes no more, with truncation: "end"',
        "rank_fields": "send documents as texts",
        "return_embeddings": "ask /v1/embeddings for them",
    }

    model: str
    query: str
    documents: Annotated[Items[str], BeforeValidator(_texts)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False
    user: str | None = None
    truncation: Literal["error", "end"] = "error"
    normalize: bool | None = None
    prompt: str | None = None
    priority: int = PRIORITY
    deadline: float | None = None

    def options(self) -> RerankOptions:
        return RerankOptions(
            truncation=self.truncation, normalize=self.normalize, prompt=self.prompt, priority=self.priority,
            deadline=self.deadline,
        )  # fmt: skip


async def answered(call: Call) -> Response:
    """Raises `Refused`."""
    call, body = parsed(call, RerankBody)
    model = call.base(body.model, "rerankers")
    if call.named.resumed:
        raise Refused(400, "Last-Event-ID: given for reranking, which has no stream; leave it out.")
    result = await _ranked(call, body, model)
    tokens = result.usage.prompt_tokens
    return JSONResponse(
        {
            "id": call.named.id,
            "model": body.model,
            "results": _results(body, result),
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


async def _ranked(call: Call, body: RerankBody, model: str) -> RerankResult:
    client = call.sender(body.user)
    with call.waits(client) as waiter:
        try:
            ranking = client.rerank(body.query, body.documents, model=model, job_id=call.named.id, **body.options())
            job = await sent(call, client, ranking)
        except StokerError as error:
            raise NAMES.refusal(error) from None
        left = waiter.has_sent(job.cancel, partial(_taken, job))
        attended = Attendance(call, model, RERANK, job, waiter, left)
        return await whole(call, _made(call, job, waiter, attended), left, NAMES)


async def _taken(job: AsyncRerankJob) -> int:
    """What it took; the scores stay for who asks again."""
    return vectors_reply(job.id, await job.link.value(job.id, None)).usage.prompt_tokens


async def _made(call: Call, job: AsyncRerankJob, waiter: Waiter, attended: Attendance) -> RerankResult:
    async with attended.needed():
        result = await job.result(PATIENCE)
    await waiter.took(result.usage.prompt_tokens)
    await let_go(call.named, job)
    return result


def _results(body: RerankBody, result: RerankResult) -> list[dict[str, object]]:
    """The best first."""
    found = []
    for ranked in result.ranking(body.top_n):
        shown: dict[str, object] = {"index": ranked.index, "relevance_score": ranked.score}
        if body.return_documents:
            shown["document"] = {"text": body.documents[ranked.index]}
        found.append(shown)
    return found
