"""Bulk generation against the client in memory: order, what is in flight, whose error is whose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing
from itertools import count, islice
from typing import Any

import pytest

from stoker.broker import keys
from stoker.client.asked import generation_share, own
from stoker.client.chunks import JOBS_PER_WORKER
from stoker.contract import GenerateRequest
from stoker.errors import (
    BrokerUnavailable,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    JobDead,
    JobFailed,
    JobLost,
    ModelError,
    QueueFull,
    StokerError,
    UnknownAdapter,
    UnknownModel,
)
from stoker.testing import AsyncFakeClient, FakeClient

Run = Callable[..., list[Any]]
MODELS = {"m": ["generate"]}


def echo(client: Any, times: int | None = None) -> None:
    """Each answer is its prompt."""
    client.script.generate(lambda request: said(request), times=times)


def said(request: GenerateRequest) -> str:
    return request.prompt or (str(request.prompt_ids) if request.prompt_ids else str(request.messages))


def blocking(client: FakeClient, requests: Any, stop_after: int | None = None, **options: Any) -> list[Any]:
    with closing(client.generate_many(requests, **options)) as answers:
        return [shown(answer) for answer in islice(answers, stop_after)]


def awaited(client: FakeClient, requests: Any, stop_after: int | None = None, **options: Any) -> list[Any]:
    async def collect() -> list[Any]:
        found: list[Any] = []
        sender = AsyncFakeClient(models=MODELS)
        # Both clients work in the one memory.
        sender.link._memory = client.link._memory  # type: ignore[attr-defined]  # noqa: SLF001
        async with aclosing(sender.generate_many(requests, **options)) as answers:
            async for answer in answers:
                found.append(shown(answer))
                if len(found) == stop_after:
                    break
        return found

    return asyncio.run(collect())


def shown(answer: Any) -> Any:
    """The text of an answer, the class of an error."""
    return type(answer) if isinstance(answer, StokerError) else answer.text


@pytest.fixture(params=[blocking, awaited], ids=["blocking", "async"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def client() -> FakeClient:
    return FakeClient(models=MODELS)


def test_answers_come_in_the_order_of_their_requests(client: FakeClient, run: Run) -> None:
    echo(client)
    assert run(client, [f"{number}" for number in range(50)], in_flight=7) == [f"{number}" for number in range(50)]
    assert run(client, []) == []


def test_a_request_is_a_prompt_of_any_kind_or_one_with_options_of_its_own(client: FakeClient, run: Run) -> None:
    echo(client)
    message = {"role": "user", "content": "x"}
    given = [
        "a",
        [1, 2],
        [message],
        {"prompt": "b", "max_tokens": 3},
        {"messages": [message], "seed": 5, "model": None},
    ]
    run(client, [*given, {"prompt_ids": [3], "model": "m"}], max_tokens=9, stop="!", seed=1)
    sent = client.sent.generate
    assert [request.max_tokens for request in sent] == [9, 9, 9, 3, 9, 9]
    assert [request.seed for request in sent] == [1, 1, 1, 1, 5, 1]
    assert {request.stop for request in sent} == {("!",)}
    assert [bool(request.messages) for request in sent] == [False, False, True, False, True, False]
    assert [request.prompt_ids for request in sent] == [None, (1, 2), None, None, None, (3,)]


def test_each_request_draws_a_seed_of_its_own(client: FakeClient, run: Run) -> None:
    echo(client)
    run(client, ["a"] * 5)
    assert len({request.seed for request in client.sent.generate}) == 5


WRONG: list[tuple[Any, type[StokerError]]] = [
    ("", InvalidRequest),
    (7, InvalidRequest),
    (None, InvalidRequest),
    ({}, InvalidRequest),
    ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, InvalidRequest),
    ({"prompt": "a", "max_token": 3}, InvalidRequest),
    ({"prompt": "a", "self": 3}, InvalidRequest),
    ({"prompt": "a", "job_id": "x"}, InvalidRequest),
    ({7: "a"}, InvalidRequest),
    ({"prompt": "a", "x" * 100_000: 3}, InvalidRequest),
    ({"prompt": "a", "max_tokens": -1}, InvalidRequest),
    ({"prompt": "a", "model": 7}, InvalidRequest),
    ({"prompt": "a", "model": "another"}, UnknownModel),
    ({"prompt": "a", "adapter": "none"}, UnknownAdapter),
]


@pytest.mark.parametrize(("wrong", "error"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_a_request_that_is_wrong_has_its_error_in_its_place_and_the_others_go_on(
    client: FakeClient, run: Run, wrong: Any, error: type[StokerError]
) -> None:
    echo(client)
    assert run(client, ["a", wrong, "b", wrong]) == ["a", error, "b", error]


def test_the_error_of_a_request_says_what_is_wrong_in_few_words(client: FakeClient) -> None:
    echo(client)
    wrong: list[Any] = [{"prompt": "a", "max_token": 3}, {"prompt": "a", "x" * 100_000: 3}]
    misspelt, long = client.generate_many(wrong)
    assert "did you mean max_tokens?" in str(misspelt)
    assert len(str(long)) < 1000


@pytest.mark.parametrize("error", [JobCancelled, JobDead, DeadlineExceeded, ModelError, InvalidRequest])
def test_what_a_job_ends_with_is_its_requests_own_and_what_was_meant_is_not_tried_again(
    client: FakeClient, run: Run, error: type[StokerError]
) -> None:
    client.script.generate("first")
    client.script.generate(error=error("x"))
    client.script.generate("third")
    assert run(client, ["a", "b", "c"]) == ["first", error, "third"]
    assert len(client.sent.generate) == 3


def test_a_job_that_failed_is_sent_again_in_its_place(client: FakeClient, run: Run) -> None:
    client.script.generate(error=JobFailed("x"))
    client.script.generate("b")
    client.script.generate(error=JobLost("y"))
    client.script.generate("a")
    assert run(client, ["a", "b"], in_flight=2) == ["a", "b"]


def test_a_job_that_keeps_failing_is_sent_as_often_as_was_asked(client: FakeClient, run: Run) -> None:
    client.script.generate(error=JobFailed("x"), times=2)
    client.script.generate("b")
    assert run(client, ["a", "b"], in_flight=1, attempts=2) == [JobFailed, "b"]


def test_what_meets_all_requests_is_raised(client: FakeClient, run: Run) -> None:
    def none() -> Iterator[str]:
        for _ in range(1):
            raise AssertionError("no request is taken")
        yield ""

    for options, said in (
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_token": 1}, r"did you mean max_tokens\?"),
        ({"messages": []}, "messages: no such option"),
        ({"json_schema": {}, "regex": "a"}, "at most one"),
        ({"model": 7}, "model: 7 given"),
        ({"in_flight": 0}, "in_flight: 0 given"),
        ({"attempts": 0}, "attempts: 0 given"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            run(client, none(), **options)
    for requests, said in (("a", "one text given"), ({"prompt": "a"}, "one request given"), (7, "7 given")):
        with pytest.raises(InvalidRequest, match=said):
            run(client, requests)
    with pytest.raises(UnknownModel):
        run(client, ["a", "b"], model="another")
    client.script.refuse(BrokerUnavailable("away"))
    with pytest.raises(BrokerUnavailable):
        run(client, ["a", "b"])


def test_a_broker_that_goes_away_ends_the_call_and_not_a_request_after_the_other(client: FakeClient, run: Run) -> None:
    client.script.generate(error=BrokerUnavailable("away"), times=None)
    with pytest.raises(BrokerUnavailable):
        run(client, ["a", "b"])


def test_a_queue_that_is_full_is_waited_for(client: FakeClient, run: Run) -> None:
    echo(client)
    client.script.refuse(QueueFull("full", depth=1, limit=1, wait=0.01))
    assert run(client, ["a", "b"]) == ["a", "b"]


def test_no_more_is_taken_or_under_way_than_the_window_and_leaving_cancels_it(client: FakeClient, run: Run) -> None:
    echo(client)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        for number in count():
            assert len(client.sent.generate) <= number
            taken += 1
            yield f"{number}"

    assert run(client, endless(), stop_after=10, in_flight=3) == [f"{number}" for number in range(10)]
    assert taken == len(client.sent.generate) == 10 + 3 - 1
    statuses = [client.job(job.job_id).status().value for job in client.sent.jobs]
    assert statuses.count("cancelled") == 2


def test_an_iterable_that_fails_ends_the_call_with_its_own_error(client: FakeClient, run: Run) -> None:
    def broken() -> Iterator[str]:
        yield "a"
        raise OSError("the file is gone")

    echo(client)
    with pytest.raises(OSError, match="the file is gone"):
        run(client, broken())


def test_an_async_iterable_of_requests_will_do(client: FakeClient) -> None:
    async def requests() -> AsyncIterator[str]:
        yield "a"
        yield "b"

    echo(client)
    assert awaited(client, requests()) == ["a", "b"]


def test_the_model_that_is_meant_is_chosen_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the answers of one call would be of two models, or errors from the moment that another is warm."""
    client = FakeClient(models=MODELS, may_load={"other": ["generate"]})

    def requests() -> Iterator[str]:
        yield "a"
        client.models.load("other")
        yield "b"

    echo(client)
    monkeypatch.setattr(keys, "PRESENCE_EVERY", 0)  # the client remembers no choice
    assert run(client, requests(), in_flight=1) == ["a", "b"]
    assert {request.model for request in client.sent.generate} == {"m"}


def test_half_of_what_a_worker_runs_at_once_is_left_to_others(client: FakeClient) -> None:
    (worker,) = client.workers()
    for room, share in ((16, 8), (17, 8), (256, 128), (1, JOBS_PER_WORKER)):
        assert generation_share(worker.model_copy(update={"lanes": {"generate": (3, room)}})) == share
    assert generation_share(worker.model_copy(update={"lanes": {}})) == JOBS_PER_WORKER


@pytest.mark.parametrize(
    ("error", "of_all"),
    [(BrokerUnavailable("away."), True), (ConfigError("wrong."), True), (JobFailed("it broke."), False)],
)
def test_what_meets_every_request_alike_is_the_result_of_none(error: StokerError, of_all: bool) -> None:
    if of_all:
        with pytest.raises(type(error)):
            own(error)
    else:
        assert own(error) is error
