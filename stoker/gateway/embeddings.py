"""`/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator
from starlette.responses import Response

from stoker.client._async.client import AsyncClient
from stoker.client._async.jobs import AsyncEmbedJob
from stoker.client.options import EmbedOptions
from stoker.contract.kinds import EMBED
from stoker.contract.shown import as_json
from stoker.errors import StokerError
from stoker.gateway.answers import PATIENCE, let_go, whole
from stoker.gateway.attendance import Attendance
from stoker.gateway.calls import Call, parsed, sent
from stoker.gateway.errors import Names, Refused
from stoker.gateway.fields import Body, Items
from stoker.gateway.waiting import Waiter

if TYPE_CHECKING:
    import numpy as np

NAMES = Names({"texts": "input"})
PRIORITY = 5
_dump = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _texts(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return value
    raise ValueError(f"{as_json(value)} given; expected a text, or a list of texts. Token ids are not supported")


class EmbeddingBody(Body):
    """Fields behind `user` are Stoker's own."""

    input: Annotated[Items[str], BeforeValidator(_texts)]
    model: str
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
    truncation: Literal["error", "end"] = "error"
    normalize: bool | None = None
    prompt: str | None = None
    priority: int = PRIORITY
    deadline: float | None = None

    def options(self) -> EmbedOptions:
        return EmbedOptions(
            dimensions=self.dimensions, truncation=self.truncation, normalize=self.normalize, prompt=self.prompt,
            priority=self.priority, deadline=self.deadline,
        )  # fmt: skip


@dataclass(frozen=True)
class Embedding:
    """What the endpoint asks for."""

    client: AsyncClient
    model: str
    body: EmbeddingBody
    options: EmbedOptions
    names: Names = NAMES
    stream: bool = False

    async def send(self, job_id: str) -> AsyncEmbedJob:
        return await self.client.embed(self.body.input, model=self.model, job_id=job_id, **self.options)

    async def made(self, job: AsyncEmbedJob, patience: float | None) -> tuple[bytes, int]:
        """The whole answer as JSON, and the tokens that it took."""
        vectors, usage = await job.result(patience), await job.usage(patience)
        rows = list[str]()
        for index, vector in enumerate(vectors):
            said = _encoded(vector, self.body.encoding_format)
            rows.append(_dump({"object": "embedding", "index": index, "embedding": said}))
            # Thousands of vectors as numbers take seconds: no stream of this gateway waits for more than one of them.
            await asyncio.sleep(0)
        counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        around = _dump({"object": "list", "model": self.body.model, "usage": counts})
        return f'{around[:-1]},"data":[{",".join(rows)}]}}'.encode(), usage.prompt_tokens


async def asked(call: Call) -> Embedding:
    """Raises `Refused`."""
    call, body = parsed(call, EmbeddingBody)
    model = call.base(body.model, "embeddings")
    return Embedding(call.sender(body.user), model, body, body.options())


async def answered(call: Call) -> Response:
    """Raises `Refused`."""
    embedding = await asked(call)
    if call.named.resumed:
        raise Refused(400, "Last-Event-ID: given for embeddings, which have no stream; leave it out.")
    with call.waits(embedding.client) as waiter:
        try:
            job = await sent(call, embedding.client, embedding.send(call.named.id))
        except StokerError as error:
            raise NAMES.refusal(error) from None
        left = waiter.has_sent(job.cancel, partial(_taken, job))
        attended = Attendance(call, embedding.model, EMBED.name, job, waiter, left)
        answer = await whole(call, _made(call, embedding, job, waiter, attended), left, NAMES)
        return Response(answer, media_type="application/json")


async def _taken(job: AsyncEmbedJob) -> int:
    """What it took; the vectors stay for who asks again."""
    return (await job.usage()).prompt_tokens


async def _made(call: Call, embedding: Embedding, job: AsyncEmbedJob, waiter: Waiter, attended: Attendance) -> bytes:
    async with attended.needed():
        answer, tokens = await embedding.made(job, PATIENCE)
    await waiter.took(tokens)
    # They need not take the broker's room for ten minutes.
    await let_go(call.named, job)
    return answer


def _encoded(vector: np.ndarray, form: str) -> object:
    """Numbers, or the bytes of little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()
