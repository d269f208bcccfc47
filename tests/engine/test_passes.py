"""How prompts come into the batch, pass by pass: what each reads and writes, and what a neighbour has of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation import seats
from engine.generation.batch import SMALLEST_KV_LENGTH
from engine.generation.forward_input import ForwardInput
from engine.generation.prefill import PrefillPacer
from engine.generation.prefixes import SHORTEST
from engine.generation.step import Compiled, Step
from engine.models.cache import KeyValues
from engine.models.llama import Llama
from tests.engine import tiny
from tests.engine.test_generate_lane import Driver, request


@pytest.fixture
def model(tiny_llama: Llama) -> LoadedModel:
    return tiny.loaded(tiny_llama, eos_ids=[])


@pytest.fixture
def driver(model: LoadedModel, tmp_path: Path) -> Driver:
    driver = Driver(model, AdapterPool(model, AdapterStore(tmp_path)), slots=6)
    driver.lane.step.prompt_buckets = True
    return driver


class Pass(NamedTuple):
    """Over several tokens of each row: the rows of the storage, and the offset that is furthest."""

    rows: int
    offset: int
    tokens: int


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """None writes beyond its storage, or reads less than it has written."""
    found: list[Pass] = []
    plain: Any = Step.__call__

    def noting(self: Step, kv: KeyValues, given: ForwardInput, sampling: Any) -> Any:
        rows, tokens = given.tokens.shape
        if tokens > 1:
            found.append(Pass(rows, int(mx.array(given.offset).max()), tokens))
            assert found[-1].offset + tokens <= given.kv_length <= kv.capacity
        return plain(self, kv, given, sampling)

    monkeypatch.setattr(Step, "__call__", noting)
    return found


def prompt(length: int, first: int = 0) -> list[int]:
    return [3 + (first + number * 7) % 50 for number in range(length)]


def test_a_chunk_that_is_padded_beyond_its_storage_gets_more(
    driver: Driver, model: LoadedModel, tmp_path: Path, passes: list[Pass], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts have 42 tokens of a chunk each, padded to 48: behind 210 of them, beyond the 256 they take."""
    monkeypatch.setattr(PrefillPacer, "note", lambda *_: None)
    prompts = [prompt(SMALLEST_KV_LENGTH - 6, number) for number in range(3)]
    sent = [driver.send(request(one, max_tokens=3)) for one in prompts]
    driver.run()
    assert any(one.offset + one.tokens > SMALLEST_KV_LENGTH for one in passes)
    alone = Driver(model, AdapterPool(model, AdapterStore(tmp_path)))
    for one, together in zip(prompts, sent, strict=True):
        exact = alone.send(request(one, max_tokens=3))
        alone.run()
        assert together.ids == exact.ids


def test_of_completions_of_one_prompt_the_first_alone_reads_it(driver: Driver, passes: list[Pass]) -> None:
    driver.send(request(prompt(4 * SHORTEST), n=3, temperature=1.0, seed=1, max_tokens=3))
    driver.run()
    assert [one.rows for one in passes if one.tokens >= SHORTEST] == [1]


def test_prompts_are_read_together_up_to_so_many_tokens_padding_included(
    driver: Driver, passes: list[Pass], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seats, "GROUP_TOKENS", 90)
    for number, length in enumerate((20, 30, 30, 31, 5, 5)):
        driver.send(request(prompt(length, number), max_tokens=2))
    driver.run()
    assert [one.rows for one in passes] == [3, 2, 1], "3 of 30 tokens, 2 of 31, and one that finds no place"


def test_prompts_of_two_priorities_are_not_read_together(driver: Driver, passes: list[Pass]) -> None:
    """The group has one turn: the worse would go before others of the better."""
    driver.send(request([3], max_tokens=60))
    driver.step()
    passes.clear()
    for number, priority in enumerate((7, 7, 8)):
        driver.send(request(prompt(20, number), max_tokens=2, priority=priority))
    driver.run()
    assert [one.rows for one in passes] == [2, 1]


def test_prompts_of_several_jobs_are_read_together(driver: Driver, passes: list[Pass]) -> None:
    for number in range(3):
        driver.send(request(prompt(20, number), max_tokens=2))
    driver.run()
    assert [one.rows for one in passes] == [3]


@pytest.mark.parametrize(
    ("asked", "decoding", "prompts"), [("none", False, False), ("decode", True, False), ("all", True, True)]
)
def test_a_lane_compiles_the_passes_that_it_was_asked_to(
    model: LoadedModel, tmp_path: Path, asked: Compiled, decoding: bool, prompts: bool
) -> None:
    step = Driver(model, AdapterPool(model, AdapterStore(tmp_path)), compiled=asked).lane.step
    assert (step.decode_buckets, step.prompt_buckets) == (decoding, prompts)
