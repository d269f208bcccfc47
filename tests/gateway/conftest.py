"""A gateway on loopback, in this process, over a client that works in memory; and the vendors' own packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import openai
import pytest

from stoker.gateway.app import Gateway
from stoker.local.stack import Stack
from stoker.settings import Settings
from stoker.testing import AsyncFakeClient
from tests.gateway.machinery import Served

if TYPE_CHECKING:
    import anthropic

CHAT, EMBED = "smollm2-135m-instruct", "all-minilm-l6-v2"


@pytest.fixture(scope="session")
def stack(renamed_stack: Stack) -> Stack:
    """What this room shows hangs on no weights, except where a module says so."""
    return renamed_stack


@pytest.fixture(scope="package")
def running() -> Iterator[Served]:
    """It has ended before the tests of other rooms set the process' clock: its timers would never be due."""
    served = Served(Gateway(AsyncFakeClient(settings=Settings())))
    yield served
    served.stop()


@pytest.fixture(scope="package")
def package(running: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def fake() -> AsyncFakeClient:
    return AsyncFakeClient(adapters=["house-style"])


@pytest.fixture
def served(running: Served, fake: AsyncFakeClient) -> Served:
    running.over(Gateway(fake))
    return running


@pytest.fixture
def http(served: Served) -> Iterator[httpx2.Client]:
    """Requests as they are, to a gateway over `fake`."""
    with httpx2.Client(base_url=served.url, timeout=20) as client:
        yield client


@pytest.fixture
def settings(broker: Settings, tmp_path: Path) -> Settings:
    """Of a gateway over `broker`, whose files lie in a home of the test's own."""
    return broker.model_copy(update={"home": tmp_path / "home"})


@pytest.fixture
def api(served: Served, package: openai.OpenAI) -> openai.OpenAI:
    """OpenAI's client of a gateway over `fake`."""
    return package


@pytest.fixture(scope="package")
def claude_package(running: Served) -> Iterator[anthropic.Anthropic]:
    import anthropic  # It takes three seconds: of the processes of `make test` one needs it.

    with anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def claude(served: Served, claude_package: anthropic.Anthropic) -> anthropic.Anthropic:
    """Anthropic's client of the same."""
    return claude_package
