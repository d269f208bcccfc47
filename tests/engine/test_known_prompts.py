"""Rows whose prompts are here except for their last tokens decode at once, from one copy of what they go on from."""

from __future__ import annotations

from typing import Any

import pytest

from engine.adapters.pool import AdapterPool
from engine.checkpoints.loading import LoadedModel
from engine.generation.batch import Batch
from engine.generation.forward_input import ForwardInput
from engine.generation.row import Row
from engine.generation.step import Step
from engine.models.key_values import KeyValues
from engine.models.llama import Llama
from tests.engine import tiny
from tests.engine.test_generate_lane import Driver, Sent, request

COMPLETIONS = 4


@pytest.fixture
def model(tiny_llama: Llama) -> LoadedModel:
    return tiny.loaded(tiny_llama, eos_ids=[])


@pytest.fixture
def driver(model: LoadedModel, pool: AdapterPool) -> Driver:
    return Driver(model, pool, slots=8)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass over prompts."""
    found: list[int] = []
    plain = Step.__call__

    def noting(step: Step, kv: Any, given: ForwardInput, sampling: Any = None) -> Any:
        if isinstance(kv, KeyValues) and given.exact | (given.tokens.shape[1] > 1):
            found.append(given.tokens.size)
        return plain(step, kv, given, sampling)

    monkeypatch.setattr(Step, "__call__", noting)
    return found


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each row that joined: how many rows the storage had that it came from, and which was its own."""
    found: list[tuple[int, int]] = []
    plain = Batch.join

    def noting(batch: Batch, row: Row, source: KeyValues, source_row: int) -> None:
        found.append((source.rows, source_row))
        plain(batch, row, source, source_row)

    monkeypatch.setattr(Batch, "join", noting)
    return found


def prompt(length: int, number: int = 0) -> list[int]:
    return [3 + (number + 7 * at) % 50 for at in range(length)]


def answers(sent: Sent) -> dict[int, list[int]]:
    """The tokens of each completion."""
    found: dict[int, list[int]] = {}
    for token in sent.tokens:
        found.setdefault(token.completion, []).append(token.token_id)
    return found


def apart(model: LoadedModel, pool: AdapterPool, ids: list[int], **options: Any) -> dict[int, list[int]]:
    """What a job gets where nothing is kept."""
    driver = Driver(model, pool, slots=8, prefix_share=0.0)
    sent = driver.send(request(ids, **options))
    driver.run()
    return answers(sent)


@pytest.mark.parametrize("options", [{}, {"adapter": "one"}, {"frequency_penalty": 0.7}, {"lookup": True}], ids=str)
def test_completions_of_a_prompt_decode_as_soon_as_the_first_has_read_it(
    driver: Driver,
    model: LoadedModel,
    pool: AdapterPool,
    read: list[int],
    sources: list[tuple[int, int]],
    options: dict[str, Any],
) -> None:
    asked = {"n": COMPLETIONS, "temperature": 1.0, "seed": 3, "max_tokens": 9, **options}
    sent = driver.send(request(prompt(80), **asked))
    driver.run()
    assert read == [80]
    assert sources == [(1, 0)] * COMPLETIONS
    assert answers(sent) == apart(model, pool, prompt(80), **asked)
    driver.assert_empty()


def test_a_prompt_that_comes_again_next_to_a_stream_has_no_pass_of_its_own(
    driver: Driver, model: LoadedModel, pool: AdapterPool, read: list[int]
) -> None:
    driver.send(request(prompt(80), max_tokens=2))
    driver.run()
    stream = driver.send(request([9, 8, 7], max_tokens=60))
    while len(stream.tokens) < 2:
        driver.step()
    read.clear()
    again = driver.send(request(prompt(80), max_tokens=5))
    while not again.tokens:
        came = len(stream.tokens)
        driver.step()
        assert len(stream.tokens) == came + 1
    driver.run()
    assert not read
    assert again.result.usage.cached_tokens == 79
    assert answers(again) == apart(model, pool, prompt(80), max_tokens=5)


def test_each_of_two_prompts_that_come_again_together_goes_on_from_its_own(
    driver: Driver, model: LoadedModel, pool: AdapterPool, sources: list[tuple[int, int]]
) -> None:
    for number, length in enumerate((80, 80)):
        driver.send(request(prompt(length, number), max_tokens=1))
        driver.run()
    again = [driver.send(request(prompt(length, number), max_tokens=5)) for number, length in enumerate((80, 80))]
    driver.run()
    assert sources == [(2, 0), (2, 1)]
    for sent, (number, length) in zip(again, enumerate((80, 80)), strict=True):
        assert answers(sent) == apart(model, pool, prompt(length, number), max_tokens=5)


def test_a_prompt_that_begins_another_has_a_place_of_its_own(
    driver: Driver, model: LoadedModel, pool: AdapterPool, read: list[int]
) -> None:
    """Both are in what was kept of the longer one."""
    driver.send(request(prompt(80), max_tokens=1))
    driver.run()
    read.clear()
    again = [driver.send(request(prompt(length), max_tokens=5)) for length in (60, 80)]
    driver.run()
    assert not read
    assert [answers(sent) for sent in again] == [
        apart(model, pool, prompt(length), max_tokens=5) for length in (60, 80)
    ]


def test_a_prompt_that_comes_again_with_one_that_is_new_is_read_with_it(
    driver: Driver, model: LoadedModel, pool: AdapterPool, read: list[int]
) -> None:
    driver.send(request(prompt(80), max_tokens=1))
    driver.run()
    read.clear()
    again, new = (driver.send(request(prompt(length, number), max_tokens=5)) for number, length in ((0, 80), (9, 6)))
    driver.run()
    assert read
    for sent, ids in ((again, prompt(80)), (new, prompt(6, 9))):
        assert answers(sent) == apart(model, pool, ids, max_tokens=5)


def test_rows_that_find_no_memory_wait_and_get_the_same(model: LoadedModel, pool: AdapterPool) -> None:
    """The first of them has memory, and those that came last make way."""
    tight = Driver(model, pool, slots=8, kv_bytes=400_000)
    asked = {"n": COMPLETIONS, "temperature": 1.0, "seed": 3, "max_tokens": 150}
    sent = tight.send(request(prompt(250), **asked))
    tight.run()
    assert tight.lane.preempted
    assert answers(sent) == apart(model, pool, prompt(250), **asked)
    tight.assert_empty()
