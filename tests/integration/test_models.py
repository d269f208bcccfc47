"""Models come and go at a real worker: by command next to a stream, and because a job waits."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stoker import Client
from stoker.cli import app
from stoker.contract import Presence
from stoker.errors import InvalidRequest, ModelError, UnknownModel, WorkerUnavailable
from stoker.local.stack import Stack
from tests.conftest import GENERATE_MODEL, stack_settings, wait_until

pytestmark = pytest.mark.integration

CHECKPOINTS = Path(__file__).parent.parent / "goldens" / "architectures"
FIRST, SECOND, LATER = (str(CHECKPOINTS / name) for name in ("llama-linear", "qwen3", "qwen2-tied"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One worker with one small model; it may load another."""
    home = tmp_path_factory.mktemp("small")
    settings = stack_settings(home, models=(f"first={FIRST}",), on_demand=(f"later={LATER}",), idle_unload=0.5)
    with Stack(settings, flower=False, own_broker=True) as stack:
        stack.wait_until_warm()
        yield stack


@pytest.fixture
def client(small: Stack) -> Iterator[Client]:
    with Client(settings=small.settings) as made:
        yield made


def only(client: Client) -> Presence:
    return max(client.workers(), key=lambda worker: worker.started)


def states(client: Client) -> dict[str, str]:
    return {state.model: state.state for state in only(client).states}


def test_a_model_is_loaded_used_and_unloaded_while_a_stream_runs(client: Client, small: Stack) -> None:
    alone = client.generate("t1 t2", model="first", max_tokens=200, seed=1, temperature=1.0).result(60)
    before = client.models.pin("first").memory_bytes
    job = client.generate("t1 t2", model="first", max_tokens=200, seed=1, temperature=1.0)
    stream = job.stream(timeout=60)
    tokens = [next(stream).token_id]
    loaded = client.models.load(f"second={SECOND}", timeout=60)
    assert loaded.memory_bytes > before
    assert len(client.generate("t1", model="second", max_tokens=5).result(60).token_ids) <= 5
    with pytest.raises(InvalidRequest, match="pinned"):
        client.models.unload("first")
    after = client.models.unload("second", worker=only(client).worker.partition("@")[0], timeout=60)
    tokens += [token.token_id for token in stream]
    assert tuple(tokens) == alone.token_ids
    assert after.memory_bytes <= 1.05 * before
    with pytest.raises(UnknownModel, match="unloaded"):
        client.generate("t1", model="second")
    client.models.unpin("first")


def test_a_model_on_demand_is_loaded_by_a_job_that_waits_and_leaves_when_it_is_idle(client: Client) -> None:
    wait_until(lambda: states(client).get("later") == "offered", "it is offered")
    assert client.generate("t1", model="later", max_tokens=3).result(60).model == "later"
    wait_until(lambda: states(client).get("later") == "offered", "it has left")
    assert client.generate("t1", model="later", max_tokens=3).result(60).model == "later"


def test_the_command_line_says_what_is_warm_and_what_was_refused(client: Client, small: Stack, tmp_path: Path) -> None:
    url = ["--url", small.settings.address.url]
    refused = CliRunner().invoke(app, ["models", "load", f"damaged={tmp_path}", *url])
    assert isinstance(refused.exception, ModelError)
    pinned = CliRunner().invoke(app, ["models", "pin", "first", *url])
    assert pinned.output.startswith("first: pinned at ")
    status = CliRunner().invoke(app, ["status", *url]).output
    assert "warm, pinned: generate, train, adapters" in status
    assert f"refused: {tmp_path}" in status
    client.models.unpin("first")


@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_load_ends_the_command_and_comes_back_as_configured(
    client: Client, small: Stack, tmp_path: Path
) -> None:
    pid = only(client).pid
    with ThreadPoolExecutor() as pool:
        # Its weights take seconds.
        asked = pool.submit(client.models.load, GENERATE_MODEL)
        wait_until(lambda: states(client).get(GENERATE_MODEL) == "loading", "it loads")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerUnavailable, match="went away in the middle of it"):
            asked.result(60)
    # What a supervisor does: the same settings again.
    with Stack(small.settings.model_copy(update={"home": tmp_path / "again"}), flower=False) as again:
        again.wait_until_warm()
        wait_until(lambda: states(client).get("first") == "warm", "it is warm", 60)
        assert GENERATE_MODEL not in states(client)
        assert len(client.generate("t1", model="first", max_tokens=2).result(60).token_ids) == 2
