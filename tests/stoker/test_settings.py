"""Settings: from the environment, whole or refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, get_type_hints

import pytest

from stoker.address import DEFAULT_URL
from stoker.errors import BrokerUnavailable, ConfigError
from stoker.files.locks import try_lock
from stoker.settings import Overrides, Settings, load_settings


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STOKER_URL", "redis://elsewhere:7000/1")
    monkeypatch.setenv("STOKER_HOME", str(tmp_path))
    monkeypatch.setenv("STOKER_MODELS", " one , two=/models/two,, ")
    monkeypatch.setenv("STOKER_GENERATE_SLOTS", "4")
    settings = load_settings()
    assert settings.address.shown == "redis://elsewhere:7000/1"
    assert settings.models == ("one", "two=/models/two")
    assert settings.generate_slots == 4
    assert (settings.adapters, settings.logs) == (tmp_path / "adapters", tmp_path / "logs")


def test_an_override_wins_and_none_is_no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_GRACE", "7")
    assert load_settings(grace=2.5).grace == 2.5
    assert load_settings(grace=None).grace == 7


def test_an_unknown_name_is_refused_with_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_MODLES", "x")
    with pytest.raises(ConfigError, match="STOKER_MODLES: no such setting; did you mean STOKER_MODELS"):
        load_settings()


def test_an_unknown_name_without_a_near_one_is_refused_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_ZZZZZZZ", "x")
    with pytest.raises(ConfigError) as error:
        load_settings()
    assert all(f"STOKER_{name.upper()}" in str(error.value) for name in Settings.model_fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GENERATE_SLOTS", "0"),
        ("GENERATE_SLOTS", "many"),
        ("TRAIN_RUNS", "9"),
        ("LEASE", "2"),
        ("GRACE", "-1"),
        ("PATIENCE", "nan"),
    ],
)
def test_a_wrong_value_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"STOKER_{name}", value)
    with pytest.raises(ConfigError, match=f"STOKER_{name}: '{value}' given; "):
        load_settings()


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().grace = 1.0


def test_the_home_folder_is_absolute_in_every_form_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_HOME", "~/somewhere")
    assert load_settings().home == Path.home() / "somewhere"
    monkeypatch.setenv("STOKER_HOME", "here")
    assert load_settings().home == Path.cwd() / "here"


def assert_none(settings: Settings) -> None:
    """No broker is taken, and the error says where one was looked for, and what to do."""
    assert settings.chosen_url is None
    with pytest.raises(BrokerUnavailable, match=r"STOKER_URL is not set.*`stoker up`") as raised:
        _ = settings.address
    assert f"STOKER_HOME={settings.home}." in str(raised.value)
    assert DEFAULT_URL in str(raised.value)
    assert str(settings.home) in settings.shown_address


@contextmanager
def running(settings: Settings) -> Iterator[None]:
    """As if a `stoker up` ran with this home, except for its record."""
    settings.broker_lock.parent.mkdir(exist_ok=True)
    with settings.broker_lock.open("w") as lock:
        assert try_lock(lock)
        yield


def test_without_a_url_the_running_broker_of_this_machine_is_used(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert_none(settings)
    record = {"url": "redis://127.0.0.1:7001/0", "pid": os.getpid()}
    settings.broker_file.write_text(json.dumps(record))
    with running(settings):
        for _ in range(2):
            assert settings.address.redis == "redis://127.0.0.1:7001/0"
        assert Settings(home=tmp_path, url="redis://other/0").address.shown == "redis://other:6379/0"


@pytest.mark.parametrize("locked_before", [True, False])
def test_the_record_of_a_broker_that_a_power_cut_ended_is_ignored_though_its_number_is_another_processs(
    tmp_path: Path, locked_before: bool
) -> None:
    settings = Settings(home=tmp_path)
    settings.broker_file.write_text(json.dumps({"url": "redis://127.0.0.1:7001/0", "pid": os.getpid()}))
    if locked_before:
        with running(settings):
            assert settings.chosen_url is not None
    assert_none(settings)


def test_the_record_of_a_broker_that_has_ended_is_ignored(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    settings = Settings(home=tmp_path)
    settings.broker_file.write_text(json.dumps({"url": "redis://127.0.0.1:7001/0", "pid": ended.pid}))
    with running(settings):
        assert_none(settings)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", '{"pid": "x", "url": "y"}', '{"pid": null}', "\x00", "\udcff", "[" * 60_000, "1" * 5000,
        '{"pid": 1e300, "url": "redis://x"}', '{"pid": 99999999999999999999, "url": "redis://x"}',
        '{"pid": OURS, "url": "http://x"}', '{"pid": OURS, "url": ["redis://x"]}',
        f'{{"pid": OURS, "url": "redis://x", "more": "{"x" * 100_000}"}}',
    ],
)  # fmt: skip
def test_a_damaged_record_of_a_broker_is_ignored(tmp_path: Path, text: str) -> None:
    settings = Settings(home=tmp_path)
    written = text.replace("OURS", str(os.getpid()))
    settings.broker_file.write_bytes(written.encode("utf-8", "surrogateescape"))
    with running(settings):
        assert_none(settings)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_record_that_is_no_file_is_ignored_and_never_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    settings = Settings(home=tmp_path)
    make(settings.broker_file)
    with running(settings):
        assert_none(settings)


def test_without_a_home_folder_the_error_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("STOKER_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", none)
    with pytest.raises(ConfigError, match=r"STOKER_HOME: .*cannot be found"):
        load_settings()


@pytest.mark.parametrize("models", [("a", "b"), ()])
def test_a_child_process_reads_the_same_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: tuple[str, ...]
) -> None:
    given = load_settings(home=tmp_path, models=models, generate_slots=3, quantize="8bit", grace=1.5)
    for name, value in given.environment().items():
        monkeypatch.setenv(name, value)
    assert load_settings() == given


def test_a_child_process_inherits_nothing_that_its_settings_do_not_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = Settings(home=tmp_path, kv_bits=8)
    shared = {"ARTIFACTS": "memory://fleet", "METRICS": "9464", "GROUP": "g", "RANKS": "2", "SHARD": "true"}
    shared |= {"DATA": str(tmp_path), "ON_DEMAND": "all-minilm-l6-v2", "URL": "redis://fleet/0"}
    shared |= {"DRAFT_MODELS": "smollm2-135m-instruct=/small"}
    for name, value in shared.items():
        monkeypatch.setenv(f"STOKER_{name}", value)
    given = load_settings(home=tmp_path, kv_bits=8).alone()
    for name, value in given.environment().items():
        monkeypatch.setenv(name, value)
    assert load_settings() == given == plain


@pytest.mark.parametrize("name", ["STOKER_MODELS", "STOKER_ON_DEMAND", "STOKER_DRAFT_MODELS"])
def test_a_list_that_is_blank_by_mistake_is_not_taken_for_no_model(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, " ")
    with pytest.raises(ConfigError, match=rf"{name}: ' ' given; .*a comma alone is no model"):
        load_settings()
    monkeypatch.setenv(name, ",")
    load_settings()


def test_an_empty_variable_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_URL", "")
    monkeypatch.setenv("STOKER_MODELS", "")
    assert load_settings().url is None
    assert load_settings().models


def test_a_caller_may_say_every_setting_under_its_name_and_with_its_type() -> None:
    declared: dict[str, Any] = get_type_hints(Settings)
    said = get_type_hints(Overrides)
    assert said.keys() == Settings.model_fields.keys()
    # None says nothing, and a sequence of models may be any.
    wanted = {name: Optional[declared[name]] for name in said}  # noqa: UP045 -- a type that is known at run time only
    assert said == wanted | dict.fromkeys(("models", "on_demand", "draft_models"), Sequence[str] | None)
    with pytest.raises(ConfigError, match="STOKER_LEASES: 3 given"):
        load_settings(leases=3)  # type: ignore[call-arg]
