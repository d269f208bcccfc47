"""Who may ask: every program on loopback while there are no keys, else who has one, as often as it allows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from stoker.broker import api_keys
from stoker.broker.api_keys import Admission
from stoker.broker.connection import translated
from stoker.client._async.client import AsyncClient
from stoker.errors import BrokerUnavailable
from stoker.gateway.calls import Caller
from stoker.gateway.errors import Refused

log = logging.getLogger(__name__)


class Access(Protocol):
    async def caller(self, headers: Mapping[str, str]) -> Caller:
        """Who asks; counts the request. Raises `Refused`."""

    async def spend(self, caller: Caller, tokens: int) -> None:
        """Count what an answer took."""


class AnyCaller:
    """For tests, and for a client without a broker."""

    async def caller(self, headers: Mapping[str, str]) -> Caller:
        return Caller()

    async def spend(self, caller: Caller, tokens: int) -> None:
        """Nothing is counted."""


class Keyed:
    """Keys of the broker. `required`: also while there are none."""

    def __init__(self, client: AsyncClient, *, required: bool) -> None:
        self._client, self._required = client, required

    async def caller(self, headers: Mapping[str, str]) -> Caller:
        secret = _secret(headers)
        admission = await self._admission(secret)
        key = admission.key
        if key is None:
            # What is no key of ours may be what a client sends because it must send something.
            ours = secret is not None and secret.startswith(api_keys.BEGINNING)
            if not ours and not self._required and not admission.keys:
                return Caller()
            raise Refused(
                401, "Authorization: no valid key given; send one of `stoker keys create` as Bearer, or as x-api-key.",
                code="invalid_api_key",
            )  # fmt: skip
        if admission.wait:
            allowed = key.tokens if admission.short_of == "tokens" else key.requests
            message = f"this key may take {allowed} {admission.short_of} a minute; ask again in {admission.wait:.1f} s."
            raise Refused(429, message, code="rate_limit_exceeded", again=admission.wait)
        models = None if key.models is None else frozenset(key.models)
        return Caller(key.client, models, secret, key.tokens)

    async def _admission(self, secret: str | None) -> Admission:
        with translated(self._client.settings):
            return await api_keys.admission(secret or "").on_async(self._redis)

    async def spend(self, caller: Caller, tokens: int) -> None:
        if caller.secret is None or caller.tokens is None or not tokens:
            return
        try:
            with translated(self._client.settings):
                await api_keys.spending(caller.secret, caller.tokens, tokens).on_async(self._redis)
        except BrokerUnavailable as error:
            # The answer is there, and is worth more than its count.
            log.warning("%d tokens of client %s are not counted: %s", tokens, caller.key, error)

    @property
    def _redis(self) -> Any:
        return self._client.redis


def _secret(headers: Mapping[str, str]) -> str | None:
    """The key, as OpenAI's clients send it, or as Anthropic's do."""
    kind, _, code = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and code.strip():
        return code.strip()
    return headers.get("x-api-key") or None
