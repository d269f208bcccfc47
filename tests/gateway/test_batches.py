"""`/v1/batches` over a real broker, with answers from a script."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

import httpx2
import openai
import pytest

from stoker import AsyncClient
from stoker.broker import keys
from stoker.broker.batches import Batches, BatchRecord, Lease
from stoker.broker.ledger.ending import DISCARDED
from stoker.client.asked import generation_share
from stoker.client.chunks import LONGEST_PAUSE
from stoker.contract import GenerateRequest
from stoker.errors import JobFailed, QueueFull
from stoker.files.contents import FolderContents
from stoker.gateway import batch_answers, batch_lines, batch_run, batch_runner, batches
from stoker.gateway.access import Keyed
from stoker.gateway.app import Gateway
from stoker.gateway.batch_answers import Answerer
from stoker.gateway.batch_run import BatchRun
from stoker.gateway.stored import Store
from stoker.settings import Settings
from stoker.testing import AsyncFakeClient
from tests.conftest import wait_until
from tests.gateway.conftest import CHAT, EMBED
from tests.gateway.machinery import Served
from tests.gateway.test_keys import made

URL: Final = "/v1/chat/completions"


@pytest.fixture
def workers() -> AsyncFakeClient:
    """What answers."""
    return AsyncFakeClient()


def said(request: GenerateRequest) -> str:
    return request.prompt or (request.messages or ())[-1].content or ""


def echo(workers: AsyncFakeClient, times: int | None = None) -> None:
    """Each answer is its prompt."""
    workers.script.generate(said, times=times)


@contextmanager
def gateway(running: Served, settings: Settings, workers: AsyncFakeClient) -> Iterator[openai.OpenAI]:
    """A gateway with nothing in memory; OpenAI's client of it."""
    broker = AsyncClient(settings=settings)
    with running.lent(Gateway(workers, access=Keyed(broker, required=False), broker=broker), broker) as api:
        yield api


@pytest.fixture
def api(running: Served, settings: Settings, workers: AsyncFakeClient) -> Iterator[openai.OpenAI]:
    with gateway(running, settings, workers) as client:
        yield client


def line(number: object, url: str = URL, **body: Any) -> dict[str, Any]:
    asked = {"model": CHAT, "messages": [{"role": "user", "content": f"say {number}"}], "max_tokens": 8, **body}
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": asked}


def uploaded(api: openai.OpenAI, lines: list[Any], endpoint: str = URL, **fields: Any) -> str:
    """The id of a batch of these lines; bytes are a line as they are."""
    data = b"\n".join(item if isinstance(item, bytes) else json.dumps(item).encode() for item in lines)
    file = api.files.create(file=("in.jsonl", data), purpose="batch")
    options: Any = {"endpoint": endpoint, "completion_window": "24h", **fields}
    return api.batches.create(input_file_id=file.id, **options).id


def ended(api: openai.OpenAI, batch_id: str, seconds: float = 30) -> openai.types.Batch:
    def found() -> openai.types.Batch | None:
        batch = api.batches.retrieve(batch_id)
        return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None

    batch: openai.types.Batch = wait_until(found, f"batch {batch_id} ends", seconds)
    return batch


def rows(api: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [] if file_id is None else [json.loads(row) for row in api.files.content(file_id).text.splitlines()]


def contents(row: dict[str, Any]) -> str:
    text: str = row["response"]["body"]["choices"][0]["message"]["content"]
    return text


def test_each_line_of_a_batch_is_answered_by_its_custom_id_in_order(
    api: openai.OpenAI, workers: AsyncFakeClient
) -> None:
    echo(workers)
    batch_id = uploaded(api, [line(number) for number in range(40)], metadata={"for": "me"})
    batch = ended(api, batch_id)
    assert (batch.status, batch.endpoint, batch.metadata) == ("completed", URL, {"for": "me"})
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (40, 40, 0)
    assert batch.error_file_id is None
    found = rows(api, batch.output_file_id)
    assert [row["custom_id"] for row in found] == [f"line-{number}" for number in range(40)]
    assert [contents(row) for row in found] == [f"say {number}" for number in range(40)]
    assert {(row["error"], row["response"]["status_code"]) for row in found} == {(None, 200)}
    assert len({row["id"] for row in found}) == 40
    assert {sent.request.priority for sent in workers.sent.jobs} == {9}
    kept = [workers.link._memory.job(sent.job_id).outcome for sent in workers.sent.jobs]  # type: ignore[attr-defined]  # noqa: SLF001
    assert {outcome.value == DISCARDED for outcome in kept} == {True}, "written answers leave the broker"
    assert batch.created_at <= (batch.in_progress_at or 0) <= (batch.finalizing_at or 0) <= (batch.completed_at or 0)
    assert [file.purpose for file in api.files.list()] == ["batch_output", "batch"]
    assert [found.id for found in api.batches.list()] == [batch_id]
    with pytest.raises(openai.ConflictError, match="is completed"):
        api.batches.cancel(batch_id)


def test_what_a_batch_has_written_is_kept_from_its_end_on(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from its beginning: each look at the broker's clock finds it an hour away from the one before."""
    now, looks = Store.now, list[int]()

    async def moved(store: Store) -> float:
        looks.append(3600)
        return await now(store) - sum(looks)

    monkeypatch.setattr(Store, "now", moved)
    echo(workers)
    batch = ended(api, uploaded(api, [line(1)]))
    assert batch.output_file_id is not None
    file = api.files.retrieve(batch.output_file_id)
    assert file.created_at < batch.created_at - 3600
    assert (file.expires_at or 0) - file.created_at == keys.FILE_TTL


def test_an_answer_leaves_the_broker_once_the_batch_says_that_it_is_written(
    api: openai.OpenAI, workers: AsyncFakeClient, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that dies between the two has it from the job again."""
    discard, said_done = batch_answers.Answerer.discard, list[int]()

    async def noted(answers: batch_answers.Answerer, job_id: str) -> None:
        said_done.append(json.loads(redis.hget(keys.batch(job_id.rpartition("-")[0]), "record"))["completed"])
        await discard(answers, job_id)

    monkeypatch.setattr(batch_answers.Answerer, "discard", noted)
    echo(workers)
    ended(api, uploaded(api, [line(number) for number in range(3)]))
    assert len(said_done) == 3
    assert all(done > place for place, done in enumerate(said_done))


def test_embeddings_and_texts_are_batches_too(api: openai.OpenAI, workers: AsyncFakeClient) -> None:
    echo(workers)
    vectors = uploaded(
        api, [{**line("v"), "url": "/v1/embeddings", "body": {"model": EMBED, "input": ["a", "b"]}}], "/v1/embeddings"
    )
    prompt = {**line("t"), "url": "/v1/completions", "body": {"model": CHAT, "prompt": "once upon", "logprobs": 1}}
    texts = uploaded(api, [prompt], "/v1/completions")
    (row,) = rows(api, ended(api, vectors).output_file_id)
    assert len(row["response"]["body"]["data"]) == 2
    (row,) = rows(api, ended(api, texts).output_file_id)
    (choice,) = row["response"]["body"]["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("once upon", ["once", " upon"])


WRONG: list[tuple[Any, str | None, str]] = [
    (b"{", None, "invalid_json_line"),
    (b"[]", None, "invalid_json_line"),
    (b"\xff\xfe", None, "invalid_json_line"),
    (b"[" * 100_000, None, "invalid_json_line"),
    ({**line("x"), "custom_id": 7}, None, "invalid_custom_id"),
    ({**line("x"), "custom_id": "\ud800"}, None, "invalid_custom_id"),
    ({"method": "POST", "url": URL, "body": {}}, None, "invalid_custom_id"),
    (line("a"), "line-a", "duplicate_custom_id"),
    ({**line("b"), "method": "GET"}, "line-b", "invalid_method"),
    (line("c", url="/v1/embeddings"), "line-c", "invalid_url"),
    ({**line("d"), "body": []}, "line-d", "invalid_body"),
    (line("e", stream=True), "line-e", "invalid_body"),
    (line("f", priority=0), "line-f", "invalid_body"),
    (line("g", service_tier="priority"), "line-g", "invalid_body"),
    ({**line("h"), "more": 1}, "line-h", "invalid_request"),
]
REFUSED = [
    (line("i", model="unknown"), 404, "model"),
    (line("j", model=f"{CHAT}:unknown"), 404, "model"),
    (line("k", temperature=-1), 400, "temperature"),
    (line("l", colour="red"), 400, "colour"),
    (line("m", functions=[{"name": "f"}]), 400, "functions"),
]


def test_each_line_that_is_wrong_is_one_error_and_the_others_are_answered(
    api: openai.OpenAI, workers: AsyncFakeClient
) -> None:
    echo(workers)
    lines = [line("a"), *(given for given, _, _ in WRONG), b"  ", *(given for given, _, _ in REFUSED), line("z")]
    batch = ended(api, uploaded(api, lines))
    assert batch.status == "completed"
    assert [contents(row) for row in rows(api, batch.output_file_id)] == ["say a", "say z"]
    found = rows(api, batch.error_file_id)
    broken, refused = found[: len(WRONG)], found[len(WRONG) :]
    assert [(row["custom_id"], row["error"]["code"], row["response"]) for row in broken] == [
        (custom_id, code, None) for _, custom_id, code in WRONG
    ]
    said = [(row["response"]["status_code"], row["response"]["body"]["error"]["param"]) for row in refused]
    assert said == [(status, param) for _, status, param in REFUSED]
    assert all(row["error"] is None for row in refused)
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (len(lines) - 1, 2, len(WRONG) + len(REFUSED))


def test_a_line_that_is_too_long_is_one_error(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo(workers)
    monkeypatch.setattr(batch_lines, "MOST_BYTES", 5000)
    monkeypatch.setattr("stoker.gateway.stored.PART", 2000)
    lines = [line("a"), line("b", user="x" * 20_000), line("c"), line("d", user="x" * 20_000)]
    batch = ended(api, uploaded(api, lines))
    assert [contents(row) for row in rows(api, batch.output_file_id)] == ["say a", "say c"]
    assert [row["error"]["code"] for row in rows(api, batch.error_file_id)] == ["invalid_json_line"] * 2


def test_a_job_that_fails_is_asked_again_and_then_its_lines_error(api: openai.OpenAI, workers: AsyncFakeClient) -> None:
    workers.script.generate(error=JobFailed("it broke"), times=2)
    echo(workers, 1)
    once = ended(api, uploaded(api, [line(1)]))
    assert once.output_file_id is not None
    names = [sent.job_id for sent in workers.sent.jobs]
    assert names == [f"{once.id}-0", f"{once.id}-0-1", f"{once.id}-0-2"]
    workers.script.generate(error=JobFailed("it broke"), times=3)
    (row,) = rows(api, ended(api, uploaded(api, [line(2)])).error_file_id)
    assert row["response"]["status_code"] == 500
    assert row["response"]["body"]["error"]["code"] == "job_failed"


def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one where a runner begins to look at what there is to do."""
    began, real = list[str](), Store.is_used

    async def looking(store: Store) -> bool:
        began.append("")
        return await real(store)

    monkeypatch.setattr(Store, "is_used", looking)
    return began


def hanging(workers: AsyncFakeClient) -> None:
    """From now on no job ends."""
    workers.script.generate(hangs=True, times=None)


def test_a_batch_that_is_cancelled_stops_its_jobs_and_says_so_of_each_line(
    api: openai.OpenAI, workers: AsyncFakeClient
) -> None:
    echo(workers, times=3)
    hanging(workers)
    batch_id = uploaded(api, [line(number) for number in range(30)])
    wait_until(lambda: len(workers.sent.jobs) > 3, "jobs are under way")
    assert api.batches.cancel(batch_id).status == "cancelling"
    batch = ended(api, batch_id)
    assert batch.status == "cancelled"
    assert batch.cancelled_at is not None
    answers, errors = rows(api, batch.output_file_id), rows(api, batch.error_file_id)
    assert sorted(int(row["custom_id"][5:]) for row in answers + errors) == list(range(30))
    assert {row["error"]["code"] for row in errors} == {"batch_cancelled"}
    assert not [sent for sent in workers.sent.jobs if _open(workers, sent.job_id)]
    with pytest.raises(openai.ConflictError, match="is cancelled"):
        api.batches.cancel(batch_id)


def test_a_batch_that_is_cancelled_stops_what_is_asked_once_more_too(
    api: openai.OpenAI, workers: AsyncFakeClient
) -> None:
    workers.script.generate(error=JobFailed("it broke"), times=2)
    hanging(workers)
    batch_id = uploaded(api, [line(1)])
    wait_until(lambda: len(workers.sent.jobs) == 3, "it is asked for the third time")
    api.batches.cancel(batch_id)
    ended(api, batch_id)
    assert not [sent for sent in workers.sent.jobs if _open(workers, sent.job_id)]


def test_a_batch_begins_and_is_cancelled_without_waiting_for_the_runners_next_look(
    running: Served, settings: Settings, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "LOOK_EVERY", 3600.0)
    hanging(workers)
    with gateway(running, settings, workers) as api:
        batch_id = uploaded(api, [line(number) for number in range(3)])
        wait_until(lambda: len(workers.sent.jobs) == 3, "jobs are under way")
        api.batches.cancel(batch_id)
        assert ended(api, batch_id, 20).status == "cancelled"


def test_of_a_batch_that_ends_early_no_more_jobs_are_stopped_than_a_runner_can_have_sent(
    running: Served, settings: Settings, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a million lines: each stop is a question to the broker."""
    stopped = list[str]()

    async def noted(answerer: batch_answers.Answerer, job_id: str) -> None:
        stopped.append(job_id)

    monkeypatch.setattr(batch_answers.Answerer, "stop", noted)
    monkeypatch.setattr(batch_run, "MOST_SENT", 5)
    hanging(workers)
    with gateway(running, settings, workers) as api:
        batch_id = uploaded(api, [line(number) for number in range(12)])
        wait_until(lambda: workers.sent.jobs, "jobs are under way")
        api.batches.cancel(batch_id)
        batch = ended(api, batch_id, 20)
        assert len(rows(api, batch.error_file_id)) == 12
    assert stopped == [f"{batch_id}-{index}" for index in range(5)]


def test_a_defect_of_the_gateway_is_the_error_of_its_line_and_the_others_go_on(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def defective(answerer: batch_answers.Answerer, job_id: str, *rest: Any) -> Any:
        if job_id.endswith("-1"):
            raise KeyError("a defect")
        return await answer(answerer, job_id, *rest)

    answer = batch_answers.Answerer.answer
    monkeypatch.setattr(batch_answers.Answerer, "answer", defective)
    echo(workers)
    batch = ended(api, uploaded(api, [line(number) for number in range(3)]), 20)
    assert (batch.status, len(rows(api, batch.output_file_id))) == ("completed", 2)
    (failed,) = rows(api, batch.error_file_id)
    assert (failed["custom_id"], failed["error"]["code"]) == ("line-1", "gateway_error")


def test_a_cancel_counts_from_the_first_time_that_it_was_asked_for(settings: Settings) -> None:
    record = BatchRecord(
        id="batch_1", owner="me", key=None, models=None, endpoint=URL, input_file="file-1", place="here", window="24h",
        metadata=None, created=1.0, expires=9, lifetime=9,
    )  # fmt: skip

    async def asked() -> list[int]:
        async with AsyncClient(settings=settings) as client:
            batches = Batches(client.redis)
            await batches.create(record)
            found = []
            for now in (0, 7, 8):
                if now:
                    await batches.cancel("batch_1", now)
                batch = await batches.find("batch_1", "me")
                assert batch is not None
                found.append(batch.cancelled)
            return found

    assert asyncio.run(asked()) == [0, 7, 7]


def test_a_batch_that_ends_while_the_runner_looks_is_not_run_once_more(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the runner has seen of it is from before its end, and would be written over that."""
    renew, run, answer = Lease.renew, BatchRun.run, Answerer.answer
    looked, begun = asyncio.Event(), list[str]()

    async def late(lease: Lease) -> bool:
        first_time = not looked.is_set()
        looked.set()
        while first_time and await Batches(lease.redis).open(lease.place):
            await asyncio.sleep(0.01)
        return await renew(lease)

    async def noted(batch: BatchRun) -> None:
        begun.append(batch.record.id)
        await run(batch)

    async def waiting(answerer: Answerer, *given: Any) -> tuple[str, bytes]:
        await looked.wait()
        return await answer(answerer, *given)

    monkeypatch.setattr(batch_runner, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(Lease, "renew", late)
    monkeypatch.setattr(BatchRun, "run", noted)
    monkeypatch.setattr(Answerer, "answer", waiting)
    echo(workers)
    first = uploaded(api, [line(1)])
    done = ended(api, first)
    # Its look is over once another batch has been run.
    second = uploaded(api, [line(2)])
    ended(api, second)
    assert begun == [first, second]
    assert api.batches.retrieve(first) == done
    assert done.status == "completed"


def _open(workers: AsyncFakeClient, job_id: str) -> bool:
    return workers.link._memory.job(job_id).outcome is None  # type: ignore[attr-defined]  # noqa: SLF001


def test_a_batch_whose_window_is_over_has_what_was_done_by_then(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches.BatchBody, "seconds", lambda body: 0)
    hanging(workers)
    batch = ended(api, uploaded(api, [line(number) for number in range(10)]))
    assert batch.status == "expired"
    assert {row["error"]["code"] for row in rows(api, batch.error_file_id)} == {"batch_expired"}
    assert batch.output_file_id is None


def test_another_gateway_goes_on_with_a_batch_whose_gateway_died(
    running: Served, settings: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line once: what the first one had said is done stays, what it had not is found again by the job's id."""
    monkeypatch.setattr(batch_run, "COMMIT_EVERY", 0.0)
    monkeypatch.setattr(batch_runner, "LOOK_EVERY", 0.05)
    first, second = AsyncFakeClient(), AsyncFakeClient()
    echo(first, times=5)
    hanging(first)
    echo(second)
    with monkeypatch.context() as dying, gateway(running, settings, first) as api:
        batch_id = uploaded(api, [line(number) for number in range(12)])
        wait_until(lambda: done(api, batch_id) == 5, "5 lines are done")
        # It says nothing any more, and gives nothing back.
        dying.setattr(Lease, "give_back", _nothing)
    asked, take = list[bool](), Lease.take

    async def noted(lease: Lease) -> bool:
        asked.append(await take(lease))
        return asked[-1]

    monkeypatch.setattr(Lease, "take", noted)
    with gateway(running, settings, second) as api:
        (lease,) = redis.keys(keys.batch_runner("*"))
        assert 0 < redis.ttl(lease) <= keys.RUNNER_TTL
        wait_until(lambda: len(asked) > 1, "the other gateway has asked for it twice")
        assert not any(asked), "nobody else runs it while it may live"
        assert not second.sent.jobs
        redis.delete(lease)
        batch = ended(api, batch_id)
        assert batch.status == "completed"
        assert [contents(row) for row in rows(api, batch.output_file_id)] == [f"say {number}" for number in range(12)]
    begun, again = ({sent.job_id for sent in workers.sent.jobs} for workers in (first, second))
    assert again == {f"{batch_id}-{number}" for number in range(5, 12)}
    assert begun & again, "what was under way is asked for under the id that it had"


def done(api: openai.OpenAI, batch_id: str) -> int:
    counts = api.batches.retrieve(batch_id).request_counts
    return 0 if counts is None else counts.completed


async def _nothing(lease: Lease) -> None:
    """It dies before."""


def test_a_gateway_that_ends_lets_another_have_its_batches_at_once(
    running: Served, settings: Settings, redis: Any, workers: AsyncFakeClient
) -> None:
    hanging(workers)
    with gateway(running, settings, workers) as api:
        batch_id = uploaded(api, [line(1)])
        wait_until(lambda: workers.sent.jobs, "its line is under way")
        assert redis.keys(keys.batch_runner("*"))
    assert not redis.keys(keys.batch_runner("*"))
    assert json.loads(redis.hget(keys.batch(batch_id), "record"))["status"] == "in_progress"


def test_a_gateway_that_was_overtaken_writes_nothing_and_stops(
    running: Served,
    settings: Settings,
    redis: Any,
    workers: AsyncFakeClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(batch_run, "COMMIT_EVERY", 0.0)
    caplog.set_level("INFO", "stoker.gateway.batch_runner")
    echo(workers, times=2)
    hanging(workers)
    with gateway(running, settings, workers) as api:
        batch_id = uploaded(api, [line(number) for number in range(4)])
        wait_until(lambda: done(api, batch_id) == 2, "2 lines are done")
        (lease,) = redis.keys(keys.batch_runner("*"))
        redis.set(lease, "another", ex=20)
        before = redis.hget(keys.batch(batch_id), "record")
        # What it waits for ends now: it would write that next.
        for sent in workers.sent.jobs:
            workers.link._memory.cancel(sent.job_id)  # type: ignore[attr-defined]  # noqa: SLF001
        wait_until(lambda: "another gateway has it" in caplog.text, "it stops")
        assert redis.hget(keys.batch(batch_id), "record") == before
        assert redis.get(lease) == b"another"


def test_batches_of_one_client_are_not_there_for_another_and_run_as_its_jobs(
    running: Served, api: openai.OpenAI, redis: Any, workers: AsyncFakeClient
) -> None:
    echo(workers)
    secrets = made(redis, models=(CHAT,)), made(redis, client="other", created=2.0)
    with running.opened(secrets[0]) as team, running.opened(secrets[1]) as other:
        batch_id = uploaded(team, [line(1), line(2, model="another")])
        batch = ended(team, batch_id)
        assert [sent.client for sent in workers.sent.jobs] == ["team"]
        (row,) = rows(team, batch.error_file_id)
        assert (row["response"]["status_code"], row["response"]["body"]["error"]["param"]) == (403, "model")
        assert list(other.batches.list()) == []
        for ask in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="no batch of that id"):
                ask(batch_id)
        with pytest.raises(openai.NotFoundError, match="no file of that id"):
            other.files.content(batch.output_file_id or "")
        with pytest.raises(openai.NotFoundError, match="no file of that id"):
            other.batches.create(input_file_id=batch.input_file_id, endpoint=URL, completion_window="24h")


@pytest.fixture
def file_id(api: openai.OpenAI) -> str:
    return api.files.create(file=("a", b"{}"), purpose="batch").id


def test_a_batch_that_is_wrong_is_refused_by_name(api: openai.OpenAI, file_id: str, running: Served) -> None:
    tuned = api.files.create(file=("a", b"{}"), purpose="fine-tune").id
    right = {"input_file_id": file_id, "endpoint": URL, "completion_window": "24h"}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"endpoint": "/v1/responses"}, "endpoint"), ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "169h"}, "completion_window"), ({"completion_window": "24"}, "completion_window"),
        ({"completion_window": "1d"}, "completion_window"), ({"completion_window": None}, "completion_window"),
        ({"input_file_id": tuned}, "input_file_id"), ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
        ({"metadata": {"x" * 65: "x"}}, "metadata"), ({"priority": 0}, "priority"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
    ]  # fmt: skip
    for fields, param in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            api.post("/batches", body=right | fields, cast_to=object)
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError, match='input_file_id: "file-0000') as unknown:
        api.post("/batches", body=right | {"input_file_id": "file-" + "0" * 32}, cast_to=object)
    assert unknown.value.param == "input_file_id"
    with pytest.raises(openai.NotFoundError):
        api.batches.retrieve("batch_../x")
    page = httpx2.post(f"{running.url}/v1/batches/batch_1/cancel", headers={"origin": "http://localhost"})
    assert page.status_code == 403
    named = httpx2.post(f"{running.url}/v1/batches", json=right, headers={"idempotency-key": "x"})
    assert named.status_code == 400
    assert list(api.batches.list()) == []


def test_a_file_that_is_no_batch_fails_as_a_whole(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lines, "MOST_LINES", 3)
    for lines, code in ([b"  "], "empty_file"), ([line(number) for number in range(4)], "too_many_lines"):
        batch = ended(api, uploaded(api, lines))
        assert batch.status == "failed"
        assert batch.errors is not None
        assert [error.code for error in batch.errors.data or ()] == [code]
        assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert not workers.sent.jobs


def test_a_batch_whose_file_was_deleted_fails(
    api: openai.OpenAI, file_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*given: object) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(FolderContents, "get", gone)
    batch = ended(api, api.batches.create(input_file_id=file_id, endpoint=URL, completion_window="24h").id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [error.code for error in batch.errors.data or ()] == ["file_not_found"]


def test_a_batch_goes_on_when_the_disk_has_room_again(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    echo(workers)
    monkeypatch.setattr(batch_runner, "AGAIN_AFTER", 0.0)
    with monkeypatch.context() as broken:
        file = api.files.create(file=("a", json.dumps(line(1)).encode()), purpose="batch")
        broken.setattr(FolderContents, "put", full)
        batch_id = api.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h").id
        wait_until(lambda: "No space left" in caplog.text, "it was tried")
    (row,) = rows(api, ended(api, batch_id).output_file_id)
    assert contents(row) == "say 1"
    assert {sent.job_id for sent in workers.sent.jobs} == {f"{batch_id}-0"}


def test_a_client_may_have_so_many_batches_under_way(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MOST_OPEN", 2)
    hanging(workers)
    open_ones = [uploaded(api, [line(number)]) for number in range(2)]
    with pytest.raises(openai.RateLimitError, match="cancel some") as refused:
        uploaded(api, [line(1)])
    assert (refused.value.code, refused.value.response.headers["retry-after"]) == ("batches_full", "60")
    for batch_id in open_ones:
        api.batches.cancel(batch_id)
        ended(api, batch_id)


def test_a_batch_that_is_being_made_counts_already(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MOST_OPEN", 1)
    create, begun, go_on = Batches.create, threading.Event(), threading.Event()

    async def held(known: Batches, record: BatchRecord) -> None:
        begun.set()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        await create(known, record)

    monkeypatch.setattr(Batches, "create", held)
    echo(workers)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(uploaded, api, [line(1)])
        assert begun.wait(20)
        try:
            with pytest.raises(openai.RateLimitError, match="cancel some"):
                uploaded(api, [line(2)])
        finally:
            go_on.set()
        ended(api, first.result(20))
    assert ended(api, uploaded(api, [line(3)])).status == "completed", "nothing counts any more"


def test_the_batches_of_others_leave_no_client_less_room(
    running: Served, api: openai.OpenAI, redis: Any, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MOST_OPEN", 1)
    hanging(workers)
    secrets = made(redis), made(redis, client="other", created=2.0)
    with running.opened(secrets[0]) as team, running.opened(secrets[1]) as other:
        open_ones = [(client, uploaded(client, [line(1)])) for client in (team, other)]
        for client, batch_id in open_ones:
            client.batches.cancel(batch_id)
            ended(client, batch_id)


def test_a_gateway_whose_lease_ran_out_leaves_its_batches_and_begins_them_anew_once_it_has_another(
    api: openai.OpenAI, redis: Any, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one may have run them meanwhile, and have ended: what this one has in memory counts for nothing."""
    monkeypatch.setattr(batch_runner, "LOOK_EVERY", 0.02)
    begun, run = list[str](), batch_run.BatchRun.run

    async def noted(self: batch_run.BatchRun) -> None:
        begun.append(self.record.id)
        await run(self)

    monkeypatch.setattr(batch_run.BatchRun, "run", noted)
    hanging(workers)
    batch_id = uploaded(api, [line(1)])
    wait_until(lambda: workers.sent.jobs, "the batch runs")
    (lease,) = redis.keys(keys.batch_runner("*"))
    before = json.loads(redis.hget(keys.batch(batch_id), "record"))
    assert before["output"]["id"] != before["errors"]["id"]
    before["since"]["in_progress"] = 5
    redis.hset(keys.batch(batch_id), "record", json.dumps(before))
    for count in (2, 3):
        redis.delete(lease)
        wait_until(lambda: len(begun) == count, "it is begun anew")  # noqa: B023
        after = json.loads(redis.hget(keys.batch(batch_id), "record"))
        assert (after["output"], after["errors"]) == (before["output"], before["errors"]), "in the files that it had"
        assert after["since"] == before["since"], "it is in progress since the first time"
    assert set(begun) == {batch_id}
    api.batches.cancel(batch_id)
    ended(api, batch_id)


def test_what_another_program_wrote_is_no_batch(api: openai.OpenAI, redis: Any, workers: AsyncFakeClient) -> None:
    echo(workers)
    batch_id = uploaded(api, [line(1)])
    ended(api, batch_id)
    for stored in (b"", b"{", b"[]", b'{"id": 1}', b"\xff"):
        redis.hset(keys.batch(batch_id), "record", stored)
        with pytest.raises(openai.NotFoundError):
            api.batches.retrieve(batch_id)
        for name in (*redis.keys(keys.open_batches("*")), keys.batches("default")):
            redis.zadd(name, {batch_id: 1})
            redis.expire(name, 60)
        ended(api, uploaded(api, [line(2)]))
    # One of another type is left out of the list, and hides no other.
    redis.delete(keys.batch(batch_id))
    redis.set(keys.batch(batch_id), "of another program", ex=60)
    redis.zadd(keys.batches("default"), {batch_id: 1})
    assert len(list(api.batches.list())) == 5
    assert redis.zscore(keys.batches("default"), batch_id) is None


@pytest.mark.parametrize("trouble", [RuntimeError, OSError, JobFailed])
def test_a_batch_whose_run_failed_is_left_alone_for_a_while(
    api: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, trouble: type[Exception]
) -> None:
    monkeypatch.setattr(batch_runner, "LOOK_EVERY", 0.01)
    began, looked = list[str](), looks(monkeypatch)

    async def failing(run: batch_run.BatchRun) -> None:
        began.append(run.record.id)
        raise trouble("it broke.")

    monkeypatch.setattr(batch_run.BatchRun, "run", failing)
    batch_id = uploaded(api, [line(1)])
    wait_until(lambda: began, "it begins")
    before = len(looked)
    wait_until(lambda: len(looked) > before + 4, "it was looked at again")
    assert began == [batch_id]
    monkeypatch.undo()


def test_a_batch_that_waits_begins_as_soon_as_another_has_ended(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "LOOK_EVERY", 3600)
    monkeypatch.setattr(batch_runner, "AT_ONCE", 1)
    workers.script.generate(hangs=True)
    echo(workers)
    first = uploaded(api, [line(1)])
    wait_until(lambda: workers.sent.jobs, "the first runs")
    second = uploaded(api, [line(2)])
    assert api.batches.retrieve(second).status == "validating"
    workers.link._memory.cancel(workers.sent.jobs[0].job_id)  # type: ignore[attr-defined]  # noqa: SLF001
    assert ended(api, second, 10).status == "completed"
    ended(api, first)


def test_the_oldest_batch_of_each_client_begins_before_the_second_of_any(
    running: Served, api: openai.OpenAI, redis: Any, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = looks(monkeypatch)
    monkeypatch.setattr(batch_runner, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(batch_runner, "AT_ONCE", 0)
    hanging(workers)
    secrets = made(redis), made(redis, client="other", created=2.0)
    with running.opened(secrets[0]) as team, running.opened(secrets[1]) as other:
        for number, client in enumerate((team, team, other)):
            uploaded(client, [line(number)])
        before = len(looked)
        wait_until(lambda: len(looked) > before, "a look begins that sees all three")
        monkeypatch.setattr(batch_runner, "AT_ONCE", 2)
        wait_until(lambda: len(workers.sent.jobs) == 2, "two run")
    assert sorted(job.client for job in workers.sent.jobs) == ["other", "team"]


def test_batches_that_run_at_once_share_what_one_bulk_call_may_have(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, shares, both, forever = list[str](), list[int](), asyncio.Event(), asyncio.Event()

    async def asking(run: batch_run.BatchRun) -> None:
        begun.append(run.record.id)
        if len(begun) == 2:
            both.set()
        await both.wait()
        shares.append(await run.in_flight({CHAT}))
        await forever.wait()

    monkeypatch.setattr(batch_run.BatchRun, "run", asking)
    for number in range(2):
        uploaded(api, [line(number)])
    wait_until(lambda: len(shares) == 2, "both run")
    most = sum(generation_share(worker) for worker in asyncio.run(workers.workers()))
    assert most > 1
    assert shares == [most // 2, most // 2]


def test_a_full_queue_is_asked_again_after_what_it_says_and_not_much_later(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo(workers)
    paused, full, send = list[float](), [0.01, 2.0, 1e6], workers.generate

    async def sent(*arguments: Any, **fields: Any) -> Any:
        if full:
            raise QueueFull("full.", wait=full.pop(0))
        return await send(*arguments, **fields)

    async def pause(seconds: float) -> None:
        paused.append(seconds)

    monkeypatch.setattr(workers, "generate", sent)
    monkeypatch.setattr(batch_answers, "asyncio", SimpleNamespace(sleep=pause, Event=asyncio.Event))
    assert ended(api, uploaded(api, [line(1)])).status == "completed"
    assert paused == [0.1, 2.0, LONGEST_PAUSE]


def test_no_more_is_under_way_than_bulk_calls_may_have(
    api: openai.OpenAI, workers: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the file is: what waits for its turn waits in the file."""
    monkeypatch.setattr(batch_run, "AHEAD", 2)
    hanging(workers)
    batch_id = uploaded(api, [line(number) for number in range(200)])
    limit = sum(generation_share(worker) for worker in asyncio.run(workers.workers()))
    wait_until(lambda: len(workers.sent.jobs) >= limit, "the window is full")
    assert api.batches.retrieve(batch_id).status == "in_progress"
    assert len(workers.sent.jobs) == limit
    api.batches.cancel(batch_id)
    ended(api, batch_id)
