"""Pinned prefixes at a worker: what it reads of the broker, what it refuses, and when it lets the engine work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from redis.exceptions import ResponseError

from engine.prefixes.pins import Beginning
from engine.ticket import Ticket
from stoker.broker import keys, prefixes
from stoker.client.requests import generate_request, pinned_prefix
from stoker.contract import GenerateRequest, GenerateResult, Usage
from stoker.contract.prefixes import MOST_PREFIXES
from stoker.errors import InvalidRequest, ModelError, WorkerUnavailable
from workers.services import pinning as service
from workers.services.pinning import AGAIN, PATIENCE, RENEW, PinnedPrefixes

RESULT = GenerateResult(text="", token_ids=(), finish_reason="length", model="m", adapter=None, usage=Usage())


@dataclass
class FakePinning:
    """Keeps what a test lets it; a beginning has as many tokens as its text has letters."""

    here: set[tuple[int, ...]] = field(default_factory=set)
    disk: set[tuple[int, ...]] = field(default_factory=set)
    pinned: list[list[Beginning]] = field(default_factory=list)
    tickets: list[Ticket[GenerateResult]] = field(default_factory=list)
    asked: list[GenerateRequest] = field(default_factory=list)
    most: int = 100
    full: bool = False
    error: Exception | None = None

    def beginning(self, request: GenerateRequest) -> Beginning:
        self.asked.append(request)
        ids = tuple(map(ord, request.prompt or ""))
        return Beginning(None, ids, len(ids))

    def check(self, beginning: Beginning, before: Sequence[Beginning]) -> None:
        if sum(each.nbytes for each in (*before, beginning)) > self.most:
            raise InvalidRequest("too much")

    def pin(self, beginnings: Sequence[Beginning]) -> None:
        self.pinned.append(list(beginnings))
        if self.full:
            raise OSError("read-only")

    def in_memory(self, beginning: Beginning) -> bool:
        return beginning.ids in self.here

    def on_disk(self, beginning: Beginning) -> bool:
        return beginning.ids in self.disk

    def prefill(self, beginning: Beginning) -> Ticket[GenerateResult]:
        if self.error is not None:
            raise self.error
        self.tickets.append(Ticket("pinned", "generate"))
        return self.tickets[-1]

    def save(self, beginning: Beginning) -> None:
        if self.full:
            raise OSError("read-only")
        self.disk.add(beginning.ids)


class Model:
    def __init__(self, kind: str = "generate") -> None:
        self.kind = kind


class Worker:
    def __init__(self, redis: Any) -> None:
        self.redis, self.now, self.beats, self.fetched = redis, 1000.0, 0, list[str]()
        self.pinning: FakePinning | None = FakePinning()
        self.engine = SimpleNamespace(
            models={"m": Model(), "e": Model("embed")}, idle=True,
            pinning=lambda name: self.pinning,
        )  # fmt: skip
        runtime: Any = SimpleNamespace(redis=redis, engine=self.engine)
        self.service = PinnedPrefixes(runtime, self._beat, lambda: self.now)

    def _beat(self) -> None:
        self.beats += 1

    @property
    def kept(self) -> FakePinning:
        assert self.pinning is not None
        return self.pinning

    def pin(self, name: str, text: str, adapter: str | None = None, time: float = 1.0) -> None:
        prefix = pinned_prefix(generate_request("m", text, 0, {"adapter": adapter}), "me")
        made = prefix.model_copy(update={"time": time})
        prefixes.pin(self.redis.pipeline(), "m", name, made.model_dump_json()).execute()

    def unpin(self, name: str) -> None:
        prefixes.unpin(self.redis.pipeline(), "m", name).execute()

    def look(self, later: float = 1.0) -> dict[str, tuple[str, str]]:
        """A round, so many seconds later; name → state, why."""
        self.now += later
        self.service.round()
        return {state.name: (state.state, state.why) for state in self.service.states}

    def prefilled(self, text: str) -> None:
        """The newest job has come to its end."""
        self.kept.here.add(tuple(map(ord, text)))
        self.kept.tickets[-1].resolve(RESULT)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    with fakeredis.FakeRedis() as redis:
        made = Worker(redis)
        monkeypatch.setattr(service, "fetch", lambda _, model, name, version: made.fetched.append(f"{name}@{version}"))
        yield made


def test_a_pin_is_prefilled_while_no_job_runs_then_written_and_said_to_be_ready(worker: Worker) -> None:
    worker.pin("a", "xyz")
    worker.engine.idle = False
    assert worker.look() == {"a": ("waiting", "")}
    assert [worker.kept.tickets, [len(pins) for pins in worker.kept.pinned], worker.beats] == [[], [1], 1]
    worker.engine.idle = True
    assert worker.look() == {"a": ("waiting", "")}
    worker.look()
    assert len(worker.kept.tickets) == 1, "one job at a time"
    worker.prefilled("xyz")
    assert worker.look() == {"a": ("ready", "")}
    assert len(worker.kept.disk) == 1
    (state,) = worker.service.states
    assert (state.model, state.tokens, state.bytes) == ("m", 3, 3)
    beats = worker.beats
    worker.look()
    assert worker.beats == beats, "nothing new to say"


def test_next_to_jobs_that_never_end_it_waits_a_minute(worker: Worker) -> None:
    worker.engine.idle = False
    worker.pin("a", "xyz")
    worker.look()
    worker.look(PATIENCE - 1)
    assert worker.kept.tickets == []
    worker.look(1)
    assert len(worker.kept.tickets) == 1


def test_what_the_disk_has_is_ready_and_comes_into_memory_when_there_is_time(worker: Worker) -> None:
    worker.kept.disk.add(tuple(map(ord, "xyz")))
    worker.engine.idle = False
    worker.pin("a", "xyz")
    assert worker.look() == {"a": ("ready", "")}
    worker.look(2 * PATIENCE)
    assert worker.kept.tickets == []
    worker.engine.idle = True
    worker.look()
    assert len(worker.kept.tickets) == 1


def test_one_that_memory_does_not_keep_is_no_loop(worker: Worker) -> None:
    worker.pin("a", "xyz")
    worker.look()
    worker.kept.tickets[-1].resolve(RESULT)
    for _ in range(5):
        worker.look()
    assert len(worker.kept.tickets) == 1
    worker.look(AGAIN)
    assert len(worker.kept.tickets) == 2


def test_what_failed_is_said_and_tried_again(worker: Worker) -> None:
    worker.pin("a", "xyz")
    worker.look()
    worker.kept.tickets[-1].fail(ModelError("not finite"))
    assert worker.look() == {"a": ("waiting", "it was not prefilled: not finite")}
    worker.kept.error = WorkerUnavailable("unloaded")
    assert worker.look(AGAIN) == {"a": ("waiting", "it was not prefilled: unloaded")}
    worker.kept.error = None
    worker.look(AGAIN)
    worker.prefilled("xyz")
    assert worker.look() == {"a": ("ready", "")}


def test_a_disk_that_takes_nothing_is_said_and_tried_once_a_minute(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.kept.full = True
    worker.pin("a", "xyz")
    worker.look()
    worker.prefilled("xyz")
    assert worker.look() == {"a": ("ready", "in memory alone: read-only")}
    worker.kept.full = False
    assert worker.look() == {"a": ("ready", "in memory alone: read-only")}
    assert worker.look(AGAIN) == {"a": ("ready", "")}


def test_what_has_no_room_next_to_those_before_it_is_refused_and_the_others_stay(worker: Worker) -> None:
    worker.kept.most = 5
    worker.pin("late", "xyz", time=2.0)
    worker.pin("early", "abcd", time=1.0)
    worker.pin("small", "a", time=3.0)
    found = worker.look()
    assert found == {"early": ("waiting", ""), "late": ("refused", "too much"), "small": ("waiting", "")}
    assert [len(each.ids) for each in worker.kept.pinned[-1]] == [4, 1]
    worker.unpin("early")
    assert worker.look()["late"] == ("waiting", "")


def test_unpinning_lets_go_also_what_was_unpinned_while_no_worker_lived(worker: Worker) -> None:
    worker.look()
    assert worker.kept.pinned == [[]], "the disk may know pins of before"
    worker.pin("a", "xyz")
    worker.look()
    worker.unpin("a")
    assert worker.look() == {}
    assert worker.kept.pinned[-1] == []
    looks = len(worker.kept.pinned)
    worker.look()
    assert len(worker.kept.pinned) == looks, "nothing has changed"
    worker.look(RENEW)
    assert len(worker.kept.pinned) == looks + 1, "the disk hears that a worker still pins"


def test_a_model_that_comes_anew_hears_of_them_anew(worker: Worker) -> None:
    worker.pin("a", "xyz")
    worker.look()
    worker.engine.models = {"m": Model()}
    worker.pinning = FakePinning()
    assert worker.look() == {"a": ("waiting", "")}
    assert len(worker.kept.pinned) == 1
    worker.engine.models = {}
    assert worker.look() == {}


def test_a_name_of_an_adapter_is_the_version_that_serves_and_follows_it(worker: Worker) -> None:
    worker.pin("a", "xyz", adapter="style")
    assert worker.look() == {"a": ("waiting", "")}, "the engine may know it"
    for version in (1, 2):
        worker.redis.hset(keys.adapter("m", "style"), mapping={"serving": version, f"version:{version}": "{}"})
        worker.look()
        assert worker.kept.asked[-1].adapter == f"style@{version}"
    assert worker.fetched == ["style@1", "style@2"]
    worker.redis.hset(keys.adapter("m", "style"), "serving", "")
    state, why = worker.look()["a"]
    assert [state, "none of its versions" in why] == ["refused", True]


def test_a_model_that_ranks_share_keeps_none(worker: Worker) -> None:
    worker.pinning = None
    worker.pin("a", "xyz")
    state, why = worker.look()["a"]
    assert [state, "ranks share m" in why] == ["refused", True]


def test_what_another_program_wrote_hurts_itself_alone(worker: Worker) -> None:
    worker.pin("a", "xyz")
    odd = {"b": "garbage", "C/..": "{}", "d": '{"id": "x", "time": 1, "client": "c"}', prefixes.CHANGED: "z"}
    worker.redis.hset(keys.prefixes("m"), mapping=odd)
    worker.redis.hset(keys.prefixes("m"), "empty", '{"id": "%s", "time": 1, "client": "c"}' % ("0" * 32))
    found = worker.look()
    assert {name: state for name, (state, _) in found.items()} == {"a": "waiting", "empty": "refused"}
    worker.engine.models = {"n": Model(), **worker.engine.models}
    worker.redis.set(keys.prefixes("n"), "x")
    for _ in range(2):
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            worker.look()
    worker.unpin("a")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        worker.look()
    assert [state.name for state in worker.service.states] == ["empty"], "the other model goes on"


def test_a_defect_in_one_prefix_is_said_of_it_and_the_others_are_kept(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = worker.kept.beginning

    def beginning(request: GenerateRequest) -> Beginning:
        if request.prompt == "odd":
            raise ValueError("a defect")
        return whole(request)

    monkeypatch.setattr(worker.kept, "beginning", beginning)
    worker.pin("bad", "odd")
    worker.pin("good", "xyz", time=2.0)
    assert worker.look() == {"bad": ("refused", "ValueError: a defect"), "good": ("waiting", "")}
    worker.kept.tickets[-1].fail(RuntimeError("out of memory"))
    assert worker.look()["good"] == ("waiting", "it was not prefilled: RuntimeError: out of memory")


def test_no_more_are_kept_than_may_be_pinned(worker: Worker) -> None:
    for number in range(MOST_PREFIXES + 2):
        worker.pin(f"p{number}", "xyz", time=float(number))
    assert len(worker.look()) == MOST_PREFIXES


def test_a_worker_that_stops_leaves_them(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(beginnings: Sequence[Beginning]) -> None:
        raise WorkerUnavailable("the worker is stopping")

    monkeypatch.setattr(worker.kept, "pin", stopping)
    worker.pin("a", "xyz")
    worker.look()
    assert worker.kept.tickets == []
