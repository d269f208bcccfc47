"""Each call of the client asks its link for just what the caller said. The link is one that notes what it is asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from stoker import AsyncClient, GenerateJob, TrainJob
from stoker.broker import keys
from stoker.broker.outcome import JobStatus
from stoker.broker.registry import AdapterEntry
from stoker.client._async.broker_link import AsyncBrokerLink
from stoker.client._async.jobs import (
    AsyncAdapterJob,
    AsyncEmbedJob,
    AsyncGenerateJob,
    AsyncRerankJob,
    AsyncTrainJob,
)
from stoker.contract import (
    EmbedReply,
    EmbedRequest,
    GenerateRequest,
    ModelCard,
    Presence,
    StreamToken,
    TrainReport,
    TrainRequest,
    Usage,
    encode,
)
from stoker.contract.control import ModelReport
from stoker.errors import ConfigError, InvalidRequest, JobCancelled, JobLost, UnknownAdapter, WorkerUnavailable
from stoker.settings import Settings

Asked = list[tuple[Any, ...]]
TOKEN = StreamToken(index=0, token_id=1, text="a", logit=0, logprob=0, probability=1)
USAGE = Usage(prompt_tokens=3)
REPLY = EmbedReply(blob=keys.vectors("job"), rows=2, dim=1, usage=USAGE)
CARDS = tuple(
    ModelCard(model=name, architecture="a", kinds=kinds, context=9, parameters=1, dim=dim, reranks=reranks)
    for name, kinds, dim, reranks in (
        ("mini", ("embed",), 4, False),
        ("judge", ("embed",), 1, True),
        ("smol", ("generate", "train", "adapters"), 0, False),
    )
)


def presence(name: str) -> Presence:
    return Presence(
        worker=name, host="h", pid=1, device="cpu", started=0, time=0, models=CARDS, adapters={}, lanes={},
        memory_bytes=0,
    )  # fmt: skip


def entry(*versions: int, serving: int | None = None) -> AdapterEntry:
    return AdapterEntry("smol", "style", serving, (), {number: {} for number in versions})


class Noting:
    """A link. `asked`: every question in order. `answers`: question → what it is answered; that for an
    `adapter`, one after the other."""

    def __init__(self, **answers: Any) -> None:
        self.asked: Asked = []
        self.settings = Settings()
        self._answers = {"workers": [presence("one@h/1"), presence("two@h/2")], "models": {}, **answers}

    def answer(self, question: str, *arguments: Any) -> Any:
        if question not in ("workers", "models"):
            self.asked.append((question, *arguments))
        found = self._answers.get(question)
        if question == "adapter" and isinstance(found, list):
            found = found.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found

    def __getattr__(self, question: str) -> Callable[..., Awaitable[Any]]:
        async def ask(*arguments: Any, **named: Any) -> Any:
            return self.answer(question, *arguments, *named.values())

        return ask

    async def entries(self, *arguments: Any) -> AsyncGenerator[Any]:
        for item in self.answer("entries", *arguments) or ():
            yield item


def ask(link: Noting, call: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        return await call(AsyncClient(link=link))  # type: ignore[arg-type]  # what it notes is dynamic

    return asyncio.run(run())


async def all_of(items: AsyncGenerator[Any]) -> list[Any]:
    async with aclosing(items) as found:
        return [item async for item in found]


# Jobs


@pytest.mark.parametrize("timeout", [None, 0.0, 7.5])
def test_a_caller_waits_for_a_result_as_long_as_it_said(timeout: float | None) -> None:
    vectors = np.ones((2, 1), np.float32)
    value = REPLY.model_dump(mode="json")
    reading: list[tuple[Callable[[Any], Awaitable[Any]], Asked]] = [
        (lambda link: AsyncEmbedJob(link, "job").result(timeout), [("vectors", "job", REPLY)]),
        (lambda link: AsyncEmbedJob(link, "job").encoded(timeout), [("vectors", "job", REPLY)]),
        (lambda link: AsyncEmbedJob(link, "job").usage(timeout), []),
        (lambda link: AsyncRerankJob(link, "job").result(timeout), [("vectors", "job", REPLY)]),
    ]
    for read, then in reading:
        link = Noting(value=value, vectors=vectors)
        asyncio.run(_awaited(read(link)))
        assert link.asked == [("value", "job", timeout), *then]
    link = Noting(value=JobCancelled("job was cancelled."))
    for job in (AsyncGenerateJob, AsyncTrainJob, AsyncAdapterJob):
        with pytest.raises(JobCancelled):
            asyncio.run(_awaited(job(link, "job").result(timeout)))  # type: ignore[arg-type]
    assert link.asked == [("value", "job", timeout)] * 3


async def _awaited(what: Awaitable[Any]) -> Any:
    return await what


@pytest.mark.parametrize("timeout", [None, 7.5])
@pytest.mark.parametrize(
    ("follow", "kind"),
    [
        (lambda link, **options: AsyncGenerateJob(link, "job").stream(**options), StreamToken),
        (lambda link, **options: AsyncTrainJob(link, "job").progress(**options), TrainReport),
    ],
)
def test_a_caller_follows_a_job_as_long_as_it_said(follow: Any, kind: type, timeout: float | None) -> None:
    link = Noting(entries=[TOKEN, TOKEN])
    assert asyncio.run(all_of(follow(link, timeout=timeout))) == [TOKEN, TOKEN]
    assert link.asked == [("entries", "job", kind, timeout)], "and read to its end it is not cancelled"


@pytest.mark.parametrize(
    ("job", "follow", "options", "cancels"),
    [
        (AsyncGenerateJob, "stream", {}, True),
        (AsyncGenerateJob, "stream", {"cancel_on_close": False}, False),
        (AsyncTrainJob, "progress", {}, False),
        (AsyncTrainJob, "progress", {"cancel_on_close": True}, True),
    ],
)
def test_leaving_a_stream_early_cancels_its_job_and_a_run_goes_on_unless_it_is_said(
    job: Any, follow: str, options: dict[str, bool], cancels: bool
) -> None:
    link = Noting(entries=[TOKEN, TOKEN])

    async def leave() -> None:
        async with aclosing(getattr(job(link, "job"), follow)(**options)) as items:
            async for _ in items:
                break

    asyncio.run(leave())
    assert (("cancel", "job") in link.asked) == cancels


def test_a_job_asks_about_itself() -> None:
    link = Noting(status=JobStatus.RUNNING)
    job = AsyncGenerateJob(link, "job")  # type: ignore[arg-type]

    async def run() -> None:
        assert await job.status() is JobStatus.RUNNING
        await job.cancel()
        await job.discard()

    asyncio.run(run())
    assert link.asked == [("status", "job"), ("cancel", "job"), ("discard", "job")]


# The client


@pytest.mark.parametrize(
    ("ability", "kind"),
    [
        ("embed", AsyncEmbedJob),
        ("rerank", AsyncRerankJob),
        ("generate", AsyncGenerateJob),
        ("train", AsyncTrainJob),
        ("adapters", AsyncAdapterJob),
    ],
)
def test_a_job_that_is_asked_for_by_its_id_is_of_its_own_kind(ability: str, kind: type) -> None:
    link = Noting(ability=ability)
    job = ask(link, lambda client: client.job("job"))
    assert (type(job), job.id, job.link) == (kind, "job", link)
    assert link.asked == [("ability", "job")]


def test_each_question_of_the_client_goes_to_its_link() -> None:
    link = Noting(sender="alice", jobs={"a": 1}, dead={"b": 2}, workers=[ONE := presence("one@h/1")], models={"m": 3})
    assert ask(link, lambda client: client.sender("job")) == "alice"
    assert ask(link, lambda client: client.jobs()) == {"a": 1}
    assert ask(link, lambda client: client.dead()) == {"b": 2}
    assert ask(link, lambda client: client.workers()) == [ONE]
    assert ask(link, lambda client: client.models()) == {"m": 3}
    ask(link, lambda client: client.close())
    assert link.asked == [("sender", "job"), ("jobs",), ("dead",), ("close",)]


@pytest.mark.parametrize(
    ("send", "kind", "model"),
    [
        (lambda client, **more: client.embed(["a"], **more), EmbedRequest, "mini"),
        (lambda client, **more: client.rerank("q", ["a"], **more), EmbedRequest, "judge"),
        (lambda client, **more: client.generate("a", seed=4, **more), GenerateRequest, "smol"),
        (lambda client, **more: client.train("style", [{"text": "a"}], **more), TrainRequest, "smol"),
    ],
)
def test_a_job_is_sent_to_the_model_that_can_do_it_under_the_id_that_was_given(
    send: Any, kind: type, model: str
) -> None:
    link = Noting()
    job = ask(link, lambda client: send(client, job_id="mine", priority=3))
    ((question, request, job_id, data),) = link.asked
    assert (question, type(request), request.model, request.priority, job_id) == ("submit", kind, model, 3, "mine")
    assert bool(data) == (kind is TrainRequest)
    assert (job.id, job.link) == ("mine", link)
    first, second = (ask(link, send).id for _ in range(2))
    assert first != second, "each is a job of its own without one"


def test_a_dead_job_is_sent_again_as_it_was_for_the_client_that_sent_it() -> None:
    letter = {"kind": "generate", "model": "smol", "client": "alice", "history": []}
    request = GenerateRequest(model="smol", prompt="a", seed=1)
    letter["request"] = json.dumps(encode(request))
    link = Noting(dead={"job": letter, "other": {**letter, "kind": "message"}})
    job = ask(link, lambda client: client.retry("job"))
    assert link.asked[-1][:1] == ("revive",)
    assert (link.asked[-1][1].prompt, *link.asked[-1][2:]) == ("a", "job", "alice")
    assert (type(job), job.id) == (AsyncGenerateJob, "job")
    with pytest.raises(JobLost, match="none: no dead letter of that id"):
        ask(link, lambda client: client.retry("none"))
    with pytest.raises(InvalidRequest, match="other: a message that cannot be read"):
        ask(link, lambda client: client.retry("other"))
    assert [question for question, *_ in link.asked].count("revive") == 1


def test_a_dead_job_that_scores_is_sent_again_as_one() -> None:
    request = EmbedRequest(model="judge", texts=("a",), query="q")
    letter = {"kind": "embed", "model": "judge", "client": "", "history": [], "request": json.dumps(encode(request))}
    assert type(ask(Noting(dead={"job": letter}), lambda client: client.retry("job"))) is AsyncRerankJob


@pytest.mark.parametrize(("follow", "job", "cancels"), [("stream", GenerateJob, True), ("progress", TrainJob, False)])
def test_ctrl_c_while_a_blocking_client_waits_for_a_token_cancels_the_job(follow: str, job: Any, cancels: bool) -> None:
    asked: list[str] = []

    class Link:
        def entries(self, *_: Any) -> Iterator[Any]:
            yield TOKEN
            raise KeyboardInterrupt

        def cancel(self, job_id: str) -> None:
            asked.append(job_id)

    with pytest.raises(KeyboardInterrupt):
        list(getattr(job(Link(), "job"), follow)())
    assert asked == (["job"] if cancels else [])


def test_a_link_under_another_key_has_the_same_connections() -> None:
    async def same() -> bool:
        link = AsyncBrokerLink(Settings(url="redis://127.0.0.1:1/0", client_key="team"))
        other: Any = link.with_key("alice")
        assert (link.settings.client_key, other.settings.client_key) == ("team", "alice")
        return other.redis is link.redis

    assert asyncio.run(same())


def test_a_client_under_another_key_shares_what_this_one_has_and_what_is_no_key_is_none() -> None:
    link: Any = Noting()
    link.with_key = lambda key, asked: ("over", key)
    client: Any = AsyncClient(link=link)
    other = client.with_key("alice")
    assert other.link == ("over", "alice")
    assert other.choices is client.choices
    for key in ("a b", "", "Alice", None, "a" * 65):
        with pytest.raises(InvalidRequest, match="key: "):
            client.with_key(key)


def test_a_client_over_no_broker_has_no_connections() -> None:
    with pytest.raises(ConfigError, match="works in memory"):
        _ = AsyncClient(link=Noting()).redis  # type: ignore[arg-type]


# Models of workers


@pytest.mark.parametrize("verb", ["load", "unload", "pin", "unpin"])
def test_the_worker_that_is_named_is_asked_for_the_model_within_the_time_that_was_given(verb: str) -> None:
    done = ModelReport(id="x", worker="two@h/2", verb="pin", model="smol", phase="done")
    for timeout in (None, 7.5):
        link = Noting(command=done)
        found = ask(link, lambda client: getattr(client.models, verb)("smol", worker="two", timeout=timeout))  # noqa: B023
        assert found == done
        ((question, worker, command, waits),) = link.asked
        assert (question, worker, command.verb, command.model, waits) == ("command", "two@h/2", verb, "smol", timeout)


@pytest.mark.parametrize("answer", [None, WorkerUnavailable("worker two@h/2 went away")])
def test_after_a_command_the_models_are_looked_up_anew_also_if_it_failed(answer: Exception | None) -> None:
    link = Noting(command=answer)

    async def run(client: AsyncClient) -> str | None:
        assert await client.choose_model(None, "generate") == "smol"
        assert client.choices.get(None, "generate") == "smol"
        try:
            await client.models.unload("smol", worker="two")
        except WorkerUnavailable:
            assert answer is not None
        return client.choices.get(None, "generate")

    assert ask(link, run) is None


# Adapters


@pytest.mark.parametrize(
    ("verb", "given", "version"),
    [("promote", "style@2", 2), ("rollback", "style", None), ("deactivate", "style", None)],
)
def test_a_change_of_an_adapter_is_asked_for_by_its_name_and_version(
    verb: str, given: str, version: int | None
) -> None:
    before, after = entry(1, 2, serving=1), entry(1, 2, serving=2)
    link = Noting(adapter=[before, after], change_adapter=True)
    assert ask(link, lambda client: getattr(client.adapters, verb)(given)) == after
    look = ("adapter", "smol", "style")
    assert link.asked == [look, ("change_adapter", "smol", verb, "style", version), look]


def test_a_version_is_looked_up_at_the_model_that_is_named() -> None:
    lately = CARDS[2].model_copy(update={"model": "named"})
    link = Noting(adapter=[entry(1)], adapters=[entry(1), entry(2)], models={"named": lately})
    assert ask(link, lambda client: client.adapters.get("style@1", "named")) == entry(1)
    assert ask(link, lambda client: client.adapters.list("named")) == [entry(1), entry(2)]
    assert link.asked == [("adapter", "named", "style"), ("adapters", "named")]


def test_after_its_last_version_an_adapter_is_returned_with_none() -> None:
    gone = UnknownAdapter("adapter 'style' given; there is none")
    link = Noting(adapter=[entry(1, serving=None), gone], change_adapter=True)
    assert ask(link, lambda client: client.adapters.unload("style@1")) == entry()


def test_why_a_change_cannot_be_is_said_of_the_adapter_as_it_is_by_then() -> None:
    """Another client may have promoted the version meanwhile."""
    link = Noting(adapter=[entry(1, 2, serving=2), entry(1, 2, serving=1)], change_adapter=False)
    with pytest.raises(InvalidRequest, match="'style@1' serves now"):
        ask(link, lambda client: client.adapters.unload("style@1"))
