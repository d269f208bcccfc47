"""Passwords that this machine makes for itself."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

import pytest

from stoker.errors import ConfigError
from stoker.files.secret import kept_password, private_folder
from tests import powercut


def test_a_password_is_whole_or_not_there_at_every_cut_and_the_one_that_was_given_stays(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with powercut.recorded(home) as disk:
        given = kept_password(home / "password")
    for cut in disk.cuts():
        with cut.restored(tmp_path / "after") as after:
            left = after / "password"
            assert not left.exists() or left.read_text() == f"{given}\n", cut
    assert kept_password(home / "password") == given
    assert [path.name for path in home.iterdir()] == ["password"], "no draft is left"
    assert len(given) >= 24


def test_of_two_that_make_it_at_one_time_the_second_takes_that_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(size: int) -> str:
        (tmp_path / "password").write_text("of-the-first\n")
        return "of-the-second"

    monkeypatch.setattr(secrets, "token_urlsafe", late)
    assert kept_password(tmp_path / "password") == "of-the-first"
    assert [path.name for path in tmp_path.iterdir()] == ["password"]


@pytest.mark.parametrize(
    ("text", "taken"),
    [("a" * 7, False), ("a" * 8, True), ("a" * 256, True), ("a" * 257, False), ("has a space", False), ("", False)],
)
def test_what_a_person_wrote_there_is_taken_if_a_url_can_hold_it(tmp_path: Path, text: str, taken: bool) -> None:
    file = tmp_path / "password"
    file.write_text(f"  {text}\n")
    file.chmod(0o644)
    if taken:
        assert kept_password(file) == text
        assert file.stat().st_mode & 0o777 == 0o600
    else:
        with pytest.raises(ConfigError, match=r"8 to 256 letters.*Delete it"):
            kept_password(file)
        assert file.read_text() == f"  {text}\n", "it is not ours to delete"


def test_a_folder_or_a_password_that_cannot_be_used_is_said_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=re.escape(f"STOKER_HOME: {tmp_path}/file/below cannot be made")):
        private_folder(tmp_path / "file" / "below")
    (tmp_path / "password").write_bytes(b"\xff" * 12)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/password: the password cannot be read")):
        kept_password(tmp_path / "password")


def test_a_folder_that_was_open_is_closed_to_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "open").mkdir(0o777)
        for folder in (tmp_path / "open", tmp_path / "new" / "below"):
            assert private_folder(folder).stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
