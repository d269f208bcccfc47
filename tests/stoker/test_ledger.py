"""The ledger's transitions, on a real broker."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from celery import Celery
from redis.exceptions import ResponseError

from stoker.broker import keys, ledger, policy
from stoker.broker.envelope import envelope
from stoker.broker.ledger import LETTERS_AT_ONCE, MAX_CRASHES
from stoker.broker.ledger.record import Field
from stoker.broker.ledger.replies import Claim, Crash, DeadLettered
from stoker.broker.outcome import JobStatus, Outcome
from stoker.celery_config import shared_config
from stoker.contract.kinds import READY, TRAIN
from stoker.errors import DeadlineExceeded
from stoker.settings import Settings
from tests.conftest import wait_until

QUEUE = keys.queue("toy", "generate")
#: What the presence of a worker says that takes jobs of the queue.
TAKES = '{"models": [{"model": "toy"}]}'


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


def submit(redis: Any, job_id: str = "job", **fields: Any) -> str:
    return ledger.submit(redis, job_id, record(job_id, **fields)).state


def claim(redis: Any, token: str, tag: str = "tag") -> Claim:
    return ledger.claim(redis, "job", QUEUE, token, tag, f"worker-{token}")


def complete(redis: Any, token: str) -> bool:
    return ledger.complete(redis, "job", QUEUE, token, ledger.success("job", {}))


def take(redis: Any, queue: str = QUEUE) -> str | None:
    """What a worker does: pop the next message, and claim its job."""
    message = redis.rpop(keys.ready(queue))
    if message is None:
        return None
    job_id: str = json.loads(message)["headers"]["id"]
    tag = json.loads(message)["properties"]["delivery_tag"]
    assert ledger.claim(redis, job_id, queue, f"token-{job_id}", tag, "worker").state == "run"
    return job_id


def take_all(redis: Any, queue: str = QUEUE) -> list[str]:
    return list(iter(lambda: take(redis, queue), None))


def tags_of_the_ready_list(redis: Any) -> list[str]:
    messages = redis.lrange(keys.ready(QUEUE), 0, -1)
    return [json.loads(message)["properties"]["delivery_tag"] for message in messages]


def grow_old(redis: Any, job_id: str, seconds: float) -> None:
    key = keys.job(job_id)
    redis.hset(key, Field.SUBMITTED, float(redis.hget(key, Field.SUBMITTED)) - seconds)


def test_a_job_is_submitted_once(redis: Any) -> None:
    assert submit(redis) == "new"
    assert submit(redis) == "known"
    assert list(ledger.open_jobs(redis, [QUEUE])) == ["job"]
    assert redis.llen(keys.ready(QUEUE)) == 1


def test_a_full_queue_takes_nothing(redis: Any) -> None:
    redis.hset(keys.POLICY, "queue_limit", 2)
    assert [submit(redis, name) for name in "ab"] == ["new", "new"]
    reply = ledger.submit(redis, "c", record("c"))
    assert (reply.state, reply.depth, reply.limit, reply.is_full) == ("full", 2, 2, True)
    assert reply.wait >= 1
    assert not redis.exists(keys.job("c"))
    take(redis)
    assert submit(redis, "c") == "new", "who runs does not wait"


@pytest.mark.parametrize(("interval", "wait"), [("86400", 3600), ("0.001", 1), ("0", 1), ("7", 7 * 2), ("no pace", 2)])
def test_the_wait_for_a_full_queue_is_by_its_pace_and_a_second_to_an_hour(
    redis: Any, interval: str, wait: float
) -> None:
    """Until so many have ended that one more may wait; a client that reads 0 would ask without a pause."""
    for name in "ab":
        submit(redis, name)
    redis.hset(keys.POLICY, "queue_limit", 1)
    redis.hset(keys.pace(QUEUE), "interval", interval)
    redis.expire(keys.pace(QUEUE), 60)
    assert ledger.submit(redis, "c", record("c")).wait == wait


def test_the_wait_of_a_client_is_that_for_its_share_of_the_queue(redis: Any) -> None:
    """Of ten jobs that wait a client has two: one in five of those that end is its own."""
    redis.hset(keys.POLICY, "client_limit:small", 2)
    redis.hset(keys.pace(QUEUE), "interval", 7)
    redis.expire(keys.pace(QUEUE), 60)
    for number in range(8):
        submit(redis, f"other-{number}", client="other")
    assert [submit(redis, name, client="small") for name in "ab"] == ["new", "new"]
    reply = ledger.submit(redis, "c", record("c", client="small"))
    assert (reply.state, reply.wait) == ("client_full", 7 * 10 / 2)


def test_the_first_end_in_a_queue_is_no_pace_yet(redis: Any) -> None:
    """There is none before it, from which the time could be counted."""
    submit(redis)
    take(redis)
    assert complete(redis, "token-job")
    assert float(redis.hget(keys.pace(QUEUE), "interval")) == 0


def test_the_pace_is_a_mean_that_one_slow_job_hardly_moves(redis: Any) -> None:
    submit(redis)
    take(redis)
    redis.hset(keys.pace(QUEUE), mapping={"last": redis.time()[0] - 1000, "interval": 10})
    assert complete(redis, "token-job")
    assert float(redis.hget(keys.pace(QUEUE), "interval")) == pytest.approx(0.9 * 10 + 0.1 * 1000, abs=2)


def test_a_client_has_a_limit_of_its_own(redis: Any) -> None:
    redis.hset(keys.POLICY, mapping={"client_limit": 2, "client_limit:greedy": 1})
    assert [submit(redis, f"g{number}", client="greedy") for number in range(2)] == ["new", "client_full"]
    assert [submit(redis, f"o{number}", client="other") for number in range(3)] == ["new", "new", "client_full"]
    ledger.cancel(redis, "g0", QUEUE)
    assert submit(redis, "g9", client="greedy") == "new", "one that has ended does not count"


def test_the_ready_list_is_short_and_is_filled_up_when_a_job_is_claimed(redis: Any) -> None:
    names = [f"job-{number:02}" for number in range(3 * READY)]
    for name in names:
        submit(redis, name)
    assert redis.llen(keys.ready(QUEUE)) == READY
    assert take_all(redis) == names, "one client's jobs of one priority keep their order"


def test_a_better_priority_is_taken_first_also_past_a_full_ready_list(redis: Any) -> None:
    for number in range(2 * READY):
        submit(redis, f"low-{number}", priority=9)
    for name, priority in (("five", 5), ("zero", 0), ("zero-2", 0)):
        submit(redis, name, priority=priority)
    taken = take_all(redis)
    assert taken[:3] == ["zero", "zero-2", "five"]
    assert taken[3:] == [f"low-{number}" for number in range(2 * READY)]


def test_training_has_one_message_in_the_ready_list_and_a_better_one_takes_its_place(redis: Any) -> None:
    queue = keys.queue("toy", "train")
    submit(redis, "low", priority=9, queue=queue)
    submit(redis, "high", priority=1, queue=queue)
    assert redis.llen(keys.ready(queue)) == 1
    assert take_all(redis, queue) == ["high", "low"]


def test_clients_share_a_queue_turn_by_turn(redis: Any) -> None:
    for number in range(40):
        submit(redis, f"bulk-{number}", client="bulk")
    for number in range(5):
        submit(redis, f"chat-{number}", client="chat")
    taken = take_all(redis)
    behind_the_ready_list = taken[READY:]
    assert [name for name in behind_the_ready_list[:10] if name.startswith("chat")] == [f"chat-{n}" for n in range(5)]
    assert len(taken) == 45


def test_waiting_lifts_a_job_by_one_priority_at_a_time(redis: Any) -> None:
    redis.hset(keys.POLICY, "ageing", 10)
    for number in range(READY):
        submit(redis, f"ahead-{number}", priority=0)
    submit(redis, "old", priority=9)
    submit(redis, "young", priority=7)
    grow_old(redis, "old", 35)
    submit(redis, "fresh", priority=5)
    assert take_all(redis)[READY:] == ["fresh", "old", "young"]


def take_all_of_a_crowd_except(redis: Any, left: int) -> None:
    """Nobody waits behind the ready list then, so that turns begin anew."""
    for number in range(3 * READY):
        submit(redis, f"a-{number:02}", client="a")
    for _ in range(3 * READY - left):
        take(redis)
    assert not redis.exists(keys.turns(QUEUE))


@pytest.mark.parametrize("later", ["a", "b"])
def test_a_job_that_made_way_does_not_wait_behind_all_that_came_later(redis: Any, later: str) -> None:
    take_all_of_a_crowd_except(redis, READY - 1)
    last = f"a-{3 * READY - 1}"
    for number in range(2):
        submit(redis, f"urgent-{number}", priority=0)
    assert redis.zscore(keys.backlog(QUEUE, 5), last) == 0, "it has made way"
    for number in range(2 * READY):
        submit(redis, f"later-{number}", client=later)
    order = take_all(redis)
    assert order.index(last) < order.index("later-0")


def test_a_job_whose_owner_died_does_not_wait_behind_all_that_came_later(redis: Any) -> None:
    take_all_of_a_crowd_except(redis, 1)
    redis.rpop(keys.ready(QUEUE))
    for number in range(3 * READY):
        submit(redis, f"later-{number:02}", client="b")
    lost = f"a-{3 * READY - 1}"
    assert lost in ledger.recover(redis, QUEUE, 0)
    order = take_all(redis)
    assert order.index(lost) < order.index(f"later-{READY:02}")


def test_what_has_aged_to_the_best_priority_takes_turns_with_what_was_sent_with_it(redis: Any) -> None:
    redis.hset(keys.POLICY, "ageing", 1)
    for number in range(READY):
        submit(redis, f"ahead-{number}", priority=0)
    for number in range(4):
        submit(redis, f"aged-{number}", priority=9)
        grow_old(redis, f"aged-{number}", 1000)
        submit(redis, f"fresh-{number}", priority=0)
    rest = take_all(redis)[READY:]
    assert sorted(rest[:4]) == ["aged-0", "aged-1", "fresh-0", "fresh-1"]


def test_a_job_that_waits_in_the_backlog_is_cancelled_there(redis: Any) -> None:
    for number in range(READY + 2):
        submit(redis, f"job-{number}")
    for number in (0, READY + 1):
        assert ledger.cancel(redis, f"job-{number}", QUEUE) == "cancelled"
    assert take_all(redis) == [f"job-{number}" for number in range(1, READY + 1)]


def test_the_message_is_what_celery_itself_would_send(redis: Any, broker: Settings) -> None:
    with Celery(set_as_current=False) as app:
        app.conf.update(shared_config(broker))
        with app.connection_for_write() as connection:
            app.send_task("stoker.generate", task_id="job", queue=QUEUE, connection=connection)
    theirs = json.loads(redis.rpop(keys.ready(QUEUE)))
    redis.delete(keys.ready(QUEUE), *redis.keys("stoker:_kombu*"))
    submit(redis)
    ours = json.loads(redis.lindex(keys.ready(QUEUE), 0))
    assert re.fullmatch("job#[0-9]{16}", ours["properties"].pop("delivery_tag"))
    for message, own in ((theirs, ("reply_to", "delivery_tag")), (ours, ("reply_to",))):
        for name in own:
            message["properties"].pop(name)
        for name in ("origin", "argsrepr"):
            message["headers"].pop(name)
    assert ours == theirs


def test_a_job_stays_where_another_program_wrote_in_the_place_of_the_other_workers_messages(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    redis.set(keys.placed(QUEUE, "other"), "x", ex=keys.PLACED_TTL)
    assert ledger.pass_on(redis, "job", QUEUE, "one", "other") == "stays"
    assert complete(redis, "one")


@pytest.mark.parametrize("needed", [False, True])
def test_a_job_that_has_ended_or_is_to_end_is_passed_on_to_nobody(redis: Any, needed: bool) -> None:
    submit(redis)
    claim(redis, "one")
    redis.set(keys.worker("worker-one"), TAKES, ex=keys.PRESENCE_TTL)
    assert ledger.cancel(redis, "job", QUEUE) == "asked"
    assert ledger.pass_on(redis, "job", QUEUE, "one", "other", needed=needed) == "stays"
    assert complete(redis, "one")
    assert ledger.pass_on(redis, "job", QUEUE, "one", "other", needed=needed) == "fenced"
    assert not redis.exists(keys.placed(QUEUE, "other"))


def test_a_job_that_came_back_and_runs_is_recalled_to_nobody(redis: Any) -> None:
    submit(redis)
    raw = redis.rpop(keys.ready(QUEUE))
    claim(redis, "one", "tag")
    assert ledger.pass_on(redis, "job", QUEUE, "one", "other") == "passed"
    redis.rpush(keys.ready(QUEUE), raw)
    assert claim(redis, "two", "tag").state == "run"
    redis.rpop(keys.ready(QUEUE))
    assert not ledger.recall(redis, "job", QUEUE, "other")
    assert not redis.exists(keys.placed(QUEUE, "other"), keys.ready(QUEUE))


def test_a_job_that_was_passed_on_is_passed_on_again_where_its_owner_cannot_run_it_alone(redis: Any) -> None:
    submit(redis)
    claim(redis, "one", "first")
    assert ledger.pass_on(redis, "job", QUEUE, "one", "small") == "passed"
    claim(redis, "two", "second")
    assert ledger.pass_on(redis, "job", QUEUE, "two", "large") == "stays"
    assert ledger.pass_on(redis, "job", QUEUE, "two", "large", needed=True) == "passed"
    assert redis.llen(keys.placed(QUEUE, "large")) == 1
    claimed = claim(redis, "three", "third")
    assert (claimed.state, claimed.resumed, claimed.attempt) == ("run", False, 1)


@pytest.fixture
def waits_for_large(redis: Any) -> str:
    """The list where `job` waits for a worker that alone can run it."""
    submit(redis)
    assert take(redis) == "job"
    redis.set(keys.worker("large"), TAKES, ex=keys.PRESENCE_TTL)
    assert ledger.pass_on(redis, "job", QUEUE, "token-job", "large", needed=True) == "passed"
    return keys.placed(QUEUE, "large")


def test_a_job_that_one_worker_alone_can_run_waits_there_in_its_turn_however_long_that_is_busy(
    redis: Any, waits_for_large: str
) -> None:
    messages = redis.lrange(waits_for_large, 0, -1)
    for _ in range(3):
        assert ledger.recover(redis, QUEUE, 0) == ()
    assert redis.lrange(waits_for_large, 0, -1) == messages, "no other worker sends it there again"
    assert not redis.exists(keys.ready(QUEUE))
    assert_lifetimes(redis, {waits_for_large: keys.PENDING_TTL})
    assert claim(redis, "large", json.loads(redis.rpop(waits_for_large))["properties"]["delivery_tag"]).state == "run"
    redis.set(keys.worker("worker-large"), "{}", ex=keys.PRESENCE_TTL)
    assert ledger.recover(redis, QUEUE, 0) == (), "its owner lives"


@pytest.mark.parametrize(
    "says",
    [
        "",
        '{"models": [{"model": "other"}]}',
        '{"models": [{"model": "toy"}], "stopping": true}',
        '{"models": [7]}',
        "x",
    ],
    ids=["dead", "has the model no more", "stops", "no presence", "no JSON"],
)
def test_a_job_whose_only_worker_takes_none_any_more_is_anyones_again(
    redis: Any, waits_for_large: str, says: str
) -> None:
    redis.set(keys.worker("large"), says, ex=keys.PRESENCE_TTL) if says else redis.delete(keys.worker("large"))
    assert ledger.recover(redis, QUEUE, 0) == ("job",)
    assert not redis.exists(waits_for_large), "it stands nowhere else"
    assert take(redis) == "job"


def test_a_job_that_waits_for_one_worker_and_whose_message_is_gone_is_found(redis: Any, waits_for_large: str) -> None:
    redis.delete(waits_for_large)
    redis.set(waits_for_large, "another program's", ex=60)
    assert ledger.recover(redis, QUEUE, 0) == ("job",)
    assert take(redis) == "job"


def test_a_job_that_is_recalled_soon_shortens_no_life_of_one_that_waits_in_the_same_list(
    redis: Any, waits_for_large: str
) -> None:
    submit(redis, "other")
    assert take(redis) == "other"
    assert ledger.pass_on(redis, "other", QUEUE, "token-other", "large") == "passed"
    assert_lifetimes(redis, {waits_for_large: keys.PENDING_TTL})
    assert ledger.recover(redis, QUEUE, 0) == ("other",), "which any worker can run"


def test_a_job_that_an_owner_crashed_with_before_counts_as_resumed_where_it_is_passed_on(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    claim(redis, "two")
    assert ledger.pass_on(redis, "job", QUEUE, "two", "other") == "passed"
    redis.delete(keys.placed(QUEUE, "other"))
    claimed = claim(redis, "three")
    assert (claimed.resumed, claimed.attempt) == (True, 2)


def test_every_owner_of_a_job_hears_when_it_was_submitted(redis: Any) -> None:
    submit(redis)
    first = claim(redis, "one")
    assert first.submitted == float(redis.hget(keys.job("job"), Field.SUBMITTED))
    assert claim(redis, "two").submitted == first.submitted


def test_the_next_owner_of_a_job_that_was_passed_on_knows_that_another_had_it(redis: Any) -> None:
    submit(redis)
    assert not claim(redis, "one").passed
    assert ledger.pass_on(redis, "job", QUEUE, "one", "other") == "passed"
    redis.delete(keys.placed(QUEUE, "other"))
    assert claim(redis, "two").passed


def test_a_job_that_a_broker_took_whose_clock_was_ahead_has_not_waited_less_than_nothing(redis: Any) -> None:
    submit(redis)
    grow_old(redis, "job", -3600)
    assert claim(redis, "one").age == 0


def test_a_second_delivery_of_a_running_job_is_dropped(redis: Any) -> None:
    submit(redis)
    assert claim(redis, "one", "tag-1").state == "run"
    assert claim(redis, "two", "tag-2").state == "duplicate"
    assert redis.hget(keys.job("job"), Field.TOKEN) == b"one"


def test_the_same_delivery_again_means_that_its_owner_went_silent(redis: Any) -> None:
    submit(redis)
    assert not claim(redis, "one").resumed
    again = claim(redis, "two")
    assert (again.state, again.resumed) == ("run", True)
    assert complete(redis, "one") == 0, "the first owner is fenced"
    assert complete(redis, "two") == 1


def test_a_claim_that_is_sent_again_because_its_answer_was_lost_is_the_same_owner(redis: Any) -> None:
    submit(redis)
    policy.decide(redis, "crashes", 1)
    found = [claim(redis, token) for token in ("one", "one", "two", "two")]
    assert [(one.state, one.attempt, one.resumed) for one in found] == [("run", 1, False)] * 2 + [("dead", 2, True)] * 2
    assert [crash.worker for crash in ledger.dead_letter(redis, "job", QUEUE, "two").history] == ["worker-one"]


def test_a_job_that_outlives_its_owners_too_often_is_dead(redis: Any) -> None:
    submit(redis)
    states = [claim(redis, str(number)).state for number in range(MAX_CRASHES + 1)]
    assert states == ["run"] * MAX_CRASHES + ["dead"]
    history = ledger.dead_letter(redis, "job", QUEUE, str(MAX_CRASHES)).history
    assert [crash.worker for crash in history] == [f"worker-{number}" for number in range(MAX_CRASHES)]
    assert redis.hexists(keys.DEAD, "job")
    assert complete(redis, str(MAX_CRASHES)) == 1, "its owner may end it"
    assert submit(redis) == "known"
    assert ledger.submit(redis, "job", record(), revive=True).state == "new"
    assert ledger.submit(redis, "job", record(), revive=True).state == "unknown", "a letter is sent again once"


def test_a_dead_job_that_is_sent_again_begins_as_if_it_were_new(redis: Any) -> None:
    submit(redis)
    for number in range(MAX_CRASHES + 1):
        claim(redis, str(number))
    ledger.dead_letter(redis, "job", QUEUE, str(MAX_CRASHES))
    complete(redis, str(MAX_CRASHES))
    assert redis.exists(keys.result("job"))
    redis.set(keys.cancel("job"), "1", ex=60)
    assert ledger.submit(redis, "job", record(), revive=True).state == "new"
    assert not redis.exists(keys.result("job"), keys.cancel("job"))
    first = claim(redis, "again")
    assert (first.state, first.resumed, first.cancelled) == ("run", False, False)
    assert [claim(redis, str(number)).state for number in range(MAX_CRASHES)] == ["run"] * (MAX_CRASHES - 1) + ["dead"]


def test_a_dead_job_that_is_sent_again_stays_in_its_trace_and_goes_on_to_count_its_owners(redis: Any) -> None:
    traced = record() | {"traceparent": "00-1-2-01", "tracestate": "a=b"}
    assert ledger.submit(redis, "job", traced).state == "new"
    first = claim(redis, "one")
    assert (first.attempt, first.traceparent, first.tracestate) == (1, "00-1-2-01", "a=b")
    ledger.dead_letter(redis, "job", QUEUE, "one")
    complete(redis, "one")
    assert ledger.submit(redis, "job", record(), revive=True).state == "new"
    again = claim(redis, "two")
    assert (again.attempt, again.traceparent, again.tracestate) == (2, "00-1-2-01", "a=b")


@pytest.mark.parametrize("kind", ["generate", "train"])
def test_a_dead_job_that_is_sent_again_streams_none_of_its_old_tokens_and_a_run_its_reports(
    redis: Any, kind: str
) -> None:
    queue, stream = keys.queue("toy", kind), keys.stream("job")
    sent = {**record(queue=queue), "kind": kind, "message": envelope("job", kind, "toy", queue)}
    assert ledger.submit(redis, "job", sent).state == "new"
    ledger.claim(redis, "job", queue, "one", "tag", "worker")
    redis.xadd(stream, {"entry": "old"}, keys.entry_id(0))
    redis.expire(stream, 1000)
    ledger.dead_letter(redis, "job", queue, "one")
    ledger.complete(redis, "job", queue, "one", ledger.success("job", {}))
    assert redis.exists(stream), "of a dead job it stays"
    assert ledger.submit(redis, "job", sent, revive=True).state == "new"
    assert redis.exists(stream) == (kind == "train")


@pytest.mark.parametrize("runs", [False, True])
def test_the_retry_of_a_dead_job_that_was_sent_anew_changes_nothing(redis: Any, runs: bool) -> None:
    """Found by 20,000 examples of the model: a letter is kept for a month, the record of its job for a day."""
    submit(redis)
    claim(redis, "one")
    ledger.dead_letter(redis, "job", QUEUE, "one")
    complete(redis, "one")
    redis.delete(keys.job("job"), keys.result("job"))
    assert submit(redis, client="anew") == "new"
    if runs:
        claim(redis, "two", tags_of_the_ready_list(redis)[0])
    before = redis.hgetall(keys.job("job"))
    assert ledger.submit(redis, "job", record(client="again"), revive=True).state == "known"
    assert redis.hgetall(keys.job("job")) == before
    assert redis.hexists(keys.DEAD, "job"), "the letter stays"
    assert not runs or complete(redis, "two")


def test_a_retried_job_is_known_on_for_what_it_was_asked_for(redis: Any) -> None:
    ledger.submit(redis, "job", record() | {Field.ASKED: "digest"})
    claim(redis, "one")
    ledger.dead_letter(redis, "job", QUEUE, "one")
    complete(redis, "one")
    letter = redis.hget(keys.DEAD, "job")
    assert ledger.submit(redis, "job", record(), revive=True).state == "new"
    assert redis.hget(keys.job("job"), Field.ASKED) == b"digest"
    # The record of a dead job expires before its letter does, and another job may have its id then.
    redis.delete(keys.job("job"))
    ledger.submit(redis, "job", record() | {Field.ASKED: "another"})
    claim(redis, "two")
    complete(redis, "two")
    redis.hset(keys.DEAD, "job", letter)
    assert ledger.submit(redis, "job", record(), revive=True).state == "new"
    assert redis.hget(keys.job("job"), Field.ASKED) is None


def test_a_message_of_an_expired_record_is_another_delivery_than_that_of_the_next(redis: Any) -> None:
    """Found by 20,000 examples of the model: the ready list does not expire, and the job came again after a week."""
    submit(redis)
    redis.delete(keys.job("job"))
    assert submit(redis) == "new"
    later, earlier = tags_of_the_ready_list(redis)
    assert later != earlier
    assert claim(redis, "one", earlier).state == "run", "the job is the same"
    assert claim(redis, "two", later).state == "duplicate", "its owner has not gone silent"


def test_a_job_that_is_sent_again_with_another_priority_waits_once(redis: Any) -> None:
    """Found by 20,000 examples of the model: a backlog may live longer than a record in it. The id that was left there
    filled the ready list with messages of the one job, for as long as it ran."""
    names = [f"before-{number}" for number in range(READY + 1)]
    for name in names:
        submit(redis, name)
    submit(redis, priority=5)
    redis.delete(keys.job("job"))
    assert submit(redis, priority=0) == "new"
    assert redis.zscore(keys.backlog(QUEUE, 5), "job") is None, "it does not count twice for the queue's limit"
    assert sorted(take_all(redis)) == sorted([*names, "job"])


def test_an_id_whose_record_expired_in_a_backlog_does_not_count_for_the_queues_limit(redis: Any) -> None:
    for number in range(READY + 3):
        submit(redis, f"job-{number}")
    redis.delete(keys.job(f"job-{READY + 1}"))
    ledger.recover(redis, QUEUE, 3600)
    assert redis.zrange(keys.backlog(QUEUE, 5), 0, -1) == [f"job-{READY + n}".encode() for n in (0, 2)]


def test_ids_whose_records_expired_at_one_time_leave_their_backlogs_together(redis: Any) -> None:
    names = [f"job-{number}" for number in range(READY + 1)]
    for name in names:
        submit(redis, name)
    seconds, _ = redis.time()
    forgotten = {f"forgotten-{number}": 1000 + number for number in range(150)}
    redis.zadd(keys.backlog(QUEUE, 5), forgotten)
    redis.zadd(keys.open_jobs(QUEUE), dict.fromkeys(forgotten, seconds - keys.PENDING_TTL - 1))
    ledger.recover(redis, QUEUE, 3600)
    assert redis.zrange(keys.backlog(QUEUE, 5), 0, -1) == [names[-1].encode()]


def test_a_job_that_waits_again_after_a_week_of_work_stays_in_its_backlog(redis: Any) -> None:
    """Each claim gave its record its whole life again."""
    for number in range(READY + 1):
        submit(redis, f"job-{number}")
    last = f"job-{READY}"
    redis.zadd(keys.open_jobs(QUEUE), {last: redis.time()[0] - keys.PENDING_TTL - 1})
    ledger.recover(redis, QUEUE, 3600)
    assert redis.zrange(keys.backlog(QUEUE, 5), 0, -1) == [last.encode()]


def test_a_message_of_a_dead_job_is_another_delivery_than_that_of_its_retry(redis: Any) -> None:
    submit(redis)
    (tag,) = tags_of_the_ready_list(redis)
    claim(redis, "one", tag)
    ledger.dead_letter(redis, "job", QUEUE, "one")
    complete(redis, "one")
    # As though the broker's clock had been set back.
    ahead = int(redis.hget(keys.job("job"), Field.SENT)) + 10**12
    redis.hset(keys.job("job"), Field.SENT, ahead)
    assert ledger.submit(redis, "job", record(), revive=True).state == "new"
    assert tags_of_the_ready_list(redis)[0] == f"job#{ahead + 1}"


def test_an_owner_that_gives_the_job_back_is_not_held_against_it(redis: Any) -> None:
    submit(redis)
    for number in range(2 * MAX_CRASHES):
        assert claim(redis, str(number)).state == "run"
        assert ledger.release(redis, "job", QUEUE, str(number)) == 1
    assert ledger.release(redis, "job", QUEUE, "stranger") == 0
    assert "worker" not in ledger.open_jobs(redis, [QUEUE])["job"]


def test_a_crash_without_a_word_does_not_have_the_trouble_of_the_one_before(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    ledger.note_trouble(redis, "job", "a driver that hangs")
    claim(redis, "two")
    claim(redis, "three")
    letter = ledger.dead_letter(redis, "job", QUEUE, "three")
    assert [(crash.worker, crash.trouble) for crash in letter.history] == [
        ("worker-one", "a driver that hangs"),
        ("worker-two", None),
    ]


@pytest.mark.parametrize("kind", ["dataset", "adapter"])
def test_a_run_that_takes_longer_than_a_job_may_wait_keeps_its_record_and_its_input(redis: Any, kind: str) -> None:
    blob = keys.blob(f"{kind}:job:1")
    ledger.submit(redis, "job", {**record(), "blob": blob}, b"data")
    take(redis)
    redis.set(keys.worker("worker"), "alive", ex=keys.PRESENCE_TTL)
    kept = (keys.job("job"), keys.open_jobs(QUEUE), keys.dispatched(QUEUE), keys.sizes(QUEUE), blob)
    for key in kept:
        redis.expire(key, 100)
    assert ledger.recover(redis, QUEUE, 0) == ()
    assert max(map(redis.ttl, kept)) <= 100, "one that is young has time yet"
    long_ago = redis.time()[0] - keys.PENDING_TTL - 10
    redis.hset(keys.job("job"), Field.SUBMITTED, f"{long_ago}.0")
    redis.zadd(keys.open_jobs(QUEUE), {"job": long_ago})
    redis.zadd(keys.dispatched(QUEUE), {"job": long_ago})
    assert ledger.recover(redis, QUEUE, 0) == ()
    assert min(map(redis.ttl, kept)) > keys.PENDING_TTL - 100
    assert list(ledger.open_jobs(redis, [QUEUE])) == ["job"], "it is listed on"
    redis.delete(keys.worker("worker"))
    for key in kept:
        redis.expire(key, 100)
    assert ledger.recover(redis, QUEUE, 0) == ("job",)
    assert redis.ttl(keys.job("job")) <= 100, "one that waits has its time"


def test_a_run_keeps_no_input_that_is_another_jobs(redis: Any) -> None:
    other = keys.blob("dataset:other:1")
    redis.set(other, "data", ex=100)
    submit(redis)
    take(redis)
    redis.set(keys.worker("worker"), "alive", ex=keys.PRESENCE_TTL)
    redis.hset(keys.job("job"), mapping={Field.BLOB: other, Field.SUBMITTED: "1.0"})
    redis.zadd(keys.dispatched(QUEUE), {"job": 1.0})
    assert ledger.recover(redis, QUEUE, 0) == ()
    assert redis.ttl(other) <= 100


def aged_letter(age: float) -> str:
    """Of a job whose last owner gave it up so many seconds ago, as `dead_letter` writes it."""
    history = [{"worker": "w", "time": time.time() - age - 100}, {"worker": "w", "time": time.time() - age}]
    return json.dumps({"history": history, "kind": "generate", "model": "toy", "request": "{}", "client": "default"})


def test_a_dead_letter_is_kept_for_its_time_also_where_others_come_after_it(redis: Any) -> None:
    kept = {"young": aged_letter(keys.DEAD_TTL - 50), "spoiled": "garbage", "list": '{"history": {"time": 1}}'}
    kept |= {"none": '{"history": []}', "odd": '{"history": [{"worker": "w", "time": "x"}]}'}
    redis.hset(keys.DEAD, mapping={"old": aged_letter(keys.DEAD_TTL + 10), **kept})
    submit(redis)
    claim(redis, "one")
    ledger.dead_letter(redis, "job", QUEUE, "one", "worker-one", "its disk is full")
    assert ledger.forget_letters(redis) == 1
    assert {name.decode() for name in redis.hkeys(keys.DEAD)} == {*kept, "job"}
    assert ledger.forget_letters(redis) == 0


def test_of_many_dead_letters_some_are_looked_at_in_one_go_and_all_in_time(redis: Any) -> None:
    assert ledger.forget_letters(redis) == 0
    many = 2 * LETTERS_AT_ONCE
    redis.hset(keys.DEAD, mapping={str(number): aged_letter(keys.DEAD_TTL + 10) for number in range(many)})
    redis.expire(keys.DEAD, keys.DEAD_TTL)
    assert ledger.forget_letters(redis) == LETTERS_AT_ONCE
    redis.hset(keys.DEAD, mapping={f"young-{number}": aged_letter(0) for number in range(many)})
    wait_until(lambda: ledger.forget_letters(redis) >= 0 and redis.hlen(keys.DEAD) == many, "the old ones are gone")


def test_all_jobs_of_a_worker_that_died_are_recovered_at_once(redis: Any) -> None:
    names = [f"job-{number:02}" for number in range(3 * READY)]
    for name in names:
        submit(redis, name)
    assert take_all(redis) == names
    assert sorted(ledger.recover(redis, QUEUE, 0)) == names


@pytest.mark.parametrize("said", ["a file \udcff", "\0", "\ud83d\ude00", "e\u0301", "[" * 900 + "]" * 900])
def test_a_job_that_ended_with_any_text_stays_as_it_ended(redis: Any, said: str) -> None:
    submit(redis)
    claim(redis, "one")
    value = {"deep": json.loads(said)} if said.startswith("[") else {"text": said}
    assert ledger.complete(redis, "job", QUEUE, "one", ledger.success("job", value))
    before = redis.get(keys.result("job"))
    assert ledger.cancel(redis, "job", QUEUE) == "ended"
    assert claim(redis, "two", "another").state == "ended"
    assert redis.get(keys.result("job")) == before


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
    assert ledger.cancel(redis, "job", QUEUE) == "cancelled"
    outcome = Outcome.parse(redis.get(keys.result("job")))
    assert outcome is not None
    assert outcome.status == JobStatus.CANCELLED
    assert listener.get_message(timeout=5) is not None, "who waits hears it"
    listener.close()
    assert claim(redis, "late").state == "ended"
    assert ledger.cancel(redis, "job", QUEUE) == "ended"
    assert not ledger.open_jobs(redis, [QUEUE])


def test_cancelling_a_running_job_asks_its_owner(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    redis.set(keys.worker("worker-one"), "{}", ex=keys.PRESENCE_TTL)
    assert ledger.cancel(redis, "job", QUEUE) == "asked"
    assert redis.exists(keys.cancel("job")) == 1
    complete(redis, "one")
    assert redis.exists(keys.cancel("job")) == 0


def test_the_owner_of_a_running_job_is_nudged_by_a_cancel_and_nobody_by_that_of_one_that_waits(redis: Any) -> None:
    """Else it would learn of it at its next look, a second later."""
    submit(redis)
    submit(redis, "waits")
    redis.set(keys.worker("worker-one"), "{}", ex=keys.PRESENCE_TTL)
    claim(redis, "one")
    with closing(redis.pubsub(ignore_subscribe_messages=True)) as pubsub:
        pubsub.subscribe(keys.CANCELS)
        pubsub.get_message(timeout=10)
        assert ledger.cancel(redis, "waits", QUEUE) == "cancelled"
        assert ledger.cancel(redis, "job", QUEUE) == "asked"
        message = pubsub.get_message(timeout=10)
    assert message is not None
    assert message["data"] == b"job"


def test_the_next_owner_learns_of_a_cancel_that_its_predecessor_was_asked_for(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    redis.set(keys.worker("worker-one"), "{}", ex=keys.PRESENCE_TTL)
    assert ledger.cancel(redis, "job", QUEUE) == "asked"
    assert claim(redis, "two").cancelled


def test_a_job_that_is_sent_again_is_not_cancelled_by_a_cancel_of_the_one_before(redis: Any) -> None:
    """Found by 20,000 examples of the model: the record expired as its owner ran it, and the mark was younger."""
    submit(redis)
    redis.set(keys.cancel("job"), "1", ex=60)
    redis.delete(keys.job("job"))
    assert submit(redis) == "new"
    assert not claim(redis, "one").cancelled


@pytest.mark.parametrize(
    "end",
    [
        lambda redis: ledger.cancel(redis, "job-0", QUEUE) == "cancelled",
        lambda redis: ledger.refuse(redis, "job-0", QUEUE, ledger.revoked("job-0")),
    ],
    ids=["cancelled", "refused"],
)
def test_a_job_that_ends_as_it_waits_leaves_its_place_in_the_ready_list_to_the_next(
    redis: Any, end: Callable[[Any], bool]
) -> None:
    for number in range(READY + 1):
        submit(redis, f"job-{number}")
    assert end(redis)
    assert redis.llen(keys.ready(QUEUE)) == READY
    assert take_all(redis) == [f"job-{number}" for number in range(1, READY + 1)]


def test_a_job_that_makes_way_is_not_dispatched_until_it_is_sent_again(redis: Any) -> None:
    for number in range(READY):
        submit(redis, f"low-{number}", priority=9)
    submit(redis, "high", priority=0)
    assert redis.zscore(keys.dispatched(QUEUE), f"low-{READY - 1}") is None
    assert take(redis) == "high"
    assert redis.zscore(keys.dispatched(QUEUE), f"low-{READY - 1}") is not None


def test_cancelling_what_nobody_knows_leaves_no_trace(redis: Any) -> None:
    assert ledger.cancel(redis, "job", QUEUE) == "unknown"
    assert redis.dbsize() == 0


def test_a_job_without_owner_and_message_waits_again(redis: Any) -> None:
    submit(redis)
    assert ledger.recover(redis, QUEUE, 0) == (), "its message is in the ready list"
    (tag,) = tags_of_the_ready_list(redis)
    redis.delete(keys.ready(QUEUE))
    assert ledger.recover(redis, QUEUE, 60) == (), "a worker may have just taken it"
    assert ledger.recover(redis, QUEUE, 0) == ("job",)
    assert tags_of_the_ready_list(redis) == [f"job#{int(tag.removeprefix('job#')) + 1}"]
    assert take(redis) == "job"
    redis.set(keys.worker("worker"), "{}", ex=keys.PRESENCE_TTL)
    assert ledger.recover(redis, QUEUE, 0) == (), "it has an owner"


def test_a_message_that_is_lost_on_its_way_back_from_a_dead_owner_is_sent_again(redis: Any) -> None:
    """Found by the chaos suite: the lease of a dead worker ran out, and the next one died as it took the message."""
    submit(redis)
    redis.delete(keys.ready(QUEUE))
    claim(redis, "one", "job#1")
    redis.set(keys.worker("worker-one"), "{}", ex=keys.PRESENCE_TTL)
    assert ledger.recover(redis, QUEUE, 0) == (), "its owner lives"
    redis.delete(keys.worker("worker-one"))
    redis.hset(keys.UNACKED, "job#1", "message")
    assert ledger.recover(redis, QUEUE, 0) == (), "its lease will bring it back"
    redis.delete(keys.UNACKED)
    assert ledger.recover(redis, QUEUE, 0) == ("job",)
    assert complete(redis, "one") == 0, "should the owner come back, it is fenced"
    assert take(redis) == "job"
    assert [crash["worker"] for crash in json.loads(redis.hget(keys.job("job"), Field.HISTORY))] == ["worker-one"]


def test_a_job_that_was_dispatched_in_the_future_counts_as_dispatched_now(redis: Any) -> None:
    """A broker's clock was set back: it would not be recovered for as long."""
    submit(redis)
    redis.rpop(keys.ready(QUEUE))
    redis.zadd(keys.dispatched(QUEUE), {"job": float(redis.time()[0]) + 9000})
    assert ledger.recover(redis, QUEUE, 60) == ()
    assert redis.zscore(keys.dispatched(QUEUE), "job") <= float(redis.time()[0]) + 1
    assert ledger.recover(redis, QUEUE, -5) == ("job",)
    assert take_all(redis) == ["job"]


def test_a_job_that_has_ended_never_comes_to_the_ready_list_again(redis: Any) -> None:
    """A message that came back is not the one in the record, so ending the job leaves it where it stands."""
    queue = keys.queue("toy", "train")
    submit(redis, "ended", priority=9, queue=queue)
    message = json.loads(redis.rpop(keys.ready(queue)))
    message["headers"]["redelivered"] = True
    redis.rpush(keys.ready(queue), json.dumps(message))
    ledger.cancel(redis, "ended", queue)
    submit(redis, "better", priority=0, queue=queue)
    submit(redis, "last", priority=9, queue=queue)
    assert json.loads(redis.rpop(keys.ready(queue)))["headers"]["id"] == "ended"
    assert ledger.claim(redis, "ended", queue, "t", "ended#1", "w").state == "ended"
    assert take_all(redis, queue) == ["better", "last"]


def test_a_ready_list_that_a_dying_worker_left_empty_is_filled_up(redis: Any) -> None:
    for number in range(2 * READY):
        submit(redis, f"job-{number:02}")
    redis.delete(keys.ready(QUEUE))
    ledger.recover(redis, QUEUE, 60)
    assert redis.llen(keys.ready(QUEUE)) == READY
    ledger.recover(redis, QUEUE, 0)
    assert sorted(take_all(redis)) == [f"job-{number:02}" for number in range(2 * READY)]


def test_what_has_lost_its_record_is_no_open_job(redis: Any) -> None:
    submit(redis)
    redis.delete(keys.job("job"), keys.ready(QUEUE))
    assert ledger.recover(redis, QUEUE, 0) == ()
    assert redis.zcard(keys.open_jobs(QUEUE)) == 0
    assert redis.zcard(keys.dispatched(QUEUE)) == 0, "the janitor does not look at it again"


def test_the_result_is_stored_in_the_step_that_ends_the_job(redis: Any) -> None:
    submit(redis)
    assert claim(redis, "one").request == '{"prompt": "x"}'
    assert complete(redis, "one") == 1
    outcome = Outcome.parse(redis.get(keys.result("job")))
    assert outcome is not None
    assert outcome.status == JobStatus.DONE
    assert not redis.hexists(keys.job("job"), Field.REQUEST)
    assert complete(redis, "two") == 0


def test_a_job_whose_owner_is_silent_is_cancelled_at_once(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    assert ledger.cancel(redis, "job", QUEUE) == "cancelled"
    assert complete(redis, "one") == 0, "should its owner come back, it is fenced"
    assert ledger.release(redis, "job", QUEUE, "one") == 0
    assert redis.zscore(keys.dispatched(QUEUE), "job") is None


def test_the_age_counts_from_the_submission_by_the_brokers_clock(redis: Any) -> None:
    submit(redis)
    redis.hset(keys.job("job"), Field.SUBMITTED, "1.0")
    assert claim(redis, "one").age > 1e9


def lifetimes(redis: Any) -> dict[str, int]:
    """Every key that the broker holds → seconds that are left to it, -1 for ever."""
    return {key.decode(): redis.ttl(key) for key in redis.scan_iter()}


def assert_lifetimes(redis: Any, expected: dict[str, int]) -> None:
    """Each of these keys has as long to live as its kind may, from now on."""
    left = lifetimes(redis)
    assert {key: pytest.approx(seconds, abs=30) for key, seconds in expected.items()} == {k: left[k] for k in expected}


def test_what_a_submission_writes_lives_as_long_as_a_job_may_wait(redis: Any) -> None:
    blob = keys.blob("dataset:job-0")
    ledger.submit(redis, "job-0", record("job-0") | {"blob": blob}, b"rows")
    for number in range(1, READY + 1):
        submit(redis, f"job-{number}")
    written = [keys.job("job-0"), blob, keys.open_jobs(QUEUE), keys.client("default", QUEUE), keys.turns(QUEUE)]
    written += [keys.dispatched(QUEUE), keys.backlog(QUEUE, 5)]
    assert_lifetimes(redis, dict.fromkeys(written, keys.PENDING_TTL))


def test_a_claim_gives_the_record_its_whole_life_again(redis: Any) -> None:
    submit(redis)
    redis.expire(keys.job("job"), 60)
    claim(redis, "one")
    assert_lifetimes(redis, {keys.job("job"): keys.PENDING_TTL})


def test_a_cancel_that_is_asked_for_lives_as_long_as_its_job_may(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    redis.set(keys.worker("worker-one"), "{}", ex=keys.PRESENCE_TTL)
    assert ledger.cancel(redis, "job", QUEUE) == "asked"
    assert_lifetimes(redis, {keys.cancel("job"): keys.PENDING_TTL})


@pytest.mark.parametrize("end", ["complete", "cancel"])
def test_an_ended_job_leaves_its_record_and_its_result_as_long_as_a_result_lives(redis: Any, end: str) -> None:
    submit(redis)
    if end == "complete":
        claim(redis, "one")
        assert complete(redis, "one") == 1
        assert_lifetimes(redis, {keys.pace(QUEUE): keys.RESULT_TTL})
    else:
        assert ledger.cancel(redis, "job", QUEUE) == "cancelled"
    assert_lifetimes(redis, {keys.job("job"): keys.RESULT_TTL, keys.result("job"): keys.RESULT_TTL})


def test_the_backlog_that_takes_a_job_back_from_the_ready_list_expires(redis: Any) -> None:
    """The backlog is new then: all of its priority stood in the ready list."""
    for number in range(READY):
        submit(redis, f"low-{number}", priority=9)
    assert not redis.exists(keys.backlog(QUEUE, 9))
    submit(redis, "high", priority=0)
    assert redis.zrange(keys.backlog(QUEUE, 9), 0, -1) == [b"low-7"]
    assert 0 < redis.ttl(keys.backlog(QUEUE, 9)) <= keys.PENDING_TTL


def test_every_set_and_hash_that_a_transition_makes_anew_expires(redis: Any) -> None:
    """Also one whose key was gone when the transition added to it."""
    for number in range(3 * READY):
        submit(redis, f"job-{number:02}")
    redis.delete(keys.turns(QUEUE), keys.dispatched(QUEUE))
    assert take(redis) == "job-00"
    assert redis.ttl(keys.turns(QUEUE)) > 0
    assert redis.ttl(keys.dispatched(QUEUE)) > 0
    redis.delete(keys.dispatched(QUEUE))
    assert ledger.release(redis, "job-00", QUEUE, "token-job-00") == 1
    redis.delete(keys.ready(QUEUE), keys.turns(QUEUE), *(keys.backlog(QUEUE, priority) for priority in range(10)))
    ledger.recover(redis, QUEUE, 0)
    assert {key for key, ttl in lifetimes(redis).items() if ttl == -1} == {keys.ready(QUEUE)}


def test_waiting_a_moment_lifts_no_job(redis: Any) -> None:
    redis.hset(keys.POLICY, "ageing", 1000)
    for number in range(READY):
        submit(redis, f"ahead-{number}", priority=0)
    submit(redis, "old", priority=1)
    grow_old(redis, "old", 990)
    submit(redis, "fresh", priority=0)
    assert take_all(redis)[READY:] == ["fresh", "old"]


def test_a_client_that_comes_late_takes_its_turns_from_there_and_none_of_the_past(redis: Any) -> None:
    for number in range(3 * READY):
        submit(redis, f"bulk-{number}", client="bulk")
    assert [take(redis) for _ in range(READY)] == [f"bulk-{number}" for number in range(READY)]
    for number in range(3):
        submit(redis, f"late-{number}", client="late")
    taken = take_all(redis)[READY:]
    assert [name.partition("-")[0] for name in taken[:6]] == ["late", "bulk"] * 3


def test_turns_are_forgotten_when_no_job_waits_behind_the_ready_list(redis: Any) -> None:
    for number in range(READY + 1):
        submit(redis, f"job-{number}")
    assert take(redis) == "job-0"
    assert redis.exists(keys.turns(QUEUE))
    assert take(redis) == "job-1"
    assert not redis.exists(keys.turns(QUEUE))


def test_jobs_of_the_best_priority_that_wait_in_the_backlog_count_for_the_limit(redis: Any) -> None:
    redis.hset(keys.POLICY, "queue_limit", READY + 2)
    states = [submit(redis, f"job-{number}", priority=0) for number in range(READY + 3)]
    assert states == ["new"] * (READY + 2) + ["full"]


def test_a_message_that_came_back_from_a_silent_owner_keeps_its_place_in_the_ready_list(redis: Any) -> None:
    """Under a new delivery tag it would be taken for a second delivery, and dropped while its owner counts as alive."""
    queue = keys.queue("toy", "train")
    submit(redis, "back", priority=9, queue=queue)
    message = redis.lindex(keys.ready(queue), 0)
    assert take(redis, queue) == "back"
    redis.rpush(keys.ready(queue), message)
    submit(redis, "better", priority=0, queue=queue)
    assert redis.lrange(keys.ready(queue), 0, -1) == [message]


@pytest.mark.parametrize("kind", ["dataset", "adapter"])
def test_the_input_goes_when_the_job_ends_and_stays_for_a_dead_letter(redis: Any, kind: str) -> None:
    for name in ("done", "cancelled", "dead"):
        fields = record(name) | {"blob": keys.blob(f"{kind}:{name}")}
        ledger.submit(redis, name, fields, b"rows")
        assert 0 < redis.ttl(fields["blob"]) <= keys.PENDING_TTL
    ledger.claim(redis, "done", QUEUE, "token", "tag", "worker")
    assert ledger.complete(redis, "done", QUEUE, "token", ledger.success("done", {})) == 1
    assert ledger.cancel(redis, "cancelled", QUEUE) == "cancelled"
    ledger.claim(redis, "dead", QUEUE, "token", "tag", "worker")
    letter = ledger.dead_letter(redis, "dead", QUEUE, "token", "worker", "full")
    assert [crash.trouble for crash in letter.history] == ["full"]
    assert ledger.complete(redis, "dead", QUEUE, "token", ledger.success("dead", {})) == 1
    assert [name for name in ("done", "cancelled", "dead") if redis.exists(keys.blob(f"{kind}:{name}"))] == ["dead"]
    assert redis.ttl(keys.blob(f"{kind}:dead")) > keys.PENDING_TTL, "as long as the letter"
    assert 0 < redis.ttl(keys.DEAD) <= keys.DEAD_TTL


def test_an_end_that_is_sent_again_because_its_answer_was_lost_says_that_it_was_ours(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    assert [complete(redis, "one"), complete(redis, "one")] == [1, 1]
    assert complete(redis, "two") == 0


def test_a_lost_message_is_found_behind_more_running_jobs_than_one_look_takes(
    redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "LOOKED_AT", 3)
    names = [f"job-{number:02}" for number in range(10)]
    for name in names:
        submit(redis, name)
    assert take_all(redis) == names
    submit(redis, "lost")
    redis.rpop(keys.ready(QUEUE))
    redis.set(keys.worker("worker"), "alive", ex=keys.PRESENCE_TTL)
    for age, name in enumerate(reversed(names), start=100):
        redis.zadd(keys.dispatched(QUEUE), {name: redis.time()[0] - age})
    redis.zadd(keys.dispatched(QUEUE), {"lost": redis.time()[0] - 50})
    assert [ledger.recover(redis, QUEUE, 10) for _ in range(5)] == [(), (), (), ("lost",), ()]


def test_a_recovered_job_is_no_longer_dispatched_until_it_comes_to_the_ready_list(redis: Any) -> None:
    submit(redis, "lost", priority=9)
    redis.delete(keys.ready(QUEUE))
    for number in range(2 * READY):
        submit(redis, f"job-{number:02}", priority=0)
    assert ledger.recover(redis, QUEUE, 0) == ("lost",)
    standing = [json.loads(message)["headers"]["id"] for message in redis.lrange(keys.ready(QUEUE), 0, -1)]
    assert sorted(job.decode() for job in redis.zrange(keys.dispatched(QUEUE), 0, -1)) == sorted(standing)


def test_open_jobs_older_than_any_record_are_swept(redis: Any) -> None:
    submit(redis)
    seconds, _ = redis.time()
    # More than one round looks at by their records.
    redis.zadd(keys.open_jobs(QUEUE), {f"forgotten-{n}": seconds - keys.PENDING_TTL - 1 - n for n in range(150)})
    ledger.recover(redis, QUEUE, 0)
    assert redis.zrange(keys.open_jobs(QUEUE), 0, -1) == [b"job"]


def test_a_released_job_whose_message_is_lost_on_its_way_back_is_sent_again(redis: Any) -> None:
    submit(redis)
    assert take(redis) == "job"
    redis.zrem(keys.dispatched(QUEUE), "job")
    assert ledger.release(redis, "job", QUEUE, "token-job") == 1
    assert redis.zscore(keys.dispatched(QUEUE), "job") is not None
    assert ledger.recover(redis, QUEUE, 0) == ("job",)
    assert take(redis) == "job"


@pytest.mark.parametrize("end", ["complete", "cancel"])
def test_a_record_that_outlives_its_result_is_that_of_a_job_that_has_ended(redis: Any, end: str) -> None:
    """A late delivery renews the record, and not the result."""
    submit(redis)
    if end == "complete":
        claim(redis, "one")
        complete(redis, "one")
    else:
        ledger.cancel(redis, "job", QUEUE)
    redis.delete(keys.result("job"))
    assert claim(redis, "late").state == "ended"
    assert ledger.cancel(redis, "job", QUEUE) == "ended"
    assert not redis.exists(keys.result("job")), "it ends once"


def test_a_dead_letter_has_the_brokers_time_and_says_who_gave_it_up(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    (entry,) = ledger.dead_letter(redis, "job", QUEUE, "one", "worker", "the disk is full").history
    assert abs(entry.time - redis.time()[0]) < 60
    letter = json.loads(redis.hget(keys.DEAD, "job"))
    assert (letter["kind"], letter["request"]) == ("generate", '{"prompt": "x"}')
    assert [Crash(**crash) for crash in letter["history"]] == [entry]
    submit(redis, "alive")
    ledger.claim(redis, "alive", QUEUE, "two", "tag", "worker")
    assert ledger.dead_letter(redis, "alive", QUEUE, "two") == DeadLettered(False)
    submit(redis, "mute")
    ledger.claim(redis, "mute", QUEUE, "three", "tag", "worker")
    assert [entry.worker for entry in ledger.dead_letter(redis, "mute", QUEUE, "three", "w").history] == ["w"]


def test_a_job_that_has_ended_is_so_called_also_when_its_record_has_expired_before_its_result(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    assert complete(redis, "one")
    redis.delete(keys.job("job"))
    assert ledger.cancel(redis, "job", QUEUE) == "ended"
    assert claim(redis, "two").state == "ended"


def test_a_stream_lives_from_its_last_entry_and_no_longer_because_its_job_ends(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    redis.xadd(keys.stream("job"), {"entry": "x"})
    redis.expire(keys.stream("job"), 100)
    assert complete(redis, "one")
    assert 90 < redis.ttl(keys.stream("job")) <= 100


@pytest.mark.parametrize("end", ["complete", "cancel", "refuse", "abandon"])
def test_no_stream_outlives_its_record_where_results_are_kept_for_less_than_a_day(redis: Any, end: str) -> None:
    """The id may be that of another job then, whose readers would get these tokens."""
    policy.decide(redis, "result_seconds", 60)
    submit(redis)
    claim(redis, "one")
    redis.xadd(keys.stream("job"), {"entry": "x"})
    redis.expire(keys.stream("job"), 1000)
    if end in ("cancel", "refuse"):
        ledger.release(redis, "job", QUEUE, "one")
    ended = ledger.failure("job", ValueError("x"))
    ways: dict[str, Callable[[], object]] = {
        "complete": lambda: complete(redis, "one"),
        "cancel": lambda: ledger.cancel(redis, "job", QUEUE),
        "refuse": lambda: ledger.refuse(redis, "job", QUEUE, ended),
        "abandon": lambda: ledger.abandon(redis, "job", QUEUE, "one", ended),
    }
    assert ways[end]()
    assert redis.exists(keys.result("job"))
    assert 0 < redis.ttl(keys.stream("job")) <= redis.ttl(keys.job("job")) <= 60


def test_a_dead_letter_that_is_sent_again_because_its_answer_was_lost_stands_as_it_is(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    once = ledger.dead_letter(redis, "job", QUEUE, "one", "worker", "the disk is full")
    letter = redis.hget(keys.DEAD, "job")
    assert complete(redis, "one"), "which takes the request out of the record"
    assert ledger.dead_letter(redis, "job", QUEUE, "one", "worker", "the disk is full") == once
    assert redis.hget(keys.DEAD, "job") == letter


def test_a_job_that_runs_again_before_its_letters_writer_could_end_it_is_no_dead_one(redis: Any) -> None:
    blob = keys.blob("dataset:job:1")
    ledger.submit(redis, "job", {**record(), "blob": blob}, b"data")
    claim(redis, "one")
    ledger.dead_letter(redis, "job", QUEUE, "one", "worker", "the disk is full")
    assert claim(redis, "two").state == "run"
    assert not redis.hexists(keys.DEAD, "job")
    assert complete(redis, "two")
    assert not redis.exists(blob), "no retry needs it"


def test_the_letter_of_a_job_that_crashed_too_many_owners_stays_until_it_has_ended(redis: Any) -> None:
    policy.decide(redis, "crashes", 1)
    submit(redis)
    claim(redis, "one")
    for token in ("two", "three"):
        assert claim(redis, token).state == "dead"
        assert redis.hexists(keys.DEAD, "job") == (token == "three")
        ledger.dead_letter(redis, "job", QUEUE, token)
    assert complete(redis, "three")
    assert redis.hexists(keys.DEAD, "job")


def test_an_owner_that_was_fenced_makes_no_dead_letter(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    claim(redis, "two")
    assert ledger.dead_letter(redis, "job", QUEUE, "one", "worker", "the disk is full").fenced
    assert ledger.dead_letter(redis, "unknown", QUEUE, "one").fenced
    assert not redis.exists(keys.DEAD)


def test_an_end_for_want_of_memory_counts_once_an_owner(redis: Any) -> None:
    submit(redis)
    for owner in (1, 2, 3):
        claim(redis, str(owner))
        assert [ledger.count_out_of_memory(redis, "job", QUEUE, str(owner)) for _ in range(2)] == [owner, owner]
        assert ledger.count_out_of_memory(redis, "job", QUEUE, "stranger") == 0
        assert ledger.release(redis, "job", QUEUE, str(owner))


def test_a_trouble_makes_no_record_anew(redis: Any) -> None:
    submit(redis)
    for job_id in ("job", "gone"):
        ledger.note_trouble(redis, job_id, "a driver that hangs")
    assert not redis.exists(keys.job("gone"))
    claim(redis, "one")
    claim(redis, "two")
    (crash,) = ledger.dead_letter(redis, "job", QUEUE, "two").history
    assert (crash.worker, crash.trouble) == ("worker-one", "a driver that hangs")


NO_MESSAGE = [b"garbage", b"[]", b"{}", b"\xff", b"[" * 5000, b'{"headers": 1}', b'{"headers": {"id": ["a"]}}']


@pytest.mark.parametrize("bad", NO_MESSAGE, ids=lambda raw: repr(raw[:24]))
def test_a_message_in_the_ready_list_that_cannot_be_read_stops_no_job(redis: Any, bad: bytes) -> None:
    """Until a worker takes it and puts it aside, every transition goes past it."""
    names = [f"job-{number}" for number in range(READY + 2)]
    for name in names[:5]:
        assert submit(redis, name) == "new"
    redis.lpush(keys.ready(QUEUE), bad)
    redis.rpush(keys.ready(QUEUE), bad)
    for name in names[5:]:
        assert submit(redis, name) == "new"
    assert submit(redis, "urgent", priority=0) == "new"
    assert ledger.recover(redis, QUEUE, older_than=0) == ()
    taken = []
    while message := redis.rpop(keys.ready(QUEUE)):
        if message != bad:
            job_id = json.loads(message)["headers"]["id"]
            assert ledger.claim(redis, job_id, QUEUE, f"token-{job_id}", "tag", "worker").state == "run"
            taken.append(job_id)
    assert sorted(taken) == sorted([*names, "urgent"])


SPOILED: dict[str, Callable[[Any, str], object]] = {
    "of another type": lambda redis, key: (redis.delete(key), redis.set(key, "x", ex=60)),
    "without a message": lambda redis, key: redis.hset(key, Field.MESSAGE, "garbage"),
    "with a priority that is none": lambda redis, key: redis.hset(key, Field.PRIORITY, "abc"),
    "with a priority that is not there": lambda redis, key: redis.hset(key, Field.PRIORITY, "77"),
    "with another priority": lambda redis, key: redis.hset(key, Field.PRIORITY, "0"),
    "with a time that is none": lambda redis, key: redis.hset(key, Field.SUBMITTED, "then"),
    "with a turn that is none": lambda redis, key: redis.hset(key, Field.TURN, "x"),
    "with a history that is none": lambda redis, key: redis.hset(key, mapping={"history": "garbage", "token": "gone"}),
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("where", ["in the backlog", "in the ready list"])
def test_a_record_that_is_spoiled_stops_no_other_job(redis: Any, how: str, where: str) -> None:
    before = READY if where == "in the backlog" else 0
    for number in range(before):
        submit(redis, f"before-{number}")
    submit(redis, "bad")
    SPOILED[how](redis, keys.job("bad"))
    for number in range(3):
        assert submit(redis, f"after-{number}") == "new"
    ledger.recover(redis, QUEUE, older_than=0)
    taken = []
    while message := redis.rpop(keys.ready(QUEUE)):
        job_id = json.loads(message)["headers"]["id"]
        taken.append(job_id)
        if job_id != "bad":
            assert ledger.claim(redis, job_id, QUEUE, f"token-{job_id}", "tag", "worker").state == "run"
    assert {f"after-{number}" for number in range(3)} <= set(taken)
    assert len(taken) == len(set(taken)), "nobody is sent twice"


def test_an_id_with_a_percent_sign_is_put_into_its_message_as_it_is(redis: Any) -> None:
    """`submit` is called by clients that check it; the backlog is filled by anyone."""
    redis.hset(keys.job("a%b"), mapping=record("a%b") | {"submitted": "1", "turn": "0"})
    redis.zadd(keys.backlog(QUEUE, 5), {"a%b": 0})
    redis.expire(keys.backlog(QUEUE, 5), 60)
    submit(redis)
    tags = {re.sub("[0-9]{16}", "TIME", tag) for tag in tags_of_the_ready_list(redis)}
    # No key of Stoker's has such a name: it is nobody's to let it expire.
    redis.delete(keys.job("a%b"))
    assert tags == {"a%b#1", "job#TIME"}


@pytest.mark.parametrize("queue", ["stoker.toy.train", "stoker.toy.train.v2"])
def test_training_of_every_contract_has_one_message_in_the_ready_list(redis: Any, queue: str) -> None:
    for number in range(3):
        submit(redis, f"job-{number}", queue=queue)
    assert redis.llen(keys.ready(queue)) == TRAIN.ready


def test_open_jobs_come_oldest_first_over_all_queues_with_their_age_and_without_those_that_expired(redis: Any) -> None:
    other = keys.queue("toy", "embed")
    submit(redis, "middle")
    submit(redis, "old", queue=other)
    submit(redis, "young", queue=other)
    submit(redis, "gone")
    redis.delete(keys.job("gone"))
    seconds, _ = redis.time()
    for name, queue, age in (("old", other, 1000), ("middle", QUEUE, 500), ("young", other, -100)):
        redis.zadd(keys.open_jobs(queue), {name: seconds - age})
    listed = ledger.open_jobs(redis, [QUEUE, other])
    assert list(listed) == ["old", "middle", "young"]
    assert listed["old"]["age"] >= 1000
    assert listed["young"]["age"] == 0.0, "no job is younger than now"


@pytest.mark.parametrize("value", ["-1", "0", "nan", "abc", "", "1e-9", b"\xff"])
def test_a_policy_that_nobody_decided_is_none(redis: Any, value: str | bytes) -> None:
    redis.hset(keys.POLICY, mapping=dict.fromkeys(policy.RULES, value))
    assert policy.read(redis) == {name: rule.default for name, rule in policy.RULES.items()}
    assert submit(redis) == "new"
    assert claim(redis, "one").state == "run"


def test_jobs_of_a_client_that_were_forgotten_take_no_place_and_are_swept(redis: Any) -> None:
    redis.hset(keys.POLICY, "client_limit", 2)
    mine = keys.client("default", QUEUE)
    seconds, _ = redis.time()
    redis.zadd(mine, {f"old-{number}": seconds - keys.PENDING_TTL - 1 for number in range(5)})
    assert [submit(redis, name) for name in "abc"] == ["new", "new", "client_full"]
    assert sorted(redis.zrange(mine, 0, -1)) == [b"a", b"b"]


@pytest.mark.parametrize("value", ["nan", "inf", "1e308", "-5", "x", str(2**53), str(2**53 + 2)])
def test_turns_that_cannot_be_counted_begin_anew(redis: Any, value: str) -> None:
    redis.hset(keys.turns(QUEUE), mapping={"now:5": value, "next:5:default": value})
    assert submit(redis, "first") == "new"
    assert float(redis.hget(keys.job("first"), Field.TURN)) == 0
    for number in range(READY + 1):
        assert submit(redis, f"job-{number}") == "new"
    assert len(take_all(redis)) == READY + 2


@pytest.mark.parametrize("end", ["complete", "dead", "abandon"])
@pytest.mark.parametrize("blob", [False, True], ids=["whole", "with an input"])
def test_nothing_of_a_cancel_is_left_when_its_job_has_ended(redis: Any, end: str, *, blob: bool) -> None:
    fields = record() | ({"blob": keys.blob("dataset:job")} if blob else {})
    ledger.submit(redis, "job", fields, b"rows" if blob else b"")
    claim(redis, "one")
    redis.set(keys.worker("worker-one"), "{}", ex=5)
    assert ledger.cancel(redis, "job", QUEUE) == "asked"
    assert redis.exists(keys.cancel("job"))
    if end == "dead":
        ledger.dead_letter(redis, "job", QUEUE, "one", "worker", "full")
    ending = ledger.abandon if end == "abandon" else ledger.complete
    assert ending(redis, "job", QUEUE, "one", ledger.revoked("job"))
    assert not redis.exists(keys.cancel("job"))
    assert redis.hlen(keys.sizes(QUEUE)) == 0 or b"job" not in redis.hkeys(keys.sizes(QUEUE))
    assert not redis.zcard(keys.client("default", QUEUE))
    assert abs(redis.ttl(keys.job("job")) - keys.RESULT_TTL) < 10
    assert redis.exists(keys.blob("dataset:job")) == (blob and end == "dead")


@pytest.mark.parametrize("revive", [False, True])
def test_a_submission_that_meets_a_key_of_another_program_leaves_no_job_behind(redis: Any, *, revive: bool) -> None:
    """One that is known and does not wait would never run, however often its client sends it."""
    fields = record() | {"blob": keys.blob("dataset:job")}
    if revive:
        ledger.submit(redis, "job", fields, b"rows")
        claim(redis, "one")
        ledger.dead_letter(redis, "job", QUEUE, "one", "worker", "full")
        complete(redis, "one")
    redis.set(keys.dispatched(QUEUE), "of another program", ex=60)
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        ledger.submit(redis, "job", fields, b"" if revive else b"rows", revive=revive)
    assert not redis.exists(keys.job("job"), keys.ready(QUEUE))
    assert not redis.zcard(keys.open_jobs(QUEUE))
    assert not redis.zcard(keys.client("default", QUEUE))
    assert redis.exists(keys.blob("dataset:job")) == revive, "what was there before is not this submission's"
    redis.delete(keys.dispatched(QUEUE))
    assert ledger.submit(redis, "job", fields, b"rows").state == "new"
    assert take(redis) == "job"


@pytest.mark.parametrize("key", [keys.open_jobs(QUEUE), keys.dispatched(QUEUE)])
def test_a_retry_that_fails_leaves_the_letter_and_its_input_for_the_next(redis: Any, key: str) -> None:
    fields = record() | {"blob": keys.blob("dataset:job")}
    ledger.submit(redis, "job", fields, b"rows")
    claim(redis, "one")
    ledger.dead_letter(redis, "job", QUEUE, "one", "worker", "full")
    complete(redis, "one")
    letter = redis.hget(keys.DEAD, "job")
    redis.set(key, "of another program", ex=60)
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        ledger.submit(redis, "job", fields, revive=True)
    assert redis.hget(keys.DEAD, "job") == letter
    assert redis.ttl(keys.blob("dataset:job")) > keys.DEAD_TTL - 10
    redis.delete(key)
    assert ledger.submit(redis, "job", fields, revive=True).state == "new"
    assert not redis.exists(keys.DEAD)
    assert take(redis) == "job"


def test_of_two_that_have_aged_to_the_best_the_one_of_the_better_priority_is_first(redis: Any) -> None:
    for number in range(READY):
        submit(redis, f"before-{number:02}", priority=0)
    for name, priority in (("worse", 7), ("better", 3)):
        submit(redis, name, priority=priority)
        grow_old(redis, name, 100 * ledger.AGEING)
    assert [name for name in take_all(redis) if not name.startswith("before")] == ["better", "worse"]


def test_a_job_that_is_sent_now_stands_before_one_of_a_worse_priority_that_has_aged_as_far(redis: Any) -> None:
    """Neither priority has been served: then the better one is first, also where it begins to be waited at just now."""
    for number in range(READY + 1):
        submit(redis, f"old-{number}", priority=5)
    for number in range(READY + 1):
        grow_old(redis, f"old-{number}", 2 * 300 + 1)
    redis.delete(keys.ready(QUEUE), keys.turns(QUEUE))
    redis.hset(keys.turns(QUEUE), "now:5", 0)
    redis.expire(keys.turns(QUEUE), 60)
    submit(redis, "new", priority=3)
    assert take(redis) == "new"


def test_a_result_that_is_there_is_not_written_over_when_its_record_is_spoiled(redis: Any) -> None:
    for number in range(READY):
        submit(redis, f"before-{number:02}")
    submit(redis, "job")
    redis.set(keys.result("job"), "the result", ex=60)
    redis.hdel(keys.job("job"), Field.TURN)
    take_all(redis)
    assert redis.get(keys.result("job")) == b"the result"


def test_of_a_clients_oldest_jobs_those_that_are_gone_are_swept_by_its_next_submission(redis: Any) -> None:
    mine, now = keys.client("default", QUEUE), float(redis.time()[0])
    submit(redis, "waits")
    redis.zadd(mine, {"gone-a": now - 90, "gone-b": now - 80, "waits": now - 70, "gone-c": now - 60})
    submit(redis, "next")
    assert [name.decode() for name in redis.zrange(mine, 0, -1)] == ["waits", "gone-c", "next"]
    submit(redis, "last")
    assert [name.decode() for name in redis.zrange(mine, 0, -1)] == ["waits", "next", "last"]


def test_a_job_that_has_an_owner_is_not_refused(redis: Any) -> None:
    """Its model's worker may have ended just now; the owner is another, and ends the job itself."""
    submit(redis)
    claim(redis, "one")
    assert not ledger.refuse(redis, "job", QUEUE, ledger.revoked("job"))
    assert complete(redis, "one")
    assert not ledger.refuse(redis, "job", QUEUE, ledger.revoked("job")), "nor is one that has ended"


def test_a_job_that_waits_is_ended_at_its_deadline_and_not_before(redis: Any) -> None:
    submit(redis)
    submit(redis, "runs")
    ledger.claim(redis, "runs", QUEUE, "one", "tag", "worker-one")
    assert not ledger.lateness("job", QUEUE, 60.0).on(redis)
    assert not ledger.lateness("runs", QUEUE, 1e-9).on(redis), "its owner sees to it"
    assert not ledger.lateness("nobody", QUEUE, 1e-9).on(redis)
    assert ledger.lateness("job", QUEUE, 1e-9).on(redis)
    assert not ledger.lateness("job", QUEUE, 1e-9).on(redis), "once"
    outcome = Outcome.parse(redis.get(keys.result("job")))
    assert outcome is not None
    with pytest.raises(DeadlineExceeded, match="no worker took it, and it is past its deadline of 1e-09 s"):
        outcome.unwrap("job")


def test_a_letter_says_when_each_owner_went_silent(redis: Any) -> None:
    submit(redis)
    began = redis.time()[0]
    claim(redis, "one")
    claim(redis, "two")
    (crash,) = ledger.dead_letter(redis, "job", QUEUE, "two").history
    assert crash.worker == "worker-one"
    assert began <= crash.time <= redis.time()[0] + 1
