"""Jobs of a worse priority next to a stream: what they add to its steps, by a clock that counts rows and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import quantiles
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation import lane, pacing
from engine.generation.batch import Batch, Read
from engine.generation.forward_input import ForwardInput
from engine.generation.grouping import Grouping
from engine.generation.kv_budget import KvBudget
from engine.generation.pacing import ALONE, EVERY, FORGET, LEAST, STRETCH, LanePacer
from engine.generation.prefill import Prefill
from engine.generation.prompt import TokenizedPrompt
from engine.generation.prompts import Prompts
from engine.generation.roster import Roster
from engine.generation.row import Generation, Row
from engine.generation.seats import Seats
from engine.generation.step import Step
from engine.models.key_values import KeyValues
from engine.models.llama import Llama
from engine.ticket import Ticket
from tests.engine import tiny
from tests.engine.conftest import TINY, RandomTensors
from tests.engine.test_batch import row_of, seat
from tests.engine.test_generate_lane import Driver, Sent, apart, request
from tests.thorough import quick

STREAM, BULK = 5, 9


@pytest.fixture
def model() -> LoadedModel:
    """Of one layer: whose turn it is hangs on no number that a model computes."""
    mx.random.seed(7)
    return tiny.loaded(Llama(replace(TINY, layers=1), RandomTensors()), eos_ids=[])


@pytest.fixture
def pool(model: LoadedModel, tmp_path: Path) -> AdapterPool:
    return AdapterPool(model, AdapterStore(tmp_path))


@dataclass
class Device:
    """A pass of one row takes 1, each row more `row`; a prompt's chunk takes 1 and `token` for each token."""

    row: float
    token: float = 0.1
    now: float = 0.0
    #: The priorities of the rows of each pass that was read; of each chunk, its priority and tokens.
    passes: list[list[int]] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    _prompts_of: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Device:
        read, advance, through = Batch.read, Prefill.advance, Step.__call__

        def timed_read(batch: Batch, pending: Any) -> Read:
            self.passes.append([row.priority for row in pending.rows])
            self.now += 1 + self.row * (len(pending.rows) - 1)
            return read(batch, pending)

        def timed_pass(step: Step, kv: KeyValues, given: ForwardInput, *rest: Any) -> Any:
            if given.last is not None:
                self.chunks.append((self._prompts_of, given.tokens.size))
                self.now += 1 + self.token * given.tokens.size
            return through(step, kv, given, *rest)

        def noted(prompts: Prefill, *rest: Any) -> Any:
            self._prompts_of = prompts.priority
            return advance(prompts, *rest)

        monkeypatch.setattr(Batch, "read", timed_read)
        monkeypatch.setattr(Prefill, "advance", noted)
        monkeypatch.setattr(Step, "__call__", timed_pass)
        # Lanes that are made from here on measure by it.
        monkeypatch.setattr(lane, "time", SimpleNamespace(perf_counter=lambda: self.now))
        return self


def stream(number: int, tokens: int = 60) -> Any:
    return request([3 + number % 50, 7], max_tokens=tokens, priority=STREAM)


def bulk(number: int, tokens: int = 20, length: int = 12) -> Any:
    return request([3 + (number + at) % 50 for at in range(length)], max_tokens=tokens, priority=BULK)


def gaps_of_streams(driver: Driver, device: Device, count: int) -> list[float]:
    """One stream after the other; the time between two tokens of each."""
    gaps: list[float] = []
    for number in range(count):
        sent, last, seen = driver.send(stream(number)), 0.0, 0
        while not sent.ticket.done:
            driver.step()
            if len(sent.tokens) > seen:
                assert len(sent.tokens) == seen + 1
                gaps += [device.now - last] if seen else []
                last, seen = device.now, len(sent.tokens)
    return gaps


def p95(gaps: Sequence[float]) -> float:
    return quantiles(gaps, n=20)[-1]


@pytest.mark.parametrize("row", quick(0.05, of=[0.0, 0.05, 0.3, 2.0]))
def test_a_stream_keeps_its_pace_next_to_a_flood_and_the_flood_ends(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch, row: float
) -> None:
    """Of a stream's tokens, 95 in 100 come within twice the time that they take alone, at any cost of a row."""
    device = Device(row).install(monkeypatch)
    alone = gaps_of_streams(Driver(model, pool, slots=8, stall=5.0), device, 4)
    driver = Driver(model, pool, slots=8, stall=5.0)
    flood = [driver.send(bulk(number)) for number in range(60)]
    for _ in range(30):
        driver.step()
    device.passes.clear()
    next_to_it = gaps_of_streams(driver, device, 6)
    assert p95(next_to_it) <= 2 * p95(alone)
    assert max(next_to_it) <= p95(alone) + 5.0 + 1 + 8 * row + 4.2, "a turn of the background has a bound"
    assert any(BULK in rows for rows in device.passes)
    assert not all(sent.ticket.done for sent in flood)
    driver.run()
    assert [len(sent.tokens) for sent in flood] == [20] * 60
    driver.assert_empty()


def flooded(model: LoadedModel, pool: AdapterPool) -> Driver:
    """Seven of eight slots have long rows of bulk, which decode."""
    driver = Driver(model, pool, slots=8, stall=5.0)
    for number in range(7):
        driver.send(bulk(number, tokens=400))
    for _ in range(60):
        driver.step()
    return driver


def test_rows_that_cost_next_to_nothing_all_decode_with_the_stream(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(0.01).install(monkeypatch)
    driver = flooded(model, pool)
    device.passes.clear()
    gaps_of_streams(driver, device, 4)
    full = sum(len(rows) == 8 for rows in device.passes)
    assert full > 0.7 * len(device.passes)


@pytest.mark.parametrize("row", [0.3, 2.0])
def test_a_pass_takes_no_more_rows_than_the_stretch_allows(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch, row: float
) -> None:
    device = Device(row).install(monkeypatch)
    driver = flooded(model, pool)
    device.passes.clear()
    gaps_of_streams(driver, device, 8)
    slow = sum(1 + row * (len(rows) - 1) > STRETCH for rows in device.passes if STREAM in rows)
    assert 0 < slow < 0.05 * len(device.passes), "they were tried, or it was the turn of the background"


def test_without_a_stream_a_flood_runs_as_if_it_were_of_the_usual_priority(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(0.3).install(monkeypatch)
    took = []
    for priority in (STREAM, BULK):
        began, driver = device.now, Driver(model, pool, slots=8)
        for number in range(24):
            driver.send(bulk(number).model_copy(update={"priority": priority}))
        driver.run()
        took.append(device.now - began)
    assert took[0] == pytest.approx(took[1])


def test_the_background_goes_on_next_to_streams_without_end(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not one row of it fits: in each of its turns a prompt goes on, and each of its rows gets a token."""
    device = Device(5.0).install(monkeypatch)
    driver = Driver(model, pool, slots=4, stall=50.0)
    driver.send(stream(0, tokens=900))
    driver.step()
    flood = [driver.send(bulk(number, tokens=4)) for number in range(6)]
    for _ in range(EVERY + 1):
        driver.step()
    assert sum(len(sent.tokens) for sent in flood) >= 1, "a prompt in the first turn"
    for _ in range(8 * EVERY):
        driver.step()
    assert sum(len(sent.tokens) for sent in flood) >= 8, "a token a turn at least"
    assert any(sent.ticket.done for sent in flood)
    assert sum(BULK in rows for rows in device.passes) <= 10 + (ALONE + LEAST)


def test_a_stream_has_a_slot_at_once_where_bulk_has_them_all_and_leaves_it_the_last(
    model: LoadedModel, pool: AdapterPool
) -> None:
    driver = Driver(model, pool, slots=4)
    flood = [driver.send(bulk(number, tokens=30)) for number in range(8)]
    for _ in range(6):
        driver.step()
    assert [row.priority for row in driver.lane.batch.rows] == [BULK] * 4
    streams = [driver.send(stream(number, tokens=8)) for number in range(6)]
    driver.step()
    assert len(streams[0].tokens) == 1, "its prompt is short: the first token comes with the first step"
    here: list[list[int]] = []
    while not all(sent.ticket.done for sent in streams):
        driver.step()
        here.append(sorted(row.priority for row in driver.lane.batch.rows))
    assert max(here, key=lambda rows: rows.count(STREAM)) == [STREAM] * 3 + [BULK]
    driver.run()
    assert [len(sent.tokens) for sent in flood] == [30] * 8, "what was put back goes on where it was"
    assert [[token.index for token in sent.tokens] for sent in flood] == [list(range(30))] * 8
    driver.assert_empty()


def test_the_only_slot_of_a_lane_is_the_streams(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool, slots=1)
    flood = driver.send(bulk(0))
    driver.step()
    sent = driver.send(stream(0, tokens=4))
    while not sent.ticket.done:
        driver.step()
    assert not flood.ticket.done
    driver.run()
    assert len(flood.tokens) == 20


def test_a_streams_prompt_goes_before_a_long_one_of_bulk_which_goes_on_where_it_was(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(0.3, token=0.01).install(monkeypatch)
    driver = Driver(model, pool, slots=4)
    long = driver.send(bulk(0, tokens=3, length=900))
    driver.step()
    assert not long.tokens
    before = sum(tokens for _, tokens in device.chunks)
    sent = driver.send(stream(0, tokens=10))
    driver.step()
    assert len(sent.tokens) == 1
    while not sent.ticket.done:
        driver.step()
    assert [priority for priority, _ in device.chunks[-1:]] == [STREAM], "no chunk of the other meanwhile"
    assert not long.tokens
    driver.run()
    through = sum(tokens for priority, tokens in device.chunks if priority == BULK)
    assert before < through == 900, "each token of it once"
    assert len(long.tokens) == 3


def test_bulk_makes_way_when_memory_is_short_also_where_it_came_first(model: LoadedModel, pool: AdapterPool) -> None:
    tight = Driver(model, pool, slots=4, kv_bytes=165_000)
    flood = [tight.send(request([3 + n, 4], max_tokens=270, priority=BULK)) for n in range(2)]
    for _ in range(5):
        tight.step()
    streams = [tight.send(request([9 + n, 4], max_tokens=270, priority=STREAM)) for n in range(2)]
    while not all(sent.ticket.done for sent in streams):
        tight.step()
        assert tight.lane.kv_bytes <= 165_000
        assert not any(row.priority == STREAM for row in tight.lane.waiting if row.tokens), "no stream was put back"
    assert tight.lane.preempted > 0
    tight.run()
    assert [len(sent.tokens) for sent in (*flood, *streams)] == [270] * 4


def waiting_rows(model: LoadedModel, *priorities: int) -> list[Row]:
    prompt, tokenizer = TokenizedPrompt([3]), model.tokenizer
    asked = [request([3], priority=priority) for priority in priorities]
    return [Generation(Ticket("job", "generate"), one, prompt, tokenizer, 64).rows[0] for one in asked]


def test_rows_wait_by_priority_and_go_back_to_where_they_were(model: LoadedModel) -> None:
    roster, rows = Roster(), waiting_rows(model, 5, 9, 5, 0)
    for row in rows:
        roster.admit([row])
    first, bulk_row, second, best = rows
    assert roster.waiting == [best, first, second, bulk_row]
    for row in (first, second):
        roster.waiting.remove(row)
    roster.put_back([second])
    roster.put_back([first])
    assert roster.waiting == [best, first, second, bulk_row]


@pytest.mark.parametrize(
    ("joins", "first", "stays"), [(BULK, False, True), (BULK, True, True), (STREAM, False, True), (STREAM, True, False)]
)
def test_a_row_that_finds_no_memory_as_it_joins_puts_none_back_that_goes_before_it(
    model: LoadedModel, pool: AdapterPool, joins: int, first: bool, stays: bool
) -> None:
    batch, roster = Batch(model.decoder, pool, Step(model.decoder, "none")), Roster()
    rows = waiting_rows(model, *((joins, STREAM, STREAM) if first else (STREAM, STREAM, joins)))
    joining = rows[0 if first else -1]
    seated = [row for row in rows if row is not joining]
    roster.admit(rows)
    roster.waiting.clear()
    for row in seated:
        seat(batch, model, row)
    # Memory for one row.
    budget = Mock(spec=KvBudget, must_shrink=lambda joining: len(batch.rows) + len(joining) > 1)
    seats = Seats(4, roster, Prompts(budget), batch, budget, 0)
    assert seats.make_room(joining) is not stays
    assert roster.waiting == ([joining] if stays else seated)
    assert len(batch.rows) == (2 if stays else 0)


def test_a_prompt_of_bulk_makes_way_for_a_streams_where_memory_holds_one(model: LoadedModel, pool: AdapterPool) -> None:
    tight = Driver(model, pool, slots=4, kv_bytes=1128 * 128, prefix_share=0.0)
    long = tight.send(request([3] * 374, max_tokens=2, priority=BULK))
    tight.step()
    sent = tight.send(request([4] * 374, max_tokens=2, priority=STREAM))
    tight.step()
    assert [row.priority for row in tight.lane.waiting] == [BULK], "what was filled of it is let go of"
    while not sent.ticket.done:
        tight.step()
    assert not long.tokens
    tight.run()
    assert len(long.tokens) == 2


@pytest.mark.parametrize("fits", [True, False])
def test_bulk_makes_way_for_a_stream_only_where_that_is_enough(
    model: LoadedModel, pool: AdapterPool, fits: bool
) -> None:
    """Else it would make way for nothing, and again in each of its turns."""
    batch, roster = Batch(model.decoder, pool, Step(model.decoder, "none")), Roster()
    running, worse, asking = rows = waiting_rows(model, STREAM, BULK, STREAM)
    roster.admit(rows)
    for row in (running, worse):
        roster.waiting.remove(row)
        seat(batch, model, row)
    budget = Mock(spec=KvBudget, admits=lambda _: len(batch.rows) < 2, could_admit=Mock(return_value=fits))
    seats = Seats(4, roster, Prompts(budget), batch, budget, 0)
    assert list(seats.taken([asking], Mock(spec=Grouping, joins=lambda *_: True))) == ([asking] if fits else [])
    assert len(batch.rows) == (1 if fits else 2)
    budget.could_admit.assert_called_once_with([asking], [running])


def test_a_prompt_of_bulk_that_rests_makes_way_before_a_stream(model: LoadedModel, pool: AdapterPool) -> None:
    batch, roster = Batch(model.decoder, pool, Step(model.decoder, "none")), Roster()
    rows = waiting_rows(model, STREAM, STREAM)
    for row in rows:
        seat(batch, model, row)
    resting = waiting_rows(model, BULK)
    prompts = Mock(spec=Prompts, give_up=Mock(side_effect=[resting, []]))
    budget = Mock(spec=KvBudget, must_shrink=Mock(side_effect=[True, False]))
    assert Seats(4, roster, prompts, batch, budget, 0).make_room()
    assert len(batch.rows) == 2
    assert roster.waiting == resting
    prompts.give_up.assert_called_once_with(STREAM)


@pytest.mark.parametrize("row", [0.1, 2.0])
def test_streams_and_bulk_get_the_tokens_that_each_gets_alone(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch, row: float
) -> None:
    """Rows rest, change places, make way and come back meanwhile."""
    asked = [bulk(number, tokens=20 + number) for number in range(6)] + [stream(number, 30) for number in range(3)]
    alone = []
    for one in asked:
        driver = Driver(model, pool, slots=1)
        alone.append(driver.send(one))
        driver.run()
    Device(row).install(monkeypatch)
    driver = Driver(model, pool, slots=6)
    found = [driver.send(one) for one in asked[:6]]
    for one in asked[6:]:
        for _ in range(10):
            driver.step()
        found.append(driver.send(one))
    driver.run()
    assert [sent.ids for sent in found] == [sent.ids for sent in alone]


def test_three_priorities_are_seated_in_their_order(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool, slots=1)
    sent: dict[int, list[Sent]] = {}
    for number, priority in enumerate([5, 9, 5, 0, 9, 0]):
        sent.setdefault(priority, []).append(driver.send(request([3 + number], max_tokens=3, priority=priority)))
    ended: list[int] = []
    while driver.lane.busy:
        before = {one.ticket for found in sent.values() for one in found if one.ticket.done}
        driver.step()
        ended += [
            priority
            for priority, found in sent.items()
            for one in found
            if one.ticket.done and one.ticket not in before
        ]
    assert ended == [0, 0, 5, 5, 9, 9]


def test_of_prompts_that_rest_behind_a_stream_the_better_one_goes_on_first(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(0.3, token=0.01).install(monkeypatch)
    driver = Driver(model, pool, slots=4, stall=5.0)
    for priority in (9, 7):
        driver.send(request([3 + at % 50 for at in range(900)], max_tokens=1, priority=priority))
        driver.step()
    sent, under_way = driver.send(stream(0, tokens=300)), len(device.chunks)
    driver.run()
    then = [priority for priority, _ in device.chunks[under_way:] if priority != STREAM]
    assert len(sent.tokens) == 300
    assert set(then) == {7, 9}
    assert then == sorted(then)


# --- the batch: rows that rest ---


def test_rows_that_rest_keep_their_tokens_and_go_on(model: LoadedModel, pool: AdapterPool) -> None:
    batch = Driver(model, pool, slots=8).lane.batch
    rows = [row_of(model, token) for token in (3, 7, 11)]
    for row in rows:
        seat(batch, model, row)
    assert batch.launch(1)
    pending = batch.in_flight
    assert pending is not None
    assert pending.rows == rows[:1]
    assert [row.cached for row in rows] == [2, 1, 1]
    assert batch.launch(3)
    assert batch.in_flight is not None
    assert batch.in_flight.rows == rows
    assert not batch.launch(0)


@pytest.mark.parametrize("joint", [False, True])
def test_two_rows_change_places_with_all_that_they_hold(tiny_llama: Llama, joint: bool) -> None:
    random, source = np.random.default_rng(3), KeyValues(tiny_llama, 3, 16)
    kv = tiny.joint(tiny_llama, 4, 32) if joint else KeyValues(tiny_llama, 4, 32)
    for arrays in (source.keys, source.values):
        arrays[:] = [mx.array(random.normal(0, 1, array.shape).astype(np.float32)) for array in arrays]
    for row, length in enumerate((4, 1, 7)):
        kv.put(row, source, row, length)

    def held() -> list[np.ndarray]:
        return [np.array(array) for array in tiny.sides(kv, 3, 7)]

    before = held()
    kv.swap(0, 2, 7)
    for now, then in zip(held(), before, strict=True):
        np.testing.assert_array_equal(now, then[[2, 1, 0]])


# --- the pacer by itself ---


def step(pacer: LanePacer, seconds: float | None = None, rows: int | None = None, priorities: str = "59") -> None:
    pacer.begin({int(priority) for priority in priorities})
    if seconds is not None:
        pacer.note(seconds, rows)


def known(pacer: LanePacer, **seconds: float) -> None:
    """What passes of each size took."""
    for rows, each in seconds.items():
        for _ in range(LEAST):
            pacer.note(each, int(rows.removeprefix("of_")))


def test_rows_of_one_priority_all_decode() -> None:
    pacer = LanePacer(1.0)
    known(pacer, of_1=1.0, of_8=100.0)
    step(pacer, priorities="9")
    assert (pacer.rows(8, 8), pacer.contested) == (8, False)


def test_one_size_after_the_other_is_tried_until_one_is_too_slow() -> None:
    pacer = LanePacer(1.0)
    known(pacer, of_1=1.0)
    for _ in range(ALONE):
        step(pacer)
        assert pacer.rows(1, 8) == 1, "the stream has the first steps to itself"
    step(pacer)
    tried = []
    for rows, seconds in ((2, 1.1), (3, 1.5), (4, 1.6)):
        tried.append(pacer.rows(1, 8))
        known(pacer, **{f"of_{rows}": seconds})
    assert (tried, pacer.rows(1, 8)) == ([2, 3, 4], 3)


def test_what_was_too_slow_is_tried_again_after_some_turns() -> None:
    pacer = LanePacer(1.0)
    known(pacer, of_2=9.0)
    for _ in range(FORGET):
        for _ in range(EVERY):
            step(pacer, 1.0, 1)
    for _ in range(ALONE + 1):
        step(pacer)
    assert pacer.rows(1, 8) == 1, "it is known still"
    for _ in range(EVERY):
        step(pacer, 1.0, 1)
    assert pacer.rows(1, 8) == 2


def test_a_pass_takes_a_size_in_which_passes_come_or_all() -> None:
    """A row that rests must not be in the padding."""
    pacer = LanePacer(1.0)
    known(pacer, of_6=1.0, of_8=9.0)
    for _ in range(ALONE + 1):
        step(pacer)
    assert [pacer.rows(5, held) for held in (5, 6, 7, 12)] == [5, 6, 7, 6]


def test_while_a_streams_prompt_goes_through_the_model_the_background_rests_until_its_turn() -> None:
    pacer = LanePacer(1.0)
    widths = []
    for _ in range(EVERY):
        step(pacer, 1.0)
        widths.append((pacer.rows(0, 8), bool(pacer.background)))
    assert widths == [(0, False)] * (EVERY - 1) + [(8, True)]


def test_the_backgrounds_turn_takes_a_share_of_the_time_since_the_last_and_never_more_than_the_stall() -> None:
    for seconds, wanted in ((1.0, 0.5), (0.01, (EVERY - 1) * 0.01 * pacing.SHARE / 2)):
        pacer = LanePacer(1.0)
        for _ in range(EVERY - 1):
            step(pacer, seconds, 1)
        step(pacer)
        assert pacer.background_seconds == pytest.approx(wanted)
        assert pacer.chunk(BULK, decoding=True).patience == pytest.approx(wanted)
        step(pacer)
        assert pacer.background_seconds == 0.0


def test_prompts_that_wait_together_have_the_time_of_one_by_one_and_no_more_than_the_stall() -> None:
    pacer = LanePacer(0.5)
    step(pacer, 0.1, 2, priorities="5")
    pacer.decodes()
    found = [pacer.chunk(STREAM, decoding=True, prompts=prompts).patience for prompts in (1, 3, 9)]
    assert found == pytest.approx([0.1, 0.3, 0.5])


def test_a_time_without_a_stream_counts_as_the_backgrounds_turn() -> None:
    pacer = LanePacer(1.0)
    for _ in range(EVERY - 1):
        step(pacer, 1.0, 1)
    step(pacer, 1.0, 4, priorities="9")
    step(pacer)
    assert not pacer.background


@pytest.mark.parametrize(
    ("length", "chunks"), [(48, [48]), (49, [32, 17]), (112, [32, 32, 48]), (113, [32, 32, 32, 17])]
)
def test_a_short_rest_of_a_prompt_has_no_pass_of_its_own(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch, length: int, chunks: list[int]
) -> None:
    """Where a chunk is small, the pass over the weights is most of what it takes."""
    device = Device(0.1, token=0.5).install(monkeypatch)
    driver = apart(Driver(model, pool, slots=4, stall=5.0))
    driver.send(stream(0, tokens=200))
    for number in range(4):
        driver.send(request([3 + number] * 60, max_tokens=1, priority=STREAM))
        while len(driver.lane.held) > 1:
            driver.step()
    device.chunks.clear()
    driver.send(request(list(range(3, 3 + length)), max_tokens=1, priority=STREAM))
    while len(driver.lane.held) > 1:
        driver.step()
    assert [tokens for _, tokens in device.chunks] == chunks
