"""Broker URLs: one given, three forms made of it, and no password in what people see."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing, suppress
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from kombu.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError

from stoker import AsyncClient, Client
from stoker.address import DEFAULT_URL, Address, Sentinels
from stoker.broker import sentinel
from stoker.broker.connection import connect, connect_async
from stoker.celery_config import shared_config
from stoker.errors import BrokerUnavailable, ConfigError
from stoker.settings import Settings, load_settings
from tests.conftest import wait_until
from workers.celery import transport

SECRET = "s3cret-w0rd"


def test_the_default_url_is_read_as_it_is() -> None:
    assert Address.parse(DEFAULT_URL) == Address(DEFAULT_URL, DEFAULT_URL, DEFAULT_URL, DEFAULT_URL)


@pytest.mark.parametrize(
    ("given", "celery"),
    [
        ("redis://host", "redis://host:6379/0"),
        ("redis://host/3", "redis://host:6379/3"),
        ("redis://host:7000", "redis://host:7000/0"),
        ("redis://", "redis://127.0.0.1:6379/0"),
        ("redis://[::1]:7000/2", "redis://[::1]:7000/2"),
        ("redis://me:p%40ss@host/1", "redis://me:p%40ss@host:6379/1"),
        ("rediss://host", "rediss://host:6379/0?ssl_cert_reqs=required"),
        ("redis+socket:///run/redis.sock", "redis+socket:///run/redis.sock?virtual_host=0"),
        ("redis+socket:///run/redis.sock?virtual_host=2", "redis+socket:///run/redis.sock?virtual_host=2"),
        ("redis+socket:///run/redis.sock?db=2", "redis+socket:///run/redis.sock?virtual_host=2"),
        ("redis+socket:///run/my%20redis.sock", "redis+socket:///run/my%20redis.sock?virtual_host=0"),
    ],
)
def test_missing_parts_are_filled_in(given: str, celery: str) -> None:
    assert Address.parse(given).celery == celery


@pytest.mark.parametrize(
    "url", ["redis://u:p@host:7000/3", "rediss://host:7000/3", "redis+socket:///run/redis.sock?virtual_host=3"]
)
def test_redis_py_reads_what_is_meant_for_it(url: str) -> None:
    made = redis.Redis.from_url(Address.parse(url).redis).connection_pool
    assert made.connection_kwargs["db"] == 3
    if "socket" in url:
        assert made.connection_kwargs["path"] == "/run/redis.sock"
    else:
        assert (made.connection_kwargs["host"], made.connection_kwargs["port"]) == ("host", 7000)


def test_tls_verifies_except_where_the_url_says_otherwise() -> None:
    assert "ssl_cert_reqs=required" in Address.parse("rediss://host").redis
    address = Address.parse("rediss://host?ssl_cert_reqs=none")
    assert address.redis == address.celery == "rediss://host:6379/0?ssl_cert_reqs=none"


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@host/1",
        f"redis://me:{SECRET}@host/1",
        f"rediss://me:{SECRET}@host",
        f"redis://host/0?password={SECRET}",
        f"redis+socket://:{SECRET}@/run/redis.sock",
        f"redis://{SECRET}@host",
        f"rediss://{SECRET}@host:7000/1",
        f"redis+socket://{SECRET}@/run/redis.sock",
        f"redis://:%73{SECRET}%40x@host",
        f"redis://me:a:{SECRET}@host",
        f"redis://me:a@{SECRET}@host",
        f"redis://host/0?username=me&password={SECRET}&db=1",
        f"redis+sentinel://:{SECRET}@a:1,b:2/queue/0?sentinel_password={SECRET}",
        f"redis+sentinel://me:{SECRET}@a/queue?sentinel_username=me&sentinel_password={SECRET}",
        f"redis+sentinel://{SECRET}@a/queue",
    ],
)
def test_what_is_shown_holds_no_password(url: str) -> None:
    address = Address.parse(url)
    assert SECRET not in address.shown
    assert SECRET not in address.without_password
    settings = Settings(url=url, artifacts=f"s3://key:{SECRET}@bucket/x")
    assert SECRET not in f"{settings!r} {settings}"
    with Client(settings=settings) as client:
        assert SECRET not in f"{client!r} {client.redis!r} {client.link.__reduce__()!r}"


@pytest.mark.parametrize(
    "url",
    [
        f"redis://me:{SECRET}@host:port/0",
        f"redis://me:{SECRET}@host/db",
        f"http://me:{SECRET}@host",
        f"me:{SECRET}@host",
        f"redis+socket://me:{SECRET}@",
        f"redis://:12?{SECRET}@host",
        f"redis://:12#{SECRET}@host",
        f"redis://:12/{SECRET}@host",
        f"redis://12?{SECRET}@host",
        f"{SECRET}@redis://host",
        f"redis+sentinel://me:12/{SECRET}@a:1/queue/0",
        f"redis+sentinel://me:12?{SECRET}@a:1/queue/0",
        f"redis+sentinel://me:12#{SECRET}@a:1/queue/0",
        f"redis+sentinel://me:{SECRET}@a:port/queue/0",
        f"redis+sentinel://a:1/queue/0?password={SECRET}",
    ],
)
def test_an_error_about_a_url_holds_no_password(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        Address.parse(url)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("password", [f"{SECRET}/x", f"1234/{SECRET}"])
def test_an_error_about_a_password_with_a_bare_slash_does_not_hold_it(password: str) -> None:
    with pytest.raises(ConfigError) as error:
        Address.parse(f"redis://me:{password}@host:6379/0")
    assert SECRET not in str(error.value)


def test_an_address_of_sentinels_is_read_for_each_of_its_readers() -> None:
    address = Address.parse("redis+sentinel://me:p%2Fa;b@one,two:7000,[::1]:7001/queue.x/3?sentinel_password=q%26r")
    hosts = (("one", 26379), ("two", 7000), ("::1", 7001))
    assert address.sentinels == Sentinels(hosts, "queue.x", None, "q&r")
    assert address.redis == "redis://me:p%2Fa;b@queue.x/3"
    assert address.celery.split(";") == [
        f"sentinel://me:p%2Fa%3Bb@{host}/3" for host in ("one:26379", "two:7000", "[::1]:7001")
    ]
    assert address.shown == "redis+sentinel://me:***@one:26379,two:7000,[::1]:7001/queue.x/3"
    assert Address.parse(address.url) == address
    plain = Address.parse(address.without_password)
    assert plain.sentinels == Sentinels(hosts, "queue.x")
    assert plain.redis == "redis://me@queue.x/3"


def test_every_reader_of_an_address_of_sentinels_gets_the_logins() -> None:
    settings = Settings(url="redis+sentinel://me:a%3Bb@one,two:7000/queue/3?sentinel_username=you&sentinel_password=c")
    made = connect(settings).connection_pool
    kept = made.connection_kwargs
    assert (kept["username"], kept["password"], kept["db"]) == ("me", "a;b", 3)
    asked = made.sentinel_manager.sentinels[1].connection_pool.connection_kwargs
    assert (asked["host"], asked["port"], asked["username"], asked["password"]) == ("two", 7000, "you", "c")
    # There are others to ask: none is waited for as long as a broker would be.
    limits = (sentinel.SENTINEL_TIMEOUT,) * 2
    assert (asked["socket_timeout"], asked["socket_connect_timeout"]) == limits
    transport.install()
    config = shared_config(settings)
    with Connection(config["broker_url"], transport_options=config["broker_transport_options"]) as connection:
        assert (connection.userid, connection.password, connection.virtual_host) == ("me", "a;b", "3")
        assert connection.get_transport_cls() is transport.SentinelTransport
        assert [url.partition("@")[2] for url in connection.alt] == ["one:26379/3", "two:7000/3"]
    options = config["result_backend_transport_options"]
    assert (options["master_name"], options["sentinel_kwargs"]["username"]) == ("queue", "you")


def test_sentinels_that_do_not_answer_are_one_clear_error() -> None:
    settings = Settings(url=f"redis+sentinel://:{SECRET}@127.0.0.1:1,127.0.0.1:2/queue?sentinel_password={SECRET}")
    where = r"redis\+sentinel://:\*\*\*@127\.0\.0\.1:1,127\.0\.0\.1:2/queue/0"
    why = r"\(no sentinel names a primary of 'queue': Error 111 .*:1\. [^<>]*; Error 111 [^<>]*:2\. [^<>]*\)"
    with Client(settings=settings) as client, pytest.raises(BrokerUnavailable, match=f"{where} {why}") as error:
        client.workers()
    assert SECRET not in str(error.value)

    async def ask() -> None:
        async with AsyncClient(settings=settings) as asking:
            await asking.workers()

    with pytest.raises(BrokerUnavailable, match=f"{where} {why}"):
        asyncio.run(ask())


@pytest.mark.parametrize("option", ["ssl_ca_certs=/ca.pem", "ssl_cert_reqs=none", "ssl_check_hostname=false"])
def test_a_plain_connection_takes_no_option_of_tls(option: str) -> None:
    """Who asks for it believes that the connection is encrypted."""
    with pytest.raises(ConfigError, match=r"an option behind the \? is wrong"):
        Address.parse(f"redis://host/0?{option}")
    assert option.partition("=")[0] in Address.parse(f"rediss://host/0?{option}").redis


def test_a_sentinel_that_says_nothing_does_not_hold_up_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection, as a machine does whose sentinel is frozen."""
    monkeypatch.setattr(sentinel, "SENTINEL_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis+sentinel://127.0.0.1:{silent.getsockname()[1]}/queue"
        settings = Settings(url=url, patience=0)
        with Client(settings=settings) as client, pytest.raises(BrokerUnavailable, match="Timeout"):
            client.workers()


def test_a_client_that_is_closed_keeps_no_connection_to_a_sentinel(broker: Settings) -> None:
    """A broker that is no sentinel answers the question by an error, on a connection that could be used again."""
    password, _, host = str(broker.url).removeprefix("redis://:").rpartition("@")
    url = f"redis+sentinel://{host.partition('/')[0]}/queue?sentinel_password={password}"
    with closing(connect(broker)) as admin:
        before = len(admin.client_list())
        client = Client(settings=Settings(url=url, patience=0))
        with suppress(redis.RedisError, BrokerUnavailable):
            client.workers()
        assert len(admin.client_list()) == before + 1
        client.close()
        wait_until(lambda: len(admin.client_list()) == before, "the sentinel's connection is closed")


@pytest.mark.parametrize(
    "rest", ["", "a", "a/", "/queue", "a,,b/queue", "a:x/queue", "a/que ue", "a/queue/x", "a/queue/0?socket_timeout=1"]
)
def test_an_address_of_sentinels_that_lacks_something_is_refused(rest: str) -> None:
    with pytest.raises(ConfigError, match=r"expected redis\+sentinel://\[USER:PASSWORD@\]HOST.*/SERVICE"):
        Address.parse(f"redis+sentinel://{rest}")


@pytest.mark.parametrize(
    "option",
    ["db=3", "protocol=3", "client_name=x", "socket_timeout=10", "health_check_interval=9", "username=me&password=x"],
)
def test_an_option_that_clients_have_does_not_end_a_worker(option: str) -> None:
    """kombu takes what it does not know for an argument of its own."""
    config = shared_config(Settings(url=f"redis://127.0.0.1:1/0?{option}"))
    Connection(config["broker_url"], transport_options=config["broker_transport_options"])


def test_a_database_and_a_login_behind_the_address_are_those_of_all_readers() -> None:
    address = Address.parse("rediss://me@h:1/2?db=3&username=you&password=a/b&client_name=c&ssl_check_hostname=false")
    assert address.redis.startswith("rediss://me:a%2Fb@h:1/3?client_name=c&")
    assert address.celery == "rediss://me:a%2Fb@h:1/3?ssl_check_hostname=false&ssl_cert_reqs=required"
    assert address.shown == "rediss://me:***@h:1/3"
    assert Address.parse("redis://h?username=you&password=x").shown == "redis://you:***@h:6379/0"


def test_an_address_without_its_password_keeps_its_options() -> None:
    address = Address.parse("rediss://me:s3cret@h:1/2?db=3&ssl_ca_certs=/ca.pem&client_name=c")
    there = Address.parse(address.without_password)
    assert "s3cret" not in there.redis
    assert there.redis == address.redis.replace("me:s3cret@", "me@")


@pytest.mark.parametrize("option", ["password=secret", "virtualhost=3", "username=me"])
def test_an_option_that_a_socket_has_not_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="expected redis\\+socket:///PATH") as caught:
        Address.parse(f"redis+socket:///run/r.sock?{option}")
    assert "secret" not in str(caught.value)


def test_a_socket_with_two_slashes_is_refused() -> None:
    with pytest.raises(ConfigError, match="STOKER_URL"):
        Address.parse("redis+socket://run/redis.sock")


@pytest.mark.parametrize(
    "url", ["", "host:6379", "http://host", "unix:///run/redis.sock", "amqp://host", "redis:/host"]
)
def test_another_scheme_is_refused_with_those_that_are_read(url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis://, rediss://, redis\+socket://"):
        Address.parse(url)


@pytest.mark.parametrize(
    "url", ["redis://host:port/0", "redis://host:99999/0", "redis://host/one", "redis+socket://", "redis://[::1/0"]
)
def test_a_url_that_cannot_be_read_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="STOKER_URL"):
        Address.parse(url)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_clearly(text: str) -> None:
    for url in (text, f"redis://{text}", f"rediss://{text}", f"redis+socket://{text}", f"redis+sentinel://{text}"):
        with suppress(ConfigError):
            address = Address.parse(url)
            assert address.shown
            assert Address.parse(address.url) == address


@pytest.mark.parametrize("asyncio_too", [False, True], ids=["blocking", "asyncio"])
def test_the_sentinel_that_answered_is_asked_first_the_next_time(asyncio_too: bool) -> None:
    """The others are asked for a second each where their machines are off."""
    url = "redis+sentinel://one,two,three/queue"
    made: Any = (connect_async if asyncio_too else connect)(Settings(url=url))
    manager, asked = made.connection_pool.sentinel_manager, list[str]()

    def answering(sentinel: Any) -> Any:
        host = sentinel.connection_pool.connection_kwargs["host"]

        def masters() -> Any:
            asked.append(host)
            if host != "two":
                raise RedisConnectionError(f"{host} is off")
            up = {"is_master": True, "is_sdown": False, "is_odown": False, "num-other-sentinels": 2}
            return {"queue": {"ip": "there", "port": 1, **up}}

        async def awaited() -> Any:
            return masters()

        return awaited if asyncio_too else masters

    for each in manager.sentinels:
        each.sentinel_masters = answering(each)

    def question() -> Any:
        return asyncio.run(manager.discover_master("queue")) if asyncio_too else manager.discover_master("queue")

    assert [question(), question()] == [("there", 1)] * 2
    assert asked == ["one", "two", "two"]
    assert len(manager.sentinels) == 3


@pytest.mark.parametrize("url", ["http://host", "redis://host/one", "redis://host/0?colour=red"])
def test_an_address_is_refused_by_the_name_of_what_gave_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^url: "):
        load_settings(url=url).address  # noqa: B018
    monkeypatch.setenv("STOKER_URL", url)
    with pytest.raises(ConfigError, match=r"^STOKER_URL: "):
        load_settings().address  # noqa: B018
