"""A worker with a draft model: clients get the tokens of ordinary decoding, and it says that some were drafted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stoker import Client
from stoker.broker import keys
from stoker.local.stack import Stack
from stoker.monitor import metrics
from stoker.monitor.numbers import MetricsReport
from tests import endless
from tests.conftest import stack_settings, wait_until
from tests.integration.machinery import LONG, PROMPT, endless_in

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A worker whose model has a copy of its own that drafts for it."""
    folder = tmp_path_factory.mktemp("drafting")
    model = endless_in(folder)
    settings = stack_settings(folder / "home").model_copy(update={"models": (model,), "draft_models": (model,)})
    with Stack(settings, flower=False, own_broker=True) as stack:
        stack.wait_until_warm()
        yield stack


def test_a_worker_with_a_draft_model_gives_the_tokens_of_one_without_and_says_that_it_drafts(drafting: Stack) -> None:
    with Client(settings=drafting.settings) as client:
        # One after the other: next to a row that must not draft, another one's drafts are not worth their seconds.
        plain = answer(client, lookup=False)
        assert len(plain) == LONG

        def drafts() -> bool:
            assert answer(client) == plain
            return drafted(client) > 0

        wait_until(drafts, "the worker reports what was drafted")


def answer(client: Client, lookup: bool | None = None) -> tuple[int, ...]:
    job = client.generate(PROMPT, model=endless.MODEL, max_tokens=LONG, temperature=0.8, seed=7, lookup=lookup)
    return job.result(60).token_ids


def drafted(client: Client) -> float:
    """Tokens that the worker says were drafted. Nothing is looked up here: its model alone drafts."""
    (presence,) = client.workers()
    stored = client.redis.get(keys.metrics(presence.worker))
    samples = MetricsReport.model_validate_json(stored).samples if stored else {}
    return sum(sample.value for sample in samples.get(metrics.DRAFTED_TOKENS.name, ()))
