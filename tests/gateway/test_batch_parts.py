"""What a batch is made of: the lines of its file, and what was written and is not said yet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stoker.broker.batches import BatchRecord
from stoker.broker.stored_files import FileRecord
from stoker.errors import BrokerUnavailable, ConfigError, InvalidRequest, StokerError, UnknownModel
from stoker.gateway import batch_lines, batch_run
from stoker.gateway.batch_answers import Answerer
from stoker.gateway.batch_lines import Line, Outcome, Survey, WrongLine, survey
from stoker.gateway.batch_run import BatchRun, Lines, Written
from stoker.gateway.calls import Caller, Models
from stoker.gateway.errors import Refused
from stoker.gateway.stored import Draft
from stoker.testing import AsyncFakeClient
from tests.gateway.conftest import CHAT
from tests.gateway.machinery import turns_during

URL = "/v1/completions"


def row(custom_id: object, **fields: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": {}, **fields}).encode()


def surveyed(data: bytes) -> Survey:
    async def parts() -> AsyncIterator[bytes]:
        yield data[:100]
        yield data[100:]

    return asyncio.run(survey(parts()))


def test_an_id_that_comes_again_is_found_also_thousands_of_lines_later_and_no_other_is() -> None:
    """They are looked through a thousand at a time."""
    ids = [*range(2500), 0, 999, 1000, 1999]
    found = surveyed(b"\n".join(map(row, map(str, ids))))
    assert found.total == len(ids)
    assert [index for index in range(found.total) if found.duplicate(Line(0, index, b""))] == [2500, 2501, 2502, 2503]


class OneFile:
    """A store of one file, which takes all that is written."""

    place = ""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self, source: FileRecord) -> AsyncGenerator[bytes]:
        yield self._data

    def put(self, file_id: str, part: str, data: bytes) -> None:
        """Nothing of it is read."""


def test_streams_go_on_between_the_lines_of_a_batch_that_is_given_up() -> None:
    """Looked through at one go, those of a large batch hold up each stream of the gateway for a second and more."""
    data = b"\n".join(row(str(number)) for number in range(3000))
    file = FileRecord(id="file-1", owner="a", filename="f", purpose="batch", created=0, expires=1, place="")
    record = BatchRecord(
        id="batch_1", owner="a", key=None, models=None, endpoint=URL, input_file="file-1", place="", window="24h",
        metadata=None, created=0, expires=1, lifetime=1, output=file, errors=file,
    )  # fmt: skip
    store: Any = OneFile(data)
    unused: Any = None

    async def nothing(said: object) -> bool:
        return True

    answers: Any = SimpleNamespace(stop=nothing, discard=nothing)
    run = BatchRun(store, record, answers, nothing, unused)
    written, lines = Written(Draft(store, file), Draft(store, file)), Lines(record, surveyed(data), answers)
    _, turns = asyncio.run(turns_during(run._give_up(file, lines, written, "cancelled")))  # noqa: SLF001  it alone
    assert turns >= 3000
    assert run.record.failed == 3000


@pytest.mark.parametrize(
    ("custom_id", "taken"),
    [("a", True), ("a" * 512, True), ("a" * 513, False), ("", False), (7, False), ("\ud800", False)],
)
def test_an_id_has_one_to_512_characters(custom_id: object, taken: bool) -> None:
    line = Line(1, 0, row(custom_id))
    if taken:
        assert line.asked(URL, duplicate=False) == (custom_id, b"{}")
    else:
        with pytest.raises(WrongLine, match="1 to 512 characters") as wrong:
            line.asked(URL, duplicate=False)
        assert (wrong.value.code, wrong.value.custom_id) == ("invalid_custom_id", None)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        *(({"method": method}, "invalid_method") for method in ("GET", "post", "", None)),
        ({"url": "/v1/embeddings"}, "invalid_url"),
        ({"body": []}, "invalid_body"),
        ({"body": {"stream": True}}, "invalid_body"),
        ({"body": {"priority": 0}}, "invalid_body"),
        ({"body": {"service_tier": "priority"}}, "invalid_body"),
        ({"bodies": {}}, "invalid_request"),
    ],
)
def test_what_a_line_may_not_ask_is_said_with_its_id(fields: dict[str, Any], code: str) -> None:
    with pytest.raises(WrongLine) as wrong:
        Line(1, 0, row("mine", **fields)).asked(URL, duplicate=False)
    assert (wrong.value.code, wrong.value.custom_id) == (code, "mine")


def test_there_are_as_many_lines_as_are_allowed_and_not_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "MOST_LINES", 3)
    lines = [row(str(number)) for number in range(4)]
    assert surveyed(b"\n\n".join(lines[:3])).total == 3
    with pytest.raises(Exception, match="more than 3 lines"):
        surveyed(b"\n".join(lines))


class Kept:
    """In the place of a draft."""

    def __init__(self) -> None:
        self.data = b""

    async def write(self, data: bytes) -> None:
        self.data += data


def plain_lines(data: bytes, most: int) -> list[Line]:
    """The lines of a whole file, read at once."""
    whole = data.split(b"\n")
    found, index = [], 0
    for number, text in enumerate(whole if whole[-1] else whole[:-1], 1):
        shown = text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text
        if len(text) > most or shown.strip():
            found.append(Line(number, index, None if len(text) > most else shown))
            index += 1
    return found


@given(
    pieces=st.lists(
        st.sampled_from([b"\n", b"a", b"bc", b" ", b"\r\n", b"\xef\xbb\xbf", b"x" * 5, b"y" * 8, b"z" * 9]), max_size=12
    ),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
@example(pieces=[b"y" * 8, b"\n", b"z" * 9, b"\n", b"a"], cuts=[4, 12])
@example(pieces=[b"z" * 9, b"z" * 9, b"\n", b"y" * 8, b"\n", b"y" * 8], cuts=[9, 18])
def test_the_lines_of_a_file_are_the_same_however_it_is_cut_into_parts(pieces: list[bytes], cuts: list[int]) -> None:
    """Those of exactly the most bytes too; of those that are longer nothing is kept, and the next one is whole."""
    data = b"".join(pieces)
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})

    async def parts() -> AsyncIterator[bytes]:
        for start, end in zip([0, *ends], ends, strict=False):
            yield data[start:end]

    async def read() -> list[Line]:
        return [found async for found in batch_lines.lines_of(parts())]

    with patch.object(batch_lines, "MOST_BYTES", 8):
        assert asyncio.run(read()) == plain_lines(data, 8)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(BrokerUnavailable("away."), BrokerUnavailable), (ConfigError("no adapter."), ConfigError),
     (UnknownModel("no such model."), Refused), (InvalidRequest("prompt: too long."), Refused)],
)  # fmt: skip
def test_what_meets_every_line_alike_is_no_answer_of_one(error: StokerError, raised: type[Exception]) -> None:
    """Refused where the job is sent, or what the job ended with."""
    body = json.dumps({"model": CHAT, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}).encode()
    sent, ended = AsyncFakeClient(), AsyncFakeClient()
    sent.script.refuse(error)
    ended.script.generate("", error=error)
    refusals = []
    for client in (sent, ended):
        answerer = Answerer(client, Caller(), Models(client), "/v1/chat/completions")
        with pytest.raises(raised) as caught:
            asyncio.run(answerer.answer("batch-1", body, set()))
        refusals.append(caught.value)
    if type(error) is InvalidRequest:
        assert [refused.status for refused in refusals if isinstance(refused, Refused)] == [400, 422], "by a worker"


def test_what_was_written_is_said_when_it_is_much_or_has_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(batch_run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(batch_run, "MOST_WAITING", 10)
    output, errors = Kept(), Kept()
    drafts: Any = output, errors
    written = Written(*drafts)
    written.taken()  # its time begins by this clock

    def put(line: bytes, right: bool, job: str = "") -> bool:
        asyncio.run(written.put(Outcome(line, right, job)))
        return written.is_due()

    assert [put(b"four", True, "a"), put(b"five.", False), put(b"x", True, "b")] == [False, False, True]
    assert (output.data, errors.data, written.lines, written.right, written.all) == (b"fourx", b"five.", 3, 2, 3)
    assert written.taken() == ["a", "b"]
    assert not written.is_due()
    assert (written.lines, written.right, written.all, written.taken()) == (0, 0, 3, [])
    now[0] += batch_run.COMMIT_EVERY - 0.5
    assert not put(b"y", True)
    now[0] += 0.5
    assert written.is_due()
    written.taken()
    assert not written.is_due(), "it waits from now on"
