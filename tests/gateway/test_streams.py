"""Clients that leave, come back, and ask twice; and errors, before and behind the first token."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from stoker import errors
from stoker.broker.outcome import JobStatus
from stoker.client.in_memory import memory
from stoker.client.in_memory.answers import generated
from stoker.contract import Usage
from stoker.errors import StokerError
from stoker.gateway import command, events
from stoker.gateway.access import AnyCaller
from stoker.gateway.app import Gateway
from stoker.gateway.calls import Caller
from stoker.gateway.errors import TABLE, Names
from stoker.testing import AsyncFakeClient
from tests.conftest import wait_until
from tests.gateway.conftest import CHAT, EMBED
from tests.gateway.machinery import Served

HELLO: Any = [{"role": "user", "content": "Hello"}]
BODY = {"model": CHAT, "messages": HELLO}
TEXT = "It was a dark night."


def status(fake: AsyncFakeClient, number: int = 0) -> JobStatus:
    return fake._memory.job(fake.sent.jobs[number].job_id).status  # noqa: SLF001  asked from another thread


def lines(response: httpx2.Response, most: int) -> list[str]:
    """The first data of a stream."""
    found: list[str] = []
    for line in response.iter_lines():
        found += [line] if line else []
        if sum(line.startswith("data: ") for line in found) == most:
            break
    return found


def text_of(found: list[str]) -> str:
    chunks = [json.loads(line[6:]) for line in found if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


@pytest.mark.parametrize(
    ("fields", "headers", "ends"),
    [
        ({}, {}, JobStatus.CANCELLED),
        ({"store": True}, {"x-stoker-on-disconnect": "cancel"}, JobStatus.CANCELLED),
        ({"store": True}, {}, JobStatus.RUNNING),
        ({}, {"x-stoker-on-disconnect": "continue"}, JobStatus.RUNNING),
    ],
)
def test_a_client_that_leaves_a_stream_cancels_its_job_unless_it_says_otherwise(
    http: httpx2.Client, fake: AsyncFakeClient, caplog: pytest.LogCaptureFixture, fields: dict[str, Any],
    headers: dict[str, str], ends: JobStatus,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "stoker.gateway.front")
    fake.script.generate(TEXT, hangs=True)
    with http.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True, **fields}, headers=headers) as got:
        assert text_of(lines(got, 4)) == "It was a"
    # The line of the log is written when all is done that the leaving asks for.
    wait_until(lambda: any("request" in record.getMessage() for record in caplog.records), "the request has ended")
    assert status(fake) is ends


@pytest.mark.parametrize("fields", [{}, {"logprobs": True}])
@pytest.mark.parametrize(("said", "ends"), [("cancel", JobStatus.CANCELLED), ("continue", JobStatus.RUNNING)])
def test_a_client_that_leaves_while_it_waits_for_the_whole_cancels_its_job_unless_it_says_otherwise(
    served: Served, fake: AsyncFakeClient, caplog: pytest.LogCaptureFixture, said: str, ends: JobStatus,
    fields: dict[str, Any],
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "stoker.gateway.front")
    fake.script.generate(TEXT, hangs=True)
    body = json.dumps(BODY | fields).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"x-stoker-on-disconnect: {said}\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: fake.sent.jobs and status(fake) is JobStatus.RUNNING, "the job runs")
    wait_until(lambda: any("request" in record.getMessage() for record in caplog.records), "the request has ended")
    assert status(fake) is ends


class Counting(AnyCaller):
    """Lets every client in, and keeps what each answer took."""

    def __init__(self) -> None:
        self.spent: list[int] = []

    async def spend(self, caller: Caller, tokens: int) -> None:
        self.spent.append(tokens)


def test_an_answer_takes_its_prompt_and_its_tokens_and_the_rest_of_a_stream_nothing(
    http: httpx2.Client, served: Served, fake: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = {"usage": Usage(prompt_tokens=7, completion_tokens=5)}
    monkeypatch.setattr(memory, "generated", lambda *given: generated(*given).model_copy(update=usage))
    access = Counting()
    served.over(Gateway(fake, access=access))
    fake.script.generate(TEXT, times=2)
    assert http.post("/v1/chat/completions", json=BODY).status_code == 200
    stream = {**BODY, "stream": True}
    whole = http.post("/v1/chat/completions", json=stream, headers={"idempotency-key": "order-7"})
    rest = http.post("/v1/chat/completions", json=stream, headers={"last-event-id": "order-7:1"})
    assert access.spent == [12, 12], "who goes on with a stream has what another request has counted"
    ids = [[line for line in answer.text.splitlines() if line.startswith("id: ")] for answer in (whole, rest)]
    numbers = ["0.0", "0", "1", "2", "3", "4.0", "4"]
    assert ids[0] == [f"id: order-7:{number}" for number in numbers], "the last event of a token says that it is whole"
    assert ids[1] == ids[0][3:]


def test_a_client_that_leaves_a_stream_has_taken_the_tokens_that_came(
    http: httpx2.Client, served: Served, fake: AsyncFakeClient
) -> None:
    access = Counting()
    served.over(Gateway(fake, access=access))
    fake.script.generate(TEXT, hangs=True)
    with http.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as got:
        assert text_of(lines(got, 4)) == "It was a"
    wait_until(lambda: access.spent, "it is counted")
    assert access.spent == [5], "all that the worker had made; no prompt, which only a result counts"


@pytest.mark.parametrize(
    ("path", "body"), [("chat/completions", BODY), ("completions", {"model": CHAT, "prompt": "Hello"})]
)
def test_a_stream_ends_with_its_last_word(
    http: httpx2.Client, fake: AsyncFakeClient, path: str, body: dict[str, Any]
) -> None:
    fake.script.generate(TEXT)
    answer = http.post(f"/v1/{path}", json={**body, "stream": True})
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("name", [f"{CHAT}:", ":house-style", ":"])
def test_a_model_of_half_a_name_is_not_there(http: httpx2.Client, fake: AsyncFakeClient, name: str) -> None:
    answer = http.post("/v1/chat/completions", json={**BODY, "model": name})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
    assert not fake.sent.jobs


def test_a_gateway_that_is_asked_to_end_cancels_no_job(fake: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GRACE", 0)
    ending = Served(Gateway(fake))
    fake.script.generate(TEXT, hangs=True, times=2)
    answers: list[httpx2.Response] = []

    def ask() -> None:
        answers.append(httpx2.post(f"{ending.url}/v1/chat/completions", json=BODY, timeout=20))

    waiting = threading.Thread(target=ask, daemon=True)
    with httpx2.stream("POST", f"{ending.url}/v1/chat/completions", json={**BODY, "stream": True}, timeout=20) as got:
        # An iterator that is let go of closes the connection.
        heard = got.iter_lines()
        assert next(heard).startswith("id: ")
        waiting.start()
        wait_until(lambda: len(fake.sent.jobs) == 2 and status(fake, 1) is JobStatus.RUNNING, "both run")
        ending.stop()
        with pytest.raises(httpx2.HTTPError):
            list(heard)
    waiting.join(20)
    assert [status(fake, number) for number in (0, 1)] == [JobStatus.RUNNING] * 2
    assert [answer.status_code for answer in answers] == [503]
    assert f"Idempotency-Key: {fake.sent.jobs[1].job_id}" in answers[0].json()["error"]["message"]


def test_a_broken_stream_goes_on_at_the_next_token_on_another_gateway(
    http: httpx2.Client, served: Served, fake: AsyncFakeClient
) -> None:
    fake.script.generate(TEXT)
    keep = {"x-stoker-on-disconnect": "continue"}
    asked = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/chat/completions", json=asked, headers=keep) as got:
        before = lines(got, 3)
    last = [line for line in before if line.startswith("id: ")][-1].removeprefix("id: ")
    served.over(Gateway(fake))
    with http.stream("POST", "/v1/chat/completions", json=asked, headers={"last-event-id": last}) as got:
        after = [line for line in got.iter_lines() if line]
        assert got.headers["x-request-id"] == fake.sent.jobs[0].job_id
    assert text_of(before) + text_of(after) == TEXT
    assert '"role"' not in "".join(after)
    assert json.loads(after[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 5
    assert after[-1] == "data: [DONE]"
    assert len(fake.sent.jobs) == 1, "what is resumed is not sent again"


@pytest.mark.parametrize("said", [["It was", " a dark"], ["<think>", "I see", " it.</think>Hello", " world"]])
def test_no_event_of_a_token_comes_again_wherever_the_stream_breaks(
    http: httpx2.Client, fake: AsyncFakeClient, said: list[str]
) -> None:
    fake.script.generate(said)
    asked = {**BODY, "stream": True}
    answer = http.post("/v1/chat/completions", json=asked, headers={"idempotency-key": "order-7"})
    whole = answer.text.split("\n\n")
    named = [index for index, event in enumerate(whole) if event.startswith("id: ")]
    assert len(named) > len(said), "a token has several events"
    for index in named:
        last = whole[index].splitlines()[0].removeprefix("id: ")
        rest = http.post("/v1/chat/completions", json=asked, headers={"last-event-id": last}).text.split("\n\n")
        assert [_timeless(event) for event in rest] == [_timeless(event) for event in whole[index + 1 :]]


def _timeless(event: str) -> str:
    """Without the time at which the gateway was asked."""
    return re.sub(r'"created":\d+', "", event)


@pytest.mark.parametrize(
    ("headers", "status", "word"),
    [
        ({"last-event-id": "unknown-job:3"}, 404, "knows nothing"),
        ({"last-event-id": "x"}, 400, "Last-Event-ID"),
        ({"last-event-id": "job:-1"}, 400, "Last-Event-ID"),
        ({"last-event-id": "job:1", "idempotency-key": "other"}, 400, "Idempotency-Key"),
        ({"idempotency-key": "a b"}, 400, "Idempotency-Key"),
        ({"x-stoker-on-disconnect": "maybe"}, 400, "x-stoker-on-disconnect"),
    ],
)
def test_a_wrong_header_is_refused_and_sends_no_job(
    http: httpx2.Client, fake: AsyncFakeClient, headers: dict[str, str], status: int, word: str
) -> None:
    answer = http.post("/v1/chat/completions", json={**BODY, "stream": True}, headers=headers)
    assert (answer.status_code, word in answer.json()["error"]["message"]) == (status, True)
    assert not fake.sent.jobs


def test_an_idempotency_key_is_the_jobs_id_and_asked_twice_it_is_one_job(
    http: httpx2.Client, fake: AsyncFakeClient
) -> None:
    fake.script.generate(TEXT)
    answers = [http.post("/v1/chat/completions", json=BODY, headers={"idempotency-key": "order-7"}) for _ in range(2)]
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == [TEXT, TEXT]
    assert [answer.headers["x-request-id"] for answer in answers] == ["order-7", "order-7"]
    assert [job.job_id for job in fake.sent.jobs] == ["order-7"]
    vectors = [
        http.post("/v1/embeddings", json={"model": EMBED, "input": "a"}, headers={"idempotency-key": "e"})
        for _ in range(2)
    ]
    assert [answer.status_code for answer in vectors] == [200, 200], "vectors under a name stay for a while"


@pytest.mark.parametrize("header", ["idempotency-key", "last-event-id"])
def test_an_id_that_another_client_took_shows_nothing_of_its_job(
    http: httpx2.Client, fake: AsyncFakeClient, header: str
) -> None:
    fake.script.generate("a secret")
    first = http.post("/v1/chat/completions", json={**BODY, "user": "one"}, headers={"idempotency-key": "order-7"})
    assert first.status_code == 200
    value = "order-7" if header == "idempotency-key" else "order-7:0"
    answer = http.post("/v1/chat/completions", json={**BODY, "user": "two"}, headers={header: value})
    assert answer.status_code == 409
    assert "secret" not in answer.text
    assert answer.headers["x-should-retry"] == "false"


def test_what_a_worker_refuses_has_its_status_also_where_a_stream_was_asked_for(
    api: openai.OpenAI, fake: AsyncFakeClient
) -> None:
    for stream in (False, True):
        fake.script.generate("", error=errors.TextTooLong("messages: 9000 tokens given; at most 2048."))
        with pytest.raises(openai.BadRequestError, match="9000 tokens") as caught:
            api.chat.completions.create(model=CHAT, messages=HELLO, stream=stream)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
        fake.script.generate("", error=errors.InvalidRequest("json_schema: it cannot be compiled."))
        with pytest.raises(openai.UnprocessableEntityError, match="cannot be compiled") as unprocessable:
            api.chat.completions.create(model=CHAT, messages=HELLO, stream=stream)
        assert unprocessable.value.param == "response_format"


def test_an_error_behind_the_first_token_is_an_event_of_the_stream(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate("a b", error=errors.JobFailed("the worker failed."))
    texts: list[str | None] = []
    stream = api.chat.completions.create(model=CHAT, messages=HELLO, stream=True)
    with stream, pytest.raises(openai.APIError, match="the worker failed") as caught:
        texts += (chunk.choices[0].delta.content for chunk in stream)
    assert "".join(text or "" for text in texts) == "a b"
    assert caught.value.code == "job_failed"


def test_a_silent_stream_is_kept_alive_and_its_first_event_still_comes(
    http: httpx2.Client, fake: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE", 0.01)
    fake.script.generate("", hangs=True)
    with http.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        heard = got.iter_lines()
        assert next(heard) == ": keep-alive"
        # An error now is an event: the status has been sent.
        fake._memory.cancel(fake.sent.jobs[0].job_id)  # noqa: SLF001  asked from another thread
        rest = [line for line in heard if line.startswith("data: ")]
    assert json.loads(rest[-1][6:])["error"]["code"] == "job_cancelled"


def test_a_silent_stream_says_something_before_what_lies_between_gives_it_up() -> None:
    """Proxies and load balancers end a connection that was silent for half a minute or a minute."""
    assert 1 <= events.KEEP_ALIVE <= 20


def test_a_full_queue_says_when_to_ask_again(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.refuse(errors.QueueFull("jobs: 100 wait there.", depth=100, limit=100, wait=6.2))
    with pytest.raises(openai.RateLimitError) as caught:
        api.chat.completions.create(model=CHAT, messages=HELLO)
    assert caught.value.response.headers["retry-after"] == "7"
    fake.script.refuse(errors.BrokerUnavailable("no answer."))
    with pytest.raises(openai.InternalServerError) as away:
        api.chat.completions.create(model=CHAT, messages=HELLO)
    assert (away.value.status_code, away.value.response.headers["x-should-retry"]) == (503, "true")


def tree(root: type[StokerError]) -> Iterator[type[StokerError]]:
    """Of the classes that clients have: a worker's own do not leave its process."""
    yield root
    for child in root.__subclasses__():
        if child.__module__.startswith("stoker."):
            yield from tree(child)


#: Those that mean to clients what the class means that they derive from.
AS_PARENT = {"ConfigError", "ModelError", "BrokerLoading", "JobError", "NotScripted"}


def test_every_error_has_a_row_and_what_would_run_a_job_again_is_not_asked_again() -> None:
    assert {kind.__name__ for kind in tree(StokerError)} - AS_PARENT == {kind.__name__ for kind in TABLE}
    for kind in TABLE:
        refused = Names().refusal(kind("words."))
        assert 400 <= refused.status < 600
        if issubclass(kind, errors.JobError) and refused.again is None:
            assert refused.headers.get("x-should-retry", "false") == "false"
            assert refused.status != 409
