"""What redis-py raises, sorted: what may pass, what is hopeless, and the error that a caller gets. Loads redis-py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from stoker.broker.loading import StillLoading, still_loading
from stoker.errors import BrokerUnavailable

if TYPE_CHECKING:
    from stoker.settings import Settings

#: The connection is gone or silent: another try may help.
TROUBLE = (RedisConnectionError, RedisTimeoutError)
#: What a broker answers that will take the same command again some time: its memory or its disk is full, or it is a
#: replica in the middle of a fail-over.
_PASSING = (OutOfMemoryError, ReadOnlyError, MasterDownError, ClusterDownError, TryAgainError)
#: What OpenSSL says of a broker's certificate that it refuses, and of a broker that refuses the client's.
_UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"
_ENDED = ("ALERT_", "EOF occurred in violation of protocol")
_PASSING_REPLIES = ("MISCONF", "NOREPLICAS", "MASTERDOWN", "LOADING", "BUSY", "NOAUTH", "WRONGPASS", "READONLY", "OOM")


def passes(error: RedisError) -> bool:
    """Whether the trouble may go away, by itself or by an operator's hand, so that the same command succeeds later."""
    return isinstance(error, TROUBLE + _PASSING) or str(error).startswith(_PASSING_REPLIES)


def forbids(error: BaseException) -> bool:
    """Whether the broker's user may not do it; a script that meets that has no error of its own class."""
    return isinstance(error, NoPermissionError) or "ACL failure in script" in str(error)


def hopeless(error: Exception) -> bool:
    """Whether no further try can help: the broker refuses the login, or its certificate is refused."""
    return isinstance(error, AuthenticationError | AuthorizationError) or _UNTRUSTED in str(error)


def broker_unavailable(settings: Settings, error: BaseException, at: str = "") -> BrokerUnavailable:
    """What redis-py raised, as the one error that a caller sees, with the remedy. `at`: the key that was asked for."""
    where, reason = settings.shown_address, _reason(error)
    # Where an option or an argument names the broker, the variable would change nothing.
    by_variable = settings.url_name == "STOKER_URL"
    url = "STOKER_URL" if by_variable else "its URL"
    if isinstance(error, AuthenticationError | AuthorizationError) or reason.startswith(("NOAUTH", "WRONGPASS")):
        return BrokerUnavailable(
            f"the broker at {where} refuses the login ({reason}). Put its user and password into {url}: "
            "redis://USER:PASSWORD@HOST:PORT/DB."
        )
    if trouble := _tls_trouble(reason, url):
        return BrokerUnavailable(f"the broker at {where} {trouble}.")
    if forbids(error):
        return BrokerUnavailable(
            f"the broker at {where} forbids it ({reason}). The user that {url} names needs the rights of its "
            "role: deploy/acl has them."
        )
    if isinstance(error, BusyLoadingError):
        return still_loading(where, error.progress if isinstance(error, StillLoading) else None)
    if isinstance(error, OutOfMemoryError):
        return BrokerUnavailable(
            f"the broker at {where} has no memory left and took nothing. Wait until jobs have ended, or raise its "
            "maxmemory."
        )
    if "WRONGTYPE" in reason:
        return BrokerUnavailable(
            f"the broker at {where} refused it ({reason}): {at or 'one of its keys (stoker:...)'} holds something that "
            "Stoker did not write. Workers move aside what spoils a key that jobs share; delete one of a single job."
        )
    if reason.startswith("MISCONF"):
        return BrokerUnavailable(
            f"the broker at {where} cannot write to its disk and took nothing ({reason}). Free some space there."
        )
    remedy = "set STOKER_URL to" if by_variable else "name"
    return BrokerUnavailable(
        f"no answer from the broker at {where} ({reason}). Start one with `stoker up`, or {remedy} one that runs."
    )


def _tls_trouble(reason: str, url: str) -> str | None:
    """What failed in setting up TLS, and what to do; None if that is not what failed. `url`: what names the broker."""
    if _UNTRUSTED in reason:
        why = reason.partition("certificate verify failed: ")[2].partition(" (_ssl")[0].rstrip(".")
        if "mismatch" in why:
            return (
                f"shows a certificate for another name ({why}). Write the broker's name in {url} as it stands in "
                "the certificate"
            )
        return (
            f"shows a certificate that is not trusted ({why}). Name the authority that signed it in {url}: "
            "?ssl_ca_certs=FILE"
        )
    if any(text in reason for text in _ENDED):
        return (
            f"ends the TLS handshake ({reason}). If it asks for a certificate of its client, name yours in {url}: "
            "?ssl_certfile=FILE&ssl_keyfile=FILE"
        )
    return None


def _reason(error: BaseException) -> str:
    return str(error).strip().rstrip(".").splitlines()[0] if str(error).strip() else type(error).__name__
