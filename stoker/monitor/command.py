"""Running the monitor, until it is asked to end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flower.options import options
from tornado.ioloop import IOLoop

from stoker.errors import ConfigError
from stoker.files.locks import try_lock
from stoker.logs import setup as logs
from stoker.monitor import access, transport
from stoker.monitor.app import COLUMNS, GONE, TASKS, Monitor
from stoker.settings import Settings

log = logging.getLogger(__name__)

#: Milliseconds between two times that the history is written.
SAVE_EVERY = 60_000
#: Seconds for what still waits for the broker, once the monitor is asked to end.
LEAVE_LIMIT = 5.0
#: The exit code of a process that an error ended.
FAILED = 1


def serve(settings: Settings, address: str, port: int, names: frozenset[str], say: Callable[[str], None]) -> None:
    """Serve the monitor until a signal ends it; its history stays. Raises `ConfigError`."""
    os.umask(0o077)
    home, password = access.folder(settings), access.password(settings)
    configure(address, port, password)
    logs.configure(settings, [password])
    quiet()
    transport.install()
    kept = False
    with (home / "lock").open("w", encoding="utf-8") as lock:
        # One process writes the history; none where no file can be locked.
        with suppress(OSError):
            kept = try_lock(lock)
        history = {"db": str(home / "history"), "persistent": kept, "state_save_interval": SAVE_EVERY if kept else 0}
        close_to_others(home)
        gate = access.Gate(password, names)
        monitor = Monitor(settings, gate, IOLoop.current(), **history)
        try:
            where = monitor.start_http_server()
        except OSError as error:
            raise ConfigError(f"--address {address} --port {port}: cannot be listened on ({error.strerror}).") from None
        say(f"flower  http://{_in_url(address)}:{where}  (user {access.USER}, password in {home / 'password'})")
        say(f"broker  {settings.address.shown}")
        if not kept:
            say("history is kept by another `stoker flower` of this STOKER_HOME, and not by this one")
        run(monitor)


def run(monitor: Monitor) -> None:
    """Run until a signal asks for the end; then the history is written."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # What is ignored on purpose stays so: by `nohup`, or for a shell's background jobs.
        if signal.getsignal(number) is not signal.SIG_IGN:
            monitor.io_loop.asyncio_loop.add_signal_handler(number, monitor.io_loop.stop)
    code = FAILED
    try:
        monitor.start()
        leave(monitor)
        code = 0
    finally:
        monitor.stop()
        end_within(LEAVE_LIMIT, code)


def leave(monitor: Monitor) -> None:
    try:
        monitor.io_loop.run_sync(monitor.leave, timeout=LEAVE_LIMIT)
    except TimeoutError:
        log.warning("the broker did not let go of the monitor within %g s", LEAVE_LIMIT)


def end_within(seconds: float, code: int) -> None:
    """End this process, whose history is written, with `code`, although Flower's threads may wait for a broker that is
    away."""
    limit = threading.Timer(seconds, os._exit, (code,))
    limit.daemon = True
    limit.start()


def configure(address: str, port: int, password: str) -> None:
    """Flower's own options, which some of its pages read from one place for all."""
    options.address, options.port = address, port
    options.basic_auth = [f"{access.USER}:{password}"]
    options.max_tasks, options.purge_offline_workers, options.tasks_columns = TASKS, GONE, COLUMNS


def quiet() -> None:
    """No word of each request, nor of each question that no worker was there to answer."""
    for name in ("tornado.access", "tornado.general"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("flower.inspector").addFilter(lambda record: record.msg != "Inspect method %s failed")


def close_to_others(home: Path) -> None:
    """What an earlier release wrote here is for this user alone, too."""
    for file in home.iterdir():
        if file.is_file():
            file.chmod(0o600)


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else {"0.0.0.0": "127.0.0.1"}.get(address, address)
