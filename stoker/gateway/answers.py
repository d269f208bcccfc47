"""From a job to a response, as a whole or as a stream, in the form of any endpoint."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stoker.client._async.client import AsyncClient
from stoker.client._async.jobs import AsyncEmbedJob, AsyncGenerateJob, AsyncRerankJob
from stoker.client.options import GenerateOptions
from stoker.client.requests import Prompt, generate_request
from stoker.contract import GenerateResult, StreamToken, Usage
from stoker.contract.kinds import GENERATE
from stoker.contract.shown import as_json
from stoker.errors import BrokerUnavailable, InvalidRequest, JobCancelled, JobLost, StokerError
from stoker.gateway.attendance import Attendance
from stoker.gateway.calls import Call, NamedJob, check_owner, sent
from stoker.gateway.errors import Names, Refused
from stoker.gateway.events import Event, EventResponse
from stoker.gateway.waiting import Waiter
from stoker.gateway.writing import written

log = logging.getLogger(__name__)
R = TypeVar("R")
#: Seconds without a token, or a result, after which a job is given up for its client. One that no worker is there for
#: is given up far sooner (`Attendance`).
PATIENCE = 3600.0


class Form(Protocol):
    """An endpoint's form of an answer. What it yields depends on the tokens alone, so that any gateway goes on with
    the stream of another."""

    #: Whether `whole` wants the tokens too.
    wants_tokens: bool

    def whole(self, result: GenerateResult, tokens: Sequence[StreamToken]) -> dict[str, object]: ...

    def first(self) -> Iterator[Event]: ...

    def token(self, token: StreamToken) -> Iterator[Event]: ...

    def last(self, result: GenerateResult) -> Iterator[Event]: ...

    def failed(self, refused: Refused) -> Iterator[Event]: ...


@dataclass(frozen=True)
class Generation:
    """What an endpoint asks for."""

    client: AsyncClient
    model: str
    adapter: str | None
    prompt: Prompt
    options: GenerateOptions
    seed: int | None
    form: Form
    names: Names
    stream: bool
    #: Whether the job goes on when its client leaves, unless a header says otherwise.
    store: bool = False

    async def send(self, job_id: str) -> AsyncGenerateJob:
        if self.adapter is not None:
            self.options["adapter"] = self.adapter
        model, prompt, seed = self.model, self.prompt, self.seed
        try:
            return await self.client.generate(prompt, model=model, seed=seed, job_id=job_id, **self.options)
        except InvalidRequest as error:
            if type(error) is InvalidRequest:
                # It spells a wrong value as Python does. Found once more, that is spelled as it came: in JSON.
                generate_request(model, prompt, seed, self.options, as_json)
            raise

    async def made(self, job: AsyncGenerateJob, patience: float | None) -> tuple[bytes, int]:
        """The whole answer as JSON, and the tokens that it took."""
        tokens = []
        if self.form.wants_tokens:
            async with aclosing(job.stream(timeout=patience, cancel_on_close=False)) as stream:
                tokens = [token async for token in stream]
        result = await job.result(patience)
        return await written(self.form.whole(result, tokens)), _all(result.usage)


async def answered(call: Call, asked: Generation) -> ASGIApp:
    """Send the job, or find it again, and answer with it."""
    with ExitStack() as held:
        waiter = held.enter_context(call.waits(asked.client, store=asked.store))
        try:
            sending = _found(call, asked) if call.named.resumed else sent(call, asked.client, asked.send(call.named.id))
            job = await sending
        except StokerError as error:
            raise asked.names.refusal(error) from None
        left = waiter.has_sent(job.cancel, partial(_taken, job))
        attended = Attendance(call, asked.model, GENERATE.name, job, waiter, left)
        if not asked.stream:
            answer = await whole(call, _whole(asked, job, waiter, attended), left, asked.names)
            return Response(answer, media_type="application/json")
        events = _events(call, asked, job, waiter, attended)
        response = EventResponse(events, asked.form.failed, call.gone, left, lambda: attended.in_doubt)
        return _until_the_end(held.pop_all(), response)


def _until_the_end(held: ExitStack, response: ASGIApp) -> ASGIApp:
    """What is held is held until all is sent."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        with held:
            await response(scope, receive, send)

    return answer


async def _found(call: Call, asked: Generation) -> AsyncGenerateJob:
    """The job whose stream was broken. It is not sent again: a job that is lost would have another answer."""
    await check_owner(asked.client, call.named.id)
    job = await asked.client.job(call.named.id)
    if not isinstance(job, AsyncGenerateJob):
        raise JobLost(f"job {call.named.id}: it generates nothing, and has no stream.")
    return job


async def whole(call: Call, made: Awaitable[R], left: Callable[[], Awaitable[None]], names: Names) -> R:
    """What the job made; `left` is awaited when the client leaves meanwhile. Raises `Refused`."""
    answer, gone = asyncio.ensure_future(made), asyncio.ensure_future(call.gone())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            await left()
            raise Refused(499, "the client has gone.", code="client_gone")
        return answer.result()
    except StokerError as error:
        raise names.refusal(error, by_worker=True) from None
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.wait({answer, gone})


async def _whole(asked: Generation, job: AsyncGenerateJob, waiter: Waiter, attended: Attendance) -> bytes:
    async with attended.needed():
        answer, tokens = await asked.made(job, PATIENCE)
    await waiter.took(tokens)
    return answer


async def _taken(job: AsyncGenerateJob) -> int:
    """The tokens that the job has taken by its end: of one that was cancelled those that were made, which its stream
    has for one that goes on with it."""
    with suppress(JobCancelled):
        return _all((await job.result()).usage)
    made = 0
    with suppress(JobCancelled):
        async with aclosing(job.stream(cancel_on_close=False)) as tokens:
            async for token in tokens:
                made = token.index + 1
    return made


async def let_go(named: NamedJob, job: AsyncEmbedJob | AsyncRerankJob) -> None:
    """Take what was answered with out of the broker, where nobody can ask for it again. A broker that does not hear of
    that costs no answer: what is left goes by itself."""
    if named.given:
        return
    try:
        await job.discard()
    except BrokerUnavailable as error:
        log.warning("what job %s made stays in the broker for now: %s", job.id, error)


def _all(usage: Usage) -> int:
    return usage.prompt_tokens + usage.completion_tokens


async def _events(
    call: Call, asked: Generation, job: AsyncGenerateJob, waiter: Waiter, attended: Attendance
) -> AsyncGenerator[Event]:
    """Every event behind those that the client has. Raises `Refused`."""
    form, began, made = asked.form, call.named.resumed, 0
    try:
        async with aclosing(job.stream(timeout=PATIENCE, cancel_on_close=False)) as tokens:
            async with attended.needed():
                token = await anext(tokens, None)
            while token is not None:
                for event in () if began else form.first():
                    yield event
                began, made = True, token.index + 1
                # A form may need to know what went before: it sees every token, also where nothing is sent.
                for event in _new(call.named, token.index, list(form.token(token))):
                    yield event
                token = await anext(tokens, None)
        result = await job.result(PATIENCE)
        _check_place(call.named, made)
        await waiter.took(_all(result.usage))
        for event in form.last(result):
            yield event
    except StokerError as error:
        raise asked.names.refusal(error, by_worker=True) from None
    finally:
        await waiter.took(made)


def _check_place(named: NamedJob, made: int) -> None:
    """Raise `Refused` for a client that says it has a token which was never made."""
    last = named.after + (named.had > 0)
    if last >= made:
        message = (
            f"Last-Event-ID: token {last} of job {named.id} given; it has {made} tokens, and the first is 0. Send the "
            "id of the last event that came."
        )
        raise Refused(400, message, code="invalid_value")


def _new(named: NamedJob, index: int, events: list[Event]) -> Iterator[Event]:
    """Those of a token's events that the client does not have, each with an id. The last one's says that the client has
    all of the token, and the others' how much of it."""
    if index <= named.after:
        return
    had, last = named.had if index == named.after + 1 else 0, len(events) - 1
    for part, event in enumerate(events[had:], had):
        yield replace(event, id=f"{named.id}:{index}" if part == last else f"{named.id}:{index}.{part}")
