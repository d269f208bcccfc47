"""A pass over a long prompt takes turns with rows that decode, some of the layers in each, and each gets what it gets
apart."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bench.decode_step import random_adapters
from engine.adapters.pool import AdapterPool
from engine.adapters.stacked import StackedLora
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation.forward_input import ForwardInput
from engine.generation.pacing import TURNS, Chunk, LanePacer
from engine.generation.prefill import WHOLE, PassInTurns, Prefill, PrefillPacer
from engine.generation.row import Row
from engine.generation.sampling_batch import SamplingBatch
from engine.generation.step import Step
from engine.models import joint
from engine.models.key_values import KeyValues
from engine.models.llama import Llama
from engine.prefixes.memory import PrefixCache
from stoker.errors import JobCancelled
from tests.engine import tiny
from tests.engine.conftest import TINY, RandomTensors
from tests.engine.test_generate_lane import Driver, Sent, request

LAYERS = TURNS


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Llama:
    """A part for each of its layers."""
    monkeypatch.setattr(joint, "LAYERS_TOGETHER", 1)
    mx.random.seed(5)
    return Llama(replace(TINY, layers=LAYERS), RandomTensors())


@pytest.fixture
def model(llama: Llama) -> LoadedModel:
    return tiny.loaded(llama, eos_ids=[])


@pytest.fixture
def pool(model: LoadedModel, tmp_path: Path) -> AdapterPool:
    """Of an adapter that is on the disk alone, until a job asks for it."""
    store = AdapterStore(tmp_path)
    store.write("tiny", "one", tiny.adapter(model, 2, 1), {})
    return AdapterPool(model, store)


@pytest.fixture
def driver(model: LoadedModel, pool: AdapterPool) -> Driver:
    """As on a GPU, where prompts are compiled."""
    return Driver(model, pool, slots=6, compiled="all")


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each turn: the tokens of its pass, and from which layer it went on."""
    found: list[tuple[int, int]] = []
    further, rest = Step.further, Step.rest

    def going_further(step: Step, kv: KeyValues, given: ForwardInput, parts: int, underway: Any) -> Any:
        found.append((given.tokens.size, 0 if underway is None else underway.done))
        return further(step, kv, given, parts, underway)

    def going_to_the_end(step: Step, kv: KeyValues, given: ForwardInput, sampling: Any, underway: Any) -> Any:
        found.append((given.tokens.size, underway.done))
        return rest(step, kv, given, sampling, underway)

    monkeypatch.setattr(Step, "further", going_further)
    monkeypatch.setattr(Step, "rest", going_to_the_end)
    return found


def prompt(length: int, number: int = 0) -> list[int]:
    return [3 + (number + 7 * at) % 50 for at in range(length)]


def streaming(driver: Driver, tokens: int = 60, **options: Any) -> Sent:
    """A row that decodes."""
    sent = driver.send(request([9, 8, 7], max_tokens=tokens, **options))
    while len(sent.tokens) < 2:
        driver.step()
    return sent


def underway(driver: Driver, turns: Sequence[tuple[int, int]], count: int, **options: Any) -> Sent:
    """A prompt of which so many turns are over."""
    later = driver.send(request(prompt(300), max_tokens=4, **options))
    for _ in range(50):
        if len(turns) == count:
            return later
        driver.step()
    raise AssertionError("its turns do not come")


def apart(model: LoadedModel, pool: AdapterPool, ids: list[int], tokens: int, **options: Any) -> list[int]:
    """What an answer is by itself."""
    driver = Driver(model, pool)
    sent = driver.send(request(ids, max_tokens=tokens, **options))
    driver.run()
    return sent.ids


# --- the pass ---


def outcome(llama: Llama, rows: int, adapters: StackedLora | None, shares: Sequence[int]) -> list[np.ndarray]:
    """What a pass over 20 tokens a row chooses and stores, of which `shares` of the layers go first, one by one."""
    kv, step = KeyValues(llama, rows, 64), Step(llama, "all")
    ids = mx.array(np.arange(rows * 20, dtype=np.int32).reshape(rows, 20) % 50 + 3)
    last = mx.array([19, 4, 11][:rows])
    given = ForwardInput(ids, mx.array([9, 0, 30][:rows], mx.int32), 64, last=last, adapters=adapters)
    if not shares:
        chosen = step(kv, given, SamplingBatch())
    else:
        begun = None
        for share in shares:
            begun = step.further(kv, given, share, begun)
            mx.eval(begun.hidden, kv.stored)
        assert begun is not None
        chosen = step.rest(kv, given, SamplingBatch(), begun)
    return [np.array(array) for array in (*chosen, *kv.keys, *kv.values)]


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shares", [(1, 1, 1), (2,), (1, 2)])
def test_a_pass_in_turns_gives_every_bit_that_one_in_a_piece_gives(
    llama: Llama, rows: int, adapted: bool, shares: Sequence[int]
) -> None:
    adapters = random_adapters(llama, rows, 2, ("q_proj", "down_proj"), rank=3) if adapted else None
    for got, wanted in zip(outcome(llama, rows, adapters, shares), outcome(llama, rows, adapters, ()), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_ranks_that_have_layers_each_take_no_turns(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one rank's part begins with is what another's whole pass ends with."""
    whole = Llama.kv_sizes.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Llama, "kv_sizes", property(lambda own: whole(own)._replace(counted=(64, 0))))
    assert Step(llama, "all").parts == 1


# --- the lane ---


def test_a_stream_has_a_token_between_two_turns_of_a_long_prompt(
    driver: Driver, model: LoadedModel, pool: AdapterPool, turns: list[tuple[int, int]]
) -> None:
    stream = streaming(driver)
    long = driver.send(request(prompt(300), max_tokens=4))
    while not long.tokens:
        taken, came = len(turns), len(stream.tokens)
        driver.step()
        assert len(turns) - taken <= 1
        assert len(stream.tokens) == came + 1 or long.tokens
    assert [done for _, done in turns] == list(range(LAYERS + 1))
    driver.run()
    assert long.ids == apart(model, pool, prompt(300), 4)
    assert stream.ids == apart(model, pool, [9, 8, 7], 60)
    driver.assert_empty()


def test_each_chunk_of_a_prompt_takes_its_turns(
    driver: Driver, model: LoadedModel, pool: AdapterPool, turns: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrefillPacer, "note", lambda *_: None)
    streaming(driver)
    long = driver.send(request(prompt(900), max_tokens=4))
    driver.run()
    # Behind the last chunk's layers its token has a turn to itself.
    assert [done for _, done in turns] == [*range(LAYERS), *range(LAYERS + 1)]
    assert long.ids == apart(model, pool, prompt(900), 4)


def test_a_prompt_that_is_not_long_has_its_first_token_after_one_pass(
    driver: Driver, turns: list[tuple[int, int]]
) -> None:
    streaming(driver)
    short = driver.send(request(prompt(WHOLE), max_tokens=2))
    driver.run()
    assert len(short.tokens) == 2
    assert not turns


def test_a_long_prompt_next_to_nobody_takes_one_turn(driver: Driver, turns: list[tuple[int, int]]) -> None:
    driver.send(request(prompt(300), max_tokens=2))
    driver.run()
    assert not turns


@pytest.mark.parametrize("count", [1, 3])
def test_a_job_that_is_cancelled_between_two_turns_leaves_nothing(
    driver: Driver, model: LoadedModel, pool: AdapterPool, turns: list[tuple[int, int]], count: int
) -> None:
    stream = streaming(driver)
    gone = underway(driver, turns, count, adapter="one")
    gone.ticket.cancel()
    driver.run()
    assert len(turns) == count
    with pytest.raises(JobCancelled):
        gone.ticket.result(0)
    assert stream.ids == apart(model, pool, [9, 8, 7], 60)
    driver.assert_empty()


def test_the_others_of_a_group_go_on_without_one_that_leaves_between_two_turns(
    driver: Driver, model: LoadedModel, pool: AdapterPool, turns: list[tuple[int, int]]
) -> None:
    streaming(driver)
    staying = driver.send(request(prompt(300, 1), max_tokens=4))
    leaving = underway(driver, turns, 2)
    assert len(driver.lane.prefilling) == 2
    leaving.ticket.cancel()
    driver.run()
    assert staying.ids == apart(model, pool, prompt(300, 1), 4)
    assert not leaving.tokens
    driver.assert_empty()


def test_what_is_left_of_a_pass_takes_one_turn_when_the_streams_have_ended(
    driver: Driver, model: LoadedModel, pool: AdapterPool, turns: list[tuple[int, int]]
) -> None:
    stream = streaming(driver)
    long = underway(driver, turns, 1)
    stream.ticket.cancel()
    driver.run()
    assert [done for _, done in turns] == [0, 1]
    assert long.ids == apart(model, pool, prompt(300), 4)


def test_a_prompt_of_a_better_priority_goes_between_two_turns(
    driver: Driver, model: LoadedModel, pool: AdapterPool, turns: list[tuple[int, int]]
) -> None:
    streaming(driver, priority=4)
    long = underway(driver, turns, 2, priority=4)
    urgent = driver.send(request(prompt(20, 3), max_tokens=4, priority=1))
    while not urgent.tokens:
        driver.step()
    assert len(turns) == 2
    driver.run()
    assert urgent.ids == apart(model, pool, prompt(20, 3), 4)
    assert long.ids == apart(model, pool, prompt(300), 4)


def test_an_adapter_that_comes_between_two_turns_changes_nothing_of_theirs(
    driver: Driver, model: LoadedModel, pool: AdapterPool, turns: list[tuple[int, int]]
) -> None:
    streaming(driver, priority=4)
    long = underway(driver, turns, 2, priority=4)
    adapted = driver.send(request(prompt(20, 3), max_tokens=4, adapter="one", priority=1))
    driver.run()
    assert adapted.ids == apart(model, pool, prompt(20, 3), 4, adapter="one")
    assert long.ids == apart(model, pool, prompt(300), 4)


# --- how much of it ---


def test_the_tokens_of_a_chunk_are_found_by_what_all_its_turns_take(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[tuple[int, float, float]] = []
    monkeypatch.setattr(PrefillPacer, "note", lambda _, *given: noted.append(given))
    step, pacer = Step(model.decoder, "all"), LanePacer(1.0)
    pacer.note(2.0, 1)
    for known in (False, False, True):
        row = a_row(model, pool)
        group = Prefill(model.decoder, pool, step, [row], PrefixCache(0), time.perf_counter)
        for turn in range(LAYERS + 1):
            assert not noted
            group.advance(PrefillPacer(512), 0.25, LAYERS)
            assert group.turns is not None
            if not known and turn == 1:
                # As if it had been compiled in this turn.
                group.turns.known = False
            pacer.note_turn(group.turns, 2.5)
        # Nobody knows what a pass takes by one that was compiled meanwhile.
        assert noted == ([(300, (LAYERS + 1) * 0.5, 0.25 * LAYERS)] if known else [])


def test_a_lane_says_what_a_turn_took(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its whole step, less what the rows that decode take."""
    noted: list[bool] = []
    plain = LanePacer.note_turn

    def noting(pacer: LanePacer, turn: PassInTurns, seconds: float) -> None:
        noted.append(turn.over)
        plain(pacer, turn, seconds)

    monkeypatch.setattr(LanePacer, "note_turn", noting)
    streaming(driver)
    driver.send(request(prompt(300), max_tokens=4))
    driver.run()
    assert noted == [False] * LAYERS + [True]


def test_a_turn_in_which_something_was_compiled_says_nothing(model: LoadedModel, pool: AdapterPool) -> None:
    step = Step(model.decoder, "all")
    found = []
    for _ in range(2):
        group = Prefill(model.decoder, pool, step, [a_row(model, pool)], PrefixCache(0), time.perf_counter)
        for _ in range(LAYERS + 1):
            group.advance(PrefillPacer(512), 0.25, LAYERS)
            assert group.turns is not None
            found.append(group.turns.known)
    assert found == [False] * (LAYERS + 1) + [True] * (LAYERS + 1)


def a_row(model: LoadedModel, pool: AdapterPool) -> Row:
    """One of a prompt of 300 tokens, before its pass."""
    driver = Driver(model, pool)
    driver.send(request(prompt(300), max_tokens=2))
    (row,) = driver.lane.held
    row.adapter = 0
    return row


def test_long_prompts_have_turns_next_to_streams_alone() -> None:
    pacer = LanePacer(1.0, 512)
    pacer.begin({5}, empty=False)
    pacer.decodes()
    busy: list[Chunk] = [pacer.chunk(5, decoding=True, long=long) for long in (True, False)]
    assert [chunk.turns for chunk in busy] == [TURNS, 1]
    assert busy[0].pacer is not busy[1].pacer
    assert pacer.chunk(5, decoding=False, long=True).turns == 1


def test_a_model_of_one_part_has_the_pace_of_other_prompts(
    driver: Driver, turns: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that runs through mlx-lm's file: with four times the patience its chunks would hold streams up."""
    found: list[bool] = []
    plain = LanePacer.chunk

    def noting(pacer: LanePacer, priority: int, *, long: bool, **how: Any) -> Chunk:
        found.append(long)
        return plain(pacer, priority, long=long, **how)

    monkeypatch.setattr(driver.lane.step, "parts", 1)
    monkeypatch.setattr(LanePacer, "chunk", noting)
    streaming(driver)
    driver.send(request(prompt(300), max_tokens=2))
    driver.run()
    assert not turns
    assert not any(found)


@pytest.mark.parametrize(("seconds", "tokens"), [(1.0, 32), (0.002, 512)], ids=["by tokens", "by launches"])
def test_the_first_chunk_next_to_streams_is_no_longer_than_prompts_next_to_nobody_say(
    seconds: float, tokens: int
) -> None:
    """On a device that 512 tokens take seconds, streams would wait for as long until that is measured."""
    pacer = LanePacer(1.0, 512)
    pacer.note(0.025, 1)
    pacer.begin({5})
    alone = pacer.chunk(5, decoding=False).pacer
    alone.note(256, seconds, 1.0)
    pacer.begin({5}, empty=False)
    pacer.decodes()
    chunk = pacer.chunk(5, decoding=True, long=True)
    assert chunk.pacer.tokens == tokens
    # What was measured of its own counts from then on.
    chunk.pacer.note(tokens, 0.001, 0.1)
    alone.note(alone.tokens, 60.0, 100.0)
    assert pacer.chunk(5, decoding=True, long=True).pacer.tokens == 2 * tokens
