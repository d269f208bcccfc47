"""One client, written once: the blocking one is what the asyncio one says, with the same calls; jobs that travel."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import json
import pickle  # noqa: TID251 -- what `multiprocessing` and task queues do with the jobs that they are given
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import stoker
from stoker import AsyncClient, Client, GenerateJob, GenerateResult, JobStatus, StreamToken
from stoker.broker import keys
from stoker.broker.ledger.record import Field
from stoker.client._async import adapters as async_adapters
from stoker.client._async import jobs as async_jobs
from stoker.client._sync import adapters as sync_adapters
from stoker.client._sync import jobs as sync_jobs
from stoker.contract import Completion, Usage
from stoker.errors import BrokerUnavailable, InvalidRequest
from stoker.settings import Settings
from stoker.testing import AsyncFakeClient, FakeClient
from tests import unasync
from tests.conftest import wait_until
from tests.stoker.test_client_core import SMOL, fake, kill_owners, server

__all__ = ["fake", "server"]

PAIRS = {
    "client": (AsyncClient, Client),
    "fake": (AsyncFakeClient, FakeClient),
    "adapters": (async_adapters.AsyncAdapters, sync_adapters.Adapters),
    **{
        kind: (getattr(async_jobs, f"Async{kind}"), getattr(sync_jobs, kind))
        for kind in ("Job", "EmbedJob", "GenerateJob", "TrainJob", "AdapterJob")
    },
}


def test_the_blocking_client_is_what_its_source_says() -> None:
    assert unasync.stale() == []


def test_a_blocking_client_that_was_edited_by_hand_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = unasync.generated()
    path = unasync.TARGET / "jobs.py"
    monkeypatch.setattr(unasync, "generated", lambda: wanted | {path: wanted[path] + "# more\n"})
    assert unasync.stale() == ["jobs.py"]


def signature(member: Any) -> str:
    """Parameters and what a call gives in the end, in the blocking client's words."""
    called: Any = member.fget if isinstance(member, property) else member
    shown = inspect.signature(called)
    text = unasync.OURS.sub("", str(shown))
    for word, other in unasync.WORDS.items():
        text = text.replace(word, other)
    return text


@pytest.mark.parametrize("pair", PAIRS)
def test_both_clients_have_the_same_calls_with_the_same_parameters(pair: str) -> None:
    awaited, blocking = ({name: getattr(kind, name) for name in public(kind)} for kind in PAIRS[pair])
    assert {name: signature(member) for name, member in awaited.items()} == {
        name: signature(member) for name, member in blocking.items()
    }
    assert all(inspect.getdoc(member) for name, member in blocking.items() if name not in ("close", "redis"))


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))} | {
        name for name in vars(kind) if isinstance(vars(kind)[name], property)
    }


def test_the_asyncio_client_lists_jobs_and_dead_letters_and_retries(
    fake: Callable[[], Client], server: Any, broker: Settings
) -> None:
    with fake() as client:
        first, second = client.embed(["a"], model="mini"), client.generate("x", model="smol")
        kill_owners(server, second.id, "generate")

        async def asked() -> tuple[Any, Any, Any]:
            async with AsyncClient() as other:
                return await other.jobs(), await other.dead(), await (await other.retry(second.id)).status()

        listed, dead, status = asyncio.run(asked())
        assert list(listed) == [first.id]
        assert (listed[first.id]["kind"], dead[second.id]["kind"], status) == ("embed", "generate", JobStatus.QUEUED)
        assert {job: entry | {"age": 0} for job, entry in client.jobs().items() if job == first.id} == {
            first.id: listed[first.id] | {"age": 0}
        }


def test_a_retry_belongs_to_the_client_that_sent_the_job(fake: Callable[[], Client], server: Any) -> None:
    fake()
    with Client(key="alice") as alice, Client(key="operator") as operator:
        job = alice.generate("x", model="smol")
        kill_owners(server, job.id, "generate")
        operator.retry(job.id)
    assert server.hget(keys.job(job.id), Field.CLIENT) == b"alice"
    assert server.zcard(keys.client("alice", keys.queue(SMOL.model, "generate"))) == 1
    assert not server.exists(keys.client("operator", keys.queue(SMOL.model, "generate")))


@pytest.mark.parametrize("stranger", ["", "A b", None, 7])
def test_a_letter_without_a_client_is_retried_by_the_one_that_asks(
    fake: Callable[[], Client], server: Any, stranger: Any
) -> None:
    with Client(key="operator") as operator, fake() as sender:
        job = sender.generate("x", model="smol")
        kill_owners(server, job.id, "generate")
        letter = json.loads(server.hget(keys.DEAD, job.id)) | {"client": stranger}
        server.hset(keys.DEAD, job.id, json.dumps(letter))
        operator.retry(job.id)
    assert server.hget(keys.job(job.id), Field.CLIENT) == b"operator"


@pytest.mark.parametrize("asked", ["", "{", "[]", '{"contract": 1}'])
def test_a_letter_whose_request_cannot_be_read_is_one_clear_error(
    fake: Callable[[], Client], server: Any, asked: str
) -> None:
    letter = {"kind": "generate", "model": "smol", "request": asked, "history": []}
    server.hset(keys.DEAD, "x", json.dumps(letter))
    server.expire(keys.DEAD, 60)
    with fake() as client, pytest.raises(InvalidRequest):
        client.retry("x")


def test_jobs_results_and_tokens_have_a_short_repr() -> None:
    settings = Settings(url="redis://me:secret@127.0.0.1:1/0")
    with Client(settings=settings) as client:
        assert repr(GenerateJob(client.link, "abc")) == "<GenerateJob abc>"
        assert repr(client) == "<Client redis://me:***@127.0.0.1:1/0>"
    usage = Usage(worker="w" * 60, prompt_tokens=3, run_seconds=1.25)
    other = Completion(text="y" * 10_000, token_ids=tuple(range(4000)), finish_reason="length")
    result = GenerateResult(
        model="m", adapter=None, text="x" * 10_000, token_ids=tuple(range(4000)), finish_reason="stop", others=(other,),
        usage=usage,
    )  # fmt: skip
    assert repr(result) == (
        f"GenerateResult(text='{'x' * 39}'…, token_ids=<4000 items>, finish_reason='stop', model='m', adapter=None, "
        "others=<1 items>, usage=Usage(…))"
    )
    token = StreamToken(index=3, token_id=11, text=" the", logit=1.23456789, logprob=-0.5, probability=1.0)
    assert repr(token) == ("StreamToken(index=3, token_id=11, text=' the', logit=1.2346, logprob=-0.5, probability=1)")
    assert str(token) == repr(token).removeprefix("StreamToken(").removesuffix(")").replace(",", "")


def test_a_job_can_be_pickled_and_found_again_in_another_process(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        job = client.generate("x", model="smol")
        code = (
            "import pickle, sys; job = pickle.load(sys.stdin.buffer); "
            "print(type(job).__name__, job.id, job.status(), job.link.settings.client_key)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps(job), capture_output=True, check=True, timeout=60
        )
        assert done.stdout.decode().split() == ["GenerateJob", job.id, "queued", "default"]


def test_a_client_that_is_unpickled_sends_under_the_key_that_the_program_gave_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STOKER_CLIENT_KEY", "there")
    with Client("redis://127.0.0.1:1/3") as client, Client("redis://127.0.0.1:1/3", key="bob") as bob:
        data = pickle.dumps([client, client.with_key("alice"), bob])
    monkeypatch.setenv("STOKER_CLIENT_KEY", "here")
    found = pickle.loads(data)  # noqa: S301 -- our own
    assert [one.settings.client_key for one in found] == ["here", "alice", "bob"]
    assert [one.settings.client_key for one in pickle.loads(pickle.dumps(found))] == ["here", "alice", "bob"]  # noqa: S301


def test_a_pickle_has_the_address_and_never_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOKER_URL", raising=False)
    with Client("redis://me:sesame@127.0.0.1:1/3") as client:
        data = pickle.dumps([GenerateJob(client.link, "a"), GenerateJob(client.link, "b")])
    assert b"sesame" not in data
    first, second = pickle.loads(data)  # noqa: S301 -- our own
    assert first.link is second.link, "jobs of one pickle share a link"
    assert first.link.settings.address.redis == "redis://me@127.0.0.1:1/3"
    monkeypatch.setenv("STOKER_URL", "redis://me:other@broker:1/3")
    assert pickle.loads(data)[0].link.settings.address.redis == "redis://me:other@broker:1/3"  # noqa: S301
    assert copy.copy(first).id == "a"


def test_jobs_of_asyncio_travel_too(fake: Callable[[], Client], server: Any) -> None:
    fake()

    async def sent() -> bytes:
        async with AsyncClient() as client:
            return pickle.dumps(await client.embed(["a"], model="mini"))

    async def found(data: bytes) -> JobStatus:
        job = pickle.loads(data)  # noqa: S301 -- our own
        try:
            return await job.status()  # type: ignore[no-any-return]
        finally:
            await job.link.close()

    assert asyncio.run(found(asyncio.run(sent()))) == JobStatus.QUEUED


def test_an_asyncio_client_serves_one_event_loop_after_another(fake: Callable[[], Client], server: Any) -> None:
    fake()
    client = AsyncClient()

    async def send() -> JobStatus:
        return await (await client.embed(["loop"], model="mini")).status()

    assert [asyncio.run(send()) for _ in range(3)] == [JobStatus.QUEUED] * 3
    asyncio.run(client.close())
    gc.collect()
    # The server sees that a connection has ended when it next looks.
    wait_until(lambda: server.info("clients")["connected_clients"] == 1, "no connection of an ended loop is kept")


def test_an_asyncio_client_serves_two_event_loops_at_once(fake: Callable[[], Client], server: Any) -> None:
    fake()
    client = AsyncClient()

    async def both() -> list[JobStatus]:
        async def send() -> JobStatus:
            job = await client.generate("x", model="smol")
            for _ in range(20):
                await job.status()
            return await job.status()

        def elsewhere() -> JobStatus:
            async def closing() -> JobStatus:
                try:
                    return await send()
                finally:
                    await client.close()

            return asyncio.run(closing())

        found = await asyncio.gather(asyncio.to_thread(elsewhere), send(), asyncio.to_thread(elsewhere))
        await client.close()
        return list(found)

    assert asyncio.run(both()) == [JobStatus.QUEUED] * 3


def test_the_public_names_are_there() -> None:
    assert all(getattr(stoker, name) is not None for name in stoker.__all__)
    with pytest.raises(BrokerUnavailable), Client(settings=Settings(url="redis://127.0.0.1:1/0", patience=0)) as client:
        client.jobs()
