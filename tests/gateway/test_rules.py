"""The gateway's rules by themselves, without a server: pages of lists, what errors look like, who is asked for, what a
job is called, and what clients may say of batches and files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import QueryParams

from stoker.broker.batches import ENDED, Batch, BatchRecord, Trouble
from stoker.broker.keys import FILE_TTL
from stoker.broker.outcome import JobStatus
from stoker.broker.stored_files import FileRecord
from stoker.contract import Alternative, Completion, GenerateResult, StreamToken, Usage
from stoker.contract.names import Rule, follows
from stoker.errors import InvalidRequest, JobLost, QueueFull, UnknownModel
from stoker.gateway import anthropic, batches, chat, completions, embeddings, files, rerank, responses
from stoker.gateway.answers import answered
from stoker.gateway.anthropic_messages import AnthropicMessage, AnthropicTool, ToolChoice, choice_of
from stoker.gateway.calls import Call, Caller, Models, NamedJob, job_of, keeps, user_name
from stoker.gateway.embeddings import EmbeddingBody
from stoker.gateway.errors import TABLE, Names, Refused, row_of
from stoker.gateway.fields import Body, checked_body, parse
from stoker.gateway.fine_tuning_body import FineTuningBody
from stoker.gateway.logprobs import legacy_logprobs, logprobs_of
from stoker.gateway.messages import ChatMessageBody
from stoker.gateway.paging import Page, listing, page_of
from stoker.gateway.sampling import StreamOptions
from stoker.gateway.tools import Choice, Function, Tool, call_id, chosen
from stoker.gateway.usage import finish_reason, usage_of
from stoker.testing import AsyncFakeClient

SAID = [{"role": "user", "content": "a"}]


def refusal(ask: Callable[[], Any]) -> Refused:
    with pytest.raises(Refused) as refused:
        ask()
    return refused.value


# Pages


def paged(ids: list[str], page: Page) -> Any:
    async def items() -> AsyncIterator[dict[str, object]]:
        for each in ids:
            yield {"id": each}

    return asyncio.run(listing(items(), page))


@given(count=st.integers(0, 7), limit=st.integers(1, 8), after=st.none() | st.integers(0, 6))
def test_a_page_has_what_comes_behind_the_one_that_is_named_and_says_whether_there_is_more(
    count: int, limit: int, after: int | None
) -> None:
    ids = [f"id-{number}" for number in range(count)]
    page = Page(limit, None if after is None else f"id-{after}", True)
    if after is not None and after >= count:
        assert refusal(lambda: paged(ids, page)).param == "after"
        return
    rest = ids if after is None else ids[after + 1 :]
    expected = rest[:limit]
    ends = {"first_id": expected[0], "last_id": expected[-1]} if expected else {"first_id": None, "last_id": None}
    data = [{"id": each} for each in expected]
    assert paged(ids, page) == {"object": "list", "data": data, **ends, "has_more": len(rest) > limit}


@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("", Page(20, None, True)),
        ("limit=1", Page(1, None, True)),
        ("limit=100", Page(100, None, True)),
        ("limit=007", Page(7, None, True)),
        ("after=x&order=asc", Page(20, "x", False)),
        ("order=desc&purpose=batch", Page(20, None, True)),
    ],
)
def test_a_page_is_what_the_query_says(query: str, page: Page) -> None:
    assert page_of(QueryParams(query), 100, ("purpose",), usual=20) == page


def test_without_a_usual_length_a_page_is_as_long_as_it_may_be() -> None:
    assert page_of(QueryParams(""), 55).limit == 55


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ("limit=0", "limit", "invalid_value"),
        ("limit=101", "limit", "invalid_value"),
        ("limit=-1", "limit", "invalid_value"),
        ("limit=", "limit", "invalid_value"),
        ("limit=٣", "limit", "invalid_value"),
        ("limit=000000001", "limit", "invalid_value"),
        ("order=up", "order", "invalid_value"),
        ("before=x", "before", "unknown_parameter"),
        ("purpose=x", "purpose", "unknown_parameter"),
    ],
)
def test_a_query_that_is_wrong_is_refused_by_name(query: str, param: str, code: str) -> None:
    refused = refusal(lambda: page_of(QueryParams(query), 100))
    assert (refused.status, refused.param, refused.code) == (400, param, code)


# Errors


@pytest.mark.parametrize(
    ("status", "again", "headers"),
    [
        (400, None, {}),
        (404, None, {}),
        (410, None, {}),
        (409, None, {"x-should-retry": "false"}),
        (429, None, {"x-should-retry": "false"}),
        (499, None, {}),
        (500, None, {"x-should-retry": "false"}),
        (503, 0.0, {"retry-after": "1", "x-should-retry": "true"}),
        (503, 5, {"retry-after": "5", "x-should-retry": "true"}),
        (429, 1.2, {"retry-after": "2", "x-should-retry": "true"}),
    ],
)
def test_an_error_says_whether_and_when_to_ask_again(status: int, again: float | None, headers: dict[str, str]) -> None:
    assert Refused(status, "no", again=again).headers == headers


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "authentication_error", "authentication_error"),
        (403, "permission_error", "permission_error"),
        (404, "invalid_request_error", "not_found_error"),
        (413, "invalid_request_error", "request_too_large"),
        (429, "rate_limit_error", "rate_limit_error"),
        (499, "invalid_request_error", "invalid_request_error"),
        (500, "server_error", "api_error"),
        (503, "server_error", "overloaded_error"),
        (504, "server_error", "timeout_error"),
    ],
)
def test_an_error_has_each_vendors_own_form(status: int, openai: str, anthropic: str) -> None:
    refused = Refused(status, "x is wrong", param="model", code="c")
    said = {"message": "x is wrong", "type": openai, "param": "model", "code": "c"}
    assert refused.openai() == {"error": said}
    error = {"type": anthropic, "message": "model: x is wrong"}
    assert refused.anthropic("job-1") == {"type": "error", "error": error, "request_id": "job-1"}


def test_the_field_is_said_once() -> None:
    for refused, said in (
        (Refused(400, "model: no", param="model"), "model: no"),
        (Refused(400, "no"), "no"),
        (Refused(400, "no", param="top_p"), "top_p: no"),
    ):
        error: Any = refused.anthropic("x")["error"]
        assert error["message"] == said


def test_each_error_of_stoker_has_its_status_its_code_and_says_whether_it_passes() -> None:
    found = {kind.__name__: (row.status, row.code, row.param, row.again) for kind, row in TABLE.items()}
    assert found == {
        "StokerError": (500, "server_error", None, None), "InvalidRequest": (400, "invalid_value", None, None),
        "TextTooLong": (400, "context_length_exceeded", None, None),
        "DatasetError": (422, "invalid_dataset", None, None),
        "UnknownModel": (404, "model_not_found", "model", None),
        "UnknownAdapter": (404, "model_not_found", "model", None),
        "BrokerUnavailable": (503, "broker_unavailable", None, 5), "JobLost": (404, "job_not_found", None, None),
        "WorkerUnavailable": (503, "worker_unavailable", None, 5), "QueueFull": (429, "queue_full", None, 5),
        "JobCancelled": (410, "job_cancelled", None, None), "JobDead": (500, "job_dead", None, None),
        "JobFailed": (500, "job_failed", None, None), "OutOfMemory": (500, "out_of_memory", None, None),
        "VectorsFull": (503, "vectors_full", None, 5), "DeadlineExceeded": (504, "deadline_exceeded", None, None),
        "JobTimeout": (504, "timeout", None, None),
    }  # fmt: skip


@pytest.mark.parametrize("kind", TABLE)
def test_an_error_that_derives_from_one_of_the_table_is_answered_as_that(kind: Any) -> None:
    derived = type("Derived", (kind,), {})
    assert row_of(derived("no")) == TABLE[kind] == row_of(kind("no"))


def test_a_field_has_the_name_of_its_endpoint_with_all_that_follows_it() -> None:
    names = Names({"texts": "input"})
    for message, param, said in (
        ("texts.3.a: too long", "input.3.a", "input.3.a: too long"),
        ("top_p: 2 given", "top_p", "top_p: 2 given"),
        ("Nothing is named: here", None, "Nothing is named: here"),
        ("no field", None, "no field"),
        ("request: n x max_tokens: too many", None, "n x max_tokens: too many"),
        ("request: texts: too many characters", "input", "input: too many characters"),
    ):
        refused = names.refusal(InvalidRequest(message))
        assert (refused.status, refused.param, refused.message) == (400, param, said)
    assert (names.refusal(InvalidRequest("x"), by_worker=True).status) == 422
    assert names.refusal(InvalidRequest("x"), by_worker=True).code == "unprocessable"
    assert names.refusal(UnknownModel("texts: x"), by_worker=True).status == 404
    assert names.refusal(UnknownModel("texts: x")).param == "model"
    assert names.refusal(QueueFull("full", wait=7.5)).again == 7.5
    assert names.refusal(QueueFull("full")).again == TABLE[QueueFull].again


OF_EMBEDDINGS = f"Allowed: {', '.join(EmbeddingBody.model_fields)}."


@pytest.mark.parametrize(
    ("fields", "param", "code", "said"),
    [
        ({"input": "a"}, "model", "missing_required_parameter", "model: missing; it has to be given."),
        ({"model": None, "input": "a"}, "model", "missing_required_parameter", "model: missing; it has to be given."),
        (
            {"model": "m", "input": [1, 2]}, "input", "invalid_value",
            "input: [1, 2] given; expected a text, or a list of texts. Token ids are not supported.",
        ),
        (
            {"model": "m", "input": "a", "dimensions": "4"}, "dimensions", "invalid_value",
            'dimensions: "4" given; expected a whole number.',
        ),
        (
            {"model": "m", "input": "a", "dimensions": True}, "dimensions", "invalid_value",
            "dimensions: true given; expected a whole number.",
        ),
        (
            {"model": "m", "input": "a", "encoding_format": "hex"}, "encoding_format", "invalid_value",
            'encoding_format: "hex" given; expected "float" or "base64".',
        ),
        (
            {"model": "m", "input": [None]}, "input", "invalid_value",
            "input: [null] given; expected a text, or a list of texts. Token ids are not supported.",
        ),
        (
            {"model": "m", "input": "a", "dimensons": 4}, "dimensons", "unknown_parameter",
            f"dimensons: no such field; did you mean dimensions? {OF_EMBEDDINGS}",
        ),
        (
            {"model": "m", "input": "a", "x": 4}, "x", "unknown_parameter",
            f"x: no such field. {OF_EMBEDDINGS}",
        ),
    ],
)  # fmt: skip
def test_the_first_field_that_is_wrong_is_said_with_what_is_allowed(
    fields: dict[str, Any], param: str, code: str, said: str
) -> None:
    refused = refusal(lambda: checked_body(EmbeddingBody, fields))
    assert (refused.status, refused.param, refused.code, refused.message) == (400, param, code, said)


def test_a_field_of_a_field_is_said_by_its_way_and_one_that_stoker_lacks_with_what_to_do() -> None:
    body = {"model": "m", "messages": SAID, "response_format": {"type": "json_schema", "json_schema": {"strict": True}}}
    assert refusal(lambda: checked_body(chat.ChatBody, body)).param == "response_format.json_schema.name"
    for body_of, name in ((chat.ChatBody, "messages"), (responses.ResponsesBody, "input")):
        message = refusal(lambda: checked_body(body_of, {"model": "m", name: []})).message  # noqa: B023
        assert message == f"{name}: [] given; expected at least 1 item."
    form = {"model": "m", "messages": SAID, "response_format": "json"}
    message = refusal(lambda: checked_body(chat.ChatBody, form)).message
    assert message == 'response_format: "json" given; expected an object.'
    tools = {"model": "m", "max_tokens": 1, "messages": SAID, "tools": [{"type": "bash_20250124", "name": "bash"}]}
    assert refusal(lambda: checked_body(anthropic.MessagesBody, tools)).param == "tools.0.type"
    extra = {"model": "m", "messages": [{"role": "user", "content": "a", "weight": 1}]}
    refused = refusal(lambda: checked_body(chat.ChatBody, extra))
    assert (refused.param, refused.code) == ("messages.0.weight", "unsupported_parameter")
    assert refused.message == "messages.0.weight: not supported; leave it out."
    for name, why in chat.ChatBody.REFUSED.items():
        refused = refusal(lambda: checked_body(chat.ChatBody, {"model": "m", "messages": SAID, name: 1}))  # noqa: B023
        assert (refused.param, refused.code) == (name, "unsupported_parameter")
        assert refused.message == f"{name}: not supported by Stoker; {why}."
        checked_body(chat.ChatBody, {"model": "m", "messages": SAID, name: None})


#: What each body has to have.
LEAST: dict[type[Body], dict[str, Any]] = {
    chat.ChatBody: {"model": "m", "messages": SAID},
    completions.CompletionBody: {"model": "m", "prompt": "a"},
    responses.ResponsesBody: {"model": "m", "input": "a"},
    FineTuningBody: {"model": "m", "training_file": "file-1"},
    StreamOptions: {},
    ChatMessageBody: {"role": "user", "content": "a"},
}
IDLE = [(body, name, value) for body in LEAST for name, value in body.IDLE.items()]


@pytest.mark.parametrize(("body", "name", "value"), IDLE, ids=[f"{body.__name__}-{name}" for body, name, _ in IDLE])
def test_a_field_that_asks_for_what_is_done_anyway_counts_as_not_given(
    body: type[Body], name: str, value: object
) -> None:
    least = LEAST[body]
    assert checked_body(body, {**least, name: value}) == checked_body(body, least)
    for other in (1, True, "x"):
        if (type(other), other) != (type(value), value):
            assert refusal(lambda: checked_body(body, {**least, name: other})).param == name  # noqa: B023


def test_every_field_that_may_ask_for_nothing_is_looked_at() -> None:
    bodies = [*Body.__subclasses__()]
    for body in bodies:
        bodies.extend(body.__subclasses__())
    assert {body for body in bodies if body.IDLE} == {body for body, _, _ in IDLE}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "the body cannot be read as JSON"),
        (b"{", "the body cannot be read as JSON"),
        (b"[" * 100_000, "the body cannot be read as JSON"),
        (b"\xff", "the body cannot be read as JSON"),
        (b'{"model": "\\ud800"}', "the body cannot be read as JSON"),
        (b'{"model": "\\uDFFF"}', "the body cannot be read as JSON"),
        (b'{"model": "\xed\xa0\x80"}', "the body cannot be read as JSON"),
        ('{"model": "\\ud800"}'.encode("utf-16"), "the body cannot be read as JSON"),
        (b"[1]", "the body is [1]; expected a JSON object."),
        (b"null", "the body is null; expected a JSON object."),
    ],
)
def test_a_body_that_is_no_object_of_json_is_one_error(raw: bytes, said: str) -> None:
    assert refusal(lambda: parse(EmbeddingBody, raw)).message.startswith(said)
    for text in ('"\\ud83d\\ude00"', '"\U0001f600"'):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            found = parse(EmbeddingBody, f'{{"model": "m", "input": {text}}}'.encode(encoding))
            assert found.input == ["\U0001f600"]


@pytest.mark.parametrize("given", [[], "5", 5, {"x": 1.0}, {"-1": 1.0}, {"1.5": 1.0}, {"": 1.0}, {"5": 1.0, "x": 1.0}])
def test_a_bias_of_what_is_no_token_is_refused_by_what_is_expected(given: Any) -> None:
    refused = refusal(lambda: checked_body(chat.ChatBody, {"model": "m", "messages": SAID, "logit_bias": given}))
    assert refused.param == "logit_bias"
    assert "expected an object that maps ids of tokens to numbers from -100 to 100" in refused.message


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        *(("a", "a"), (["a"], "a"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), ([], None), ({}, None), (5, None)),
        *((True, None), (["a", "b"], None), ([[1], [2]], None), (["a", 1], None), ([1, "a"], None), ([True], None)),
        *(([1.5], None), ([[]], None)),
    ],
)
def test_a_prompt_to_continue_is_one_text_or_the_ids_of_one(given: Any, prompt: Any) -> None:
    fields = {"model": "m", "prompt": given}
    if prompt is not None:
        assert checked_body(completions.CompletionBody, fields).prompt == prompt
        return
    refused = refusal(lambda: checked_body(completions.CompletionBody, fields))
    assert (refused.param, refused.code) == ("prompt", "invalid_value")
    assert "expected one text, or the ids of its tokens" in refused.message
    assert refused.message.endswith("Send a request for each prompt.") == (isinstance(given, list) and len(given) > 1)


@pytest.mark.parametrize("given", ["x", ["x"], ["x", "y"], []])
def test_a_stop_is_a_text_or_several(given: Any) -> None:
    body = checked_body(chat.ChatBody, {"model": "m", "messages": SAID, "stop": given})
    assert body.stop == ([given] if isinstance(given, str) else given)
    for wrong in (5, [5], ["x", None], {"a": 1}):
        refused = refusal(lambda: checked_body(chat.ChatBody, {"model": "m", "messages": SAID, "stop": wrong}))  # noqa: B023
        assert "expected a text, or a list of texts" in refused.message


# Who asks, and what the job is called


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({}, NamedJob("new")),
        ({"idempotency-key": "mine"}, NamedJob("mine", True)),
        ({"last-event-id": "mine:0"}, NamedJob("mine", True, 0)),
        ({"last-event-id": "mine:12"}, NamedJob("mine", True, 12)),
        ({"last-event-id": "mine:12", "idempotency-key": "mine"}, NamedJob("mine", True, 12)),
        ({"last-event-id": "mine:0.0"}, NamedJob("mine", True, -1, 1)),
        ({"last-event-id": "mine:12.3"}, NamedJob("mine", True, 11, 4)),
        ({"last-event-id": "mine:999999999"}, NamedJob("mine", True, 999_999_999)),
    ],
)
def test_a_job_is_called_as_its_headers_say(headers: dict[str, str], named: NamedJob) -> None:
    assert job_of(headers, "new") == named
    assert named.resumed == ("last-event-id" in headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"idempotency-key": "a b"},
        {"idempotency-key": ""},
        {"last-event-id": "mine"},
        {"last-event-id": "mine:-1"},
        {"last-event-id": "mine:x"},
        {"last-event-id": "mine:٣"},
        {"last-event-id": ":1"},
        {"last-event-id": "mine:1000000000"},
        {"last-event-id": "mine:1."},
        {"last-event-id": "mine:.1"},
        {"last-event-id": "mine:1.1.1"},
        {"last-event-id": "mine:1.-1"},
        {"last-event-id": "mine:1", "idempotency-key": "other"},
    ],
)
def test_headers_that_name_no_job_are_refused(headers: dict[str, str]) -> None:
    refused = refusal(lambda: job_of(headers, "new"))
    assert (refused.status, refused.code) == (400, "invalid_value")


def test_a_header_says_what_becomes_of_the_job_of_a_client_that_leaves() -> None:
    name = "x-stoker-on-disconnect"
    assert [keeps(headers) for headers in ({}, {name: "cancel"}, {name: "continue"})] == [None, False, True]
    assert refusal(lambda: keeps({name: "Continue"})).code == "invalid_value"


def call(caller: Caller, **more: Any) -> Call:
    unused: Any = SimpleNamespace()
    client = AsyncFakeClient(key=caller.key or "gateway")
    return Call(client, caller, unused, b"", NamedJob("job"), None, unused, unused, **more)


def generating(read: Any) -> Any:
    async def answer(asked: Call) -> Any:
        return await answered(asked, await read(asked))

    return answer


def asking(
    client: AsyncFakeClient,
    body: dict[str, Any],
    keep: bool | None,
    named: NamedJob | None = None,
    *,
    stays: bool = False,
) -> Call:
    """A request of a client that leaves at once, unless it `stays`."""

    async def receive() -> Any:
        await (asyncio.Event().wait() if stays else asyncio.sleep(0.01))
        return {"type": "http.disconnect"}

    async def spend(caller: Caller, tokens: int) -> None:
        """Nobody counts."""

    return Call(
        client, Caller(), Models(client), json.dumps(body).encode(), named or NamedJob("job"), keep, receive, spend
    )


@pytest.mark.parametrize(
    ("name", "found"),
    [("base", ("base", None)), ("base:style", ("base", "style")), ("base:style@2", ("base", "style@2"))],
)
def test_a_models_name_has_a_base_and_may_have_an_adapter(name: str, found: tuple[str, str | None]) -> None:
    assert call(Caller()).model(name) == found
    assert call(Caller(models=frozenset({"base"}))).model(name) == found
    refused = refusal(lambda: call(Caller(models=frozenset({"other", "another"}))).model(name))
    assert (refused.status, refused.param, refused.code) == (403, "model", "model_not_allowed")
    assert "this key may use another, other" in refused.message
    for wrong in ("base:", "", ":style"):
        refused = refusal(lambda: call(Caller()).model(wrong))  # noqa: B023
        assert (refused.status, refused.param) == (404, "model")
        assert refused.message == f'model: "{wrong}" given; expected BASE, BASE:ADAPTER or BASE:ADAPTER@VERSION.'


def test_a_job_is_sent_under_the_api_keys_name_or_where_there_are_none_under_the_users() -> None:
    for caller, user, key in (
        (Caller(), None, "gateway"),
        (Caller(), "alice", "alice"),
        (Caller(key="team"), None, "team"),
        (Caller(key="team"), "team", "team"),
        (Caller(key="team"), "alice", "team"),
        (Caller(key="team"), "ada@example.com", "team"),
        (Caller(key="team"), "a" * 512, "team"),
    ):
        assert call(caller).sender(user).settings.client_key == key


@pytest.mark.parametrize(
    "user",
    [
        "ada@example.com", "Ada", "ada lovelace", "auth0|abc", "{6F9619FF-8B86-D011-B42D-00CF4FC964FF}", "ädä", "_",
        " ", "a" * 65, f"user_{'0f' * 32}_account__session_6f9619ff-8b86-d011-b42d-00cf4fc964ff", "ß" * 512,
    ],
)  # fmt: skip
def test_a_user_of_any_form_has_a_short_name_of_their_own(user: str) -> None:
    name = call(Caller()).sender(user).settings.client_key
    assert name == call(Caller()).sender(user).settings.client_key == user_name(user)
    assert follows(Rule.NAME, name)
    assert name != user_name(user[:-1] + "x")
    assert user_name(name) == name, "who names the short one means it"


def test_the_short_name_of_a_user_is_what_sha256sum_says() -> None:
    """Limits that operators have set name it."""
    assert user_name("auth0|abc") == "user-c5d09a77163332e87cd67f4fdec08160705a9a73"


@pytest.mark.parametrize("caller", [Caller(), Caller(key="team")], ids=["without keys", "with a key"])
@pytest.mark.parametrize("user", ["", "a" * 513])
def test_a_user_has_1_to_512_characters(user: str, caller: Caller) -> None:
    refused = refusal(lambda: call(caller).sender(user, "metadata.user_id"))
    assert (refused.status, refused.param) == (400, "metadata.user_id")
    assert refused.message == f"metadata.user_id: {len(user)} characters given; allowed: 1 to 512."


# A client that leaves

MODELS = {"mini": ["embed"], "judge": ["rerank"], "smol": ["generate"]}
MESSAGES = [{"role": "user", "content": "a"}]
LEAVING: list[tuple[Any, dict[str, Any]]] = [
    (embeddings.answered, {"model": "mini", "input": "a"}),
    (rerank.answered, {"model": "judge", "query": "q", "documents": ["a"]}),
    (generating(chat.asked), {"model": "smol", "messages": MESSAGES}),
    (generating(completions.asked), {"model": "smol", "prompt": "a"}),
    (generating(anthropic.asked), {"model": "smol", "messages": MESSAGES, "max_tokens": 9}),
    (generating(responses.asked), {"model": "smol", "input": "a"}),
]


@pytest.mark.parametrize(("answer", "body"), LEAVING)
@pytest.mark.parametrize("keep", [None, False, True])
def test_the_job_of_a_client_that_leaves_is_cancelled_unless_it_is_to_go_on(
    answer: Any, body: dict[str, Any], keep: bool | None
) -> None:
    async def left() -> JobStatus:
        client = AsyncFakeClient(models=MODELS)
        for kind in (client.script.embed, client.script.rerank, client.script.generate):
            kind(hangs=True)
        asked = asking(client, body, keep)
        with pytest.raises(Refused) as refused:
            await answer(asked)
        assert (refused.value.status, refused.value.code) == (499, "client_gone")
        await asked.waiting.end()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing of it goes on"
        return await (await client.job("job")).status()

    assert asyncio.run(left()) is (JobStatus.RUNNING if keep else JobStatus.CANCELLED)


def test_what_a_job_with_an_id_of_its_own_has_made_stays_for_the_next_who_asks() -> None:
    async def kept(given: bool) -> bool:
        client = AsyncFakeClient(models=MODELS)
        for answer, body in LEAVING[:2]:
            await answer(asking(client, body, None, NamedJob(body["model"], given), stays=True))
        try:
            for name in ("mini", "judge"):
                await (await client.job(name)).result()
        except JobLost:
            return False
        return True

    assert [asyncio.run(kept(given)) for given in (True, False)] == [True, False]


# Batches and files


@pytest.mark.parametrize(
    ("window", "seconds"),
    [("1h", 3600), ("24h", 86_400), ("168h", 604_800), ("024h", 86_400), *((text, None) for text in (
        "0h", "169h", "24", "h", "24H", "-1h", "1.5h", "1000h", "0024h", "٣h", "24hh", "",
    ))],
)  # fmt: skip
def test_a_window_is_one_to_168_hours(window: str, seconds: int | None) -> None:
    fields = {"input_file_id": "f", "endpoint": "/v1/embeddings", "completion_window": window}
    body = checked_body(batches.BatchBody, fields)
    if seconds is None:
        assert refusal(body.seconds).param == "completion_window"
    else:
        assert body.seconds() == seconds


@pytest.mark.parametrize(
    ("metadata", "taken"),
    [
        (None, True),
        ({}, True),
        ({f"name-{number}": "" for number in range(16)}, True),
        ({f"name-{number}": "" for number in range(17)}, False),
        ({"n" * 64: "v" * 512}, True),
        ({"n" * 65: ""}, False),
        ({"a": "b", "n": "v" * 513}, False),
    ],
)
def test_what_a_batch_is_described_by_has_bounds(metadata: dict[str, str] | None, taken: bool) -> None:
    fields = {"input_file_id": "f", "endpoint": "/v1/embeddings", "completion_window": "24h", "metadata": metadata}

    def check() -> None:
        checked_body(batches.BatchBody, fields).check_metadata()

    if taken:
        check()
    else:
        assert refusal(check).param == "metadata"


@pytest.mark.parametrize(
    ("name", "can_be"),
    [
        ("batch_0af", True), ("batch_" + "a" * 57, True), ("batch_" + "a" * 58, False), ("batch_a_b", True),
        ("batch_", True), ("xbatch_1", False), ("batch_a:b", False), ("batch_é", False), ("batch_a b", False),
        ("batch_a-b", False), ("", False),
    ],
)  # fmt: skip
def test_an_id_of_a_batch_can_be_a_part_of_a_key(name: str, can_be: bool) -> None:
    assert batches.is_id(name) == can_be


@pytest.mark.parametrize("seconds", [None, 3599, 3600, FILE_TTL, FILE_TTL + 1])
def test_a_file_is_kept_an_hour_at_least_and_a_month_at_most(seconds: int | None) -> None:
    if seconds in (3599, FILE_TTL + 1):
        assert refusal(lambda: files.checked_lifetime(seconds)).param == "expires_after"
    else:
        assert files.checked_lifetime(seconds) == (FILE_TTL if seconds is None else seconds)


def test_a_client_that_reads_no_more_of_a_file_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SLOW", 0.01)
    record = FileRecord(
        id="file-1", owner="o", filename="größe.jsonl", purpose="batch", created=5, expires=70, place="p", bytes=2**17
    )
    sent: list[Any] = []

    async def read(_: FileRecord) -> AsyncIterator[bytes]:
        yield b"x" * 2**17

    async def take(message: Any) -> None:
        sent.append(message)
        if len(sent) == 3 and slow:
            await asyncio.wait_for(asyncio.Event().wait(), 20)

    async def stays() -> Any:
        await asyncio.Event().wait()

    store: Any = SimpleNamespace(read=read)
    slow = True
    assert refusal(lambda: asyncio.run(files.ContentResponse(store, record)({}, stays, take))).code == "client_gone"
    slow = False
    sent.clear()
    asyncio.run(files.ContentResponse(store, record)({}, stays, take))
    assert [len(message.get("body", b"")) for message in sent] == [0, 2**16, 2**16, 0]
    assert [message.get("more_body") for message in sent] == [None, True, True, False]
    assert dict(sent[0]["headers"]) == {
        b"content-type": b"application/octet-stream", b"content-length": b"131072",
        b"content-disposition": b"attachment; filename*=utf-8''gr%C3%B6%C3%9Fe.jsonl",
    }  # fmt: skip


def test_of_a_file_whose_client_has_left_no_further_part_is_read() -> None:
    """The server takes what is sent to a client that is not there, as fast as it comes."""
    record = FileRecord(
        id="file-1", owner="o", filename="f", purpose="batch", created=5, expires=70, place="p", bytes=9
    )
    parts = list[int]()

    async def read(_: FileRecord) -> AsyncIterator[bytes]:
        for number in range(100):
            parts.append(number)
            await asyncio.sleep(0)
            yield b"x"

    async def leaves() -> Any:
        while len(parts) < 10:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def take(message: Any) -> None:
        """Nobody is there."""

    store: Any = SimpleNamespace(read=read)
    assert refusal(lambda: asyncio.run(files.ContentResponse(store, record)({}, leaves, take))).code == "client_gone"
    assert 10 <= len(parts) < 20


def test_a_file_is_shown_as_its_vendor_does() -> None:
    record = FileRecord(
        id="file-1", owner="o", filename="a.jsonl", purpose="batch", created=5.9, expires=70, place="p", bytes=4
    )
    assert files.shown(record) == {
        "id": "file-1", "object": "file", "bytes": 4, "created_at": 5, "expires_at": 70, "filename": "a.jsonl",
        "purpose": "batch", "status": "processed", "status_details": None,
    }  # fmt: skip


def batch(**fields: Any) -> BatchRecord:
    file: dict[str, Any] = {"owner": "o", "filename": "f", "purpose": "batch_output", "created": 1, "expires": 2}
    return BatchRecord(
        id="batch_1", owner="o", key=None, models=None, endpoint="/v1/embeddings", input_file="file-in", place="p",
        window="24h", metadata={"a": "b"}, created=3.9, expires=99, lifetime=5, total=4, completed=2, failed=1,
        output=FileRecord(id="file-out", place="p", **file), errors=FileRecord(id="file-err", place="p", **file),
        since={"in_progress": 4, "finalizing": 5, **dict.fromkeys(ENDED, 6), "cancelling": 7}, **fields,
    )  # fmt: skip


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing", *ENDED])
@pytest.mark.parametrize("cancelled", [0, 8])
def test_a_batch_is_shown_as_its_vendor_does_with_its_files_when_it_has_ended(status: Any, cancelled: int) -> None:
    ended = status in ENDED
    shown = batches.shown(Batch(batch(status=status), cancelled))
    assert shown == {
        "id": "batch_1", "object": "batch", "endpoint": "/v1/embeddings", "input_file_id": "file-in",
        "completion_window": "24h", "status": "cancelling" if cancelled and not ended else status, "errors": None,
        "output_file_id": "file-out" if ended else None, "error_file_id": "file-err" if ended else None,
        "created_at": 3, "expires_at": 99, "cancelling_at": cancelled or None, "in_progress_at": 4,
        "finalizing_at": 5, "completed_at": 6, "failed_at": 6, "expired_at": 6, "cancelled_at": 6,
        "request_counts": {"total": 4, "completed": 2, "failed": 1}, "metadata": {"a": "b"},
    }  # fmt: skip


def test_why_a_batch_failed_as_a_whole_is_shown() -> None:
    record = batch(status="failed", trouble=(Trouble(code="empty_file", message="no line"),))
    error = {"code": "empty_file", "message": "no line", "param": None, "line": None}
    assert batches.shown(Batch(record))["errors"] == {"object": "list", "data": [error]}


# Answers


def token(text: str, **fields: Any) -> StreamToken:
    return StreamToken(index=0, token_id=1, text=text, logit=0, logprob=-1.5, probability=1, **fields)


def test_probabilities_of_tokens_are_said_in_both_forms() -> None:
    other = Alternative(token_id=2, text="b", logprob=-2.5)
    tokens = [token("aä", alternatives=(other,)), token(""), token("c")]
    said = {"token": "aä", "logprob": -1.5, "bytes": [97, 195, 164]}
    first = {**said, "top_logprobs": [{"token": "b", "logprob": -2.5, "bytes": [98]}]}
    assert logprobs_of(tokens[:1]) == {"content": [first], "refusal": None}
    assert legacy_logprobs(tokens, 5) == {
        "tokens": ["aä", "", "c"], "token_logprobs": [-1.5] * 3, "top_logprobs": [{"b": -2.5}, {}, {}],
        "text_offset": [5, 7, 7],
    }  # fmt: skip


def test_an_ending_is_said_in_the_vendors_word_and_counts_add_up() -> None:
    reasons: list[Any] = ["length", "context", "stop", "stop_string"]
    assert [finish_reason(reason) for reason in reasons] == ["length", "length", "stop", "stop"]
    usage = Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=2, reasoning_tokens=1)
    result = GenerateResult(
        model="m", adapter=None, usage=usage, **dict(Completion(text="a", token_ids=(1,), finish_reason="stop"))
    )
    assert usage_of(result) == {
        "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }  # fmt: skip


# Tools


FUNCTIONS = [Function(name=name, parameters={"type": "object", "title": name}) for name in ("add", "sub")]


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        (None, Choice("auto", tuple(FUNCTIONS))),
        ("auto", Choice("auto", tuple(FUNCTIONS))),
        ("none", Choice()),
        ("required", Choice("required", tuple(FUNCTIONS))),
        ({"type": "function", "function": {"name": "sub"}}, Choice("required", tuple(FUNCTIONS), "sub")),
    ],
)
def test_which_functions_may_be_called_is_what_is_chosen(choice: object, found: Choice) -> None:
    assert chosen(FUNCTIONS, choice) == found
    assert chosen([], None) == chosen([], "none") == chosen([], "auto") == Choice()
    if found.mode in ("auto", "required") and found.name is None:
        assert not chosen(FUNCTIONS, choice, parallel=False).parallel


@pytest.mark.parametrize("alone", [False, True])
def test_what_anthropics_clients_choose_is_the_same_in_their_words(alone: bool) -> None:
    tools = [AnthropicTool(name=name, input_schema={"type": "object", "title": name}) for name in ("add", "sub")]
    own = tuple(tool.function for tool in tools)
    for kind, found in (
        ("auto", Choice("auto", own, parallel=not alone)),
        ("any", Choice("required", own, parallel=not alone)),
        ("none", Choice()),
    ):
        given: Any = {"type": kind, "disable_parallel_tool_use": alone}
        assert choice_of(tools, ToolChoice(**given)) == found
    assert choice_of(tools, ToolChoice(type="tool", name="sub")) == Choice("required", own, "sub")
    assert choice_of(tools, None) == Choice("auto", own)


@pytest.mark.parametrize(
    "choice",
    [
        *("any", 7, {"type": "function"}, {"function": {"name": "add"}}),
        *({"type": kind, "function": {"name": "add"}} for kind in ("custom", None)),
        *({"type": "function", "function": {"name": name}} for name in ("mul", 3)),
    ],
)
def test_a_choice_that_there_is_not_is_refused(choice: object) -> None:
    for functions, asked in ((FUNCTIONS, choice), ([], "required")):
        refused = refusal(lambda: chosen(functions, asked))  # noqa: B023
        assert (refused.status, refused.param, refused.code) == (400, "tool_choice", "unsupported_parameter")


def test_an_answer_that_has_to_be_a_call_has_its_schema_and_no_other() -> None:
    sub: dict[str, Any] = {"type": "object", "title": "sub"}
    named, any_of = Choice("required", tuple(FUNCTIONS), "sub"), Choice("required", tuple(FUNCTIONS))
    assert named.schema == sub
    either: Any = any_of.schema
    assert [one["properties"]["name"] for one in either["anyOf"]] == [{"const": "add"}, {"const": "sub"}]
    assert either["anyOf"][1] == {
        "type": "object", "properties": {"name": {"const": "sub"}, "arguments": sub},
        "required": ["name", "arguments"], "additionalProperties": False,
    }  # fmt: skip
    assert Choice("auto", tuple(FUNCTIONS)).schema is None
    assert Choice().schema_of_answer({"type": "string"}, "a+", "x") == {"type": "string"}
    for choice in (named, Choice("auto", tuple(FUNCTIONS))):
        assert choice.schema_of_answer(None, None, "x") == choice.schema
        assert refusal(lambda: choice.schema_of_answer({}, None, "x")).param == "tool_choice"  # noqa: B023
        assert refusal(lambda: choice.schema_of_answer(None, "a+", "x")).param == "tool_choice"  # noqa: B023


def test_a_function_is_described_to_the_template_whole() -> None:
    tool = Tool(type="function", function=FUNCTIONS[0].model_copy(update={"description": "adds"}))
    assert tool.function.as_template() == {
        "type": "function",
        "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "title": "add"}},
    }
    assert Function(name="f").as_template()["function"] == {
        "name": "f",
        "description": "",
        "parameters": {"type": "object"},
    }
    ids = {call_id(job, completion, number) for job in "ab" for completion in (0, 1) for number in (0, 1)}
    assert len(ids) == 8, "each call has its own"
    assert {len(each) for each in ids} == {9}


# Anthropic's messages


@pytest.mark.parametrize(
    ("arguments", "made"),
    [("", {}), ("{}", {}), ('{"a": 1}', {"a": 1}), ("[1]", None), ("x", None), ("[" * 99_999, None)],
)
def test_the_arguments_of_a_call_are_the_text_of_an_object(arguments: str, made: dict[str, Any] | None) -> None:
    call = {"id": "c", "function": {"name": "add", "arguments": arguments}}
    body = {"role": "assistant", "tool_calls": [call]}
    if made is None:
        refused = refusal(lambda: checked_body(ChatMessageBody, body))
        assert refused.param == "tool_calls.0.function.arguments"
        assert "expected the text of a JSON object" in refused.message
        return
    function = {"name": "add", "arguments": made}
    assert checked_body(ChatMessageBody, body).as_template() == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }


@pytest.mark.parametrize(
    ("fields", "made"),
    [
        ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {
            "role": "user", "content": "ab"
        }),
        ({"role": "tool", "content": "4", "tool_call_id": "c"}, None),
        ({"role": "assistant", "content": "a", "reasoning_content": "b", "name": "n"}, None),
        ({"role": "user", "content": ""}, None),
        ({"role": "assistant", "tool_calls": []}, {"role": "assistant", "content": ""}),
    ],
)  # fmt: skip
def test_a_message_is_for_the_template_what_it_was(fields: dict[str, Any], made: dict[str, Any] | None) -> None:
    assert checked_body(ChatMessageBody, fields).as_template() == (made or fields)


@pytest.mark.parametrize("role", ["system", "developer", "user", "tool"])
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_a_message_of_any_role_except_the_assistants_says_something(role: str, content: dict[str, Any]) -> None:
    refused = refusal(lambda: checked_body(ChatMessageBody, {"role": role, **content}))
    assert (refused.param, refused.message) == ("content", f"content: missing; a message of role {role} has one.")


def block(**fields: Any) -> dict[str, Any]:
    return fields


RESULT = block(type="tool_result", tool_use_id="t", content="4")


@pytest.mark.parametrize(
    ("role", "content", "messages"),
    [
        ("user", "hi", [{"role": "user", "content": "hi"}]),
        ("user", [], [{"role": "user", "content": ""}]),
        ("user", [block(type="text", text="a"), block(type="text", text="b")], [{"role": "user", "content": "ab"}]),
        ("user", [RESULT], [{"role": "tool", "tool_call_id": "t", "content": "4"}]),
        (
            "user",
            [block(type="text", text="so"), {**RESULT, "is_error": True}],
            [{"role": "tool", "tool_call_id": "t", "content": "Error: 4"}, {"role": "user", "content": "so"}],
        ),
        (
            "assistant",
            [block(type="thinking", thinking="hm"), block(type="tool_use", id="t", name="add", input={"a": 1})],
            [
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": "hm",
                    "tool_calls": [{"id": "t", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
                }
            ],
        ),
    ],
)
def test_results_of_tools_are_messages_of_their_own_before_what_is_said(
    role: str, content: Any, messages: list[dict[str, Any]]
) -> None:
    assert checked_body(AnthropicMessage, {"role": role, "content": content}).as_template() == messages


@pytest.mark.parametrize(
    "content",
    [
        [block(type="text")],
        [block(type="text", text="a", thinking="b")],
        [block(type="tool_use", id="t", name="add")],
        [block(type="tool_result", tool_use_id="t", text="a")],
        [block(type="thinking", signature="s")],
        [block(type="image", text="a")],
    ],
)
def test_a_block_has_the_fields_of_its_type_and_no_others(content: Any) -> None:
    assert refusal(lambda: checked_body(AnthropicMessage, {"role": "user", "content": content})).status == 400
