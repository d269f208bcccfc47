"""Turns: jobs share batches fairly, and none starves, however many newer ones come."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.embedding.turns import Turns

JOBS = st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=12), min_size=1, max_size=12)


def served(turns: Turns[str], tokens: int) -> Counter[str]:
    return Counter(job for job, _ in turns.take(tokens, 1))


@given(JOBS, st.integers(1, 200), st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_text_that_has_tokens_is_served_once(
    jobs: list[list[int]], tokens: int, streams: int, random: st.DataObject
) -> None:
    """Whenever the jobs come; and a batch holds what it may, or a text for each stream."""
    turns: Turns[int] = Turns()
    waiting, found = list(enumerate(jobs)), []
    while waiting or turns:
        while waiting and (not turns or random.random() < 0.4):  # type: ignore[attr-defined]
            turns.add(*waiting.pop())
        if turns:
            batch = turns.take(tokens, streams)
            sizes = [jobs[job][row] for job, row in batch]
            assert sum(sizes) <= max(tokens, streams * sizes[0])
            found += batch
    assert sorted(found) == [(job, row) for job, rows in enumerate(jobs) for row, size in enumerate(rows) if size]


@pytest.mark.parametrize("flood", [1, 4, 5, 40])
@pytest.mark.parametrize("size", [16, 5, 50])
def test_a_large_job_ends_however_many_small_ones_come(flood: int, size: int) -> None:
    """Four of 16 tokens are all that a batch holds: by turns alone the large job got nothing of it for ever."""
    turns: Turns[str] = Turns()
    turns.add("large", [size] * 20)
    got = step = tokens = 0
    while got < 20:
        for number in range(flood):
            turns.add(f"small {step} {number}", [16])
        step += 1
        batch = served(turns, 64)
        got += batch["large"]
        tokens += 16 * batch.total() + (size - 16) * batch["large"]
        assert tokens <= 4 * (20 * size + size) + 64, "it gets a quarter of what is served"


def test_two_large_jobs_end_one_after_the_other_in_a_flood() -> None:
    turns: Turns[str] = Turns()
    turns.add("first", [16] * 20)
    turns.add("second", [16] * 20)
    ended: dict[str, int] = {}
    got = Counter[str]()
    for step in range(60):
        for number in range(8):
            turns.add(f"small {step} {number}", [16])
        got += served(turns, 64)
        for job in ("first", "second"):
            if got[job] == 20:
                ended.setdefault(job, step)
    assert list(ended) == ["first", "second"]


def test_a_flood_waits_for_the_oldest_job_no_longer_than_for_a_quarter() -> None:
    turns: Turns[str] = Turns()
    turns.add("large", [16] * 1000)
    shares = []
    for step in range(100):
        for number in range(8):
            turns.add(f"small {step} {number}", [16])
        shares.append(served(turns, 64)["large"])
    assert set(shares[2:]) == {1}, "of four texts"


def test_a_new_job_starts_at_the_present() -> None:
    """It gets its half from now on, and not what the other had before it came; nor does it wait for its turn."""
    turns: Turns[str] = Turns()
    turns.add("old", [16] * 100)
    for _ in range(10):
        served(turns, 64)
    turns.add("new", [16] * 100)
    for _ in range(8):
        assert served(turns, 64) == {"old": 2, "new": 2}


def test_a_text_before_its_turn_leaves_the_present_as_it_is() -> None:
    """Else a job that comes in a flood would wait behind what the oldest one got early."""
    turns: Turns[str] = Turns()
    turns.add("large", [16] * 100)
    got = 0
    for step in range(40):
        for number in range(4):
            turns.add(f"small {step} {number}", [16])
        got += served(turns, 64)["large"]
    assert turns.present <= 4 * 16
    assert got >= 38


def test_what_is_removed_is_not_served() -> None:
    turns: Turns[str] = Turns()
    turns.add("a", [16] * 10)
    turns.add("b", [16] * 2)
    turns.remove("a")
    turns.remove("unknown")
    assert turns.take(1000, 1) == [("b", 0), ("b", 1)]
    assert not turns


def test_what_the_oldest_job_was_owed_is_not_the_next_ones() -> None:
    turns: Turns[str] = Turns()
    turns.add("large", [60] * 10)
    for step in range(4):
        for number in range(4):
            turns.add(f"small {step} {number}", [16])
        served(turns, 64)
    assert turns.owed > 0
    turns.remove("large")
    assert turns.owed == 0


def test_a_text_that_is_put_back_keeps_its_turn() -> None:
    """Of three texts two streams take two: the third is the job's next, and costs it no turn."""
    turns: Turns[str] = Turns()
    turns.add("job", [20, 21, 22, 23])
    assert turns.take(66, 2) == [("job", 3), ("job", 2)]
    turns.add("other", [30, 30])
    assert turns.take(51, 1) == [("other", 0), ("job", 1)], "its turn is between those of the other's texts"
