"""The log: one line an event, in two forms, and what never stands in it."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from redis.exceptions import AuthenticationError

from stoker.errors import InvalidRequest, ModelError
from stoker.logs.lines import JobLine
from stoker.logs.redaction import Redactor, secrets_of
from stoker.logs.setup import QUIET, configure
from stoker.settings import Settings

LINE = JobLine(
    "ended", "job-1", "generate", "m", "team-a", 2, 0.5, duration=1.25, tokens=64, outcome="succeeded", prompt_tokens=7
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def logging_as() -> Iterator[Callable[..., io.StringIO]]:
    """Configures the log of this process as asked, to a stream of its own, and takes all back."""
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, QUIET)]
    before = [(logger, logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
    hooks = sys.excepthook, threading.excepthook

    def configured(out: io.StringIO | None = None, *, secrets: Any = (), **settings: Any) -> io.StringIO:
        stream = out or io.StringIO()
        configure(Settings(**settings), secrets, stream)
        return stream

    yield configured
    logging.captureWarnings(False)
    sys.excepthook, threading.excepthook = hooks
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers[:], logger.propagate = handlers, propagate


def test_an_event_is_one_json_object_with_the_fields_of_its_job(logging_as: Any) -> None:
    out = logging_as()
    LINE.write(logging.getLogger("stoker.jobs"), logging.INFO)
    (line,) = out.getvalue().splitlines()
    fields = json.loads(line)
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "info",
        "logger": "stoker.jobs",
        "message": str(LINE),
        "event": "ended",
        "job": "job-1",
        "kind": "generate",
        "model": "m",
        "client": "team-a",
        "attempt": 2,
        "wait": 0.5,
        "duration": 1.25,
        "prompt_tokens": 7,
        "tokens": 64,
        "outcome": "succeeded",
    }


def test_people_read_the_same_as_a_sentence(logging_as: Any) -> None:
    out = logging_as(log="human")
    LINE.write(logging.getLogger("stoker.jobs"), logging.INFO)
    said = "job job-1 succeeded: generate on m for team-a, attempt 2, waited 0.500 s, took 1.250 s, 64 tokens"
    assert out.getvalue().endswith(f" INFO stoker.jobs: {said}\n")


@pytest.mark.parametrize(
    ("form", "terminal", "is_json"),
    [("auto", True, False), ("auto", False, True), ("json", True, True), ("human", False, False)],
)
def test_a_terminal_gets_lines_for_people_unless_the_setting_says_otherwise(
    form: Literal["auto", "human", "json"], terminal: bool, is_json: bool, logging_as: Any
) -> None:
    out = logging_as(Terminal() if terminal else io.StringIO(), log=form)
    logging.getLogger("stoker.test").warning("something")
    assert out.getvalue().startswith("{") is is_json


@pytest.mark.parametrize("form", ["human", "json"])
@pytest.mark.parametrize("said", ["two\nlines", "a\r\x1b[2Jscreen that is cleared", "\x00\ud800", "x" * 100_000])
def test_anything_that_is_said_is_one_line_of_bounded_length(said: str, form: str, logging_as: Any) -> None:
    out = logging_as(log=form)
    logging.getLogger("stoker.test").warning("%s", said)
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().rstrip("\n").isprintable()
    assert len(out.getvalue()) < 5000


def test_the_level_is_a_setting_and_libraries_say_only_what_is_wrong(logging_as: Any) -> None:
    out = logging_as(log_level="debug")
    logging.getLogger("stoker.test").debug("of ours")
    for name in ("celery.worker.strategy", "celery.app.trace", "celery.worker.consumer.consumer", "kombu", "flower"):
        logging.getLogger(name).info("Task received")
    logging.getLogger("celery.worker").warning("of theirs")
    assert [json.loads(line)["message"] for line in out.getvalue().splitlines()] == ["of ours", "of theirs"]
    out = logging_as(log_level="error")
    logging.getLogger("stoker.test").warning("of ours")
    logging.getLogger("celery.worker").warning("of theirs")
    assert out.getvalue() == ""


def test_a_warning_of_a_library_is_a_line_of_the_log(logging_as: Any) -> None:
    out = logging_as()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("you are\n\nroot", stacklevel=1)
    (line,) = out.getvalue().splitlines()
    assert "you are root" in json.loads(line)["message"]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Error connecting to redis://:hunter2@host:6379/0.", "Error connecting to redis://***@host:6379/0."),
        ("rediss://user:hunter2@host", "rediss://***@host"),
        ("redis://hunter2@host", "redis://***@host"),
        ("redis+socket://:hun@ter2@/run/r.sock", "redis+socket://***@/run/r.sock"),
        ("unix://u:hunter2@/run/r.sock?db=0", "unix://***@/run/r.sock?db=0"),
        ("{'password': 'hunter2', 'port': 6379}", "{'password': '***', 'port': 6379}"),
        ("Redis(host=h,password=hunter2,db=0)", "Redis(host=h,password=***,db=0)"),
        ("Authorization: Bearer hunter2", "Authorization: Bearer ***"),
        ("authorization: Basic aHVudGVyMg==", "authorization: Basic ***"),
        ("HF_TOKEN=hunter2 API_KEY: hunter2", "HF_TOKEN=*** API_KEY: ***"),
        ("https://example.org/a?b=1 took 3 tokens", "https://example.org/a?b=1 took 3 tokens"),
    ],
)
def test_what_has_the_form_of_a_password_is_taken_out(said: str, shown: str) -> None:
    assert Redactor()(said) == shown


def test_passwords_of_settings_and_environment_are_taken_out_wherever_they_stand(tmp_path: Path) -> None:
    settings = Settings(
        url="redis://u:p%2Fass-word@h:1/0", artifacts="s3://key:artifact-pass@bucket?secret=query-pass", home=tmp_path
    )
    environment = {"AWS_SECRET_ACCESS_KEY": "cloud-pass-1", "HF_TOKEN": "hub-pass-1", "STOKER_CLIENT_KEY": "team-a"}
    redact = Redactor(secrets_of(settings, environment))
    for secret in ("p%2Fass-word", "p/ass-word", "artifact-pass", "query-pass", "cloud-pass-1", "hub-pass-1"):
        assert secret not in redact(f"xx{secret}yy and '{secret}'")
    assert redact("client team-a") == "client team-a"


SECRET_URL = "redis://:hunter2hunter2@host/0"


@pytest.mark.parametrize("before", range(3960, 4010, 7))
@pytest.mark.parametrize("said", [f"at {SECRET_URL} it is", "the key is hunter2hunter2 now"])
def test_of_a_secret_at_the_end_of_what_a_line_shows_no_part_is_shown(
    said: str, before: int, logging_as: Any, tmp_path: Path
) -> None:
    out = logging_as(url=SECRET_URL, home=tmp_path, log="json")
    long = "x" * before + " " + said + " y" * 100
    replace(LINE, error=long).write(logging.getLogger("stoker.jobs"), logging.INFO)
    logging.getLogger("stoker").error(long)
    logging.getLogger("stoker").error("trouble", exc_info=OSError("x" * (before + 12_000) + " " + said + " y" * 100))
    assert "hunt" not in out.getvalue()
    assert "characters)" in out.getvalue()


@pytest.mark.parametrize("secret", ["pass\u00a0word1", "soft\u00adhyphen", "two  blanks"])
def test_a_secret_of_odd_characters_is_taken_out_though_lines_show_those_otherwise(
    secret: str, logging_as: Any
) -> None:
    out = logging_as(secrets=[secret])
    logging.getLogger("stoker").error("it is %s so", secret)
    assert "it is *** so" in out.getvalue()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "0"), ("TOKENIZERS_PARALLELISM", "False"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
        ("MAX_TOKENS", "64"), ("max_tokens", " 64\n"),
    ],
)  # fmt: skip
def test_a_switch_or_a_number_of_tokens_in_the_environment_is_no_secret(name: str, value: str) -> None:
    said = "False at 127.0.0.1: waited 0.5 s, took 1 s, 64 tokens"
    assert Redactor(secrets_of(Settings(), {name: value}))(said) == said


def test_a_password_of_the_environment_that_is_a_number_is_a_secret() -> None:
    environment = {"REDIS_PASSWORD": "4711", "HF_TOKEN": "12345678901234567890"}
    assert Redactor(secrets_of(Settings(), environment))("4711 and 12345678901234567890") == "*** and ***"


def test_a_short_password_is_taken_out_where_it_is_a_word() -> None:
    redact = Redactor(["redis"])
    assert redact("AUTH redis failed for redis_7 of redisearch") == "AUTH *** failed for redis_7 of redisearch"


def test_an_interrupt_is_no_defect_and_is_left_to_python(logging_as: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out, left = logging_as(), []
    monkeypatch.setattr(sys, "__excepthook__", lambda *error: left.append(error[0]))
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert (out.getvalue(), left) == ("", [KeyboardInterrupt])
    sys.excepthook(ValueError, ValueError("x"), None)
    assert json.loads(out.getvalue())["level"] == "critical"


def test_a_traceback_has_no_secret_and_nothing_that_was_left_out_on_purpose(logging_as: Any) -> None:
    out = logging_as()
    try:
        try:
            raise OSError("what was left out")
        except OSError:
            raise OSError("no way to redis://me:s3cret-of-all@host") from None
    except OSError:
        logging.getLogger("stoker").exception("it failed")
    trace = json.loads(out.getvalue())["traceback"]
    assert "no way to redis://***@host" in trace
    assert "left out" not in trace


def test_a_traceback_has_all_that_led_to_an_error_the_first_cause_first(logging_as: Any) -> None:
    out = logging_as()
    try:
        try:
            try:
                raise OSError("first")
            except OSError as error:
                raise OSError("second") from error
        except OSError:
            raise OSError("third")  # noqa: B904  what Python calls the context
    except OSError:
        logging.getLogger("stoker").exception("it failed")
    trace = json.loads(out.getvalue())["traceback"]
    words = ("first", "which led to:", "second", "and then:", "third")
    assert [trace.index(word) for word in words] == sorted(trace.index(word) for word in words)
    assert trace.count("Traceback") == 3


def test_times_of_json_lines_are_those_of_every_machine(logging_as: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = logging_as()
    record = logging.makeLogRecord({"name": "stoker", "msg": "x", "levelno": logging.INFO, "levelname": "INFO"})
    record.created, record.msecs = 86_400.25, 250.0
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        logging.getLogger("stoker").handle(record)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert json.loads(out.getvalue())["time"] == "1970-01-02T00:00:00.250Z"


def test_a_field_of_an_event_has_no_secret_either(logging_as: Any) -> None:
    out = logging_as(secrets=["s3cret-of-all"])
    replace(LINE, client="s3cret-of-all").write(logging.getLogger("stoker.jobs"), logging.INFO)
    assert json.loads(out.getvalue())["client"] == "***"


def test_a_secret_that_begins_as_another_is_taken_out_whole() -> None:
    assert Redactor(["s3cret-of-all", "s3cret-of-all-and-more"])("it is s3cret-of-all-and-more") == "it is ***"


def test_the_words_of_an_error_that_may_quote_a_text_are_left_out_and_its_place_stays(logging_as: Any) -> None:
    out = logging_as()
    try:
        try:
            raise KeyError("a secret prompt")
        except KeyError as error:
            raise InvalidRequest("'a secret prompt' given") from error
    except InvalidRequest:
        logging.getLogger("stoker.test").exception("a defect")
    (line,) = out.getvalue().splitlines()
    shown = json.loads(line)["traceback"]
    assert "secret prompt" not in line
    assert shown.splitlines()[-1] == "InvalidRequest"
    assert "KeyError" in shown
    assert f'File "{__file__}"' in shown


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), AuthenticationError("WRONGPASS invalid"), ModelError("m.gguf is cut off")]
)
def test_the_words_of_an_error_of_machine_broker_or_model_stay(error: Exception, logging_as: Any) -> None:
    out = logging_as()
    logging.getLogger("stoker.test").error("trouble", exc_info=error)
    assert str(error) in json.loads(out.getvalue())["traceback"]


def test_a_line_that_cannot_be_made_shows_no_arguments(logging_as: Any) -> None:
    class Odd:
        def __str__(self) -> str:
            raise ValueError("a secret prompt")

    out = logging_as()
    logging.getLogger("stoker.test").warning("%s %d", "a secret prompt", "no number")
    logging.getLogger("stoker.test").warning("%s", Odd())
    assert out.getvalue().count("could not be written") == 2
    assert "secret" not in out.getvalue()


def test_a_stream_that_is_gone_ends_nothing(logging_as: Any) -> None:
    out = logging_as()
    out.close()
    logging.getLogger("stoker.test").warning("nobody hears it")


def test_what_ends_the_process_or_a_thread_is_a_line_too(logging_as: Any) -> None:
    out = logging_as()
    error = ValueError("a secret prompt")
    sys.excepthook(ValueError, error, None)
    thread = threading.Thread(target=lambda: json.loads("{"))
    thread.start()
    thread.join()
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["level"] for line in lines] == ["critical", "critical"]
    assert "secret" not in out.getvalue()
    assert lines[1]["traceback"].endswith("JSONDecodeError")
