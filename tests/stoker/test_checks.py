"""`stoker doctor`: all green on a healthy machine; else what is wrong, and what to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker.local.checks import Check, check_broker, check_compiler, check_disk, check_home, judged, of_machine
from stoker.settings import Settings, load_settings

HEALTHY = {
    "valkey_version": "8.1",
    "maxmemory_policy": "noeviction",
    "maxmemory": 0,
    "used_memory": 5 << 20,
    "aof_last_write_status": "ok",
}


def test_a_healthy_machine_is_all_green_before_and_after_its_broker_starts(broker: Settings) -> None:
    assert [check for check in of_machine(load_settings()) if not check.ok] == []
    found = check_broker(broker)
    assert found.ok, found
    assert found.remedy == ""


@pytest.mark.parametrize(
    ("said", "what", "remedy"),
    [
        ({"maxmemory_policy": "allkeys-lru"}, "would drop jobs", "noeviction"),
        ({"maxmemory": 5 << 20}, "about to refuse jobs", "raise maxmemory"),
        ({"aof_last_write_status": "err"}, "cannot write to its disk", "free its disk"),
        ({"rdb_last_bgsave_status": "err"}, "cannot write to its disk", "free its disk"),
    ],
)
def test_a_broker_that_would_lose_or_refuse_jobs_is_named(said: dict[str, Any], what: str, remedy: str) -> None:
    found = judged("here", {**HEALTHY, **said})
    assert not found.ok
    assert what in found.detail
    assert remedy in found.remedy
    assert judged("here", {**HEALTHY, "maxmemory": 1 << 30}).ok


@pytest.mark.parametrize(
    ("said", "found", "ok"),
    [
        (
            {"redis_version": "7.0", "maxmemory_policy": "noeviction", "used_memory": 3 * 2**20},
            "7.0, noeviction, 3 MB",
            True,
        ),
        (
            {
                "redis_version": "7.2",
                "valkey_version": "8.1",
                "maxmemory_policy": "noeviction",
                "maxmemory": 2**30,
                "used_memory": 2**29,
            },
            "8.1, noeviction, 512 of 1024 MB",
            True,
        ),
        (
            {
                "redis_version": "7.0",
                "maxmemory_policy": "noeviction",
                "maxmemory": 100 * 2**20,
                "used_memory": 95 * 2**20,
            },
            "7.0, noeviction, 95 of 100 MB",
            True,
        ),
        (
            {
                "redis_version": "7.0",
                "maxmemory_policy": "noeviction",
                "maxmemory": 100 * 2**20,
                "used_memory": 95 * 2**20 + 1,
            },
            "7.0, noeviction, 95 of 100 MB: it is about to refuse jobs",
            False,
        ),
    ],
)
def test_a_broker_is_shown_with_its_version_its_policy_and_its_memory(
    said: dict[str, Any], found: str, ok: bool
) -> None:
    check = judged("here", said)
    assert (check.detail, check.ok) == (f"here, version {found}", ok)


def test_a_broker_that_was_chosen_and_does_not_answer_is_a_fault() -> None:
    found = check_broker(load_settings(url="redis://127.0.0.1:1/0", patience=0))
    assert not found.ok
    assert found.remedy == "start it, or correct --url"


def test_a_home_that_can_be_made_is_well_and_one_that_is_a_file_is_not(tmp_path: Path) -> None:
    assert check_home(load_settings(home=tmp_path / "not/yet")).ok
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o755)  # a program, which a folder's rights are not distinguished from
    found = check_home(load_settings(home=tmp_path / "file/home"))
    assert not found.ok
    assert "no folder" in found.detail
    assert "STOKER_HOME" in found.remedy


def test_a_folder_of_other_programs_is_no_home(tmp_path: Path) -> None:
    (tmp_path / "Makefile").touch()
    found = check_home(load_settings(home=tmp_path))
    assert (found.ok, found.detail) == (
        False, f"{tmp_path} has things in it that are not Stoker's, such as 'Makefile'"
    )  # fmt: skip
    assert "another folder" in found.remedy


@pytest.mark.parametrize("below", ["", "home"])
def test_a_home_on_a_disk_that_is_not_there_is_named_with_where_it_leads(tmp_path: Path, below: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    found = check_home(load_settings(home=tmp_path / "link" / below))
    assert not found.ok
    assert found.detail == f"{tmp_path / 'link'} leads to {tmp_path / 'disk'}, which is not there"
    (tmp_path / "disk").mkdir()
    assert check_home(load_settings(home=tmp_path / "link" / below)).ok


def test_a_home_that_is_not_writable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # For the user root every folder is writable.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = check_home(load_settings(home=tmp_path))
    assert (found.ok, "not writable" in found.detail) == (False, True)


def test_a_disk_that_is_nearly_full_is_named_with_what_to_delete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    found = check_disk(load_settings())
    assert not found.ok
    assert found.detail.startswith("1.0 GB free for ")
    assert "stoker clean" in found.remedy


def test_what_is_well_needs_no_remedy() -> None:
    for check in of_machine(load_settings()):
        assert isinstance(check, Check)
        assert check.ok == (check.remedy == "")


@pytest.mark.parametrize(("there", "said"), [("g++", "/bin/g++"), ("clang++", "/bin/clang++"), ("", "none: ")])
def test_any_compiler_will_do(monkeypatch: pytest.MonkeyPatch, there: str, said: str) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if name == there else None)
    found = check_compiler()
    assert found.ok
    assert found.detail.startswith(said)
