"""Models come and go at a worker: who makes way, what is refused, and what becomes of the jobs that wait."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from stoker.broker import keys, ledger
from stoker.client.model_choice import parse_cards
from stoker.client.submission import job_record
from stoker.contract import GenerateRequest, ModelCard, Presence, TrainRequest, encode
from stoker.contract.control import ModelCommand, ModelReport
from stoker.contract.kinds import ADAPTERS, GENERATE, TRAIN
from stoker.contract.presence import ModelState
from stoker.errors import InvalidRequest, ModelError, StokerError, WorkerUnavailable, from_wire
from stoker.settings import Settings
from workers.deliveries import Deliveries, Health
from workers.others import others
from workers.residents import MEGABYTE, NoRoom, Origin, Residents
from workers.services import keeper as keeping
from workers.services.demand import NO_ROOM_FOR, REFUSED_FOR
from workers.services.managing import model_management
from workers.services.orphans import Orphans, has_home
from workers.services.presence import Heart

KINDS = (GENERATE.name, TRAIN.name, ADAPTERS.name)
#: Megabytes of each model here; those of the worker may have 1000 together.
SIZES = {"a": 400, "b": 400, "c": 400, "huge": 1200, "damaged": 400, "remote": 10, "lazy": 400, "late": 400, "odd": 10}
LIMIT = 1000


def card(model: str, kinds: Sequence[str] = KINDS) -> ModelCard:
    return ModelCard(model=model, architecture="llama", kinds=tuple(kinds), context=8, parameters=1)


class FakeEngine:
    """Holds what a test gives it. `headers` and `files`: models whose headers, or weights, cannot be read."""

    device, memory_bytes, ranks = "cpu", 0, 1
    adapters: Mapping[str, tuple[str, ...]] = {}

    def __init__(self) -> None:
        self.models: dict[str, Any] = {}
        self.headers: dict[str, Exception] = {"missing": ModelError("/missing: no such file or folder")}
        self.files: dict[str, Exception] = {
            "damaged": ModelError("/damaged: a tensor is missing"),
            "remote": ModelError("/remote: auto_map is not supported"),
        }
        self.busy: set[str] = set()
        self.shared: set[str] = set()
        self.loaded: list[str] = []
        self.asked: list[str] = []

    @property
    def cards(self) -> list[ModelCard]:
        return [card(name) for name in self.models]

    def prospect(self, name: str, sources: Sequence[str], *, download: bool = False) -> Any:
        self.asked.append(name)
        if name in self.headers:
            raise self.headers[name]
        return SimpleNamespace(card=card(name), bytes=SIZES[name] * MEGABYTE)

    def load(self, name: str, sources: Sequence[str]) -> Any:
        if name in self.files:
            raise self.files[name]
        self.models[name] = SimpleNamespace(bytes=SIZES[name] * MEGABYTE)
        self.loaded.append(name)
        return self.models[name]

    def unload(self, name: str) -> bool:
        if name in self.busy:
            return False
        del self.models[name]
        return True

    def shares(self, name: str) -> str:
        return "layers" if name in self.shared else ""


class Doors:
    def __init__(self) -> None:
        self.open: set[str] = set()

    def serve(self, queues: Mapping[str, Sequence[str]]) -> None:
        self.open = {name for names in queues.values() for name in names}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """All of a worker that has to do with its models, over a real broker; its engine holds nothing."""

    def __init__(self, settings: Settings, redis: Any, name: str = "w@here/1", **more: Any) -> None:
        self.engine, self.doors, self.redis = FakeEngine(), Doors(), redis
        for model in ("a", "b"):
            self.engine.load(model, ())
        options = {"models": ("a=/a", "b=/b"), "model_memory": LIMIT, **more}
        self.clock = Clock()
        self.deliveries = Deliveries(Health(1), self.clock)
        runtime: Any = SimpleNamespace(
            redis=redis, name=name, engine=self.engine, started=0.0, stopped=threading.Event(),
            stopping=False,
            settings=settings.model_copy(update=options), job_meter=SimpleNamespace(expect=lambda cards: None),
        )  # fmt: skip
        self.runtime = runtime
        lanes: Any = SimpleNamespace(load=dict, held_back={}, grow=lambda: None)
        janitor: Any = SimpleNamespace(round=lambda: None)
        self.heart = Heart(runtime, lanes, janitor)
        managed = model_management(runtime, self.deliveries, self.doors, self.heart.beat)
        self.keeper, self.demand, self.commands = managed.keeper, managed.demand, managed.commands
        self.keeper.residents.clock = self.clock
        for position, resident in enumerate(self.keeper.residents):
            resident.used = position + 1.0
        self.heart.residency = lambda: self.keeper.residency
        self.heart.beat()

    def hold(self, model: str, kind: str = GENERATE.name) -> Any:
        """A job of the model is here."""
        held: Any = SimpleNamespace(token=f"{model}-{kind}", tag="t", queue=keys.queue(model, kind))
        self.deliveries.add(held)
        return held

    def let_wait(self, model: str, job_id: str = "job") -> str:
        """A job of the model that nobody has taken."""
        request = GenerateRequest(model=model, prompt="x")
        assert ledger.submit(self.redis, job_id, job_record(request, job_id)).state == "new"
        return job_id

    def ending(self, job_id: str) -> tuple[str, str] | None:
        """Class and words of the error that a job has ended with."""
        raw = self.redis.get(keys.result(job_id))
        result = json.loads(raw)["result"] if raw else None
        return (result["exc_type"], result["exc_message"][0]) if result else None

    @property
    def warm(self) -> list[str]:
        return sorted(self.engine.models)

    def states(self) -> dict[str, str]:
        raw = self.redis.get(keys.worker(self.runtime.name))
        return {state.model: state.state for state in Presence.model_validate_json(raw).states}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "LEAVE_WITHIN", 0.0)


@pytest.fixture
def make(broker: Settings, redis: Any) -> Callable[..., Worker]:
    return partial(Worker, broker, redis)


@pytest.fixture
def worker(make: Callable[..., Worker]) -> Worker:
    return make()


def names(model: str) -> set[str]:
    return {keys.queue(model, kind) for kind in KINDS}


def load(worker: Worker, model: str, origin: Origin = Origin.COMMANDED) -> tuple[str, ...]:
    return worker.keeper.load(model, (f"/{model}",), origin)


# --- room ---


def test_the_model_that_was_used_longest_ago_makes_way_and_no_other(worker: Worker) -> None:
    assert load(worker, "c") == ("a",)
    assert worker.warm == ["b", "c"]
    assert worker.doors.open == names("b") | names("c")


def test_a_job_that_ended_lately_counts_as_use(worker: Worker) -> None:
    first, second = worker.hold("a"), worker.hold("b")
    for held in (second, first):
        worker.clock.now += 1
        worker.deliveries.remove(held)
    assert load(worker, "c") == ("b",), "by the end of its last job, not by the beginning"


@pytest.mark.parametrize("kind", KINDS)
def test_neither_a_pinned_model_nor_one_in_use_or_training_makes_way(worker: Worker, kind: str) -> None:
    worker.keeper.pin("b", on=True)
    worker.hold("a", kind)
    with pytest.raises(NoRoom, match=r"b \(400 MB, pinned\), a \(400 MB, in use: 1 job of it here"):
        load(worker, "c")
    assert worker.warm == ["a", "b"]
    worker.keeper.pin("b", on=False)
    assert load(worker, "c") == ("b",)


def test_a_model_with_jobs_that_wait_does_not_make_way(worker: Worker) -> None:
    worker.let_wait("a")
    assert load(worker, "c") == ("b",)


def test_a_model_that_never_fits_says_what_it_takes_and_nothing_makes_way(worker: Worker) -> None:
    with pytest.raises(NoRoom, match=r"huge: its weights take about 1,200 MB.*1,000 MB together.*STOKER_MODEL_MEMORY"):
        load(worker, "huge")
    assert worker.warm == ["a", "b"]


def test_models_that_fit_together_leave_nobody_out(make: Callable[..., Worker]) -> None:
    assert load(make(model_memory=1200), "c") == ()


@pytest.mark.parametrize("error", [ModelError("/damaged: a tensor is missing"), RuntimeError("[malloc] no memory")])
def test_what_made_way_for_a_model_that_cannot_be_loaded_is_back(worker: Worker, error: Exception) -> None:
    worker.engine.files["damaged"] = error
    worker.keeper.pin("b", on=True)
    with pytest.raises(ModelError, match="damaged"):
        load(worker, "damaged")
    assert worker.warm == ["a", "b"]
    assert worker.doors.open == names("a") | names("b")
    assert worker.states() == {"a": "warm", "b": "warm", "damaged": "refused"}


def test_a_model_that_made_way_in_vain_and_cannot_come_back_is_refused_and_comes_when_a_job_waits(
    worker: Worker,
) -> None:
    worker.keeper.pin("b", on=True)
    worker.engine.files["a"] = ModelError("/a: a tensor is gone meanwhile")
    with pytest.raises(ModelError, match="/damaged: a tensor is missing"):
        load(worker, "damaged")
    assert worker.warm == ["b"]
    assert worker.doors.open == names("b"), "its jobs wait"
    assert worker.states() == {"b": "warm", "a": "refused", "damaged": "refused"}
    assert worker.keeper.refused["a"] == "/a: a tensor is gone meanwhile"
    del worker.engine.files["a"]
    worker.let_wait("a")
    worker.demand.round()
    assert worker.warm == ["a", "b"]
    assert worker.doors.open == names("a") | names("b")


def test_a_model_whose_headers_cannot_be_read_hurts_no_other(worker: Worker) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load(worker, "missing")
    assert worker.engine.loaded == ["a", "b"], "nothing made way"


def test_what_was_loaded_by_command_or_at_the_start_comes_back_when_a_job_waits(worker: Worker) -> None:
    load(worker, "c")
    worker.let_wait("a")
    worker.demand.round()
    assert worker.warm == ["a", "c"]


# --- unloading ---


def test_a_model_in_use_is_not_unloaded_and_goes_on_taking_jobs(worker: Worker) -> None:
    worker.hold("a")
    with pytest.raises(InvalidRequest, match=r"'a' is in use: 1 job"):
        worker.keeper.unload("a")
    assert "a" in worker.warm
    assert worker.doors.open == names("a") | names("b")


def test_a_model_whose_lane_has_work_is_not_unloaded(worker: Worker) -> None:
    worker.engine.busy.add("a")
    with pytest.raises(InvalidRequest, match="in use"):
        worker.keeper.unload("a")
    assert worker.doors.open == names("a") | names("b")


def test_a_pinned_model_is_unloaded_once_it_is_unpinned(worker: Worker) -> None:
    worker.keeper.pin("a", on=True)
    with pytest.raises(InvalidRequest, match="stoker models unpin a"):
        worker.keeper.unload("a")
    worker.keeper.pin("a", on=False)
    worker.keeper.unload("a")
    assert worker.warm == ["b"]
    assert worker.doors.open == names("b")


def test_a_model_that_ranks_share_stays(worker: Worker) -> None:
    worker.engine.shared = {"a", "b"}
    with pytest.raises(
        InvalidRequest, match="'a' is shared by the ranks of this group, and stays for as long as it runs"
    ):
        worker.keeper.unload("a")
    with pytest.raises(NoRoom, match=r"a \(400 MB, shared by the ranks of this group\)"):
        load(worker, "c")
    assert worker.warm == ["a", "b"]


def test_jobs_of_a_model_that_nobody_holds_any_more_end_with_the_error_of_an_unknown_model(worker: Worker) -> None:
    job = worker.let_wait("a")
    worker.keeper.unload("a")
    kind, words = worker.ending(job) or ("", "")
    assert kind == "UnknownModel"
    assert "'a' was unloaded" in words
    assert not worker.redis.zcard(keys.open_jobs(keys.queue("a", "generate")))


def test_jobs_wait_while_another_worker_holds_the_model_or_may_load_it(
    make: Callable[..., Worker], worker: Worker
) -> None:
    other = make(name="other@here/1")
    job = worker.let_wait("a")
    worker.keeper.unload("a")
    assert worker.ending(job) is None
    other.keeper.unload("a")
    assert worker.ending(job) is not None


def test_jobs_wait_while_another_worker_loads_the_model(make: Callable[..., Worker], worker: Worker) -> None:
    job, other = worker.let_wait("a"), make(name="other@here/1")
    other.keeper.unload("a")
    plain, ends = other.engine.load, list[object]()

    def load_meanwhile(name: str, sources: Sequence[str]) -> Any:
        worker.keeper.unload("a")
        ends.append(worker.ending(job))
        return plain(name, sources)

    other.engine.load = load_meanwhile  # type: ignore[method-assign]
    load(other, "a")
    assert ends == [None]
    assert worker.ending(job) is None


def test_a_job_that_came_a_moment_after_its_model_left_ends_too(worker: Worker) -> None:
    worker.keeper.unload("a")
    job = worker.let_wait("a")
    raw = worker.redis.hget(keys.MODELS, "a/1")
    orphans = Orphans(worker.runtime)
    assert orphans.sweep(ModelCard.model_validate_json(raw)) == 1
    assert (worker.ending(job) or ("",))[0] == "UnknownModel"
    assert orphans.sweep(card("b")) == 0, "a model that has not gone"


def test_a_job_that_runs_elsewhere_is_not_ended(worker: Worker) -> None:
    job = worker.let_wait("a")
    assert ledger.claim(worker.redis, job, keys.queue("a", "generate"), "token", "tag", "x").state == "run"
    worker.keeper.unload("a")
    assert worker.ending(job) is None


def test_two_models_of_one_name_are_refused(worker: Worker) -> None:
    with pytest.raises(InvalidRequest, match="another model is called a"):
        worker.keeper.load("a", ("/elsewhere",), Origin.COMMANDED)


# --- on demand ---


@pytest.fixture
def lazy(make: Callable[..., Worker]) -> Worker:
    worker = make(on_demand=("lazy=/lazy",), idle_unload=60.0)
    worker.demand.round()
    return worker


def test_a_model_is_loaded_when_a_job_waits_for_it_and_not_before(lazy: Worker) -> None:
    assert lazy.warm == ["a", "b"]
    assert lazy.states() == {"a": "warm", "b": "warm"}, "not said before the next beat"
    lazy.heart.beat()
    assert lazy.states()["lazy"] == "offered"
    lazy.let_wait("lazy")
    lazy.demand.round()
    assert lazy.warm == ["b", "lazy"]
    assert lazy.doors.open == names("b") | names("lazy")


def test_a_model_on_demand_leaves_when_it_was_idle_for_the_set_time(lazy: Worker) -> None:
    job = lazy.let_wait("lazy")
    lazy.demand.round()
    ledger.cancel(lazy.redis, job, keys.queue("lazy", "generate"))
    lazy.clock.now += 59.0
    lazy.demand.round()
    assert "lazy" in lazy.warm
    lazy.clock.now += 1.0
    held = lazy.hold("lazy")
    lazy.demand.round()
    assert "lazy" in lazy.warm, "a job of it is here"
    lazy.deliveries.remove(held)
    lazy.demand.round()
    assert "lazy" in lazy.warm, "its last job ended just now"
    lazy.clock.now += 60.0
    lazy.demand.round()
    assert lazy.warm == ["b"]
    assert lazy.states()["lazy"] == "offered"


@pytest.mark.parametrize("change", ["pinned", "commanded", "never"])
def test_what_is_pinned_or_was_asked_for_by_command_does_not_leave_when_it_is_idle(
    make: Callable[..., Worker], change: str
) -> None:
    worker = make(on_demand=("lazy=/lazy",), idle_unload=0.0 if change == "never" else 60.0)
    worker.demand.round()
    job = worker.let_wait("lazy")
    worker.demand.round()
    ledger.cancel(worker.redis, job, keys.queue("lazy", "generate"))
    if change == "pinned":
        worker.keeper.pin("lazy", on=True)
    elif change == "commanded":
        load(worker, "lazy")
    worker.clock.now += 1e6
    worker.demand.round()
    assert "lazy" in worker.warm


def test_one_of_several_workers_loads_a_model(make: Callable[..., Worker], lazy: Worker) -> None:
    other = make(name="other@here/1", on_demand=("lazy=/lazy",))
    other.demand.round()
    other.let_wait("lazy")
    lazy.redis.set(keys.loading("lazy"), "other", ex=keys.PRESENCE_TTL)
    lazy.demand.round()
    assert "lazy" not in lazy.warm, "another one is about to"
    lazy.redis.delete(keys.loading("lazy"))
    other.demand.round()
    lazy.demand.round()
    assert ("lazy" in other.warm, "lazy" in lazy.warm) == (True, False)


def test_a_job_waits_for_room_and_the_status_says_why(lazy: Worker) -> None:
    for model in ("a", "b"):
        lazy.keeper.pin(model, on=True)
    job = lazy.let_wait("lazy")
    lazy.demand.round()
    assert lazy.ending(job) is None
    assert lazy.states()["lazy"] == "refused"
    lazy.keeper.pin("b", on=False)
    lazy.demand.round()
    assert "lazy" not in lazy.warm, "not tried again at once"
    lazy.clock.now += NO_ROOM_FOR
    lazy.demand.round()
    assert "lazy" in lazy.warm


def test_a_job_waits_while_its_model_cannot_be_loaded_for_a_reason_that_is_not_its_files(lazy: Worker) -> None:
    """The engine is about to end: another worker, or this one a moment later, loads it."""
    lazy.keeper.unload("a")
    lazy.engine.files["lazy"] = WorkerUnavailable("the engine stops.")
    job = lazy.let_wait("lazy")
    lazy.demand.round()
    assert lazy.ending(job) is None
    assert not lazy.redis.exists(keys.loading("lazy")), "another worker may try at once"
    del lazy.engine.files["lazy"]
    lazy.demand.round()
    assert "lazy" not in lazy.warm, "not tried again at once"
    lazy.clock.now += NO_ROOM_FOR
    lazy.demand.round()
    assert "lazy" in lazy.warm


def test_jobs_of_a_model_that_cannot_be_loaded_end_with_its_error(make: Callable[..., Worker]) -> None:
    worker = make(on_demand=("damaged=/damaged",))
    worker.demand.round()
    job = worker.let_wait("damaged")
    worker.demand.round()
    assert worker.ending(job) == ("ModelError", "/damaged: a tensor is missing")
    assert worker.warm == ["a", "b"]
    del worker.engine.files["damaged"]
    worker.clock.now += REFUSED_FOR
    worker.let_wait("damaged", "again")
    worker.demand.round()
    assert "damaged" in worker.warm, "its files were mended"


def test_a_model_on_demand_that_is_not_there_is_refused_until_it_is(make: Callable[..., Worker]) -> None:
    worker = make(on_demand=("late=/late",))
    worker.engine.headers["late"] = ModelError("/late: no such file or folder")
    worker.demand.round()
    worker.heart.beat()
    assert worker.states()["late"] == "refused"
    assert not worker.keeper.residency.offers
    del worker.engine.headers["late"]
    worker.demand.round()
    assert worker.engine.asked == ["late"], "not looked at again at once"
    worker.clock.now += REFUSED_FOR
    worker.demand.round()
    assert [each.model for each in worker.keeper.residency.offers] == ["late"]


def test_a_worker_is_seen_though_the_folder_of_a_model_has_a_name_that_is_no_unicode(
    make: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    """As Python has it: each byte of a path that is no UTF-8 is half a surrogate pair."""
    # What is logged would go, as it is, into the report of a test that runs next to others.
    caplog.set_level(logging.CRITICAL + 1)
    worker = make(on_demand=("odd=/\udcff",))
    worker.engine.headers["odd"] = ModelError("/\udcff: no such file or folder")
    worker.redis.delete(keys.worker(worker.runtime.name))
    worker.demand.round()
    worker.heart.beat()
    assert worker.states()["odd"] == "refused"
    answer = ask(worker, "load", "odd")
    assert (answer.phase, answer.message) == ("failed", "/\\udcff: no such file or folder")


def test_jobs_of_a_model_whose_damaged_folder_has_a_name_that_is_no_unicode_end_with_its_error(
    make: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    # What is logged would go, as it is, into the report of a test that runs next to others.
    caplog.set_level(logging.CRITICAL + 1)
    worker = make(on_demand=("odd=/\udcff",))
    worker.engine.files["odd"] = ModelError("/\udcff: a tensor is missing")
    worker.demand.round()
    job = worker.let_wait("odd")
    worker.demand.round()
    assert worker.ending(job) == ("ModelError", "/\udcff: a tensor is missing")
    cards = parse_cards(worker.redis.hgetall(keys.MODELS))
    assert cards["odd"].gone == "/\\udcff: a tensor is missing"


def test_jobs_of_a_model_on_demand_wait_when_it_is_unloaded(lazy: Worker) -> None:
    load(lazy, "lazy")
    job = lazy.let_wait("lazy")
    lazy.keeper.unload("lazy", lazy.demand.named)
    assert lazy.ending(job) is None
    lazy.demand.round()
    assert "lazy" in lazy.warm


# --- commands ---


def ask(worker: Worker, verb: str, model: str) -> ModelReport:
    command = ModelCommand(id="c1", verb=verb, model=model)  # type: ignore[arg-type]
    worker.redis.delete(keys.command("c1"))
    worker.redis.lpush(keys.commands(worker.runtime.name), json.dumps(encode(command)))
    worker.redis.expire(keys.commands(worker.runtime.name), 60)
    worker.commands.next()
    return ModelReport.model_validate_json(worker.redis.get(keys.command("c1")))


def test_a_command_is_followed_and_answered(worker: Worker) -> None:
    report = ask(worker, "load", "c=/c")
    assert (report.phase, report.made_way, report.worker) == ("done", ("a",), "w@here/1")
    assert not report.was_warm
    again = ask(worker, "load", "c=/c")
    assert (again.phase, again.was_warm) == ("done", True), "its files were not read anew"
    assert ask(worker, "pin", "c").phase == "done"
    assert ask(worker, "unload", "c").error == "InvalidRequest"
    assert ask(worker, "unpin", "c").phase == "done"
    assert ask(worker, "unload", "c").phase == "done"
    assert worker.warm == ["b"]


@pytest.mark.parametrize(
    ("verb", "model", "error"),
    [
        ("load", "missing=/missing", "ModelError"),
        ("load", "remote=/remote", "ModelError"),
        ("load", "huge=/huge", "ModelError"),
        ("load", "unknown", "ConfigError"),
        ("load", "x=", "ConfigError"),
        ("unload", "c", "UnknownModel"),
        ("pin", "c", "UnknownModel"),
    ],
)
def test_a_command_that_cannot_be_followed_answers_with_one_error(
    worker: Worker, verb: str, model: str, error: str
) -> None:
    report = ask(worker, verb, model)
    assert (report.phase, report.error) == ("failed", error)
    assert isinstance(from_wire(report.error, report.message), StokerError)
    assert worker.warm == ["a", "b"]


def test_a_defect_answers_too(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.engine.headers["c"] = KeyError("x")
    assert ask(worker, "load", "c=/c").error == "ModelError"

    def unload(name: str) -> bool:
        raise KeyError(name)

    monkeypatch.setattr(worker.engine, "unload", unload)
    assert ask(worker, "unload", "a").error == "JobFailed"


@pytest.mark.parametrize(
    "text",
    ["", "nothing", "[]", '{"id": "c1"}', '{"contract": 99, "id": "c1", "verb": "load", "model": "c"}',
     '{"contract": 1, "id": "c1", "verb": "format", "model": "c"}', '{"contract": 1, "id": "../x", "verb": "load"}'],
)  # fmt: skip
def test_what_is_no_command_is_answered_where_that_can_be_and_hurts_nothing(worker: Worker, text: str) -> None:
    worker.commands.hear(text.encode())
    raw = worker.redis.get(keys.command("c1"))
    assert raw is None or ModelReport.model_validate_json(raw).error == "InvalidRequest"
    assert (raw is None) == ('"c1"' not in text)
    assert worker.warm == ["a", "b"]


def test_of_models_that_cannot_be_loaded_the_last_few_are_shown(worker: Worker) -> None:
    for number in range(40):
        worker.keeper.refuse(f"m{number}", ModelError("x"))
    assert len(worker.keeper.residency.states) == 2 + keeping.REFUSED_SHOWN


def test_room_is_that_of_the_weights() -> None:
    residents = Residents(10, lambda: 0.0)
    residents.add("a", (), Origin.STARTED, 4)
    assert residents.makes_way("b", 6, lambda model: "") == []
    assert residents.makes_way("b", 7, lambda model: "") == ["a"]
    assert residents.bytes == 4


# --- what is said meanwhile ---


def test_a_model_is_said_to_be_loading_for_as_long_as_it_is(worker: Worker) -> None:
    """At once, and not with the next beat: another worker would load it too."""
    plain, seen = worker.engine.load, list[dict[str, str]]()

    def load_and_look(name: str, sources: Sequence[str]) -> Any:
        seen.append(worker.states())
        return plain(name, sources)

    worker.engine.load = load_and_look  # type: ignore[method-assign]
    load(worker, "c")
    assert seen[0]["c"] == "loading"
    assert worker.states()["c"] == "warm"
    with pytest.raises(ModelError):
        load(worker, "damaged")
    assert worker.states()["damaged"] == "refused"
    assert "loading" not in worker.states().values()


def test_a_model_that_was_refused_and_is_loaded_then_is_warm_and_its_refusal_forgotten(worker: Worker) -> None:
    with pytest.raises(ModelError):
        load(worker, "damaged")
    del worker.engine.files["damaged"]
    load(worker, "damaged")
    assert worker.keeper.refused == {}


def test_of_refusals_the_newest_stay_and_one_that_comes_again_is_new(worker: Worker) -> None:
    for number in range(keeping.REFUSED_SHOWN + 3):
        worker.keeper.refuse(f"m{number}", ModelError("x"))
        worker.keeper.refuse("m0", ModelError(f"again {number}"))
    kept = list(worker.keeper.refused)
    assert len(kept) == keeping.REFUSED_SHOWN
    assert kept[-2:] == [f"m{keeping.REFUSED_SHOWN + 2}", "m0"], "the oldest went"


def test_nothing_is_downloaded_because_a_job_waits(lazy: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[bool] = []
    plain = lazy.engine.prospect

    def prospect(name: str, sources: Sequence[str], *, download: bool = False) -> Any:
        downloads.append(download)
        return plain(name, sources)

    monkeypatch.setattr(lazy.engine, "prospect", prospect)
    lazy.let_wait("lazy")
    lazy.demand.round()
    load(lazy, "c")
    assert downloads == [False, True]


def test_a_job_that_came_as_its_idle_model_was_to_leave_keeps_it(lazy: Worker) -> None:
    load(lazy, "lazy", Origin.DEMANDED)
    lazy.engine.busy.add("lazy")
    lazy.clock.now += 61.0
    lazy.demand.round()
    assert "lazy" in lazy.warm
    lazy.engine.busy.clear()
    lazy.demand.round()
    assert "lazy" not in lazy.warm


def test_a_job_whose_client_has_its_result_may_be_here_for_a_moment(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "LEAVE_WITHIN", 30.0)
    held = worker.hold("a")
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            worker.deliveries.remove(held)

    monkeypatch.setattr(time, "sleep", sleep)
    worker.keeper.unload("a")
    assert "a" not in worker.warm
    assert len(looks) == 2


def test_a_worker_whose_broker_does_not_hear_it_loads_all_the_same(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(redis: Any) -> float:
        raise RedisConnectionError("gone")

    monkeypatch.setattr("workers.services.presence.clock.now", away)
    assert load(worker, "c") == ("a",)


def test_the_lock_of_a_model_that_is_loaded_goes_with_the_loading_and_expires(
    make: Callable[..., Worker], lazy: Worker
) -> None:
    """A worker that dies as it loads must not keep the others from it."""
    plain, left = lazy.engine.load, list[int]()

    def load_and_look(name: str, sources: Sequence[str]) -> Any:
        left.append(lazy.redis.ttl(keys.loading("lazy")))
        return plain(name, sources)

    lazy.engine.load = load_and_look  # type: ignore[method-assign]
    lazy.let_wait("lazy")
    lazy.demand.round()
    assert 0 < left[0] <= keys.PRESENCE_TTL
    assert not lazy.redis.exists(keys.loading("lazy"))


def test_a_model_that_only_a_worker_holds_which_stops_is_loaded_elsewhere(
    make: Callable[..., Worker], lazy: Worker
) -> None:
    other = make(name="other@here/1")
    other.engine.load("lazy", ())
    other.heart.beat()
    lazy.let_wait("lazy")
    lazy.demand.round()
    assert "lazy" not in lazy.warm, "the other one holds it"
    other.runtime.stopping = True
    other.heart.beat()
    lazy.demand.round()
    assert "lazy" in lazy.warm


def test_a_worker_that_stops_loads_nothing_for_a_job_that_waits(lazy: Worker) -> None:
    lazy.runtime.stopping = True
    lazy.let_wait("lazy")
    lazy.demand.round()
    assert "lazy" not in lazy.warm


def test_a_model_that_cannot_be_loaded_is_offered_no_more_and_the_others_hear_it_at_once(
    make: Callable[..., Worker],
) -> None:
    worker = make(on_demand=("damaged=/damaged",))
    worker.demand.round()
    worker.heart.beat()
    assert worker.states()["damaged"] == "offered"
    worker.let_wait("damaged")
    worker.demand.round()
    assert worker.states()["damaged"] == "refused"
    assert "damaged" not in worker.keeper.offers
    raw = worker.redis.get(keys.worker(worker.runtime.name))
    assert not Presence.model_validate_json(raw).offers, "no client may count on it"
    worker.engine.asked.clear()
    worker.demand.round()
    assert worker.engine.asked == [], "not tried again at once"


def test_a_model_on_demand_that_is_there_by_now_is_refused_no_more(make: Callable[..., Worker]) -> None:
    worker = make(on_demand=("late=/late",))
    worker.engine.headers["late"] = ModelError("/late: no such file or folder")
    worker.demand.round()
    assert "late" in worker.keeper.refused
    del worker.engine.headers["late"]
    worker.clock.now += REFUSED_FOR
    worker.demand.round()
    assert worker.keeper.refused == {}


def test_a_refusal_is_logged_once_for_as_long_as_it_says_the_same(
    make: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = make(on_demand=("late=/late",))
    worker.engine.headers["late"] = ModelError("/late: no such file or folder")
    for _ in range(3):
        worker.demand.round()
        worker.clock.now += REFUSED_FOR
    assert len([record for record in caplog.records if "on demand" in record.getMessage()]) == 1


ODD = [PermissionError(13, "Permission denied", "/late"), RuntimeError("no home folder"), KeyError("x"), MemoryError()]


@pytest.mark.parametrize("error", ODD, ids=lambda error: type(error).__name__)
def test_a_model_on_demand_that_cannot_be_looked_at_keeps_no_other_from_coming_and_going(
    make: Callable[..., Worker], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    worker = make(on_demand=("late=/late", "lazy=/lazy"), idle_unload=60.0)
    worker.engine.headers["late"] = error
    job = worker.let_wait("lazy")
    worker.demand.round()
    assert "lazy" in worker.warm
    assert type(error).__name__ in worker.keeper.refused["late"]
    ledger.cancel(worker.redis, job, keys.queue("lazy", "generate"))
    for _ in range(3):
        worker.clock.now += REFUSED_FOR
        worker.demand.round()
    assert "lazy" not in worker.warm
    assert len([record for record in caplog.records if record.exc_info]) == 1, "its place is said once"


def test_an_offered_model_that_cannot_be_looked_at_any_more_is_refused_alone(lazy: Worker) -> None:
    lazy.engine.headers["lazy"] = PermissionError(13, "Permission denied", "/lazy")
    lazy.let_wait("lazy")
    lazy.demand.round()
    lazy.heart.beat()
    assert lazy.states() == {"a": "warm", "b": "warm", "lazy": "refused"}


def test_what_the_broker_does_to_a_round_is_no_trouble_of_a_model(
    lazy: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> int:
        raise RedisConnectionError("gone")

    monkeypatch.setattr(lazy.keeper, "waiting", away)
    with pytest.raises(RedisConnectionError):
        lazy.demand.round()
    assert lazy.keeper.refused == {}


def test_what_waits_for_any_of_its_kinds_ends_with_its_model(worker: Worker) -> None:
    jobs = ["one", "two"]
    request = TrainRequest(model="a", name="style", dataset="worker:x")
    ledger.submit(worker.redis, "two", job_record(request, "two"))
    worker.let_wait("a", "one")
    worker.redis.zadd(keys.open_jobs(keys.queue("a", "generate")), {"no id": 1.0})
    worker.keeper.unload("a")
    assert [(worker.ending(job) or ("",))[0] for job in jobs] == ["UnknownModel"] * 2
    worker.redis.delete(keys.open_jobs(keys.queue("a", "generate")))


def test_a_model_that_nobody_holds_is_marked_with_the_brokers_time(worker: Worker) -> None:
    worker.redis.hset(keys.MODELS, "a/1", card("a").model_dump_json())
    worker.keeper.unload("a")
    marked = ModelCard.model_validate_json(worker.redis.hget(keys.MODELS, "a/1"))
    assert "was unloaded" in marked.gone
    assert marked.seen == pytest.approx(worker.redis.time()[0], abs=60), "it is forgotten in its time"


def test_a_command_is_said_to_have_begun_and_its_answer_expires(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that waits hears whether its worker has come to the command."""
    phases: list[tuple[str, int]] = []
    plain = worker.engine.load

    def load_and_look(name: str, sources: Sequence[str]) -> Any:
        raw, left = worker.redis.get(keys.command("c1")), worker.redis.ttl(keys.command("c1"))
        phases.append((ModelReport.model_validate_json(raw).phase, left))
        clock.now += 1.5
        return plain(name, sources)

    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("workers.services.model_commands.time.monotonic", lambda: clock.now)
    worker.engine.load = load_and_look  # type: ignore[method-assign]
    worker.engine.memory_bytes = 77
    report = ask(worker, "load", "c=/c")
    assert [phase for phase, _ in phases] == ["begun"]
    assert 0 < phases[0][1] <= keys.COMMAND_TTL
    assert 0 < worker.redis.ttl(keys.command("c1")) <= keys.COMMAND_TTL
    assert (report.seconds, report.memory_bytes) == (1.5, 77)


def test_a_command_that_was_sent_twice_is_followed_once(worker: Worker) -> None:
    text = json.dumps(encode(ModelCommand(id="c1", verb="load", model="c=/c"))).encode()
    worker.commands.hear(text)
    answer = worker.redis.get(keys.command("c1"))
    worker.keeper.unload("c")
    worker.commands.hear(text)
    assert "c" not in worker.warm
    assert worker.redis.get(keys.command("c1")) == answer


def test_a_command_that_the_broker_breaks_off_is_answered_as_soon_as_it_can_be(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise RedisConnectionError("gone")

    monkeypatch.setattr(worker.keeper, "load", away)
    with pytest.raises(RedisConnectionError):
        ask(worker, "load", "c=/c")
    report = ModelReport.model_validate_json(worker.redis.get(keys.command("c1")))
    assert (report.phase, report.error) == ("failed", "InvalidRequest")
    assert "broke it off: gone" in report.message


def test_what_is_known_by_the_settings_is_loaded_by_its_name(make: Callable[..., Worker]) -> None:
    """Of a worker's own models, of those on demand, and of what made way before."""
    worker = make(on_demand=("lazy=/lazy",))
    assert ask(worker, "load", "lazy").phase == "done"
    worker.keeper.may_load["c"] = ("/c",)
    assert ask(worker, "load", "c").phase == "done"
    assert worker.keeper.residents.get("lazy") is None or worker.keeper.residents.get("c") is not None


def test_jobs_wait_for_a_model_on_demand_that_is_unloaded_by_command(lazy: Worker) -> None:
    load(lazy, "lazy")
    job = lazy.let_wait("lazy")
    assert ask(lazy, "unload", "lazy").phase == "done"
    assert lazy.ending(job) is None


def test_a_model_that_was_loaded_by_command_does_not_leave_when_it_is_idle(lazy: Worker) -> None:
    assert ask(lazy, "load", "lazy").phase == "done"
    lazy.clock.now += 1e6
    lazy.demand.round()
    assert "lazy" in lazy.warm


def test_a_command_that_is_nested_too_deeply_hurts_nothing(worker: Worker) -> None:
    worker.commands.hear(b"[" * 100_000)
    assert worker.warm == ["a", "b"]


@pytest.mark.parametrize(
    ("says", "home"),
    [
        ({"models": (card("a"),)}, True),
        ({"offers": (card("a"),)}, True),
        ({"states": (ModelState(model="a", state="loading"),)}, True),
        ({"states": (ModelState(model="a", state="refused", why="x"),)}, False),
        ({"models": (card("b"),), "offers": (card("c"),)}, False),
    ],
)
def test_a_worker_that_holds_loads_or_may_load_a_model_is_its_home(says: dict[str, Any], home: bool) -> None:
    other = Presence(
        worker="w", host="h", pid=1, device="cpu", started=0.0, time=0.0, adapters={}, lanes={}, memory_bytes=0,
        **{"models": (), **says},
    )  # fmt: skip
    assert has_home("a", [other]) == home
    assert not has_home("a", [])


def test_a_worker_is_not_among_the_others(make: Callable[..., Worker], worker: Worker) -> None:
    make(name="other@here/1")
    assert [other.worker for other in others(worker.runtime.redis, worker.runtime.name)] == ["other@here/1"]


def test_jobs_of_a_model_that_is_marked_as_gone_and_warm_here_wait(worker: Worker) -> None:
    job = worker.let_wait("a")
    assert Orphans(worker.runtime).sweep(card("a").model_copy(update={"gone": "it was unloaded."})) == 0
    assert worker.ending(job) is None


def test_each_model_has_one_state(worker: Worker) -> None:
    """Also one that is offered, was refused, and is loaded just now."""
    found = list[list[tuple[str, str]]]()
    plain = worker.engine.load

    def loading(name: str, sources: Sequence[str]) -> Any:
        found.append([(state.model, state.state) for state in worker.keeper.residency.states])
        return plain(name, sources)

    worker.engine.load = loading  # type: ignore[method-assign]
    for name in ("c", "late"):
        worker.keeper.offers[name] = card(name)
        worker.keeper.refuse(name, ModelError("it was damaged."))
    load(worker, "c")
    assert found == [[("b", "warm"), ("c", "loading"), ("a", "offered"), ("late", "refused")]]


def test_a_model_is_idle_since_its_last_job_and_not_while_one_runs(worker: Worker) -> None:
    worker.hold("a")
    worker.clock.now += 100.0
    idle = {state.model: state.idle for state in worker.keeper.residency.states}
    assert idle["a"] == 0.0
    assert idle["b"] > 90.0


def test_what_is_pinned_is_said_at_once(worker: Worker) -> None:
    def pinned() -> list[str]:
        raw = worker.redis.get(keys.worker(worker.runtime.name))
        return [state.model for state in Presence.model_validate_json(raw).states if state.pinned]

    worker.keeper.pin("b", on=True)
    assert pinned() == ["b"]
    worker.keeper.pin("b", on=False)
    assert pinned() == []


def test_a_model_that_is_loaded_has_its_series_before_its_first_job(worker: Worker) -> None:
    expected = list[list[str]]()
    worker.runtime.job_meter.expect = lambda cards: expected.append([card.model for card in cards])
    load(worker, "c")
    assert expected == [["c"]]


def test_of_several_that_made_way_in_vain_the_one_that_left_last_is_back_first(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is as it was: the next to make way is still the one that was used longest ago."""
    monkeypatch.setitem(SIZES, "damaged", 900)
    with pytest.raises(ModelError, match="damaged"):
        load(worker, "damaged")
    assert worker.engine.loaded == ["a", "b", "b", "a"]
    assert load(worker, "c") == ("a",)


def test_a_model_that_is_unloaded_is_not_said_to_be_warm_nor_then_to_be_offered(worker: Worker) -> None:
    said = list[str | None]()
    plain = worker.redis.set

    def noting(name: str, value: Any, **options: Any) -> Any:
        if name == keys.worker(worker.runtime.name):
            states = {state.model: state.state for state in Presence.model_validate_json(value).states}
            said.append(states.get("a"))
        return plain(name, value, **options)

    worker.redis.set = noting
    worker.keeper.unload("a")
    assert said in (["offered", None], [None, None], [])
