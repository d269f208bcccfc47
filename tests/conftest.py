"""What all tests share: waiting on conditions, a real broker, a real stack, and the rule that keys expire."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import Phase, settings

from stoker import Client
from stoker.broker.connection import connect
from stoker.local.broker import EmbeddedBroker, free_port
from stoker.local.stack import Stack
from stoker.settings import Settings, load_settings
from tests import endless, processes
from tests.leaks import Held, assert_nothing, open_work, overlong_keys, processes_of

EMBED_MODEL = "all-minilm-l6-v2"
GENERATE_MODEL = "smollm2-135m-instruct"

# The same examples in every run: what fails here fails there. No example fails because the machine is
# busy. The slow suite looks at new ones.
settings.register_profile("same", derandomize=True, deadline=None)
# For `make mutants`: that a test fails is enough, and the smallest example is not looked for.
settings.register_profile("first-failure", settings.get_profile("same"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("same")


# The whole tree of commands is built for each call: a fifth of a second, in hundreds of tests. `typer.testing`, which
# the tests import later, takes the function from here.
typer.main.get_command = functools.cache(typer.main.get_command)

# A shell starts what goes to the background with SIGINT ignored, nohup with SIGHUP ignored, and every process of a test
# would inherit that. It does not inherit a handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(autouse=True)
def _own_settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the settings, nor touches the files, of the person who runs it."""
    for name in list(os.environ):
        if name.startswith("STOKER_"):
            monkeypatch.delenv(name)
    # To make a folder pytest looks through those of all tests before it: not for the many that need none.
    own = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else _nobodys_folder(request)
    monkeypatch.setenv("STOKER_HOME", str(own / "home"))


def _nobodys_folder(request: pytest.FixtureRequest) -> Path:
    """One that is not there yet, of this test alone."""
    base: Path = request.getfixturevalue("tmp_path_factory").getbasetemp()
    return base / "homes" / f"{next(_HOMES)}"


_HOMES = count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=processes.place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> processes.ByUnit | None:
    """With `--dist loadfile`, as `make test` has it."""
    return processes.ByUnit(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Modules and items stay until the end. To look through them again would cost a third of a second at each end of an
    engine's thread, and each time that a test may have left something."""
    gc.disable()
    processes.import_in_turn(session.config)
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    """Keep what was measured now: pytest-xdist ends a process that takes long to end, and its data with it."""
    coverage = sys.modules.get("coverage")
    measured = coverage.Coverage.current() if coverage is not None else None
    if measured is not None:
        measured.save()


#: Seconds for which a test waits for a condition, where it says nothing else.
PATIENCE = float(os.environ.get("TEST_PATIENCE", "30"))


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Wait until `condition` is true and return what it returned; fail naming `what` otherwise."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds:g} s in vain: {what}")


def assert_idle(redis: Any) -> None:
    """The broker has no job that waits or runs, holds no message, and every key is to go in its time."""
    assert_nothing(lambda: open_work(redis), "jobs and messages that are left")
    left = overlong_keys(redis)
    assert not left, f"keys that live too long: {left}"


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet reaped does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rpartition(") ")[2][0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.fixture(scope="session")
def broker_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broker")


@pytest.fixture(scope="session")
def broker_settings(broker_home: Path) -> Iterator[Settings]:
    """A real broker without a worker, for the whole run."""
    broker = EmbeddedBroker(Settings(home=broker_home), port=0)
    try:
        yield Settings(home=broker_home, url=broker.start())
    finally:
        broker.stop()


@pytest.fixture
def broker(broker_settings: Settings) -> Iterator[Settings]:
    """The same, empty. A test that uses it leaves no key that lives too long, no thread, file handle or process."""
    client = connect(broker_settings)
    client.flushall()
    client.close()
    before = Held.now()
    yield broker_settings
    assert_nothing(before.left, "left by the test")
    left = overlong_keys(client)
    client.close()
    assert not left, f"keys that live too long: {left}"


@pytest.fixture
def redis(broker: Settings) -> Iterator[Any]:
    """A client of `broker`."""
    with closing(connect(broker)) as client:
        yield client


@pytest.fixture(scope="session")
def real_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Broker and worker with both real models, as `stoker up` runs them. For tests that leave it whole."""
    with shared_stack(tmp_path_factory.mktemp("stack"), (EMBED_MODEL, GENERATE_MODEL)) as running:
        yield running


@pytest.fixture(scope="session")
def quick_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The same with a tiny decoder in place of the real one: for what any weights can show."""
    folder = tmp_path_factory.mktemp("quick")
    with shared_stack(folder / "home", (EMBED_MODEL, f"{endless.MODEL}={endless.write(folder)}")) as running:
        yield running


@pytest.fixture(scope="session")
def renamed_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The quick one, whose decoder has the name of the real one: for texts that name that."""
    folder = tmp_path_factory.mktemp("renamed")
    with shared_stack(folder / "home", (EMBED_MODEL, f"{GENERATE_MODEL}={endless.write(folder)}")) as running:
        yield running


@pytest.fixture(scope="session")
def stack(real_stack: Stack) -> Stack:
    """The shared stack of a room, which may choose another one."""
    return real_stack


@contextmanager
def shared_stack(home: Path, models: tuple[str, ...]) -> Iterator[Stack]:
    # Its metrics are served too, on a port that is free or one of the next, and its spans are in its log.
    settings = stack_settings(home, metrics=str(free_port(9464)), traces="log", models=models)
    with warm_stack(settings) as running:
        yield running
        with Client(settings=running.settings) as client:
            assert_nothing(lambda: _busy_lanes(client), "places in lanes that nobody gave back")


def _busy_lanes(client: Client) -> list[str]:
    lanes = [(worker.worker, kind, held) for worker in client.workers() for kind, (held, _) in worker.lanes.items()]
    return [f"{worker}: {kind} has {held}" for worker, kind, held in lanes if held]


@contextmanager
def warm_stack(settings: Settings) -> Iterator[Stack]:
    """A broker of its own and a worker that serves its models. No process of them outlives it."""
    with Stack(settings, flower=False, own_broker=True) as running:
        running.wait_until_warm()
        yield running
    assert_nothing(lambda: processes_of(settings.home), "processes that outlive their stack")


def replace_worker(stack: Stack) -> None:
    """Wait for a worker that is ending, and start another."""
    assert stack.worker is not None
    stack.worker.stop()
    stack.start_worker()


def stack_settings(home: Path, **overrides: Any) -> Settings:
    """Without drafts: tiny models turn in circles, and their streams would end before a test has looked at them."""
    usual = {"home": home, "grace": 5.0, "lease": 3, "models": (EMBED_MODEL, GENERATE_MODEL), "lookup": False}
    return load_settings(**{**usual, **overrides})


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    """Of the shared stack, which has no job and holds no message when the test is over."""
    before = Held.now()
    with Client(settings=stack.settings) as running:
        yield running
        assert_idle(running.redis)
    assert_nothing(before.left, "left by the test")


@pytest.fixture
def own_stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack that a test may break, with the tiny decoder."""
    models = (f"{endless.MODEL}={endless.write(tmp_path)}",)
    with warm_stack(stack_settings(tmp_path / "own", models=models)) as running:
        yield running


@pytest.fixture
def own_embedding_stack(tmp_path: Path) -> Iterator[Stack]:
    """The same with the model that embeds."""
    with warm_stack(stack_settings(tmp_path / "own", models=(EMBED_MODEL,))) as running:
        yield running
