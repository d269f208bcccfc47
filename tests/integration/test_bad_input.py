"""Bad input: one clear error each, of the right class, and the worker goes on."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from stoker import Client
from stoker.broker import keys
from stoker.broker.envelope import envelope
from stoker.broker.outcome import JobStatus
from stoker.contract import Presence
from stoker.errors import (
    BrokerUnavailable,
    DatasetError,
    InvalidRequest,
    JobFailed,
    JobLost,
    TextTooLong,
    UnknownAdapter,
    UnknownModel,
)
from tests import endless
from tests.conftest import EMBED_MODEL, wait_until

pytestmark = pytest.mark.integration


def test_a_text_that_is_too_long_is_refused_with_both_lengths(client: Client) -> None:
    with pytest.raises(TextTooLong, match=r"402 tokens given; all-minilm-l6-v2 takes 256"):
        client.embed(["word " * 400], model=EMBED_MODEL).result(30)
    assert client.embed(["word " * 400], model=EMBED_MODEL, truncate=True).result(30).shape == (1, 384)


def test_a_prompt_that_leaves_no_room_is_refused_with_both_lengths(client: Client) -> None:
    with pytest.raises(TextTooLong, match=r"4\d{3} tokens given; tiny-decoder takes 4096 together"):
        client.generate("ab " * 2060, model=endless.MODEL, max_tokens=1000).result(60)


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_an_empty_text_is_refused_before_it_is_sent(client: Client, text: str) -> None:
    with pytest.raises(InvalidRequest, match="empty text"):
        client.embed([text], model=EMBED_MODEL)
    with pytest.raises(InvalidRequest, match="empty text"):
        client.generate(text, model=endless.MODEL)


def test_text_that_is_no_unicode_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest):
        client.embed(["half a pair \ud800"], model=EMBED_MODEL)


def test_an_unknown_model_is_refused_with_those_that_are_warm(client: Client) -> None:
    with pytest.raises(UnknownModel, match=f"'nope' given.*{endless.MODEL}"):
        client.generate("x", model="nope")


def test_a_model_that_cannot_do_the_job_is_refused(client: Client) -> None:
    with pytest.raises(UnknownModel, match="cannot embed: it can generate, train"):
        client.embed(["x"], model=endless.MODEL)


def test_an_unknown_adapter_is_refused_with_those_there_are(client: Client) -> None:
    with pytest.raises(UnknownAdapter, match="'nope' given"):
        client.generate("x", model=endless.MODEL, adapter="nope").result(30)


def test_a_bad_line_of_a_dataset_is_named(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "style.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": 3}\n')
    with pytest.raises(DatasetError, match=r"style\.jsonl, line 3: text is 3"):
        client.train("x", path, model=endless.MODEL)


def test_an_example_that_is_too_long_is_named_by_the_worker(client: Client) -> None:
    rows = [{"text": "short"}, {"text": "word " * 100}]
    with pytest.raises(DatasetError, match=r"example 2: 500 tokens given; max_length is 16"):
        client.train("x", rows, model=endless.MODEL, max_length=16).result(30)


def test_a_job_that_nobody_knows_is_lost(client: Client) -> None:
    with pytest.raises(JobLost, match="knows nothing of job"):
        client.job("11111111-2222-3333-4444-555555555555")


def test_no_broker_says_which_and_how_to_start_one() -> None:
    client = Client("redis://127.0.0.1:1/0")
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1/0.*stoker up"):
        client.embed(["x"], model=EMBED_MODEL)


def test_messages_that_cannot_be_read_are_dead_letters_and_the_worker_goes_on(client: Client) -> None:
    (worker,) = client.workers()
    queue = keys.queue(endless.MODEL, "generate")
    late = json.loads(envelope("late", "generate", endless.MODEL, queue))
    late["properties"]["delivery_tag"] = "late#1"
    late["headers"]["eta"] = "2099-01-01T00:00:00+00:00"
    bodyless = json.loads(envelope("bodyless", "generate", endless.MODEL, queue))
    bodyless["body"] = base64.b64encode(b"[]").decode()
    bad = [b"garbage", b"[]", b"\xff", b"[" * 50_000, json.dumps(late).encode(), json.dumps(bodyless).encode()]
    try:
        client.redis.rpush(keys.ready(queue), *bad)
        client.redis.publish(f"{keys.PREFIX}/0.celery.pidbox", "[]")
        client.redis.publish(keys.CANCELS, b"\xff")
        assert len(client.generate("x", model=endless.MODEL, max_tokens=2).result(30).token_ids) == 2
        found = wait_until(lambda: letters if len(letters := client.dead()) == len(bad) else None, "all are letters")
    finally:
        client.redis.delete(keys.DEAD)
    assert {base64.b64decode(letter["message"]) for letter in found.values()} == {raw[:4096] for raw in bad}

    def idle() -> list[Presence]:
        return [now for now in client.workers() if now.time > worker.time and now.lanes["generate"][0] == 0]

    after = wait_until(idle, "no message holds a slot once the job that ran has left its own")
    assert [now.pid for now in after] == [worker.pid]


def test_a_stream_of_the_wrong_type_fails_its_job_and_no_neighbour(client: Client) -> None:
    job = client.generate("x", model=endless.MODEL, max_tokens=4000)
    next(job.stream(cancel_on_close=False))
    client.redis.delete(keys.stream(job.id))
    client.redis.set(keys.stream(job.id), "x", ex=60)
    with pytest.raises(JobFailed, match=keys.stream(job.id)):
        job.result(30)
    assert len(client.generate("x", model=endless.MODEL, max_tokens=2).result(30).token_ids) == 2


#: A program that sends one control message for each argument. A process of its own: kombu leaves handles open.
REVOKE = """
import json, sys
from celery import Celery
from stoker.celery_config import shared_config
from stoker.settings import load_settings
settings = load_settings(url=sys.argv[1])
celery = Celery(broker=settings.address.celery)
celery.conf.update(shared_config(settings))
for job_ids, terminate in map(json.loads, sys.argv[2:]):
    celery.control.revoke(job_ids, terminate=terminate)
"""


def test_celerys_own_revoke_ends_a_job_that_runs_and_one_that_waits_and_hurts_nothing(client: Client) -> None:
    rows = [{"text": "Coal feeds the fire."}]
    running, waiting = (client.train(name, rows, model=endless.MODEL, steps=100_000) for name in ("runs", "waits"))
    wait_until(lambda: running.status() is JobStatus.RUNNING, "the lane is full")
    sent = [([waiting.id, "nobody", 7, {"a": "b"}], False), (running.id, True), (None, True), ({"a": [1]}, False)]
    command = [sys.executable, "-c", REVOKE, client.settings.address.redis, *map(json.dumps, sent)]
    subprocess.run(command, check=True, timeout=60)
    wait_until(lambda: {running.status(), waiting.status()} == {JobStatus.CANCELLED}, "both are cancelled")
    assert not client.redis.exists(keys.result("nobody"))
    assert len(client.generate("x", model=endless.MODEL, max_tokens=2).result(30).token_ids) == 2
