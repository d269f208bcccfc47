"""A worker's runtime: the jobs that run here, who stops them, and what must not be lost while the broker is away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from engine.ticket import Ticket
from stoker.broker import keys, ledger
from stoker.broker.connection import connect
from stoker.broker.ledger.transitions import LIBRARY
from stoker.client.requests import generate_request
from stoker.client.submission import job_record
from stoker.contract import ModelCard
from stoker.errors import InvalidRequest, JobCancelled, WorkerUnavailable
from stoker.monitor import metrics
from stoker.settings import Settings
from workers.account import DeliveryEnd, JobAccount
from workers.services import retrying
from workers.services.observing import observers
from workers.services.runtime import AGAIN, Fenced, Runtime

CARD = ModelCard(model="m", architecture="a", kinds=("generate", "train"), context=1, parameters=1)
WRONG = ResponseError("WRONGTYPE: the key x is a string, not a hash")


class Engine:
    """Runs nothing. `woken`: how often it was woken to look at its jobs; `order`: what was stopped, in this order."""

    observe: Any = None
    cards: tuple[ModelCard, ...] = ()
    models: tuple[str, ...] = ("m",)

    def __init__(self) -> None:
        self.woken = 0
        self.order: list[str] = []

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def wake(self) -> None:
        self.woken += 1


def runtime_of(settings: Settings, engine: Engine) -> Runtime:
    given: Any = engine
    return Runtime(settings, "w@here/1", lambda publish: given)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def runtime(engine: Engine) -> Iterator[Runtime]:
    """Without a broker."""
    made = runtime_of(Settings(url="redis://127.0.0.1:1/0"), engine)
    yield made
    made.stopped.set()
    made.redis.close()


def test_a_worker_that_starts_loads_the_ledgers_functions_for_the_clients(broker: Settings) -> None:
    runtime = runtime_of(broker, Engine())
    with closing(connect(broker)) as client:
        client.function_flush()
        runtime.start()
        try:
            assert LIBRARY.name.encode() in str(client.function_list()).encode()
        finally:
            runtime.stop()


def test_a_worker_that_starts_before_its_broker_waits_for_it(
    broker: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = runtime_of(broker, engine)
    tries: list[str] = []

    def away(redis: Any) -> None:
        tries.append("asked")
        if len(tries) < 3:
            raise RedisConnectionError("Connection refused")

    monkeypatch.setattr("stoker.broker.ledger.script.Library.offer", lambda library, redis: away(redis))
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.001)
    with closing(runtime.redis):
        runtime.start()
        runtime.stop()
    assert len(tries) == 3


def test_a_worker_that_starts_has_a_zero_for_each_count_of_its_models(broker: Settings, engine: Engine) -> None:
    engine.cards = (CARD,)
    runtime = runtime_of(broker, engine)
    runtime.start()
    try:
        counted = runtime.numbers.report().samples[metrics.JOBS.name]
        assert {sample.labels[:2] for sample in counted} == {("m", "generate"), ("m", "train")}
    finally:
        runtime.stop()
        runtime.redis.close()


def test_a_worker_that_stops_lets_the_engine_say_its_last_before_it_is_sent_and_counted(
    broker: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = runtime_of(broker, engine)
    runtime.start()
    seen: list[bool] = []

    def noted(name: str, then: Callable[[], object]) -> Callable[[], None]:
        def stop() -> None:
            engine.order.append(name)
            seen.append(runtime.stopped.is_set())
            then()

        return stop

    monkeypatch.setattr(engine, "stop", noted("engine", lambda: None))
    monkeypatch.setattr(runtime.publisher, "stop", noted("publisher", runtime.publisher.stop))
    monkeypatch.setattr(runtime.observers, "close", noted("observers", runtime.observers.close))
    runtime.stop()
    assert engine.order == ["engine", "publisher", "observers"]
    assert all(seen), "the other threads end meanwhile"
    runtime.redis.close()


def test_a_worker_takes_from_the_queues_of_every_kind_and_model(runtime: Runtime, engine: Engine) -> None:
    engine.cards = (CARD, CARD.model_copy(update={"model": "n", "kinds": ("embed",)}))
    assert runtime.queues == [keys.queue("m", "generate"), keys.queue("m", "train"), keys.queue("n", "embed")]


def ticket(job_id: str = "job", kind: str = "generate") -> Ticket[Any]:
    return Ticket(job_id, kind)


STOPPING: dict[str, Callable[[Runtime], object]] = {
    "cancel": lambda runtime: runtime.cancel("job"),
    "fail": lambda runtime: runtime.fail("job", InvalidRequest("x")),
    "hand back": lambda runtime: runtime.hand_back({"generate"}),
}


@pytest.mark.parametrize("how", STOPPING)
def test_an_engine_that_waits_is_woken_for_a_job_that_is_to_stop(runtime: Runtime, engine: Engine, how: str) -> None:
    """It would go on until its next step, which may be that of another job, or never come."""
    job, other = ticket(), ticket("other", "train")
    with runtime.running("1", job), runtime.running("2", other):
        STOPPING[how](runtime)
    assert job.stopping
    assert not other.stopping
    assert engine.woken == 1
    assert isinstance(job.stop, {"cancel": JobCancelled, "fail": InvalidRequest}.get(how, WorkerUnavailable))


def test_a_job_that_was_being_loaded_when_its_kind_was_given_back_stops_as_soon_as_it_runs(
    runtime: Runtime, engine: Engine
) -> None:
    job, other = ticket(kind="train"), ticket("other")
    runtime.hand_back({"train"})
    woken = engine.woken
    with runtime.running("1", job), runtime.running("2", other):
        assert isinstance(job.stop, WorkerUnavailable)
        assert not other.stopping, "it has the grace"
        assert engine.woken == woken + 1
        runtime.hand_back({"generate"})
        assert isinstance(other.stop, WorkerUnavailable)
    late = ticket("late", "train")
    with runtime.running("3", late):
        assert late.stopping, "what was given back stays so"


def test_a_job_whose_waiting_ends_with_an_error_is_stopped_and_found_no_more(runtime: Runtime, engine: Engine) -> None:
    ended, going = ticket("ended"), ticket("going")
    ended.resolve(1)

    def waits(each: Ticket[Any]) -> None:
        with runtime.running(each.job_id, each):
            assert runtime.jobs == [each.job_id]
            raise KeyError

    for each in (ended, going):
        with pytest.raises(KeyError):
            waits(each)
        assert runtime.jobs == []
    assert (ended.stopping, going.stopping, engine.woken) == (False, True, 1)
    # What stops now is nobody's.
    runtime.cancel("ended")
    assert not ended.stopping


def test_a_job_that_another_worker_owns_by_now_is_stopped_once_and_no_other(broker: Settings, engine: Engine) -> None:
    runtime = runtime_of(broker, engine)
    queue = keys.queue("m", "generate")
    names = ("mine", "theirs", "cancelled", "spoiled", "gone")
    for name in names[:-1]:
        ledger.submit(runtime.redis, name, job_record(generate_request("m", "x", 0, {}), name))
        owner = "other" if name in ("theirs", "cancelled") else name
        ledger.claim(runtime.redis, name, queue, owner, f"{name}#1", "w")
    runtime.redis.delete(keys.job("spoiled"))
    runtime.redis.set(keys.job("spoiled"), "no hash", ex=60)
    tickets = {name: ticket(name) for name in names}
    tickets["cancelled"].cancel()
    before = engine.woken
    with ExitStack() as stack:
        for name, each in tickets.items():
            stack.enter_context(runtime.running(name, each))
        runtime.fence_lost(runtime.redis)
    assert {name for name, each in tickets.items() if isinstance(each.stop, Fenced)} == {"theirs"}
    assert isinstance(tickets["cancelled"].stop, JobCancelled), "it stops already, and its reason stays"
    assert {name for name, each in tickets.items() if each.stopping} == {"theirs", "cancelled"}
    assert engine.woken == before + 1
    runtime.redis.close()


class Asked:
    """A question to a broker that answers with these errors first."""

    def __init__(self, *errors: RedisError) -> None:
        self.errors, self.times = list(errors), 0

    def __call__(self) -> str:
        self.times += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@pytest.fixture
def mended(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the mender finds, one answer a round; then nothing."""
    found: list[bool] = []
    monkeypatch.setattr(runtime.mender, "round", lambda: found.pop(0) if found else False)
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.0)
    return found


def test_what_must_not_be_lost_is_asked_until_the_broker_answers(runtime: Runtime, mended: list[bool]) -> None:
    asked = Asked(*[RedisConnectionError("gone")] * 3)
    assert runtime.persist(asked) == "done"
    assert asked.times == 4


def test_a_worker_that_stops_waits_no_longer_for_its_broker(runtime: Runtime, mended: list[bool]) -> None:
    runtime.stopped.set()
    asked = Asked(*[RedisConnectionError("gone")] * 3)
    with pytest.raises(RedisConnectionError):
        runtime.persist(asked)
    assert asked.times == 1


def test_what_a_spoiled_key_refuses_is_asked_again_once_that_is_mended_and_a_few_times_if_nothing_was(
    runtime: Runtime, mended: list[bool]
) -> None:
    mended += [True] * 20
    asked = Asked(*[WRONG] * 20)
    assert runtime.persist(asked) == "done"
    # Another worker has mended it, or it is a key of the job alone.
    asked = Asked(*[WRONG] * AGAIN)
    assert runtime.persist(asked) == "done"
    asked = Asked(*[WRONG] * 100)
    with pytest.raises(ResponseError):
        runtime.persist(asked)
    assert asked.times == AGAIN + 1


@pytest.mark.parametrize(
    "error", [RedisConnectionError("gone"), NoPermissionError("NOPERM"), ResponseError("MISCONF disk")]
)
def test_keys_are_looked_at_only_where_they_may_be_what_is_wrong(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, error: RedisError
) -> None:
    monkeypatch.setattr(runtime.mender, "round", lambda: pytest.fail("nothing is wrong with a key"))
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.0)
    assert runtime.persist(Asked(error)) == "done"


def test_every_delivery_is_in_the_log_and_heard_by_who_else_observes(caplog: pytest.LogCaptureFixture) -> None:
    class Other:
        heard = 0

        def begun(self, account: JobAccount) -> None:
            self.heard += 1

        def ended(self, account: JobAccount) -> None:
            self.heard += 1

        def close(self) -> None: ...

    other, account = Other(), JobAccount("job", "generate", "m", outcome=DeliveryEnd.SUCCEEDED)
    to = observers(Settings(), "w@here", other)
    with caplog.at_level("INFO"):
        to.begun(account)
        to.ended(account)
    assert other.heard == 2
    assert len([record for record in caplog.records if record.name == "stoker.jobs"]) == 2
