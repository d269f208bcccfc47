"""What the page shows, from what was seen."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from stoker.broker.ledger.record import Watched
from stoker.broker.letters import Letter
from stoker.broker.registry import AdapterEntry
from stoker.contract import ModelCard, Presence
from stoker.contract.presence import ModelState, PrefixState
from stoker.monitor.mirror import Mirror, ending
from stoker.monitor.notices import Ended, Known, Progress, Started, WaitsAgain
from stoker.monitor.overview import LISTED, overview, queues, runs
from tests.monitor.test_curve import report

QUEUE = "stoker.base.generate"
WORKER = "stoker-1@mac/aa"


def said(**changes: Any) -> Watched:
    fields = {"kind": "generate", "model": "base", "client": "team", "priority": 5, "adapter": "", "size": "40 tokens"}
    return Watched(**{**fields, "submitted": 100.0, "worker": None, "crashes": 0, **changes})


def mirror(now: float = 200.0) -> Mirror:
    made = Mirror()
    made.follow(QUEUE, "base", "generate")
    made.follow("stoker.base.train", "base", "train")
    made.now = now
    return made


def card(**changes: Any) -> ModelCard:
    fields = {"model": "base", "architecture": "llama", "kinds": ("generate", "train"), "context": 8, "parameters": 1}
    return ModelCard(**{**fields, **changes})


def presence(**changes: Any) -> Presence:
    fields = {"worker": WORKER, "host": "mac", "pid": 1, "device": "gpu", "started": 100.0, "time": 160.0}
    there = {"models": (card(),), "adapters": {"base": ("style@1",)}, "lanes": {"generate": (1, 16)}}
    return Presence(**{**fields, **there, "memory_bytes": 2**20, **changes})


def test_waiting_jobs_are_counted_by_priority_age_and_client() -> None:
    seen = mirror()
    for number in range(30):
        job = said(priority=number % 3, submitted=200.0 - number * 30, client=f"c{number % 2}")
        seen.hear(QUEUE, f"job-{number}", job)
    seen.hear(QUEUE, "runs", said(worker=WORKER, client="c1"))
    queue, idle = queues(seen)
    assert (queue.waiting, queue.running, queue.oldest) == (30, 1, 870.0)
    assert queue.by_priority == (10, 10, 10, 0, 0, 0, 0, 0, 0, 0)
    assert queue.by_age == (1, 1, 18, 10)
    assert [(share.client, share.waiting, share.running) for share in queue.clients] == [("c1", 15, 1), ("c0", 15, 0)]
    assert (idle.name, idle.waiting, idle.oldest) == ("stoker.base.train", 0, 0.0), "a queue without jobs has its row"


def test_the_best_of_those_that_wait_are_listed_and_all_are_counted() -> None:
    seen = mirror()
    for number in range(LISTED + 50):
        seen.hear(QUEUE, f"job-{number}", said(priority=number % 10, submitted=100.0 + number))
    shown = overview(seen, [], [], {})
    assert (len(shown.waiting), shown.waiting_in_all) == (LISTED, LISTED + 50)
    assert [job.priority for job in shown.waiting] == sorted(job.priority for job in shown.waiting)
    assert shown.waiting[0].id == "job-0"


def test_running_jobs_and_runs_say_how_far_they_are() -> None:
    seen = mirror()
    seen.hear(QUEUE, "talks", said(worker=WORKER))
    assert seen.counted("talks", 10) == [Progress("talks", "10 of at most 40 tokens")]
    seen.now += 2.0
    seen.counted("talks", 30)
    seen.hear("stoker.base.train", "learns", said(kind="train", adapter="style", worker=WORKER))
    seen.report("learns", [report(step) for step in range(1, 43)])
    shown = overview(seen, [presence()], [], {})
    by_id = {job.id: job for job in shown.running}
    assert (by_id["talks"].share, by_id["talks"].text) == (0.75, "30 tokens · 10 tokens/s")
    assert (by_id["learns"].share, by_id["learns"].worker) == (0.42, "stoker-1@mac")
    (run,) = shown.runs
    assert (run.name, run.running, run.points[-1][0]) == ("style", True, 42)
    assert shown.workers[0].tokens_per_second == 10.0 + 61.4
    seen.end("stoker.base.train", "learns", "REVOKED", "")
    assert [(run.id, run.running) for run in overview(seen, [], [], {}).runs] == [("learns", False)]


def test_no_job_is_done_by_more_than_all() -> None:
    """A stream that is read again has more entries than tokens were asked for."""
    seen = mirror()
    seen.hear(QUEUE, "talks", said(worker=WORKER))
    seen.counted("talks", 50)
    (job,) = overview(seen, [presence()], [], {}).running
    assert job.share == 1.0


def test_curves_of_ended_runs_do_not_grow_without_end() -> None:
    seen = mirror()
    for number in range(40):
        seen.hear("stoker.base.train", f"run-{number}", said(kind="train", worker=WORKER))
        seen.end("stoker.base.train", f"run-{number}", "SUCCESS", "")
    assert [run.id for run in overview(seen, [], [], {}).runs] == [f"run-{number}" for number in range(39, 31, -1)]


def test_adapters_and_letters_say_what_can_be_done_with_them() -> None:
    facts: dict[str, Any] = {"method": "lora", "rank": 8, "loss": 1.5, "source": "trained"}
    entry = AdapterEntry("base", "style", 2, (1,), {1: facts, 2: facts})
    empty = AdapterEntry("base", "failed", None, (), {})
    letters = {
        "died": Letter(kind="train", model="base", request="secret", client="team",
                       history=[{"worker": WORKER, "time": 1.0}, {"worker": "w", "time": 2.0, "trouble": "no disk"}]),
        "noise": Letter(kind="message", model="", request="", client="", history=[], bytes=3, message="AAAA"),
    }  # fmt: skip
    shown = overview(mirror(), [], [entry, empty], letters, "no answer")
    (adapter,) = shown.adapters
    assert [(version.number, version.serves) for version in adapter.versions] == [(2, True), (1, False)]
    assert (adapter.can_roll_back, adapter.versions[0].facts) == (True, "lora, rank 8, loss 1.500, trained")
    assert [(letter.id, letter.can_retry) for letter in shown.dead] == [("died", True), ("noise", False)]
    assert shown.dead[0].history == (f"{WORKER} went silent", "w: no disk")
    assert shown.trouble == "no answer"
    assert "secret" not in json.dumps(asdict(shown))


def test_what_the_ledger_says_of_a_job_becomes_one_notice_a_change() -> None:
    seen = mirror()
    assert seen.hear(QUEUE, "job", said()) == [Known.of("job", said())]
    assert seen.hear(QUEUE, "job", said()) == []
    assert seen.hear(QUEUE, "job", said(worker=WORKER)) == [Started("job", WORKER, 200.0)]
    assert seen.hear(QUEUE, "job", said(worker=WORKER)) == []
    other = said(worker="stoker-2@mac/bb", crashes=1)
    assert seen.hear(QUEUE, "job", other) == [Known.of("job", other), Started("job", "stoker-2@mac/bb", 200.0)]
    waits = said(crashes=1)
    assert seen.hear(QUEUE, "job", waits) == [WaitsAgain("job", 200.0, 1)]
    assert seen.hear(QUEUE, "job", None) == []
    assert seen.end(QUEUE, "job", "FAILURE", "JobDead") == [Ended("job", "FAILURE", 200.0, "JobDead")]
    assert not seen.jobs


def test_a_long_queue_is_compared_less_often() -> None:
    seen = mirror()
    line = seen.lines[QUEUE]
    for number in range(5000):
        seen.hear(QUEUE, str(number), said())
    assert not line.differs(5000, 300.0)
    line.compared = 300.0
    assert not line.differs(4999, 304.0)
    assert line.differs(4999, 305.0)
    gone, new = seen.vanished(QUEUE, [b"new", *(str(number).encode() for number in range(1, 5000))])
    assert (gone, new) == (["0"], ["new"])


def test_the_first_bytes_of_a_result_say_how_a_job_ended() -> None:
    assert ending(b'{"status": "SUCCESS", "result": {"text": "secret", "exc_type": "x') == ("SUCCESS", "")
    assert ending(b'{"status": "FAILURE", "result": {"exc_type": "JobDead", "exc_') == ("FAILURE", "JobDead")
    assert ending(b'{"status": "REVOKED", "result"') == ("REVOKED", "")
    for spoiled in (None, b"", b"\xff\xfe", b'{"status": "PENDING"}', b"[]"):
        assert ending(spoiled)[0] == "FAILURE"


def test_a_job_that_no_client_wrote_is_asked_for_once() -> None:
    seen = mirror()
    seen.follow("queue", "base", "generate")
    assert seen.newcomers("queue", [(b"stray", 1.0)]) == ["stray"]
    assert seen.hear("queue", "stray", None) == []
    assert seen.newcomers("queue", [(b"stray", 1.0)]) == []


def test_a_job_that_began_anew_has_no_pace_below_zero() -> None:
    seen = mirror(100.0)
    seen.hear(QUEUE, "job", said(worker=WORKER))
    paces = []
    for now, entries in ((101.0, 10), (103.0, 30), (105.0, 4), (105.0, 9), (109.0, 9)):
        seen.now = now
        seen.counted("job", entries)
        paces.append(seen.jobs["job"].pace)
    assert paces == [0.0, 10.0, 0.0, 0.0, 0.0]
    assert seen.rates() == {WORKER: 0.0}


def test_of_runs_that_have_ended_the_last_few_are_shown_and_nothing_else_is_kept() -> None:
    seen = mirror()
    for number in range(20):
        seen.hear("stoker.base.train", f"run-{number}", said(kind="train", worker=WORKER))
        seen.end("stoker.base.train", f"run-{number}", "SUCCESS", "")
    kept = [f"run-{number}" for number in range(12, 20)]
    assert list(seen.runs) == kept
    assert [run.id for run in runs(seen)] == kept[::-1]
    with pytest.raises(KeyError):
        seen.run_of("run-0")


def test_only_jobs_that_run_are_asked_how_far_they_are() -> None:
    seen = mirror()
    seen.hear(QUEUE, "waits", said())
    seen.hear(QUEUE, "runs", said(worker=WORKER))
    seen.hear("stoker.base.train", "learns", said(kind="train", worker=WORKER))
    assert (seen.owned("generate"), seen.owned("train")) == (["runs"], ["learns"])


def test_a_queue_that_was_compared_is_not_compared_again_at_once() -> None:
    seen = mirror(500.0)
    seen.hear(QUEUE, "job", said())
    assert seen.lines[QUEUE].differs(2, seen.now)
    seen.vanished(QUEUE, [b"job"])
    assert not seen.lines[QUEUE].differs(2, seen.now + 0.5)
    assert seen.lines[QUEUE].differs(2, seen.now + 1.0)


def test_a_client_whose_jobs_all_run_has_its_share_too() -> None:
    seen = mirror()
    seen.hear(QUEUE, "one", said(client="waits"))
    seen.hear(QUEUE, "two", said(client="runs", worker=WORKER))
    shares = {share.client: (share.waiting, share.running) for share in queues(seen)[0].clients}
    assert shares == {"waits": (1, 0), "runs": (0, 1)}


def test_a_worker_is_shown_with_what_it_holds_may_hold_and_keeps() -> None:
    states = (
        ModelState(model="base", state="warm", pinned=True), ModelState(model="late", state="refused", why="no files"),
    )  # fmt: skip
    pins = (
        PrefixState(model="base", name="support", id="0" * 32, state="ready"),
        PrefixState(model="base", name="long", id="1" * 32, state="refused", why="no room"),
    )
    seen = presence(states=states, prefixes=pins, lanes={"generate": (1, 16)})
    (worker,) = overview(mirror(), [seen], [], {}).workers
    assert worker.prefixes == ("support on base (ready)", "long on base (refused: no room)")
    assert worker.models == ("base (generate, train, pinned)", "late (refused: no files)")
    assert [(lane.kind, lane.held, lane.limit) for lane in worker.lanes] == [("generate", 1, 16)]
    assert (worker.up, worker.adapters) == (60.0, ("style@1 on base",))
    (young,) = overview(mirror(), [presence(started=200.0)], [], {}).workers
    assert young.up == 0.0, "the clocks of two machines differ"


def test_what_has_no_version_before_is_not_rolled_back() -> None:
    (adapter,) = overview(mirror(), [], [AdapterEntry("base", "style", 1, (), {1: {"rank": 8}})], {}).adapters
    assert not adapter.can_roll_back


def test_workers_have_the_sum_of_what_their_jobs_publish() -> None:
    seen = mirror()
    for name in ("one", "two"):
        seen.hear(QUEUE, name, said(worker=WORKER))
        seen.counted(name, 0)
    seen.now += 2.0
    for name, entries in (("one", 10), ("two", 30)):
        seen.counted(name, entries)
    assert seen.rates() == {WORKER: 20.0}
