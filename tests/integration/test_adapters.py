"""The registry through real workers: versions, loading, and a worker that fetches what it does not hold."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from stoker import Client
from stoker.broker import keys
from stoker.errors import InvalidRequest, ModelError, UnknownAdapter
from stoker.local.stack import Stack
from tests import endless
from tests.conftest import replace_worker, stack_settings, wait_until

pytestmark = pytest.mark.integration

OPTIONS = {"model": endless.MODEL, "batch_size": 2, "max_length": 32, "learning_rate": 4e-3}


def train(client: Client, name: str, answer: str, **options: object) -> None:
    rows = [{"prompt": f"Q: {word}?\nA:", "completion": f" {answer}"} for word in ("coal", "steam")]
    client.train(name, rows, steps=3, **{**OPTIONS, **options}).result(120)  # type: ignore[arg-type]


def say(client: Client, adapter: str | None) -> str:
    job = client.generate("Q: coal?\nA:", model=endless.MODEL, adapter=adapter, max_tokens=3)
    return job.result(60).text


def test_versions_are_promoted_and_taken_back_for_all_and_kept_by_who_began(client: Client) -> None:
    train(client, "versions", "Aye, stoker!")
    train(client, "versions", "No more coal", promote=False)
    entry = client.adapters.get("versions")
    assert (entry.serving, list(entry.versions)) == (1, [1, 2])
    first, second = say(client, "versions@1"), say(client, "versions@2")
    assert first != second
    assert say(client, "versions") == first
    long = client.generate("Q: coal?\nA:", model=endless.MODEL, adapter="versions", max_tokens=24)
    tokens = long.stream(timeout=60)
    next(tokens)
    assert client.adapters.promote("versions@2").serving == 2
    assert say(client, "versions") == second
    list(tokens)
    assert long.result(60).adapter == "versions@1"
    assert client.adapters.rollback("versions").serving == 1
    assert say(client, "versions") == first
    with pytest.raises(InvalidRequest, match="serves now"):
        client.adapters.unload("versions@1")
    assert list(client.adapters.unload("versions@2").versions) == [1]
    with pytest.raises(UnknownAdapter, match="the versions of versions: 1"):
        say(client, "versions@2")
    client.adapters.deactivate("versions")
    with pytest.raises(UnknownAdapter, match="none of its versions"):
        say(client, "versions")
    assert "versions" in [entry.name for entry in client.adapters.list()]


def test_an_adapter_from_a_folder_is_checked_and_serves(client: Client, tmp_path: Path, stack: Stack) -> None:
    train(client, "original", "Aye, stoker!")
    folder = stack.settings.adapters / endless.MODEL / "original" / "1"
    result = client.adapters.load("copied", folder).result(60)
    assert (result.adapter, result.version, result.rank, result.method) == ("copied", 1, 8, "lora")
    assert say(client, "copied") == say(client, "original@1")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    notes = json.loads((other / "stoker.json").read_text())
    (other / "stoker.json").write_text(json.dumps({**notes, "base": "another-base"}))
    with pytest.raises(ModelError, match=f"^{other}: an adapter of another base"):
        client.adapters.load("foreign", other).result(60)
    (other / "stoker.json").unlink()
    weights = other / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match=f"^{weights}: .*cut off"):
        client.adapters.load("damaged", other).result(60)
    with pytest.raises(InvalidRequest, match="no adapter in it"):
        client.adapters.load("nothing", tmp_path)
    with pytest.raises(UnknownAdapter):
        client.adapters.get("damaged")


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("store", ["", "shared"], ids=["from the broker", "from a folder by fsspec"])
def test_a_worker_fetches_the_adapter_that_it_does_not_hold(tmp_path: Path, store: str) -> None:
    artifacts = {"artifacts": f"file://{tmp_path / store}"} if store else {}
    models = (f"{endless.MODEL}={endless.write(tmp_path)}",)
    settings = stack_settings(tmp_path / "own", models=models, **artifacts)
    with Stack(settings, flower=False, own_broker=True) as own_stack, Client(settings=own_stack.settings) as client:
        own_stack.wait_until_warm()
        train(client, "fetched", "Aye, stoker!")
        wanted = say(client, "fetched")
        (worker,) = client.workers()
        os.kill(worker.pid, signal.SIGTERM)
        wait_until(lambda: not client.workers(), "the worker is gone", 60)
        shutil.rmtree(own_stack.settings.adapters)
        replace_worker(own_stack)
        own_stack.wait_until_warm()
        assert say(client, "fetched") == wanted
        assert (own_stack.settings.adapters / endless.MODEL / "fetched/1/adapter_model.safetensors").is_file()
        kept = client.redis.exists(keys.artifact(endless.MODEL, "fetched", 1))
        assert bool(kept) is not bool(store)
        if store:
            assert (tmp_path / store / endless.MODEL / "fetched/1.safetensors").is_file()
