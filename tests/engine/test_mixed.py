"""Prompts go along with the passes of rows that decode, and each gets what it gets apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation import pacing
from engine.generation.drafting import Drafter, Plan
from engine.generation.draws import Pick
from engine.generation.forward_input import ForwardInput
from engine.generation.pacing import LEAST_MIXED, MIXED, TRIES, WITHOUT, LanePacer, MixedPacer
from engine.generation.prefill import SHORT, Prefill
from engine.generation.sampling_batch import SamplingBatch
from engine.generation.step import Step
from engine.models.key_values import KeyValues
from engine.models.llama import Llama
from engine.prefixes.memory import PrefixCache
from stoker.errors import JobCancelled
from tests.engine import tiny
from tests.engine.conftest import TINY, RandomTensors
from tests.engine.test_generate_lane import Driver, Sent, apart, request

LONG = [3 + number % 50 for number in range(120)]


@pytest.fixture
def model(tiny_llama: Llama) -> LoadedModel:
    return tiny.loaded(tiny_llama, eos_ids=[])


@pytest.fixture
def pool(model: LoadedModel, tmp_path: Path) -> AdapterPool:
    return AdapterPool(model, AdapterStore(tmp_path))


class Passes(NamedTuple):
    """Tokens of each pass: of prompts that went along, and of prompts that had one to themselves."""

    along: list[int]
    alone: list[int]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    found, mixed, plain = Passes([], []), Step.mixed, Step.__call__

    def noting(
        step: Step, kv: KeyValues, given: ForwardInput, prompts: KeyValues, chunk: ForwardInput, *more: Any
    ) -> Any:
        found.along.append(chunk.tokens.size)
        return mixed(step, kv, given, prompts, chunk, *more)

    def noting_alone(step: Step, kv: KeyValues, given: ForwardInput, *more: Any) -> Any:
        if given.tokens.shape[1] > 1:
            found.alone.append(given.tokens.size)
        return plain(step, kv, given, *more)

    monkeypatch.setattr(Step, "mixed", noting)
    monkeypatch.setattr(Step, "__call__", noting_alone)
    return found


def streaming(driver: Driver, tokens: int = 300) -> Sent:
    """A row that decodes."""
    sent = driver.send(request([9, 8, 7], max_tokens=tokens))
    while len(sent.tokens) < 2:
        driver.step()
    return sent


def next_to_last_chunk(driver: Driver) -> tuple[Sent, Sent]:
    """A row that decodes, and a prompt whose last tokens are under way with it."""
    stream = streaming(driver)
    later = driver.send(request(LONG[:60], max_tokens=4))
    for _ in range(50):
        pending = driver.lane.batch.in_flight
        if pending is not None and pending.chunk is not None and pending.chunk.waits:
            return stream, later
        driver.step()
    raise AssertionError("no prompt comes to its last tokens")


def ids_apart(model: LoadedModel, pool: AdapterPool, prompt: list[int], tokens: int) -> list[int]:
    """What an answer is by itself, with passes of its own for its prompt."""
    driver = apart(Driver(model, pool))
    sent = driver.send(request(prompt, max_tokens=tokens))
    driver.run()
    return sent.ids


# --- the pass ---


class Sides(NamedTuple):
    """Storage of rows that decode, and of prompts on their way; what goes through the model."""

    rows: KeyValues
    prompts: KeyValues
    given: ForwardInput
    chunk: ForwardInput


def sides(model: Llama, prompts: int, tokens: int) -> Sides:
    """The same numbers at each call. Three of four rows decode, each behind a length of its own."""
    rows, coming = KeyValues(model, 4, 64), KeyValues(model, prompts, 48)
    for seed, kv in enumerate((rows, coming)):
        keys, values, states = kv.stored
        kv.stored = ([filled(array, seed) for array in keys], [filled(array, seed + 7) for array in values], states)
    offset, begun = mx.array([5, 31, 60], mx.int32), mx.array([9, 3, 12][:prompts], mx.int32)
    given = ForwardInput(mx.array([[11], [12], [13]]), offset, 64)
    ids = mx.array(np.arange(prompts * tokens, dtype=np.int32).reshape(prompts, tokens) % 50 + 3)
    end = 9 + tokens if prompts == 1 else 48
    return Sides(rows, coming, given, ForwardInput(ids, begun, end, exact=prompts == 1))


def filled(array: mx.array, seed: int) -> mx.array:
    drawn = mx.random.normal(array.shape, key=mx.random.key(seed)) * 0.3
    return (
        drawn
        if array.dtype == mx.float32
        else mx.random.randint(0, 1 << 20, array.shape, key=mx.random.key(seed)).astype(array.dtype)
    )


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("form", ["plain", "window", "norms and biases", "8 bits", "adapters"])
def test_a_pass_over_both_gives_what_a_pass_over_each_gives(tmp_path: Path, form: str, prompts: int) -> None:
    mx.random.seed(3)
    forms: dict[str, dict[str, Any]] = {
        "window": {"window": 6},
        "norms and biases": {"qk_norm": True, "qkv_bias": True},
    }
    model = Llama(replace(TINY, **forms.get(form, {})), RandomTensors())
    if form == "8 bits":
        model = Llama(replace(TINY, head_dim=32), RandomTensors())
        model.kv_bits = 8
    loaded = tiny.loaded(model, eos_ids=[])
    pool, step, greedy = tiny.pool(loaded, tmp_path), Step(model, "none"), SamplingBatch()
    owners, of_prompts = [0, 0, 0], [0] * prompts
    if form == "adapters":
        one, two = pool.acquire("one"), pool.acquire("two")
        owners, of_prompts = [one, 0, two], [two, one, 0][:prompts]
    tokens = 7
    first = sides(model, prompts, tokens)
    wanted = step(first.rows, replace(first.given, adapters=pool.rows(owners)), greedy)
    last = mx.full((prompts,), tokens - 1, mx.int32)
    wanted_last = step(first.prompts, replace(first.chunk, adapters=pool.rows(of_prompts), last=last), greedy)

    second = sides(model, prompts, tokens)
    each = pool.rows(owners + [owner for owner in of_prompts for _ in range(tokens)])
    ends = mx.array([number * tokens + tokens - 1 for number in range(prompts)], mx.int32)
    chosen = step.mixed(
        second.rows, replace(second.given, adapters=each), second.prompts, replace(second.chunk, last=ends), greedy
    )
    for found, decoded, behind in zip(chosen, wanted, wanted_last, strict=True):
        np.testing.assert_allclose(
            np.array(found), np.concatenate([np.array(decoded), np.array(behind)]), rtol=1e-4, atol=1e-4
        )
    for made, expected in ((second.rows, first.rows), (second.prompts, first.prompts)):
        for found, wanted_array in zip(made.keys + made.values, expected.keys + expected.values, strict=True):
            if form == "8 bits":
                # A number between two codes may take the other one.
                assert (np.array(found) != np.array(wanted_array)).mean() < 0.01
            else:
                np.testing.assert_allclose(np.array(found), np.array(wanted_array), rtol=1e-4, atol=1e-5)


# --- the lane ---


@pytest.mark.parametrize("compiled", ["none", "decode"])
def test_a_prompt_next_to_streams_has_no_pass_of_its_own(
    model: LoadedModel, pool: AdapterPool, passes: Passes, compiled: str
) -> None:
    driver = Driver(model, pool, compiled=compiled)
    stream = streaming(driver)
    passes.alone.clear()
    later = driver.send(request(LONG, max_tokens=5))
    before = len(stream.tokens)
    while not later.tokens:
        driver.step()
    assert passes.alone == []
    assert sum(passes.along) == len(LONG)
    assert len(stream.tokens) - before >= len(passes.along), "the stream had a token in each of these passes"
    driver.run()
    assert stream.ids == ids_apart(model, pool, [9, 8, 7], 300)
    assert later.ids == ids_apart(model, pool, LONG, 5)
    driver.assert_empty()


def test_a_prompt_goes_along_in_even_parts(
    model: LoadedModel, pool: AdapterPool, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanePacer, "mixed_tokens", lambda *_: 10)
    driver = Driver(model, pool)
    streaming(driver)
    for length, parts in ((SHORT + 1, [10, 10, 10, 10, 9]), (60, [10] * 6), (61, [9, 9, 9, 9, 9, 8, 8])):
        passes.along.clear()
        sent = driver.send(request([3 + (length + 7 * at) % 50 for at in range(length)], max_tokens=1))
        while not sent.tokens:
            driver.step()
        assert passes.along == parts


def test_short_prompts_have_a_pass_of_their_own_which_gives_them_their_tokens_sooner(
    model: LoadedModel, pool: AdapterPool, passes: Passes
) -> None:
    driver = Driver(model, pool, slots=4)
    streaming(driver)
    passes.alone.clear()
    sent = [driver.send(request([20 + number] * (SHORT // 2), max_tokens=3)) for number in range(2)]
    driver.step()
    assert [len(one.tokens) for one in sent] == [1, 1], "the pass that was made ahead had not begun"
    assert passes == Passes([], [SHORT])


def test_a_pass_with_prompts_begins_when_it_is_read_so_that_the_one_before_it_is_not_held_up(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU MLX lets its caller wait until nearly all that it was given is done."""
    monkeypatch.setattr(MixedPacer, "tokens", lambda *_: 30)
    driver = Driver(model, pool)
    streaming(driver)
    later = driver.send(request(LONG, max_tokens=4))
    begun, rows_of_passes = list[int](), list[int]()
    for _ in range(8):
        begun.append(passes_begun(driver))
        rows_of_passes.append(driver.rows)
    ahead, with_prompts, both = 0, 1, 2
    assert begun == [ahead, *[with_prompts] * 4, both, 1, 1], "the first without prompts, and one ahead again"
    assert rows_of_passes[4:6] == [1, 2], "the new row is in the pass behind its last tokens"
    assert len(later.tokens) == 4


def passes_begun(driver: Driver) -> int:
    """In one step."""
    before = driver.lane.batch.begun
    driver.step()
    return driver.lane.batch.begun - before


def test_a_prompt_whose_last_tokens_are_under_way_when_all_streams_end_gets_its_first_one(
    model: LoadedModel, pool: AdapterPool, passes: Passes
) -> None:
    driver = Driver(model, pool)
    stream, later = next_to_last_chunk(driver)
    stream.ticket.cancel()
    driver.run()
    assert sum(passes.along) == 60
    assert len(later.ids) == 4
    assert later.ids == ids_apart(model, pool, LONG[:60], 4)
    driver.assert_empty()


def test_a_prompt_that_is_stopped_while_its_last_tokens_are_under_way_gets_none(
    model: LoadedModel, pool: AdapterPool
) -> None:
    driver = Driver(model, pool)
    stream, later = next_to_last_chunk(driver)
    later.ticket.cancel()
    driver.step()
    assert later.ids == []
    with pytest.raises(JobCancelled):
        later.ticket.result(0)
    stream.ticket.cancel()
    driver.step()
    driver.assert_empty()


def test_nothing_is_written_to_the_storage_of_a_row_whose_last_tokens_are_under_way(
    model: LoadedModel, pool: AdapterPool
) -> None:
    """The row has not been taken over yet: a chunk of the others would have padding in its place."""
    driver = apart(Driver(model, pool, slots=2))
    sent = [driver.send(request([20 + length] * length, max_tokens=2)) for length in (6, 30)]
    rows = [driver.lane.waiting[number] for number in range(2)]
    for row in rows:
        row.adapter = pool.acquire(None)
    prefill = Prefill(model.decoder, pool, driver.lane.step, rows, PrefixCache(0), lambda: 0.0)
    first = prefill.next(12)
    assert first is not None
    assert [len(first.parts[row]) for row in rows] == [6, 6]
    first.goes()
    assert first.waits
    assert prefill.next(12) is None
    assert [row for row, _ in first.through([pick()])] == rows[:1]
    second = prefill.next(12)
    assert second is not None
    assert list(second.parts) == rows[1:]
    second.goes()
    last = prefill.next(100)
    assert last is not None
    waited = last.waits
    prefill.rows = []
    assert (waited, last.waits) == (True, False), "the group was given up for a better one"
    assert last.through([pick()]) == []
    assert sent[0].tokens == []


def pick() -> Pick:
    return Pick(token_id=5, logit=0.0, logprob=0.0, probability=1.0)


def test_where_drafts_pay_prompts_have_passes_of_their_own(
    model: LoadedModel, pool: AdapterPool, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(model, pool)
    streaming(driver)
    monkeypatch.setattr(Drafter, "plan", lambda *_: Plan(2))
    passes.alone.clear()
    later = driver.send(request(LONG, max_tokens=1))
    for _ in range(50):
        driver.step()
    assert len(later.tokens) == 1
    assert passes.along == []
    assert sum(tokens for tokens in passes.alone if tokens > 2) == len(LONG)


# --- the pace ---


def test_a_pass_takes_as_many_tokens_along_as_are_measured_to_fit() -> None:
    pacer = MixedPacer()
    assert pacer.tokens(1.0, guess=0.0) == LEAST_MIXED, "nothing is known yet"
    assert pacer.tokens(1.0, guess=0.01) == 100
    pacer.note(10, 0.02)
    assert pacer.tokens(0.05, guess=0.01) == 25
    assert pacer.tokens(0.001, guess=0.01) == LEAST_MIXED
    pacer.note(LEAST_MIXED - 1, 9.0)
    assert pacer.tokens(0.05, guess=0.01) == 25, "few tokens say nothing"
    for _ in range(40):
        pacer.note(10, 0.04)
    assert pacer.tokens(0.05, guess=0.01) == 12


def test_prompts_make_a_pass_less_than_twice_as_long_and_each_further_one_as_much_again() -> None:
    pacer = LanePacer(stall=1.0)
    pacer.note(0.1, 2)
    pacer.note_mixed(0.2, 100)
    assert MIXED < 1
    assert [pacer.mixed_tokens(prompts) for prompts in (1, 3)] == [100 * MIXED, 300 * MIXED]
    assert pacer.mixed_tokens(200) == 1000 * MIXED, "no longer than the stall"


def test_now_and_then_a_pass_goes_without_prompts_and_shows_what_that_takes(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pacer = LanePacer(stall=1.0)
    pacer.note(0.1, 2)
    for _ in range(WITHOUT):
        assert pacer.mixed_tokens(1) > 0
        pacer.note_mixed(0.2, 10)
    assert pacer.mixed_tokens(1) == 0
    pacer.note(0.1, 2)
    assert pacer.mixed_tokens(1) > 0
    for _ in range(WITHOUT):
        pacer.note_mixed(0.2, 10)
    tried = [pacer.mixed_tokens(1) for _ in range(TRIES + 1)]
    assert [tokens > 0 for tokens in tried] == [False] * TRIES + [True], "what is never measured holds no prompt up"

    monkeypatch.setattr(pacing, "WITHOUT", 3)
    monkeypatch.setattr(MixedPacer, "tokens", lambda *_: 8)
    driver, alone = Driver(model, pool), list[Any]()
    streaming(driver)
    plain = LanePacer.note

    def noting(pacer: LanePacer, seconds: float, rows: int | None) -> None:
        alone.append(rows)
        plain(pacer, seconds, rows)

    monkeypatch.setattr(LanePacer, "note", noting)
    later = driver.send(request(LONG, max_tokens=1))
    while not later.tokens:
        driver.step()
    assert 1 in alone[4:]
