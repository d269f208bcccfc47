"""How many ended runs a machine keeps: what goes beyond the limits, and what never does."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.cli import app
from stoker.files.durable import remove_folder
from stoker.local import keeping
from stoker.local.keeping import over_limits, remove_over_limits, sent_again
from stoker.local.runs import StoredRun
from stoker.settings import Settings, load_settings
from tests.stoker.test_housekeeping import DAY, invoke, make_run
from workers.services.housekeeping import Housekeeping

NOW = time.time()


def limited(runs: int = 200, days: int = 90, megabytes: int = 20_480) -> Settings:
    return load_settings(keep_runs=runs, keep_days=days, keep_megabytes=megabytes)


def never(run: StoredRun) -> bool:
    """No job was sent again."""
    return False


def removed(settings: Settings) -> set[str]:
    return {leftover.path.name for leftover in remove_over_limits(settings, NOW, never)}


def names() -> set[str]:
    return {path.name for path in load_settings().runs.iterdir()}


def grow(folder: Path, megabytes: int) -> None:
    (folder / "weights").write_bytes(os.urandom(megabytes << 20))


def test_the_oldest_ended_runs_beyond_the_number_go() -> None:
    for number in range(5):
        make_run(f"run-{number}", age=number * DAY)
    assert removed(limited(runs=3)) == {"run-3", "run-4"}
    assert names() == {"run-0", "run-1", "run-2"}
    assert removed(limited(runs=3)) == set()


def test_ended_runs_that_are_older_than_the_days_go() -> None:
    for days in (0, 10, 31, 40):
        make_run(f"days-{days}", age=days * DAY)
    assert removed(limited(days=30)) == {"days-31", "days-40"}


def test_the_oldest_go_until_the_rest_has_no_more_than_the_megabytes() -> None:
    for number in range(4):
        grow(make_run(f"run-{number}", age=number * DAY), 2)
    assert removed(limited(megabytes=5)) == {"run-2", "run-3"}


def test_what_is_open_pinned_or_the_newest_of_its_adapter_stays_with_any_limits() -> None:
    make_run("open", status="running", age=400 * DAY)
    make_run("pinned", age=400 * DAY)
    assert "pinned: pinned" in invoke("runs", "pin", "pinned")
    make_run("newest", age=300 * DAY)
    make_run("only-of-another", "other", age=400 * DAY)
    make_run("goes", age=399 * DAY)
    assert [found.path.name for found in over_limits(limited(runs=1, days=1, megabytes=1), NOW, never)] == ["goes"]
    assert removed(limited(runs=1, days=1, megabytes=1)) == {"goes"}
    invoke("runs", "pin", "pinned", "--off")
    assert removed(limited(runs=1, days=1, megabytes=1)) == {"pinned"}
    assert names() == {"open", "newest", "only-of-another"}


def test_a_run_that_cannot_be_read_stays_and_hinders_no_other() -> None:
    broken = make_run("broken", age=400 * DAY)
    (broken / "run.json").write_text("{")
    make_run("old", age=400 * DAY)
    make_run("new")
    assert removed(limited()) == {"old"}
    assert names() == {"broken", "new"}


def test_a_run_that_goes_on_meanwhile_is_left_to_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job was sent again between the look and the removal."""
    folder = make_run("again", age=400 * DAY)
    make_run("new")
    found = over_limits(limited(), NOW, never)
    (folder / "run.json").write_text(json.dumps({"request": {"name": "style", "steps": 1}, "status": "running"}))
    monkeypatch.setattr(keeping, "over_limits", lambda *_: found)
    assert removed(limited()) == set()
    assert folder.exists()


def test_a_run_that_another_process_removes_meanwhile_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        make_run(f"job-{number}", age=(9 - number) * DAY)
    settings = load_settings(keep_runs=1)

    def raced(folder: Path) -> None:
        if folder.name == "job-0":
            raise FileNotFoundError(2, "No such file or directory", str(folder.parent))
        remove_folder(folder)

    monkeypatch.setattr(keeping, "remove_folder", raced)
    gone = keeping.remove_over_limits(settings, time.time(), never)
    assert [leftover.path.name for leftover in gone] == ["job-1", "job-2"]


def test_a_worker_removes_them_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    make_run("old", age=91 * DAY)
    make_run("new")
    with caplog.at_level(logging.INFO):
        Housekeeping(load_settings(), never, time.time).round()
    assert names() == {"new"}
    assert "old: removed (a run of style beyond what is kept)" in caplog.text


def test_clean_does_the_same_by_hand_and_the_disks_table_shows_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        make_run(f"run-{number}", age=number * DAY)
    monkeypatch.setenv("STOKER_KEEP_RUNS", "2")
    shown = invoke("status", "--disk")
    assert (
        "at most 2 ended runs, 90 days, 20480 MB (STOKER_KEEP_RUNS, STOKER_KEEP_DAYS, STOKER_KEEP_MEGABYTES)" in shown
    )
    assert "1 runs and logs would be deleted" in invoke("clean", "--dry-run")
    assert "1 runs and logs deleted" in invoke("clean")
    assert names() == {"run-0", "run-1"}


def test_adapters_of_one_name_and_of_different_models_have_each_a_newest_run() -> None:
    for number, model in enumerate(("one", "other")):
        folder = make_run(f"run-{model}", age=(number + 1) * DAY)
        facts = json.loads((folder / "run.json").read_text())
        changed = (folder / "run.json").stat().st_mtime
        (folder / "run.json").write_text(json.dumps({**facts, "request": {**facts["request"], "model": model}}))
        os.utime(folder / "run.json", (changed, changed))
    assert removed(limited(runs=1)) == set()


def test_a_failed_run_whose_job_was_sent_again_stays_until_that_has_ended(broker: Settings) -> None:
    for number, run in enumerate(("waits", "failed", "done")):
        make_run(run, status="done" if run == "done" else "failed", age=(400 + number) * DAY)
    make_run("new")
    with closing(connect(broker)) as redis:
        for run in ("waits", "failed", "done"):
            redis.hset(keys.job(run), Field.KIND, "train")
            redis.expire(keys.job(run), 60)
        redis.set(keys.result("failed"), "{}", ex=60)
        Housekeeping(limited(), sent_again(redis), time.time).round()
        assert names() == {"waits", "new"}
        redis.set(keys.result("waits"), "{}", ex=60)
        Housekeeping(limited(), sent_again(redis), time.time).round()
        assert names() == {"new"}


def test_clean_leaves_a_failed_run_whose_job_was_sent_again(broker: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("waits", status="failed", age=400 * DAY)
    make_run("done", age=400 * DAY)
    make_run("new")
    monkeypatch.setenv("STOKER_URL", broker.address.url)
    with closing(connect(broker)) as redis:
        redis.hset(keys.job("waits"), Field.KIND, "train")
        redis.expire(keys.job("waits"), 60)
    assert "1 runs and logs deleted" in invoke("clean")
    assert names() == {"waits", "new"}


def test_clean_leaves_failed_runs_where_the_broker_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for run in ("one", "other"):
        make_run(run, status="failed", age=400 * DAY)
    make_run("done", age=400 * DAY)
    make_run("new")
    monkeypatch.setenv("STOKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("STOKER_PATIENCE", "0")
    done = CliRunner().invoke(app, ["clean"])
    assert done.exit_code == 0, done.output
    assert names() == {"one", "other", "new"}
    assert done.stderr.count("runs that failed stay") == 1
