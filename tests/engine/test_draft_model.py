"""A draft model: no matter what it says of rows, their tokens are those of ordinary decoding."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import models

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints import drafts
from engine.checkpoints.drafts import DraftSource, with_draft
from engine.checkpoints.loading import LoadedModel
from engine.engine import Engine
from engine.generation import lane as lane_module
from engine.generation.batch import Batch, Tried
from engine.generation.draft_model import LAG, DraftModel
from engine.generation.drafting import FEWEST_READ, FORGET, LEAST, REMEMBER, TRIES, WIDTHS, Drafter, Plan
from engine.generation.guess import FORGET as UNTRIED
from engine.generation.guess import PRIOR, ROWS, Guess, Rate
from engine.generation.lane import GenerateLane
from engine.generation.limits import LaneLimits
from engine.generation.row import Row, RowFault
from engine.generation.step import Compiled
from engine.models import joint
from engine.models.llama import Llama
from engine.models.shard import Shard
from engine.ticket import Ticket
from stoker.contract import GenerateRequest
from stoker.errors import JobCancelled, ModelError
from tests.engine import bridged, tiny
from tests.engine.conftest import TINY, RandomTensors
from tests.engine.test_generate_lane import (
    MODES,
    Driver,
    Sent,
    assert_same,
    long,
    random_requests,
    request,
)
from tests.thorough import quick

GOLDENS = Path(__file__).parent.parent / "goldens" / "architectures"
#: A model of the same vocabulary that is smaller, and knows nothing of the other.
SMALL = replace(TINY, layers=1, heads=2, kv_heads=1)


def small(**fields: Any) -> LoadedModel:
    mx.random.seed(3)
    return replace(tiny.loaded(Llama(replace(SMALL, **fields), RandomTensors()), eos_ids=[]), name="small")


def likeliest(draft: LoadedModel, known: Sequence[int], count: int) -> list[int]:
    """What it goes on with, by whole passes over all tokens."""
    found = list(known)
    for _ in range(count):
        found.append(int(mx.argmax(draft.decoder.logits(draft.decoder(mx.array([found])))[0, -1])))
    return found[len(known) :]


class Asking(Drafter):
    """Asks the model whenever there is something to be drafted, for any number of tokens."""

    def __init__(self, model: DraftModel | None, width: int | None = None, *, always: bool = False) -> None:
        super().__init__(model)
        self._random, self._width, self._share = np.random.default_rng(5), width, 1.0 if always else 0.9

    def plan(self, rows: Sequence[Row], room: int, ahead: int = 0) -> Plan:
        model = self.model
        wanting = [] if model is None else [row for row in rows if model.takes(row)]
        fit = [width for width in WIDTHS if width <= room]
        if model is None or not wanting or not fit:
            return Plan()
        ready = tuple(row for row in wanting if model.ready(row) and self._random.random() < self._share)
        reading = next((row for row in wanting if not model.ready(row)), None)
        width = min(self._width or int(self._random.choice(fit)), fit[-1])
        return Plan(width, ready, reading) if ready else Plan(reading=reading)


class Watched(DraftModel):
    """Each of its drafts has to be what its model says of the row's tokens, however it came to have them."""

    def __init__(self, model: LoadedModel, vocabulary: int, compiled: Compiled) -> None:
        super().__init__(model, vocabulary, compiled)
        self._own, self.drafted = model, 0

    def draft(self, rows: Sequence[Row], count: int) -> bool:
        sound = super().draft(rows, count)
        for row in rows:
            assert row.guess is not None
            read = [token if token < self._own.decoder.args.vocab else 0 for token in row.known]
            assert row.guess.tokens == likeliest(self._own, read, count)
            assert row.length + count <= self._own.context
            self.drafted += 1
        return sound


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "DraftModel", Watched)


def drafting(
    model: LoadedModel, pool: AdapterPool, draft: LoadedModel, width: int | None = None, **limits: Any
) -> Driver:
    driver = Driver(replace(model, draft=draft), pool, **limits)
    driver.lane.drafter = Asking(driver.lane.drafter.model, width)
    return driver


def model_of(driver: Driver) -> Watched:
    found = driver.lane.drafter.model
    assert isinstance(found, Watched)
    return found


@pytest.fixture
def model(tiny_llama: Llama) -> LoadedModel:
    return tiny.loaded(tiny_llama, eos_ids=[])


def ordinary(model: LoadedModel, pool: AdapterPool, one: GenerateRequest) -> Sent:
    driver = Driver(model, pool, slots=1)
    sent = driver.send(one)
    driver.run()
    return sent


# --- the answer is the same ---


def check(model: LoadedModel, pool: AdapterPool, draft: LoadedModel, seed: int, **limits: Any) -> Driver:
    """Requests of every kind come at random moments, and one now and then is cancelled."""
    # A long prompt is read while its answer comes; the last ones do not end early.
    requests = [
        one.model_copy(update={"max_tokens": one.max_tokens + 20, "ignore_eos": number > 2})
        for number, one in enumerate(random_requests(seed, 5))
    ]
    wanted = [ordinary(model, pool, one) for one in requests]
    random, driver, cancelled = np.random.default_rng(seed), drafting(model, pool, draft, **limits), set[int]()
    sent: list[Sent] = []
    while len(sent) < len(requests) or driver.lane.busy:
        driver.lookahead = random.random() < 0.8
        if len(sent) < len(requests) and random.random() < 0.4:
            sent.append(driver.send(requests[len(sent)]))
        if sent and random.random() < 0.03 and not sent[victim := int(random.integers(len(sent)))].ticket.done:
            sent[victim].ticket.cancel()
            cancelled.add(victim)
        driver.step()
    driver.assert_empty()
    assert model_of(driver).nbytes == 0
    for number, (found, alone) in enumerate(zip(sent, wanted, strict=True)):
        assert_same(found, alone, partial=number in cancelled)
        if number in cancelled:
            with pytest.raises(JobCancelled):
                found.ticket.result(0)
            continue
        ours, theirs = found.result.model_dump(), alone.result.model_dump()
        assert {**ours, "usage": None} == {**theirs, "usage": None}
    assert model_of(driver).drafted > 0
    return driver


@pytest.mark.parametrize("seed", quick(*range(4), of=range(12)))
def test_with_a_draft_model_a_request_gets_the_tokens_of_ordinary_decoding_in_any_traffic(
    ending: LoadedModel, pool: AdapterPool, seed: int
) -> None:
    """Greedy and drawn, with penalties, adapters, stops, ends and several completions; with room for few, too."""
    draft = ending if seed % 2 else small()
    assert check(ending, pool, draft, seed, **MODES[seed % 3]).lane.load.drafted > 0


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compiled", ["all", "decode"])
def test_the_same_holds_where_passes_come_in_buckets(ending: LoadedModel, pool: AdapterPool, compiled: str) -> None:
    check(ending, pool, small(), 1, compiled=compiled)


@pytest.mark.parametrize("together", [1, 6])
def test_the_same_holds_over_the_arrays_that_gpus_decode_over(
    ending: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(joint, "LAYERS_TOGETHER", together)
    apart = Llama.kv_sizes.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Llama, "kv_sizes", property(lambda llama: apart(llama)._replace(joint=True)))
    check(ending, pool, small(layers=2), together, compiled="none")


def test_the_same_holds_for_models_with_windows_that_run_mlx_lms_file(tmp_path: Path) -> None:
    model = bridged.bridged("gemma2")
    pool = AdapterPool(model, AdapterStore(tmp_path))
    for name, rank in (("one", 2), ("two", 5)):
        pool.save(name, tiny.adapter(model, rank, rank, bridged.targets_of(model)), {})
    assert check(model, pool, model, 2).lane.load.accepted > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_the_same_holds_for_keys_and_values_in_few_bits(model: LoadedModel, pool: AdapterPool, bits: int) -> None:
    model.decoder.kv_bits = bits
    draft = small()
    draft.decoder.kv_bits = bits
    one = request([3, 1, 4], max_tokens=60, temperature=0.9, seed=4)
    driver = Driver(model, pool)
    driver.lane.drafter = Asking(DraftModel(draft, 61, "none"))
    sent = driver.send(one)
    driver.run()
    assert sent.ids == ordinary(model, pool, one).ids
    assert driver.lane.load.drafted > 0


def test_a_draft_is_tried_as_far_as_its_grammar_goes(wordy: LoadedModel, tmp_path: Path) -> None:
    pool = AdapterPool(wordy, AdapterStore(tmp_path))
    one = GenerateRequest(
        model="tiny", prompt="The stoker wrote:", max_tokens=24, regex=r"(ab){4}[0-9]{3}", temperature=2.0, seed=3
    )
    wanted, driver = ordinary(wordy, pool, one), drafting(wordy, pool, wordy)
    sent = driver.send(one)
    driver.run()
    assert model_of(driver).drafted > 0
    assert sent.ids == wanted.ids
    assert (sent.result.text, sent.result.finish_reason) == (wanted.result.text, wanted.result.finish_reason)


def test_rows_that_lose_their_slots_lose_no_token_and_no_memory_goes_beyond_its_limit(
    model: LoadedModel, pool: AdapterPool
) -> None:
    requests = [request(long(n), max_tokens=30, temperature=0.8, seed=n, adapter="one") for n in range(4)]
    wanted = [ordinary(model, pool, one) for one in requests]
    tight = drafting(model, pool, small(), slots=4, kv_bytes=330_000)
    found = [tight.send(one) for one in requests]
    while tight.lane.busy:
        waiting = set(tight.lane.waiting)
        tight.step()
        assert tight.lane.kv_bytes <= 330_000
        for row in waiting & set(tight.lane.waiting):
            assert model_of(tight).unread(row) == row.length, "of a row that has no slot it has nothing"
    assert tight.lane.preempted > 0
    assert model_of(tight).drafted > 0
    assert [one.ids for one in found] == [one.ids for one in wanted]
    tight.assert_empty()


def test_of_a_row_that_makes_way_for_a_better_one_nothing_is_kept(model: LoadedModel, pool: AdapterPool) -> None:
    driver = drafting(model, pool, small(), slots=2)
    worse = [request([3 + number, 1, 4], max_tokens=60, priority=9) for number in range(2)]
    sent = [driver.send(one) for one in worse]
    rows = driver.lane.held
    while not all(map(model_of(driver).ready, rows)):
        driver.step()
    better = driver.send(request([7, 8], max_tokens=20, priority=0))
    while all(row.slot >= 0 for row in rows):
        driver.step()
    driver.step()
    (gone,) = (row for row in rows if row.slot < 0)
    assert model_of(driver).unread(gone) == gone.length
    driver.run()
    assert len(better.ids) == 20
    assert [one.ids for one in sent] == [ordinary(model, pool, one).ids for one in worse]
    assert model_of(driver).nbytes == 0


def test_a_row_that_goes_on_without_drafts_is_drafted_for_again_as_it_is(model: LoadedModel, pool: AdapterPool) -> None:
    driver = drafting(model, pool, small(), width=9)
    driver.lookahead = False
    driver.send(request([3, 1, 4], max_tokens=60))
    asking, plain = driver.lane.drafter, Drafter(driver.lane.drafter.model)
    while driver.lane.busy:
        drafted = model_of(driver).drafted
        driver.step()
        if model_of(driver).drafted > drafted:
            driver.lane.drafter = plain
            for _ in range(6):
                driver.step()
            driver.lane.drafter = asking
    assert model_of(driver).drafted > 3


def test_a_job_that_goes_on_elsewhere_gets_the_rest(model: LoadedModel, pool: AdapterPool) -> None:
    one = request([3, 1, 4], max_tokens=30, temperature=0.9, seed=4)
    wanted, driver = ordinary(model, pool, one), drafting(model, pool, model)
    resumed = driver.send(one, wanted.tokens[:11])
    driver.run()
    assert resumed.ids == wanted.ids[11:]
    assert model_of(driver).drafted > 0


# --- what it saves, and what it takes ---


@pytest.mark.parametrize("count", [1, 3])
def test_all_that_a_model_drafts_for_itself_is_right_and_saves_passes(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    passes: list[int] = []
    tried = Batch.try_drafts

    def counted(batch: Batch, width: int) -> list[Tried]:
        passes.append(width)
        return tried(batch, width)

    monkeypatch.setattr(Batch, "try_drafts", counted)
    driver = drafting(model, pool, model, slots=count)
    driver.lane.drafter = Asking(driver.lane.drafter.model, 9, always=True)
    sent = [driver.send(request([3 + number, 1, 4], max_tokens=91)) for number in range(count)]
    while not all(model_of(driver).ready(row) for row in driver.lane.held):
        driver.step()
    driver.lookahead = False
    driver.step()
    made, before = sum(len(one.tokens) for one in sent), len(passes)
    driver.run()
    left = count * 91 - made
    # 9 tokens of each row a pass, except for the ends, where fewer are wanted.
    assert len(passes) - before <= left // (9 * count) + 2 * count
    assert driver.lane.load.accepted == driver.lane.load.drafted > 0
    assert all(len(one.ids) == 91 for one in sent)


def test_wrong_drafts_leave_the_model_where_the_row_is(model: LoadedModel, pool: AdapterPool) -> None:
    driver = drafting(model, pool, small(), width=5)
    driver.lookahead = False
    driver.send(request([3, 1, 4], max_tokens=60))
    for _ in range(20):
        driver.step()
        for row in driver.lane.held:
            if model_of(driver).ready(row):
                assert 1 <= model_of(driver).unread(row) <= 2
    assert driver.lane.load.accepted < driver.lane.load.drafted


def test_a_long_prompt_is_read_in_pieces_and_a_row_that_fell_behind_is_caught_up_with(
    model: LoadedModel, pool: AdapterPool
) -> None:
    driver = drafting(model, pool, small())
    driver.send(request([3 + n % 50 for n in range(200)], max_tokens=100))
    while not driver.lane.batch.rows:
        driver.step()
    (row,), drafts_ = driver.lane.batch.rows, model_of(driver)
    pieces = []
    while not drafts_.ready(row):
        pieces.append(drafts_.read(row, 64, 10**9))
    assert pieces == [64, 64, 64]
    asks, driver.lane.drafter = driver.lane.drafter, Drafter(drafts_)
    driver.lane.drafter.plan = lambda *_: Plan()  # type: ignore[method-assign]
    while drafts_.unread(row) < 3 * LAG:
        driver.step()
    assert not drafts_.ready(row)
    driver.lane.drafter = asks
    driver.run()
    assert drafts_.drafted > 0


def test_what_a_model_drafts_with_is_given_back_and_makes_way_before_a_row_does(
    model: LoadedModel, pool: AdapterPool
) -> None:
    driver = drafting(model, pool, small(), slots=4, kv_bytes=500_000)
    sent = driver.send(request([3, 1, 4], max_tokens=60))
    while not model_of(driver).drafted:
        driver.step()
    lane, taken = driver.lane, model_of(driver).nbytes
    assert taken > 0
    assert lane.kv_bytes == lane.batch.nbytes + lane.prefixes.nbytes + taken
    lane.batch.rows[0].cached += 1_000_000
    assert not lane.budget.must_shrink()
    lane.batch.rows[0].cached -= 1_000_000
    assert model_of(driver).nbytes == 0
    driver.run()
    assert len(sent.ids) == 60
    assert model_of(driver).nbytes == 0


def test_without_room_nothing_is_drafted(model: LoadedModel, pool: AdapterPool) -> None:
    one = request([3, 1, 4], max_tokens=40)
    driver = drafting(model, pool, small(), kv_bytes=70_000)
    sent = driver.send(one)
    driver.run()
    assert sent.ids == ordinary(model, pool, one).ids
    assert model_of(driver).drafted == 0


def test_a_row_that_outgrows_the_models_context_is_not_drafted_for(model: LoadedModel, pool: AdapterPool) -> None:
    driver = drafting(model, pool, replace(small(), context=40))
    sent = driver.send(request([3, 1, 4], max_tokens=60))
    driver.run()
    assert len(sent.ids) == 60
    assert model_of(driver).drafted > 0


# --- a model that does harm ---


def test_a_model_that_gives_no_numbers_costs_nothing_except_time(
    model: LoadedModel, pool: AdapterPool, caplog: pytest.LogCaptureFixture
) -> None:
    broken = small()
    broken.llama.norm.weight = mx.full(broken.llama.norm.weight.shape, mx.nan)
    driver = Driver(model, pool)
    driver.lane.drafter = Asking(DraftModel(broken, 61, "none"))
    requests = [request([3 + number, 1, 4], max_tokens=20, temperature=0.8, seed=number) for number in range(3)]
    with caplog.at_level(logging.WARNING):
        sent = [driver.send(one) for one in requests]
        driver.run()
    assert [one.ids for one in sent] == [ordinary(model, pool, one).ids for one in requests]
    assert driver.lane.load.drafted == 0
    assert [record.getMessage() for record in caplog.records] == [
        "draft model small gives numbers that are not finite: rows go on without it"
    ]


def test_a_row_whose_draft_gave_no_numbers_is_drafted_for_no_more(pool: AdapterPool) -> None:
    """The drafted token's row of the weights is damaged, which ordinary decoding never comes to."""
    mx.random.seed(7)
    llama, bad = Llama(TINY, RandomTensors()), 60
    llama.embed_tokens.weight[bad] = mx.nan
    head = llama.head
    llama.head = lambda hidden: mx.where(mx.arange(61) == bad, 0.0, head(hidden))  # type: ignore[method-assign]
    damaged, draft = tiny.loaded(llama, eos_ids=[]), small()
    own = draft.llama.head
    draft.llama.head = lambda hidden: mx.where(mx.arange(61) == bad, 1e4, own(hidden))  # type: ignore[method-assign]
    one = request([3, 1, 4], max_tokens=24, logit_bias={bad: -100.0})
    wanted, driver = ordinary(damaged, pool, one), drafting(damaged, pool, draft)
    driver.lane.drafter = Asking(DraftModel(draft, 61, "none"), 5)
    sent = driver.send(one)
    driver.run()
    assert sent.ids == wanted.ids
    assert driver.lane.load.drafted == 4


def test_a_draft_that_was_not_tried_because_another_row_failed_is_made_again(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, driver = request([3, 1, 4], max_tokens=40), drafting(model, pool, model, slots=2)
    driver.lane.drafter = Asking(driver.lane.drafter.model, 5, always=True)
    stays, fails = driver.send(one), driver.send(request([5, 6], max_tokens=40))
    tried = Batch.try_drafts

    def fail_once(batch: Batch, width: int) -> list[Tried]:
        if not fails.ticket.done:
            raise RowFault(next(row for row in batch.rows if row.ticket is fails.ticket), ModelError("its own"))
        return tried(batch, width)

    monkeypatch.setattr(Batch, "try_drafts", fail_once)
    driver.run()
    assert isinstance(fails.ticket.error, ModelError)
    assert stays.ids == ordinary(model, pool, one).ids
    assert model_of(driver).drafted > 3
    assert driver.lane.load.accepted > 0


@pytest.mark.parametrize("method", ["read", "draft"])
def test_a_model_that_fails_is_let_go_of_and_no_job_ends(
    model: LoadedModel,
    pool: AdapterPool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    one, driver = request([3, 1, 4], max_tokens=20), drafting(model, pool, model)

    def fail(*_: Any) -> bool:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Watched, method, fail)
    sent = driver.send(one)
    driver.run()
    assert sent.ids == ordinary(model, pool, one).ids
    assert driver.lane.drafter.model is None
    assert "draft model small failed" in caplog.text or "draft model tiny failed" in caplog.text


def test_a_token_that_the_other_model_has_not_is_not_drafted(model: LoadedModel, pool: AdapterPool) -> None:
    larger = small(vocab=90)
    head = larger.llama.head
    larger.llama.head = lambda hidden: head(hidden) + mx.where(mx.arange(90) == 80, 1e4, 0.0)  # type: ignore[method-assign]
    one, driver = request([3, 1, 4], max_tokens=20), drafting(model, pool, larger)
    driver.lane.drafter = Asking(DraftModel(larger, 61, "none"))
    sent = driver.send(one)
    driver.run()
    assert sent.ids == ordinary(model, pool, one).ids
    assert driver.lane.load.drafted == 0


def test_a_token_that_the_draft_model_has_no_row_for_is_read_as_another(model: LoadedModel, pool: AdapterPool) -> None:
    driver = drafting(model, pool, small(vocab=40))
    driver.send(request([60, 41, 5, 60], max_tokens=30))
    driver.run()
    assert model_of(driver).drafted > 0


# --- who is drafted for ---


@pytest.mark.parametrize("usual", [True, False])
def test_a_request_may_forbid_it_and_else_the_worker_that_has_a_draft_model_uses_it(
    model: LoadedModel, pool: AdapterPool, usual: bool
) -> None:
    lane = GenerateLane(replace(model, draft=small()), pool, LaneLimits(compiled="none", lookup=usual))

    def drafted_for(asked: bool | None) -> bool:
        work = lane.prepare(Ticket("job", "generate"), request([3, 1, 4], lookup=asked), None)
        return all(row.guess is not None for row in work.rows)

    assert [drafted_for(asked) for asked in (None, True, False)] == [True, True, False]


def test_without_a_draft_model_nobody_is(model: LoadedModel, pool: AdapterPool) -> None:
    lane = GenerateLane(model, pool, LaneLimits(compiled="none"))
    work = lane.prepare(Ticket("job", "generate"), request([3, 1, 4], lookup=True), None)
    assert [row.guess for row in work.rows] == [None]
    assert lane.drafter.model is None


# --- when it pays ---


class Timed:
    """A model that takes so many seconds for a draft with so many tokens to a row of the pass, and for each token that
    it reads; and the clock that shows it."""

    def __init__(self, drafting: dict[int, float], reading: float = 0.0, unread: int = 1) -> None:
        self.name, self.traced, self.now = "small", 0, 0.0
        self.drafting, self.reading, self.unread_, self.pieces = drafting, reading, unread, list[int]()

    def keep(self, rows: Sequence[Any]) -> None: ...

    def takes(self, row: Any) -> bool:
        return row.guess is not None

    def ready(self, row: Any) -> bool:
        return self.unread_ <= LAG

    def unread(self, row: Any) -> int:
        return self.unread_

    def growth(self, count: int) -> int:
        return 0

    def draft(self, rows: Sequence[Any], count: int) -> bool:
        self.now += self.drafting[count + 1]
        return True

    def read(self, row: Any, tokens: int, spare: int) -> int:
        self.pieces.append(tokens)
        self.now += tokens * self.reading
        return tokens


def row(guess: float | None, looked: float | None = None, most: int = 100) -> Any:
    found = None if guess is None else Guess(Rate(guess))
    lookup = None if looked is None else SimpleNamespace(rate=looked, expects=True)
    return SimpleNamespace(lookup=lookup, guess=found, most_drafted=most)


def known(model: Timed, seconds: dict[int, float], rows: int = 1) -> Drafter:
    """One that knows what passes of these widths take, and what the model takes to draft for them."""
    drafter = Drafter(model, lambda: model.now)  # type: ignore[arg-type]
    asking = tuple(row(0.9) for _ in range(rows))
    for width, each in seconds.items():
        for _ in range(LEAST + 1):
            drafter.begin([])
            if width in model.drafting:
                drafter.draft(Plan(width, asking), asking, 0)
            drafter.note(rows, width, each + model.drafting.get(width, 0.0))
    return drafter


SECONDS = {1: 1.0, 2: 1.1, 3: 1.2, 5: 1.4, 9: 1.8}


CHEAP = {2: 0.05, 3: 0.1, 5: 0.2, 9: 0.4}
DEAR = {2: 1.0, 3: 2.0, 5: 4.0, 9: 8.0}


@pytest.mark.parametrize(("drafting", "widths"), [(CHEAP, [1, 3, 9]), (DEAR, [1, 1, 1])])
def test_a_pass_is_as_wide_as_most_tokens_a_second_are_expected_of_with_the_models_own_seconds(
    drafting: dict[int, float], widths: list[int]
) -> None:
    drafter = known(Timed(drafting), SECONDS)
    plans = [drafter.plan([row(rate)], 100) for rate in (0.05, 0.5, 0.95)]
    assert [plan.width for plan in plans] == widths
    assert [len(plan.asking) for plan in plans] == [int(width > 1) for width in widths]


def test_the_models_seconds_are_no_part_of_what_a_pass_takes() -> None:
    """Else what is looked up would be tried no more where a model was slow."""
    drafter = known(Timed(DEAR), SECONDS)
    assert drafter.plan([row(0.9, looked=0.95)], 100) == Plan(9)


def test_the_model_is_asked_where_nothing_better_is_looked_up() -> None:
    drafter = known(Timed(CHEAP), SECONDS, rows=3)
    rows = [row(0.8), row(0.8, looked=0.99), row(0.8, looked=0.3)]
    plan = drafter.plan(rows, 100)
    assert plan.width > 1
    assert plan.asking == (rows[0], rows[2])


def test_a_token_on_its_way_is_seen_by_the_model_before_it_drafts() -> None:
    drafter = known(Timed(CHEAP), SECONDS)
    assert drafter.plan([row(0.4)], 100, 1).width == drafter.plan([row(0.4)], 100, 0).width > 1
    assert drafter.plan([row(0.4, most=1)], 100, 1).width == 1, "it may be the last that is wanted"


def test_what_the_model_takes_is_tried_a_few_times_and_forgotten_after_a_while() -> None:
    model = Timed({})
    drafter, rows, tries = known(model, {1: 1.0}), [row(0.9)], 0
    model.drafting = dict.fromkeys(WIDTHS, 9.0)
    while (plan := drafter.plan(rows, 100)).width > 1:
        tries += 1
        drafter.draft(plan, rows, 0)
        drafter.note(1, plan.width, 10.0)
        drafter.begin([])
    assert tries == 1 + TRIES
    for _ in range(REMEMBER + 1):
        assert drafter.plan(rows, 100).width == 1
        drafter.note(1, 1, 1.0)
    assert drafter.plan(rows, 100).width > 1


def test_what_is_looked_up_is_tried_again_without_the_model_being_so() -> None:
    """A pass with drafts that is unknown again says nothing better of the model, which would have much to read."""
    model = Timed(dict.fromkeys(WIDTHS, 0.1))
    drafter = known(model, {1: 1.0, 2: 9.0})
    for _ in range(FORGET + 1):
        drafter.note(1, 1, 1.0)
    for looked, width in ((0.9, 2), (None, 1)):
        assert drafter.plan([row(0.5, looked)], 2).width == width
    drafter.note(1, 2, 9.0)
    assert drafter.plan([row(0.5)], 2).width == 1, "and while it is measured anew"


@pytest.mark.parametrize(("reading", "pays"), [(0.01, True), (1.0, False)])
def test_a_row_is_read_where_what_is_saved_later_pays_for_it(reading: float, pays: bool) -> None:
    model = Timed(CHEAP, reading, unread=300)
    drafter, rows = known(model, SECONDS), [row(0.9)]
    first = drafter.plan(rows, 100)
    assert (first.width, first.asking, first.reading) == (1, (), rows[0]), "what reading takes is unknown"
    drafter.read(first, 1, 0)
    assert (drafter.plan(rows, 100).reading is rows[0]) == pays
    assert drafter.plan([row(0.9, most=2)], 100).reading is None, "too few tokens are to come"
    assert drafter.plan([row(0.02)], 100).reading is None, "it would not be drafted for"
    for _ in range(REMEMBER + 1):
        drafter.note(1, 1, 1.0)
    assert drafter.plan(rows, 100).reading is rows[0], "it is unknown again"


def test_of_what_is_unknown_a_short_row_is_read_to_know_it() -> None:
    rows = [row(0.9, most=4)]
    for unread, pays in ((390, True), (410, False)):
        model = Timed({}, 0.01, unread)
        drafter = known(model, SECONDS)
        drafter.read(drafter.plan(rows, 100), 1, 0)
        assert (drafter.plan(rows, 100).reading is rows[0]) == pays
    drafter = known(Timed(CHEAP, 0.01, 190), SECONDS)
    drafter.read(Plan(reading=rows[0]), 1, 0)
    assert drafter.plan(rows, 100).reading is None, "it is known, and does not pay"


def test_a_piece_takes_about_as_long_as_a_pass_and_its_step_says_nothing_of_passes() -> None:
    model = Timed(CHEAP, reading=0.01, unread=3000)
    drafter = known(model, SECONDS)
    for _ in range(3):
        drafter.read(Plan(reading=row(0.9)), 1, 0)
        assert drafter.has_read
    assert model.pieces[0] == FEWEST_READ
    assert model.pieces[1:] == [pytest.approx(100, abs=1)] * 2
    drafter.begin([])
    assert not drafter.has_read


def test_a_row_whose_drafts_are_wrong_asks_no_more_except_for_a_few_tries() -> None:
    rates = Rate()
    guess = Guess(rates)
    drafter = known(Timed({2: 0.3, 3: 0.6, 5: 1.2, 9: 2.4}), SECONDS)
    rows, asked = [SimpleNamespace(lookup=None, guess=guess, most_drafted=100)], []
    for number in range(7 * UNTRIED):
        plan = drafter.plan(rows, 100)  # type: ignore[arg-type]
        if plan.asking:
            asked.append(number)
            guess.set([1])
        guess.add(2)
    first, again = [n for n in asked if n < 10], [n for n in asked if UNTRIED <= n < UNTRIED + 20]
    assert len(first) >= 2, "at first it is tried"
    assert 2 <= len(again) <= 2 * len(first), "and again after a while"
    last = [number for number in asked if number > 5 * UNTRIED]
    assert len(first) + len(again) + len(last) == len(asked)
    assert last, "and after a longer one"


def test_a_new_row_begins_with_what_is_known_of_the_others() -> None:
    rates = Rate(tokens=ROWS)
    before = Guess(rates)
    assert before.rate == PRIOR
    for _ in range(100):
        before.set([1])
        before.add(2)
    assert before.rate < 0.01
    assert 0.1 < Guess(rates).rate < 0.3
    for _ in range(ROWS * UNTRIED):
        before.add(2)
    assert Guess(rates).rate == PRIOR


def test_a_rate_counts_the_tokens_up_to_the_first_wrong_one() -> None:
    guess = Guess(Rate(0.5))
    guess.set([1, 2, 3, 4])
    for token, left in ((1, [2, 3, 4]), (2, [3, 4]), (9, [])):
        guess.add(token)
        assert guess.tokens == left
    right = guess.rate
    guess.add(4)
    assert guess.rate == right, "nothing is drafted there"


# --- which model drafts for which ---


def joined(monkeypatch: pytest.MonkeyPatch, model: LoadedModel, draft: LoadedModel) -> LoadedModel:
    monkeypatch.setattr(drafts, "load", lambda name, *_, **__: replace(draft, name=name))
    return with_draft(model, DraftSource("small", ["/small"]))


def test_a_model_of_the_same_vocabulary_drafts_and_its_weights_count(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = joined(monkeypatch, replace(model, bytes=1000), replace(small(), bytes=70))
    assert found.draft is not None
    assert (found.draft.name, found.bytes) == ("small", 1070)
    assert "small drafts, " in found.summary
    assert joined(monkeypatch, model, small(vocab=90)).draft is not None, "it may have more"


def test_a_model_of_another_vocabulary_is_refused_with_what_differs(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ModelError,
        match=r"small \(tiny\) is to draft for tiny .*whose token 40 is 't40': small has it "
        r"not, and 21 of 61 tokens differ so. .*take it out of STOKER_DRAFT_MODELS",
    ):
        joined(monkeypatch, model, small(vocab=40))
    draft = small()
    ids = {f"t{index}": index for index in range(61)} | {"t8": 9, "t9": 8}
    draft.tokenizer.inner.model = models.WordLevel(ids, unk_token="t0")
    with pytest.raises(ModelError, match=r"token 8 is 't8': small has it as 9, and 2 of 61 tokens differ so"):
        joined(monkeypatch, model, draft)


def test_a_model_that_cannot_draft_or_be_drafted_for_is_refused(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recurrent = bridged.bridged("lfm2")
    for target, draft, fault in (
        (recurrent, small(), "it is recurrent"),
        (model, recurrent, "it is recurrent"),
        (replace(model, kind="embed"), small(), "it makes embeddings"),
        (model, replace(small(), kind="embed"), "it makes embeddings"),
        (replace(model, shard=Shard.__new__(Shard)), small(), "ranks share it"),
    ):
        with pytest.raises(ModelError, match=rf"{fault}.* Take it out of STOKER_DRAFT_MODELS"):
            joined(monkeypatch, target, draft)


def test_a_worker_loads_what_drafts_with_its_model_and_gives_both_back(tmp_path: Path) -> None:
    source = str(GOLDENS / "llama-linear")
    engine = Engine({}, adapters=tmp_path, publish=lambda _: None, drafts={"large": DraftSource("small", [source])})
    engine.start()
    try:
        one = GenerateRequest(model="large", prompt_ids=(5, 6, 7), max_tokens=200, ignore_eos=True, lookup=True)
        engine.load("plain", [source])
        before = engine.memory_bytes
        prospects = {name: engine.prospect(name, [source]).bytes for name in ("plain", "large")}
        assert prospects["large"] == 2 * prospects["plain"]
        loaded = engine.load("large", [source])
        assert loaded.bytes == 2 * engine.model("plain").bytes
        wanted = engine.submit("plain", one.model_copy(update={"model": "plain", "lookup": False})).result(60)
        assert engine.submit("large", one).result(60).token_ids == wanted.token_ids
        assert engine.unload("large")
        del loaded
        assert engine.memory_bytes <= before + 100_000
    finally:
        engine.stop()
