"""Batches over a real broker and real workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import openai
import pytest

from stoker import Client
from stoker.broker import keys
from stoker.local.stack import Stack
from stoker.settings import Settings
from tests.conftest import EMBED_MODEL, GENERATE_MODEL, wait_until
from tests.gateway.machinery import gateway_of
from tests.gateway.test_batches import URL, done, ended, rows, uploaded
from tests.integration.machinery import FragileBroker, two_workers_on

pytestmark = pytest.mark.integration


def asked(number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Count from {number}."}]
    body = {"model": GENERATE_MODEL, "messages": messages, "max_tokens": 2 + number % 4, "temperature": 0}
    return {"custom_id": f"line-{number}", "method": "POST", "url": URL, "body": body}


def check_answers(api: openai.OpenAI, batch: openai.types.Batch, count: int) -> list[dict[str, Any]]:
    """Each line is answered once, in order."""
    assert (batch.status, batch.error_file_id) == ("completed", None)
    found = rows(api, batch.output_file_id)
    assert [row["custom_id"] for row in found] == [f"line-{number}" for number in range(count)]
    assert all(row["response"]["body"]["choices"][0]["message"]["content"] for row in found)
    return found


def test_a_batch_of_a_real_worker_says_what_the_client_hears_and_leaves_nothing_in_the_broker(
    stack: Stack, client: Client
) -> None:
    with gateway_of(stack.settings) as api:
        batch_id = uploaded(api, [asked(number) for number in range(24)])
        found = check_answers(api, ended(api, batch_id, 60), 24)
        alone = api.chat.completions.create(**asked(7)["body"])
        assert found[7]["response"]["body"]["choices"][0]["message"]["content"] == alone.choices[0].message.content
        assert alone.usage is not None
        assert found[7]["response"]["body"]["usage"]["total_tokens"] == alone.usage.total_tokens
        body = {"model": EMBED_MODEL, "input": "a warm model"}
        vectors = uploaded(api, [{**asked(1), "url": "/v1/embeddings", "body": body}], "/v1/embeddings")
        (row,) = rows(api, ended(api, vectors).output_file_id)
        wanted = api.embeddings.create(model=EMBED_MODEL, input="a warm model", encoding_format="float")
        assert row["response"]["body"]["data"][0]["embedding"] == pytest.approx(wanted.data[0].embedding, abs=1e-6)
    left = client.redis.keys(keys.stream(f"{batch_id}*"))
    assert left == []
    assert all(0 < client.redis.ttl(name) <= keys.FETCHED_TTL for name in client.redis.keys(keys.job(f"{batch_id}*")))


class Gaps(threading.Thread):
    """Streams one answer after the other, and notes the seconds between two tokens."""

    def __init__(self, client: Client) -> None:
        super().__init__(daemon=True)
        self._client, self._enough = client, threading.Event()
        self.gaps: list[float] = []

    def run(self) -> None:
        while not self._enough.is_set():
            last = None
            with closing(
                self._client.generate("Once upon a time", model=GENERATE_MODEL, max_tokens=60).stream()
            ) as stream:
                for _ in stream:
                    now = time.monotonic()
                    if last is not None:
                        self.gaps.append(now - last)
                    last = now

    def stop(self) -> float:
        """The gap that one in twenty is longer than."""
        self._enough.set()
        self.join(120)
        return quantiles(self.gaps, n=20)[-1]


@contextmanager
def streaming(client: Client) -> Iterator[Gaps]:
    gaps = Gaps(client)
    gaps.start()
    try:
        yield gaps
    finally:
        gaps.stop()


def lines_through_a_death(folder: Path, count: int) -> dict[str, float]:
    """A batch of so many lines, of whose two workers one is killed in the middle. Returns the gap that one in twenty is
    longer than, in ms: of streams alone, next to the batch at two workers, and from the death of one on."""
    broker = FragileBroker(folder / "broker")
    try:
        with (
            two_workers_on(broker, folder, GENERATE_MODEL),
            Client(broker.url) as client,
            gateway_of(Settings(url=broker.url, home=folder / "gateway")) as api,
        ):
            with streaming(client) as alone:
                wait_until(lambda: len(alone.gaps) > 100, "a stream alone", 120)
            batch_id = uploaded(api, [asked(number) for number in range(count)])
            with streaming(client) as next_to_it:
                wait_until(lambda: len(next_to_it.gaps) > 100 and done(api, batch_id), "both run", 300)
            wait_until(lambda: done(api, batch_id) > count // 20, "it is in the middle", 300)
            with streaming(client) as through_it:
                wait_until(lambda: through_it.gaps, "a stream runs", 60)
                assert done(api, batch_id) < count, "it is in the middle"
                os.kill(client.workers()[0].pid, signal.SIGKILL)
                wait_until(lambda: len(through_it.gaps) > 100, "the stream goes on", 120)
            check_answers(api, ended(api, batch_id, 1200), count)
            streams = {"alone": alone, "next to it": next_to_it, "from a death on": through_it}
            return {name: 1000 * quantiles(stream.gaps, n=20)[-1] for name, stream in streams.items()}
    finally:
        broker.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_lines_are_each_answered_once_though_a_worker_is_killed(
    tmp_path: Path, record_property: Any
) -> None:
    record_property("p95 of streams' gaps, ms", lines_through_a_death(tmp_path, 2000))
