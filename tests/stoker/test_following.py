"""Following a job: what comes twice, late or never, each entry is due once and in order; when to look, wait and end."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError

from stoker.broker import connection, keys
from stoker.client.channels import FellBehind
from stoker.client.following import (
    LONGEST_LATE,
    PAGE,
    QUIET,
    REMEMBERED,
    UNOWNED,
    Ended,
    Follower,
    Heard,
    Lateness,
    TimeLimit,
)
from stoker.contract import StreamToken, TrainReport
from stoker.errors import BrokerUnavailable, JobCancelled, JobLost, JobTimeout
from stoker.settings import Settings


def token(index: int) -> StreamToken:
    return StreamToken(index=index, token_id=index, text="x", logit=0.0, logprob=-1.0, probability=1.0)


def report(index: int) -> TrainReport:
    return TrainReport(index=index, step=index + 1, steps=10, loss=1.0, learning_rate=0.1, gradient_norm=1.0, tokens=1,
                       tokens_per_second=1.0)  # fmt: skip


def payload(index: int) -> bytes:
    return token(index).model_dump_json().encode()


def follower(timeout: float | None = None, clock: Clock | None = None) -> Follower[StreamToken]:
    return Follower(Settings(), "j", StreamToken, timeout, clock or Clock())


class Clock:
    """Stands still until the test moves it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Job:
    """A stream that grows; what it makes goes to the log at once, and to subscribers in order, unless it is lost."""

    def __init__(self) -> None:
        self.made = 0
        self.subscribed: list[int] | None = None

    def make(self) -> None:
        if self.subscribed is not None:
            self.subscribed.append(self.made)
        self.made += 1

    def rows(self, since: str, count: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        start = int(since.partition("-")[0]) - 1
        return [
            (keys.entry_id(index).encode(), {b"entry": payload(index)})
            for index in range(start, min(self.made, start + count))
        ]


ACTIONS = st.lists(st.sampled_from(["make", "hear", "replay", "page", "disconnect", "subscribe", "lose"]), max_size=80)


@given(ACTIONS)
def test_any_interleaving_of_replay_and_live_gives_each_entry_once_in_order(actions: list[str]) -> None:
    job, tail, seen = Job(), follower(), []
    for action in actions:
        if action == "make":
            job.make()
        elif action == "subscribe":
            job.subscribed = job.subscribed or []
        elif action == "disconnect":
            job.subscribed = None
        elif action == "lose" and job.subscribed:
            job.subscribed.pop()
        elif action == "hear" and job.subscribed:
            entry, _ = tail.live(payload(job.subscribed.pop(0)))
            seen += [entry.index] if entry else []
        elif action in ("replay", "page"):
            seen += [entry.index for entry in tail.replay(job.rows(tail.since, PAGE if action == "replay" else 2))]
        assert seen == list(range(len(seen))) == list(range(tail.next))
    seen += [entry.index for entry in tail.replay(job.rows(tail.since, job.made + 1))]
    assert seen == list(range(job.made))


def test_a_gap_is_reported_and_an_entry_that_was_had_is_not_one() -> None:
    tail = follower()
    assert tail.live(payload(0)) == (token(0), False)
    assert tail.live(payload(2)) == (None, True)
    assert tail.live(payload(0)) == (None, False)
    assert tail.next == 1


def test_a_replay_that_overlaps_yields_only_what_is_due() -> None:
    job, tail = Job(), follower()
    tail.next = 2
    for _ in range(4):
        job.make()
    assert [entry.index for entry in tail.replay(job.rows(keys.entry_id(0), 10))] == [2, 3]
    assert tail.since == keys.entry_id(4)


@pytest.mark.parametrize("left", [(2, 3), (0, 1, 3)])
def test_a_stream_that_has_lost_tokens_is_no_text_with_a_hole(left: tuple[int, ...]) -> None:
    reader = follower()
    with pytest.raises(JobLost, match=r"job j: the broker has lost tokens.*`result\(\)` has the whole"):
        reader.looked([DONE, GONE, rows(*left)])
    late = follower()
    late.next = 4
    assert late.replay(rows(*left)) == [], "what is missing is behind this reader"


@pytest.mark.parametrize("left", [(), (0, 1)])
def test_a_job_that_is_done_and_whose_stream_is_gone_is_no_shorter_text(left: tuple[int, ...]) -> None:
    done = json.dumps({"status": "SUCCESS", "result": {"text": "xxx", "usage": {"completion_tokens": 3}}}).encode()
    with pytest.raises(JobLost, match=rf"lost tokens of its stream, behind {len(left)} that came"):
        follower().looked([done, GONE, rows(*left)])
    assert len(follower().looked([done, GONE, rows(0, 1, 2)])) == 3


def test_reports_of_a_run_come_without_those_that_expired() -> None:
    reports = [report(index) for index in (5, 6)]
    found = [(keys.entry_id(one.index).encode(), {b"entry": one.model_dump_json().encode()}) for one in reports]
    assert Follower(Settings(), "j", TrainReport).replay(found) == reports


@pytest.mark.parametrize("raw", [b"{}", b"garbage", b"\xff", b"[]"])
def test_what_no_worker_wrote_is_distinguished_from_an_entry(raw: bytes) -> None:
    tail = follower()
    assert tail.live(raw) == (None, True), "a channel may carry anything: the stream decides"
    for fields in ({b"entry": raw}, {b"other": raw}):
        with pytest.raises(JobLost, match="an entry that Stoker did not write"):
            tail.replay([(b"1-0", fields)])


def test_without_a_limit_one_waits_as_long_as_one_likes() -> None:
    assert TimeLimit("j", None).slice(5.0) == 5.0


def test_a_limit_that_passed_names_the_job_and_the_seconds() -> None:
    with pytest.raises(JobTimeout, match=r"job j: nothing came within 0 s\. It goes on"):
        TimeLimit("j", 0.0).slice(1.0)
    assert TimeLimit("j", 60.0).slice(1.0) == 1.0
    assert 0 < TimeLimit("j", 0.5).slice(1.0) <= 0.5


def test_a_reader_of_the_result_alone_hears_no_entries() -> None:
    assert Follower(Settings(), "j").channels == [keys.result("j")]
    assert follower().channels == [keys.result("j"), keys.channel("j")]


#: Kind, queue, owner, ability, client and what was asked, as the broker answers `summary`.
OWNED = (b"generate", b"stoker.m.generate", b"token", None, None, None, None)
GONE = (None,) * 7
DONE = json.dumps({"status": "SUCCESS", "result": {"text": "x"}}).encode()


def rows(*indices: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
    return [(keys.entry_id(index).encode(), {b"entry": payload(index)}) for index in indices]


def looks(reader: Follower[StreamToken]) -> bool:
    """A call, because a type checker takes a property for one that stays as it is."""
    return reader.must_look


def message(channel: str, data: bytes) -> Heard:
    return {"channel": channel.encode(), "data": data}


def test_a_look_comes_first_and_a_whole_page_is_followed_by_another() -> None:
    reader = follower()
    assert reader.must_look
    assert len(reader.looked([None, OWNED, rows(*range(PAGE))])) == PAGE
    assert reader.must_look
    assert reader.looked([DONE, OWNED, rows(PAGE)]) == [token(PAGE)]
    assert not looks(reader)
    assert reader.value() == {"text": "x"}


def test_a_whole_page_hides_the_outcome_until_the_rest_is_there() -> None:
    reader = follower()
    reader.looked([DONE, GONE, rows(*range(PAGE))])
    assert reader.outcome is None
    assert reader.looked([DONE, GONE, []]) == []
    assert reader.outcome is not None


def test_a_quiet_second_is_followed_by_a_look() -> None:
    clock = Clock()
    reader = follower(clock=clock)
    reader.looked([None, OWNED, []])
    assert reader.wait() == QUIET
    clock.now += 0.75
    assert reader.wait() == QUIET - 0.75
    assert reader.heard(message(keys.channel("j"), payload(0))) == [token(0)]
    assert reader.wait() == QUIET, "a message begins another second"
    clock.now += QUIET
    assert reader.must_look


def test_a_gap_and_a_result_are_followed_by_a_look_and_nothing_is_not() -> None:
    for heard in (message(keys.channel("j"), payload(3)), message(keys.result("j"), DONE)):
        reader = follower()
        reader.looked([None, OWNED, []])
        assert reader.heard(None) == []
        assert not looks(reader)
        assert reader.heard(heard) == []
        assert looks(reader)
        assert reader.outcome is None, "entries may be missing yet"


def test_a_reader_of_the_result_alone_takes_it_from_its_announcement() -> None:
    reader = Follower[StreamToken](Settings(), "j")
    reader.looked([None, OWNED])
    assert reader.heard(message(keys.result("j"), json.dumps({"status": "STARTED"}).encode())) == []
    assert reader.must_look
    reader.looked([None, OWNED])
    reader.heard(message(keys.result("j"), json.dumps({"status": "REVOKED"}).encode()))
    with pytest.raises(JobCancelled):
        reader.value()


def test_what_was_published_before_a_new_subscription_is_looked_up() -> None:
    reader = follower()
    reader.looked([None, OWNED, []])
    reader.subscribed()
    assert reader.must_look


def test_a_job_that_is_gone_is_lost_after_its_last_entries() -> None:
    reader = follower()
    assert reader.looked([None, GONE, rows(0, 1)]) == [token(0), token(1)]
    with pytest.raises(JobLost):
        reader.looked([None, GONE, []])


def test_the_callers_time_limit_counts_from_the_last_entry_and_not_while_the_caller_is_busy_with_it() -> None:
    clock = Clock()
    reader = follower(timeout=5.0, clock=clock)
    reader.looked([None, OWNED, rows(0)])
    clock.now += 60
    assert reader.must_look
    reader.looked([None, OWNED, rows(1)])
    assert reader.wait() == QUIET
    clock.now += 4
    reader.looked([None, OWNED, []])
    assert reader.wait() == QUIET
    clock.now += 1
    with pytest.raises(JobTimeout, match="within 5 s"):
        reader.wait()


def test_the_callers_time_limit_counts_from_the_question_too_where_the_broker_is_away() -> None:
    clock = Clock()
    reader = follower(timeout=5.0, clock=clock)
    reader.looked([None, OWNED, rows(0)])
    clock.now += 60
    assert reader.pause(RedisConnectionError("gone")) > 0
    clock.now += 5
    with pytest.raises(JobTimeout, match="within 5 s"):
        reader.pause(RedisConnectionError("gone"))


def test_each_outage_has_the_whole_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, gone = Clock(), RedisConnectionError("gone")
    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=clock))
    reader = Follower[StreamToken](Settings(patience=30), "j", clock=clock)
    reader.pause(gone)
    clock.now += 20
    reader.looked([None, OWNED])
    clock.now += 20
    assert reader.pause(gone) <= 1, "the broker has answered meanwhile"
    clock.now += 30
    with pytest.raises(BrokerUnavailable, match="gone"):
        reader.pause(gone)


def test_a_reader_outlasts_an_outage_up_to_the_patience_or_its_own_limit() -> None:
    gone = RedisConnectionError("gone")
    assert 0 < follower().pause(gone) <= 1
    with pytest.raises(BrokerUnavailable, match="gone"):
        Follower[StreamToken](Settings(patience=0), "j").pause(gone)
    with pytest.raises(JobTimeout):
        follower(timeout=0.0).pause(gone)


def test_a_slow_reader_goes_on_also_without_any_patience_for_the_broker() -> None:
    assert Follower[StreamToken](Settings(patience=0), "j").pause(FellBehind("512 messages wait already")) == 0


def test_a_job_without_an_owner_is_asked_about_once_and_not_before_its_time() -> None:
    clock = Clock()
    waiting = follower(clock=clock)
    waiting.looked([None, [b"generate", b"q", *[None] * 5], []])
    clock.now += UNOWNED - 0.1
    assert not waiting.asks_why()
    clock.now += 0.2
    assert waiting.asks_why()
    assert not waiting.asks_why()


def test_a_job_that_has_or_had_an_owner_or_made_tokens_is_not_asked_about() -> None:
    clock = Clock()
    owned, made = follower(clock=clock), follower(clock=clock)
    owned.looked([None, [b"generate", b"q", b"token", *[None] * 4], []])
    made.looked([None, [b"generate", b"q", *[None] * 5], [(b"1-0", {b"entry": payload(0)})]])
    clock.now += 10 * UNOWNED
    assert not owned.asks_why()
    assert not made.asks_why()


def test_of_a_job_that_waits_it_is_asked_now_and_then_whether_its_deadline_has_passed() -> None:
    def late(reader: Follower[StreamToken], deadline: bytes | None, token: bytes | None = None) -> Lateness | None:
        reader.looked([None, [b"generate", b"q", token, None, None, None, deadline], []])
        return reader.lateness()

    clock = Clock()
    for deadline, every in ((b"0.5", QUIET), (b"200.0", 10.0), (b"1e6", LONGEST_LATE)):
        reader = follower(clock=clock)
        for _ in range(3):
            assert late(reader, deadline) == Lateness("q", float(deadline))
            assert late(reader, deadline) is None
            clock.now += every - 0.01
            assert late(reader, deadline) is None
            clock.now += 0.01
    for said in (None, b"", b"x", b"nan", b"inf", b"-1", b"0", b"\xff"):
        assert late(follower(), said) is None
    assert late(follower(), b"0.5", token=b"owner") is None, "its worker sees to it"


def test_of_the_jobs_that_a_client_has_followed_to_their_end_it_remembers_the_last() -> None:
    ended = Ended()
    for number in range(REMEMBERED + 1):
        ended.remember(f"{number}")
    assert [f"{number}" in ended for number in (0, 1, REMEMBERED)] == [False, True, True]
