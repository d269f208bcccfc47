"""Looking at a real broker's ledger: what becomes of jobs is reported, and what that costs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from stoker import AsyncClient
from stoker.broker import keys, ledger
from stoker.broker.connection import connect
from stoker.client._async.adapters import AsyncAdapters
from stoker.client_core import embed_request, generate_request, job_record, train_request
from stoker.contract import TrainReport
from stoker.errors import BrokerUnavailable, JobDead
from stoker.monitor import watch as watching
from stoker.monitor.curve import Curve
from stoker.monitor.mirror import Mirror
from stoker.monitor.overview import overview
from stoker.monitor.state import JobMemory
from stoker.monitor.watch import Watch, read_reports
from stoker.settings import Settings
from tests.monitor.test_curve import report
from tests.monitor.test_overview import WORKER, card, presence

MODEL = "base"
GENERATE, TRAIN = keys.queue(MODEL, "generate"), keys.queue(MODEL, "train")


@pytest.fixture
def redis(broker: Settings) -> Any:
    client = connect(broker)
    shown = card(model=MODEL, kinds=("embed", "generate", "train"), seen=time.time())
    client.hset(keys.MODELS, f"{MODEL}/1", shown.model_dump_json())
    client.expire(keys.MODELS, 60)
    yield client
    client.close()


def send(redis: Any, job_id: str, **options: Any) -> None:
    request = generate_request(MODEL, "a secret prompt", 0, {"max_tokens": 40, **options})
    assert ledger.submit(redis, job_id, job_record(request, job_id, "team")).state == "new"


def run(redis: Any, job_id: str, queue: str = GENERATE, worker: str = WORKER) -> None:
    there = presence(worker=worker)
    redis.set(keys.worker(worker), there.model_dump_json(), ex=10)
    # As a worker's BRPOP takes it.
    redis.lrem(keys.ready(queue), 1, next(m for m in redis.lrange(keys.ready(queue), 0, -1) if job_id.encode() in m))
    assert ledger.claim(redis, job_id, queue, f"token-{job_id}-{worker}", f"{job_id}#1", worker).state == "run"


def watched(broker: Settings, steps: Callable[[Watch, JobMemory], Awaitable[None]]) -> None:
    async def session() -> None:
        memory = JobMemory()
        async with AsyncClient(settings=broker) as client:
            await steps(Watch(client, lambda: memory), memory)

    asyncio.run(session())


def states(memory: JobMemory) -> dict[str, str]:
    return {name: task.state for name, task in memory.tasks.items()}


def test_jobs_are_seen_from_their_sending_to_their_end(broker: Settings, redis: Any) -> None:
    for name in ("first", "second", "third", "fourth"):
        send(redis, name, adapter="style")

    async def steps(watch: Watch, memory: JobMemory) -> None:
        await watch.round()
        assert states(memory) == dict.fromkeys(("first", "second", "third", "fourth"), "PENDING")
        assert "'adapter': 'style'" in memory.tasks["first"].kwargs
        assert "'size': '40 tokens'" in memory.tasks["first"].kwargs
        run(redis, "first")
        run(redis, "second")
        assert ledger.cancel(redis, "third", GENERATE) == "cancelled"
        redis.xadd(keys.stream("first"), {"entry": "{}"}, id="1-0")
        await watch.round()
        assert states(memory) == {"first": "STARTED", "second": "STARTED", "third": "REVOKED", "fourth": "PENDING"}
        assert memory.tasks["first"].worker.hostname == "stoker-1@mac"
        assert memory.tasks["first"].progress == "1 of at most 40 tokens"
        ledger.complete(redis, "first", GENERATE, f"token-first-{WORKER}", ledger.success("first", {"text": "secret"}))
        ledger.complete(
            redis, "second", GENERATE, f"token-second-{WORKER}", ledger.failure("second", JobDead("job second: x"))
        )
        watch.mirror.lines[GENERATE].compared = 0.0
        await watch.round()
        assert states(memory) == {"first": "SUCCESS", "second": "FAILURE", "third": "REVOKED", "fourth": "PENDING"}
        assert memory.tasks["second"].exception == "JobDead"
        assert "secret" not in repr([task.as_dict() for task in memory.tasks.values()])

    watched(broker, steps)
    redis.expire(keys.stream("first"), 60)


def test_a_job_that_goes_back_to_its_queue_is_retried(broker: Settings, redis: Any) -> None:
    send(redis, "job")

    async def steps(watch: Watch, memory: JobMemory) -> None:
        run(redis, "job")
        await watch.round()
        assert ledger.release(redis, "job", GENERATE, f"token-job-{WORKER}")
        await watch.round()
        assert states(memory) == {"job": "RETRY"}

    watched(broker, steps)


def test_queues_of_a_model_that_has_gone_are_asked_for_until_its_jobs_have_ended(
    broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet that names its models anew each day had a monitor ask for thousands of them each second."""
    monkeypatch.setattr(watching, "RARELY", 0.0)
    send(redis, "job")

    async def steps(watch: Watch, memory: JobMemory) -> None:
        await watch.round()
        assert {GENERATE, TRAIN} <= watch.mirror.lines.keys()
        redis.delete(keys.MODELS)
        await watch.round()
        assert [*watch.mirror.lines] == [GENERATE]
        assert ledger.cancel(redis, "job", GENERATE) == "cancelled"
        await watch.round()
        assert states(memory) == {"job": "REVOKED"}
        await watch.round()
        assert not watch.mirror.lines

    watched(broker, steps)


def test_a_dead_letter_is_reported_and_its_retry_too(
    broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "RARELY", 0.0)
    send(redis, "job")

    async def steps(watch: Watch, memory: JobMemory) -> None:
        await watch.round()
        run(redis, "job")
        token = f"token-job-{WORKER}"
        assert not ledger.dead_letter(redis, "job", GENERATE, token, "stoker-1@mac/aa", "its disk is full").fenced
        ledger.complete(redis, "job", GENERATE, token, ledger.failure("job", JobDead("job: its disk is full")))
        await watch.round()
        assert states(memory) == {"job": "FAILURE"}
        assert watch.dead["job"]["history"][0]["trouble"] == "its disk is full"
        assert "secret" not in json.dumps(watch.dead)
        async with AsyncClient(settings=broker) as client:
            await client.retry("job")
        await watch.round()
        assert states(memory) == {"job": "RETRY"}
        assert not watch.dead

    watched(broker, steps)


def test_a_runs_reports_are_read_once_and_to_its_end(
    broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    whole = Curve.add

    def add(curve: Curve, each: TrainReport) -> None:
        read.append(each.step)
        whole(curve, each)

    monkeypatch.setattr(Curve, "add", add)
    request = train_request(MODEL, "style", [{"prompt": "a", "completion": "b"}], "run", {"steps": 9})
    ledger.submit(redis, "run", job_record(request, "run", "team"), b"{}")

    async def steps(watch: Watch, memory: JobMemory) -> None:
        run(redis, "run", TRAIN)
        for step in (1, 2):
            redis.xadd(keys.stream("run"), {"entry": report(step).model_dump_json()}, id=keys.entry_id(step - 1))
        await watch.round()
        assert memory.tasks["run"].progress == "step 2/100 · loss 2.50 · 61 tokens/s"
        assert memory.tasks["run"].state == "STARTED"
        await watch.round()
        assert read == [1, 2], "each is read once"
        for step in (3, 4):
            redis.xadd(keys.stream("run"), {"entry": report(step).model_dump_json()}, id=keys.entry_id(step - 1))
        ledger.complete(redis, "run", TRAIN, f"token-run-{WORKER}", ledger.revoked("run"))
        await watch.round()
        assert [step for step, _ in watch.mirror.runs["run"].points] == [1, 2, 3, 4]
        assert (memory.tasks["run"].state, memory.tasks["run"].progress[:8]) == ("REVOKED", "step 4/1")

    watched(broker, steps)
    redis.expire(keys.stream("run"), 60)


def models_asked(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The models whose adapters are asked for from now on; none has any."""
    asked: list[str | None] = []

    async def listed(_: AsyncAdapters, model: str | None = None) -> list[Any]:
        asked.append(model)
        return []

    monkeypatch.setattr(AsyncAdapters, "list", listed)
    return asked


def test_an_open_page_asks_for_adapters_now_and_then_or_when_it_has_changed_one(
    broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = models_asked(monkeypatch)
    able = card(model=MODEL, kinds=("generate", "train", "adapters"), seen=time.time())
    redis.hset(keys.MODELS, f"{MODEL}/1", able.model_dump_json())

    async def steps(watch: Watch, memory: JobMemory) -> None:
        await watch.round()
        for anew in (False, False, True, False):
            await watch.adapters(anew=anew)
        assert asked == [MODEL] * 2

    watched(broker, steps)


@pytest.mark.parametrize("index", [None, 0], ids=["in order", "of another program"])
def test_a_run_that_ends_with_more_reports_than_one_look_takes_has_all_of_them(
    broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch, index: int | None
) -> None:
    """As one that was far on when the monitor began."""
    monkeypatch.setattr(watching, "REPORTS", 2)
    request = train_request(MODEL, "style", [{"prompt": "a", "completion": "b"}], "run", {"steps": 9})
    ledger.submit(redis, "run", job_record(request, "run", "team"), b"{}")

    async def steps(watch: Watch, memory: JobMemory) -> None:
        run(redis, "run", TRAIN)
        for step in range(1, 8):
            said = report(step) if index is None else report(step).model_copy(update={"index": index})
            redis.xadd(keys.stream("run"), {"entry": said.model_dump_json()}, id=keys.entry_id(step - 1))
        redis.expire(keys.stream("run"), keys.RESULT_TTL)
        await watch.round()
        ledger.complete(redis, "run", TRAIN, f"token-run-{WORKER}", ledger.revoked("run"))
        await watch.round()
        assert memory.tasks["run"].state == "REVOKED"
        if index is None:
            assert [step for step, _ in watch.mirror.runs["run"].points] == list(range(1, 8))

    watched(broker, steps)


def test_an_entry_that_cannot_be_read_leaves_a_runs_other_reports() -> None:
    # A share of no steps is no number: the page would be none either.
    of_none = report(2).model_copy(update={"steps": 0}).model_dump_json()
    given = [report(1).model_dump_json(), b"{", of_none, report(4).model_dump_json()]
    entries: list[dict[bytes, Any]] = [{}, *({b"entry": entry} for entry in given)]
    assert [found.step for found in read_reports(enumerate(entries))] == [1, 4]


def test_what_ended_while_nobody_watched_ends_in_the_history_too(
    broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("open", "ended"):
        send(redis, name)
    ledger.cancel(redis, "ended", GENERATE)

    async def steps(watch: Watch, memory: JobMemory) -> None:
        times = {"hostname": "stoker-1@mac", "timestamp": 1.0, "local_received": 1.0, "clock": 1}
        for name in ("open", "ended", "long-gone"):
            memory.event({"type": "task-received", "uuid": name, "name": "stoker.generate", **times})
        await watch.round()
        assert states(memory) == {"open": "RECEIVED", "ended": "REVOKED", "long-gone": "FAILURE"}
        # Whose events come later is looked for at a later look.
        memory.event({"type": "task-received", "uuid": "came-late", "name": "stoker.generate", **times})
        await watch.round()
        assert states(memory)["came-late"] == "RECEIVED", "it costs the broker nothing for a while"
        monkeypatch.setattr(watching, "RARELY", 0.0)
        await watch.round()
        assert states(memory)["came-late"] == "FAILURE"

    watched(broker, steps)


def test_keys_that_another_program_spoiled_cost_one_job_alone(broker: Settings, redis: Any) -> None:
    for name in ("good", "bad", "talks"):
        send(redis, name)
    redis.set(keys.job("bad"), "no hash", ex=60)

    async def steps(watch: Watch, memory: JobMemory) -> None:
        run(redis, "talks")
        redis.set(keys.stream("talks"), "no stream", ex=60)
        await watch.round()
        await watch.round()
        assert states(memory) == {"good": "PENDING", "talks": "STARTED"}

    watched(broker, steps)


def test_a_broker_that_is_away_is_said_once_and_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    async def session() -> None:
        async with AsyncClient(settings=Settings(url="redis://127.0.0.1:1/0", patience=0.0)) as client:
            watch = Watch(client, JobMemory)
            going = asyncio.ensure_future(watch.run())
            while not watch.trouble:
                await asyncio.sleep(0)
            going.cancel()
            assert "127.0.0.1:1" in watch.trouble

    asyncio.run(session())
    assert len([record for record in caplog.records if "cannot be seen" in record.message]) == 1


def test_the_brokers_work_for_a_round_does_not_grow_with_the_jobs_that_wait(broker: Settings, redis: Any) -> None:
    """Commands, not their time: that a machine decides."""
    for number in range(300):
        request = embed_request(MODEL, ["x"], {})
        ledger.submit(redis, f"job-{number}", job_record(request, f"job-{number}", "team"))

    def asked() -> int:
        return int(sum(each["calls"] for each in redis.info("commandstats").values()))

    async def steps(watch: Watch, memory: JobMemory) -> None:
        await watch.round()
        assert len(memory.tasks) == 300
        before = asked()
        await watch.round()
        queues = len(watch.mirror.lines)
        # The time, three questions a queue, the ready list's records, and this count itself.
        assert asked() - before <= 2 + 3 * queues + 8 + 1

    watched(broker, steps)


def test_a_look_that_fails_reports_what_it_saw_and_the_next_one_goes_on(
    broker: Settings, redis: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(redis, "job")

    async def broken(_: Watch) -> None:
        raise ZeroDivisionError

    async def steps(watch: Watch, memory: JobMemory) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Watch, "look_at_running", broken)
            going = asyncio.ensure_future(watch.run())
            while not watch.trouble:
                await asyncio.sleep(0.01)
        assert states(memory) == {"job": "PENDING"}
        assert "ZeroDivisionError" in watch.trouble
        while watch.trouble:
            await asyncio.sleep(0.01)
        going.cancel()

    watched(broker, steps)
    assert len([record for record in caplog.records if "cannot be seen" in record.message]) == 1


def test_a_long_queue_is_read_in_parts(broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "AT_ONCE", 10)
    for number in range(25):
        send(redis, f"job-{number}")

    async def steps(watch: Watch, memory: JobMemory) -> None:
        await watch.round()
        assert 10 <= len(memory.tasks) < 25
        for _ in range(4):
            await watch.round()
        assert states(memory) == {f"job-{number}": "PENDING" for number in range(25)}
        assert overview(watch.mirror, [], [], {}).waiting_in_all == 25

    watched(broker, steps)


def test_a_queue_that_is_read_for_the_first_time_is_not_compared_as_a_whole(
    broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "AT_ONCE", 2)
    compared: list[str] = []
    whole = Mirror.vanished

    def vanished(mirror: Mirror, queue: str, ids: Iterable[bytes]) -> tuple[list[str], list[str]]:
        compared.append(queue)
        return whole(mirror, queue, ids)

    monkeypatch.setattr(Mirror, "vanished", vanished)
    for number in range(5):
        send(redis, f"job-{number}")

    async def steps(watch: Watch, memory: JobMemory) -> None:
        await watch.round()
        assert len(memory.tasks) == 2
        assert compared == []

    watched(broker, steps)


def test_a_job_that_is_new_is_asked_for_once_in_a_round(
    broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its queue is compared as a whole in the same round."""
    send(redis, "first")
    send(redis, "gone")

    async def steps(watch: Watch, memory: JobMemory) -> None:
        await watch.round()
        assert ledger.cancel(redis, "gone", GENERATE) == "cancelled"
        send(redis, "new")
        watch.mirror.lines[GENERATE].compared = 0.0
        heard: list[str] = []
        plain = watch.mirror.hear

        def hear(queue: str, job_id: str, said: Any) -> Any:
            heard.append(job_id)
            return plain(queue, job_id, said)

        monkeypatch.setattr(watch.mirror, "hear", hear)
        await watch.round()
        assert heard.count("new") == 1
        assert states(memory) == {"first": "PENDING", "gone": "REVOKED", "new": "PENDING"}

    watched(broker, steps)


def test_a_task_of_another_program_is_left_to_its_own_events(broker: Settings, redis: Any) -> None:
    """The ledger does not know it, and the look goes on."""
    send(redis, "job")

    async def steps(watch: Watch, memory: JobMemory) -> None:
        times = {"hostname": "celery@other", "timestamp": 1.0, "local_received": 1.0, "clock": 1}
        memory.event({"type": "task-started", "uuid": "theirs", **times})
        await watch.round()
        assert memory.strangers == set()
        assert states(memory)["job"] == "PENDING"

    watched(broker, steps)


def test_a_job_that_is_known_and_has_no_result_is_not_ended_for_that(broker: Settings, redis: Any) -> None:
    """Its queue may not be followed: its model is of another generation of workers."""
    send(redis, "open")
    redis.zrem(keys.open_jobs(GENERATE), "open")

    async def steps(watch: Watch, memory: JobMemory) -> None:
        times = {"hostname": "stoker-1@mac", "timestamp": 1.0, "local_received": 1.0, "clock": 1}
        memory.event({"type": "task-received", "uuid": "open", "name": "stoker.generate", **times})
        await watch.round()
        assert states(memory) == {"open": "RECEIVED"}

    watched(broker, steps)


def test_the_time_of_a_look_is_the_brokers_to_the_second(broker: Settings, redis: Any) -> None:
    async def steps(watch: Watch, memory: JobMemory) -> None:
        await watch.round()
        seconds, micros = redis.time()
        assert watch.mirror.now == pytest.approx(seconds + micros / 1e6, abs=5)

    watched(broker, steps)


def test_a_broker_that_stays_away_is_said_once_and_that_it_is_back_too(
    broker: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "EVERY", 0.0)
    looks: list[Exception | None] = [BrokerUnavailable("away"), BrokerUnavailable("still away"), None]
    troubles: list[str] = []

    async def session() -> None:
        async with AsyncClient(settings=broker) as client:
            watch = Watch(client, JobMemory)

            async def look() -> None:
                troubles.append(watch.trouble)
                if not looks:
                    raise asyncio.CancelledError
                if (error := looks.pop(0)) is not None:
                    raise error

            monkeypatch.setattr(watch, "round", look)
            with caplog.at_level("INFO"), pytest.raises(asyncio.CancelledError):
                await watch.run()

    asyncio.run(session())
    assert troubles == ["", "away", "still away", ""]
    said = [record.getMessage() for record in caplog.records if record.name == watching.__name__]
    assert said == ["the jobs cannot be seen: away", "the broker answers again"]


def test_adapters_are_asked_for_of_models_that_have_any(
    broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = models_asked(monkeypatch)
    able = card(model="able", kinds=("generate", "adapters"), seen=time.time())
    redis.hset(keys.MODELS, "able/1", able.model_dump_json())

    async def steps(watch: Watch, memory: JobMemory) -> None:
        await watch.round()
        await watch.adapters()
        assert asked == ["able"]

    watched(broker, steps)
