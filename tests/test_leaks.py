"""The fixtures notice what a test leaves behind."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from stoker.broker import keys
from tests.leaks import Held, assert_nothing, open_work, overlong_keys, processes_of

QUEUE = keys.queue("toy", "generate")


@pytest.mark.parametrize("kind", keys.KINDS, ids=lambda kind: kind.name)
def test_each_kind_of_key_has_its_own_longest_life(kind: keys.Kind) -> None:
    examples = (
        *(
            keys.job("x"),
            keys.result("x"),
            keys.stream("x"),
            keys.cancel("x"),
            keys.blob("vectors:x"),
            keys.worker("x"),
            keys.commands("x"),
            keys.command("x"),
            keys.loading("x"),
            keys.placed(QUEUE, "x"),
            keys.beginning("0" * 32),
        ),
        *(make(QUEUE) for make in (keys.open_jobs, keys.turns, keys.dispatched, keys.pace, keys.sizes, keys.ready)),
        *(
            keys.backlog(QUEUE, 0),
            keys.client("x", QUEUE),
            keys.blob("dataset:x"),
            keys.blob("adapter:x"),
            keys.checkpoint("x"),
        ),
        *(keys.WORKERS, keys.metrics("x"), keys.spoiled(keys.DEAD)),
        *(keys.VECTORS_UNFETCHED, keys.VECTORS_FETCHED, keys.VECTORS_SIZES),
        *(keys.adapters("m"), keys.adapter("m", "x"), keys.artifact("m", "x", 1), keys.MODELS, keys.DEAD, keys.JANITOR),
        *(keys.API_KEYS, keys.rate("x"), keys.fine_tune("x"), keys.fine_tunes("x")),
        *(keys.file("x"), keys.files("x"), keys.file_contents("x")),
        *(keys.batch("x"), keys.batches("x"), keys.open_batches("x"), keys.batch_runner("x")),
        *(
            keys.prefixes("m"),
            keys.POLICY,
            keys.UNACKED,
            keys.LEASES,
            "stoker:unacked_mutex",
            "stoker:_kombu.binding.celery",
        ),
    )
    names = [name for name in examples if keys.kind_of(name) == kind]
    assert names
    broker = fakeredis.FakeRedis()
    for name in names:
        broker.set(name, "x", ex=kind.lifetime)
    assert overlong_keys(broker) == []
    if kind.lifetime is not None:
        for name in names:
            broker.expire(name, kind.lifetime + 1)
        assert len(overlong_keys(broker)) == len(names)
        for name in names:
            broker.persist(name)
        assert len(overlong_keys(broker)) == len(names)


def test_a_key_that_no_kind_declares_is_found_however_soon_it_expires() -> None:
    broker = fakeredis.FakeRedis()
    for name in ("other", "stoker:jobs:x", "stoker:job:", f"stoker:backlog:{QUEUE}:10", "stoker:blob:other:x"):
        broker.set(name, "x", ex=1)
    assert len(overlong_keys(broker)) == 5


def test_what_says_that_a_job_waits_or_runs_is_found() -> None:
    broker = fakeredis.FakeRedis()
    for name in (keys.result("x"), keys.job("x"), keys.pace(QUEUE), f"{keys.UNACKED}_mutex"):
        broker.set(name, "x")
    assert open_work(broker) == []
    left = {keys.ready(QUEUE), keys.backlog(QUEUE, 3), keys.dispatched(QUEUE), keys.UNACKED, keys.client("a", QUEUE)}
    for name in left:
        broker.set(name, "x")
    assert set(open_work(broker)) == left


@contextmanager
def sleeping(**options: Any) -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"], **options) as child:
        try:
            yield child.pid
        finally:
            child.kill()


def test_a_thread_a_file_and_a_process_are_found_and_what_has_ended_is_not(tmp_path: Path) -> None:
    before, release = Held.now(), threading.Event()
    thread = threading.Thread(target=release.wait, name="left-over")
    thread.start()
    with (tmp_path / "file").open("w"), sleeping() as pid:
        left = before.left()
        release.set()
    assert any(str(tmp_path / "file") in entry for entry in left)
    assert {f"process {pid}", "thread left-over"} < set(left)
    thread.join()
    assert_nothing(before.left, "all of it has ended")


def test_a_process_is_known_by_the_home_that_it_was_started_for(tmp_path: Path) -> None:
    home = tmp_path / "elsewhere"
    with sleeping(env={"STOKER_HOME": str(home)}) as pid:
        assert_nothing(lambda: [pid] if processes_of(home) != [pid] else [], "it is found")
    assert processes_of(home) == []


def test_what_stays_is_named() -> None:
    with pytest.raises(AssertionError, match=r"left by the test: \['thread x'\]"):
        assert_nothing(lambda: ["thread x"], "left by the test", seconds=0.0)
