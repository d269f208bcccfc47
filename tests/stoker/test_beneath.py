"""A file under a root is found by any way that stays there, and by none that leaves it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from stoker.contract.beneath import Beneath, OutsideError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`a/b/file`, with links of all kinds next to it."""
    (tmp_path / "secret").write_text("secret")
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "file").write_text("file")
    for name, target in {
        "to-file": "a/b/file",
        "to-folder": "a/b",
        "to-link": "to-folder/../../to-file",
        "a/up": "../a/b/file",
        "absolute": f"{root}/a/b/file",
        "a/absolute": f"{root}/a/b/file",
        "out": "../secret",
        "out-absolute": f"{tmp_path}/secret",
        "out-folder": "..",
        "almost": f"{root}-other/file",
        "loop": "loop",
        "nowhere": "missing",
    }.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "fifo")
    (tmp_path / "reached").symlink_to(root)
    return root


def read(root: Path, path: str) -> str:
    with Beneath(root, path).open() as file:
        return file.read().decode()


@pytest.mark.parametrize(
    "path",
    [
        "a/b/file",
        "./a//b/../b/file",
        "to-file",
        "to-folder/file",
        "to-link",
        "a/up",
        "absolute",
        "a/absolute",
        "a/../to-folder/file",
    ],
)
def test_every_way_that_stays_beneath_is_followed(root: Path, path: str) -> None:
    assert read(root, path) == "file"
    assert read(root.parent / "reached", path) == "file"


@pytest.mark.parametrize(
    "path",
    ["../secret", "a/../../secret", "/etc/passwd", "out", "out-absolute", "out-folder/secret",
     "to-folder/../../../secret", "almost"],
)  # fmt: skip
def test_no_way_out_is_followed(root: Path, path: str) -> None:
    with pytest.raises(OutsideError):
        read(root, path)


@pytest.mark.parametrize("path", ["", ".", "a", "a/b/file/x", "loop", "nowhere", "missing", "fifo", "a/b/.."])
def test_what_is_no_file_is_an_error(root: Path, path: str) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        read(root, path)
    assert not isinstance(caught.value, OutsideError)


def test_a_name_that_no_file_can_have_is_an_error(root: Path) -> None:
    with pytest.raises(ValueError, match="null byte"):
        read(root, "a\0b")


def test_no_handle_is_left_open(root: Path) -> None:
    """Whether it was found or not."""
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for path in ("a/b/file", "to-link", "absolute", "out", "loop", "fifo", "a/b", "missing/x"):
        try:
            read(root, path)
        except OSError:
            continue
    assert before == (len(os.listdir("/proc/self/fd")) if before else 0)


def test_a_folder_that_is_exchanged_for_a_link_all_the_time_gives_nothing_away(root: Path) -> None:
    """What a check before an open would miss."""
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("secret")
    (root / "other").symlink_to(outside)
    over = threading.Event()

    def exchange() -> None:
        while not over.is_set():
            for first, second in (("a/b", "a/c"), ("other", "a/b"), ("a/b", "other"), ("a/c", "a/b")):
                os.rename(root / first, root / second)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        found = set()
        for _ in range(2000):
            try:
                found.add(read(root, "a/b/file"))
            except OSError:
                continue
    finally:
        over.set()
        thread.join()
    assert found == {"file"}


@pytest.mark.parametrize("links", [40, 41])
def test_as_many_links_are_followed_as_systems_follow(tmp_path: Path, links: int) -> None:
    (tmp_path / "0").write_text("file")
    for number in range(links):
        (tmp_path / f"{number + 1}").symlink_to(f"{number}")
    if links == 40:
        assert read(tmp_path, f"{links}") == "file"
    else:
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            read(tmp_path, f"{links}")
