"""What stored files hold: parts in a folder of this machine, or in a store that fsspec knows."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stoker.errors import ConfigError
from stoker.files.contents import Contents, FolderContents, StoreContents, contents_of, there_are
from stoker.files.stores import opened
from stoker.settings import Settings
from tests import bucket, powercut

Make = Callable[[Path], Contents]
MAKERS = [
    pytest.param(lambda folder: FolderContents(folder / "files"), id="folder"),
    pytest.param(lambda folder: StoreContents(f"file://{folder}/store/"), id="store"),
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_part_is_what_was_put_there_until_its_file_is_removed(tmp_path: Path, make: Make) -> None:
    contents = make(tmp_path)
    for file_id, part, data in (("a", "w-0", b"one"), ("a", "w-1", b"two"), ("b", "w-0", b"three"), ("a", "v-0", b"")):
        contents.put(file_id, part, data)
    assert [make(tmp_path).get("a", part) for part in ("w-0", "w-1", "v-0")] == [b"one", b"two", b""]
    for _ in range(2):
        contents.remove("a")
    for part in ("w-0", "w-1", "v-0"):
        with pytest.raises(FileNotFoundError):
            contents.get("a", part)
    assert contents.get("b", "w-0") == b"three"
    contents.remove("never there")
    contents.put("a", "w-0", b"anew")
    assert contents.get("a", "w-0") == b"anew"


@pytest.mark.parametrize("make", MAKERS)
def test_who_opens_the_same_place_says_that_it_is_the_same(tmp_path: Path, make: Make) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    for folder in (first, other):
        folder.mkdir()
    assert make(first).place == make(first).place
    assert make(first).place != make(other).place
    assert len(make(first).place) == 16


def test_the_parts_of_a_folder_are_for_this_user_alone(tmp_path: Path) -> None:
    FolderContents(tmp_path / "files").put("a", "w-0", b"secret")
    assert (tmp_path / "files/a/w-0").stat().st_mode & 0o777 == 0o600


def test_a_part_is_whole_or_not_there_at_every_cut_and_there_once_it_is_said_so(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with powercut.recorded(home) as disk:
        contents = FolderContents(home / "files")
        contents.put("a", "w-0", b"one" * 9)
        disk.mark("w-0")
        contents.put("a", "w-1", b"two" * 9)
        disk.mark("w-1")
    for cut in disk.cuts():
        place = cut.tree.get("files/place")
        assert place in (None, contents.place.encode()), cut
        assert place is not None or not cut.marks, cut
        for part, data in (("w-0", b"one" * 9), ("w-1", b"two" * 9)):
            found = cut.tree.get(f"files/a/{part}")
            assert found in ((data,) if part in cut.marks else (None, data)), cut


def test_parts_that_another_gateway_deletes_at_the_same_time_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents, plain = FolderContents(tmp_path / "files"), shutil.rmtree
    contents.put("a", "w-0", b"one")

    def second(path: Any, *more: Any, **options: Any) -> None:
        plain(path, *more, **options)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(shutil, "rmtree", second)
    contents.remove("a")
    assert not (tmp_path / "files/a").exists()


def test_parts_that_cannot_be_deleted_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = FolderContents(tmp_path / "files")
    contents.put("a", "w-0", b"one")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError):
        contents.remove("a")


def test_files_lie_in_the_store_that_is_named_and_else_in_the_home(tmp_path: Path) -> None:
    own = Settings(home=tmp_path / "home")
    assert not there_are(own), "none was stored, and to look makes no folder"
    assert not (tmp_path / "home").exists()
    contents_of(own).put("a", "w-0", b"one")
    assert there_are(own)
    assert (tmp_path / "home/files/a/w-0").read_bytes() == b"one"
    named = Settings(home=tmp_path / "none", artifacts=f"file://{tmp_path}/store")
    assert there_are(named), "another gateway may have stored some"
    contents_of(named).put("a", "w-0", b"two")
    assert (tmp_path / "store/.files/a/w-0").read_bytes() == b"two"
    assert not (tmp_path / "none").exists()


def test_a_store_that_nobody_knows_is_said_by_the_name_of_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"STOKER_ARTIFACTS: 'nowhere://x' cannot be used"):
        contents_of(Settings(home=tmp_path, artifacts="nowhere://x"))


def test_an_error_of_a_stores_own_kind_is_one_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = StoreContents(f"file://{tmp_path}")
    contents.put("a", "w-0", b"one")

    class Broken(Exception):
        pass

    def fail(*_: Any, **__: Any) -> None:
        raise Broken("out of order")

    import fsspec.implementations.local

    for name in ("pipe_file", "cat_file", "rm"):
        monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, name, fail)
    for ask in (lambda: contents.put("a", "w-1", b""), lambda: contents.get("a", "w-0"), lambda: contents.remove("a")):
        with pytest.raises(OSError, match="Broken: out of order"):
            ask()


def test_a_part_that_another_gateway_wrote_goes_with_its_file(tmp_path: Path) -> None:
    contents = StoreContents(f"bucket://{tmp_path}")
    contents.put("a", "w-0", b"one")
    fs, root = opened(f"bucket://{tmp_path}")
    assert len(fs.ls(f"{root}/.files/a")) == 1
    bucket.another_process_writes(f"{tmp_path}/.files/a/v-0", b"two")
    contents.remove("a")
    for part in ("w-0", "v-0"):
        with pytest.raises(FileNotFoundError):
            contents.get("a", part)
