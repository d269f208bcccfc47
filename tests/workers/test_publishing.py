"""Publishing: every entry of every job once, in order, even if the broker fails meanwhile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError

from stoker.broker import keys
from stoker.contract import StreamToken, TrainReport
from stoker.errors import JobFailed, WorkerUnavailable
from stoker.monitor.metrics import PUBLISH_LAG
from stoker.monitor.numbers import Series
from tests.conftest import wait_until
from workers.services import publishing, recent
from workers.services.publishing import RENEW_EVERY, Publisher
from workers.services.recent import Recent
from workers.services.retrying import Retry


def token(index: int, last: bool = False) -> StreamToken:
    reason: Any = "length" if last else None
    return StreamToken(
        index=index, token_id=index, text=f"t{index}", logit=0.0, logprob=-1.0, probability=1.0, finish_reason=reason
    )


def entries(job_id: str, count: int, start: int = 0) -> list[Any]:
    return [(job_id, token(index)) for index in range(start, start + count)]


@pytest.fixture
def make(redis: Any) -> Iterator[Callable[..., Publisher]]:
    made: list[Publisher] = []

    def start(client: Any = None, begin: bool = True) -> Publisher:
        publisher = Publisher(client or redis)
        made.append(publisher)
        if begin:
            publisher.start()
        return publisher

    yield start
    for publisher in made:
        publisher.stop()


def indices(redis: Any, job_id: str) -> list[int]:
    return [json.loads(fields[b"entry"])["index"] for _, fields in redis.xrange(keys.stream(job_id))]


class Unsteady:
    """A broker that fails: `fail` is asked before each script is sent, and may raise."""

    def __init__(self, redis: Any, fail: Callable[[Any], None]) -> None:
        self._redis, self._fail = redis, fail

    def eval(self, *arguments: Any) -> Any:
        self._fail(lambda: self._redis.eval(*arguments))
        return self._redis.eval(*arguments)

    def close(self) -> None:
        pass


def test_entries_of_many_jobs_are_kept_in_order_under_their_index(redis: Any, make: Callable[..., Publisher]) -> None:
    publisher = make()
    for index in range(100):
        publisher.publish([("a", token(index)), ("b", token(index))])
    publisher.flush("a")
    assert indices(redis, "a") == indices(redis, "b") == list(range(100))
    ids = [entry_id.decode() for entry_id, _ in redis.xrange(keys.stream("a"))]
    assert ids == [keys.entry_id(index) for index in range(100)]


def test_entries_are_announced_as_they_are_kept(redis: Any, make: Callable[..., Publisher]) -> None:
    with redis.pubsub(ignore_subscribe_messages=True) as heard:
        heard.subscribe(keys.channel("a"))
        heard.get_message(timeout=1)
        publisher = make()
        publisher.publish(entries("a", 3))
        publisher.flush("a")
        messages = [heard.get_message(timeout=5) for _ in range(3)]
    kept = [fields[b"entry"] for _, fields in redis.xrange(keys.stream("a"))]
    assert [message["data"] for message in messages if message] == kept


def test_a_job_that_runs_again_adds_only_what_is_new(redis: Any, make: Callable[..., Publisher]) -> None:
    publisher = make()
    publisher.publish(entries("a", 5))
    publisher.publish(entries("a", 8))
    publisher.flush("a")
    assert indices(redis, "a") == list(range(8))


def test_what_is_there_already_is_announced_again(redis: Any, make: Callable[..., Publisher]) -> None:
    """Who listens may have come after the worker that died."""
    first, second = make(), make()
    first.publish(entries("a", 3))
    first.flush("a")
    with redis.pubsub(ignore_subscribe_messages=True) as heard:
        heard.subscribe(keys.channel("a"))
        heard.get_message(timeout=1)
        second.publish(entries("a", 3))
        second.flush("a")
        messages = [heard.get_message(timeout=1) for _ in range(3)]
    assert all(messages)


def test_a_stream_expires_from_its_first_entry_on(redis: Any, make: Callable[..., Publisher]) -> None:
    publisher = make()
    publisher.publish(entries("a", 1))
    publisher.flush("a")
    assert 0 < redis.ttl(keys.stream("a")) <= keys.RESULT_TTL


@pytest.mark.parametrize("renewing", [token(RENEW_EVERY), token(7, last=True)])
def test_the_expiry_is_renewed_now_and_then_and_at_the_end(
    redis: Any, make: Callable[..., Publisher], renewing: StreamToken
) -> None:
    publisher = make()
    publisher.publish([("a", token(0)), ("a", token(1))])
    publisher.flush("a")
    redis.expire(keys.stream("a"), 100)
    publisher.publish([("a", token(2))])
    publisher.flush("a")
    assert redis.ttl(keys.stream("a")) <= 100
    publisher.publish([("a", renewing)])
    publisher.flush("a")
    assert redis.ttl(keys.stream("a")) > 100


def lose(redis: Any, job_id: str, first: int) -> None:
    """As a replica that becomes the primary without the entries from `first` on."""
    rows = redis.xrange(keys.stream(job_id), max=keys.entry_id(first - 1)) if first else []
    redis.delete(keys.stream(job_id))
    for entry_id, fields in rows:
        redis.xadd(keys.stream(job_id), fields, id=entry_id)
    redis.expire(keys.stream(job_id), 100)


@pytest.mark.parametrize("first", [0, 3, 5])
def test_what_the_broker_took_and_lost_again_is_sent_again_so_that_the_stream_has_no_gap(
    redis: Any, make: Callable[..., Publisher], first: int
) -> None:
    publisher = make()
    publisher.publish([*entries("a", 6), *entries("b", 6)])
    publisher.flush("a")
    lose(redis, "a", first)
    with redis.pubsub(ignore_subscribe_messages=True) as heard:
        heard.subscribe(keys.channel("a"))
        heard.get_message(timeout=1)
        publisher.publish([*entries("a", 2, start=6), *entries("b", 2, start=6)])
        publisher.flush("a")
        said = [heard.get_message(timeout=5) for _ in range(first, 8)]
        assert heard.get_message() is None
    assert [json.loads(message["data"])["index"] for message in said] == list(range(first, 8)), "each once"
    assert indices(redis, "a") == indices(redis, "b") == list(range(8))
    assert 0 < redis.ttl(keys.stream("a")) <= keys.RESULT_TTL


def test_a_job_that_goes_on_behind_a_stream_that_is_gone_publishes_all_the_same(
    redis: Any, make: Callable[..., Publisher]
) -> None:
    publisher = make()
    publisher.publish(entries("a", 3, start=10))
    publisher.publish(entries("a", 3, start=2))
    publisher.publish(entries("b", 2))
    publisher.flush("a")
    lose(redis, "b", 0)
    publisher.publish(entries("b", recent.ENTRIES + 2))
    publisher.flush("b")
    assert indices(redis, "a") == [10, 11, 12]
    assert indices(redis, "b") == list(range(recent.ENTRIES + 2))


def test_of_a_job_that_has_left_nothing_is_kept(redis: Any, make: Callable[..., Publisher]) -> None:
    """What is kept goes with the jobs: with alternatives it was gigabytes after some hundred streams."""
    publisher = make()
    publisher.publish([*entries("a", 3), *entries("b", 3)])
    publisher.leave("a")
    publisher.flush("a")
    for job_id in "ab":
        lose(redis, job_id, 0)
    publisher.publish([*entries("a", 2, start=3), *entries("b", 2, start=3)])
    publisher.flush("b")
    assert indices(redis, "b") == list(range(5)), "it goes on here"
    assert indices(redis, "a") == [3, 4]


def test_a_job_leaves_without_a_wait_for_a_broker_that_is_away(
    make: Callable[..., Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "BACKLOG", 1)
    publisher = make(begin=False)
    publisher.publish(entries("a", 1))
    publisher.leave("a")
    publisher.start()
    publisher.flush("a")


def test_of_each_stream_a_bounded_number_of_entries_is_kept() -> None:
    kept = Recent()
    kept.took(entries("a", recent.ENTRIES + 5))
    assert [pair[1].index for pair in kept.since("a", 0)] == list(range(5, recent.ENTRIES + 5))
    for number in range(recent.STREAMS):
        kept.took(entries(f"job-{number}", 1))
    assert kept.since("a", 0) == []
    assert len(kept.since("job-0", 0)) == 1


@pytest.mark.parametrize("start", [0, 2, 5, 9])
def test_of_a_job_that_was_elsewhere_meanwhile_nothing_of_before_is_kept(start: int) -> None:
    """What is sent again has to be without a gap: what another worker published between is not here."""
    kept = Recent()
    kept.took(entries("a", 4))
    assert kept.follows(entries("a", 1, start=4)[0])
    (first,) = entries("a", 1, start=start)
    assert not kept.follows(first)
    kept.took([first, *entries("a", 2, start=start + 1)])
    assert [pair[1].index for pair in kept.since("a", 0)] == [start, start + 1, start + 2]


@pytest.mark.parametrize("sent", [False, True])
def test_a_lost_connection_loses_and_doubles_nothing(redis: Any, make: Callable[..., Publisher], sent: bool) -> None:
    """Whether or not the broker had taken the entries before the connection went."""
    failures = iter([True, True])

    def fail(execute: Callable[[], Any]) -> None:
        if next(failures, False):
            if sent:
                execute()
            raise RedisConnectionError("gone")

    publisher = make(Unsteady(redis, fail))
    publisher.publish(entries("a", 3))
    publisher.publish(entries("a", 3, start=3))
    publisher.flush("a")
    assert indices(redis, "a") == list(range(6))


def test_a_broker_that_is_full_is_waited_for(redis: Any, make: Callable[..., Publisher]) -> None:
    publisher = make()
    redis.config_set("maxmemory", 1)
    try:
        publisher.publish(entries("a", 2))
        wait_until(lambda: redis.info("errorstats").get("errorstat_OOM"), "it was refused")
        assert not redis.exists(keys.stream("a"))
    finally:
        redis.config_set("maxmemory", 0)
    publisher.flush("a")
    assert indices(redis, "a") == [0, 1]


def test_more_than_a_batch_goes_in_order(
    monkeypatch: pytest.MonkeyPatch, redis: Any, make: Callable[..., Publisher]
) -> None:
    monkeypatch.setattr(publishing, "BATCH", 3)
    sizes: list[int] = []
    send = redis.eval

    def counted(script: str, count: int, *rest: Any) -> Any:
        sizes.append(count // 2)
        return send(script, count, *rest)

    monkeypatch.setattr(redis, "eval", counted)
    publisher = make()
    publisher.publish(entries("a", 8))
    publisher.flush("a")
    assert indices(redis, "a") == list(range(8))
    assert sizes == [3, 3, 2]


def test_flush_waits_for_all_that_was_published_before(redis: Any, make: Callable[..., Publisher]) -> None:
    release, reached = threading.Event(), threading.Event()

    def hold(_: Callable[[], Any]) -> None:
        reached.set()
        assert release.wait(30)

    publisher = make(Unsteady(redis, hold))
    publisher.publish(entries("a", 2))
    flushed = threading.Thread(target=publisher.flush, args=("a",))
    flushed.start()
    assert reached.wait(30)
    assert flushed.is_alive()
    release.set()
    flushed.join(30)
    assert not flushed.is_alive()
    assert indices(redis, "a") == [0, 1]


def test_a_full_backlog_makes_the_engine_wait_and_drops_nothing(
    monkeypatch: pytest.MonkeyPatch, redis: Any, make: Callable[..., Publisher]
) -> None:
    monkeypatch.setattr(publishing, "BACKLOG", 2)
    publisher = make(begin=False)
    done: list[int] = []

    def engine() -> None:
        for index in range(5):
            publisher.publish([("a", token(index))])
            done.append(index)

    thread = threading.Thread(target=engine)
    thread.start()
    wait_until(lambda: done == [0, 1], "two steps are queued")
    assert thread.is_alive()
    publisher.start()
    thread.join(30)
    publisher.flush("a")
    assert indices(redis, "a") == list(range(5))


def test_stop_sends_what_is_queued(redis: Any) -> None:
    publisher = Publisher(redis)
    publisher.publish(entries("a", 3))
    publisher.start()
    publisher.stop()
    assert indices(redis, "a") == [0, 1, 2]


def test_stop_does_not_wait_for_a_broker_that_is_away(redis: Any) -> None:
    reached = threading.Event()

    def away(_: Callable[[], Any]) -> None:
        reached.set()
        raise RedisConnectionError("gone")

    publisher = Publisher(Unsteady(redis, away))
    publisher.publish(entries("a", 3))
    publisher.start()
    assert reached.wait(30)
    publisher.stop()
    assert not publisher.thread.alive


def test_flush_fails_where_the_publisher_has_ended(redis: Any) -> None:
    publisher = Publisher(redis)
    publisher.start()
    publisher.stop()
    publisher.flush("a")
    publisher.publish(entries("a", 1))
    with pytest.raises(RuntimeError, match="the publisher has ended"):
        publisher.flush("a")


@pytest.fixture
def refused() -> list[tuple[str, str]]:
    """Jobs that the publisher gave up, and why."""
    return []


@pytest.fixture
def reporting(redis: Any, refused: list[tuple[str, str]]) -> Iterator[Callable[[Any], Publisher]]:
    made: list[Publisher] = []

    def start(client: Any) -> Publisher:
        publisher = Publisher(client, lambda job_id, error: refused.append((job_id, str(error))))
        made.append(publisher)
        publisher.start()
        return publisher

    yield start
    for publisher in made:
        publisher.stop()


def test_a_stream_of_the_wrong_type_fails_its_own_job_and_no_other(
    redis: Any, reporting: Callable[[Any], Publisher], refused: list[tuple[str, str]]
) -> None:
    """It was retried for ever, and every job of the worker hung."""
    redis.set(keys.stream("bad"), "x", ex=60)
    publisher = reporting(redis)
    for index in range(5):
        publisher.publish([("a", token(index)), ("bad", token(index)), ("b", token(index))])
    publisher.flush("a")
    publisher.flush("b")
    assert indices(redis, "a") == indices(redis, "b") == list(range(5))
    with pytest.raises(JobFailed, match=f"{keys.stream('bad')}.*WRONGTYPE"):
        publisher.flush("bad")
    assert [job_id for job_id, _ in refused] == ["bad"], "reported once"


def test_why_a_job_was_refused_is_forgotten_when_it_has_left(
    redis: Any, reporting: Callable[[Any], Publisher], refused: list[tuple[str, str]]
) -> None:
    """An error holds on to all that its job had in memory."""
    redis.set(keys.stream("bad"), "x", ex=60)
    publisher = reporting(redis)
    publisher.publish(entries("bad", 1))
    with pytest.raises(JobFailed):
        publisher.flush("bad")
    publisher.leave("bad")
    publisher.publish(entries("a", 1))
    publisher.flush("a")
    publisher.flush("bad")
    assert [job_id for job_id, _ in refused] == ["bad"]


def test_a_job_of_the_same_id_may_run_again(redis: Any, reporting: Callable[[Any], Publisher]) -> None:
    redis.set(keys.stream("a"), "x", ex=60)
    publisher = reporting(redis)
    publisher.publish(entries("a", 1))
    with pytest.raises(JobFailed):
        publisher.flush("a")
    redis.delete(keys.stream("a"))
    publisher.forget("a")
    publisher.publish(entries("a", 1))
    publisher.flush("a")
    assert indices(redis, "a") == [0]


@pytest.mark.parametrize("error", [ResponseError("ERR unknown"), ValueError("a text that is no unicode")])
def test_what_cannot_be_sent_together_is_sent_job_by_job(
    redis: Any, reporting: Callable[[Any], Publisher], error: Exception
) -> None:
    class Choosy(Unsteady):
        def eval(self, *arguments: Any) -> Any:
            if keys.stream("bad") in arguments:
                raise error
            return super().eval(*arguments)

    publisher = reporting(Choosy(redis, lambda execute: None))
    publisher.publish([("a", token(0)), ("bad", token(0)), ("b", token(0))])
    publisher.flush("a")
    assert indices(redis, "a") == indices(redis, "b") == [0]
    with pytest.raises(JobFailed):
        publisher.flush("bad")


def test_a_broker_that_refuses_for_too_long_fails_the_jobs_and_not_the_thread(
    monkeypatch: pytest.MonkeyPatch, redis: Any, reporting: Callable[[Any], Publisher]
) -> None:
    monkeypatch.setattr(publishing, "Retry", lambda: Retry(limit=0.0))
    answers = iter([True])

    def refuse(_: Callable[[], Any]) -> None:
        if next(answers, False):
            raise ReadOnlyError("READONLY You can't write against a read only replica.")

    publisher = reporting(Unsteady(redis, refuse))
    publisher.publish(entries("a", 1))
    with pytest.raises(JobFailed, match="READONLY"):
        publisher.flush("a")
    publisher.publish(entries("b", 1))
    publisher.flush("b")
    assert indices(redis, "b") == [0]


def test_a_stream_that_was_deleted_meanwhile_expires_all_the_same(redis: Any, make: Callable[..., Publisher]) -> None:
    publisher = make()
    publisher.publish(entries("a", 3))
    publisher.flush("a")
    redis.delete(keys.stream("a"))
    publisher.publish(entries("a", 2, start=3))
    publisher.flush("a")
    assert 0 < redis.ttl(keys.stream("a")) <= keys.RESULT_TTL


def test_streams_that_go_on_are_kept_before_those_that_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "STREAMS", 2)
    kept = Recent()
    for job_id, index in (("a", 0), ("b", 0), ("a", 1), ("c", 0)):
        kept.took([(job_id, token(index))])
    assert [len(kept.since(job_id, 0)) for job_id in "abc"] == [2, 0, 1]


class Cut:
    """A broker that is away for one call, in which the worker begins to end, and back for the next."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        self.away, self.met = threading.Event(), threading.Event()

    def eval(self, *arguments: Any) -> Any:
        if not self.met.is_set():
            self.met.set()
            self.away.wait(10)
            raise RedisConnectionError("away")
        return self._redis.eval(*arguments)

    def close(self) -> None:
        pass


def test_a_worker_that_ends_while_the_broker_is_away_leaves_no_gap_in_a_stream(
    redis: Any, make: Callable[..., Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Cut(redis)
    publisher = make(client)
    publisher.publish(entries("a", 3))
    assert client.met.wait(10)
    publisher.publish(entries("a", 3, start=3))
    join = publisher.thread.join

    def back(seconds: float) -> None:
        client.away.set()
        join(seconds)

    monkeypatch.setattr(publisher.thread, "join", back)
    publisher.stop()
    assert indices(redis, "a") == [], "the second three alone would leave a gap"
    with pytest.raises(WorkerUnavailable):
        publisher.flush("a")


def test_a_jobs_later_entries_are_not_sent_behind_those_that_were_refused(
    redis: Any, reporting: Callable[[Any], Publisher], refused: list[tuple[str, str]]
) -> None:
    """Its key may be mended meanwhile: the stream would begin in its middle."""
    redis.set(keys.stream("bad"), "x", ex=60)
    publisher = reporting(redis)
    publisher.publish(entries("bad", 2))
    with pytest.raises(JobFailed):
        publisher.flush("bad")
    redis.delete(keys.stream("bad"))
    publisher.publish([*entries("bad", 2, start=2), *entries("good", 1)])
    publisher.flush("good")
    assert not redis.exists(keys.stream("bad"))
    assert indices(redis, "good") == [0]
    assert len(refused) == 1


def test_one_script_publishes_all_that_can_be_and_says_of_the_rest_why(
    redis: Any, reporting: Callable[[Any], Publisher]
) -> None:
    """Without a second round trip: a key of another type would cost every job of the worker one at each step."""
    redis.set(keys.stream("bad"), "x", ex=60)
    sizes: list[int] = []

    class Counting(Unsteady):
        def eval(self, *arguments: Any) -> Any:
            sizes.append(arguments[1] // 2)
            return super().eval(*arguments)

    publisher = reporting(Counting(redis, lambda execute: None))
    publisher.publish([("bad", token(0)), *entries("a", 2)])
    publisher.flush("a")
    assert sizes == [3]
    assert indices(redis, "a") == [0, 1]


def test_a_report_says_when_it_came_by_the_brokers_clock_and_a_token_does_not(
    redis: Any, make: Callable[..., Publisher]
) -> None:
    report = TrainReport(
        index=0, step=1, steps=2, loss=1.0, learning_rate=0.1, gradient_norm=1.0, tokens=1, tokens_per_second=1.0
    )
    publisher = make()
    publisher.publish([*entries("a", 1), ("run", report)])
    publisher.flush("run")
    (_, fields) = redis.xrange(keys.stream("run"))[0]
    assert json.loads(fields[b"entry"])["published"] == pytest.approx(redis.time()[0], abs=60)
    (_, fields) = redis.xrange(keys.stream("a"))[0]
    assert b"published" not in fields[b"entry"]


def test_how_long_each_step_waited_is_observed_and_what_is_unsent_counted(
    redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the time of this machine: it stands still as they are sent."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    lag = Series(PUBLISH_LAG.buckets)
    publisher = Publisher(redis, lag=lag)
    publisher.publish(entries("a", 2))
    clock.now = 101.0
    publisher.publish(entries("a", 3, start=2))
    assert publisher.unsent == 5
    clock.now = 103.0
    publisher.start()
    publisher.flush("a")
    publisher.stop()
    assert (sum(lag.counts), lag.value) == (2, 3.0 + 2.0)
    assert publisher.unsent == 0


def test_a_publisher_that_has_stopped_lets_go_of_its_connection(redis: Any) -> None:
    closed: list[int] = []
    client: Any = SimpleNamespace(close=lambda: closed.append(1))
    publisher = Publisher(client)
    publisher.start()
    publisher.stop()
    assert closed == [1]
    assert not publisher.thread.alive
