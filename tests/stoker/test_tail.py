"""A reader's place in a stream: whatever comes twice, late or not at all, each entry is yielded once and in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker import keys
from stoker.contract import StreamToken
from stoker.errors import JobLost, JobTimeout
from stoker.tail import PAGE, Limit, Tail, channels


def token(index: int) -> StreamToken:
    return StreamToken(index=index, token_id=index, text="x", logit=0.0, logprob=-1.0, probability=1.0)


def payload(index: int) -> bytes:
    return token(index).model_dump_json().encode()


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
    job, tail, seen = Job(), Tail(StreamToken), []
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


def test_a_gap_is_told_and_an_entry_that_was_had_is_not_one() -> None:
    tail = Tail(StreamToken)
    assert tail.live(payload(0)) == (token(0), False)
    assert tail.live(payload(2)) == (None, True)
    assert tail.live(payload(0)) == (None, False)
    assert tail.next == 1


def test_a_replay_that_overlaps_yields_only_what_is_due() -> None:
    job, tail = Job(), Tail(StreamToken, start=2)
    for _ in range(4):
        job.make()
    assert [entry.index for entry in tail.replay(job.rows(keys.entry_id(0), 10))] == [2, 3]
    assert tail.since == keys.entry_id(4)


def test_without_a_limit_one_waits_as_long_as_one_likes() -> None:
    assert Limit("j", None).slice(5.0) == 5.0


def test_a_limit_that_passed_names_the_job_and_the_seconds() -> None:
    with pytest.raises(JobTimeout, match=r"job j: nothing came within 0 s\. It goes on"):
        Limit("j", 0.0).slice(1.0)
    assert Limit("j", 60.0).slice(1.0) == 1.0
    assert 0 < Limit("j", 0.5).slice(1.0) <= 0.5


def test_who_waits_for_the_result_alone_hears_no_entries() -> None:
    assert channels("j", None) == [keys.result("j")]
    assert channels("j", Tail(StreamToken)) == [keys.result("j"), keys.channel("j")]


@pytest.mark.parametrize("raw", [b"{}", b"garbage", b"\xff", b"[]"])
def test_what_no_worker_wrote_is_told_from_an_entry(raw: bytes) -> None:
    tail = Tail(StreamToken)
    assert tail.live(raw) == (None, True), "a channel may carry anything: the stream tells"
    for fields in ({b"entry": raw}, {b"other": raw}):
        with pytest.raises(JobLost, match="an entry that Stoker did not write"):
            tail.replay([(b"1-0", fields)])
