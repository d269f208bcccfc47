"""The last line of defence: what must not be in a log is taken out of what is about to be written.

The first is that no call hands it over. Texts of users cannot be distinguished from others, so the words of errors that
may quote them are left out; passwords and keys are known, or have forms that are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.exceptions import RedisError

from stoker.errors import BrokerUnavailable, ConfigError, ModelError, WorkerUnavailable
from stoker.settings import Settings

STARS = "***"
#: A login in a URL, also one without a colon, which is a password to redis-py; up to the last @ of what has no blank.
_LOGIN = re.compile(r"(?<=://)[^\s'\"]+@")
#: `password=…`, `"api_key": "…"`, `Authorization: Bearer …`, `AUTH …`, `requirepass …`.
_NAMED = re.compile(
    r"(?i)(\b(?:password|passwd|secret|api[_-]?key|access[_-]?key|(?:access|auth|hf|bearer)[_-]?token|authorization)"
    r"\b['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic)\s+)?|\b(?:bearer|basic|requirepass|masterauth)\s+)[^\s'\",;]{3,}"
)
#: Variables of the environment whose values are secrets, by their names.
_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|API_KEY|ACCESS_KEY|CREDENTIAL")
#: What no secret is: a switch, and where the name speaks of tokens, how many. `TOKENIZERS_PARALLELISM=0` is one, and
#: each 0 of the log would become stars.
_SWITCH = re.compile(r"(?i)[01]|true|false|yes|no|on|off")
_COUNT = re.compile(r"[0-9]{1,9}")
#: From this length on a secret is taken out wherever it stands; a shorter one where it is a word: `redis` is one.
LONG = 8
#: How many texts are remembered of those that have at most so many characters.
WORDS, LONGEST_WORD = 1024, 64

#: Errors whose words say what the machine, the broker or this code did, and quote nothing that a user sent.
_PLAIN = (OSError, RedisError, MemoryError, RuntimeError, AttributeError, ImportError, AssertionError)
_OURS = (BrokerUnavailable, ConfigError, ModelError, WorkerUnavailable)


class Redactor:
    """Puts stars for secrets: those that it is given, and what has the form of one."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        found = sorted({secret for secret in secrets if secret}, key=len, reverse=True)
        parts = [re.escape(secret) if len(secret) >= LONG else rf"(?<!\w){re.escape(secret)}(?!\w)" for secret in found]
        self._known = re.compile("|".join(parts)) if parts else None
        #: Kinds, models, clients and ends stand in line after line.
        self._word = lru_cache(WORDS)(self._without_secrets)

    def __call__(self, text: str) -> str:
        return self._word(text) if len(text) <= LONGEST_WORD else self._without_secrets(text)

    def _without_secrets(self, text: str) -> str:
        text = _LOGIN.sub(f"{STARS}@", text) if "://" in text else text
        if " " in text or ":" in text or "=" in text:
            # A name and its value: what has none of these is one word.
            text = _NAMED.sub(rf"\g<1>{STARS}", text)
        return self._known.sub(STARS, text) if self._known is not None else text


def secrets_of(settings: Settings, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """The passwords and keys that a process with these settings knows."""
    for url in (settings.chosen_url, settings.artifacts):
        yield from _of_url(url or "")
    for name, value in environment.items():
        if _is_secret(name.upper(), value.strip()):
            yield value


def _is_secret(name: str, value: str) -> bool:
    """Of a variable of the environment."""
    said = _SECRET_NAME.search(name)
    if said is None or _SWITCH.fullmatch(value):
        return False
    return said[0] != "TOKEN" or not _COUNT.fullmatch(value)


def _of_url(url: str) -> Iterator[str]:
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query)
    except ValueError:
        return
    login = parts.netloc.rpartition("@")[0]
    user, colon, password = login.partition(":")
    for secret in (password if colon else user, *(value for name, value in query if _SECRET_NAME.search(name.upper()))):
        yield from {secret, unquote(secret)}


def shown(error: BaseException) -> str:
    """An error in a log: its class, and its words if they cannot quote what a user sent."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, (*_PLAIN, *_OURS)) else name
