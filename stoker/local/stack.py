"""The stack of `stoker up`: broker, worker, Flower, gateway. Started in this order, stopped in the reverse one."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO

from redis.exceptions import BusyLoadingError

from stoker.broker.connection import connect, translated
from stoker.broker.loading import wait_until_loaded
from stoker.client import Client
from stoker.contract import Presence
from stoker.contract.presence import node_of
from stoker.errors import BrokerUnavailable, ConfigError, StokerError, WorkerUnavailable
from stoker.local import boot_errors
from stoker.local.broker import PREFERRED_PORT, EmbeddedBroker, free_port
from stoker.local.home import make_home
from stoker.local.naming import take_name
from stoker.local.process import LogSize, Process, how_it_ended
from stoker.monitor.access import password
from stoker.settings import Settings

FLOWER_PORT = 5555
GATEWAY_PORT = 8000
#: Seconds that the gateway gets to end its requests, and a few more.
GATEWAY_GRACE = 8.0
#: Seconds between two looks. Nothing limits their number: a download may take long, and a process that fails ends.
POLL = 0.1
#: Seconds between a worker's end and its restart: enough not to spin when something is broken for good.
RESTART_PAUSE = 2.0
#: Seconds at most: the pause doubles with each worker that ends before it is warm.
LONGEST_PAUSE = 60.0
#: Seconds between two looks at the size of the broker's append-only file.
COMPACT_EVERY = 60.0


class Stack:
    """Use in `with`: on leaving, nothing that it started is left."""

    def __init__(
        self,
        settings: Settings,
        *,
        flower: bool = True,
        gateway: bool = False,
        own_broker: bool = False,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.settings, self._report = settings, report
        self._want_flower, self._want_gateway, self._own_broker = flower, gateway, own_broker
        self._broker: EmbeddedBroker | None = None
        self.worker: Process | None = None
        #: What nothing else needs: name → process.
        self._extras: dict[str, Process] = {}
        #: The process of the `stoker up` whose broker this stack uses; None for any other broker.
        self.joined: int | None = None
        #: Where Flower is, and the password of its user `stoker`.
        self.flower_url = self.flower_password = ""
        #: Where the gateway is; "" without one.
        self.gateway_url = ""
        #: The worker that is warm, and what it is called before that: its node, and the processes that had this name.
        self.worker_name, self._node = "", ""
        self._before: set[str] = set()
        self._name: IO[str] | None = None
        #: Of `watch`: whether the worker has been warm since it was started, and the pause before another one.
        self._is_warm, self._pause = False, RESTART_PAUSE

    def start(self) -> None:
        """Start what is missing; returns at once, `wait_until_warm` waits."""
        make_home(self.settings.home)
        self._broker = self._embedded()
        if self._broker is not None:
            self.settings = self.settings.model_copy(update={"url": self._broker.start(self._report)})
        else:
            wait_for_broker(self.settings, self._report)
        self.start_worker()
        # One that joins brings a worker: the monitor of the first one shows it.
        if self._want_flower and self.joined is None and importlib.util.find_spec("flower") is not None:
            port = free_port(FLOWER_PORT)
            self.flower_url = f"http://127.0.0.1:{port}"
            self.flower_password = password(self.settings)
            self._extras["Flower"] = self._spawn("flower", _own_command("flower", port), 5)
        if self._want_gateway and self.joined is None and importlib.util.find_spec("uvicorn") is not None:
            port = free_port(GATEWAY_PORT)
            self.gateway_url = f"http://127.0.0.1:{port}/v1"
            self._extras["the gateway"] = self._spawn("gateway", _own_command("serve", port), GATEWAY_GRACE)

    def _embedded(self) -> EmbeddedBroker | None:
        """The broker to start; None if another is there. A `stoker up` that starts one with this home at this moment,
        or ends, is waited for: this one joins it, or comes in its place."""
        # A private broker stays off the usual port, where other clients would find it.
        broker = EmbeddedBroker(self.settings, port=0 if self._own_broker else PREFERRED_PORT)
        while self._needs_broker():
            if self._own_broker or broker.take():
                return broker
            self._report("waiting for another `stoker up` of this STOKER_HOME, which starts or ends")
            time.sleep(POLL)
        return None

    def _needs_broker(self) -> bool:
        """Not if one was chosen and answers. A Redis that was not chosen is another program's, on any port."""
        if self._own_broker or self.settings.chosen_url is None:
            return True
        if answers(self.settings):
            running = self.settings.running_broker
            self.joined = running.pid if running is not None and not self.settings.url else None
            return False
        if self.settings.url:
            named = self.settings.url_option
            without = f"{'unset' if named == 'STOKER_URL' else 'leave out'} {named}"
            raise BrokerUnavailable(
                f"no answer from the broker at {self.settings.address.shown}, which {named} names. "
                f"Start it, or {without} to use the embedded one."
            )
        return True

    def start_worker(self) -> None:
        """Start a worker (again), under the same name."""
        if self._name is None:
            self._node, self._name = take_name(self.settings)
        with Client(settings=self.settings) as client:
            self._before = {presence.worker for presence in client.workers()}
        self.worker = self._spawn("worker", worker_command(self.settings, self._node), self.settings.grace + 5)

    def _spawn(self, name: str, command: list[str], grace: float) -> Process:
        # The children get the settings of this process, also those that did not come from its environment.
        env = {**self.settings.environment(), "STOKER_URL": self.settings.address.url, "PYTHONUNBUFFERED": "1"}
        return Process(
            name, command, log=self.settings.logs / f"{name}.log", env=env, grace=grace, size=LogSize.of(self.settings)
        )

    def wait_until_warm(self) -> Presence:
        """Wait until the worker serves its models; raises what ended it if it does not get there."""
        assert self.worker is not None
        with Client(settings=self.settings) as client:
            while True:
                presence = self._warm(client)
                if presence is not None:
                    return presence
                if self.worker.returncode is not None:
                    raise _error_of(self.worker)
                self._report("loading models")
                time.sleep(POLL)

    def _warm(self, client: Client) -> Presence | None:
        """The worker that was started last, once it serves its models."""
        for presence in client.workers():
            if node_of(presence.worker) == self._node and presence.worker not in self._before:
                self.worker_name = presence.worker
                return presence
        return None

    def watch(self, report: Callable[[str], None]) -> None:
        """Run until interrupted. A worker that dies is started again, also if it was not warm yet: the memory that it
        lacks may be there later, and broker and gateway serve meanwhile. A broker of this machine that dies ends the
        stack; one elsewhere is waited for."""
        with Client(settings=self.settings) as client:
            self._watch(client, report)

    def _watch(self, client: Client, report: Callable[[str], None]) -> None:
        self._is_warm, self._pause = True, RESTART_PAUSE
        compacted = time.monotonic()
        while True:
            time.sleep(POLL)
            self._check_broker()
            if self._broker is not None and time.monotonic() - compacted >= COMPACT_EVERY:
                self._broker.compact()
                compacted = time.monotonic()
            self._report_extras(report)
            try:
                self._tend_worker(client, report)
            except BrokerUnavailable as error:
                # One that ended, of ours or of the one that was joined, is seen above; another comes back.
                report(f"{error} Trying again")
                time.sleep(RESTART_PAUSE)

    def _check_broker(self) -> None:
        """Raises `BrokerUnavailable` for one of this machine that has ended."""
        if self._broker is not None and not self._broker.alive:
            raise BrokerUnavailable(f"the embedded broker ended; see {self.settings.logs / 'broker.log'}.")
        if self.joined is not None and not self._first_runs():
            raise BrokerUnavailable(
                f"the `stoker up` that this one had joined (process {self.joined}) has ended, and its broker with "
                "it: this worker ends too. Jobs stay for the next `stoker up`."
            )

    def _report_extras(self, report: Callable[[str], None]) -> None:
        """Those that have ended, once each."""
        for name, extra in list(self._extras.items()):
            if extra.returncode is not None:
                del self._extras[name]
                report(f"{name} ended ({how_it_ended(extra.returncode)}), see {extra.log}; jobs go on without it")

    def _tend_worker(self, client: Client, report: Callable[[str], None]) -> None:
        """Start another worker in place of one that has ended, after a pause."""
        assert self.worker is not None
        warm, code = self._is_warm, self.worker.returncode
        if code is not None:
            why = how_it_ended(code) if warm else f"not warm yet: {_error_of(self.worker)}"
            report(f"the worker ended ({why}); starting another" + ("" if warm else f" in {self._pause:.0f} s"))
            time.sleep(self._pause)
            self.start_worker()
            self._is_warm, self._pause = False, min(2 * self._pause, LONGEST_PAUSE)
        elif not warm and self._warm(client) is not None:
            self._is_warm, self._pause = True, RESTART_PAUSE
            report("a worker is warm again")

    def _first_runs(self) -> bool:
        running = self.settings.running_broker
        return running is not None and running.pid == self.joined

    def stop(self) -> None:
        # Ask both first, wait then: they stop side by side, and the broker outlives them.
        children = [*self._extras.values(), *([] if self.worker is None else [self.worker])]
        for child in children:
            child.ask_to_stop()
        for child in children:
            child.stop()
        if self._broker is not None:
            self._broker.stop()
        if self._name is not None:
            self._name.close()

    def __enter__(self) -> Stack:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _own_command(name: str, port: int) -> list[str]:
    return [sys.executable, "-m", "stoker.cli", name, f"--port={port}"]


def answers(settings: Settings) -> bool:
    """Whether a broker listens at the address. One that answers with an error (a password) does listen."""
    client = connect(settings)
    try:
        client.ping()
    except BusyLoadingError:
        return True
    except Exception as error:
        return "auth" in type(error).__name__.lower()
    finally:
        client.close()
    return True


def wait_for_broker(settings: Settings, report: Callable[[str], None]) -> None:
    """Wait until a broker that was chosen has read its data. Raises `BrokerUnavailable` if it does not answer."""
    client = connect(settings)
    try:
        with translated(settings, passing=(BusyLoadingError,)):
            client.ping()
    except BusyLoadingError:
        wait_until_loaded(lambda: client.info("persistence"), settings.address.shown, report)
    finally:
        client.close()


def require_workers() -> None:
    """Raises `ConfigError` for an installation that has no worker."""
    if importlib.util.find_spec("workers") is None or importlib.util.find_spec("mlx") is None:
        raise ConfigError(
            "this installation has the client alone. Workers run from a checkout: clone Stoker, then `make venv`; "
            "or use the image (docker compose --profile cpu-worker up)."
        )


def rank_command() -> list[str]:
    """A rank of a group behind its first one. Raises `ConfigError`."""
    require_workers()
    return [sys.executable, "-m", "workers.rank"]


def celery_command(command: str) -> list[str]:
    """How to run one of Celery's commands on the worker's app; raises `ConfigError` where the app is not to be had."""
    require_workers()
    # Flower takes the arguments of Celery's own module for its own.
    module = "workers" if command == "worker" else "celery"
    # Quiet: without the banner, which shows of a broker's URL what its readers take for a user.
    return [sys.executable, "-m", module, "--quiet", "-A", "workers.celery.app", command]


def worker_command(settings: Settings, name: str) -> list[str]:
    """A worker with one thread for each job that it may hold: the threads wait, the engine works."""
    jobs = sum(settings.slots.values()) + settings.extra_slots
    options = ["--pool=threads", f"--concurrency={jobs}", f"--hostname={name}"]
    # Workers need no word of each other: leases and lanes do what gossip and mingle would, without the chatter.
    return [*celery_command("worker"), *options, "--without-gossip", "--without-mingle"]


def _error_of(worker: Process) -> StokerError:
    """The error that a worker wrote when its boot failed."""
    output, code = worker.output(), worker.returncode
    return boot_errors.error_in(output, code) or WorkerUnavailable(
        f"the worker ended before it was warm ({how_it_ended(code or 0)}); its log {worker.log} ends with: "
        f"{output.strip()[-300:]}"
    )
