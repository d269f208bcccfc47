"""What redis-py raises: the one error that a caller gets, with its remedy, and whether another try may help."""

from __future__ import annotations

import pytest
from redis import exceptions as raised
from redis.exceptions import RedisError

from stoker.broker.connection import Patience, translated
from stoker.broker.loading import LoadingProgress, StillLoading
from stoker.broker.trouble import broker_unavailable, forbids, hopeless, passes
from stoker.errors import BrokerLoading, BrokerUnavailable
from stoker.settings import Settings

SETTINGS = Settings(url="redis://:secret@h:5/2")
WHERE = "the broker at redis://:***@h:5/2"
LOGIN = ". Put its user and password into STOKER_URL: redis://USER:PASSWORD@HOST:PORT/DB."
RIGHTS = ". The user that STOKER_URL names needs the rights of its role: deploy/acl has them."
UNTRUSTED = "Error 1 connecting to h:5. [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {} (_ssl.c:1006)."
START = ". Start one with `stoker up`, or {} one that runs."
WRONG = (
    "holds something that Stoker did not write. Workers move aside what spoils a key that jobs share; delete one of a "
    "single job."
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            raised.AuthenticationError("invalid username-password pair"),
            f"refuses the login (invalid username-password pair){LOGIN}",
        ),
        (raised.AuthorizationError("x."), f"refuses the login (x){LOGIN}"),
        (
            raised.ResponseError("NOAUTH Authentication required."),
            f"refuses the login (NOAUTH Authentication required){LOGIN}",
        ),
        (raised.ResponseError("WRONGPASS no"), f"refuses the login (WRONGPASS no){LOGIN}"),
        (raised.NoPermissionError("no permissions"), f"forbids it (no permissions){RIGHTS}"),
        (raised.ResponseError("ACL failure in script: x"), f"forbids it (ACL failure in script: x){RIGHTS}"),
        (
            raised.ConnectionError(UNTRUSTED.format("self-signed certificate")),
            (
                "shows a certificate that is not trusted (self-signed certificate). Name the authority that signed it "
                "in STOKER_URL: ?ssl_ca_certs=FILE."
            ),
        ),
        (
            raised.ConnectionError(UNTRUSTED.format("Hostname mismatch, certificate is not valid for 'h'.")),
            (
                "shows a certificate for another name (Hostname mismatch, certificate is not valid for 'h'). Write the "
                "broker's name in STOKER_URL as it stands in the certificate."
            ),
        ),
        (
            raised.ConnectionError("[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] x"),
            (
                "ends the TLS handshake ([SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] x). If it asks for a certificate of "
                "its client, name yours in STOKER_URL: ?ssl_certfile=FILE&ssl_keyfile=FILE."
            ),
        ),
        (
            raised.ConnectionError("EOF occurred in violation of protocol"),
            (
                "ends the TLS handshake (EOF occurred in violation of protocol). If it asks for a certificate of its "
                "client, name yours in STOKER_URL: ?ssl_certfile=FILE&ssl_keyfile=FILE."
            ),
        ),
        (
            raised.OutOfMemoryError("OOM command not allowed"),
            "has no memory left and took nothing. Wait until jobs have ended, or raise its maxmemory.",
        ),
        (
            raised.ResponseError("MISCONF Redis is configured to save"),
            "cannot write to its disk and took nothing (MISCONF Redis is configured to save). Free some space there.",
        ),
        (raised.ResponseError("WRONGTYPE x"), f"refused it (WRONGTYPE x): one of its keys (stoker:...) {WRONG}"),
    ],
)
def test_each_trouble_is_one_error_with_its_remedy_and_without_the_password(
    error: RedisError, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = broker_unavailable(SETTINGS, error)
    named = said.replace("STOKER_URL", "its URL")
    assert (type(found), str(found)) == (BrokerUnavailable, f"{WHERE} {named}"), "the variable would change nothing"
    assert SETTINGS.url is not None
    monkeypatch.setenv("STOKER_URL", SETTINGS.url)
    assert str(broker_unavailable(SETTINGS, error)) == f"{WHERE} {said}"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (raised.ConnectionError("Error 111. Connection refused."), "Error 111. Connection refused"),
        (raised.TimeoutError(""), "TimeoutError"),
        (raised.TimeoutError("  \n"), "TimeoutError"),
        (raised.ConnectionError("first\nsecond"), "first"),
    ],
)
def test_silence_is_an_error_that_says_how_to_start_a_broker(
    error: RedisError, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence = f"no answer from {WHERE} ({reason})"
    assert str(broker_unavailable(SETTINGS, error)) == silence + START.format("name")
    assert SETTINGS.url is not None
    monkeypatch.setenv("STOKER_URL", SETTINGS.url)
    assert str(broker_unavailable(SETTINGS, error)) == silence + START.format("set STOKER_URL to")


def test_a_key_of_a_wrong_type_is_named_if_it_is_known() -> None:
    found = broker_unavailable(SETTINGS, raised.ResponseError("WRONGTYPE x"), "stoker:job:a")
    assert f"(WRONGTYPE x): stoker:job:a {WRONG}" in str(found)


def test_a_broker_that_loads_says_how_far_it_is() -> None:
    progress = LoadingProgress(12.4, 7, 5)
    for error, said in (
        (StillLoading(progress), "12 %, about 7 s left"),
        (StillLoading(None), "is loading its data. Try"),
        (raised.BusyLoadingError("LOADING"), "is loading its data. Try"),
    ):
        found = broker_unavailable(SETTINGS, error)
        assert isinstance(found, BrokerLoading)
        assert said in str(found)
    assert str(StillLoading(progress)) == "the broker is loading its data"
    assert str(LoadingProgress(99.6, 0, 1)) == "100 %, about 1 s left"


PASSING = (
    *(raised.ConnectionError("x"), raised.TimeoutError("x"), raised.OutOfMemoryError("x"), raised.ReadOnlyError("x")),
    *(raised.MasterDownError("x"), raised.ClusterDownError("x"), raised.TryAgainError("x")),
    *(raised.ResponseError(f"{word} x") for word in (
        "MISCONF", "NOREPLICAS", "MASTERDOWN", "LOADING", "BUSY", "NOAUTH", "WRONGPASS", "READONLY", "OOM",
    )),
)  # fmt: skip
LASTING = (raised.ResponseError("WRONGTYPE x"), raised.ResponseError("x OOM"), raised.NoPermissionError("x"))


def test_what_an_operator_may_mend_passes_and_what_is_wrong_does_not() -> None:
    assert [error for error in PASSING if not passes(error)] == []
    assert [error for error in LASTING if passes(error)] == []


def test_a_login_or_a_certificate_that_is_refused_is_hopeless_and_nothing_else_is() -> None:
    refused = (
        raised.AuthenticationError("x"),
        raised.AuthorizationError("x"),
        raised.ConnectionError(UNTRUSTED.format("x")),
    )
    assert all(map(hopeless, refused))
    assert not any(hopeless(error) for error in (raised.ConnectionError("x"), raised.TimeoutError("x")))
    assert forbids(raised.NoPermissionError("x"))
    assert not forbids(raised.ResponseError("x"))


def test_an_outage_is_borne_for_as_long_as_the_patience_lasts_and_the_next_one_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("stoker.broker.connection.time.monotonic", lambda: now[0])
    patience = Patience(Settings(url="redis://h", patience=10.0))
    error = raised.ConnectionError("refused")
    pauses = []
    for _ in range(2):
        pauses.append(patience.spend(error))
        for passed in (0.4, 1.6, 7.9):
            now[0] += passed
            pauses.append(patience.spend(error))
        now[0] += 0.1
        with pytest.raises(BrokerUnavailable, match="no answer"):
            patience.spend(error)
        patience.renew()
    assert pauses == [pytest.approx(pause) for pause in (0.1, 0.2, 0.6, 1.0) * 2]
    with pytest.raises(BrokerUnavailable, match="refuses the login"):
        Patience(Settings(url="redis://h", patience=10.0)).spend(raised.AuthenticationError("no"))


def test_an_error_that_the_caller_handles_passes_as_it_is_and_every_other_of_redis_is_ours() -> None:
    with pytest.raises(raised.TimeoutError), translated(Settings(), passing=(raised.TimeoutError,)):
        raise raised.TimeoutError("silent")
    with pytest.raises(BrokerUnavailable), translated(Settings(), passing=(raised.TimeoutError,)):
        raise raised.ConnectionError("refused")
    with pytest.raises(KeyError), translated(Settings()):
        raise KeyError("none of the broker's")
