"""Who may ask the monitor for what: a password of this machine's own, the names that it answers to, and no other page.

A browser sends the password with the requests of every page. So a request that changes something has to come from
the monitor's own pages, and a name that a foreign page could have pointed at this machine is refused altogether.
"""

from __future__ import annotations

import hmac
import ipaddress
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from stoker.files.secret import kept_password, private_folder
from stoker.settings import Settings

USER = "stoker"
#: What monitoring programs ask for without a password: whether it runs, and numbers.
OPEN = ("/healthcheck", "/metrics")
#: Methods that change nothing.
SAFE = ("GET", "HEAD", "OPTIONS")


def folder(settings: Settings) -> Path:
    """The monitor's folder, for this user alone. Raises `ConfigError`."""
    return private_folder(settings.home / "flower")


def password_file(settings: Settings) -> Path:
    return folder(settings) / "password"


def password(settings: Settings) -> str:
    """The password of this STOKER_HOME, made when it is first asked for. Raises `ConfigError`."""
    return kept_password(password_file(settings))


@dataclass(frozen=True)
class Refusal:
    """The answer to a request that is refused."""

    status: int
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate:
    """`names`: what the monitor is reached under, except addresses and `localhost`, which are always right."""

    password: str
    names: frozenset[str] = frozenset()

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> Refusal | None:
        """Why a request is refused; None for one that may pass. `headers`: by any spelling of their names."""
        host = headers.get("Host") or ""
        if not self._answers_to(host_name(host)):
            return Refusal(
                421,
                f"Host: {host[:100]!r} given; allowed: an address, localhost"
                + "".join(f", {name}" for name in sorted(self.names))
                + ". Another name has to be allowed at the start: stoker flower --host NAME.",
            )
        if path in OPEN and method in SAFE:
            return None
        if not self._knows(headers.get("Authorization") or ""):
            return Refusal(401, "Access denied", {"WWW-Authenticate": 'Basic realm="stoker", charset="UTF-8"'})
        if method not in SAFE and not _own_page(host, headers):
            return Refusal(403, "Refused: a page of another site asked for it.")
        return None

    def _answers_to(self, name: str) -> bool:
        return name == "localhost" or name in self.names or is_address(name)

    def _knows(self, authorization: str) -> bool:
        kind, _, code = authorization.partition(" ")
        try:
            given = b64decode(code.strip(), validate=True)
        except ValueError:
            return False
        return kind.lower() == "basic" and hmac.compare_digest(given, f"{USER}:{self.password}".encode())


def host_name(host: str) -> str:
    """The host without its port; "" if there is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    """Whether it is an IP address: a page can point its own name at this machine, and never an address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _own_page(host: str, headers: Mapping[str, str]) -> bool:
    """Whether one of the monitor's own pages asks, or a program, which sends none of the three headers."""
    site = headers.get("Sec-Fetch-Site")
    if site is not None and site != "same-origin":
        return False
    origin = headers.get("Origin") or headers.get("Referer")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
