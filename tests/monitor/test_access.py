"""The gate before every page of the monitor, and its password."""

from __future__ import annotations

import base64
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stoker.errors import ConfigError
from stoker.monitor.access import Gate, folder, password, password_file
from stoker.settings import Settings

GATE = Gate("right", frozenset({"flower.example.org"}))
HOST = "127.0.0.1:5555"


def login(user: str = "stoker", word: str = "right") -> str:
    return "Basic " + base64.b64encode(f"{user}:{word}".encode()).decode()


def status(method: str = "GET", path: str = "/stoker", **headers: str) -> int | None:
    given = {"Host": HOST, "Authorization": login()} | {name.replace("_", "-"): text for name, text in headers.items()}
    refusal = GATE.refusal(method, path, {name: text for name, text in given.items() if text})
    return None if refusal is None else refusal.status


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:5555",
        "localhost",
        "LOCALHOST:80",
        "[::1]:5555",
        "192.168.1.7",
        "flower.example.org:443",
        "flower.example.org.",
    ],
)
def test_an_address_and_a_name_that_was_allowed_are_answered(host: str) -> None:
    assert status(Host=host) is None


FOREIGN = ["", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "a b"]


@pytest.mark.parametrize("host", FOREIGN)
def test_another_name_is_refused_with_any_password(host: str) -> None:
    """A foreign page may point a name of its own at this machine, and would be of the same origin then."""
    assert status(Host=host) == 421
    assert status(path="/healthcheck", Host=host) == 421


LOGINS = ["", "Basic", "Basic !!!", "Bearer right", login(word="wrong"), login(user="root"), login(word="")]
LOGINS += [login().replace("Basic", "Digest"), login().removeprefix("Basic ")]
LOGINS += ["Basic " + "A" * 9, "Basic " + base64.b64encode("stoker:räch".encode("latin-1")).decode()]


@pytest.mark.parametrize("given", LOGINS)
def test_without_the_password_nothing_is_shown(given: str) -> None:
    refusal = GATE.refusal("GET", "/stoker", {"Host": HOST, "Authorization": given})
    assert refusal is not None
    assert refusal.status == 401
    assert refusal.headers["WWW-Authenticate"].startswith("Basic ")


@pytest.mark.parametrize("path", ["/healthcheck", "/metrics"])
def test_monitoring_programs_need_no_password_and_change_nothing(path: str) -> None:
    assert status(path=path, Authorization="") is None
    assert status("POST", path, Authorization="") == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8000"},
        {"Origin": f"http://{HOST}", "Sec_Fetch_Site": "cross-site"},
        {"Origin": f"http://{HOST}", "Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "none"},
        {"Referer": "http://evil.example/page"},
        {"Origin": "http://[::1"},
    ],
)
def test_a_page_elsewhere_changes_nothing_though_the_browser_sends_the_password(
    method: str, headers: dict[str, str]
) -> None:
    assert status(method, **headers) == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": f"http://{HOST}"},
        {"Origin": f"https://{HOST}", "Sec_Fetch_Site": "same-origin"},
        {"Origin": "http://localhost:5555", "Host": "LOCALHOST:5555"},
        {"Authorization": login().replace("Basic", "basic")},
    ],
)
def test_its_own_pages_and_programs_may_change_things(headers: dict[str, str]) -> None:
    assert status("POST", **headers) is None


def test_the_password_is_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    before = os.umask(0)
    try:
        with ThreadPoolExecutor(8) as pool:
            made = set(pool.map(lambda _: password(settings), range(16)))
    finally:
        os.umask(before)
    assert len(made) == 1
    assert len(made.pop()) >= 20
    assert stat.S_IMODE(password_file(settings).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder(settings).stat().st_mode) == 0o700
    assert [file.name for file in folder(settings).iterdir()] == ["password"]


def test_a_password_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    made = password(settings)
    password_file(settings).chmod(0o644)
    assert password(settings) == made
    assert stat.S_IMODE(password_file(settings).stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_a_password_file_that_holds_none_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    settings = Settings(home=tmp_path)
    folder(settings)
    password_file(settings).write_bytes(content)
    with pytest.raises(ConfigError, match=str(password_file(settings))):
        password(settings)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_what_changes_nothing_is_shown_to_who_followed_a_link(method: str) -> None:
    assert status(method, Sec_Fetch_Site="cross-site", Referer="http://wiki.example/") is None
    assert status(method, "/healthcheck", Authorization="") is None


@pytest.mark.parametrize("more", ["!", " ", "ü", "=", "-"])
def test_a_code_with_anything_else_in_it_is_no_password(more: str) -> None:
    code = base64.b64encode(b"stoker:secret").decode()
    gate = Gate("secret")
    assert gate.refusal("GET", "/", {"Host": "localhost", "Authorization": f"Basic {code}"}) is None
    refused = gate.refusal("GET", "/", {"Host": "localhost", "Authorization": f"Basic {code[:4]}{more}{code[4:]}"})
    assert refused is not None
    assert refused.status == 401
