"""One broker URL in the forms that its readers want."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from stoker.errors import ConfigError

_FORMS = {
    "redis": "redis://[USER:PASSWORD@]HOST[:PORT][/DB]",
    "rediss": "rediss://[USER:PASSWORD@]HOST[:PORT][/DB][?ssl_ca_certs=FILE]",
    "redis+socket": "redis+socket:///PATH[?virtual_host=DB]",
    "redis+sentinel": "redis+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE[/DB]",
}
SCHEMES = tuple(_FORMS)
DEFAULT_URL = "redis://127.0.0.1:6379/0"


#: What may stand behind the ? of `redis://` and `rediss://`, and its values where they are few.
_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("username", "password", "db", "protocol", "client_name"), ()),
    **dict.fromkeys(("socket_timeout", "socket_connect_timeout", "health_check_interval"), ()),
}
#: Files that `rediss://` names.
FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(FILES, ()),
    "ssl_cert_reqs": ("none", "optional", "required"),
    "ssl_check_hostname": ("false", "true"),
}
#: Where a sentinel listens that names no port.
SENTINEL_PORT = 26379


@dataclass(frozen=True)
class Sentinels:
    """Who is asked where the broker is: what they call it, and their own login, where they have one."""

    hosts: tuple[tuple[str, int], ...]
    service: str
    username: str | None = None
    password: str | None = None


@dataclass(frozen=True)
class Address:
    """Where the broker is.

    `redis` is for redis-py, `celery` for kombu and Celery's result backend (they spell sockets and TLS otherwise),
    `shown` for people: it holds no password. `url` is for `parse`, in another process. With `sentinels`, `redis` has
    the service's name for a host, and `celery` the sentinels: each asks them where the broker is. `files`: those that
    TLS needs, with the options that name them.
    """

    redis: str
    celery: str
    shown: str
    url: str
    sentinels: Sentinels | None = None
    files: tuple[tuple[str, str], ...] = ()
    #: What stands behind the ? of `shown`, which people need not see; no secret is there.
    options: str = ""

    @property
    def without_password(self) -> str:
        """A URL for `parse`, as `shown` without its stars."""
        return self.shown.replace("//***@", "//", 1).replace(":***@", "@", 1) + self.options

    @classmethod
    def parse(cls, url: str, named: str = "STOKER_URL") -> Address:
        """Read a URL of one of the schemes above; anything else raises `ConfigError`. `named`: where it was given, as
        errors say it."""
        scheme, separator, _ = url.partition("://")
        if not separator or scheme not in SCHEMES:
            # What stands there may be a piece of a password.
            plain = re.fullmatch(r"[a-z][a-z0-9+-]{0,15}", scheme)
            given = f"{scheme}://…" if separator and plain else "something that is no URL"
            raise ConfigError(
                f"{named}: {given} given; allowed: {', '.join(s + '://' for s in SCHEMES)}, "
                f"for example {DEFAULT_URL} or redis+socket:///tmp/redis.sock?virtual_host=0."
            )
        try:
            if not url.isprintable():
                raise ValueError("characters that no URL has")
            url.encode()
            return _READERS.get(scheme, _tcp)(url)
        except _UnknownOption as error:
            raise ConfigError(f"{named}: {error}") from None
        except ValueError:
            # What urllib says may quote a piece of the password.
            raise ConfigError(
                f"{named}: cannot be read; expected {_FORMS[scheme]}. "
                "In a password, write / as %2F, : as %3A, @ as %40, ? as %3F and # as %23."
            ) from None


class _UnknownOption(ValueError):
    """What stands behind the ? of a URL. Never leaves this module."""


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
    query = dict(parse_qsl(parts.query))
    _check_options(query, _OPTIONS if parts.scheme == "redis" else _OPTIONS | _TLS_OPTIONS)
    if parts.scheme == "rediss":
        # Celery's result backend refuses to guess; verifying is the only default that TLS deserves.
        query.setdefault("ssl_cert_reqs", "required")
    # kombu knows a database and a login in no other place, and of the options those of TLS alone.
    database = _database(query.pop("db", parts.path.strip("/")))
    login = _joined(parts.netloc.rpartition("@")[0], query.pop("username", ""), query.pop("password", ""))
    tail = f"{f'[{host}]' if ':' in host else host}:{port}/{database}"
    plain = f"{parts.scheme}://{login + '@' if login else ''}{tail}"
    full, tls = plain + _behind(query), {name: value for name, value in query.items() if name in _TLS_OPTIONS}
    files = tuple((name, query[name]) for name in FILES if name in query)
    return Address(
        redis=full,
        celery=plain + _behind(tls),
        shown=f"{parts.scheme}://{_shown_login(login)}{tail}",
        url=full,
        files=files,
        options=_behind(query),
    )


def _joined(login: str, username: str, password: str) -> str:
    """A login, with what it lacks from the options of the same names."""
    user, _, word = login.partition(":")
    if not (username or password):
        return login
    return f"{user or quote(username, safe='')}:{word or quote(password, safe='')}"


def _behind(query: dict[str, str]) -> str:
    return f"?{urlencode(query)}" if query else ""


def _check_options(given: dict[str, str], known: dict[str, tuple[str, ...]]) -> None:
    if all(name in known and (not known[name] or value in known[name]) for name, value in given.items()):
        return
    # What is wrong may be a piece of a password.
    shown = (f"{name} ({', '.join(values)})" if values else name for name, values in known.items())
    raise _UnknownOption(f"an option behind the ? is wrong; known: {', '.join(shown)}.")


def _socket(url: str) -> Address:
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    database = _database(query.pop("virtual_host", query.pop("db", "")))
    if query or parts.hostname or not parts.path.strip("/"):
        raise ValueError("no path to a socket, or an option that there is not")
    login, path = parts.netloc.rpartition("@")[0], unquote(parts.path)
    user = f"{login}@" if login else ""
    celery = f"redis+socket://{user}{quote(path)}?virtual_host={database}"
    return Address(
        redis=f"unix://{user}{quote(path)}?db={database}",
        celery=celery,
        shown=f"redis+socket://{_shown_login(login)}{path}?virtual_host={database}",
        url=celery,
    )


def _sentinel(url: str) -> Address:
    # urllib knows no address of several hosts.
    where, _, query = url.partition("://")[2].partition("?")
    authority, _, path = where.partition("/")
    login, _, hosts = authority.rpartition("@")
    service, _, number = path.partition("/")
    if "#" in url or "@" in query or not re.fullmatch(r"[A-Za-z0-9._-]+", service):
        raise ValueError("no name of a service, or a piece of a login behind the address")
    database, found = _database(number.strip("/")), tuple(_host(part) for part in hosts.split(","))
    asked = dict(parse_qsl(query))
    sentinels = Sentinels(found, service, asked.pop("sentinel_username", None), asked.pop("sentinel_password", None))
    if asked:
        raise ValueError("an option that there is not")
    user, names = f"{login}@" if login else "", [f"[{host}]:{n}" if ":" in host else f"{host}:{n}" for host, n in found]
    tail = f"{','.join(names)}/{service}/{database}"
    return Address(
        redis=f"redis://{user}{service}/{database}",
        # kombu would take a semicolon in a login for the end of an address.
        celery=";".join(f"sentinel://{user.replace(';', '%3B')}{name}/{database}" for name in names),
        shown=f"redis+sentinel://{_shown_login(login)}{tail}",
        url=f"redis+sentinel://{user}{tail}{'?' + query if query else ''}",
        sentinels=sentinels,
    )


def _host(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.netloc != text or "@" in text:
        raise ValueError("no host")
    parts.hostname.encode("idna")
    return parts.hostname, parts.port or SENTINEL_PORT


_READERS = {"redis+socket": _socket, "redis+sentinel": _sentinel}


def _shown_login(login: str) -> str:
    """A login without a colon is a user to redis-py, and a password to many who write it: it is not shown."""
    if not login:
        return ""
    user, separator, _ = login.partition(":")
    return f"{user}:***@" if separator else "***@"
