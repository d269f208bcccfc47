"""`/v1/embeddings`."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator
from starlette.responses import JSONResponse, Response

from stoker.client._async.jobs import AsyncEmbedJob
from stoker.client.options import EmbedOptions
from stoker.contract import Usage
from stoker.contract.shown import brief
from stoker.errors import StokerError
from stoker.gateway.answers import PATIENCE, whole
from stoker.gateway.calls import Call, check_owner
from stoker.gateway.errors import Names, Refused
from stoker.gateway.fields import Body, parse

if TYPE_CHECKING:
    import numpy as np

NAMES = Names({"texts": "input"})
PRIORITY = 5


def _texts(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return value
    raise ValueError(f"{brief(value)} given; expected a text, or a list of texts. Token ids are not supported")


class EmbeddingBody(Body):
    """Fields behind `user` are Stoker's own."""

    input: Annotated[list[str], BeforeValidator(_texts)]
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


async def answered(call: Call) -> Response:
    """Raises `Refused`."""
    body = parse(EmbeddingBody, call.body)
    model, adapter = call.model(body.model)
    if adapter is not None:
        message = f"model: {brief(body.model, 160)} given; embeddings have no adapters. Name the base alone."
        raise Refused(404, message, param="model", code="model_not_found")
    if call.named.resumed:
        raise Refused(400, "Last-Event-ID: given for embeddings, which have no stream; leave it out.")
    try:
        client = call.sender(body.user)
        job = await client.embed(body.input, model=model, job_id=call.named.id, **body.options())
        if call.named.given:
            await check_owner(client, call.named.id)
    except StokerError as error:
        raise NAMES.refusal(error) from None
    vectors, usage = await whole(call, job.cancel, call.keep is True, _made(call, job), NAMES)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": counts})


async def _made(call: Call, job: AsyncEmbedJob) -> tuple[np.ndarray, Usage]:
    vectors, usage = await job.result(PATIENCE), await job.usage(PATIENCE)
    await call.spent(usage.prompt_tokens)
    if not call.named.given:
        # Nobody can ask for them again: they need not take the broker's room for ten minutes.
        await job.discard()
    return vectors, usage


def _encoded(vector: np.ndarray, form: str) -> object:
    """Numbers, or the bytes of little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()
