"""The names of workers: the same after a restart, and never two of one."""

from __future__ import annotations

import errno
import platform
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from stoker.errors import ConfigError
from stoker.local import naming
from stoker.local.naming import home_id, take_name
from stoker.settings import Settings


def settings(home: Path, *models: str) -> Settings:
    return Settings(home=home, models=models or ("all-minilm-l6-v2",))


def name_of(chosen: Settings) -> str:
    name, lock = take_name(chosen)
    lock.close()
    return name


def test_a_worker_has_the_same_name_each_time_that_it_starts(tmp_path: Path) -> None:
    first = name_of(settings(tmp_path, "all-minilm-l6-v2", "smollm2-135m-instruct"))
    assert first == name_of(settings(tmp_path, "smollm2-135m-instruct", "all-minilm-l6-v2"))
    assert first.endswith(f"@{platform.node()}")


def test_other_models_and_another_home_are_another_worker(tmp_path: Path) -> None:
    names = [name_of(settings(tmp_path)), name_of(settings(tmp_path, "mine=/models/a"))]
    names.append(name_of(settings(tmp_path / "other")))
    assert len(set(names)) == 3


def test_workers_of_two_machines_of_one_name_and_one_home_have_names_of_their_own(tmp_path: Path) -> None:
    """As two new Macs, "MacBook-Pro.local", of a user "admin" on both."""
    names, homes = set[str](), set[str]()
    for _ in range(2):
        chosen = settings(tmp_path / "admin" / ".stoker")
        assert name_of(chosen) == name_of(chosen)
        names.add(name_of(chosen))
        homes.add(home_id(chosen))
        # The path is that of the other machine from here on.
        shutil.rmtree(tmp_path / "admin")
    assert len(names) == len(homes) == 2


def test_a_home_on_a_disk_without_links_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    assert name_of(settings(tmp_path)) == name_of(settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["identity"]


def test_of_two_workers_that_run_each_has_a_name_of_its_own(tmp_path: Path) -> None:
    first, lock = take_name(settings(tmp_path))
    second, other = take_name(settings(tmp_path))
    assert second == first.replace("@", "-2@", 1)
    lock.close()
    assert name_of(settings(tmp_path)) == first, "it is free again"
    other.close()


def test_a_machine_runs_so_many_workers_of_the_same_models_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naming, "MOST", 3)
    with ExitStack() as stack:
        names = []
        for _ in range(3):
            name, lock = take_name(settings(tmp_path))
            stack.enter_context(lock)
            names.append(name.partition("@")[0])
        assert names == [names[0], f"{names[0]}-2", f"{names[0]}-3"]
        with pytest.raises(ConfigError, match="3 workers of these models run on this machine already"):
            take_name(settings(tmp_path))
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "workers").iterdir()} == {0o600}


def test_a_home_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "workers").write_text("a file")
    with pytest.raises(ConfigError, match="STOKER_HOME"):
        take_name(settings(tmp_path))


def test_a_home_whose_name_is_no_utf_8_gives_a_name_too(tmp_path: Path) -> None:
    assert name_of(settings(tmp_path / "\udcff")).isascii()
