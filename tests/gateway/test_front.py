"""What a hostile HTTP client, or a page in a browser, gets from the gateway."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from starlette.requests import Request

from stoker.broker.outcome import JobStatus
from stoker.errors import ConfigError
from stoker.gateway import bodies, events, protocol
from stoker.gateway.app import Gateway
from stoker.gateway.command import is_loopback, listening
from stoker.gateway.errors import Refused
from stoker.gateway.front import Exchange, Front, Meter
from stoker.monitor.numbers import Numbers
from stoker.testing import AsyncFakeClient
from tests.conftest import wait_until
from tests.gateway.conftest import CHAT
from tests.gateway.machinery import Served

BODY = {"model": CHAT, "messages": [{"role": "user", "content": "Hello"}]}
PATH = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:1", 200), ("localhost", 200), ("[::1]:80", 200), ("LOCALHOST.", 200), ("10.0.0.7", 200),
     ("gate.example", 200), ("evil.example", 421), ("", 421), ("localhost.evil.example", 421), ("[::1", 421)],
)  # fmt: skip
def test_a_name_that_a_foreign_page_may_have_is_refused(
    served: Served, fake: AsyncFakeClient, http: httpx2.Client, host: str, status: int
) -> None:
    served.over(Gateway(fake, frozenset(["gate.example"])))
    assert http.get("/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize("path", [PATH, "/v1/files", "/metrics"])
def test_a_path_with_a_slash_behind_it_is_none_and_sends_no_client_elsewhere_with_its_key(
    http: httpx2.Client, path: str
) -> None:
    answer = http.post(f"{path}/", json=BODY)
    assert (answer.status_code, "location" in answer.headers) == (404, False)
    assert f"POST '{path}/'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_a_foreign_page_can_send_nothing_without_asking_and_gets_no_leave(
    http: httpx2.Client, fake: AsyncFakeClient, kind: str
) -> None:
    answer = http.post(PATH, content=json.dumps(BODY), headers={"content-type": kind, "origin": "http://evil.example"})
    assert answer.status_code == 415
    asked = http.options(PATH, headers={"origin": "http://evil.example", "access-control-request-method": "POST"})
    assert asked.status_code == 405
    assert not [name for name in (*answer.headers, *asked.headers) if name.startswith("access-control")]
    assert not fake.sent.jobs


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/files"), ("DELETE", "/v1/files/file-1"), ("POST", "/v1/batches/batch_1/cancel"),
     ("POST", "/v1/fine_tuning/jobs/job/cancel")],
)  # fmt: skip
def test_a_page_changes_nothing_where_no_body_of_json_is_asked_for(http: httpx2.Client, method: str, path: str) -> None:
    """What it may send without being asked for leave."""
    refused = http.request(method, path, headers={"origin": "http://localhost:3000"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"1e999", b'{"model": NaN}', b"\xff\xfe", b'"' + b"a" * 100, b"[" * 100_000,
     b'{"model": "\\ud800", "messages": []}', b'{"model": "\\uDFFF", "messages": []}', b'{"a": ' * 50_000],
    ids=range(12),
)  # fmt: skip
def test_a_body_that_is_no_request_is_one_clear_error(http: httpx2.Client, fake: AsyncFakeClient, body: bytes) -> None:
    answer = http.post(PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert len(answer.text) < 2000
    assert not fake.sent.jobs


def test_a_body_that_is_compressed_is_refused_by_its_coding(http: httpx2.Client, fake: AsyncFakeClient) -> None:
    body = json.dumps({"model": "m", "messages": []}).encode()
    answer = http.post(
        PATH, content=gzip.compress(body), headers={"content-type": "application/json", "content-encoding": "gzip"}
    )
    assert answer.status_code == 415
    message = "Content-Encoding: 'gzip' given; send the body as it is, not compressed."
    assert answer.json()["error"]["message"] == message
    plain = http.post(PATH, content=body, headers={"content-type": "application/json", "content-encoding": "identity"})
    assert plain.json()["error"]["param"] == "messages"
    assert not fake.sent.jobs


def test_a_path_or_a_method_that_there_is_not_has_the_form_of_every_error(http: httpx2.Client) -> None:
    for answer, status in ((http.get("/v1/assistants"), 404), (http.get(PATH), 405), (http.delete("/v1/models"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == "unknown_url"
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (PATH, "POST"),
        ("/v1/models", "GET, HEAD"),
        ("/v1/models/a/b", "GET, HEAD"),
        ("/v1/files", "GET, HEAD, POST"),
        ("/v1/files/x", "DELETE, GET, HEAD"),
    ],
)
def test_a_method_that_a_path_does_not_take_is_refused_with_those_that_it_takes(
    http: httpx2.Client, path: str, allowed: str
) -> None:
    answer = http.put(path, json={})
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    message = f"PUT {path!r}: another method given; this path takes {allowed}."
    assert answer.json()["error"]["message"] == message


def test_an_error_is_as_long_as_it_says_in_any_language(http: httpx2.Client) -> None:
    answer = http.get("/v1/models/größe-日本")
    assert answer.status_code == 404
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert "größe-日本" in answer.json()["error"]["message"]


def chunked(size: int) -> Iterator[bytes]:
    for _ in range(size // 65536):
        yield b" " * 65536


def test_a_body_that_is_too_large_is_refused_before_it_is_read_or_where_it_becomes_so(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "MOST_BYTES", 2**18)
    kind = {"content-type": "application/json"}
    said = http.post(PATH, content=b" " * (2**18 + 1), headers=kind)
    assert (said.status_code, said.json()["error"]["code"]) == (413, "request_too_large")
    assert http.post(PATH, content=chunked(2**19), headers=kind).status_code == 413
    # As large as it may be it is read, and is no JSON.
    for whole in (b" " * 2**18, chunked(2**18)):
        assert http.post(PATH, content=whole, headers=kind).status_code == 400


def test_a_body_that_is_said_to_be_too_large_is_not_waited_for(served: Served) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    assert raw(served, f"{head}content-length: {bodies.MOST_BYTES + 1}\r\n\r\n".encode()).startswith(b"HTTP/1.1 413")


def raw(served: Served, sent: bytes) -> bytes:
    """All that comes back until the gateway closes the connection."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(sent)
        parts = list(iter(lambda: connection.recv(65536), b""))
    return b"".join(parts)


def test_a_client_that_sends_its_headers_or_its_body_slowly_holds_no_connection(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEADERS_WITHIN", 0.05)
    monkeypatch.setattr(bodies, "READ_WITHIN", 0.05)
    assert raw(served, b"") == raw(served, b"GET /v1/models HTTP/1.1\r\nhost: local") == b""
    # Of a further request of the same connection, too.
    part = b"GET /v1/models HTTP/1.1\r\nhost: local"
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(part + b"host\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(part)
        wait_until(lambda: not connection.recv(65536), "the connection is closed")
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    answer = raw(served, f"{head}connection: close\r\ncontent-length: 100\r\n\r\n{{".encode())
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_connection_sends_at_once_what_it_is_given(served: Served) -> None:
    """Nothing waits for the client to acknowledge what came before."""
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        own = connection.getsockname()
        wait_until(lambda: own in [held.getpeername() for held in served.sockets], "the connection is there")
        options = {held.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for held in served.sockets}
    assert 0 not in options


def test_headers_without_end_and_what_is_no_http_are_refused(served: Served) -> None:
    assert raw(served, b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 40_000).startswith(b"HTTP/1.1 400")
    assert raw(served, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_client_that_reads_nothing_counts_as_gone(
    served: Served, fake: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "SLOW", 0.05)
    monkeypatch.setattr(protocol, "FLUSHED_WITHIN", 0.05)
    held = served.connections
    fake.script.generate(["word" * 5000] * 2000, hangs=True)
    body = json.dumps({**BODY, "stream": True, "max_tokens": 2000}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: _status(fake) is JobStatus.CANCELLED, "the job is cancelled")
        wait_until(lambda: served.connections <= held, "the connection is given up")


HEALTH = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize("sent", ["an answer and a request", "requests"])
def test_a_client_that_reads_nothing_and_asks_on_loses_its_connection(
    served: Served, fake: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch, sent: str
) -> None:
    monkeypatch.setattr(protocol, "TAKEN_WITHIN", 0.05)
    monkeypatch.setattr(protocol, "FLUSHED_WITHIN", 0.05)
    fake.script.generate(["word" * 500_000])
    body = json.dumps({**BODY, "max_tokens": 1}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    asked = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body + HEALTH
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        _little_room(served, connection)
        connection.sendall(asked if sent == "an answer and a request" else HEALTH * 2000)
        wait_until(lambda: not _held(served, connection), "the connection is given up")
        wait_until(lambda: not served.tasks, "nobody waits for it")


def _held(served: Served, connection: socket.socket) -> list[socket.socket]:
    """The gateway's end of it."""
    own = connection.getsockname()
    return [held for held in served.sockets if held.fileno() >= 0 and held.getpeername() == own]


def _little_room(served: Served, connection: socket.socket) -> None:
    """The system takes little of what the client does not read."""
    (held,) = wait_until(lambda: _held(served, connection), "the connection is there")
    held.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def _status(fake: AsyncFakeClient) -> Any:
    return fake._memory.job(fake.sent.jobs[0].job_id).status if fake.sent.jobs else None  # noqa: SLF001


def test_a_refusal_that_comes_after_an_answer_has_begun_sends_nothing_more() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> int:
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
        exchange = Exchange(scope, send, Meter(Numbers(), "chat"))
        await exchange.send({"type": "http.response.start", "status": 200, "headers": []})
        await exchange.refuse(Refused(500, "a defect.", code="gateway_error"))
        return exchange.status

    assert asyncio.run(run()) == 200
    assert [message["type"] for message in sent] == ["http.response.start"]


def test_a_client_that_goes_while_it_sends_is_gone_and_not_slow() -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(Refused) as refused:
        asyncio.run(bodies.read_body(Request(scope, receive)))
    assert (refused.value.status, refused.value.code) == (499, "client_gone")


def test_a_gateway_that_ends_says_where_the_job_goes_on_and_ends() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def waits(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def run() -> bool:
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": [(b"host", b"localhost")]}
        serving = asyncio.ensure_future(Front(waits, frozenset(), Numbers(), [PATH])(scope, waits, send))
        await asyncio.sleep(0)
        serving.cancel()
        await asyncio.wait({serving})
        return serving.cancelled()

    assert asyncio.run(run()), "who has cancelled it hears that it was"
    headers = dict(sent[0]["headers"])
    assert (sent[0]["status"], headers[b"retry-after"], headers[b"x-should-retry"]) == (503, b"1", b"true")
    assert json.loads(sent[1]["body"])["error"]["code"] == "gateway_ends"
    assert headers[b"x-request-id"].decode() in sent[1]["body"].decode()


def test_a_client_that_has_gone_is_answered_nothing_and_counted_as_such(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "stoker.gateway.front")
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
        exchange = Exchange(scope, send, Meter(Numbers(), "chat"))
        await exchange.refuse(Refused(499, "the client has gone."))
        exchange.end()

    asyncio.run(run())
    assert sent == []
    assert f"POST {PATH} 499 in" in caplog.text


def test_what_counts_as_loopback() -> None:
    assert [is_loopback(name) for name in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [True] * 4
    assert [is_loopback(name) for name in ("0.0.0.0", "::", "10.0.0.1", "example.org", "")] == [False] * 5


def test_an_address_that_cannot_be_listened_on_is_one_clear_error(served: Served) -> None:
    with pytest.raises(ConfigError, match=f"--port {served.port}: cannot be listened on"):
        listening("127.0.0.1", served.port)
