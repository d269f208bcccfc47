"""Commands for the second year: stopping many jobs, removing runs and adapters, cleaning, backup and restore."""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import json
import os
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from typer.testing import CliRunner

from stoker import Client, Job, JobStatus
from stoker.broker import keys, ledger, policy, prefixes, registry
from stoker.cli import app
from stoker.cli.housekeeping import seconds
from stoker.errors import InvalidRequest, JobCancelled, JobLost, UnknownAdapter
from stoker.files.durable import DRAFT, draft_folder, remove_folder
from stoker.local import backup, storage
from stoker.local.backup import KINDS
from stoker.local.process import Process
from stoker.settings import Settings, load_settings
from tests.conftest import wait_until
from tests.stoker.test_client_core import SMOL, fake, server

__all__ = ["fake", "server"]

DAY = 86400.0


def invoke(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def make_run(run: str, name: str = "style", status: str = "done", age: float = 0.0) -> Path:
    folder = load_settings().runs / run
    folder.mkdir(parents=True)
    request = {"name": name, "dataset": f"dataset:{run}", "steps": 10}
    (folder / "run.json").write_text(json.dumps({"request": request, "status": status}))
    (folder / "log.jsonl").write_text("")
    then = time.time() - age
    os.utime(folder / "run.json", (then, then))
    return folder


def make_adapter(server: Any, version: int, *, name: str = "style", promote: bool = True) -> Path:
    registry.register(server, "smol", name, version, {"rank": 8}, promote=promote)
    server.set(keys.artifact("smol", name, version), b"weights \xff")
    folder = load_settings().adapters / "smol" / name / str(version)
    folder.mkdir(parents=True)
    (folder / "adapters.safetensors").write_bytes(b"weights \xff")
    return folder


def test_jobs_are_cancelled_by_id_by_model_by_kind_or_all(fake: Callable[[], Client]) -> None:
    with fake() as client:
        jobs: list[Job[Any]] = [
            client.embed(["a"], model="mini"),
            client.generate("b", model="smol"),
            client.embed(["c"], model="mini"),
        ]
        run = client.train("style", [{"text": "d"}], model="smol")
        assert "1 jobs" in invoke("jobs", "cancel", jobs[0].id)
        assert jobs[0].status() is JobStatus.CANCELLED
        assert "1 jobs" in invoke("jobs", "cancel", "--model", "smol", "--kind", "generate")
        assert jobs[1].status() is JobStatus.CANCELLED
        assert [jobs[2].status(), run.status()] == [JobStatus.QUEUED] * 2
        assert "2 jobs" in invoke("jobs", "cancel", "--all")
        assert client.jobs() == {}


def test_a_job_that_nobody_knows_hinders_no_other_cancel_and_is_no_success(
    fake: Callable[[], Client],
) -> None:
    with fake() as client:
        job = client.embed(["a"], model="mini")
        done = CliRunner().invoke(app, ["jobs", "cancel", "never-sent", job.id])
        assert isinstance(done.exception, JobLost), done.output
        assert str(done.exception) == "1 of 2 jobs are not known; see above."
        assert "never-sent: the broker knows nothing of" in done.stdout
        assert done.stdout.endswith("\n1 jobs\n")
        assert job.status() is JobStatus.CANCELLED


@pytest.mark.parametrize("words", [(), ("some-id", "--all"), ("--kind", "sing")])
def test_a_cancel_without_a_choice_or_with_two_is_refused(words: tuple[str, ...], fake: Callable[[], Client]) -> None:
    with fake() as client:
        job = client.embed(["a"], model="mini")
        with pytest.raises(InvalidRequest, match=r"given|name jobs"):
            invoke("jobs", "cancel", *words)
        assert job.status() is JobStatus.QUEUED


def test_purge_stops_what_waits_and_leaves_what_runs(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        runs, waits = client.embed(["a"], model="mini"), client.embed(["b"], model="mini")
        ledger.claim(server, runs.id, keys.queue("mini", "embed"), "token", "tag", "worker-1")
        assert invoke("jobs", "purge", "--model", "mini") == f"{waits.id}: stopped\n1 jobs\n"
        assert (runs.status(), waits.status()) == (JobStatus.RUNNING, JobStatus.CANCELLED)


def test_a_job_that_a_worker_takes_while_purge_looks_around_runs_on(
    fake: Callable[[], Client], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Client.jobs

    def taken_meanwhile(self: Client) -> Any:
        found = listed(self)
        ledger.claim(server, taken.id, keys.queue("mini", "embed"), "token", "tag", "worker-1")
        server.set(keys.worker("worker-1"), "{}", ex=10)
        return found

    with fake() as client:
        taken, waits = client.embed(["a"], model="mini"), client.embed(["b"], model="mini")
        monkeypatch.setattr(Client, "jobs", taken_meanwhile)
        said = invoke("jobs", "purge")
        assert not server.exists(keys.cancel(taken.id)), "nobody asks it to stop"
        assert (taken.status(), waits.status()) == (JobStatus.RUNNING, JobStatus.CANCELLED)
        with pytest.raises(JobCancelled):
            waits.result(5)
    assert f"{taken.id}: left alone" in said
    assert f"{waits.id}: stopped\n1 jobs" in said


def test_a_run_is_found_by_its_id_the_start_of_it_or_its_adapters_name() -> None:
    make_run("aaaa-1", "old", age=9)
    make_run("aabb-2", "old", age=1)
    for given in ("aabb-2", "aab", "old"):
        assert "aabb-2: done" in invoke("runs", "show", given)
    with pytest.raises(InvalidRequest, match="2 runs start so"):
        invoke("runs", "show", "aa")
    with pytest.raises(InvalidRequest, match=r"there are: aaaa-1 \(old\), aabb-2 \(old\)"):
        invoke("runs", "show", "zz")


def test_a_run_that_ended_is_removed_and_one_that_goes_on_is_not(fake: Callable[[], Client]) -> None:
    ended = make_run("ended-1")
    invoke("runs", "remove", "ended-1")
    assert not ended.exists()
    with fake() as client:
        job = client.train("style", [{"text": "d"}], model="smol", job_id="goes-on")
        going = make_run(job.id, status="running")
        with pytest.raises(InvalidRequest, match="stoker cancel goes-on"):
            invoke("runs", "remove", "goes-on")
        assert going.exists()
        job.cancel()
    invoke("runs", "remove", "goes-on")
    assert not going.exists()


@pytest.mark.parametrize("status", ["out of memory", "cancelled"])
def test_a_run_that_failed_and_whose_job_was_sent_again_is_not_removed(fake: Callable[[], Client], status: str) -> None:
    """A worker goes on from its checkpoints."""
    with fake() as client:
        job = client.train("style", [{"text": "d"}], model="smol", job_id="again")
        folder = make_run(job.id, status=status)
        with pytest.raises(InvalidRequest, match="run again is queued"):
            invoke("runs", "remove", "again")
        assert folder.exists()
        job.cancel()
    invoke("runs", "remove", "again")
    assert not folder.exists()


def test_a_run_that_failed_is_removed_where_there_is_no_broker_to_ask() -> None:
    folder = make_run("failed", status="out of memory")
    invoke("runs", "remove", "failed")
    assert not folder.exists()


def test_a_run_whose_job_the_broker_has_forgotten_is_removed(fake: Callable[[], Client]) -> None:
    fake()
    folder = make_run("forgotten", status="running")
    invoke("runs", "remove", "forgotten")
    assert not folder.exists()


def test_an_adapter_goes_with_all_its_versions_files_and_artifacts(fake: Callable[[], Client], server: Any) -> None:
    client = fake()
    server.hset(keys.MODELS, "smol", SMOL.model_copy(update={"kinds": (*SMOL.kinds, "adapters")}).model_dump_json())
    folders = [make_adapter(server, version) for version in (1, 2)]
    other = make_adapter(server, 1, name="other")
    assert "2 versions removed" in invoke("adapters", "remove", "style", "--model", "smol")
    assert not any(folder.exists() for folder in folders)
    assert not server.exists(keys.artifact("smol", "style", 1), keys.artifact("smol", "style", 2))
    assert other.exists()
    with client, pytest.raises(UnknownAdapter):
        client.adapters.get("style", "smol").version(None)


def test_clean_deletes_old_ended_runs_and_logs_and_nothing_else() -> None:
    settings = load_settings()
    old, young = make_run("old", age=40 * DAY), make_run("young", age=20 * DAY)
    going = make_run("going", status="running", age=40 * DAY)
    settings.logs.mkdir(parents=True)
    logs = [settings.logs / "old.log", settings.logs / "young.log"]
    for log in logs:
        log.write_text("a line")
    os.utime(logs[0], (time.time() - 40 * DAY,) * 2)
    assert "2 runs and logs would be deleted" in invoke("clean", "--dry-run")
    assert json.loads(invoke("clean", "--dry-run", "--json"))["deleted"] is False
    assert old.exists()
    assert logs[0].exists()
    found = json.loads(invoke("clean", "--older-than", "30d", "--json"))
    assert sorted(Path(entry["path"]).name for entry in found["found"]) == ["old", "old.log"]
    assert found["deleted"] is True
    assert found["bytes"] == sum(entry["bytes"] for entry in found["found"]) > 0
    assert [path.exists() for path in (old, young, going, *logs)] == [False, True, True, False, True]


def test_clean_leaves_a_run_that_goes_on_or_is_pinned_since_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dead letter was sent again, and a worker has begun."""
    again, pinned, old, _ = (make_run(name, age=40 * DAY) for name in ("again", "pinned", "old", "the newest"))
    os.utime(load_settings().runs / "the newest" / "run.json")
    remove_drafts = storage.remove_drafts

    def begins(settings: Settings) -> int:
        facts = json.loads((again / "run.json").read_text())
        (again / "run.json").write_text(json.dumps({**facts, "status": "running"}))
        (pinned / "pinned").touch()
        return remove_drafts(settings)

    monkeypatch.setattr(storage, "remove_drafts", begins)
    said = invoke("clean")
    assert [folder.exists() for folder in (again, pinned, old)] == [True, True, False]
    assert "1 runs and logs deleted" in said
    assert str(again) not in said


def test_a_run_that_is_old_and_one_too_many_goes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_KEEP_RUNS", "1")
    for number in range(3):
        make_run(f"old-{number}", age=(40 + number) * DAY)
    found = json.loads(invoke("clean", "--dry-run", "--json"))["found"]
    assert sorted(Path(entry["path"]).name for entry in found) == ["old-1", "old-2"]


def test_what_another_clean_has_deleted_is_no_error() -> None:
    logs = load_settings().logs
    logs.mkdir(parents=True)
    (logs / "old.log").write_text("old")
    (leftover,) = storage.old_logs(load_settings(), time.time() + 1)
    for _ in range(2):
        storage.remove(leftover)
    assert list(logs.iterdir()) == []


def test_a_log_that_goes_while_old_ones_are_looked_for_hinders_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker turns its logs over, or another clean runs, between the listing and a look at each."""
    logs = load_settings().logs
    logs.mkdir(parents=True)
    for name in ("a.log", "b.log"):
        (logs / name).write_text("old")
    is_link = Path.is_symlink

    def goes(path: Path) -> bool:
        found = is_link(path)
        if path.name == "a.log":
            path.unlink()
        return found

    monkeypatch.setattr(Path, "is_symlink", goes)
    assert [left.path.name for left in storage.old_logs(load_settings(), time.time() + 1)] == ["b.log"]


def test_clean_leaves_the_log_of_a_process_that_lives_however_quiet_it_is(tmp_path: Path) -> None:
    log, go = load_settings().logs / "worker.log", tmp_path / "go"
    os.mkfifo(go)
    program = f"print('one', flush=True); print(open({str(go)!r}).read())"
    process = Process("worker", [sys.executable, "-c", program], log=log, env={}, grace=5)
    try:
        wait_until(lambda: "one" in process.output(), "it writes its log")
        os.utime(log, (time.time() - 40 * DAY,) * 2)
        found = storage.Leftover(log, "found before the process began", 0)
        assert json.loads(invoke("clean", "--json"))["found"] == []
        storage.remove(found)
        go.write_text("the reason of its end")
        wait_until(lambda: process.returncode is not None, "it has ended")
    finally:
        process.stop()
    assert log.read_text() == "one\nthe reason of its end\n"
    storage.remove(found)
    assert not log.exists()


def test_clean_leaves_a_log_of_which_nobody_can_say_whether_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = load_settings().logs
    logs.mkdir(parents=True)
    (logs / "old.log").write_text("old")

    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    assert storage.old_logs(load_settings(), time.time() + 1) == []


def test_clean_deletes_drafts_of_dead_writers_and_none_that_is_written() -> None:
    home = load_settings().home
    home.mkdir(parents=True)
    dead = home / f"{DRAFT}dead"
    dead.write_text("half")
    with draft_folder(home / "adapters") as living:
        (home / f"{DRAFT}dead-again").write_text("half")
        assert storage.remove_drafts(load_settings()) == 2
        assert living.exists()
    assert not dead.exists()


@pytest.mark.parametrize(("age", "wanted"), [("12h", 12 * 3600), ("30d", 30 * DAY), ("8w", 56 * DAY)])
def test_an_age_is_hours_days_or_weeks(age: str, wanted: float) -> None:
    assert seconds(age) == wanted


@pytest.mark.parametrize("age", ["", "30", "d", "-1d", "1.5d", "30 days", "9999999d"])
def test_another_age_is_refused(age: str) -> None:
    with pytest.raises(InvalidRequest, match="12h, 30d, 8w"):
        seconds(age)


def test_the_disk_that_each_part_takes_is_shown() -> None:
    folder = make_run("big")
    (folder / "weights").write_bytes(os.urandom(1 << 20))
    with (folder / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    for name in ("broker.json", "notes"):
        (load_settings().home / name).write_text("{}")
    parts = json.loads(invoke("status", "--disk", "--json"))
    sizes = [part["bytes"] for part in parts]
    assert sizes == sorted(sizes, reverse=True), "the largest first"
    found = {part["name"]: part for part in parts}
    assert found["runs"]["files"] == 4
    assert 1 << 20 <= found["runs"]["bytes"] < 1 << 21, "of the disk, not of what files say of their lengths"
    assert found["other files"]["files"] == 2
    assert "stoker clean" in invoke("status", "--disk")


def test_a_backup_brings_back_what_was_lost_and_leaves_what_is_there(server: Any, tmp_path: Path) -> None:
    run, version = make_run("job-1"), make_adapter(server, 1)
    policy.decide(server, "queue_limit", 77)
    target = tmp_path / "all.tar.gz"
    assert "keys of the broker" in invoke("backup", str(target))
    server.flushall()
    (version / "adapters.safetensors").unlink()
    (run / "run.json").write_text("newer")
    registry.register(server, "smol", "other", 1, {"rank": 2}, promote=True)
    assert invoke("restore", str(target)).startswith(f"{target}: 1 files of adapters and runs, 4 keys of")
    assert (version / "adapters.safetensors").read_bytes() == b"weights \xff"
    assert (run / "run.json").read_text() == "newer"
    assert server.get(keys.artifact("smol", "style", 1)) == b"weights \xff"
    assert server.smembers(keys.adapters("smol")) == {b"style", b"other"}
    assert server.hgetall(keys.POLICY) == {b"queue_limit": b"77"}
    assert registry.parse("smol", "style", server.hgetall(keys.adapter("smol", "style"))).serving == 1
    assert "0 files of adapters and runs, 0 keys of the broker restored" in invoke("restore", str(target))


def test_a_restore_says_which_revoked_keys_count_again_and_leaves_them_out_where_that_is_asked(
    fake: Callable[[], Client], server: Any, tmp_path: Path
) -> None:
    fake()
    for name in ("stays", "leaked"):
        invoke("keys", "create", name)
    ids = {entry["client"]: entry["id"] for entry in json.loads(invoke("keys", "list", "--json"))}
    policy.decide(server, "queue_limit", 77)
    invoke("backup", str(tmp_path / "b.tgz"))
    invoke("keys", "revoke", ids["leaked"])
    server.delete(keys.POLICY)
    assert "count again" not in invoke("restore", str(tmp_path / "b.tgz"), "--no-gateway-keys")
    assert server.hgetall(keys.POLICY) == {b"queue_limit": b"77"}
    assert ids["leaked"] not in invoke("keys", "list")
    assert f"1 keys of the gateway count again: {ids['leaked']}. Revoke" in invoke("restore", str(tmp_path / "b.tgz"))
    assert ids["leaked"] in invoke("keys", "list")
    assert "count again" not in invoke("restore", str(tmp_path / "b.tgz"))


@pytest.mark.parametrize("files", [5, 6])
def test_a_backup_has_as_many_files_as_a_restore_takes_and_no_more(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    monkeypatch.setattr(backup, "MAX_FILES", 7)
    folder = make_run("job-1")
    for number in range(files - 2):
        (folder / f"{number}.bin").write_bytes(b"weights")
    target = tmp_path / "b.tgz"
    if files == 6:
        with pytest.raises(InvalidRequest, match=r"6 files of adapters and runs; .*`stoker clean`"):
            invoke("backup", str(target))
        assert not target.exists()
        return
    invoke("backup", str(target))
    shutil.rmtree(folder)
    assert "5 files" in invoke("restore", str(target))


def remove_adapter(server: Any, *versions: int) -> None:
    registry.change(server, "smol", "deactivate", "style", None)
    for version in versions:
        registry.change(server, "smol", "unload", "style", version)


def known(server: Any) -> registry.AdapterEntry:
    return registry.parse("smol", "style", server.hgetall(keys.adapter("smol", "style")))


def test_an_adapter_that_was_removed_serves_again_after_a_restore(server: Any, tmp_path: Path) -> None:
    make_adapter(server, 1)
    make_adapter(server, 2)
    before = known(server)
    invoke("backup", str(tmp_path / "b.tgz"))
    remove_adapter(server, 1, 2)
    server.hset(keys.adapter("smol", "style"), "next", 7)
    assert "3 keys of the broker restored" in invoke("restore", str(tmp_path / "b.tgz"))
    assert known(server) == before
    assert server.get(keys.artifact("smol", "style", 1)) == b"weights \xff"
    assert server.hget(keys.adapter("smol", "style"), "next") == b"7", "a number is never given out twice"
    assert "0 keys of the broker restored" in invoke("restore", str(tmp_path / "b.tgz"))


def test_versions_that_were_made_since_stay_and_serve_next_to_those_that_a_restore_brings_back(
    server: Any, tmp_path: Path
) -> None:
    make_adapter(server, 1)
    make_adapter(server, 2)
    invoke("backup", str(tmp_path / "b.tgz"))
    make_adapter(server, 3)
    registry.change(server, "smol", "unload", "style", 1)
    invoke("restore", str(tmp_path / "b.tgz"))
    assert (list(known(server).versions), known(server).serving) == ([1, 2, 3], 3)


def test_a_number_that_no_version_had_yet_is_taken_from_the_backup(server: Any, tmp_path: Path) -> None:
    make_adapter(server, 5)
    invoke("backup", str(tmp_path / "b.tgz"))
    server.flushall()
    registry.register(server, "smol", "style", 1, {"rank": 2}, promote=True)
    invoke("restore", str(tmp_path / "b.tgz"))
    assert server.hget(keys.adapter("smol", "style"), "next") == b"5"


def test_the_files_of_a_version_are_not_put_under_the_number_of_another(server: Any, tmp_path: Path) -> None:
    make_adapter(server, 1)
    make_adapter(server, 2)
    invoke("backup", str(tmp_path / "b.tgz"))
    server.flushall()
    shutil.rmtree(load_settings().adapters)
    registry.register(server, "smol", "style", 1, {"rank": 64}, promote=True)
    assert "3 were there already" in invoke("restore", str(tmp_path / "b.tgz"))
    assert [path.name for path in (load_settings().adapters / "smol" / "style").iterdir()] == ["2"]
    assert server.get(keys.artifact("smol", "style", 1)) is None
    assert server.get(keys.artifact("smol", "style", 2)) is not None
    assert (known(server).serving, known(server).versions[1], known(server).versions[2]) == (
        1,
        {"rank": 64},
        {"rank": 8},
    )


def test_a_disk_that_was_lost_gets_the_versions_that_the_broker_still_knows(server: Any, tmp_path: Path) -> None:
    folder = make_adapter(server, 1)
    invoke("backup", str(tmp_path / "b.tgz"))
    shutil.rmtree(load_settings().adapters)
    invoke("restore", str(tmp_path / "b.tgz"))
    assert (folder / "adapters.safetensors").read_bytes() == b"weights \xff"


def test_what_a_new_broker_has_already_hides_nothing_that_a_restore_brings_back(server: Any, tmp_path: Path) -> None:
    policy.decide(server, "queue_limit", 77)
    policy.decide(server, "client_limit", 5)
    server.hset(keys.API_KEYS, mapping={"old": "an old key", "both": "as it was"})
    prefixes.pin(server.pipeline(), "smol", "old", "{}").execute()
    invoke("backup", str(tmp_path / "b.tgz"))
    server.flushall()
    policy.decide(server, "queue_limit", 3)
    server.hset(keys.API_KEYS, mapping={"new": "a new key", "both": "as it is"})
    prefixes.pin(server.pipeline(), "smol", "new", "{}").execute()
    changed = server.hget(keys.prefixes("smol"), prefixes.CHANGED)
    assert "3 keys of the broker restored" in invoke("restore", str(tmp_path / "b.tgz"))
    assert server.hgetall(keys.POLICY) == {b"queue_limit": b"3", b"client_limit": b"5"}
    assert server.hgetall(keys.API_KEYS) == {b"new": b"a new key", b"old": b"an old key", b"both": b"as it is"}
    assert set(server.hgetall(keys.prefixes("smol"))) == {b"old", b"new", prefixes.CHANGED.encode()}
    assert server.hget(keys.prefixes("smol"), prefixes.CHANGED) != changed, "workers look at what was changed"
    after = server.hget(keys.prefixes("smol"), prefixes.CHANGED)
    assert "0 keys of the broker restored" in invoke("restore", str(tmp_path / "b.tgz"))
    assert server.hget(keys.prefixes("smol"), prefixes.CHANGED) == after


@pytest.mark.parametrize("key", [keys.POLICY, keys.adapters("smol"), keys.adapter("smol", "style")])
def test_a_key_that_another_program_wrote_over_stays_in_a_restore(key: str, server: Any, tmp_path: Path) -> None:
    make_adapter(server, 1)
    policy.decide(server, "queue_limit", 77)
    invoke("backup", str(tmp_path / "b.tgz"))
    server.flushall()
    server.rpush(key, "mine")
    assert "keys of the broker restored; " in invoke("restore", str(tmp_path / "b.tgz"))
    assert server.lrange(key, 0, -1) == [b"mine"]


def members(path: Path) -> set[str]:
    with tarfile.open(path) as archive:
        return set(archive.getnames())


def test_a_backup_that_fails_leaves_the_one_before_as_it_was(server: Any, tmp_path: Path) -> None:
    make_run("job-1")
    target = tmp_path / "all" / "b.tgz"
    target.parent.mkdir()
    invoke("backup", str(target))
    before = target.read_bytes()

    def gone(*_: object, **__: object) -> Iterator[bytes]:
        raise RedisConnectionError("gone")

    with pytest.raises(RedisConnectionError):
        backup.backup(load_settings(), SimpleNamespace(scan_iter=gone), target)
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["b.tgz"]


@pytest.mark.parametrize("kind", ["text", "gzip", "tar", "pipe", "broken link", "folder"])
def test_a_backup_takes_the_place_of_a_former_one_and_of_nothing_else(server: Any, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "b.tgz"
    invoke("backup", str(target))
    invoke("backup", str(target))
    there = tmp_path / "there"
    if kind == "text":
        there.write_text("precious")
    elif kind == "gzip":
        there.write_bytes(gzip.compress(b"precious" * 200))
    elif kind == "tar":
        with tarfile.open(there, "w:gz") as archive:
            archive.add(target, "precious")
    elif kind == "pipe":
        os.mkfifo(there)
    elif kind == "broken link":
        there.symlink_to(tmp_path / "nothing")
    else:
        there.mkdir()
    before = there.lstat()
    with pytest.raises(InvalidRequest, match=r"is no backup of|a folder given; name the file"):
        invoke("backup", str(there))
    assert (there.lstat().st_ino, there.lstat().st_size) == (before.st_ino, before.st_size)


def test_a_restore_that_fails_leaves_no_half_file_and_may_be_run_again(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = archive_of(tmp_path / "b.tgz", ("runs/a/y", b"more"))

    def breaks(content: IO[bytes], file: IO[bytes]) -> None:
        file.write(content.read()[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", breaks)
        with pytest.raises(OSError, match="No space"):
            backup.restore(load_settings(), server, source)
    assert list((load_settings().runs / "a").iterdir()) == []
    assert backup.restore(load_settings(), server, source) == backup.Counted(2, 0)
    assert (load_settings().runs / "a" / "y").read_bytes() == b"more"


def test_what_links_lead_to_is_in_no_backup_and_a_link_is_never_restored_over(server: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    run = make_run("job-1")
    (run / "link").symlink_to(tmp_path / "secret")
    # Nor what is being written just now.
    (run / f"{DRAFT}log-1.jsonl").write_text("half")
    invoke("backup", str(tmp_path / "b.tgz"))
    assert {name for name in members(tmp_path / "b.tgz") if name.startswith("runs/")} == {
        "runs/job-1/run.json",
        "runs/job-1/log.jsonl",
    }
    (run / "run.json").unlink()
    (run / "run.json").symlink_to(tmp_path / "nowhere")
    restored = backup.restore(load_settings(), server, tmp_path / "b.tgz")
    assert (restored.files, restored.kept) == (0, ("runs/job-1/log.jsonl", "runs/job-1/run.json"))
    assert (run / "run.json").is_symlink()
    assert not (tmp_path / "nowhere").exists()


def test_a_file_that_goes_while_a_backup_is_made_is_left_out(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("job-1")
    before_opening(monkeypatch, "log.jsonl", lambda path: path.unlink())
    invoke("backup", str(tmp_path / "b.tgz"))
    assert {name for name in members(tmp_path / "b.tgz") if name.startswith("runs/")} == {"runs/job-1/run.json"}


def before_opening(monkeypatch: pytest.MonkeyPatch, name: str, do: Callable[[Path], object]) -> None:
    """Do something with each file of this name, once, when it is about to be opened."""
    opened, met = Path.open, set[Path]()

    def open_(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name and args == ("rb",) and path not in met:
            met.add(path)
            do(path)
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", open_)


def make_checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:08}"
    folder.mkdir(parents=True)
    for name in CHECKPOINT:
        (folder / name).write_text(f"of step {step}")
    return folder


CHECKPOINT = ("adapter_config.json", "adapter_model.safetensors", "stoker.json", "trainer.safetensors")


@pytest.mark.parametrize("met", CHECKPOINT)
def test_a_run_that_goes_on_while_a_backup_is_made_has_whole_checkpoints_in_it(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, met: str
) -> None:
    """It drops its oldest one with each that it writes."""
    run = make_run("job-1", status="running")
    first, second = (make_checkpoint(run, step) for step in (10, 20))

    def goes_on(path: Path) -> None:
        if path.parent == first:
            make_checkpoint(run, 30)
            remove_folder(first)

    before_opening(monkeypatch, met, goes_on)
    invoke("backup", str(tmp_path / "b.tgz"))
    found = [Path(name) for name in members(tmp_path / "b.tgz") if "/checkpoints/" in name]
    assert not first.exists()
    assert {path.parent.name for path in found} == {second.name}
    assert sorted(path.name for path in found) == [*CHECKPOINT]


def test_a_run_has_a_checkpoint_in_a_backup_though_all_that_were_listed_go_meanwhile(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("job-1", status="running")
    make_checkpoint(run, 10)
    make_checkpoint(make_run("job-0", status="running"), 10)

    def goes_on(path: Path) -> None:
        if "job-0" in path.parts:
            make_checkpoint(run, 20)
            remove_folder(run / "checkpoints" / "step-00000010")

    before_opening(monkeypatch, "run.json", goes_on)
    invoke("backup", str(tmp_path / "b.tgz"))
    names = {name for name in members(tmp_path / "b.tgz") if name.startswith("runs/job-1/checkpoints")}
    assert names == {f"runs/job-1/checkpoints/step-00000020/{name}" for name in CHECKPOINT}


def test_a_draft_that_goes_before_it_is_looked_into_hinders_neither_a_backup_nor_clean(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker writes a checkpoint meanwhile, and gives the draft its name a moment after it was listed."""
    draft, listed = make_run("job-1") / f"{DRAFT}checkpoint", os.scandir

    def goes(path: Any = ".") -> Any:
        if DRAFT in str(path):
            draft.rmdir()
        return listed(path)

    def backed_up() -> None:
        invoke("backup", str(tmp_path / "b.tgz"))
        names = {name for name in members(tmp_path / "b.tgz") if name.startswith("runs/")}
        assert names == {"runs/job-1/run.json", "runs/job-1/log.jsonl"}

    looks: list[Callable[[], object]] = [backed_up, lambda: storage.disk_use(load_settings())]
    looks += [lambda: storage.drafts(load_settings()), lambda: invoke("clean")]
    for look in looks:
        draft.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", goes)
            look()
        assert not draft.exists()


def test_what_a_backup_has_in_it_is_for_its_user_alone(server: Any, tmp_path: Path) -> None:
    make_run("job-1")
    make_adapter(server, 1)
    invoke("backup", str(tmp_path / "b.tgz"))
    with tarfile.open(tmp_path / "b.tgz") as archive:
        assert {member.mode for member in archive} == {0o600}
        assert all(abs(member.mtime - time.time()) < 600 for member in archive)


def test_a_backup_and_what_is_restored_of_it_are_for_their_user_alone(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(server, 1)
    source = tmp_path / "b.tgz"
    invoke("backup", str(source))
    fresh = tmp_path / "fresh"
    fresh.mkdir(mode=0o755)
    monkeypatch.setenv("STOKER_HOME", str(fresh))
    invoke("restore", str(source))
    assert {source: 0o600, fresh: 0o700} == {path: path.stat().st_mode & 0o777 for path in (source, fresh)}
    below = {path.is_dir(): path.stat().st_mode & 0o777 for path in sorted(fresh.rglob("*"))}
    assert below == {True: 0o700, False: 0o600}


def test_the_newest_run_of_an_adapter_is_the_newest_after_a_restore_too(server: Any, tmp_path: Path) -> None:
    make_run("job-1-newest", age=0.5)
    make_run("job-2-older", age=40 * DAY)
    before = invoke("runs", "list")
    invoke("backup", str(tmp_path / "b.tgz"))
    shutil.rmtree(load_settings().runs)
    invoke("restore", str(tmp_path / "b.tgz"))
    assert invoke("runs", "list") == before
    assert invoke("runs", "show", "style").startswith("job-1-newest")
    invoke("clean")
    assert [run.name for run in load_settings().runs.iterdir()] == ["job-1-newest"]


@pytest.mark.parametrize("changed", ["-1", "nan", "inf", "1e300"])
def test_a_file_whose_time_is_none_is_restored_as_one_of_now(changed: str, server: Any, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as archive:
        for name, data in (("backup.json", b'{"format": 1}'), ("runs/a/x", b"it")):
            entry = tarfile.TarInfo(name)
            entry.size, entry.pax_headers = len(data), {"mtime": changed}
            archive.addfile(entry, io.BytesIO(data))
    assert backup.restore(load_settings(), server, tmp_path / "b.tgz") == backup.Counted(1, 0)
    assert abs((load_settings().runs / "a" / "x").stat().st_mtime - time.time()) < 600


class Going:
    """The broker, where a key goes after its type was asked for."""

    def __init__(self, redis: Any, key: str) -> None:
        self._redis, self._key = redis, key

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)

    def type(self, key: bytes) -> Any:
        found = self._redis.type(key)
        if key.decode() == self._key:
            self._redis.delete(key)
        return found


@pytest.mark.parametrize("key", [keys.POLICY, keys.adapters("smol"), keys.artifact("smol", "style", 1)])
def test_a_key_that_goes_while_a_backup_is_made_is_left_out(key: str, server: Any, tmp_path: Path) -> None:
    policy.decide(server, "queue_limit", 77)
    make_adapter(server, 1)
    backup.backup(load_settings(), Going(server, key), tmp_path / "b.tgz")
    server.flushall()
    assert backup.restore(load_settings(), server, tmp_path / "b.tgz").keys == 3
    assert not server.exists(key)


def test_jobs_and_results_are_not_in_a_backup(fake: Callable[[], Client], server: Any, tmp_path: Path) -> None:
    with fake() as client:
        client.generate("a private prompt", model="smol")
    invoke("backup", str(tmp_path / "b.tgz"))
    with tarfile.open(tmp_path / "b.tgz") as archive:
        content = b"".join(file.read() for member in archive if (file := archive.extractfile(member)))
    assert b"private" not in content


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "adapters/../../evil", "elsewhere/x", "broker.json"])
def test_a_backup_with_a_name_that_leads_elsewhere_restores_nothing(name: str, server: Any, tmp_path: Path) -> None:
    make_run("job-1")
    good = tmp_path / "good.tgz"
    invoke("backup", str(good))
    evil = tmp_path / "evil.tgz"
    with tarfile.open(good) as source, tarfile.open(evil, "w:gz") as target:
        for member in source:
            target.addfile(member, source.extractfile(member))
        target.addfile(tarfile.TarInfo(name))
    invoke("runs", "remove", "job-1")
    with pytest.raises(InvalidRequest, match="Nothing was restored"):
        invoke("restore", str(evil))
    assert not (load_settings().runs / "job-1").exists()


def archive_of(target: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    """A backup with these after `backup.json`."""
    with tarfile.open(target, "w:gz") as archive:
        for member, content in (("backup.json", b'{"format": 1}'), ("runs/a/x", b"good"), *members):
            entry = tarfile.TarInfo(member) if isinstance(member, str) else member
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return target


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, "/etc/passwd"
    return entry


def key(**fields: Any) -> bytes:
    return json.dumps({"key": "stoker:policy", "type": "hash", "value": [["YQ==", "YQ=="]], **fields}).encode()


#: A member after a good one → what the error says.
WRONG_MEMBERS: list[tuple[str | tarfile.TarInfo, bytes, str]] = [
    *((link("runs/a/y", kind), b"", "runs/a/y") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)),
    *((link("runs/a/y", kind), b"", "runs/a/y") for kind in (tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE)),
    ("adapters", b"", "'adapters'"),
    ("runs/a/../b", b"", "runs/a/../b"),
    ("runs//a", b"", "runs//a"),
    ("runs/a/\0b", b"", "runs/a"),
    (f"runs/{'n' * 300}/y", b"", "nnn"),
    ("runs/" + "n/" * 600 + "y", b"", "n/n"),
    ("runs/" + "/".join(["n" * 200] * 5) + "/" + "y" * 20, b"", "nnn"),
    ("runs/a/x/y", b"", "runs/a/x is a folder in it, and a file too"),
    ("runs/a/x", b"", "twice"),
    ("broker.jsonl", b"[" * 100_000, "no whole backup"),
    ("broker.jsonl", b"\xff\n", "no whole backup"),
    ("broker.jsonl", b"9" * 5000, "no whole backup"),
    ("broker.jsonl", b"[]", "no key of a backup"),
    ("broker.jsonl", key() + b"\n" + key(key=["a"]), "no key of a backup"),
    ("broker.jsonl", key() + b"\n" + key(key="stoker:job:a"), "stoker:job:a' is no key of a backup"),
    ("broker.jsonl", key(type="string", value="YQ=="), "of another type"),
    ("broker.jsonl", key(value=[]), "empty"),
    ("broker.jsonl", key(value=[["YQ=="]]), "value of stoker:policy"),
    ("broker.jsonl", key(value={"YQ==": 3}), "value of stoker:policy"),
    ("broker.jsonl", key(value=[[3, 4]]), "value of stoker:policy"),
    ("broker.jsonl", key(value=[["%%", "YQ=="]]), "value of stoker:policy"),
]


@pytest.mark.parametrize(("member", "content", "said"), WRONG_MEMBERS)
def test_one_wrong_member_of_a_backup_is_one_error_and_nothing_is_restored(
    member: str | tarfile.TarInfo, content: bytes, said: str, server: Any, tmp_path: Path
) -> None:
    wrong = archive_of(tmp_path / "wrong.tgz", (member, content))
    with pytest.raises(InvalidRequest, match=re.escape(said)):
        invoke("restore", str(wrong))
    assert not load_settings().runs.exists()
    assert server.keys("*") == []


@pytest.mark.parametrize("about", [b"[]", b"3", b'{"format": [1]}', b'{"format": "1"}', b"[" * 60_000, b" " * 70_000])
def test_a_backup_whose_first_member_says_nothing_of_a_backup_is_refused(
    about: bytes, server: Any, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "wrong", "w:gz") as archive:
        entry = tarfile.TarInfo("backup.json")
        entry.size = len(about)
        archive.addfile(entry, io.BytesIO(about))
    with pytest.raises(InvalidRequest, match=r"this release reads format 1|no whole backup"):
        invoke("restore", str(tmp_path / "wrong"))


def test_a_header_that_fills_the_memory_is_not_read(server: Any, tmp_path: Path) -> None:
    """A few packed kilobytes say what takes megabytes."""
    entry = tarfile.TarInfo("adapters/m/a")
    entry.pax_headers = {"comment": "x" * (backup.MAX_HEADER + 1)}
    wrong = archive_of(tmp_path / "b.tgz", (entry, b""))
    assert wrong.stat().st_size < 10_000
    with pytest.raises(InvalidRequest, match=f"at most {backup.MAX_HEADER} are read"):
        invoke("restore", str(wrong))


def test_an_archive_of_too_many_files_is_refused_before_all_are_known(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "MAX_FILES", 3)
    wrong = archive_of(tmp_path / "b.tgz", *((f"adapters/m/{number}", b"") for number in range(3)))
    with pytest.raises(InvalidRequest, match="more than 3 files"):
        invoke("restore", str(wrong))
    assert not (load_settings().home / "adapters").exists()


def test_a_restore_below_what_is_a_file_here_restores_nothing(server: Any, tmp_path: Path) -> None:
    wrong = archive_of(tmp_path / "b.tgz", ("adapters/m/a", b""))
    (load_settings().home / "adapters").mkdir(parents=True)
    (load_settings().home / "adapters" / "m").write_text("mine")
    with pytest.raises(InvalidRequest, match="adapters/m is a folder in it, and a file too"):
        invoke("restore", str(wrong))
    assert not load_settings().runs.exists()


def test_a_key_that_another_program_wrote_over_is_in_no_backup(server: Any, tmp_path: Path) -> None:
    server.set("stoker:policy", "mine")
    invoke("backup", str(tmp_path / "b.tgz"))
    assert "0 keys" in invoke("restore", str(tmp_path / "b.tgz"))


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b\x08\x00 cut"])
def test_a_file_that_is_no_backup_is_refused(content: bytes, server: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"no whole backup|format None"):
        invoke("restore", str(tmp_path / "file"))


def test_a_backup_that_was_cut_is_refused(server: Any, tmp_path: Path) -> None:
    make_adapter(server, 1)
    invoke("backup", str(tmp_path / "whole"))
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidRequest, match="no whole backup"):
        invoke("restore", str(tmp_path / "cut"))


def test_a_backup_has_every_durable_kind_of_key_except_those_of_jobs_under_way() -> None:
    durable = {kind.name for kind in keys.KINDS if kind.lifetime is None}
    assert durable - set(KINDS) == {"ready", "binding", "unacked", "leases", "sweep"}
