"""The embedded broker: a real server on loopback whose data outlive it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis

from stoker.broker.connection import connect
from stoker.errors import BrokerUnavailable, ConfigError
from stoker.local import broker as broker_module
from stoker.local.broker import EmbeddedBroker, free_port
from stoker.local.home import make_home
from stoker.local.stack import Stack
from stoker.settings import Settings, load_settings
from tests.conftest import wait_until
from tests.integration.machinery import processes_with


@contextmanager
def running(home: Path, port: int = 0) -> Iterator[tuple[EmbeddedBroker, redis.Redis]]:
    broker = EmbeddedBroker(Settings(home=home), port=port)
    try:
        client = connect(Settings(home=home, url=broker.start()))
        yield broker, client
        client.close()
    finally:
        broker.stop()


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_a_port_that_is_taken_is_not_used() -> None:
    with taken_port() as port:
        assert free_port(port) not in (0, port)
    assert free_port(0) != 0


def test_jobs_survive_a_restart_and_are_never_evicted(tmp_path: Path) -> None:
    with running(tmp_path) as (_, client):
        assert client.config_get("appendonly")["appendonly"] == "yes"
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        client.rpush("queue", "job")
    with running(tmp_path) as (_, client):
        assert client.lrange("queue", 0, -1) == [b"job"]


def test_a_broker_finds_a_free_port_and_other_shells_find_the_broker(tmp_path: Path) -> None:
    with taken_port() as port, running(tmp_path, port) as (broker, _):
        assert f":{port}/" not in broker.url
        assert json.loads((tmp_path / "broker.json").read_text()) == {"url": broker.url, "pid": os.getpid()}
        assert load_settings(home=tmp_path).address.redis == broker.url
        assert broker.alive
    assert not (tmp_path / "broker.json").exists()
    assert [broker.alive] == [False]
    broker.stop()  # twice does no harm


def test_the_file_on_disk_shrinks_once_what_it_holds_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "SMALL_FILE", 2**20)
    with running(tmp_path) as (broker, client):
        client.config_set("auto-aof-rewrite-percentage", 0)  # the server itself does not
        for number in range(64):
            client.set(f"blob:{number}", os.urandom(2**17), ex=3600)
        assert not broker.compact(), "all of it is in use"
        client.flushall()
        assert int(client.info("persistence")["aof_current_size"]) > 2**22
        wait_until(broker.compact, "the server takes the order: what it refuses now, it does at another round")
        wait_until(lambda: int(client.info("persistence")["aof_current_size"]) < 2**20, "it is small again")
        assert not broker.compact(), "a small one is left as it is"


def test_the_server_writes_its_file_anew_as_it_grows(tmp_path: Path) -> None:
    """A day of vectors that are fetched and deleted must not lie on the disk for ever."""
    with running(tmp_path) as (_, client):
        for _ in range(50):
            client.set("blob", os.urandom(2**20), ex=3600)
        wait_until(lambda: int(client.info("persistence")["aof_current_size"]) < 40 * 2**20, "it is written anew")


def test_a_port_that_another_broker_took_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path / "first") as (first, client):
        taken = client.connection_pool.connection_kwargs["port"]
        ports = iter([taken, taken])
        monkeypatch.setattr(broker_module, "free_port", lambda preferred: next(ports, None) or free_port(0))
        # It lets in who knows the password of the other: they differ by the folder alone.
        make_home(tmp_path / "second")
        (tmp_path / "second" / "broker").mkdir()
        shutil.copy(tmp_path / "first" / "broker" / "password", tmp_path / "second" / "broker" / "password")
        with running(tmp_path / "second", taken) as (second, _):
            assert second.url != first.url
            assert second.alive
        assert client.ping()


def test_a_second_broker_on_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 5))
    with running(tmp_path) as (_, client):
        monkeypatch.setattr(broker_module, "time", SimpleNamespace(monotonic=clock.__next__, sleep=lambda _: None))
        second = EmbeddedBroker(Settings(home=tmp_path), port=0)
        with pytest.raises(ConfigError, match=r"in use by another `stoker up`.*STOKER_HOME"):
            second.start()
        assert not second.take()
        second.stop()
        assert client.ping()
        assert (tmp_path / "broker.json").exists(), "the first one's address must stay"
    assert second.take()
    second.stop()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "broker" / "appendonlydir"
    folder.mkdir(parents=True)
    (folder / "appendonly.aof.manifest").write_text("nonsense\n")
    broker = EmbeddedBroker(Settings(home=tmp_path), port=0)
    with pytest.raises(BrokerUnavailable, match="did not start: "):
        broker.start()
    broker.stop()
    wait_until(lambda: not broker.alive, "nothing is left")


def test_a_broker_with_a_password_of_its_own_asks_everybody_for_it_and_names_it_on_no_command_line(
    tmp_path: Path,
) -> None:
    before = os.umask(0o022)
    try:
        broker = EmbeddedBroker(Settings(home=tmp_path), port=0)
        settings = Settings(home=tmp_path, url=broker.start())
    finally:
        os.umask(before)
    try:
        client = connect(settings)
        password = client.connection_pool.connection_kwargs["password"]
        assert len(password) >= 20
        assert password not in settings.address.shown
        client.set("key", "value")
        port = client.connection_pool.connection_kwargs["port"]
        stranger = connect(Settings(home=tmp_path / "other", url=f"redis://127.0.0.1:{port}/0"))
        with pytest.raises(redis.exceptions.AuthenticationError):
            stranger.get("key")
        stranger.close()
        assert processes_with(str(tmp_path)), "the server names its folder"
        assert not processes_with(password)
        assert load_settings(home=tmp_path).address.redis == broker.url, "other shells of this user find it"
        client.close()
        kept = [path for path in tmp_path.rglob("*") if path.name != "logs"]
        assert {path.name for path in kept} >= {"broker.json", "password", "server.conf", "appendonlydir"}
        open_to_others = [path for path in kept if path.is_file() and path.stat().st_mode & 0o077]
        assert not open_to_others
        first = broker.url
    finally:
        broker.stop()
    again = EmbeddedBroker(Settings(home=tmp_path), port=port)
    try:
        assert again.start() == first, "the same password"
    finally:
        again.stop()


def test_a_home_is_closed_to_other_users_also_one_that_was_open(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    make_home(home)
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_a_folder_that_is_not_stokers_alone_is_no_home_and_keeps_the_rights_of_all_in_it(
    tmp_path: Path, mode: int
) -> None:
    home = tmp_path / "project"
    (home / "logs").mkdir(parents=True)
    page = home / "logs" / "index.html"
    if mode == 0o755:
        (home / "Makefile").touch()
    page.touch(0o644)
    home.chmod(mode)
    with pytest.raises(ConfigError, match=f"^STOKER_HOME: {home} (is a folder of all users|has .*'Makefile'). A home"):
        make_home(home)
    assert (home.stat().st_mode & 0o7777, page.stat().st_mode & 0o777) == (mode, 0o644)


@pytest.mark.parametrize("mark", ["identity", "broker/password", "worker.env"])
def test_a_folder_where_stoker_was_before_is_a_home_with_anything_next_to_it(tmp_path: Path, mark: str) -> None:
    (tmp_path / "home" / "broker").mkdir(parents=True)
    (tmp_path / "home" / "notes.txt").touch()
    (tmp_path / "home" / mark).touch()
    make_home(tmp_path / "home")


def test_what_lies_in_an_empty_folder_all_the_same_makes_it_no_other_programs(tmp_path: Path) -> None:
    """A disk's own folder, a user's hidden files, what Stoker restored, and drafts of a start that was killed."""
    home = tmp_path / "home"
    for name in ("lost+found", ".cache", "adapters", "runs", "tmpa1b2c3_4"):
        (home / name).mkdir(parents=True)
    make_home(home)
    assert home.stat().st_mode & 0o777 == 0o700


def test_a_stack_tries_its_home_before_it_starts_anything(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.touch()
    stack = Stack(Settings(home=home), flower=False, own_broker=True)
    with pytest.raises(ConfigError, match=f"^STOKER_HOME: {home} cannot be made or written"), stack:
        pass


def test_the_server_keeps_each_second_on_disk_drops_nothing_and_is_on_loopback_alone(broker: Settings) -> None:
    client = connect(broker)
    wanted = {
        "appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "save": "",
        "bind": "127.0.0.1", "auto-aof-rewrite-percentage": "100", "auto-aof-rewrite-min-size": str(16 * 2**20),
    }  # fmt: skip
    found = {name: client.config_get(name)[name] for name in wanted}
    client.close()
    assert found == wanted


def test_a_home_on_a_disk_without_room_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file can be made there, and nothing be written into it."""

    def write(data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    @contextmanager
    def full(**_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(write=write)

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ConfigError, match=r"cannot be made or written \(No space left on device\)"):
        make_home(tmp_path / "home")


def test_what_an_earlier_release_left_open_in_a_home_is_closed_and_nothing_that_links_lead_to(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (home / "broker" / "deep").mkdir(parents=True, mode=0o755)
    (home / "identity").touch(0o600)
    for name, mode in (("broker/deep/appendonly.aof", 0o644), ("logs.txt", 0o666), ("tool", 0o755), ("kept", 0o400)):
        (home / name).write_text("x")
        (home / name).chmod(mode)
    elsewhere.write_text("x")
    elsewhere.chmod(0o644)
    (home / "link").symlink_to(elsewhere)
    (home / "broken").symlink_to(tmp_path / "nothing")
    make_home(home)
    found = {path.name: path.stat().st_mode & 0o777 for path in home.rglob("*") if path.name != "broken"}
    assert found == {
        "broker": 0o700, "deep": 0o700, "appendonly.aof": 0o600, "logs.txt": 0o600, "tool": 0o700, "kept": 0o400,
        "identity": 0o600, "link": 0o644,
    }  # fmt: skip


def test_the_broker_is_in_a_session_of_its_own(tmp_path: Path) -> None:
    """Ctrl-C in the terminal reaches the command that started it, and ends the broker last."""
    with running(tmp_path) as (_, client):
        assert os.getsid(int(client.info()["process_id"])) != os.getsid(0)
