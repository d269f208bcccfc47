"""The ledger's transitions, on a real broker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from stoker import keys, ledger
from stoker.celery_config import shared_config
from stoker.client_core import JobStatus, Outcome
from stoker.connection import connect
from stoker.envelope import envelope
from stoker.ledger import MAX_DEATHS, Claim
from stoker.settings import Settings

QUEUE = keys.queue("toy", "generate")


def record(job_id: str = "job", client: str = "default", priority: int = 5, queue: str = QUEUE) -> dict[str, str]:
    return {
        "kind": "generate",
        "model": "toy",
        "queue": queue,
        "client": client,
        "priority": str(priority),
        "request": '{"prompt": "x"}',
        "message": envelope(job_id, "generate", "toy", queue),
    }


@pytest.fixture
def redis(broker: Settings) -> Iterator[Any]:
    client = connect(broker)
    yield client
    client.close()


def submit(redis: Any, job_id: str = "job", **fields: Any) -> str:
    return ledger.submit(redis, job_id, record(job_id, **fields))[0].decode()


def claim(redis: Any, token: str, tag: str = "tag") -> Claim:
    return Claim.parse(ledger.claim(redis, "job", QUEUE, token, tag, f"worker-{token}"))


def settle(redis: Any, token: str) -> int:
    return int(ledger.settle(redis, "job", QUEUE, token, ledger.success("job", {})))


def take(redis: Any, queue: str = QUEUE) -> str | None:
    """What a worker does: pop the next message, and claim its job."""
    message = redis.rpop(keys.front(queue))
    if message is None:
        return None
    job_id = json.loads(message)["headers"]["id"]
    tag = json.loads(message)["properties"]["delivery_tag"]
    assert Claim.parse(ledger.claim(redis, job_id, queue, f"token-{job_id}", tag, "worker")).state == "run"
    return job_id


def take_all(redis: Any, queue: str = QUEUE) -> list[str]:
    return list(iter(lambda: take(redis, queue), None))


def grow_old(redis: Any, job_id: str, seconds: float) -> None:
    key = keys.job(job_id)
    redis.hset(key, "submitted", float(redis.hget(key, "submitted")) - seconds)


def test_a_job_is_submitted_once(redis: Any) -> None:
    assert submit(redis) == "new"
    assert submit(redis) == "known"
    assert list(ledger.open_jobs(redis, [QUEUE])) == ["job"]
    assert redis.llen(keys.front(QUEUE)) == 1


def test_a_full_queue_takes_nothing(redis: Any) -> None:
    redis.hset(keys.POLICY, "queue_limit", 2)
    assert [submit(redis, name) for name in "ab"] == ["new", "new"]
    state, depth, limit, wait = ledger.submit(redis, "c", record("c"))
    assert (state, depth, limit) == (b"full", 2, 2)
    assert float(wait) >= 1
    assert not redis.exists(keys.job("c"))
    take(redis)
    assert submit(redis, "c") == "new", "who runs does not wait"


def test_a_client_has_a_limit_of_its_own(redis: Any) -> None:
    redis.hset(keys.POLICY, mapping={"client_limit": 2, "client_limit:greedy": 1})
    assert [submit(redis, f"g{number}", client="greedy") for number in range(2)] == ["new", "client_full"]
    assert [submit(redis, f"o{number}", client="other") for number in range(3)] == ["new", "new", "client_full"]
    ledger.cancel(redis, "g0", QUEUE)
    assert submit(redis, "g9", client="greedy") == "new", "one that has ended does not count"


def test_the_front_is_short_and_is_filled_up_when_a_job_is_claimed(redis: Any) -> None:
    names = [f"job-{number:02}" for number in range(3 * ledger.FRONT)]
    for name in names:
        submit(redis, name)
    assert redis.llen(keys.front(QUEUE)) == ledger.FRONT
    assert take_all(redis) == names, "one client's jobs of one priority keep their order"


def test_a_better_priority_is_taken_first_also_past_a_full_front(redis: Any) -> None:
    for number in range(2 * ledger.FRONT):
        submit(redis, f"low-{number}", priority=9)
    for name, priority in (("five", 5), ("zero", 0), ("zero-2", 0)):
        submit(redis, name, priority=priority)
    taken = take_all(redis)
    assert taken[:3] == ["zero", "zero-2", "five"]
    assert taken[3:] == [f"low-{number}" for number in range(2 * ledger.FRONT)]


def test_training_has_one_message_at_the_front_and_a_better_one_takes_its_place(redis: Any) -> None:
    queue = keys.queue("toy", "train")
    submit(redis, "low", priority=9, queue=queue)
    submit(redis, "high", priority=1, queue=queue)
    assert redis.llen(keys.front(queue)) == 1
    assert take_all(redis, queue) == ["high", "low"]


def test_clients_share_a_queue_turn_by_turn(redis: Any) -> None:
    for number in range(40):
        submit(redis, f"bulk-{number}", client="bulk")
    for number in range(5):
        submit(redis, f"chat-{number}", client="chat")
    taken = take_all(redis)
    behind_the_front = taken[ledger.FRONT :]
    assert [name for name in behind_the_front[:10] if name.startswith("chat")] == [f"chat-{n}" for n in range(5)]
    assert len(taken) == 45


def test_waiting_lifts_a_job_by_one_priority_at_a_time(redis: Any) -> None:
    redis.hset(keys.POLICY, "ageing", 10)
    for number in range(ledger.FRONT):
        submit(redis, f"front-{number}", priority=0)
    submit(redis, "old", priority=9)
    submit(redis, "young", priority=7)
    grow_old(redis, "old", 35)
    submit(redis, "fresh", priority=5)
    assert take_all(redis)[ledger.FRONT :] == ["fresh", "old", "young"]


def test_what_has_aged_to_the_best_priority_takes_turns_with_what_was_sent_with_it(redis: Any) -> None:
    redis.hset(keys.POLICY, "ageing", 1)
    for number in range(ledger.FRONT):
        submit(redis, f"front-{number}", priority=0)
    for number in range(4):
        submit(redis, f"aged-{number}", priority=9)
        grow_old(redis, f"aged-{number}", 1000)
        submit(redis, f"fresh-{number}", priority=0)
    rest = take_all(redis)[ledger.FRONT :]
    assert sorted(rest[:4]) == ["aged-0", "aged-1", "fresh-0", "fresh-1"]


def test_a_job_that_waits_in_a_room_is_cancelled_there(redis: Any) -> None:
    for number in range(ledger.FRONT + 2):
        submit(redis, f"job-{number}")
    for number in (0, ledger.FRONT + 1):
        assert ledger.cancel(redis, f"job-{number}", QUEUE) == b"cancelled"
    assert take_all(redis) == [f"job-{number}" for number in range(1, ledger.FRONT + 1)]


def test_the_message_is_what_celery_itself_would_send(redis: Any, broker: Settings) -> None:
    with Celery(set_as_current=False) as app:
        app.conf.update(shared_config(broker))
        app.send_task("stoker.generate", task_id="job", queue=QUEUE)
    theirs = json.loads(redis.rpop(keys.front(QUEUE)))
    redis.delete(keys.front(QUEUE), *redis.keys("stoker:_kombu*"))
    submit(redis)
    ours = json.loads(redis.lindex(keys.front(QUEUE), 0))
    assert ours["properties"].pop("delivery_tag") == "job#1"
    for message, own in ((theirs, ("reply_to", "delivery_tag")), (ours, ("reply_to",))):
        for name in own:
            message["properties"].pop(name)
        for name in ("origin", "argsrepr"):
            message["headers"].pop(name)
    assert ours == theirs


def test_a_second_delivery_of_a_running_job_is_dropped(redis: Any) -> None:
    submit(redis)
    assert claim(redis, "one", "tag-1").state == "run"
    assert claim(redis, "two", "tag-2").state == "duplicate"
    assert redis.hget(keys.job("job"), "token") == b"one"


def test_the_same_delivery_again_means_that_its_owner_went_silent(redis: Any) -> None:
    submit(redis)
    assert not claim(redis, "one").resumed
    again = claim(redis, "two")
    assert (again.state, again.resumed) == ("run", True)
    assert settle(redis, "one") == 0, "the first owner is fenced"
    assert settle(redis, "two") == 1


def test_a_job_that_outlives_its_owners_too_often_is_dead(redis: Any) -> None:
    submit(redis)
    states = [claim(redis, str(number)).state for number in range(MAX_DEATHS + 1)]
    assert states == ["run"] * MAX_DEATHS + ["dead"]
    history = ledger.bury(redis, "job")
    assert [death["worker"] for death in history] == [f"worker-{number}" for number in range(MAX_DEATHS)]
    assert redis.hexists(keys.DEAD, "job")
    assert settle(redis, str(MAX_DEATHS)) == 1, "whoever buries it may end it"
    assert submit(redis) == "known"
    assert ledger.submit(redis, "job", record(), revive=True)[0] == b"new"
    assert ledger.submit(redis, "job", record(), revive=True)[0] == b"unknown", "a letter is sent again once"


def test_an_owner_that_gives_the_job_back_is_not_held_against_it(redis: Any) -> None:
    submit(redis)
    for number in range(2 * MAX_DEATHS):
        assert claim(redis, str(number)).state == "run"
        assert ledger.release(redis, "job", QUEUE, str(number)) == 1
    assert ledger.release(redis, "job", QUEUE, "stranger") == 0


@pytest.mark.parametrize("status", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_delivery_of_a_job_that_has_ended_is_dropped(redis: Any, status: str) -> None:
    submit(redis)
    redis.set(keys.result("job"), f'{{"status": "{status}"}}', ex=60)
    assert claim(redis, "late").state == "ended"


def test_cancelling_a_waiting_job_ends_it_without_a_worker(redis: Any) -> None:
    submit(redis)
    listener = redis.pubsub(ignore_subscribe_messages=True)
    listener.subscribe(keys.result("job"))
    listener.get_message(timeout=1)
    assert ledger.cancel(redis, "job", QUEUE) == b"cancelled"
    outcome = Outcome.parse(redis.get(keys.result("job")))
    assert outcome is not None
    assert outcome.status == JobStatus.CANCELLED
    assert listener.get_message(timeout=5) is not None, "who waits is told"
    listener.close()
    assert claim(redis, "late").state == "ended"
    assert ledger.cancel(redis, "job", QUEUE) == b"ended"
    assert not ledger.open_jobs(redis, [QUEUE])


def test_cancelling_a_running_job_asks_its_owner(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    redis.set(keys.worker("worker-one"), "{}", ex=60)
    assert ledger.cancel(redis, "job", QUEUE) == b"asked"
    assert redis.exists(keys.cancel("job")) == 1
    settle(redis, "one")
    assert redis.exists(keys.cancel("job")) == 0


def test_cancelling_what_nobody_knows_leaves_no_trace(redis: Any) -> None:
    assert ledger.cancel(redis, "job", QUEUE) == b"unknown"
    assert redis.dbsize() == 0


def test_a_job_without_owner_and_message_waits_again(redis: Any) -> None:
    submit(redis)
    assert ledger.recover(redis, QUEUE, 0) == [], "its message is at the front"
    redis.delete(keys.front(QUEUE))
    assert ledger.recover(redis, QUEUE, 60) == [], "a worker may have just taken it"
    assert ledger.recover(redis, QUEUE, 0) == [b"job"]
    assert json.loads(redis.lindex(keys.front(QUEUE), 0))["properties"]["delivery_tag"] == "job#2"
    assert take(redis) == "job"
    redis.set(keys.worker("worker"), "{}", ex=60)
    assert ledger.recover(redis, QUEUE, 0) == [], "it has an owner"


def test_a_message_that_is_lost_on_its_way_back_from_a_dead_owner_is_sent_again(redis: Any) -> None:
    """Found by the chaos suite: the lease of a dead worker ran out, and the next one died as it took the message."""
    submit(redis)
    redis.delete(keys.front(QUEUE))
    claim(redis, "one", "job#1")
    redis.set(keys.worker("worker-one"), "{}", ex=60)
    assert ledger.recover(redis, QUEUE, 0) == [], "its owner lives"
    redis.delete(keys.worker("worker-one"))
    redis.hset(keys.UNACKED, "job#1", "message")
    assert ledger.recover(redis, QUEUE, 0) == [], "its lease will bring it back"
    redis.delete(keys.UNACKED)
    assert ledger.recover(redis, QUEUE, 0) == [b"job"]
    assert settle(redis, "one") == 0, "should the owner come back, it is fenced"
    assert take(redis) == "job"
    assert [death["worker"] for death in json.loads(redis.hget(keys.job("job"), "history"))] == ["worker-one"]


def test_a_job_that_has_ended_never_comes_to_the_front_again(redis: Any) -> None:
    """A message that came back is not the one in the record, so ending the job leaves it where it stands."""
    queue = keys.queue("toy", "train")
    submit(redis, "ended", priority=9, queue=queue)
    message = json.loads(redis.rpop(keys.front(queue)))
    message["headers"]["redelivered"] = True
    redis.rpush(keys.front(queue), json.dumps(message))
    ledger.cancel(redis, "ended", queue)
    submit(redis, "better", priority=0, queue=queue)
    submit(redis, "last", priority=9, queue=queue)
    assert json.loads(redis.rpop(keys.front(queue)))["headers"]["id"] == "ended"
    assert Claim.parse(ledger.claim(redis, "ended", queue, "t", "ended#1", "w")).state == "ended"
    assert take_all(redis, queue) == ["better", "last"]


def test_a_front_that_a_dying_worker_left_empty_is_filled_up(redis: Any) -> None:
    for number in range(2 * ledger.FRONT):
        submit(redis, f"job-{number:02}")
    redis.delete(keys.front(QUEUE))
    ledger.recover(redis, QUEUE, 60)
    assert redis.llen(keys.front(QUEUE)) == ledger.FRONT
    ledger.recover(redis, QUEUE, 0)
    assert sorted(take_all(redis)) == [f"job-{number:02}" for number in range(2 * ledger.FRONT)]


def test_what_has_lost_its_record_is_no_open_job(redis: Any) -> None:
    submit(redis)
    redis.delete(keys.job("job"), keys.front(QUEUE))
    assert ledger.recover(redis, QUEUE, 0) == []
    assert redis.zcard(keys.open_jobs(QUEUE)) == 0


def test_the_result_is_stored_in_the_step_that_ends_the_job(redis: Any) -> None:
    submit(redis)
    assert claim(redis, "one").request == '{"prompt": "x"}'
    assert settle(redis, "one") == 1
    outcome = Outcome.parse(redis.get(keys.result("job")))
    assert outcome is not None
    assert outcome.status == JobStatus.DONE
    assert not redis.hexists(keys.job("job"), "request")
    assert settle(redis, "two") == 0


def test_a_job_whose_owner_is_silent_is_cancelled_at_once(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    assert ledger.cancel(redis, "job", QUEUE) == b"cancelled"
    assert settle(redis, "one") == 0, "should its owner come back, it is fenced"


def test_the_age_counts_from_the_submission_by_the_brokers_clock(redis: Any) -> None:
    submit(redis)
    redis.hset(keys.job("job"), "submitted", "1.0")
    assert claim(redis, "one").age > 1e9
