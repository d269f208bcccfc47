"""The disk that loses its power finds the mistakes that it is there for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests import powercut
from tests.powercut import Cut

OLD, NEW = b"old " * 10, b"new content " * 10


def cuts_of(folder: Path, action: Callable[[Path], object]) -> list[Cut]:
    folder.mkdir()
    (folder / "file").write_bytes(OLD)
    with powercut.recorded(folder) as disk:
        action(folder)
    return disk.cuts()


def found(cuts: list[Cut]) -> set[bytes | None]:
    return {cut.tree.get("file") for cut in cuts}


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def draft(folder: Path) -> Path:
    path = folder / "draft"
    path.write_bytes(NEW)
    return path


def test_a_file_that_is_flushed_renamed_and_whose_folder_is_flushed_is_the_old_or_the_new(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        path = draft(folder)
        sync(path)
        path.replace(folder / "file")
        sync(folder)

    cuts = cuts_of(tmp_path / "a", write)
    assert found(cuts) == {OLD, NEW}
    assert found([cut for cut in cuts if cut.finished]) == {NEW}


def test_a_rename_without_a_flush_of_the_file_leaves_it_empty_or_torn(tmp_path: Path) -> None:
    cuts = cuts_of(tmp_path / "a", lambda folder: draft(folder).replace(folder / "file"))
    assert {b"", NEW[: len(NEW) // 2]} < found(cuts)


def test_a_rename_without_a_flush_of_the_folder_is_undone(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        path = draft(folder)
        sync(path)
        path.replace(folder / "file")

    last = [cut for cut in cuts_of(tmp_path / "a", write) if cut.finished]
    assert found(last) == {OLD, NEW}
    assert {cut.tree["file"] for cut in last if cut.how == "nothing unsafe kept"} == {OLD}


def test_every_write_of_a_file_that_is_overwritten_is_a_point_of_its_own(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        with (folder / "file").open("wb", buffering=0) as file:
            for part in (NEW[:12], NEW[12:24], NEW[24:]):
                file.write(part)

    cuts = cuts_of(tmp_path / "a", write)
    killed = [cut.tree["file"] for cut in cuts if cut.how == "killed"]
    assert killed == [OLD, b"", NEW[:12], NEW[:24], NEW]
    assert OLD in found([cut for cut in cuts if cut.finished])


def test_a_file_that_takes_a_deleted_ones_place_does_not_inherit_what_was_safe_of_it(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "file").unlink()
        sync(folder)
        (folder / "file").write_bytes(NEW)

    last = [cut for cut in cuts_of(tmp_path / "a", write) if cut.finished]
    assert {cut.tree.get("file") for cut in last if cut.how == "names kept, contents lost"} == {b""}
    assert {cut.tree.get("file") for cut in last if cut.how == "nothing unsafe kept"} == {None}


def test_a_folder_that_is_made_is_there_when_its_parent_was_flushed(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "made").mkdir()
        (folder / "made" / "inside").write_bytes(NEW)
        sync(folder / "made" / "inside")
        sync(folder / "made")

    last = [cut for cut in cuts_of(tmp_path / "a", write) if cut.finished]
    lost = next(cut for cut in last if cut.how == "nothing unsafe kept")
    assert "made" not in lost.tree
    kept = next(cut for cut in last if cut.how == "names kept, contents lost")
    assert kept.tree["made/inside"] == NEW


def test_what_was_promised_is_known_at_each_point_and_a_state_comes_back_as_files(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    with powercut.recorded(folder) as disk:
        (folder / "sub").mkdir()
        (folder / "sub" / "one").write_text("1")
        disk.mark("one")
        (folder / "two").write_text("2")
    cuts = disk.cuts()
    assert {cut.marks for cut in cuts} == {(), ("one",)}
    with [cut for cut in cuts if cut.how == "killed"][-1].restored(tmp_path / "after") as after:
        assert (after / "sub" / "one").read_text() == "1"
        assert (after / "two").read_text() == "2"
    assert not (tmp_path / "after").exists()
