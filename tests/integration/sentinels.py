"""A broker with a replica and three sentinels that watch both: real processes on loopback, with the users of
`deploy/acl`."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis
from redis.exceptions import RedisError

from stoker.local.broker import server_binary
from tests.conftest import wait_until
from tests.integration.machinery import own_port
from tests.stoker.acl import rights

SERVICE = "queue"
#: The sentinels' own.
ASKING = "asking-password"


class Server:
    """One process of the server's binary, as `config` says."""

    def __init__(self, folder: Path, port: int, config: str, *flags: str) -> None:
        folder.mkdir()
        self.port = port
        file = folder / "server.conf"  # a sentinel writes it anew
        file.write_text(f"bind 127.0.0.1\nport {port}\ndir {folder}\n{config}")
        command = [str(server_binary()), str(file), *flags]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log)

    def client(self) -> Any:
        return redis.Redis(port=self.port, username="admin", password="admin-password", decode_responses=True)

    def answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except RedisError:
                return False

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


class Watched:
    def __init__(self, folder: Path, leaving: ExitStack) -> None:
        acl = folder / "users.acl"
        acl.write_text(rights())
        self.primary = Server(folder / "primary", own_port(), _broker(acl))
        leaving.callback(self.primary.end)
        self.replica = Server(
            folder / "replica", own_port(), f"{_broker(acl)}replicaof 127.0.0.1 {self.primary.port}\n"
        )
        leaving.callback(self.replica.end)
        wait_until(lambda: self.primary.answers() and self.replica.answers(), "both answer")
        wait_until(self._is_in_step, "the replica has all")
        config = _sentinel(self.primary.port)
        self.sentinels = [Server(folder / f"sentinel-{n}", own_port(), config, "--sentinel") for n in range(3)]
        for sentinel in self.sentinels:
            leaving.callback(sentinel.end)
        wait_until(
            lambda: all(self._knows_all(sentinel) for sentinel in self.sentinels), "the sentinels know each other"
        )

    def url(self, role: str) -> str:
        # Where the first of them should be is none: each is asked in turn.
        hosts = ",".join(f"127.0.0.1:{port}" for port in (1, *(sentinel.port for sentinel in self.sentinels)))
        login = f"{role}:{role}-password"
        return f"redis+sentinel://{login}@{hosts}/{SERVICE}/0?sentinel_username=asking&sentinel_password={ASKING}"

    def denied(self) -> list[str]:
        """What users asked of either broker and may not, as far as they are alive."""
        found = []
        for server in (self.primary, self.replica):
            if server.answers():
                with server.client() as admin:
                    found += [f"{row['username']}: {row['reason']} {row['object']}" for row in admin.acl_log()]
        return found

    def stop_replicating(self) -> None:
        """What the primary takes from now on, the replica does not get."""
        with self.primary.client() as client:
            client.execute_command("ACL", "SETUSER", "replica", "off")
            client.execute_command("CLIENT", "KILL", "TYPE", "replica")

    def kill_primary(self) -> None:
        os.kill(self.primary.process.pid, signal.SIGKILL)

    def _is_in_step(self) -> bool:
        with self.replica.client() as client:
            return bool(client.info("replication")["master_link_status"] == "up")

    def _knows_all(self, sentinel: Server) -> bool:
        if not sentinel.answers():
            return False
        with sentinel.client() as client:
            state = client.sentinel_masters()[SERVICE]
        return bool(state["num-other-sentinels"] == 2 and state["num-slaves"] == 1)


@contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    with ExitStack() as leaving:
        yield Watched(folder, leaving)


def _broker(acl: Path) -> str:
    # A replica that joins must not wait for others.
    return (
        f"aclfile {acl}\nmasteruser replica\nmasterauth replica-password\n"
        "appendonly yes\nsave ''\nrepl-diskless-sync-delay 0\n"
    )


def _sentinel(port: int) -> str:
    # The sentinels ask each other as `default`.
    return (
        f"requirepass {ASKING}\nuser admin on >admin-password +@all\n"
        f"user asking on >{ASKING} -@all +auth +hello +ping +client|setinfo +sentinel|masters\n"
        f"sentinel monitor {SERVICE} 127.0.0.1 {port} 2\n"
        f"sentinel auth-user {SERVICE} sentinel\nsentinel auth-pass {SERVICE} sentinel-password\n"
        f"sentinel down-after-milliseconds {SERVICE} 500\nsentinel failover-timeout {SERVICE} 3000\n"
    )
