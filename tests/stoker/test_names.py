"""Names are checked by one rule wherever they come in, and wherever they become a path."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.adapters.store import AdapterStore
from stoker.broker import registry
from stoker.client.requests import checked_job_id
from stoker.contract import AdapterRequest, GenerateRequest, TrainRequest, build
from stoker.contract.names import Rule, checked, follows
from stoker.errors import InvalidRequest, StokerError
from stoker.settings import Settings
from workers import adapters, artifacts

HOSTILE = (
    *("../../x", "/abs", "..", ".", "", ".hidden", "a/b", "a\\b", "a\x00b", "name\n", "\nname", " name", "-rf"),
    *("ä", "a" * 200, "a b", "a:b", "name@../1", "%2e%2e"),
)


@pytest.mark.parametrize("given", [*HOSTILE, None, 7, b"bytes", ["list"]])
@pytest.mark.parametrize("rule", Rule)
def test_no_rule_lets_through_what_is_no_plain_name(rule: Rule, given: Any) -> None:
    assert not follows(rule, given)
    with pytest.raises(InvalidRequest, match=r"thing: .* given; allowed: 1 to"):
        checked(rule, "thing", given)


def test_plain_names_pass() -> None:
    assert checked(Rule.NAME, "model", "all-minilm_l6.v2") == "all-minilm_l6.v2"
    assert checked(Rule.JOB_ID, "job", "Import-2024.07_a") == "Import-2024.07_a"
    assert checked(Rule.VERSION, "version", "12") == "12"
    assert not follows(Rule.NAME, "Upper")
    assert not follows(Rule.VERSION, "0")
    assert not follows(Rule.VERSION, "-1")


@pytest.mark.parametrize("given", HOSTILE)
def test_requests_take_no_other_names(given: str) -> None:
    fields: list[tuple[type[Any], dict[str, Any]]] = [
        (TrainRequest, {"model": given, "name": "a", "dataset": "worker:x"}),
        (TrainRequest, {"model": "m", "name": given, "dataset": "worker:x"}),
        (AdapterRequest, {"model": "m", "name": given, "upload": "u"}),
        (GenerateRequest, {"model": "m", "prompt": "p", "adapter": given}),
        (GenerateRequest, {"model": "m", "prompt": "p", "adapter": f"a@{given}"}),
    ]
    for request, values in fields:
        with pytest.raises(InvalidRequest):
            build(request, values)
    with pytest.raises(InvalidRequest, match="job_id"):
        checked_job_id(given)
    for command in (given, f"{given}@1", f"a@{given}"):
        with pytest.raises(InvalidRequest):
            registry.wanted(command, version=True)


@pytest.mark.parametrize("given", HOSTILE)
def test_no_adapters_path_leaves_its_root(given: str, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    kept = artifacts.Artifacts(Settings(artifacts=str(tmp_path / "kept")), None)
    for model, name, version in ((given, "a", 1), ("m", given, 1), ("m", "a", given)):
        with pytest.raises(InvalidRequest):
            store.folder(model, name, version)  # type: ignore[arg-type]
        with pytest.raises(StokerError):
            kept.get(model, name, version)  # type: ignore[arg-type]
        with pytest.raises((artifacts.StoreTrouble, StokerError)):
            kept.put(model, name, version, b"")  # type: ignore[arg-type]
    for model, name in ((given, "a"), ("m", given)):
        for action in (store.newest, store.resolve, lambda model, name: store.install(model, name, lambda draft: None)):
            with pytest.raises(InvalidRequest):
                action(model, name)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("number", [b"../../x", b"-5", b"0", b"1.5", b"x", b""])
def test_a_record_with_a_strange_version_ends_its_own_job(number: bytes) -> None:
    redis = SimpleNamespace(hmget=lambda *_: [number], hget=lambda *_: b"1", evalsha=lambda *_: number)
    store = SimpleNamespace(newest=lambda *_: 0)
    run: Any = SimpleNamespace(id="job", runtime=SimpleNamespace(redis=redis, engine=SimpleNamespace(store=store)))
    with pytest.raises(InvalidRequest, match="version of the job's record"):
        adapters.pinned(run, "m", "a")
    with pytest.raises(InvalidRequest, match="version of the job's record"):
        adapters.allocate(run, "m", "a")


def test_what_is_no_version_in_a_registrys_hash_harms_no_other() -> None:
    whole = {b"serving": b"2", b"history": json.dumps(["1"]).encode(), b"version:1": b"{}", b"version:2": b'{"rank":4}'}
    strange = {b"version:../../x": b"{}", b"version:-1": b"{}", b"version:3": b"no json", b"version:4": b"[]"}
    entry = registry.parse("m", "a", whole | strange | {b"version:\xff": b"{}"})
    assert (entry.serving, entry.history, dict(entry.versions)) == (2, (1,), {1: {}, 2: {"rank": 4}})
    for broken in ({b"serving": b"../x"}, {b"history": b"7"}, {b"history": b"{"}, {b"history": b'["../x"]'}):
        entry = registry.parse("m", "a", whole | broken)
        assert set(entry.versions) == {1, 2}
    assert registry.names([b"good", b"../../x", b"\xff", b""]) == ["good"]
