"""Where the parts of a worker meet: what one hands on is what the other gets, and nobody acts for a job of another."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from celery.exceptions import Reject
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from engine import engine as engines
from engine.checkpoints.drafts import DraftSource
from engine.prefixes.disk import DiskLimits
from engine.training import carried
from kernels import registry
from stoker import errors
from stoker.broker import keys, ledger, policy
from stoker.local import boot_errors
from stoker.settings import Settings, load_settings
from tests.workers.carrying import RunFolder, Worker, asked
from tests.workers.test_frame import Worker as Frame
from workers import disk, doctor, machine, models_tool, moving, unreadable
from workers.account import DeliveryEnd, JobAccount, Observers
from workers.celery import boot
from workers.job_errors import accounted, answering_celery
from workers.job_lease import Spoiled, is_the_brokers
from workers.moving import RunMirror
from workers.run_parts import NoRoom
from workers.run_store import RunStore
from workers.services.runtime import Fenced
from workers.unreadable import DeadMessages, Unreadable

REQUEST = asked()


# A delivery, and those who observe it


class Observing:
    def __init__(self) -> None:
        self.heard: list[tuple[str, str, list[str]]] = []

    def note(self, what: str, account: JobAccount) -> None:
        self.heard.append((what, account.client, [phase.name for phase in account.phases]))

    def begun(self, account: JobAccount) -> None:
        self.note("begun", account)

    def ended(self, account: JobAccount) -> None:
        self.note(str(account.outcome), account)

    def close(self) -> None: ...


def test_observers_hear_of_a_job_before_it_runs_and_of_all_its_phases_at_its_end(broker: Settings) -> None:
    frame, observing = Frame(broker), Observing()
    frame.runtime.observers = Observers([observing])
    heard: list[int] = []
    with closing(frame):

        def end() -> int:
            heard.append(len(observing.heard))
            return 7

        frame.deliver(end)
    assert heard == [1], "it was begun when the engine got it"
    (begun, _, early), (ended, _, phases) = observing.heard
    assert (begun, early, ended) == ("begun", ["claim"], "succeeded")
    assert phases == ["claim", "load", "engine queue", "publish", "finish", "complete"]


@pytest.mark.parametrize(
    "act",
    [
        lambda lease: lease.dead_letter("w", "its disk is full"),
        lambda lease: lease.count_out_of_memory(),
        lambda lease: lease.keep_part("part", b"data"),
        lambda lease: lease.keep_manifest("{}", []),
        lambda lease: lease.complete(ledger.failure("job", errors.JobFailed("x"))),
    ],
    ids=["dead letter", "out of memory", "a part", "a manifest", "the end"],
)
def test_who_was_overtaken_changes_nothing_of_the_job(
    broker: Settings, redis: Any, tmp_path: Path, act: Callable[[Any], object]
) -> None:
    worker = Worker(broker, redis, tmp_path, "one")
    worker.runtime.persist = lambda write: write()
    first = worker.own(REQUEST)
    Worker(broker, redis, tmp_path, "two").own(REQUEST)
    with pytest.raises(Fenced, match="job job runs elsewhere"):
        act(first)
    assert not redis.exists(keys.DEAD, keys.result("job"), keys.checkpoint("job"))


@pytest.mark.parametrize(
    ("error", "the_brokers"),
    [
        (RedisConnectionError("away"), True),
        (NoPermissionError("NOPERM"), True),
        (ResponseError("ACL failure in script: no keys"), True),
        (ResponseError("WRONGTYPE"), False),
        (RedisError("unknown"), False),
        (OSError("a file"), False),
    ],
)
def test_a_command_that_the_broker_forbids_or_cannot_take_now_is_no_fault_of_the_job(
    error: Exception, the_brokers: bool
) -> None:
    assert is_the_brokers(error) is the_brokers


@pytest.mark.parametrize(
    "refusal", [Spoiled("the key x is a list"), NoPermissionError("NOPERM"), RedisConnectionError("away")]
)
@pytest.mark.parametrize("end", [errors.WorkerUnavailable("the worker stops"), Spoiled("the key y is a list")])
def test_the_message_of_a_job_whose_way_back_or_end_the_broker_refuses_stays(
    end: Exception, refusal: Exception
) -> None:
    """Celery acknowledges a message behind any other error, and nobody looks for a job that a living worker owns."""

    def refused(*_: object) -> None:
        raise refusal

    lease = SimpleNamespace(release=refused, give_up=refused)
    runtime = SimpleNamespace(publisher=SimpleNamespace(flush=lambda job_id: None))
    delivery: Any = SimpleNamespace(id="job", lease=lease, runtime=runtime)
    with pytest.raises(Reject) as raised, answering_celery(delivery):
        raise end
    assert raised.value.requeue


def test_a_message_stays_where_what_jobs_share_was_spoiled_twice() -> None:
    given: list[str] = []

    def give_up(trouble: Spoiled) -> None:
        given.append(str(trouble))
        raise Spoiled("again")

    delivery: Any = SimpleNamespace(id="job", lease=SimpleNamespace(give_up=give_up))
    with pytest.raises(Reject) as raised, answering_celery(delivery):
        raise Spoiled("the key x is a list")
    assert (raised.value.requeue, given) == (True, ["the key x is a list"])


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (errors.JobDead("x"), DeliveryEnd.DEAD),
        (errors.JobCancelled("x"), DeliveryEnd.CANCELLED),
        (errors.JobFailed("x"), DeliveryEnd.FAILED),
        (Fenced("x"), DeliveryEnd.FENCED),
        (errors.WorkerUnavailable("x"), DeliveryEnd.RETURNED),
        (Spoiled("x"), DeliveryEnd.FAILED),
        (RuntimeError("x"), DeliveryEnd.RETURNED),
    ],
)
def test_each_error_says_how_a_delivery_is_over(error: Exception, end: DeliveryEnd) -> None:
    account = JobAccount("job", "generate", "m")
    delivery: Any = SimpleNamespace(
        account=account, runtime=SimpleNamespace(observers=SimpleNamespace(ended=lambda account: None))
    )
    with pytest.raises(type(error)), accounted(delivery):
        raise error
    assert (account.outcome, account.error) == (end, type(error).__name__)


@pytest.mark.parametrize(
    ("numbers", "trouble"),
    [
        (("ENOSPC", "EDQUOT", "EFBIG"), "is full"),
        (("EIO", "EROFS", "EACCES", "EPERM"), "cannot be used"),
        (("ENOENT", "EPIPE"), None),
    ],
)
def test_what_a_mended_disk_would_take_is_trouble_of_the_disk(numbers: tuple[str, ...], trouble: str | None) -> None:
    assert {disk.trouble(OSError(getattr(errno, number), "x")) for number in numbers} == {trouble}


# What a worker is set to, and what it makes of it


def test_the_engine_gets_what_the_settings_say_in_its_own_units(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(engines, "Engine", lambda models, **given: made.append((models, given)))
    settings = load_settings(
        home=tmp_path, models=["a=/x", "b=/y"], adapter_memory=7, kv_cache=17, generate_slots=5, stall=0.75,
        prefix_disk=3, lookup=False, draft_models=["a=b", "b=/z"],
        train_share=0.4, dtype="float16", quantize="8bit", group_size=32, kv_bits=8,
    )  # fmt: skip

    def publish(entries: Any) -> None: ...

    def death() -> None: ...

    try:
        machine.make_engine(settings, publish, death)
    finally:
        registry.use("auto")
    ((models, given),) = made
    limits = given.pop("limits")
    assert list(models) == ["a", "b"]
    assert (limits.kv_bytes, limits.slots, limits.stall, limits.lookup) == (17 << 20, 5, 0.75, False)
    wanted = {
        "adapters": settings.adapters,
        "runs": settings.runs,
        "publish": publish,
        "train_share": 0.4,
        "adapter_bytes": 7 << 20,
        "prefixes": DiskLimits(tmp_path / "prefixes", 3 << 20),
        "precision": {"dtype": "float16", "quantize": "8bit", "group_size": 32, "kv_bits": 8},
        "drafts": {"a": DraftSource("b", ("/y",)), "b": DraftSource("z", ("/z",))},
        "on_death": death,
    }
    assert {name: given[name] for name in wanted} == wanted


@pytest.mark.parametrize(("dtype", "form"), [("float16", "16 bit"), ("bfloat16", "16 bit"), ("float32", "32 bit")])
def test_the_doctor_reckons_with_the_form_in_which_the_weights_will_be_held(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, form: str
) -> None:
    forms: list[str] = []
    monkeypatch.setenv("STOKER_DTYPE", dtype)
    monkeypatch.setenv("STOKER_MODELS", f"tiny={tmp_path}")
    monkeypatch.setattr(doctor, "memory_check", lambda name, path, form: forms.append(form))
    try:
        doctor.checks()
    finally:
        registry.use("auto")
    assert forms == [form]


@pytest.mark.parametrize("kind", ["ModelError", "InvalidRequest", "ConfigError", "UnknownModel", "DatasetError"])
def test_a_tool_that_fails_says_what_failed_and_ends_with_the_errors_own_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    error: errors.StokerError = getattr(errors, kind)("what to do")

    def fail() -> dict[str, Any]:
        raise error

    monkeypatch.setitem(models_tool.COMMANDS, "pull", fail)
    assert models_tool.main("pull", "{}") == error.exit_code
    assert json.loads(capsys.readouterr().out) == {"error": {"name": kind, "message": "what to do"}}
    monkeypatch.setitem(models_tool.COMMANDS, "pull", lambda sources: {"path": sources[0]})
    assert models_tool.main("pull", '{"sources": ["x"]}') == 0


CELERY = """
import json
from workers.celery.app import app, settings
options = app.conf.broker_transport_options
print(json.dumps([
    options["visibility_timeout"] == settings.lease, options["unacked_restore_interval"],
    options["unacked_restore_throttle"], app.conf.task_acks_late, app.conf.worker_prefetch_multiplier,
    app.conf.broker_connection_max_retries, app.conf.worker_cancel_long_running_tasks_on_connection_loss,
]))
"""


def test_celery_holds_a_message_as_long_as_a_lease_acknowledges_late_and_outlives_its_broker() -> None:
    """In a process of its own: an app is one for all of Celery."""
    env = os.environ | {"STOKER_URL": "redis://127.0.0.1:1/0", "STOKER_LEASE": "7"}
    command = [sys.executable, "-c", CELERY]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, 1, 1, True, 1, None, False]


def test_a_step_that_ends_lets_its_runtime_go(broker: Settings) -> None:
    frame = Frame(broker)
    step: Any = boot.EngineStep(SimpleNamespace(app=SimpleNamespace(context=frame.context)))
    with closing(frame):
        assert frame.context.runtime is frame.runtime
        step.stop(None)
        with pytest.raises(errors.WorkerUnavailable, match="no engine"):
            frame.context.runtime.cancel("job")


@pytest.mark.parametrize(
    "error",
    [
        errors.ConfigError("STOKER_METRICS: 9464 given; the port is taken."),
        errors.ModelError("none of the model's sources is available:\n  /a: no such folder\n  /b: no such folder"),
        errors.BrokerUnavailable("no answer."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_worker_that_cannot_start_says_why_in_one_sentence_that_stoker_up_reads(
    broker: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: errors.StokerError
) -> None:
    def fail(settings: Settings) -> None:
        raise error

    monkeypatch.setattr(boot, "check_broker", fail)
    frame = Frame(broker)
    with closing(frame):
        step: Any = boot.EngineStep(SimpleNamespace(app=SimpleNamespace(context=frame.context)))
        with pytest.raises(SystemExit) as ended:
            step.start(SimpleNamespace(hostname="w@here"))
    said = capsys.readouterr().err
    assert ended.value.code == error.exit_code
    assert "Error" not in said, "the name of a class is for programs"
    (line,) = [line for line in said.splitlines() if line.startswith("stoker: the worker cannot start: ")]
    found = boot_errors.error_in(f"before\n{said}behind\n", error.exit_code)
    assert type(found) is type(error)
    assert str(found) in line
    assert str(found).split() == " ".join(str(error).split()).split()
    assert boot_errors.error_in("killed", 137) is None


# Dead letters of messages


def test_a_letter_that_is_there_already_is_written_again_though_the_table_is_full(
    redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unreadable, "MOST", 2)
    dead, first = DeadMessages(redis, "w@here"), Unreadable(b"first", "q", "then")
    for message in (first, Unreadable(b"second", "q", "then"), Unreadable(b"third", "q", "then")):
        dead.add(message)
    dead.write(wait=0.0)
    dead.add(Unreadable(b"first", "q", "now"))
    dead.write(wait=0.0)
    assert redis.hlen(keys.DEAD) == 2
    assert json.loads(redis.hget(keys.DEAD, first.id))["history"][0]["trouble"] == "now"


# Checkpoints on their way


def put(store: RunStore, run: Path, go_on: Callable[[], object] = lambda: None) -> None:
    with ExitStack() as resources:
        found = carried.snapshot(run, resources)
        assert found is not None
        store.put(found, go_on)


def test_a_run_that_ends_at_any_moment_of_an_upload_has_the_former_manifest(
    broker: Settings, redis: Any, tmp_path: Path
) -> None:
    run, calls = RunFolder(tmp_path / "one", REQUEST), 0
    store = RunStore(Worker(broker, redis, tmp_path / "one").own(REQUEST))
    run.save(5)
    put(store, run.path)
    run.save(10)

    class Ended(Exception):
        pass

    def ending_at(number: int) -> Callable[[], None]:
        count = iter(range(1000))

        def go_on() -> None:
            nonlocal calls
            calls += 1
            if next(count) == number:
                raise Ended

        return go_on

    for moment in range(1000):
        try:
            put(store, run.path, ending_at(moment))
        except Ended:
            assert store.manifest().reports == 5  # type: ignore[union-attr]
        else:
            break
    assert store.manifest().reports == 10  # type: ignore[union-attr]
    assert moment > 8, "before each part, each time, and before the manifest"


def test_a_run_is_asked_for_once_more_when_all_its_parts_are_there(
    broker: Settings, redis: Any, tmp_path: Path
) -> None:
    run, there = RunFolder(tmp_path / "one", REQUEST), list[int]()
    lease = Worker(broker, redis, tmp_path / "one").own(REQUEST)
    run.save(5)
    put(RunStore(lease), run.path, lambda: there.append(redis.hlen(keys.checkpoint(lease.job_id))))
    assert there[0] == 0
    assert redis.hlen(keys.checkpoint(lease.job_id)) == there[-1] + 1, "the manifest alone comes behind"


def test_what_a_cut_upload_left_takes_no_room_from_the_next(broker: Settings, redis: Any, tmp_path: Path) -> None:
    worker, run = Worker(broker, redis, tmp_path / "one"), RunFolder(tmp_path / "one", REQUEST, size=400)
    run.save(5)
    lease = worker.own(REQUEST)
    store = RunStore(lease)
    lease.keep_part("0" * 64 + "-9000", b"x" * 9000)
    needed = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    taken = int(redis.hget(keys.checkpoint("job"), "bytes") or 0)
    assert taken >= 9000
    policy.decide(redis, "queue_bytes", 2 * (max(needed, 9000) + 4000))
    put(store, run.path)
    assert store.manifest() is not None
    assert not any(name.startswith(b"0" * 64) for name in redis.hkeys(keys.checkpoint("job")))
    policy.decide(redis, "queue_bytes", 2000)
    run.save(10)
    with pytest.raises(NoRoom):
        put(store, run.path)


class Waits:
    """The times of a thread that sends checkpoints, without waiting for any: an upload takes two seconds."""

    now = 50.0
    rests: ClassVar[list[float]]

    class Event:
        def __init__(self) -> None:
            self._set = False

        def set(self) -> None:
            self._set = True

        def clear(self) -> None:
            self._set = False

        def is_set(self) -> bool:
            return self._set

        def wait(self, seconds: float) -> bool:
            Waits.rests.append(seconds)
            return self._set

    @classmethod
    def monotonic(cls) -> float:
        return cls.now


@contextmanager
def sending(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, upload: Callable[[], object]
) -> Iterator[tuple[RunMirror, Callable[[], None]]]:
    """A mirror whose rounds the test runs itself; `upload` stands for an upload."""
    rounds: list[Callable[[], None]] = []
    Waits.rests = []
    quiet = SimpleNamespace(start=lambda: None, join=lambda seconds: None, alive=False)

    def background(name: str, act: Callable[[], None], **given: Any) -> Any:
        rounds.append(act)
        return quiet

    monkeypatch.setattr(moving, "Background", background)
    monkeypatch.setattr(moving, "threading", SimpleNamespace(Event=Waits.Event))
    monkeypatch.setattr(moving, "time", Waits)
    monkeypatch.setattr(RunStore, "put", lambda store, found, go_on: upload())
    with RunMirror(worker.job(REQUEST), REQUEST) as mirror:
        yield mirror, rounds[0]


@pytest.mark.parametrize(("took", "rest"), [(0.0, 5.0), (0.5, 5.0), (2.0, 18.0)])
def test_an_upload_is_followed_by_a_rest_of_nine_times_its_length_or_the_pause_that_is_set(
    broker: Settings, redis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, took: float, rest: float
) -> None:
    worker = Worker(broker, redis, tmp_path / "one", "one", checkpoints="always", checkpoint_pause=5.0)
    RunFolder(tmp_path / "one", REQUEST).save(5)

    def upload() -> None:
        Waits.now += took

    with sending(worker, monkeypatch, upload) as (mirror, one_round):
        mirror.kept()
        one_round()
        assert Waits.rests == [moving.RETRY_EVERY, pytest.approx(rest)]


def test_a_checkpoint_that_comes_while_another_is_sent_is_sent_next(
    broker: Settings, redis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(broker, redis, tmp_path / "one", "one", checkpoints="always")
    run, sent = RunFolder(tmp_path / "one", REQUEST), []
    run.save(5)

    def upload() -> None:
        sent.append(carried.newest(run.path).position.reports)  # type: ignore[union-attr]
        if len(sent) == 1:
            run.save(10)
            mirror.kept()

    with sending(worker, monkeypatch, upload) as (mirror, one_round):
        mirror.kept()
        for _ in range(3):
            one_round()
    assert sent == [5, 10], "and nothing is sent twice"


@pytest.mark.parametrize(
    ("error", "flushed", "cleared"),
    [
        (None, 0, 1),
        (errors.JobCancelled("x"), 0, 1),
        (errors.JobFailed("x"), 0, 1),
        (errors.JobDead("x"), 0, 0),
        (errors.WorkerUnavailable("x"), 1, 0),
        (Fenced("x"), 0, 0),
        (OSError("x"), 0, 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_run_ends_with_says_what_becomes_of_its_checkpoints(
    broker: Settings,
    redis: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    flushed: int,
    cleared: int,
) -> None:
    worker = Worker(broker, redis, tmp_path / "one", "one", checkpoints="always")
    RunFolder(tmp_path / "one", REQUEST).save(5)
    sent: list[int] = []
    cleaned: list[int] = []
    monkeypatch.setattr(RunStore, "clear", lambda store: cleaned.append(1))
    with ExitStack() as raised:
        if error is not None:
            raised.enter_context(pytest.raises(type(error)))
        with sending(worker, monkeypatch, lambda: sent.append(1)):
            if error is not None:
                raise error
    assert (len(sent), len(cleaned)) == (flushed, cleared)
