"""What the broker says of jobs, read without trust: records, lists of open jobs, dead letters, and folders of runs."""

from __future__ import annotations

import base64
import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

from stoker.broker import keys, ledger, letters
from stoker.broker.envelope import LONGEST, UnreadableMessage, envelope, read
from stoker.broker.ledger.ending import BEGINNING
from stoker.broker.ledger.listing import Listing
from stoker.broker.ledger.record import listed, open_since, owner, summary, version, watched
from stoker.contract.uploads import Upload
from stoker.errors import InvalidRequest, JobFailed
from stoker.local import runs
from stoker.local.runs import find_run, read_run

WRONG_TYPE = ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")

# Dead letters

LETTER = {"kind": "train", "model": "m", "request": "{}", "client": "alice", "history": [{"worker": "w", "time": 1.0}]}


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\xff",
        b"[]",
        b"7",
        b"[" * 100_000,
        json.dumps({**LETTER, "kind": 5}).encode(),
        json.dumps({**LETTER, "model": None}).encode(),
        json.dumps({**LETTER, "history": None}).encode(),
        json.dumps({**LETTER, "history": ["w"]}).encode(),
        json.dumps({**LETTER, "history": [{"time": 1.0}]}).encode(),
        json.dumps({**LETTER, "history": [{"worker": 5, "time": 1.0}]}).encode(),
        json.dumps({name: value for name, value in LETTER.items() if name != "kind"}).encode(),
        json.dumps({**LETTER, "kind": "message", "message": "eA=="}).encode(),
        json.dumps({**LETTER, "kind": "message", "message": "eA==", "bytes": "1"}).encode(),
        json.dumps({**LETTER, "kind": "message", "message": None, "bytes": 1}).encode(),
    ],
)
def test_a_letter_that_is_spoiled_shows_its_bytes_and_hides_no_other(stored: bytes) -> None:
    found = letters.parse({b"good": json.dumps(LETTER).encode(), b"bad": stored})
    assert found["good"] == LETTER
    bad = found["bad"]
    assert (bad["kind"], bad["model"], bad["request"], bad["client"], bad["history"]) == ("message", "", "", "", [])
    assert (bad["bytes"], base64.b64decode(bad["message"])) == (len(stored), stored[: letters.KEPT])


def test_a_letter_names_the_client_that_its_job_belonged_to_if_it_can_be_one() -> None:
    names = ["alice", None, 5, "a b", ""]
    found: list[Any] = [letters.sender({**LETTER, "client": name}) for name in names]  # type: ignore[typeddict-item]
    assert found == ["alice", None, None, None, None]
    without: Any = {name: value for name, value in LETTER.items() if name not in ("client", "request")}
    assert (letters.sender(without), letters.request(without)) == (None, "")


# Results


def test_an_end_is_written_as_celery_does_with_the_moment_of_it() -> None:
    error = {"exc_type": "JobFailed", "exc_message": ["it fell over"], "exc_module": "stoker.errors"}
    revoked = {"exc_type": "TaskRevokedError", "exc_message": ["cancelled"], "exc_module": "celery.exceptions"}
    for ending, status, result in (
        (ledger.success("job", {"text": "a"}), "SUCCESS", {"text": "a"}),
        (ledger.failure("job", JobFailed("it fell over")), "FAILURE", error),
        (ledger.revoked("job"), "REVOKED", revoked),
    ):
        text = ending.text()
        assert text.startswith(f'{{"status": "{status}", ')
        said = json.loads(text)
        assert abs(datetime.fromisoformat(said.pop("date_done")).timestamp() - time.time()) < 60
        assert said == {"status": status, "task_id": "job", "result": result, "traceback": None, "children": []}
    assert ledger.success("job", {}).text().startswith(BEGINNING)


# Records


def test_a_record_says_what_its_job_is_who_owns_it_and_what_its_model_must_be_able_to_do() -> None:
    read_summary = summary("job").parse
    known = read_summary([b"embed", b"stoker.m.embed", b"token", b"rerank", b"alice", b"a digest", b"2.5"])
    assert (known.kind, known.queue, known.owned, known.ability) == ("embed", "stoker.m.embed", True, "rerank")
    assert (known.client, known.asked, known.deadline) == ("alice", "a digest", 2.5)
    plain = read_summary([b"embed", b"q", *[None] * 5])
    assert (plain.owned, plain.ability) == (False, "embed")
    assert read_summary([None] * 7).kind is None


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ([b"train", b"m", b"alice", b"9", b"w"], ("train", "m", "alice", 9, "w")),
        ([b"train", b"m", b"alice", b"0", None], ("train", "m", "alice", 0, None)),
        ([None, b"m", b"alice", b"0", None], None),
        ([b"train", None, b"alice", b"0", None], None),
        ([b"train", b"m", None, b"0", None], None),
        ([b"train", b"m", b"alice", b"10", None], None),
        ([b"train", b"m", b"alice", None, None], None),
        (WRONG_TYPE, None),
    ],
)
def test_a_record_is_listed_if_a_client_wrote_it(reply: Any, found: Any) -> None:
    record = listed("job").parse(reply)
    assert (record and (record.kind, record.model, record.client, record.priority, record.worker)) == found


def test_a_record_is_watched_with_its_owner_and_the_crashes_before() -> None:
    known: list[Any] = [b"train", b"m", b"alice", b"5", b"w"]
    parse: Any = watched("job").parse
    history = json.dumps([{"worker": "a"}, {"worker": "b"}, {"worker": 5}, "x"]).encode()
    found = parse([*known, b"style", b"9 steps", b"12.5", b"token", history])
    assert (found.adapter, found.size, found.submitted, found.worker, found.crashes) == (
        "style",
        "9 steps",
        12.5,
        "w",
        2,
    )
    waits = parse([*known, None, None, b"12.5", None, None])
    assert (waits.adapter, waits.size, waits.worker, waits.crashes) == ("", "", None, 0), "nobody owns it now"
    for spoiled in (b"nonsense", b"{", b"[" * 100_000, b"5"):
        assert parse([*known, None, None, b"12.5", None, spoiled]).crashes == 0
    for reply in (WRONG_TYPE, [*known, None, None, b"soon", None, None], [None] * 10):
        assert parse(reply) is None


def test_an_owner_a_version_and_the_moment_of_a_submission_are_read_if_they_are_there() -> None:
    assert [owner("job").parse(reply) for reply in ([b"token"], [None], WRONG_TYPE)] == ["token", None, None]
    assert [version("job").parse(reply) for reply in ([b"3"], [None])] == ["3", None]
    parse: Any = open_since("job", "q").parse
    assert parse([b"q", b"{}", b"12.500000"]) == 12.5
    for reply in (
        [b"other", b"{}", b"12.5"],
        [b"q", None, b"12.5"],
        [b"q", b"{}", None],
        [b"q", b"{}", b"12"],
        [b"q", b"{}", b"x12.5"],
        [b"q", b"{}", b"12.5000001"],
        WRONG_TYPE,
    ):
        assert parse(reply) is None, reply


# Lists of open jobs


class Noting:
    """A pipeline that notes the keys that it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def time(self) -> None:
        self.asked.append("time")

    def zrange(self, key: str, start: int, end: int, *, withscores: bool) -> None:
        assert (start, end, withscores) == (0, -1, True)
        self.asked.append(key)

    def hmget(self, key: str, *_: Any) -> None:
        self.asked.append(key)


def test_open_jobs_of_all_queues_are_listed_by_their_age_without_what_is_no_job() -> None:
    listing, ids, records = Listing(["a", "b"]), Noting(), Noting()
    listing.ask_ids(ids)
    assert ids.asked == ["time", keys.open_jobs("a"), keys.open_jobs("b")]
    first = [(b"young", 90.0), (b"no id", 1.0), (b"\xff", 2.0), (b"gone", 50.0)]
    second = [(b"old", 10.0), (b"early", 101.0), (b"spoiled", 60.0)]
    listing.ask_records(records, [(100, 500_000), first, second])
    order = ["old", "gone", "spoiled", "young", "early"]
    assert records.asked == [keys.job(name) for name in order]
    job = [b"train", b"m", b"c", b"5", None]
    found = listing.jobs([job, [None] * 5, WRONG_TYPE, [*job[:4], b"w"], job])
    assert {name: shown["age"] for name, shown in found.items()} == {"old": 90.5, "young": 10.5, "early": 0.0}
    assert list(found) == ["old", "young", "early"]
    assert found["young"].get("worker") == "w"
    assert "worker" not in found["old"]
    with pytest.raises(ResponseError, match="out of memory"):
        listing.jobs([job, ResponseError("OOM out of memory"), job, job, job])


# Messages


def changed(**parts: Any) -> bytes:
    message = json.loads(envelope("job", "train", "m", "stoker.m.train"))
    message["properties"]["delivery_tag"] = "job#1"
    for name, value in parts.items():
        where, _, field = name.partition("__")
        if field:
            message[where][field] = value
        else:
            message[where] = value
    return json.dumps(message).encode()


@pytest.mark.parametrize("tag", ["job#1", "job#0", "job#" + "9" * 18])
def test_a_message_is_taken_as_its_client_wrote_it_with_what_newer_ones_add(tag: str) -> None:
    found = read(changed(properties__delivery_tag=tag, properties__more=1, headers__origin="x"), "stoker.m.train")
    assert found["properties"]["delivery_tag"] == tag
    assert "more" not in found["properties"]
    assert found["headers"]["argsrepr"] == "(m)"
    assert read(changed(), "stoker.m.train")["properties"]["delivery_info"]["routing_key"] == "stoker.m.train"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (changed(properties__delivery_tag="job#"), "delivery_tag"),
        (changed(properties__delivery_tag="job#1x"), "delivery_tag"),
        (changed(properties__delivery_tag="job#" + "9" * 19), "delivery_tag"),
        (changed(properties__delivery_tag="other#1"), "delivery_tag"),
        (changed(headers__id="a b"), "headers.id"),
        (changed(headers__argsrepr=5), "headers.argsrepr is 5; allowed: a text"),
        (changed(headers__retries=1), "headers.retries is 1; allowed: 0"),
        (changed(headers__retries=False), "headers.retries is false; allowed: 0"),
        (changed(headers__eta="x" * 90), r"headers.eta is .{77}…; allowed: null"),
        (changed(body="x"), "body is"),
        (changed(headers=[]), "headers.id is null"),
        (b"[]", "headers.id is null"),
        (b"\xff", "no JSON"),
        (b"[" * 10_000, "no JSON"),
        (b" " * (LONGEST + 1), f"{LONGEST + 1} bytes; allowed: {LONGEST}"),
    ],
)
def test_a_message_that_no_client_wrote_is_refused_by_the_part_that_differs(raw: bytes, said: str) -> None:
    with pytest.raises(UnreadableMessage, match=said):
        read(raw, "stoker.m.train")


def test_a_message_may_be_as_long_as_is_allowed_and_comes_out_of_a_queue_of_jobs() -> None:
    raw = changed()
    padded = raw + b" " * (LONGEST - len(raw))
    assert read(padded, "stoker.m.train") == read(raw, "stoker.m.train")
    for queue in ("stoker.m.train.x", "celery", "stoker.m", "stoker.m.embed"):
        with pytest.raises(UnreadableMessage):
            read(raw, queue)


# Uploads


def test_an_upload_is_that_of_the_very_job_and_kind_that_it_names() -> None:
    upload = Upload.of("dataset", "a.b", b"data")
    assert Upload.parse(str(upload), "dataset", "a.b") == upload
    for name, kind, job_id in (
        (str(upload), "adapter", "a.b"),
        (str(upload), "dataset", "a"),
        (str(upload).replace("a.b", "axb"), "dataset", "a.b"),
        (f"{upload}0", "dataset", "a.b"),
        (f" {upload}", "dataset", "a.b"),
    ):
        with pytest.raises(InvalidRequest, match="an upload of this very job"):
            Upload.parse(name, kind, job_id)  # type: ignore[arg-type]
    assert Upload.of("dataset", "a.b", b"data").sending != upload.sending


# Folders of runs


def run(root: Path, run_id: str, name: str, at: float, log: str = "") -> Path:
    folder = root / run_id
    folder.mkdir(parents=True)
    facts = {"request": {"name": name, "steps": 9, "model": "m"}, "status": "done"}
    (folder / runs.RUN_FILE).write_text(json.dumps(facts))
    if log:
        (folder / runs.LOG_FILE).write_text(log)
    os.utime(folder / runs.RUN_FILE, (at, at))
    return folder


def test_what_is_given_means_an_id_before_the_start_of_one_and_that_before_a_name(tmp_path: Path) -> None:
    for run_id, name, at in (("ab", "x", 3.0), ("abc", "style", 1.0), ("q1", "style", 2.0), ("style-7", "other", 0.0)):
        run(tmp_path, run_id, name, at)
    for given, found in (("ab", "ab"), ("q", "q1"), ("x", "ab"), ("other", "style-7"), ("style", "style-7")):
        assert find_run(tmp_path, given).id == found, given
    run(tmp_path, "zz", "style", 1.5)
    (tmp_path / "style-7" / runs.RUN_FILE).unlink()
    assert find_run(tmp_path, "style").id == "q1", "the newest of the name"
    for given in ("a", "", "nothing"):
        with pytest.raises(InvalidRequest):
            find_run(tmp_path, given)


REPORT = {"step": 1, "loss": 2, "learning_rate": 0.5, "held_out_loss": None, "note": ""}


def test_a_line_of_the_log_that_is_on_its_way_is_no_fault_and_one_that_is_wrong_is_named(tmp_path: Path) -> None:
    line = json.dumps(REPORT)
    assert read_run(run(tmp_path, "a", "x", 1.0, f'{line}\n{line}\n{{"st')).reports == [REPORT] * 2
    assert read_run(run(tmp_path, "b", "x", 1.0)).reports == []
    for name, value in (("step", True), ("loss", "low"), ("note", None), ("held_out_loss", "x")):
        folder = run(tmp_path, f"wrong-{name}", "x", 1.0, f"{line}\n{json.dumps({**REPORT, name: value})}\n")
        with pytest.raises(InvalidRequest, match=f"log.jsonl, line 2: {name} is"):
            read_run(folder)


@pytest.mark.parametrize("name", [runs.RUN_FILE, runs.LOG_FILE])
def test_of_a_runs_files_no_more_is_read_than_they_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = run(tmp_path, "a", "x", 1.0, json.dumps(REPORT) + "\n")
    size = (folder / name).stat().st_size
    limit = "MAX_FACTS" if name == runs.RUN_FILE else "MAX_LOG"
    monkeypatch.setattr(runs, limit, size)
    read_run(folder)
    monkeypatch.setattr(runs, limit, size - 1)
    with pytest.raises(InvalidRequest, match=f"{size} bytes; at most {size - 1} are read"):
        read_run(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InvalidRequest, match="no file, and only those are read"):
        read_run(folder)
