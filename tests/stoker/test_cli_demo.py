"""`stoker demo` from its first line to its last, on the client in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from stoker.cli import app, demo, verify
from stoker.contract import ModelCard, Presence
from stoker.errors import UnknownModel
from stoker.local import stack as stacks
from stoker.settings import Settings
from stoker.testing import FakeClient

CARD = ModelCard(model="m", architecture="llama", kinds=("generate",), context=64, parameters=135_000_000)
WORKER = Presence(
    worker="w@here", host="here", pid=5, device="cpu", started=0.0, time=9.0, models=(CARD,),
    adapters={}, lanes={}, memory_bytes=2**20,
)  # fmt: skip


class Watched(FakeClient):
    """With the workers that are alive."""

    alive: tuple[Presence, ...] = (WORKER,)

    def workers(self) -> list[Presence]:
        return list(self.alive)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    made = Watched(settings=Settings(url="redis://127.0.0.1:1/0"))
    monkeypatch.setattr(demo, "Client", lambda url: made)
    with made:
        yield made


def test_the_demo_embeds_streams_trains_and_asks_the_base_and_the_adapter(client: Watched) -> None:
    client.script.embed(lambda request: np.eye(len(request.texts), 384, dtype=np.float32), times=None)
    client.script.generate("by the sea", times=1)
    client.script.train([3.0, 2.0, 1.0])
    client.script.generate(lambda request: f"as {request.adapter or 'the base'} says", times=2)
    done = CliRunner().invoke(app, ["demo", "--url", "redis://here"])
    assert done.exit_code == 0, done.output
    sentences, query = client.sent.embed
    assert query.texts == (demo.QUERY,)
    # The first sentence has the vector of the query.
    assert f"1.000  {sentences.texts[0]}" in done.stdout
    assert "by the sea" in done.stdout
    assert "house-style@1: loss 3.000 → 1.000" in done.stdout
    assert "base: as the base says" in done.stdout
    assert "house-style: as house-style says" in done.stdout
    assert [request.steps for request in client.sent.train] == [demo.STEPS]
    assert "135 M parameters" in done.stdout


def test_the_demo_at_a_broker_without_a_worker_says_how_to_start_one(client: Watched) -> None:
    client.alive = ()
    done = CliRunner().invoke(app, ["demo", "--url", "redis://here"])
    assert isinstance(done.exception, UnknownModel)
    assert "Start one with `stoker up`" in str(done.exception)
    assert client.sent.jobs == []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What stacks were to be made of; none is."""
    found: list[Settings] = []

    class Stack:
        def __init__(self, settings: Settings, **_: object) -> None:
            found.append(settings)
            raise UnknownModel("enough")

    monkeypatch.setattr(stacks, "Stack", Stack)
    return found


def test_the_demo_shares_nothing_with_a_fleet_that_the_shell_names(
    asked: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_ARTIFACTS", "s3://fleet/stoker")
    monkeypatch.setenv("STOKER_METRICS", "9464")
    done = CliRunner().invoke(app, ["demo"])
    assert isinstance(done.exception, UnknownModel)
    assert [(settings.artifacts, settings.metrics) for settings in asked] == [(None, None)]


def test_what_is_compared_with_torch_has_all_its_bits_and_the_demo_as_many_as_the_shell_says(
    asked: list[Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("DTYPE", "float16"), ("QUANTIZE", "4bit"), ("KV_BITS", "4")):
        monkeypatch.setenv(f"STOKER_{name}", value)
    CliRunner().invoke(app, ["demo"])
    monkeypatch.setattr(verify, "machine_checks", lambda url: [])
    CliRunner().invoke(app, ["verify", "--report", str(tmp_path / "report.json")])
    found = [(settings.dtype, settings.quantize, settings.kv_bits) for settings in asked]
    assert found == [("float16", "4bit", 4), (None, None, 16)]
