"""What `stoker up` starts, watches and stops, without any of the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker.contract import Presence
from stoker.errors import BrokerUnavailable, ModelError, WorkerUnavailable
from stoker.local import stack as stacks
from stoker.local.boot_errors import line_of
from stoker.local.broker import PREFERRED_PORT
from stoker.local.process import how_it_ended
from stoker.local.stack import COMPACT_EVERY, RESTART_PAUSE, Stack
from stoker.settings import RunningBroker, Settings, load_settings

URL = "redis://127.0.0.1:1/0"
KILLED = "SIGKILL, which the system sends where memory runs out"


class World:
    """What the stack finds, and in `did` what it does. `after`: what happens as it sleeps, each once."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.children: list[Child] = []
        self.workers: list[Presence] = []
        self.after: Iterator[Callable[[], object]] = iter(())
        self.now = 1000.0
        self.slept: list[float] = []
        self.broker: Broker | None = None
        #: Whether a broker that runs gives no answer.
        self.silent = False
        #: Whether another `stoker up` has the home's data.
        self.taken = False
        #: Where brokers were to listen.
        self.ports: list[int] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)
        next(self.after, _interrupt)()

    def child(self, name: str) -> Child:
        """The one of this name that was started last."""
        return [child for child in self.children if child.name == name][-1]

    def appears(self, process: str) -> None:
        """The worker that was started last is warm, as this process of its node."""
        node = self.child("worker").command[-3].removeprefix("--hostname=")
        self.workers = [*self.workers, _presence(f"{node}/{process}")]


class Child:
    def __init__(self, world: World, name: str, command: list[str], env: dict[str, str], **_: Any) -> None:
        self._did, self.name, self.command, self.env = world.did, name, command, env
        self.returncode: int | None = None
        self.log, self.said = Path(f"{name}.log"), ""
        self._did.append(f"start {name}")
        world.children.append(self)

    def ask_to_stop(self) -> None:
        self._did.append(f"ask {self.name}")

    def stop(self) -> None:
        self._did.append(f"stop {self.name}")

    def output(self) -> str:
        return self.said


class Broker:
    alive = True

    def __init__(self, world: World) -> None:
        self._did, self._world = world.did, world

    def take(self) -> bool:
        return not self._world.taken

    def start(self, report: object) -> str:
        self._did.append("start broker")
        return URL

    def stop(self) -> None:
        self._did.append("stop broker")

    def compact(self) -> None:
        self._did.append("compact")


def _interrupt() -> None:
    raise KeyboardInterrupt


def _presence(worker: str) -> Presence:
    return Presence(
        worker=worker, host="h", pid=1, device="cpu", started=0, time=0, models=(), adapters={}, lanes={},
        memory_bytes=0,
    )  # fmt: skip


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()

    class Clients:
        def __init__(self, **_: Any) -> None: ...

        def __enter__(self) -> Any:
            return SimpleNamespace(workers=self._workers)

        def _workers(self) -> list[Presence]:
            if made.silent:
                raise BrokerUnavailable("no answer.")
            return made.workers

        def __exit__(self, *_: object) -> None: ...

    def broker(settings: Settings, port: int) -> Broker:
        made.ports.append(port)
        made.broker = Broker(made)
        return made.broker

    monkeypatch.setattr(stacks, "Process", lambda name, command, **more: Child(made, name, command, **more))
    monkeypatch.setattr(stacks, "Client", Clients)
    monkeypatch.setattr(stacks, "EmbeddedBroker", broker)
    monkeypatch.setattr(stacks, "time", SimpleNamespace(sleep=made.sleep, monotonic=lambda: made.now))
    return made


@pytest.fixture
def stack(world: World, tmp_path: Path) -> Iterator[Stack]:
    """With everything that it can start, warm."""
    with Stack(Settings(home=tmp_path / "home"), gateway=True, own_broker=True) as running:
        world.appears("first")
        running.wait_until_warm()
        yield running


def test_a_broker_of_its_own_stays_off_the_usual_port_where_others_would_find_it(world: World, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    for own in (True, False):
        with Stack(settings, own_broker=own, flower=False):
            pass
    assert world.ports == [0, PREFERRED_PORT]


def test_a_stack_takes_nothing_from_the_environment_that_its_settings_do_not_say(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_ARTIFACTS", "memory://fleet")
    settings = load_settings(home=tmp_path / "home").alone()
    with Stack(settings, own_broker=True, flower=False) as running:
        assert (running.settings.artifacts, running.settings.url) == (None, URL)
    assert world.child("worker").env["STOKER_ARTIFACTS"] == ""


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        (URL, r"which STOKER_URL names\. Start it, or unset STOKER_URL to use the embedded one\."),
        (None, r"which --url names\. Start it, or leave out --url to use the embedded one\."),
        ("redis://127.0.0.1:9/0", r"which --url names\."),
    ],
)
def test_a_broker_that_is_away_is_blamed_on_what_named_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, said: str
) -> None:
    monkeypatch.setattr(stacks, "answers", lambda settings: False)
    if variable is not None:
        monkeypatch.setenv("STOKER_URL", variable)
    settings = load_settings(home=tmp_path / "home", url=URL)
    with pytest.raises(BrokerUnavailable, match=said), Stack(settings, flower=False):
        pass


def test_one_that_is_started_while_another_starts_waits_for_its_broker_and_joins_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = RunningBroker(URL, 4711)
    announced: list[RunningBroker] = []
    monkeypatch.setattr(Settings, "running_broker", property(lambda _: announced[0] if announced else None))
    monkeypatch.setattr(stacks, "answers", lambda _: True)
    monkeypatch.setattr(stacks, "wait_for_broker", lambda *_: None)
    world.taken, said = True, list[str]()
    world.after = iter([lambda: None] * 300 + [lambda: announced.append(first)])
    with Stack(Settings(home=tmp_path / "home"), flower=False, report=said.append) as running:
        assert running.joined == first.pid
        assert "start broker" not in world.did
    assert set(said) == {"waiting for another `stoker up` of this STOKER_HOME, which starts or ends"}
    assert "stop broker" not in world.did, "it is the other's"


def test_one_that_is_started_while_another_ends_comes_in_its_place(world: World, tmp_path: Path) -> None:
    world.taken = True
    world.after = iter([lambda: None, lambda: setattr(world, "taken", False)])
    with Stack(Settings(home=tmp_path / "home"), flower=False) as running:
        assert running.joined is None
        assert "start broker" in world.did


def test_a_name_is_free_again_once_its_stack_has_ended(world: World, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    with Stack(settings, own_broker=True, flower=False) as running:
        (first,) = {word for word in world.child("worker").command if word.startswith("--hostname=")}
        with pytest.MonkeyPatch.context(), Stack(settings, own_broker=True, flower=False):
            second = world.child("worker").command
        assert first not in second
    assert running.worker is not None
    with Stack(settings, own_broker=True, flower=False):
        assert first in world.child("worker").command


def test_a_worker_has_a_thread_for_each_job_and_says_nothing_of_itself(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    command = stacks.worker_command(settings, "name@here")
    jobs = sum(settings.slots.values()) + settings.extra_slots
    assert command[1:] == [
        *("-m", "workers", "--quiet", "-A", "workers.celery.app", "worker", "--pool=threads"),
        *(f"--concurrency={jobs}", "--hostname=name@here", "--without-gossip", "--without-mingle"),
    ]
    assert stacks.celery_command("flower")[1:3] == ["-m", "celery"]


def test_all_are_asked_before_any_is_waited_for_and_the_broker_goes_last(world: World, stack: Stack) -> None:
    world.did.clear()
    stack.stop()
    names = ["flower", "gateway", "worker"]
    assert world.did == [*(f"ask {name}" for name in names), *(f"stop {name}" for name in names), "stop broker"]


def test_what_was_started_is_stopped_when_the_next_cannot_be(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by Ctrl-C, which is no error."""
    monkeypatch.setattr(stacks, "password", lambda settings: _interrupt())
    with pytest.raises(KeyboardInterrupt), Stack(Settings(home=tmp_path / "home"), own_broker=True):
        pass
    assert world.did == ["start broker", "start worker", "ask worker", "stop worker", "stop broker"]


def test_a_process_that_had_the_workers_name_before_is_not_the_one_that_is_waited_for(
    world: World, stack: Stack
) -> None:
    first = stack.worker_name
    stack.start_worker()
    world.after = iter([lambda: None, lambda: world.appears("second")])
    assert stack.wait_until_warm().worker == first.replace("/first", "/second")
    assert stack.worker_name != first


def test_another_worker_that_is_warm_is_not_the_one_that_is_waited_for(world: World, stack: Stack) -> None:
    stack.start_worker()
    world.workers.append(_presence("other@here/1"))
    world.after = iter([lambda: world.appears("second")])
    assert stack.wait_until_warm().worker.endswith("/second")


def test_a_worker_that_ends_before_it_is_warm_says_why(world: World, stack: Stack) -> None:
    stack.start_worker()
    child = world.child("worker")
    child.returncode, child.said = 5, f"a line\n{line_of('/m: no such folder')}\nanother\n"
    with pytest.raises(ModelError, match=r"^/m: no such folder$"):
        stack.wait_until_warm()
    child.said = "killed"
    with pytest.raises(WorkerUnavailable, match=r"exit code 5.*ends with: killed"):
        stack.wait_until_warm()


def test_a_worker_that_dies_is_started_again_under_its_name_after_a_pause(world: World, stack: Stack) -> None:
    said: list[str] = []
    first = world.child("worker")
    world.after = iter([lambda: setattr(first, "returncode", 70), lambda: None, lambda: world.appears("second")])
    with pytest.raises(KeyboardInterrupt):
        stack.watch(said.append)
    assert world.child("worker") is not first
    assert world.child("worker").command == first.command
    assert RESTART_PAUSE in world.slept
    assert said == ["the worker ended (exit code 70); starting another", "a worker is warm again"]


def test_a_worker_that_dies_before_it_is_warm_again_takes_nothing_with_it(world: World, stack: Stack) -> None:
    said: list[str] = []

    def dies() -> None:
        world.child("worker").returncode = 137
        world.child("worker").said = line_of("no memory")

    def appears() -> None:
        world.appears("third")

    world.did.clear()
    world.after = iter([dies, lambda: None, dies, lambda: None, lambda: None, appears, dies, lambda: None])
    with pytest.raises(KeyboardInterrupt):
        stack.watch(said.append)
    assert said == [
        f"the worker ended ({KILLED}); starting another",
        "the worker ended (not warm yet: no memory); starting another in 4 s",
        "a worker is warm again",
        f"the worker ended ({KILLED}); starting another",
    ]
    assert world.did == ["start worker"] * 3
    assert [pause for pause in world.slept if pause >= RESTART_PAUSE] == [2.0, 4.0, 2.0]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1, "exit code 1"), (0, "exit code 0"), (70, "exit code 70"), (128, "exit code 128"), (255, "exit code 255"),
        (-9, KILLED), (137, KILLED), (-11, "SIGSEGV"), (134, "SIGABRT"),
    ],
)  # fmt: skip
def test_how_a_process_ended_is_said_in_words(code: int, said: str) -> None:
    assert how_it_ended(code) == said


def test_a_broker_that_is_away_as_a_worker_ends_is_waited_for(world: World, stack: Stack) -> None:
    said: list[str] = []

    def dies() -> None:
        world.child("worker").returncode = 137
        world.silent = True

    def answers() -> None:
        world.silent = False

    def falls_silent() -> None:
        world.silent = True

    def appears() -> None:
        world.appears("second")
        world.silent = False

    world.did.clear()
    world.after = iter([dies, *[lambda: None] * 3, answers, falls_silent, lambda: None, appears])
    with pytest.raises(KeyboardInterrupt):
        stack.watch(said.append)
    assert said == [
        f"the worker ended ({KILLED}); starting another",
        "no answer. Trying again",
        f"the worker ended ({KILLED}); starting another",
        "no answer. Trying again",
        "a worker is warm again",
    ]
    assert world.did == ["start worker"]


def test_a_worker_that_cannot_come_up_is_tried_once_a_minute(world: World, stack: Stack) -> None:
    def dies() -> None:
        world.child("worker").returncode = 5

    world.after = iter([dies, lambda: None] * 9)
    with pytest.raises(KeyboardInterrupt):
        stack.watch(lambda text: None)
    assert [pause for pause in world.slept if pause >= RESTART_PAUSE] == [2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_what_nothing_else_needs_is_said_to_have_ended_once(world: World, stack: Stack) -> None:
    said: list[str] = []
    world.after = iter([lambda: setattr(world.child("flower"), "returncode", 1), *[lambda: None] * 5])
    with pytest.raises(KeyboardInterrupt):
        stack.watch(said.append)
    assert said == ["Flower ended (exit code 1), see flower.log; jobs go on without it"]
    world.did.clear()
    stack.stop()
    assert "ask gateway" in world.did


def test_a_broker_that_ends_ends_the_stack(world: World, stack: Stack) -> None:
    assert world.broker is not None
    world.broker.alive = False
    world.after = iter([lambda: None])
    with pytest.raises(BrokerUnavailable, match="the embedded broker ended"):
        stack.watch(lambda text: None)


def test_the_brokers_file_is_looked_at_now_and_then(world: World, stack: Stack) -> None:
    world.did.clear()
    world.after = iter([lambda: None] * round(2.5 * COMPACT_EVERY / stacks.POLL))
    with pytest.raises(KeyboardInterrupt):
        stack.watch(lambda text: None)
    assert world.did == ["compact"] * 2


def test_one_that_has_joined_another_ends_with_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: Any = SimpleNamespace(url=URL, pid=4711)
    monkeypatch.setattr(Settings, "running_broker", property(lambda self: running))
    monkeypatch.setattr(stacks, "answers", lambda settings: True)
    monkeypatch.setattr(stacks, "wait_for_broker", lambda settings, report: None)
    with Stack(Settings(home=tmp_path / "home"), gateway=True) as joined:
        assert (joined.joined, world.did) == (4711, ["start worker"]), "the first one has a broker and a monitor"
        world.after = iter([lambda: setattr(running, "pid", 4712)])
        with pytest.raises(BrokerUnavailable, match=r"process 4711\) has ended"):
            joined.watch(lambda text: None)
