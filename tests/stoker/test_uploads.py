"""An input that is sent in parts: whole or not named, and what dies on its way is soon gone."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from stoker import AsyncClient, Client
from stoker.broker import keys, ledger
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.client.requests import adapter_request, read_dataset, train_request
from stoker.client.submission import Submission
from stoker.contract import bundle
from stoker.contract.uploads import Upload
from stoker.errors import InvalidRequest, QueueFull
from stoker.settings import Settings
from tests.stoker.test_client_core import MINI, SMOL
from workers import uploads

OLD = [{"text": f"old line {number}"} for number in range(40)]
NEW = [{"text": f"new line {number}"} for number in range(9)]
QUEUE = keys.queue(SMOL.model, "train")


@pytest.fixture
def server(broker: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The broker, where a model was served lately, and where a part has 50 bytes."""
    monkeypatch.setattr(keys, "PART", 50)
    redis = connect(broker)
    for card in (MINI, SMOL):
        redis.hset(keys.MODELS, card.model, card.model_copy(update={"seen": time.time()}).model_dump_json())
    redis.expire(keys.MODELS, keys.MODEL_TTL)
    yield redis
    redis.close()


@pytest.fixture
def client(server: Any, broker: Settings) -> Iterator[Client]:
    with Client(settings=broker) as running:
        yield running


def submission(broker: Settings, rows: Any, job_id: str = "mine") -> Submission:
    request = train_request(SMOL.model, "style", rows, job_id, {})
    return Submission(broker, request, job_id, read_dataset(rows))


def blobs(server: Any) -> list[str]:
    return sorted(key.decode() for key in server.keys("stoker:blob:*"))


def trained_on(server: Any, job_id: str) -> Any:
    """What a worker reads for the job."""
    name = json.loads(server.hget(keys.job(job_id), Field.REQUEST))["dataset"]
    data = uploads.read(server, Upload.parse(name, "dataset", job_id))
    return [json.loads(line) for line in data.splitlines()] if data else data


def test_what_an_upload_that_died_has_left_is_no_part_of_the_next_one_of_its_id(
    server: Any, client: Client, broker: Settings
) -> None:
    parts = len([part.execute() for part in submission(broker, OLD, "whole").uploads(server)])
    server.delete(*blobs(server))
    for died_after in range(parts + 1):
        sending = submission(broker, OLD).uploads(server)
        for _ in range(died_after):
            next(sending).execute()
        client.train("style", NEW, model=SMOL.model, job_id="mine")
        assert trained_on(server, "mine") == NEW, f"after {died_after} parts"
        server.delete(keys.job("mine"))


@pytest.mark.parametrize("kind", ["dataset", "adapter"])
def test_an_input_is_sent_under_a_name_that_says_what_it_holds(
    broker: Settings, kind: Literal["dataset", "adapter"]
) -> None:
    for data in (b"one", b"two"):
        request: Any = (
            train_request(SMOL.model, "style", OLD, "mine", {})
            if kind == "dataset"
            else adapter_request(SMOL.model, "style", "mine", {})
        )
        sent = Submission(broker, request, "mine", data)
        named: Any = sent.request
        name = Upload.parse(named.dataset if kind == "dataset" else named.upload, kind, "mine")
        assert (name.size, name.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_same_from_asyncio(server: Any, broker: Settings) -> None:
    async def send() -> None:
        async with AsyncClient(settings=broker) as sender:
            await sender.train("style", NEW, model=SMOL.model, job_id="mine")
            await sender.train("style", OLD, model=SMOL.model, job_id="mine")

    next(submission(broker, OLD).uploads(server)).execute()
    asyncio.run(send())
    assert trained_on(server, "mine") == NEW


def test_an_upload_expires_within_minutes_until_its_job_names_it(server: Any, broker: Settings) -> None:
    sent = submission(broker, OLD)
    for part in sent.uploads(server):
        part.execute()
        (blob,) = blobs(server)
        assert 0 < server.ttl(blob) <= keys.UPLOAD_TTL <= 15 * 60
        # As after a minute of sending: the next part makes it live on.
        server.expire(blob, 30)
    server.expire(blob, keys.UPLOAD_TTL)
    assert sent.transition().on(server).state == "new"
    assert server.ttl(blob) > keys.RESULT_TTL, "it stays as long as its job may wait"


def test_what_was_uploaded_is_not_sent_once_more_with_the_job(server: Any, broker: Settings) -> None:
    sent = submission(broker, OLD)
    for part in sent.uploads(server):
        part.execute()
    server.delete(*blobs(server))
    assert sent.transition().on(server).state == "new"
    assert blobs(server) == []


def test_each_part_makes_what_is_there_live_on(server: Any, broker: Settings) -> None:
    sending = submission(broker, OLD).uploads(server)
    for _ in range(3):
        next(sending).execute()
        (blob,) = blobs(server)
        assert server.ttl(blob) > keys.UPLOAD_TTL - 30
        server.expire(blob, 5)


def test_an_id_that_is_known_takes_no_second_input_and_leaves_none(
    server: Any, client: Client, broker: Settings
) -> None:
    client.train("style", OLD, model=SMOL.model, job_id="mine")
    (first,) = blobs(server)
    # Both looked for the job before either had sent it.
    for rows in (NEW, OLD):
        late = submission(broker, rows)
        for part in late.uploads(server):
            part.execute()
        reply = late.transition().on(server)
        assert reply.state == "known"
        late.tidy(server.pipeline(), reply).execute()
        assert blobs(server) == [first]
    assert trained_on(server, "mine") == OLD


@pytest.mark.parametrize("meanwhile", ["waits", "dead"])
def test_a_job_that_is_sent_again_because_the_answer_was_lost_keeps_its_input(
    server: Any, client: Client, broker: Settings, meanwhile: str
) -> None:
    sent = submission(broker, OLD)
    for part in sent.uploads(server):
        part.execute()
    assert sent.transition().on(server).state == "new"
    if meanwhile == "dead":
        ledger.claim(server, "mine", QUEUE, "token", "tag", "worker")
        ledger.dead_letter(server, "mine", QUEUE, "token", "worker", "full")
        assert ledger.complete(server, "mine", QUEUE, "token", ledger.failure("mine", ValueError("x")))
    again = sent.transition().on(server)
    assert again.state == "new"
    sent.tidy(server.pipeline(), again).execute()
    if meanwhile == "dead":
        client.retry("mine")
    assert trained_on(server, "mine") == OLD


def test_no_part_is_sent_for_a_job_that_is_known_nor_of_a_small_input(
    server: Any, client: Client, broker: Settings
) -> None:
    def parts() -> int:
        return int(server.info("commandstats").get("cmdstat_setrange", {"calls": 0})["calls"])

    async def send() -> None:
        async with AsyncClient(settings=broker) as sender:
            await sender.train("style", OLD, model=SMOL.model, job_id="mine")

    client.train("style", OLD, model=SMOL.model, job_id="mine")
    before = parts()
    client.train("style", OLD, model=SMOL.model, job_id="mine")
    asyncio.run(send())
    assert parts() == before > 0
    client.train("style", NEW[:1], model=SMOL.model, job_id="small")
    assert parts() == before, "what is small goes with its job"


@pytest.mark.parametrize("way", ["blocking", "asyncio"])
def test_an_input_is_not_left_whose_id_another_has_taken_meanwhile(
    server: Any, client: Client, broker: Settings, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(mine: Submission, redis: Any) -> Iterator[Any]:
        yield from uploads_of(mine, redis)
        assert submission(broker, NEW).transition().on(server).state == "new"

    async def send() -> None:
        async with AsyncClient(settings=broker) as sender:
            await sender.train("style", OLD, model=SMOL.model, job_id="mine")

    uploads_of = Submission.uploads
    monkeypatch.setattr(Submission, "uploads", meanwhile)
    if way == "blocking":
        client.train("style", OLD, model=SMOL.model, job_id="mine")
    else:
        asyncio.run(send())
    assert trained_on(server, "mine") == NEW
    assert len(blobs(server)) == 1


@pytest.mark.parametrize(("rule", "state"), [("queue_limit", "full"), ("client_limit", "client_full")])
def test_an_input_stays_while_a_place_in_the_queue_is_waited_for(
    server: Any, client: Client, broker: Settings, rule: str, state: str
) -> None:
    client.train("style", NEW[:1], model=SMOL.model, job_id="first")
    server.hset(keys.POLICY, rule, 1)
    waiting = submission(broker, OLD)
    for part in waiting.uploads(server):
        part.execute()
    blob = next(name for name in blobs(server) if ":mine:" in name)
    server.expire(blob, 5)
    reply = waiting.transition().on(server)
    assert reply.state == state
    waiting.tidy(server.pipeline(), reply).execute()
    assert server.ttl(blob) > keys.UPLOAD_TTL - 30
    with pytest.raises(QueueFull):
        client.train("style", OLD, model=SMOL.model, job_id="third")
    assert all(0 < server.ttl(name) <= keys.UPLOAD_TTL for name in blobs(server) if ":third:" in name)


@pytest.mark.parametrize("ends", ["complete", "cancel"])
def test_the_input_goes_with_its_job(server: Any, client: Client, ends: str) -> None:
    client.train("style", OLD, model=SMOL.model, job_id="mine")
    assert len(blobs(server)) == 1
    if ends == "complete":
        ledger.claim(server, "mine", QUEUE, "token", "tag", "worker")
        assert ledger.complete(server, "mine", QUEUE, "token", ledger.success("mine", {})) == 1
    else:
        assert ledger.cancel(server, "mine", QUEUE) == "cancelled"
    assert blobs(server) == []


def test_a_record_that_names_another_key_as_its_input_deletes_nothing(server: Any, client: Client) -> None:
    client.train("style", OLD, model=SMOL.model, job_id="mine-2")
    (other,) = blobs(server)
    server.set(keys.artifact("m", "a", 1), b"adapter")
    for number, named in enumerate((other, keys.artifact("m", "a", 1), keys.job("mine-2"), keys.MODELS)):
        job_id = "mine" if named == other else f"evil{number}"
        client.train("style", NEW[:1], model=SMOL.model, job_id=job_id)
        server.hset(keys.job(job_id), Field.BLOB, named)
        assert ledger.cancel(server, job_id, QUEUE) == "cancelled"
        assert server.exists(named) == 1, named


def test_a_retry_of_a_dead_letter_finds_its_input_whole(server: Any, client: Client) -> None:
    client.train("style", OLD, model=SMOL.model, job_id="mine")
    ledger.claim(server, "mine", QUEUE, "token", "tag", "worker")
    ledger.dead_letter(server, "mine", QUEUE, "token", "worker", "full")
    assert ledger.complete(server, "mine", QUEUE, "token", ledger.failure("mine", ValueError("x"))) == 1
    client.retry("mine")
    assert trained_on(server, "mine") == OLD
    assert ledger.cancel(server, "mine", QUEUE) == "cancelled"
    assert blobs(server) == []


def test_an_id_of_another_kind_of_job_is_refused_and_leaves_no_input(
    server: Any, client: Client, broker: Settings
) -> None:
    client.generate("x", model=SMOL.model, job_id="mine")

    async def send() -> None:
        async with AsyncClient(settings=broker) as sender:
            await sender.train("style", OLD, model=SMOL.model, job_id="mine")

    with pytest.raises(InvalidRequest, match="given for a job of kind train; it is that of a job of kind generate"):
        client.train("style", OLD, model=SMOL.model, job_id="mine")
    with pytest.raises(InvalidRequest, match="kind generate"):
        asyncio.run(send())
    client.generate("x", model=SMOL.model, job_id="mine")
    assert blobs(server) == []


def test_an_id_of_a_request_that_is_sent_again_otherwise_is_refused_for_good(server: Any, client: Client) -> None:
    """Also behind the end of its job, when what was asked is no longer known: the digest of it is."""
    first, second = (client.with_key("alice", asked=asked) for asked in ("one", "two"))
    first.generate("x", model=SMOL.model, job_id="mine")
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="'mine' given for another request"):
            second.generate("y", model=SMOL.model, job_id="mine")
        for same in (first, client, client.with_key("bob", asked="two")):
            assert same.generate("x", model=SMOL.model, job_id="mine").id == "mine"
        ledger.cancel(server, "mine", keys.queue(SMOL.model, "generate"))
        assert server.hget(keys.job("mine"), Field.REQUEST) is None


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_in_an_adapters_folder_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    make(tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidRequest, match="neither a file nor a link to one"):
        bundle.read_folder(tmp_path)


def test_an_adapters_folder_is_read_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_BYTES", 4)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("abc")
    with pytest.raises(InvalidRequest, match="more than 4 bytes"):
        bundle.read_folder(tmp_path)


def test_a_folder_that_is_called_as_the_hubs_gives_nothing_but_blobs(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "x"
    folder.mkdir(parents=True)
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "link").symlink_to(tmp_path / "secret")
    (folder / "adapter_model.safetensors").write_text("x")
    for target in ("../../secret", "../../blobs/../secret", "../../blobs/link"):
        (folder / "adapter_config.json").symlink_to(target)
        with pytest.raises(InvalidRequest, match=r"a link to|leads out of its root"):
            bundle.read_folder(folder)
        (folder / "adapter_config.json").unlink()


def test_a_link_to_what_is_called_a_blob_is_followed_in_a_snapshot_of_the_hub_alone(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("{}")
    for name in ("snapshots", "elsewhere"):
        folder = tmp_path / name / "x"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text("x")
        (folder / "adapter_config.json").symlink_to("../../blobs/abc")
    # A folder may be named by its text.
    given: Any = str(tmp_path / "snapshots" / "x")
    assert bundle.unpack(bundle.read_folder(bundle.folder_of(given)), "x")["adapter_config.json"] == b"{}"
    with pytest.raises(InvalidRequest, match=r"a link to|leads out of its root"):
        bundle.read_folder(tmp_path / "elsewhere" / "x")


def test_an_upload_of_another_kind_or_job_is_refused() -> None:
    name = str(Upload.of("adapter", "mine", b"files"))
    assert str(Upload.parse(name, "adapter", "mine")) == name
    for kind, job_id in (("dataset", "mine"), ("adapter", "min"), ("adapter", "other")):
        with pytest.raises(InvalidRequest, match="an upload of this very job"):
            Upload.parse(name, kind, job_id)  # type: ignore[arg-type]


def test_an_adapters_folder_has_its_config_and_is_no_larger_than_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapters.safetensors").write_bytes(b"weights")
    with pytest.raises(InvalidRequest, match="no adapter in it"):
        bundle.read_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    monkeypatch.setattr(bundle, "MAX_BYTES", 9)
    files = bundle.unpack(bundle.read_folder(tmp_path), "x")
    assert files == {"adapters.safetensors": b"weights", "adapter_config.json": b"{}"}
    monkeypatch.setattr(bundle, "MAX_BYTES", 8)
    with pytest.raises(InvalidRequest, match="more than 8 bytes"):
        bundle.read_folder(tmp_path)


def test_a_link_out_of_an_adapters_folder_sends_nothing(tmp_path: Path) -> None:
    outside, folder = tmp_path / "secret", tmp_path / "adapter"
    folder.mkdir()
    outside.write_text("{}")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    whole = bundle.read_folder(folder)
    for target in (outside, tmp_path / "adapter" / ".." / "secret"):
        (folder / "stoker.json").symlink_to(target)
        with pytest.raises(InvalidRequest, match=r"a link to .*secret, which is no file of this folder"):
            bundle.read_folder(folder)
        (folder / "stoker.json").unlink()
    # The folder itself may be reached by a link, and the hub's cache has only links.
    (tmp_path / "link").symlink_to(folder)
    assert bundle.read_folder(tmp_path / "link") == whole
    snapshot, kept = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    kept.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        (kept / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert bundle.read_folder(snapshot) == whole


def test_of_a_large_job_that_is_known_already_nothing_is_sent(
    server: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one command it would hold up everybody else, and the broker would have to keep it meanwhile."""
    monkeypatch.setattr(keys, "PART", 100_000)
    large = [{"text": "x" * 1000}] * 1000
    client.train("style", large, model=SMOL.model, job_id="mine")
    before = blobs(server), server.info("stats")["total_net_input_bytes"]
    client.train("style", large, model=SMOL.model, job_id="mine")
    assert server.info("stats")["total_net_input_bytes"] - before[1] < 50_000
    assert blobs(server) == before[0]
    client.embed(["x"], model="mini", job_id="other")
    with pytest.raises(InvalidRequest, match="it is that of a job of kind embed"):
        client.train("style", large, model=SMOL.model, job_id="other")
