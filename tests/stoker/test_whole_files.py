"""Files and folders: whole or not at all, on disk once it is said so, and without what dead writers left."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.platform import jsonfiles
from engine.platform.jsonfiles import write_json
from stoker.errors import ModelError
from stoker.files import durable
from stoker.files.durable import DRAFT, draft_folder, publish, remove_folder, sweep, write_whole
from tests import powercut

#: A process that begins a draft and waits: of a file, of a folder.
WRITER = """
import sys
from pathlib import Path
from stoker.files.durable import draft_folder, write_whole

def wait(draft):
    (draft / "half" if draft.is_dir() else draft).write_text("half")
    print("begun", flush=True)
    sys.stdin.read()

home = Path(sys.argv[1])
if sys.argv[2] == "file":
    write_whole(home / "notes.json", wait)
else:
    with draft_folder(home) as draft:
        wait(draft)
"""


def fill(folder: Path) -> None:
    """As the copies of a model's files are made: without a flush of their own."""
    (folder / "weights").write_bytes(b"new" * 9)
    (folder / "sub").mkdir()
    (folder / "sub/notes").write_text("new")


def write_folder(target: Path) -> bool:
    with draft_folder(target.parent) as draft:
        fill(draft)
        return publish(draft, target)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_the_old_or_the_new_whenever_the_power_fails(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    path = tmp_path / "disk/notes.json"
    write_json(path, {"old": 1})
    old = path.read_bytes()
    with powercut.recorded(tmp_path / "disk") as disk:
        write_json(path, {"new": [1, 2, 3]})
    new = path.read_bytes()
    for cut in disk.cuts():
        assert cut.tree["notes.json"] in ((new,) if cut.finished else (old, new)), cut


def test_a_folder_is_there_whole_or_not_whenever_the_power_fails_and_so_are_those_above_it(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with powercut.recorded(tmp_path / "disk") as disk:
        assert write_folder(tmp_path / "disk/a/b/1")
    for cut in disk.cuts():
        found = {name: content for name, content in cut.tree.items() if name.startswith("a/b/1/")}
        assert cut.finished <= bool(found), cut
        if found:
            assert found == {"a/b/1/weights": b"new" * 9, "a/b/1/sub": None, "a/b/1/sub/notes": b"new"}, cut


def test_a_folder_that_another_writer_made_is_on_disk_when_it_is_found_there(tmp_path: Path) -> None:
    """Its writer may have been killed between the rename and the flush, and the power goes later."""
    (tmp_path / "disk").mkdir()
    plain = durable.flush

    def die(path: Path) -> None:
        if path == tmp_path / "disk" and (path / "1").exists():
            raise KeyboardInterrupt
        plain(path)

    with powercut.recorded(tmp_path / "disk") as disk:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(durable, "flush", die)
            with pytest.raises(KeyboardInterrupt):
                write_folder(tmp_path / "disk/1")
        assert not write_folder(tmp_path / "disk/1"), "it stays as it is"
    assert all("1/sub/notes" in cut.tree for cut in disk.cuts() if cut.finished)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_draft_of_a_writer_stays_while_it_lives_and_goes_once_it_was_killed(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        sweep(tmp_path)
        (draft,) = names(tmp_path)
        assert draft.startswith(DRAFT)
        write_json(tmp_path / "other.json", {})
        assert draft in names(tmp_path), "nor does another writer take it away"
        process.kill()
    write_json(tmp_path / "other.json", {})
    assert names(tmp_path) == ["other.json"]


def test_what_others_call_a_draft_is_not_swept(tmp_path: Path) -> None:
    for name in (".draft-mine", ".notes-old.json", "draft"):
        (tmp_path / name).write_text("mine")
    write_json(tmp_path / "notes.json", {})
    assert names(tmp_path) == [".draft-mine", ".notes-old.json", "draft", "notes.json"]


@pytest.mark.parametrize(("module", "call"), [(durable, "try_lock"), (tempfile, "mkdtemp")])
def test_a_draft_that_was_swept_before_its_lock_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, call: str
) -> None:
    plain, made = getattr(module, call), 0

    def swept(*arguments: Any, **options: Any) -> Any:
        nonlocal made
        made += 1
        result = plain(*arguments, **options)
        if made == 1:
            (draft,) = tmp_path.iterdir()
            draft.rmdir()
        return result

    monkeypatch.setattr(module, call, swept)
    assert write_folder(tmp_path / "1")
    assert made == 2
    assert names(tmp_path) == ["1"]


def test_a_file_system_without_locks_is_written_to_and_never_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / f"{DRAFT}perhaps-alive").mkdir()
    monkeypatch.setattr(fcntl, "flock", unknown)
    assert write_folder(tmp_path / "1")
    assert names(tmp_path) == [f"{DRAFT}perhaps-alive", "1"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("write", [lambda path: write_json(path, {"new": 1}), write_folder], ids=["file", "folder"])
def test_a_disk_that_refuses_any_call_is_said_and_leaves_no_draft(
    tmp_path: Path, error: int, write: Callable[[Path], object]
) -> None:
    path = tmp_path / "1"
    for raised in powercut.each_refusal(error, lambda: write(path)):
        assert raised is None or (isinstance(raised, OSError) and raised.errno == error), raised
        if error == errno.ENOSPC:
            assert names(tmp_path) in ([], ["1"])
    assert names(tmp_path) == ["1"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "notes.json", {"old": 1})

    def fail(draft: Path) -> None:
        draft.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as refusal:
        write_whole(tmp_path / "notes.json", fail)
    assert refusal.value.filename == str(tmp_path / "notes.json"), "the file that was to be, not its draft"
    assert names(tmp_path) == ["notes.json"]
    assert "old" in (tmp_path / "notes.json").read_text()


def test_a_file_of_json_is_read_up_to_its_limit_and_not_beyond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 12345}')
    monkeypatch.setattr(jsonfiles, "MAX_BYTES", 12)
    assert jsonfiles.read_json(path) == jsonfiles.read_object(path) == {"a": 12345}
    monkeypatch.setattr(jsonfiles, "MAX_BYTES", 11)
    with pytest.raises(ModelError, match="more than 11 bytes, the most that are read"):
        jsonfiles.read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ModelError, match="neither a file nor a link to one"):
        jsonfiles.read_json(path)


def test_an_error_that_names_a_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refusal:
        write_whole(tmp_path / "notes.json", lambda _: (tmp_path / "gone").read_bytes())
    assert refusal.value.filename == str(tmp_path / "gone")


def test_a_folder_is_removed_at_once_and_for_good_whenever_the_power_fails(tmp_path: Path) -> None:
    home = tmp_path / "disk"
    (home / "1").mkdir(parents=True)
    fill(home / "1")
    whole = {"1/weights": b"new" * 9, "1/sub": None, "1/sub/notes": b"new"}
    with powercut.recorded(home) as disk:
        remove_folder(home / "1")
        disk.mark("removed")
    for cut in disk.cuts():
        found = {name: content for name, content in cut.tree.items() if name.startswith("1/")}
        assert found == {} or (found == whole and not cut.marks), cut
    assert names(home) == []
    remove_folder(home / "1")
    assert names(home) == [], "one that is gone is no error, and leaves nothing"


def test_what_is_written_may_be_read_by_other_users_as_before(tmp_path: Path) -> None:
    write_json(tmp_path / "notes.json", {})
    write_folder(tmp_path / "1")
    write_whole(tmp_path / "mine", lambda draft: draft.write_text("x"), mode=0o600)
    write_whole(tmp_path / "all", lambda draft: draft.write_text("x"))
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("mine", "all", "notes.json")] == [0o600, 0o644, 0o644]
    assert (tmp_path / "1").stat().st_mode & 0o777 == 0o755


def test_a_folder_that_cannot_get_its_name_is_an_error_and_not_there_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError):
        write_folder(tmp_path / "1")
    assert names(tmp_path) == []
