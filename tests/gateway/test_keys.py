"""Keys of the gateway: who gets in, how often, with which models, and whose jobs they are."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
from typer.testing import CliRunner

from stoker import AsyncClient, Client
from stoker.broker import api_keys, keys, policy
from stoker.broker.api_keys import ApiKey
from stoker.broker.connection import connect
from stoker.cli import app
from stoker.contract import ModelCard
from stoker.errors import BrokerUnavailable, ConfigError, InvalidRequest, StokerError
from stoker.gateway.access import Keyed
from stoker.gateway.app import Gateway
from stoker.gateway.command import serve
from stoker.local.broker import free_port
from stoker.settings import Settings
from tests.closing import noting_closes
from tests.conftest import wait_until
from tests.gateway.machinery import Served, gateway_over

CARD = ModelCard(model="m", architecture="x", kinds=("generate",), context=64, parameters=1, seen=0.0)
HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def redis(broker: Settings) -> Iterator[Any]:
    found = connect(broker)
    found.hset(keys.MODELS, "m/1", CARD.model_copy(update={"seen": time.time()}).model_dump_json())
    found.expire(keys.MODELS, 60)
    yield found
    found.close()


@pytest.fixture
def served(broker: Settings, redis: Any) -> Iterator[Served]:
    made = Served(gateway_over(broker))
    yield made
    made.stop()


def made(redis: Any, **fields: Any) -> str:
    return api_keys.create(redis, ApiKey(**{"client": "team", "created": 1.0, **fields}))


def get(served: Served, secret: str | None = None, **headers: str) -> httpx2.Response:
    sent = headers if secret is None else {"authorization": f"Bearer {secret}", **headers}
    return httpx2.get(f"{served.url}/v1/models", headers={name.replace("_", "-"): text for name, text in sent.items()})


def test_once_there_is_a_key_nobody_gets_in_without_one_and_a_revoked_one_counts_no_more(
    served: Served, redis: Any
) -> None:
    assert get(served).status_code == 200
    assert get(served, "what a client sends").status_code == 200
    assert get(served, "sk-stoker-unknown").status_code == 401, "a wrong key is never taken for none"
    secret = made(redis)
    assert get(served, secret).status_code == 200
    assert get(served, x_api_key=secret).status_code == 200
    for other in (None, "none", secret + "x", secret[:-1], secret.upper()):
        refused = get(served, other)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    other = made(redis, created=2.0)
    api_keys.revoke(redis, next(iter(api_keys.listed(redis))))
    assert get(served, secret).status_code == 401
    assert get(served, other).status_code == 200


def test_the_broker_holds_no_key_and_keys_are_the_only_new_thing_that_lasts(redis: Any) -> None:
    secret = made(redis)
    stored = repr(redis.hgetall(keys.API_KEYS))
    assert secret not in stored
    assert secret.removeprefix(api_keys.BEGINNING) not in stored
    assert keys.is_durable(keys.API_KEYS)


def test_keys_are_listed_in_the_order_in_which_they_were_made(redis: Any) -> None:
    for created in (3.0, 1.0, 5.0, 2.0, 4.0):
        made(redis, created=created)
    assert [key.created for key in api_keys.listed(redis).values()] == [1, 2, 3, 4, 5]


def test_a_key_may_ask_as_often_as_it_allows_and_hears_when_it_may_again(served: Served, redis: Any) -> None:
    secret = made(redis, requests=2)
    assert [get(served, secret).status_code for _ in range(3)] == [200, 200, 429]
    refused = get(served, secret)
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    (bucket,) = redis.keys("stoker:rate:*")
    assert 0 < redis.ttl(bucket) <= keys.RATE_TTL
    # As if half a minute had passed.
    redis.hset(bucket, "requests:at", time.time() - 30)
    assert [get(served, secret).status_code for _ in range(2)] == [200, 429]


def test_a_key_hears_of_what_it_has_taken_too_much_and_how_much_that_may_be(served: Served, redis: Any) -> None:
    secret = made(redis, requests=2, tokens=60)
    for _ in range(2):
        get(served, secret)
    said = [get(served, secret).json()["error"]["message"]]
    api_keys.spending(secret, 60, 90).on(redis)
    said.append(get(served, secret).json()["error"]["message"])
    assert [text.partition(" a minute")[0] for text in said] == [
        "this key may take 2 requests",
        "this key may take 60 tokens",
    ]


def test_tokens_are_counted_when_they_are_known_and_a_key_waits_until_they_are_made_good(redis: Any) -> None:
    secret = made(redis, tokens=60)
    assert api_keys.admission(secret).on(redis).wait == 0
    api_keys.spending(secret, 60, 90).on(redis)
    admission = api_keys.admission(secret).on(redis)
    assert admission.short_of == "tokens"
    assert 15 <= admission.wait <= 31.1
    (bucket,) = redis.keys("stoker:rate:*")
    redis.hset(bucket, "tokens:at", time.time() - 3600)
    assert api_keys.admission(secret).on(redis).wait == 0
    api_keys.spending(secret, 60, 10**9).on(redis)
    wait = api_keys.admission(secret).on(redis).wait
    assert keys.RATE_TTL - 10 < wait < keys.RATE_TTL + 10, "a bucket holds a minute's worth, and owes an hour's at most"


def test_a_key_uses_its_own_models_and_its_jobs_are_those_of_its_client(
    served: Served, redis: Any, broker: Settings
) -> None:
    secret = made(redis, models=("m",))
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key=secret, max_retries=0) as api,
        Client(settings=broker) as client,
    ):
        with pytest.raises(openai.PermissionDeniedError, match="may use m") as caught:
            api.chat.completions.create(model="other:x", messages=HELLO)
        assert (caught.value.param, caught.value.code) == ("model", "model_not_allowed")
        with asking(served, secret, "/v1/chat/completions", {"model": "m", "messages": HELLO}):
            wait_until(lambda: client.sender("j") is not None, "the job is there")
        assert client.sender("j") == "team"
        # The client has gone, and its job with it.
        wait_until(lambda: client.link.status("j") == "cancelled", "the job is cancelled")


@contextmanager
def asking(served: Served, secret: str, path: str, fields: dict[str, Any]) -> Iterator[None]:
    """A request with the key, whose job is `j`."""
    body = json.dumps(fields).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {secret}\r\nidempotency-key: j\r\nx-stoker-on-disconnect: cancel\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head.encode() + body)
        yield


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"user": "ada@example.com"}),
        ("/v1/messages", {"metadata": {"user_id": f"user_{'0f' * 32}_account__session_6f9619ff"}, "max_tokens": 9}),
    ],
    ids=["openai", "anthropic"],
)
def test_with_a_key_any_user_may_be_named_and_the_job_is_the_keys_all_the_same(
    served: Served, redis: Any, broker: Settings, path: str, fields: dict[str, Any]
) -> None:
    """Clients name their end user by themselves; they know nothing of the names of keys."""
    secret = made(redis)
    with Client(settings=broker) as client:
        with asking(served, secret, path, {"model": "m", "messages": HELLO, **fields}):
            wait_until(lambda: client.sender("j") is not None, "the job is there")
        assert client.sender("j") == "team"


@pytest.mark.parametrize("stored", [b"", b"{", b"[]", b'{"client": 1}', b"\xff", b'{"requests": "x"}'])
def test_what_another_program_wrote_among_the_keys_lets_nobody_in(served: Served, redis: Any, stored: bytes) -> None:
    redis.hset(keys.API_KEYS, api_keys.digest("sk-stoker-x"), stored)
    assert get(served, "sk-stoker-x").status_code == 401
    assert get(served, made(redis)).status_code == 200
    assert list(api_keys.listed(redis)) != []


def test_keys_of_another_type_let_nobody_in(served: Served, redis: Any) -> None:
    redis.set(keys.API_KEYS, "x")
    for secret in (None, "sk-stoker-x"):
        assert get(served, secret).status_code >= 500
    redis.delete(keys.API_KEYS)
    secret = made(redis, requests=5)
    redis.set(keys.rate(api_keys.digest(secret)[: api_keys.ID]), "x", ex=60)
    assert get(served, secret).status_code >= 500


@pytest.mark.parametrize(
    "fields", [{"client": "A b"}, {"requests": 0}, {"tokens": 10**10}, {"models": ("/etc",)}, {"created": float("inf")}]
)
def test_a_key_that_cannot_be_is_refused(redis: Any, fields: dict[str, Any]) -> None:
    with pytest.raises((InvalidRequest, ValueError), match=r"given|finite"):
        made(redis, **fields)
    assert not redis.exists(keys.API_KEYS)


def test_the_command_makes_lists_and_revokes_keys_and_shows_each_once(broker: Settings, redis: Any) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(app, ["keys", *words, "--url", str(broker.url)], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    before = time.gmtime()
    secret = run("create", "team", "--requests", "60", "--model", "m", "--open-jobs", "7").strip()
    assert secret.startswith(api_keys.BEGINNING)
    assert policy.read(redis)["client_limit:team"] == 7
    shown = run("list")
    assert secret not in shown
    assert "team" in shown
    assert any(time.strftime("  %Y-%m-%d  ", day) in shown for day in (before, time.gmtime()))
    assert "60 requests, any tokens a minute; models: m" in shown
    assert run("revoke", shown.split()[0]) == f"{shown.split()[0]}: revoked\n"
    assert run("list", "--json").strip() == "[]"
    with pytest.raises(InvalidRequest, match="none of that name"):
        run("revoke", "000000000000")


def test_a_gateway_for_which_no_broker_was_chosen_does_not_say_where_it_is(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(BrokerUnavailable, match="no broker was chosen"):
        serve(Settings(home=tmp_path), "127.0.0.1", 0, frozenset(), said.append)
    assert not said


def test_another_address_than_loopback_is_served_with_keys_alone(
    broker: Settings, redis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="stoker keys create"):
        serve(broker, "0.0.0.0", 0, frozenset(), print)
    made(redis)
    monkeypatch.setattr("stoker.gateway.command.listening", _stopped)
    with pytest.raises(StokerError, match="it listens"):
        serve(broker, "0.0.0.0", 0, frozenset(), print)


@pytest.mark.parametrize(
    ("address", "required", "shown"),
    [("127.0.0.1", False, "127.0.0.1"), ("::1", False, "[::1]"), ("localhost", False, "localhost"),
     ("0.0.0.0", True, "0.0.0.0"), ("::", True, "[::]"), ("192.0.2.7", True, "192.0.2.7")],
)  # fmt: skip
def test_a_key_is_required_on_each_address_but_those_of_loopback_and_the_url_that_is_said_can_be_asked(
    address: str, required: bool, shown: str, broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    accesses, lines = list[bool](), list[str]()

    def noted(client: AsyncClient, *, required: bool) -> Keyed:
        accesses.append(required)
        return Keyed(client, required=required)

    def unheard(address: str, port: int) -> closing[Any]:
        return closing(SimpleNamespace(getsockname=lambda: (address, 8123), close=lambda: None))

    class Unserved:
        async def serve(self, sockets: list[Any]) -> None: ...

    made(redis)
    monkeypatch.setattr("stoker.gateway.command.Keyed", noted)
    monkeypatch.setattr("stoker.gateway.command.listening", unheard)
    monkeypatch.setattr("stoker.gateway.command.server", lambda application: Unserved())
    serve(broker, address, 8123, frozenset(), lines.append)
    assert accesses == [required]
    assert lines == [f"gateway  http://{shown}:8123/v1", f"broker   {broker.address.shown}"]


def test_the_connection_that_looked_for_keys_is_closed_also_by_a_broker_that_is_away(
    broker: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = noting_closes(monkeypatch, "stoker.gateway.command.connect")
    away = broker.model_copy(update={"url": f"redis://127.0.0.1:{free_port(0)}"})
    for settings, expected in ((broker, ConfigError), (away, BrokerUnavailable)):
        with pytest.raises(expected):
            serve(settings, "0.0.0.0", 0, frozenset(), print)
    assert len(closed) == 2


def _stopped(address: str, port: int) -> None:
    raise StokerError("it listens.")


def test_a_gateway_on_another_address_lets_nobody_in_when_the_last_key_is_revoked(
    broker: Settings, redis: Any, running: Served
) -> None:
    client = AsyncClient(settings=broker)
    running.over(Gateway(client, access=Keyed(client, required=True)))
    assert get(running).status_code == 401
    secret = made(redis)
    assert get(running, secret).status_code == 200
    running.closing(client)
