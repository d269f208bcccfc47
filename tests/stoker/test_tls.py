"""A broker behind TLS: an authority of one's own, certificates of clients, and what is refused."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from celery import Celery
from redis.exceptions import ConnectionError as RedisConnectionError

from stoker import AsyncClient, Client
from stoker.broker.connection import Patience
from stoker.celery_config import shared_config
from stoker.errors import BrokerUnavailable, ConfigError
from stoker.settings import Settings
from tests.integration.machinery import Proxy
from tests.tls import authority, signed
from workers.celery import transport


class Certificates:
    def __init__(self, folder: Path) -> None:
        self.ours, self.others = authority(folder, "ours"), authority(folder, "others")
        self.broker = signed(self.ours, "broker", "IP:127.0.0.1")
        self.elsewhere = signed(self.ours, "elsewhere", "DNS:broker.example")
        self.client, self.stranger = signed(self.ours, "client", "DNS:c"), signed(self.others, "stranger", "DNS:s")
        self.trust = f"ssl_ca_certs={self.ours.certificate}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


Front = Callable[[ssl.SSLContext, str], Settings]


@pytest.fixture
def behind(broker: Settings) -> Iterator[Front]:
    """Settings of a client of a broker behind TLS, with these options in its URL."""
    plain, proxies = urlsplit(broker.address.redis), []

    def start(context: ssl.SSLContext, options: str) -> Settings:
        assert plain.port is not None
        proxies.append(Proxy(plain.port, tls=context))
        login = f"{plain.netloc.rpartition('@')[0]}@" if "@" in plain.netloc else ""
        return Settings(url=f"rediss://{login}127.0.0.1:{proxies[-1].port}/0?{options}", patience=20)

    yield start
    for proxy in proxies:
        proxy.close()


def ping(settings: Settings) -> None:
    with Client(settings=settings) as client:
        client.workers()


async def ping_async(settings: Settings) -> None:
    async with AsyncClient(settings=settings) as client:
        await client.workers()


def ping_celery(settings: Settings) -> None:
    transport.install()
    with Celery("stoker", backend=settings.address.celery) as app:
        app.conf.update(shared_config(settings))
        with app.connection() as connection, closing(connection.default_channel) as channel:
            assert channel.client.ping()
        assert app.backend.client.ping()
        app.backend.client.connection_pool.disconnect()


def test_an_authority_of_ones_own_and_certificates_of_clients_are_used_by_every_reader(
    behind: Front, made: Certificates
) -> None:
    settings = behind(made.broker.server(made.ours), f"{made.trust}&{made.client.options}")
    ping(settings)
    asyncio.run(ping_async(settings))
    ping_celery(settings)


def test_a_name_that_is_not_verified_is_the_callers_wish(behind: Front, made: Certificates) -> None:
    ping(behind(made.elsewhere.server(), f"{made.trust}&ssl_check_hostname=false"))
    ping(behind(made.elsewhere.server(), "ssl_cert_reqs=none&ssl_check_hostname=false"))


NOT_TRUSTED = r"a certificate that is not trusted \(.*issuer.*\)\. Name the authority .*\?ssl_ca_certs=FILE"
ANOTHER_NAME = r"a certificate for another name \(.*mismatch.*\)\. Write the broker's name"
NO_CLIENT = r"ends the TLS handshake \(.*\)\. .*\?ssl_certfile=FILE&ssl_keyfile=FILE"


@pytest.mark.parametrize("wrong", ["no authority", "another authority", "another name"])
def test_a_certificate_that_is_refused_is_one_clear_error_at_once(
    behind: Front, made: Certificates, wrong: str
) -> None:
    server, options, said = {
        "no authority": (made.broker, "", NOT_TRUSTED),
        "another authority": (made.broker, f"ssl_ca_certs={made.others.certificate}", NOT_TRUSTED),
        "another name": (made.elsewhere, made.trust, ANOTHER_NAME),
    }[wrong]
    settings = behind(server.server(), options)
    with pytest.raises(BrokerUnavailable, match=f"the broker at rediss://.* shows {said}"):
        ping(settings)
    with pytest.raises(BrokerUnavailable, match=f"the broker at rediss://.* shows {said}"):
        asyncio.run(ping_async(settings))


@pytest.mark.parametrize("whose", ["none", "a stranger's"])
def test_a_client_whose_certificate_is_missing_or_refused_learns_so(
    behind: Front, made: Certificates, whose: str
) -> None:
    own = f"&{made.stranger.options}" if whose != "none" else ""
    settings = behind(made.broker.server(made.ours), made.trust + own)
    with pytest.raises(BrokerUnavailable, match=f"the broker at rediss://.* {NO_CLIENT}"):
        ping(settings.model_copy(update={"patience": 0}))


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_a_file_that_cannot_be_read_is_named(made: Certificates, tmp_path: Path, option: str) -> None:
    settings = Settings(url=f"rediss://:s3cret@127.0.0.1:1/0?{option}={tmp_path}/none.crt")
    for asked in (ping, lambda s: asyncio.run(ping_async(s))):
        with pytest.raises(ConfigError, match=rf"{option}={tmp_path}/none\.crt cannot be read") as error:
            asked(settings)
        assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    "option",
    ["ssl_ca_cert=/x", "nonsense=s3cret", "ssl_cert_reqs=sometimes", "ssl_check_hostname=maybe"],
)
def test_an_option_that_there_is_not_is_refused_with_those_that_there_are(option: str) -> None:
    with pytest.raises(ConfigError, match=r"ssl_ca_certs.*ssl_cert_reqs \(none, optional, required\)") as error:
        ping(Settings(url=f"rediss://host/0?{option}"))
    assert "s3cret" not in str(error.value)


def test_who_waits_for_a_broker_does_not_wait_for_a_better_certificate() -> None:
    error = RedisConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: expired (_ssl.c:1006)")
    with pytest.raises(BrokerUnavailable, match=r"not trusted \(expired\)"):
        Patience(Settings(url="rediss://host", patience=20)).spend(error)
