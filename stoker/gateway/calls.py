"""One request, once it may be answered: who asks, what it is called, and what becomes of it when the client goes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from starlette.types import Receive

from stoker.broker import keys
from stoker.client._async.client import AsyncClient
from stoker.client.asynchronously import Joint, finished
from stoker.contract import ModelCard, Presence
from stoker.contract.names import Rule, follows
from stoker.contract.shown import as_json, brief
from stoker.gateway.errors import Refused
from stoker.gateway.fields import Body, parse
from stoker.gateway.waiting import Waiter, Waiting

B = TypeVar("B", bound=Body)
J = TypeVar("J")

#: Says what becomes of a job whose client goes away.
LEAVING = "x-stoker-on-disconnect"
#: Fields that say how a job is answered, and not what it does. `user` and `metadata`: whose it is.
_OF_THE_ANSWER = {"stream", "stream_options", "encoding_format", "top_n", "return_documents", "user", "metadata"}
#: Most tokens of an answer that names no limit and whose model nobody serves just now.
MOST_TOKENS = 32_768
#: Characters of a `user` at most.
LONGEST_USER = 512


def user_name(user: str) -> str:
    """The name that a user's jobs go by, in shares and limits: `user`, where it is a name, or one that is always the
    same for it. `sha256sum` makes that too, so that limits can name it."""
    if follows(Rule.NAME, user):
        return user
    return f"user-{hashlib.sha256(user.encode()).hexdigest()[:40]}"


@dataclass(frozen=True)
class NamedJob:
    """`id`: the job's, and the request's own. `given`: whether the client gave it. `after`: the index of the last token
    that the client has all of; -1: it has none. `had`: the events of the next one that it has."""

    id: str
    given: bool = False
    after: int = -1
    had: int = 0

    @property
    def resumed(self) -> bool:
        """Whether the client had a part of the answer already."""
        return self.after >= 0 or self.had > 0


@dataclass(frozen=True)
class Caller:
    """Who asks. `key`: the client key of an API key; None: nobody has to say who they are. `models`: the bases that
    they may use; None: all. `secret`: the API key itself, and `tokens` what it may take in a minute."""

    key: str | None = None
    models: frozenset[str] | None = None
    secret: str | None = field(default=None, repr=False)
    tokens: int | None = None


@dataclass(frozen=True)
class Call:
    """`keep`: the job goes on when the client leaves; None: as the body says. `receive`: says when it leaves."""

    client: AsyncClient
    caller: Caller
    models: Models
    body: bytes
    named: NamedJob
    keep: bool | None
    receive: Receive
    #: Counts tokens for the caller.
    spend: Callable[[Caller, int], Awaitable[None]]
    waiting: Waiting = field(default_factory=Waiting)

    def model(self, name: str) -> tuple[str, str | None]:
        """The base and the adapter of `base`, `base:adapter` or `base:adapter@2`. Raises `Refused`."""
        base, colon, adapter = name.partition(":")
        if not base or (colon and not adapter):
            message = f"model: {as_json(name, 160)} given; expected BASE, BASE:ADAPTER or BASE:ADAPTER@VERSION."
            raise Refused(404, message, param="model", code="model_not_found")
        if self.caller.models is not None and base not in self.caller.models:
            allowed = ", ".join(sorted(self.caller.models))
            message = f"model: {as_json(name, 160)} given; this key may use {allowed}."
            raise Refused(403, message, param="model", code="model_not_allowed")
        return base, adapter or None

    def base(self, name: str, plural: str) -> str:
        """The base that `name` is, where no adapter can be asked. `plural`: what cannot have one. Raises `Refused`."""
        base, adapter = self.model(name)
        if adapter is not None:
            message = f"model: {as_json(name, 160)} given; {plural} have no adapters. Name the base alone."
            raise Refused(404, message, param="model", code="model_not_found")
        return base

    def sender(self, user: str | None, field: str = "user") -> AsyncClient:
        """The client under whose key the job is sent: that of the API key; where there are none, `user`, which the
        request calls `field`, and which names one of their end users where there are keys. Raises `Refused`."""
        if user is None:
            return self.client
        if not 1 <= len(user) <= LONGEST_USER:
            message = f"{field}: {len(user)} characters given; allowed: 1 to {LONGEST_USER}."
            raise Refused(400, message, param=field, code="invalid_value")
        return self.client if self.caller.key is not None else self.client.with_key(user_name(user))

    def waits(self, sender: AsyncClient, *, store: bool = False) -> Waiter:
        """`store`: the job goes on when the client leaves, unless a header says otherwise; one that the client has
        named goes on for as long as the same request may come again. The request that sends a job counts what it takes,
        and one that goes on with its stream counts nothing."""
        keep = store if self.keep is None else self.keep
        lingers = sender.settings.patience if self.named.given and self.keep is None else 0.0
        key = sender.settings.client_key, self.named.id
        return Waiter(self.waiting, key, self.spent, keep=keep, counts=not self.named.resumed, lingers=lingers)

    async def spent(self, tokens: int) -> None:
        """Count what the answer took, also for a client that has gone."""
        await finished(lambda: self.spend(self.caller, tokens))

    async def gone(self) -> None:
        """Return when the client has gone."""
        while (await self.receive())["type"] != "http.disconnect":
            continue


class Models:
    """How long answers may be, and who is there to make them: what workers said of their models lately."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._cards: dict[str, ModelCard] = {}
        self._until = 0.0
        self._asking: Joint[dict[str, ModelCard]] = Joint()
        self._workers: list[Presence] = []
        self._alive_until = 0.0
        self._asking_workers: Joint[list[Presence]] = Joint()

    async def workers(self) -> list[Presence]:
        """Those that are alive, as of `PRESENCE_EVERY` seconds ago at most: for all requests that wait together."""
        if time.monotonic() >= self._alive_until:
            self._workers = await self._asking_workers.ask("workers", self._client.workers)
            self._alive_until = time.monotonic() + keys.PRESENCE_EVERY
        return self._workers

    async def most_tokens(self, model: str) -> int:
        """The longest answer that makes sense: the model's whole context."""
        if time.monotonic() >= self._until:
            self._cards = await self._asking.ask("models", self._client.models)
            self._until = time.monotonic() + keys.PRESENCE_EVERY
        card = self._cards.get(model)
        return MOST_TOKENS if card is None else min(MOST_TOKENS, max(1, card.context))


def job_of(headers: Mapping[str, str], new: str) -> NamedJob:
    """The job that a request is for; `new`: the id of one that names none. Raises `Refused`."""
    given, last = headers.get("idempotency-key"), headers.get("last-event-id")
    if given is not None and not follows(Rule.JOB_ID, given):
        message = f"Idempotency-Key: {brief(given)} given; allowed: {Rule.JOB_ID.allowed}."
        raise Refused(400, message, code="invalid_value")
    if last is None:
        return NamedJob(new if given is None else given, given is not None)
    job_id, _, place = last.rpartition(":")
    index, point, part = place.partition(".")
    if not follows(Rule.JOB_ID, job_id) or not _is_number(index) or (point and not _is_number(part)):
        message = (
            f"Last-Event-ID: {brief(last)} given; expected the id of an event of the stream, JOB:NUMBER or "
            "JOB:NUMBER.PART."
        )
        raise Refused(400, message, code="invalid_value")
    if given not in (None, job_id):
        message = f"Last-Event-ID: {brief(last)} given with the Idempotency-Key of another job; leave that out."
        raise Refused(400, message, code="invalid_value")
    if point:
        return NamedJob(job_id, True, int(index) - 1, int(part) + 1)
    return NamedJob(job_id, True, int(index))


def parsed(call: Call, kind: type[B]) -> tuple[Call, B]:
    """The body of `call`, and `call` with a client whose jobs know what they were asked for, where the request has an
    `Idempotency-Key`: given with another request, it would find the answer of the first. Raises `Refused`."""
    body = parse(kind, call.body)
    if not call.named.given or call.named.resumed:
        return call, body
    asked = call.client.with_key(call.client.settings.client_key, asked=_digest(body))
    return replace(call, client=asked), body


def _digest(body: Body) -> str:
    """Of what the job does: in any order, with what is usual said or not, and however it is answered."""
    fields = body.work()
    said = json.dumps({name: value for name, value in fields.items() if name not in _OF_THE_ANSWER}, sort_keys=True)
    return hashlib.blake2b(f"{type(body).__name__} {said}".encode(), digest_size=16).hexdigest()


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def keeps(headers: Mapping[str, str]) -> bool | None:
    """What the header says of the job of a client that leaves; None: nothing."""
    said = headers.get(LEAVING)
    if said not in (None, "cancel", "continue"):
        raise Refused(400, f"{LEAVING}: {brief(said)} given; allowed: cancel, continue.", code="invalid_value")
    return None if said is None else said == "continue"


async def sent(call: Call, client: AsyncClient, job: Awaitable[J]) -> J:
    """`job`, once `client` has sent it. Raises `Refused` for one of another client, whose id was given."""
    found = await job
    if call.named.given:
        await check_owner(client, call.named.id)
    return found


async def check_owner(client: AsyncClient, job_id: str) -> None:
    """Raise `Refused` for a job of another client: an id that was guessed shows nobody's answer."""
    sender = await client.sender(job_id)
    if sender is not None and sender != client.settings.client_key:
        raise Refused(409, f"job {job_id}: the id is taken; give another Idempotency-Key.", code="id_taken")
