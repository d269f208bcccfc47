"""What the gateway costs. It and the Python client ask the same worker in one run, by turns.

The worker's engine does nothing, at a steady rate, so that what is left is broker, client and gateway; one part has a
real model. `python -m bench.gateway streams`: that part alone. The quick form has fewer rounds and parts.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from bench.idle_models import MODEL
from bench.queue import Bench
from bench.report import Record, Row, against, by_turns, parser, row
from stoker import AsyncClient
from stoker.broker import policy
from stoker.broker.connection import connect
from stoker.local.stack import Stack
from stoker.settings import Settings, load_settings

STREAMS, TOKENS, ROUNDS = 32, 100, 5
#: Steps a second of the idle engine: 1,600 tokens a second over all streams; and more than anything bears.
STEADY, FLOOD = 50.0, 400.0
#: Steps a second where a first token is waited for: it comes at the next step.
QUICK, FIRSTS = 1000.0, 100
NO_OPS, AT_ONCE = 400, 32
IDLE = 1000
REAL_MODEL, REAL_TOKENS = "smollm2-135m-instruct", 16
MESSAGES = [{"role": "user", "content": "Say something."}]


class Side(Protocol):
    """One way to ask."""

    async def stream(self, model: str, tokens: int) -> tuple[float, float, int]:
        """Seconds until the first token, until the last, and how many came."""

    async def whole(self, model: str) -> None:
        """A job that does nothing."""


class Python:
    """The client, in this process."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def stream(self, model: str, tokens: int) -> tuple[float, float, int]:
        began, first, count = time.perf_counter(), 0.0, 0
        job = await self._client.generate(MESSAGES, model=model, max_tokens=tokens, ignore_eos=True, temperature=0.0)
        async with aclosing(job.stream(timeout=60)) as stream:
            async for _ in stream:
                count += 1
                first = first or time.perf_counter() - began
        await job.result(60)
        return first, time.perf_counter() - began, count

    async def whole(self, model: str) -> None:
        job = await self._client.generate(MESSAGES, model=model, max_tokens=1)
        await job.result(60)


class Http:
    """A client that does as little as one can, over connections that are kept."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").removesuffix("/v1").partition(":")
        self._port = int(port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def stream(self, model: str, tokens: int) -> tuple[float, float, int]:
        began, first, count = time.perf_counter(), 0.0, 0
        body = {"model": model, "messages": MESSAGES, "max_tokens": tokens, "stream": True, "ignore_eos": True}
        body |= {"temperature": 0, "stream_options": {"include_usage": True}}
        async with aclosing(self.lines(body)) as lines:
            async for line in lines:
                if not first and b'"content":"' in line and b'"content":""' not in line:
                    first = time.perf_counter() - began
                if b'"completion_tokens":' in line:
                    # Some tokens have no text, and no event: the last one has the count.
                    count = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
        return first, time.perf_counter() - began, count

    async def whole(self, model: str) -> None:
        body = {"model": model, "messages": MESSAGES, "max_tokens": 1}
        async with aclosing(self.lines(body)) as lines:
            async for _ in lines:
                pass

    async def lines(self, body: dict[str, object]) -> AsyncGenerator[bytes]:
        """Those of the answer's body."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        header = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in header.split(b"\r\n", 1)[0]:
            raise RuntimeError(f"the gateway answered {header!r}")
        if b"transfer-encoding: chunked" in header:
            while size := int(await reader.readline(), 16):
                chunk = (await reader.readexactly(size + 2))[:-2]
                for line in chunk.splitlines():
                    yield line
            await reader.readline()
        else:
            length = header.split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0]
            yield await reader.readexactly(int(length))
        self._idle.append((reader, writer))

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


class Pair:
    """Both sides over one worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        command = [sys.executable, "-m", "stoker.cli", "serve", "--port=0"]
        env = {**os.environ, **settings.environment(), "STOKER_URL": settings.address.url}
        self._process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said.startswith("gateway"):
            raise RuntimeError(f"the gateway ended with {self._process.wait()}")
        self.url = said.split()[1]

    def run(self, work: Callable[[dict[str, Side]], Awaitable[None]]) -> None:
        """`work` gets the sides by their names."""

        async def main() -> None:
            async with self._sides() as sides:
                await work(sides)

        asyncio.run(main())

    def by_turns(self, measure: Callable[[Side], Awaitable[float]], rounds: int) -> dict[str, list[float]]:
        """Each side once to warm up, then both in turn."""
        with asyncio.Runner() as runner, ExitStack() as leaving:
            opened = self._sides()
            sides = runner.run(opened.__aenter__())
            leaving.callback(lambda: runner.run(opened.__aexit__(None, None, None)))

            def once(side: Side) -> float:
                return runner.run(_awaited(measure(side)))

            return by_turns({name: partial(once, side) for name, side in sides.items()}, rounds)

    @asynccontextmanager
    async def _sides(self) -> AsyncGenerator[dict[str, Side]]:
        http = Http(self.url)
        async with AsyncClient(settings=self._settings) as client:
            yield {"gateway": http, "client": Python(client)}
        http.close()

    @property
    def resident(self) -> float:
        """MiB of the gateway's process."""
        status = Path(f"/proc/{self._process.pid}/status").read_text("utf-8")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)


@contextmanager
def pair(settings: Settings) -> Iterator[Pair]:
    both = Pair(settings)
    try:
        yield both
    finally:
        both.close()


async def together(side: Side, model: str, tokens: int) -> float:
    """Tokens a second of `STREAMS` streams at once, from the first request to the last token."""
    began = time.perf_counter()
    came = await asyncio.gather(*(side.stream(model, tokens) for _ in range(STREAMS)))
    if any(count != tokens for _, _, count in came):
        raise RuntimeError(f"tokens are missing: {[count for _, _, count in came]} of {tokens} each")
    return STREAMS * tokens / (time.perf_counter() - began)


async def _awaited(sample: Awaitable[float]) -> float:
    return await sample


def measured(settings: Settings, measure: Callable[[Side], Awaitable[float]], rounds: int) -> dict[str, list[float]]:
    with pair(settings) as both:
        return both.by_turns(measure, rounds)


def streams(bench: Bench, rounds: int) -> list[Row]:
    rows: list[Row] = []
    for rate, what in ((STEADY, "a steady worker"), (FLOOD, "a worker faster than both")):
        with bench.worker(one_kind=True, rate=rate, generate_slots=STREAMS):
            found = measured(bench.settings, lambda side: together(side, MODEL, TOKENS), rounds)
        rows += compared(f"{STREAMS} streams, {what}", "tokens/s", found)
    return rows


def real(bench: Bench, rounds: int) -> list[Row]:
    """The same where a model computes on the same cores."""
    settings = load_settings(home=bench.settings.home / "real", models=(REAL_MODEL,), generate_slots=STREAMS, grace=5.0)
    with Stack(settings, flower=False, own_broker=True) as stack:
        stack.wait_until_warm()
        found = measured(stack.settings, lambda side: together(side, REAL_MODEL, REAL_TOKENS), rounds)
    return compared(f"{STREAMS} streams, {REAL_MODEL}", "tokens/s", found)


def first_token(bench: Bench, rounds: int) -> list[Row]:
    async def once(side: Side) -> float:
        return 1000 * (await side.stream(MODEL, 2))[0]

    with bench.worker(one_kind=True, rate=QUICK):
        found = measured(bench.settings, once, FIRSTS * rounds // ROUNDS)
    more = [gateway - client for gateway, client in zip(found["gateway"], found["client"], strict=True)]
    name = "first token of one stream"
    return [*compared(name, "ms", found), row(f"{name}, more than the Python client's", "ms", more)]


def no_ops(bench: Bench, rounds: int) -> list[Row]:
    async def rate(side: Side) -> float:
        left = iter(range(NO_OPS))

        async def ask() -> None:
            for _ in left:
                await side.whole(MODEL)

        began = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
        return NO_OPS / (time.perf_counter() - began)

    with bench.worker(one_kind=True):
        found = measured(bench.settings, rate, rounds)
    return compared(f"requests of a no-op, {AT_ONCE} at once", "requests/s", found)


def idle_streams(bench: Bench, _: int) -> list[Row]:
    """Memory of streams to which nothing comes: their jobs make a token in half an hour, or wait."""
    grown: list[float] = []

    async def work(sides: dict[str, Side]) -> None:
        http = sides["gateway"]
        assert isinstance(http, Http)
        await http.stream(MODEL, 2)
        before = both.resident
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 1000, "top_k": 10**6, "stream": True}
        opened = [asyncio.ensure_future(_ended(http.lines(body))) for _ in range(IDLE)]
        # Each has had its first comment by then.
        await asyncio.sleep(20)
        if failed := [task for task in opened if task.done()]:
            raise RuntimeError(f"{len(failed)} streams ended: {failed[0].exception()}")
        grown.append(1024 * (both.resident - before) / IDLE)
        for task in opened:
            task.cancel()
        await asyncio.wait(opened)

    redis = connect(bench.settings)
    policy.decide(redis, "client_limit", 2 * IDLE)
    with bench.worker(one_kind=True), pair(bench.settings) as both:
        both.run(work)
    redis.close()
    return [row(f"memory of an idle stream, {IDLE} at once", "KiB", grown)]


async def _ended(lines: AsyncGenerator[bytes]) -> None:
    async for _ in lines:
        pass


def compared(name: str, unit: str, found: dict[str, list[float]]) -> list[Row]:
    return against(name, unit, found["gateway"], "the Python client", found["client"])


SHORT = (streams, first_token, no_ops)
PARTS = (*SHORT, real, idle_streams)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("parts", nargs="*", metavar="PART", help=", ".join(part.__name__ for part in PARTS))
    options = made.parse_args()
    record = Record("gateway", options.out)
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
        for part in SHORT if options.quick else PARTS:
            if options.parts and part.__name__ not in options.parts:
                continue
            # A broker for each: what one leaves is no part of the next.
            bench = Bench(Path(folder) / part.__name__)
            try:
                record.part(part.__name__, partial(part, bench, 2 if options.quick else ROUNDS))
            finally:
                bench.close()
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
