"""`/v1/files`: what is stored comes back byte for byte, to its owner alone, for as long as it is kept."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from starlette.datastructures import FormData

from stoker import AsyncClient
from stoker.broker import keys
from stoker.broker.stored_files import FileRecord, StoredFiles
from stoker.files import contents
from stoker.files.contents import LOCAL
from stoker.gateway import files, sweeping, uploads
from stoker.gateway.access import Keyed
from stoker.gateway.app import Gateway
from stoker.gateway.errors import Refused
from stoker.gateway.stored import Draft, Store
from stoker.settings import Settings
from tests.conftest import wait_until
from tests.gateway.machinery import Served
from tests.gateway.test_keys import made

ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
LINES = b'{"custom_id": "a"}\n'


@contextmanager
def serving(running: Served, settings: Settings) -> Iterator[openai.OpenAI]:
    """A gateway with nothing in memory; OpenAI's client of it."""
    broker = AsyncClient(settings=settings)
    with running.lent(Gateway(broker, access=Keyed(broker, required=False)), broker) as api:
        yield api


@pytest.fixture
def api(running: Served, settings: Settings) -> Iterator[openai.OpenAI]:
    with serving(running, settings) as client:
        yield client


@pytest.fixture
def over(running: Served, api: openai.OpenAI) -> Served:
    """The same, for what OpenAI's client would not send."""
    return running


def folders(settings: Settings) -> list[str]:
    """Ids of files of which something lies on the disk."""
    return [path.name for path in (settings.home / "files").glob("file-*")]


def post(over: Served, **form: Any) -> httpx2.Response:
    return httpx2.post(f"{over.url}/v1/files", timeout=20, **form)


def test_a_file_comes_back_as_it_was_until_it_is_deleted(
    running: Served, api: openai.OpenAI, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.gateway.stored.PART", 1000)
    data = bytes(range(256)) * 40
    file = api.files.create(file=("lines of ü.jsonl", io.BytesIO(data)), purpose="batch")
    assert (file.bytes, file.filename, file.purpose, file.status) == (
        len(data),
        "lines of ü.jsonl",
        "batch",
        "processed",
    )
    assert file.expires_at == file.created_at + keys.FILE_TTL
    assert len(list((settings.home / "files" / file.id).iterdir())) == 11, "no part is larger than it may be"
    # Another gateway of the same broker and the same home has it too.
    with serving(running, settings) as other:
        assert other.files.content(file.id).read() == data
        assert other.files.retrieve(file.id) == file
        assert [found.id for found in other.files.list()] == [file.id]
        assert other.files.delete(file.id).deleted
    assert folders(settings) == []
    for ask in (api.files.retrieve, api.files.content, api.files.delete):
        with pytest.raises(openai.NotFoundError, match="no file of that id"):
            ask(file.id)
    assert list(api.files.list()) == []


def test_files_of_one_client_are_not_there_for_another(over: Served, redis: Any) -> None:
    secrets = [made(redis), made(redis, created=2.0), made(redis, client="other", created=3.0), "none"]
    with ExitStack() as opened:
        team, mate, other, nobody = [opened.enter_context(over.opened(secret)) for secret in secrets]
        file = team.files.create(file=("a.jsonl", LINES), purpose="fine-tune")
        assert mate.files.retrieve(file.id).id == file.id, "keys of one client share its files"
        assert list(other.files.list()) == []
        for ask in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError, match="no file of that id"):
                ask(file.id)
        with pytest.raises(openai.AuthenticationError):
            nobody.files.retrieve(file.id)
        assert team.files.content(file.id).read() == LINES


def test_lists_come_page_by_page_and_by_purpose(over: Served, api: openai.OpenAI, redis: Any) -> None:
    made = [api.files.create(file=(f"{n}", LINES), purpose="batch" if n % 2 else "fine-tune").id for n in range(5)]
    for age, file_id in enumerate(made):
        redis.zadd(keys.files("default"), {file_id: 1e9 * 2 + age})
    assert [file.id for file in api.files.list(limit=2)] == made[::-1]
    assert [file.id for file in api.files.list(order="asc", purpose="batch", limit=1)] == made[1::2]
    page = api.files.list(limit=2, after=made[3])
    assert [file.id for file in page.data] == made[2:0:-1]
    assert page.has_more
    for name, value in {"limit": "0", "order": "up", "after": "file-x", "before": "x"}.items():
        with pytest.raises(openai.BadRequestError) as caught:
            api.get(f"/files?{name}={value}", cast_to=object)
        assert caught.value.param == name


def test_what_has_expired_goes_and_its_parts_with_it(
    over: Served, api: openai.OpenAI, redis: Any, settings: Settings
) -> None:
    expires: Any = {"anchor": "created_at", "seconds": 3600}
    first = api.files.create(file=("a", LINES), purpose="batch", expires_after=expires)
    kept = api.files.create(file=("b", LINES), purpose="batch")
    assert first.expires_at == first.created_at + 3600
    assert 3500 < redis.ttl(keys.file(first.id)) <= 3600
    # As if its time had come.
    redis.delete(keys.file(first.id))
    (where,) = redis.keys(keys.file_contents("*"))
    # What another program wrote there names a folder that is none of a file's.
    outside = settings.home / LOCAL / "../outside"
    outside.mkdir()
    redis.zadd(where, {first.id: 1, "../outside": 1})
    assert [file.id for file in api.files.list()] == [kept.id]
    asyncio.run(swept(settings))
    assert folders(settings) == [kept.id]
    assert outside.exists()
    assert redis.zrange(where, 0, -1) == [kept.id.encode()]


def test_a_gateway_that_runs_deletes_what_is_gone(
    running: Served, settings: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "SWEEP_EVERY", 0.02)
    with serving(running, settings) as api:
        file = api.files.create(file=("a", LINES), purpose="batch")
        (where,) = redis.keys(keys.file_contents("*"))
        # A broker that refuses it, for once, ends nothing.
        redis.rename(where, "stoker:spoiled:x")
        redis.set(where, "x", ex=60)
        wait_until(lambda: redis.expire("stoker:spoiled:x", 60), "time has passed")
        redis.rename("stoker:spoiled:x", where)
        redis.zadd(where, {file.id: 1})
        wait_until(lambda: folders(settings) == [], "its parts are gone")


async def swept(settings: Settings) -> None:
    async with AsyncClient(settings=settings) as client:
        await Store(client).sweep()


def test_parts_that_cannot_be_deleted_are_not_forgotten_and_go_at_a_later_sweep(
    api: openai.OpenAI, settings: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = api.files.create(file=("a", LINES), purpose="batch")
    (where,) = redis.keys(keys.file_contents("*"))

    def refused(*arguments: Any, **more: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as broken:
        broken.setattr("os.unlink", refused)
        assert api.files.delete(file.id).deleted
        assert redis.zrange(where, 0, -1) == [file.id.encode()]
    asyncio.run(swept(settings))
    assert folders(settings) == []
    assert not redis.exists(where)


def test_a_file_that_is_forgotten_though_nothing_of_it_was_stored_leaves_no_key(settings: Settings, redis: Any) -> None:
    record = FileRecord(
        id=f"file-{0:032x}", owner="me", filename="a", purpose="batch", created=1.0, expires=9, place="here"
    )

    async def forget() -> None:
        async with AsyncClient(settings=settings) as client:
            await StoredFiles(client.redis).forget(record)

    asyncio.run(forget())
    assert not redis.exists(keys.file_contents("here"), keys.files("me"), keys.file(record.id))


def test_a_file_that_is_deleted_is_listed_no_more_and_its_parts_elsewhere_wait_for_who_has_them(
    settings: Settings, redis: Any
) -> None:
    record = FileRecord(
        id=f"file-{0:032x}", owner="me", filename="a", purpose="batch", created=1.0, expires=2**32, place="elsewhere"
    )

    async def remove() -> None:
        async with AsyncClient(settings=settings) as client:
            store = Store(client)
            await store.keep(record)
            assert redis.zscore(keys.files("me"), record.id) == 1.0
            await store.remove(record)

    asyncio.run(remove())
    assert not redis.exists(keys.file(record.id), keys.files("me"))
    assert redis.zscore(keys.file_contents("elsewhere"), record.id) == 0.0, "the gateway of that place deletes them"


def test_what_another_program_wrote_among_the_files_of_a_place_deletes_no_other_folder(
    settings: Settings, redis: Any
) -> None:
    other = settings.home / "keep"
    other.mkdir(parents=True)
    (other / "mine").write_text("mine")

    async def sweep() -> str:
        async with AsyncClient(settings=settings) as client:
            store = Store(client)
            place = (await store.contents()).place
            redis.zadd(keys.file_contents(place), {"../keep": 0, "": 0, ".": 0})
            redis.expire(keys.file_contents(place), 60)
            await store.sweep()
            return place

    assert not redis.exists(keys.file_contents(asyncio.run(sweep()))), "they are not looked at again"
    assert (other / "mine").read_text() == "mine"
    assert (settings.home / contents.LOCAL / "place").exists()


@pytest.mark.parametrize("sizes", [(), (1,), (65_535, 1), (65_536,), (65_537,), (131_072, 65_537, 2)])
def test_a_file_is_sent_to_its_last_byte_in_pieces(sizes: tuple[int, ...]) -> None:
    parts = [bytes([number]) * size for number, size in enumerate(sizes)]
    sent: list[Any] = []

    class Kept:
        async def read(self, record: FileRecord) -> AsyncGenerator[bytes]:
            for part in parts:
                yield part

    async def send(message: Any) -> None:
        sent.append(message)

    async def stays() -> Any:
        await asyncio.Event().wait()

    store: Any = Kept()
    record = FileRecord(
        id=f"file-{0:032x}", owner="me", filename="a/ü.jsonl", purpose="batch", created=1.0, expires=9, place="here",
        bytes=sum(sizes),
    )  # fmt: skip
    asyncio.run(files.ContentResponse(store, record)({}, stays, send))
    start, *bodies = sent
    assert dict(start["headers"])[b"content-length"] == str(sum(sizes)).encode()
    assert dict(start["headers"])[b"content-disposition"] == b"attachment; filename*=utf-8''a%2F%C3%BC.jsonl"
    assert b"".join(body["body"] for body in bodies) == b"".join(parts)
    assert all(len(body["body"]) <= 65_536 for body in bodies)
    assert [body["more_body"] for body in bodies] == [True] * (len(bodies) - 1) + [False]


def test_a_gateway_that_stores_nothing_makes_no_folder_by_looking(settings: Settings) -> None:
    async def look() -> bool:
        async with AsyncClient(settings=settings) as client:
            store = Store(client)
            await store.sweep()
            return await store.is_used()

    assert not asyncio.run(look())
    assert not settings.home.exists()


def test_what_a_writer_left_that_died_is_swept_an_hour_later(settings: Settings, redis: Any) -> None:
    async def begun() -> FileRecord:
        async with AsyncClient(settings=settings) as client:
            store = Store(client)
            draft = await store.begin(await store.new("default", "a", "batch", 3600))
            await draft.write(LINES)
            return await draft.flush()

    record = asyncio.run(begun())
    asyncio.run(swept(settings))
    assert folders(settings) == [record.id]
    where = keys.file_contents(record.place)
    assert 3500 < redis.zscore(where, record.id) - float(redis.time()[0]) <= 3601
    redis.zadd(where, {record.id: 1})
    asyncio.run(swept(settings))
    assert folders(settings) == []


WRONG: list[tuple[dict[str, str], str]] = [
    ({"purpose": "assistants"}, "purpose"), ({}, "purpose"), ({"purpose": "batch", "x": "y"}, "x"),
    ({"purpose": "batch", ANCHOR: "created_at"}, "expires_after"),
    ({"purpose": "batch", SECONDS: "3600"}, "expires_after"),
    ({"purpose": "batch", ANCHOR: "now", SECONDS: "3600"}, ANCHOR),
    ({"purpose": "batch", ANCHOR: "created_at", SECONDS: "1"}, "expires_after"),
    ({"purpose": "batch", ANCHOR: "created_at", SECONDS: "x"}, SECONDS),
]  # fmt: skip


def test_an_upload_that_is_wrong_is_refused_by_name(over: Served, settings: Settings) -> None:
    for fields, param in WRONG:
        refused = post(over, files={"file": ("a", LINES)}, data=fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert param in refused.json()["error"]["message"].partition(" ")[0]
    assert folders(settings) == []


def test_the_form_of_an_upload_is_closed_whatever_becomes_of_it(over: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent lies on the disk meanwhile."""
    closed, close = list[FormData](), FormData.close

    async def noted(form: FormData) -> None:
        closed.append(form)
        await close(form)

    monkeypatch.setattr(FormData, "close", noted)
    statuses = [
        post(over, files={"file": ("a", LINES)}, data={"purpose": purpose}).status_code for purpose in ("batch", "none")
    ]
    assert statuses == [200, 400]
    assert len(closed) == 2


def test_an_upload_is_no_job_and_has_no_id_of_one(over: Served, settings: Settings) -> None:
    form: dict[str, Any] = {"files": {"file": ("a", LINES)}, "data": {"purpose": "batch"}}
    said = post(over, headers={"idempotency-key": "mine"}, **form)
    assert (said.status_code, said.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert not folders(settings)


def test_what_is_no_form_with_one_file_is_refused(over: Served, settings: Settings) -> None:
    batch = {"purpose": "batch"}
    refused = [
        (415, post(over, json={"purpose": "batch"})),
        (415, post(over, content=b"x", headers={"content-type": "multipart/form-data"})),
        (415, post(over, content=b"x", headers={"content-type": "multipart/form-data; boundary=x; charset=utf-7"})),
        (400, post(over, content=b"x", headers={"content-type": "multipart/form-data; boundary=x"})),
        (400, post(over, content=b"--x\r\n\r\n\r\n--x--", headers={"content-type": "multipart/form-data; boundary=x"})),
        (400, post(over, files={"file": ("a", b"")}, data=batch)),
        (400, post(over, files={"other": ("a", LINES)}, data=batch)),
        (400, post(over, files=[("file", ("a", LINES)), ("file", ("b", LINES))], data=batch)),
        (400, post(over, files={"file": ("a", LINES)}, data={"purpose": ["batch", "fine-tune"]})),
        (400, post(over, data={"file": "x"}, files={"purpose": (None, "batch")})),
        (400, post(over, files={"file": ("a", LINES)}, data=batch, headers={"idempotency-key": "x"})),
        # A page of another site may send a form: its browser says where it is from.
        (403, post(over, files={"file": ("a", LINES)}, data=batch, headers={"origin": "http://127.0.0.1"})),
    ]
    assert [(status, response.status_code) for status, response in refused if status != response.status_code] == []
    assert all(response.json()["error"]["message"] for _, response in refused)
    assert folders(settings) == []


def test_a_file_that_is_too_large_is_refused_before_it_is_read_and_as_it_comes(
    over: Served, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MOST_BYTES", 5000)
    monkeypatch.setattr(uploads, "MOST_FIELDS", 1000)
    for size in (5001, 9000):
        assert post(over, files={"file": ("a", b"x" * size)}, data={"purpose": "batch"}).status_code == 413
    kind = {"content-type": "multipart/form-data; boundary=x"}
    begun = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    pieces = (piece for piece in [begun, *[b"y" * 1000] * 50])
    assert post(over, content=pieces, headers=kind).status_code == 413, "without a length too"
    assert post(over, files={"file": ("a", b"x" * 5000)}, data={"purpose": "batch"}).status_code == 200


def test_a_client_has_room_for_so_many_files_and_so_many_bytes(
    over: Served, api: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_FILES", 2)
    monkeypatch.setattr(files, "MOST_STORED", 100)
    first = api.files.create(file=("a", b"x" * 60), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="Delete some"):
        api.files.create(file=("b", b"x" * 41), purpose="batch")
    api.files.create(file=("b", b"x" * 40), purpose="batch")
    monkeypatch.setattr(files, "MOST_STORED", 1000)
    with pytest.raises(openai.BadRequestError, match="Delete some"):
        api.files.create(file=("c", b"x"), purpose="batch")
    api.files.delete(first.id)
    api.files.create(file=("c", b"x"), purpose="batch")


@pytest.mark.parametrize("limit", ["MOST_FILES", "MOST_STORED"])
def test_a_file_that_is_being_stored_takes_room_already(
    over: Served, api: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(files, limit, 1)
    put, begun, go_on = contents.FolderContents.put, threading.Event(), threading.Event()

    def held(folder: contents.FolderContents, name: str, part: str, data: bytes) -> None:
        begun.set()
        assert go_on.wait(20)
        put(folder, name, part, data)

    monkeypatch.setattr(contents.FolderContents, "put", held)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(api.files.create, file=("a", b"x"), purpose="batch")
        assert begun.wait(20)
        try:
            with pytest.raises(openai.BadRequestError, match="you have 1 files and would have 2 bytes"):
                api.files.create(file=("b", b"x"), purpose="batch")
        finally:
            go_on.set()
        api.files.delete(first.result(20).id)
    assert api.files.create(file=("b", b"x"), purpose="batch").bytes == 1, "nothing is taken any more"


def test_a_disk_that_takes_nothing_is_said_and_leaves_nothing(
    over: Served, api: openai.OpenAI, settings: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(contents.FolderContents, "put", full)
        with pytest.raises(openai.InternalServerError, match="No space left on device") as caught:
            api.files.create(file=("a", LINES), purpose="batch")
    assert (caught.value.status_code, caught.value.code) == (507, "storage_failed")
    assert list(api.files.list()) == []
    assert folders(settings) == []
    assert not redis.keys(keys.file("*"))
    assert not redis.keys(keys.file_contents("*")), "nor is there anything to sweep"


def test_the_store_that_is_named_holds_the_parts_and_another_gateway_says_where_a_file_is(
    running: Served, settings: Settings, tmp_path: Path
) -> None:
    shared = settings.model_copy(update={"artifacts": (tmp_path / "shared").as_uri()})
    elsewhere = shared.model_copy(update={"home": tmp_path / "another"})
    with serving(running, shared) as api:
        file = api.files.create(file=("a", LINES), purpose="batch")
    assert not (settings.home / "files").exists()
    with serving(running, elsewhere) as api:
        assert api.files.content(file.id).read() == LINES
    with serving(running, settings) as api, pytest.raises(openai.InternalServerError, match="STOKER_ARTIFACTS"):
        api.files.content(file.id)
    with serving(running, elsewhere) as api:
        api.files.delete(file.id)
    assert list((tmp_path / "shared").rglob("file-*")) == []


def test_parts_that_are_gone_are_said(over: Served, api: openai.OpenAI, settings: Settings) -> None:
    file = api.files.create(file=("a", LINES), purpose="batch")
    for part in (settings.home / "files" / file.id).iterdir():
        part.unlink()
    with pytest.raises(openai.NotFoundError, match="upload it again"):
        api.files.content(file.id)


def test_what_another_program_wrote_is_no_file(over: Served, api: openai.OpenAI, redis: Any) -> None:
    for stored in (b"", b"{", b"[]", b'{"id": 1}', b"\xff"):
        file = api.files.create(file=("a", LINES), purpose="batch")
        redis.set(keys.file(file.id), stored, ex=60)
        with pytest.raises(openai.NotFoundError):
            api.files.retrieve(file.id)
        assert list(api.files.list()) == []


def test_two_gateways_that_begin_at_once_agree_on_the_place(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "files"
    first, second = contents.FolderContents(folder), contents.FolderContents(folder)
    assert first.place == second.place
    first.put("file-a", "x-0", b"abc")
    assert second.get("file-a", "x-0") == b"abc"
    assert contents.FolderContents(tmp_path / "other" / "files").place != first.place


def test_a_file_grows_behind_what_another_writer_has_stored_for_good(settings: Settings) -> None:
    """What the first one wrote and did not say is not part of it."""

    async def written() -> bytes:
        async with AsyncClient(settings=settings) as client:
            store = Store(client)
            first = await store.begin(await store.new("default", "a", "batch_output", 3600))
            await first.write(b"one ")
            known = await first.flush()
            await first.write(b"lost ")
            await first.flush()
            second = await store.begin(known)
            for word in (b"two ", b"three"):
                await second.write(word)
                await second.flush()
            assert second.record.bytes == 13
            return b"".join([part async for part in store.read(second.record)])

    assert asyncio.run(written()) == b"one two three"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FileNotFoundError()])
def test_no_part_gets_the_name_of_one_that_may_be_written_yet(error: OSError) -> None:
    """The thread that wrote the first one cannot be stopped."""
    names, troubles = list[str](), [None, error]

    class Unsteady:
        def put(self, file_id: str, name: str, data: bytes) -> None:
            names.append(name)
            if troubles and (trouble := troubles.pop(0)) is not None:
                raise trouble

    async def write() -> list[str]:
        contents: Any = Unsteady()
        record = FileRecord(
            id=f"file-{0:032x}", owner="me", filename="a", purpose="batch", created=1.0, expires=9, place="here"
        )
        draft = Draft(contents, record)
        for data in (b"one", b"lost", b"two", b"three"):
            with suppress(Refused):
                await draft.write(data)
                await draft.flush()
        return draft.record.parts()

    parts = asyncio.run(write())
    assert len(set(names)) == len(names) == 4
    assert names[1] not in parts
    assert set(parts) < set(names)


def test_what_can_be_no_id_is_no_file(settings: Settings) -> None:
    async def asked(name: str) -> None:
        async with AsyncClient(settings=settings) as client:
            await Store(client).find(name, "default")

    for name in ("file-\ud800", "file-../../etc/passwd", "x" * 10**6, ""):
        with pytest.raises(Refused, match="no file of that id"):
            asyncio.run(asked(name))
