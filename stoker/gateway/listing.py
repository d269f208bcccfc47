"""`/v1/models`: the models that are warm, and their adapters under names of their own."""

from __future__ import annotations

from collections.abc import Iterator

from starlette.responses import JSONResponse, Response

from stoker.broker.registry import AdapterEntry
from stoker.client._async.client import AsyncClient
from stoker.contract import ModelCard
from stoker.contract.codec import CONTRACT
from stoker.contract.kinds import ADAPTERS
from stoker.contract.shown import as_json
from stoker.gateway.errors import Refused


async def models(client: AsyncClient, allowed: frozenset[str] | None) -> Response:
    """`allowed`: the bases that the caller may use; None: all."""
    return JSONResponse({"object": "list", "data": await _found(client, allowed)})


async def model(client: AsyncClient, name: str, allowed: frozenset[str] | None) -> Response:
    """Raises `Refused`."""
    for found in await _found(client, allowed):
        if found["id"] == name:
            return JSONResponse(found)
    message = f"model: {as_json(name, 160)} given; no model of that name is warm. /v1/models lists those that are."
    raise Refused(404, message, param="model", code="model_not_found")


async def _found(client: AsyncClient, allowed: frozenset[str] | None) -> list[dict[str, object]]:
    warm: dict[str, tuple[ModelCard, int]] = {}
    for worker in await client.workers():
        for card in worker.models:
            if card.contract == CONTRACT and (allowed is None or card.model in allowed):
                since = min(int(worker.started), warm[card.model][1] if card.model in warm else int(worker.started))
                warm[card.model] = (card, since)
    listed = []
    for name, (card, since) in sorted(warm.items()):
        entries = await client.adapters.list(name) if ADAPTERS.name in card.kinds else []
        listed += [_object(shown, since, card) for shown in (name, *_names(name, entries))]
    return listed


def _names(base: str, entries: list[AdapterEntry]) -> Iterator[str]:
    """A bare name stands for the version that serves."""
    for entry in entries:
        if entry.serving is not None:
            yield f"{base}:{entry.name}"
        yield from (f"{base}:{entry.name}@{version}" for version in sorted(entry.versions))


def _object(name: str, since: int, card: ModelCard) -> dict[str, object]:
    return {
        "id": name, "object": "model", "created": since, "owned_by": "stoker", "max_model_len": card.context,
        "kinds": card.abilities,
    }  # fmt: skip
