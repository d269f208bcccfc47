"""A caller that leaves a stream early cancels the job, also where it is itself being cancelled."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from stoker import AsyncClient, AsyncGenerateJob, Client, JobStatus
from stoker.broker import keys
from stoker.client import asynchronously
from stoker.client._async.memory_link import AsyncMemoryLink
from stoker.client._sync.memory_link import MemoryLink
from stoker.client.asynchronously import Connections, finished
from stoker.client.in_memory.memory import Memory
from stoker.contract import Request, StreamToken, TrainReport
from stoker.settings import Settings
from tests.conftest import PATIENCE
from tests.stoker.test_client_core import fake, server

__all__ = ["fake", "server"]

TOKEN = StreamToken(index=0, token_id=1, text="x", logit=0.0, logprob=-1.0, probability=1.0)

Follow = Callable[[AsyncGenerateJob, asyncio.Event], Awaitable[None]]


async def waiting(job: AsyncGenerateJob, here: asyncio.Event, **options: Any) -> None:
    """Cancelled where the stream waits for the next token."""
    async for _ in job.stream(**options):
        here.set()


async def at_work(job: AsyncGenerateJob, here: asyncio.Event) -> None:
    """Cancelled where the caller does something else with a token."""
    async with aclosing(job.stream()) as stream:
        async for _ in stream:
            here.set()
            await asyncio.Event().wait()


async def by_anyio(call: Awaitable[None], here: asyncio.Event) -> None:
    """As Starlette and FastAPI end a response: every further `await` inside the scope is cancelled too."""
    async with anyio.create_task_group() as group:

        async def leave() -> None:
            await here.wait()
            group.cancel_scope.cancel()

        group.start_soon(leave)
        await call


async def by_move_on_after(call: Awaitable[None], here: asyncio.Event) -> None:
    with anyio.move_on_after(60) as scope:
        soon = asyncio.create_task(after(here, lambda: setattr(scope, "deadline", anyio.current_time())))
        await call
    await soon


async def by_timeout(call: Awaitable[None], here: asyncio.Event) -> None:
    limit = asyncio.timeout(60)
    soon = asyncio.create_task(after(here, lambda: limit.reschedule(asyncio.get_running_loop().time())))
    try:
        async with limit:
            await call
    except TimeoutError:
        await soon
    assert limit.expired()


async def after(here: asyncio.Event, do: Callable[[], None]) -> None:
    await here.wait()
    do()


async def by_cancel(call: Awaitable[None], here: asyncio.Event) -> None:
    task = asyncio.ensure_future(call)
    await here.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


WAYS = (by_anyio, by_move_on_after, by_timeout, by_cancel)


def connections_in_use(client: AsyncClient | Client) -> int:
    _, (used, _) = client.redis.connection_pool.get_connection_count()
    return used


async def left(server: Any, way: Any, follow: Any) -> tuple[JobStatus, int]:
    """The job's state after its stream was left, and the connections that the stream still holds."""
    async with AsyncClient() as client:
        job = await client.generate("x", model="smol")
        server.xadd(keys.stream(job.id), {"entry": TOKEN.model_dump_json()}, id=keys.entry_id(0))
        server.expire(keys.stream(job.id), 60)
        here = asyncio.Event()
        await way(follow(job, here), here)
        assert here.is_set()
        return await job.status(), connections_in_use(client)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("follow", [waiting, at_work])
@pytest.mark.parametrize("way", WAYS)
def test_a_cancelled_reader_cancels_its_job_and_keeps_no_connection(server: Any, way: Any, follow: Follow) -> None:
    assert asyncio.run(left(server, way, follow)) == (JobStatus.CANCELLED, 0)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("way", WAYS)
def test_a_reader_that_said_so_leaves_its_job_alone(server: Any, way: Any) -> None:
    def follow(job: AsyncGenerateJob, here: asyncio.Event) -> Awaitable[None]:
        return waiting(job, here, cancel_on_close=False)

    assert asyncio.run(left(server, way, follow)) == (JobStatus.QUEUED, 0)


def test_a_blocking_reader_that_leaves_cancels_its_job(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        job = client.generate("x", model="smol")
        server.xadd(keys.stream(job.id), {"entry": TOKEN.model_dump_json()}, id=keys.entry_id(0))
        server.expire(keys.stream(job.id), 60)
        stream = job.stream()
        assert next(stream) == TOKEN
        stream.close()
        assert job.status() == JobStatus.CANCELLED
        assert connections_in_use(client) == 0


def test_a_reader_of_a_run_that_leaves_lets_it_go_on(fake: Callable[[], Client], server: Any) -> None:
    report = TrainReport(
        index=0, step=1, steps=9, loss=1.0, learning_rate=0.1, gradient_norm=1.0, tokens=1, tokens_per_second=1.0
    )
    with fake() as client:
        job = client.train("style", "worker:rows.jsonl", model="smol")
        server.xadd(keys.stream(job.id), {"entry": report.model_dump_json()}, id=keys.entry_id(0))
        server.expire(keys.stream(job.id), 60)
        progress = job.progress()
        assert next(progress) == report
        progress.close()
        assert job.status() == JobStatus.QUEUED


def test_what_is_left_to_be_done_has_a_time_limit_and_the_log_says_that_it_was_not_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asynchronously, "LEAVE_WITHIN", 0.05)

    async def leave(call: Callable[[], Awaitable[None]]) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await finished(call)

    async def hangs() -> None:
        await asyncio.Event().wait()

    async def fails() -> None:
        await asyncio.sleep(0)
        raise RedisConnectionError("gone")

    with caplog.at_level(logging.WARNING):
        asyncio.run(leave(hangs))
        asyncio.run(leave(fails))
    assert [record.getMessage() for record in caplog.records] == [
        "while a cancelled caller left a job: no answer",
        "while a cancelled caller left a job: gone",
    ]


def test_a_caller_that_was_cancelled_stays_so_whatever_comes_of_the_rest() -> None:
    done = list[str]()

    async def ends() -> str:
        await asyncio.sleep(0)
        done.append("ended")
        return "an answer"

    async def cancelled() -> None:
        task = asyncio.ensure_future(finished(ends))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert done == ["ended"]


def test_a_caller_that_is_not_cancelled_waits_for_as_long_as_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asynchronously, "LEAVE_WITHIN", 0.0)

    async def takes_long() -> int:
        for _ in range(20):
            await asyncio.sleep(0.005)
        return 3

    assert asyncio.run(finished(takes_long)) == 3


def test_a_caller_that_is_not_cancelled_hears_the_error_itself() -> None:
    async def fails() -> None:
        raise RedisConnectionError("gone")

    async def answers() -> int:
        return 3

    with pytest.raises(RedisConnectionError, match="gone"):
        asyncio.run(finished(fails))
    assert asyncio.run(finished(answers)) == 3


async def serve(client: AsyncClient, ids: asyncio.Queue[str]) -> asyncio.Server:
    """A web server that streams a job's tokens to each caller, and ends a response as Starlette and FastAPI do: one
    task sends, one waits until the caller is gone, and the first that ends cancels the other."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        job = await client.generate("x", model="smol")
        await ids.put(job.id)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")

        async def send() -> None:
            async for token in job.stream():
                writer.write(f"data: {token.text}\n\n".encode())
                await writer.drain()

        async def until_gone() -> None:
            await reader.read()
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(send)
            group.start_soon(until_gone)
        writer.close()

    return await asyncio.start_server(respond, "127.0.0.1", 0)


async def disconnected(server: Any) -> tuple[JobStatus, int]:
    async with AsyncClient() as client:
        ids: asyncio.Queue[str] = asyncio.Queue()
        async with await serve(client, ids) as web:
            port = web.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            job = await client.job(await ids.get())
            server.xadd(keys.stream(job.id), {"entry": TOKEN.model_dump_json()}, id=keys.entry_id(0))
            server.expire(keys.stream(job.id), 60)
            await reader.readuntil(b"data: x\n\n")
            writer.close()
            await writer.wait_closed()
            async with asyncio.timeout(10):
                while await job.status() == JobStatus.QUEUED or connections_in_use(client):
                    await asyncio.sleep(0.01)
            return await job.status(), connections_in_use(client)


@pytest.mark.usefixtures("fake")
def test_a_web_caller_that_disconnects_cancels_its_job(server: Any) -> None:
    assert asyncio.run(disconnected(server)) == (JobStatus.CANCELLED, 0)


def test_a_client_lets_go_of_the_connections_of_loops_that_have_ended(server: Any) -> None:
    connections = Connections(Settings())

    async def ask() -> int:
        await connections.current().ping()
        return len(connections._of_loop)  # noqa: SLF001

    # A loop that has ended cannot close its sockets any more: those that nobody holds are closed as garbage.
    assert [asyncio.run(ask()) for _ in range(3)] == [1, 1, 1]


class LoopOfAnotherThread(asyncio.SelectorEventLoop):
    """Its end is asked for, and meanwhile another thread asks the same and begins with a loop of its own."""

    connections: Connections | None = None

    def is_closed(self) -> bool:
        connections, self.connections = self.connections, None
        if connections is not None:
            other = threading.Thread(target=asyncio.run, args=(current(connections),))
            other.start()
            other.join()
        return super().is_closed()


async def current(connections: Connections) -> Any:
    return connections.current()


def test_threads_whose_loops_begin_and_end_at_one_time_share_a_client() -> None:
    connections, ended = Connections(Settings(url="redis://127.0.0.1:1/0")), LoopOfAnotherThread()
    ended.run_until_complete(current(connections))
    ended.close()
    ended.connections = connections
    opened = asyncio.run(current(connections))
    assert vars(ended)["connections"] is None, "the other thread was there"
    assert list(connections._of_loop.values())[-1] is opened  # noqa: SLF001
    assert ended not in connections._of_loop  # noqa: SLF001


class Halting(AsyncMemoryLink):
    """A job is taken, and its client does not learn it before `here` is heard of."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.here = asyncio.Event()

    async def submit(self, request: Request, job_id: str, data: bytes = b"") -> None:
        await super().submit(request, job_id, data)
        self.here.set()
        await asyncio.Event().wait()


Send = Callable[[AsyncClient, Path, dict[str, Any]], Awaitable[object]]
SENDS: dict[str, Send] = {
    "embed": lambda client, folder, named: client.embed(["x"], **named),
    "rerank": lambda client, folder, named: client.rerank("x", ["x"], model="ranks", **named),
    "generate": lambda client, folder, named: client.generate("x", **named),
    "train": lambda client, folder, named: client.train("a", [{"text": "x"}], **named),
    "adapters": lambda client, folder, named: client.adapters.load("a", folder, **named),
}
MODELS = {"embeds": ["embed"], "ranks": ["rerank"], "generates": ["generate", "train", "adapters"]}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", SENDS)
def test_a_job_whose_sender_is_cancelled_runs_for_nobody_unless_it_has_an_id_of_the_senders(
    kind: str, named: bool, tmp_path: Path
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")

    async def left() -> list[str]:
        memory = Memory(Settings(), MODELS)
        memory.script.generate("x")
        memory.script.train()
        link = Halting(memory)
        client = AsyncClient(link=link)
        sending = asyncio.ensure_future(SENDS[kind](client, tmp_path, {"job_id": "mine"} if named else {}))
        await asyncio.wait_for(link.here.wait(), PATIENCE)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        return list(memory.jobs())

    assert asyncio.run(left()) == (["mine"] if named else [])


def test_a_bulk_call_that_is_cancelled_as_it_sends_leaves_no_job() -> None:
    async def left() -> tuple[int, list[str]]:
        memory = Memory(Settings(), MODELS)
        link = Halting(memory)
        bulk = AsyncClient(link=link).embed_many(["x"])
        sending = asyncio.ensure_future(anext(bulk))
        await asyncio.wait_for(link.here.wait(), PATIENCE)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        return len(memory.sent.jobs), list(memory.jobs())

    assert asyncio.run(left()) == (1, [])


def test_a_sender_that_is_interrupted_cancels_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(Settings(), MODELS)
    link = MemoryLink(memory)

    def interrupted(request: Request, job_id: str, data: bytes = b"") -> None:
        memory.submit(request, job_id, data, "me")
        raise KeyboardInterrupt

    monkeypatch.setattr(link, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Client(link=link).embed(["x"])
    assert (len(memory.sent.jobs), memory.jobs()) == (1, {})
