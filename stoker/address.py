"""One broker URL in the three forms that its readers want."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from stoker.errors import ConfigError

_FORMS = {
    "redis": "redis://[USER:PASSWORD@]HOST[:PORT][/DB]",
    "rediss": "rediss://[USER:PASSWORD@]HOST[:PORT][/DB][?ssl_ca_certs=FILE]",
    "redis+socket": "redis+socket:///PATH[?virtual_host=DB]",
}
SCHEMES = tuple(_FORMS)
DEFAULT_URL = "redis://127.0.0.1:6379/0"


@dataclass(frozen=True)
class Address:
    """Where the broker is.

    `redis` is for redis-py, `celery` for kombu and Celery's result backend (they spell sockets and TLS otherwise),
    `shown` for people: it holds no password.
    """

    redis: str
    celery: str
    shown: str

    @property
    def without_password(self) -> str:
        """A URL for `parse`, as `shown` without its stars."""
        return self.shown.replace("//***@", "//", 1).replace(":***@", "@", 1)

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read a `redis://`, `rediss://` or `redis+socket://` URL; anything else raises `ConfigError`."""
        scheme, separator, _ = url.partition("://")
        if not separator or scheme not in SCHEMES:
            # What stands there may be a piece of a password.
            plain = re.fullmatch(r"[a-z][a-z0-9+-]{0,15}", scheme)
            given = f"{scheme}://…" if separator and plain else "something that is no URL"
            raise ConfigError(
                f"STOKER_URL: {given} given; allowed: {', '.join(s + '://' for s in SCHEMES)}, "
                f"for example {DEFAULT_URL} or redis+socket:///tmp/redis.sock?virtual_host=0."
            )
        try:
            if not url.isprintable():
                raise ValueError("characters that no URL has")
            url.encode()
            return _socket(url) if scheme == "redis+socket" else _tcp(url)
        except ValueError:
            # What urllib says may quote a piece of the password.
            raise ConfigError(
                f"STOKER_URL: cannot be read; expected {_FORMS[scheme]}. "
                "In a password, write / as %2F, : as %3A, @ as %40, ? as %3F and # as %23."
            ) from None


def _database(text: str) -> int:
    if text and not text.isdigit():
        raise ValueError("the database is not a number")
    return int(text or 0)


def _tcp(url: str) -> Address:
    parts = urlsplit(url)
    if parts.fragment or "@" in parts.query:
        # A password with a bare # or ? would be cut there, and its beginning be shown as a host or a port.
        raise ValueError("a piece of a login behind the address")
    host, port = parts.hostname or "127.0.0.1", parts.port or 6379
    host.encode("idna")  # as it will be looked up
    database = _database(parts.path.strip("/"))
    query = dict(parse_qsl(parts.query))
    if parts.scheme == "rediss":
        # Celery's result backend refuses to guess; verifying is the only default that TLS deserves.
        query.setdefault("ssl_cert_reqs", "required")
    netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    tail = f"/{database}"
    login = parts.netloc.rpartition("@")[0]
    full = f"{parts.scheme}://{login + '@' if login else ''}{netloc}{tail}{'?' + urlencode(query) if query else ''}"
    return Address(redis=full, celery=full, shown=f"{parts.scheme}://{_shown_login(login)}{netloc}{tail}")


def _socket(url: str) -> Address:
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    database = _database(query.pop("virtual_host", query.pop("db", "")))
    if parts.hostname or not parts.path.strip("/"):
        raise ValueError("no path to a socket")
    login, path = parts.netloc.rpartition("@")[0], unquote(parts.path)
    user = f"{login}@" if login else ""
    return Address(
        redis=f"unix://{user}{quote(path)}?db={database}",
        celery=f"redis+socket://{user}{quote(path)}?virtual_host={database}",
        shown=f"redis+socket://{_shown_login(login)}{path}?virtual_host={database}",
    )


def _shown_login(login: str) -> str:
    """A login without a colon is a user to redis-py, and a password to many who write it: it is not shown."""
    if not login:
        return ""
    user, separator, _ = login.partition(":")
    return f"{user}:***@" if separator else "***@"
