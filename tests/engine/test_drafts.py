"""Drafts: with right ones, wrong ones and none, a request's tokens are those of ordinary decoding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.lora import LoraWeights
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation import lane as lane_module
from engine.generation.batch import Batch, Read, Tried
from engine.generation.drafting import FORGET, GUESS, LEAST, TRIES, WIDTHS, WITHOUT, Drafter, Plan
from engine.generation.lane import GenerateLane
from engine.generation.limits import LaneLimits
from engine.generation.lookup import NGRAM, PRIOR, REACH, Lookup, PromptNgrams
from engine.generation.row import Row
from engine.models import joint
from engine.models.key_values import Stored
from engine.models.llama import Llama
from engine.ticket import Ticket
from stoker.contract import GenerateRequest
from stoker.errors import ModelError
from tests.engine import bridged, tiny
from tests.engine.conftest import TINY, RandomTensors
from tests.engine.oracle import Oracle
from tests.engine.test_generate_lane import MODES, Driver, Sent, assert_same, random_requests, request
from tests.thorough import quick


class Foreseen(Lookup):
    """Drafts what is to come, each token of it wrong with a probability."""

    def __init__(self, answer: Sequence[int], wrong: float, random: np.random.Generator) -> None:
        super().__init__(PromptNgrams([]))
        self._answer_to_be, self._wrong, self._random, self._came = list(answer), wrong, random, 0

    @property
    def expects(self) -> bool:
        return self._came < len(self._answer_to_be)

    def add(self, token: int) -> None:
        self._came += 1

    def draft(self, most: int) -> list[int]:
        to_come = self._answer_to_be[self._came : self._came + most]
        return [token if self._random.random() >= self._wrong else int(self._random.integers(61)) for token in to_come]


class Eager(Drafter):
    """Drafts whenever there is a draft, of any width."""

    def __init__(self) -> None:
        super().__init__()
        self._random = np.random.default_rng(5)

    def plan(self, rows: Sequence[Row], room: int, ahead: int = 0) -> Plan:
        fit = [width for width in WIDTHS if width <= room]
        expects = any(row.lookup and row.lookup.expects for row in rows)
        return Plan(int(self._random.choice(fit)) if fit and expects else 1)


class Drafting(Driver):
    """Every job drafts what it is to get, and is wrong now and then."""

    def __init__(self, model: LoadedModel, pool: AdapterPool, wrong: float, **limits: Any) -> None:
        super().__init__(model, pool, lookup=True, **limits)
        self.lane.drafter = Eager()
        self._wrong, self._random = wrong, np.random.default_rng(7)

    def foreseen(self, one: GenerateRequest, wanted: Sent, published: int = 0) -> Sent:
        sent = self.send(one, wanted.tokens[:published])
        for row in self.lane.held:
            if row.ticket is sent.ticket:
                answer = [token.token_id for token in wanted.tokens if token.completion == row.number]
                row.lookup = Foreseen(answer, self._wrong, self._random)
                for token in row.tokens:
                    row.lookup.add(token)
        return sent

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens that were drafted, and those that were right."""
        return self.lane.load.drafted, self.lane.load.accepted


@pytest.fixture
def model(tiny_llama: Llama) -> LoadedModel:
    return tiny.loaded(tiny_llama, eos_ids=[])


def ordinary(model: LoadedModel, pool: AdapterPool, one: GenerateRequest) -> Sent:
    driver = Driver(model, pool, slots=1)
    sent = driver.send(one)
    driver.run()
    assert driver.lane.load.drafted == 0
    return sent


def check(
    model: LoadedModel,
    pool: AdapterPool,
    seed: int,
    wrong: float,
    held: dict[str, LoraWeights] | None = None,
    **limits: Any,
) -> Drafting:
    """Requests of every kind at random moments. `held`: the adapters of the pool, where they are not `adapters`."""
    requests = random_requests(seed, 4)
    wanted = [ordinary(model, pool, one) for one in requests]
    random, driver = np.random.default_rng(seed), Drafting(model, pool, wrong, **limits)
    sent: list[Sent] = []
    while len(sent) < len(requests) or driver.lane.busy:
        driver.lookahead = random.random() < 0.8
        if len(sent) < len(requests) and random.random() < 0.4:
            sent.append(driver.foreseen(requests[len(sent)], wanted[len(sent)]))
        driver.step()
    driver.assert_empty()
    oracle = Oracle(model, held or tiny.adapters(model))
    for one, found, alone in zip(requests, sent, wanted, strict=True):
        assert_same(found, alone)
        assert [token.index for token in found.tokens] == list(range(len(found.tokens)))
        ours, theirs = found.result.model_dump(), alone.result.model_dump()
        assert {**ours, "usage": None} == {**theirs, "usage": None}
        for completion in range(one.n):
            oracle.check(one, completion, [token for token in found.tokens if token.completion == completion])
    return driver


@pytest.mark.parametrize("seed", quick(*range(4), of=range(9)))
def test_with_drafts_a_request_gets_the_tokens_of_ordinary_decoding_in_any_traffic(
    ending: LoadedModel, pool: AdapterPool, seed: int
) -> None:
    """Greedy and drawn, with penalties, adapters, stops, ends and several completions; with room for few, too."""
    limits = MODES[seed % 3]
    wrong = [0.0, 0.3, 1.0][seed // 3]
    drafted, accepted = check(ending, pool, seed, wrong, **limits).counts
    assert drafted > 0
    assert accepted == drafted or wrong > 0.0
    assert accepted < drafted or wrong < 1.0


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compiled", ["all", "decode"])
def test_the_same_holds_where_passes_come_in_buckets(ending: LoadedModel, pool: AdapterPool, compiled: str) -> None:
    check(ending, pool, 1, 0.2, compiled=compiled)


@pytest.mark.parametrize("together", [1, 6])
def test_the_same_holds_over_the_arrays_that_gpus_decode_over(
    ending: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(joint, "LAYERS_TOGETHER", together)
    apart = Llama.kv_sizes.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Llama, "kv_sizes", property(lambda llama: apart(llama)._replace(joint=True)))
    begin, behind = joint.JointRun.__init__, list[bool]()

    def noted(run: joint.JointRun, stored: Stored, *others: Any) -> None:
        behind.append(any(bool(mx.any(fresh != 0)) for fresh in stored[1]))
        begin(run, stored, *others)

    monkeypatch.setattr(joint.JointRun, "__init__", noted)
    check(ending, pool, 2, 0.2)
    assert any(behind), "a pass with drafts writes what the one before it made"


def test_the_same_holds_for_a_model_with_windows_that_runs_mlx_lms_file(tmp_path: Path) -> None:
    model = bridged.bridged("gemma2")
    pool = AdapterPool(model, AdapterStore(tmp_path))
    held = {name: tiny.adapter(model, rank, rank, bridged.targets_of(model)) for name, rank in (("one", 2), ("two", 5))}
    for name, weights in held.items():
        pool.save(name, weights, {})
    assert check(model, pool, 2, 0.2, held).counts[1] > 0


# --- what a pass with drafts does to one row ---


def test_a_right_draft_comes_in_one_step_and_a_wrong_one_leaves_nothing(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = request([3, 1, 4], max_tokens=40, temperature=0.9, seed=2)
    wanted, width = ordinary(model, pool, one), [1]
    monkeypatch.setattr(Eager, "plan", lambda *_: Plan(width[0]))
    for wrong, tokens in ((0.0, 9), (1.0, 1)):
        driver, width[0] = Drafting(model, pool, wrong), 1
        driver.lookahead = False
        sent = driver.foreseen(one, wanted)
        driver.step()
        (row,), width[0] = driver.lane.batch.rows, 9
        for _ in range(3):
            before = len(sent.tokens)
            driver.step()
            assert len(sent.tokens) - before == tokens
            assert row.cached == row.length - 1, "the next pass writes over what was wrong"
        assert driver.counts == (24, 24 if wrong == 0.0 else 0)


@pytest.mark.parametrize("stop", ["length", "stop_string", "stop_token", "stop"])
def test_an_answer_ends_within_a_draft_where_it_ends_without(
    tiny_llama: Llama, pool: AdapterPool, model: LoadedModel, stop: str
) -> None:
    free = ordinary(model, pool, request([3, 1, 4], max_tokens=20, temperature=1.5, seed=5))
    end = free.ids[6]
    endings: dict[str, dict[str, Any]] = {
        "length": {"max_tokens": 7}, "stop_string": {"stop": [f"t{end}"]}, "stop_token": {"stop_token_ids": [end]},
        "stop": {},
    }  # fmt: skip
    one = request([3, 1, 4], **{"max_tokens": 20, "temperature": 1.5, "seed": 5, **endings[stop]})
    ends = tiny.loaded(tiny_llama, eos_ids=[end]) if stop == "stop" else model
    wanted, driver = ordinary(ends, pool, one), Drafting(ends, pool, 0.0)
    sent = driver.foreseen(one, free)  # it foresees what would come behind the end, too
    driver.run()
    assert sent.ids == wanted.ids == free.ids[: free.ids.index(end) + 1]
    assert (sent.result.text, sent.result.finish_reason) == (wanted.result.text, stop)
    driver.assert_empty()


def test_a_job_that_goes_on_elsewhere_drafts_from_what_was_published(model: LoadedModel, pool: AdapterPool) -> None:
    one = request([3, 1, 4], max_tokens=30, temperature=0.9, seed=4)
    wanted, driver = ordinary(model, pool, one), Drafting(model, pool, 0.1)
    resumed = driver.foreseen(one, wanted, published=11)
    driver.run()
    assert [(token.index, token.token_id) for token in resumed.tokens] == [
        (token.index, token.token_id) for token in wanted.tokens[11:]
    ]
    assert driver.counts[1] > 0


def test_a_drafted_token_without_numbers_spoils_nothing(tiny_llama: Llama, pool: AdapterPool) -> None:
    """Its row of the weights is damaged: nothing of it stays, as it was not chosen."""
    mx.random.seed(7)
    llama = Llama(TINY, RandomTensors())
    bad = 60
    llama.embed_tokens.weight[bad] = mx.nan
    model = tiny.loaded(llama, eos_ids=[])
    asked = request([3, 1, 4], max_tokens=24, logit_bias={bad: -100.0})
    driver = Driver(model, pool, lookup=True)
    driver.lane.drafter = Eager()
    sent = driver.send(asked)
    (row,) = driver.lane.held
    row.lookup = Foreseen([bad] * 24, 0.0, np.random.default_rng(0))
    head = llama.head
    llama.head = lambda hidden: mx.where(mx.arange(llama.args.vocab) == bad, 0.0, head(hidden))  # type: ignore[method-assign]
    driver.run()
    assert driver.lane.load.drafted > 0
    assert sent.result.finish_reason == "length"
    driver.lane.drafter = Drafter()
    again = driver.send(asked)
    driver.run()
    assert again.ids == sent.ids


def test_a_draft_is_tried_as_far_as_its_grammar_goes(wordy: LoadedModel, tmp_path: Path) -> None:
    pool = AdapterPool(wordy, AdapterStore(tmp_path))
    one = GenerateRequest(
        model="tiny", prompt="The stoker wrote:", max_tokens=24, regex=r"(ab){4}[0-9]{3}", temperature=2.0, seed=3
    )
    wanted = ordinary(wordy, pool, one)
    driver = Drafting(wordy, pool, 0.5)
    sent = driver.foreseen(one, wanted)
    driver.run()
    assert sent.ids == wanted.ids
    assert driver.counts[1] > 0
    assert (sent.result.text, sent.result.finish_reason) == (wanted.result.text, wanted.result.finish_reason)


def test_a_row_without_numbers_ends_alone_while_its_neighbour_drafts(model: LoadedModel, pool: AdapterPool) -> None:
    broken = tiny.adapter(model, 3, 3)
    for sides in broken.matrices.values():
        sides["b"] = mx.full(sides["b"].shape, mx.nan)
    pool.save("nan", broken, {})
    one = request([3, 1, 4], max_tokens=40, temperature=0.9, seed=2)
    wanted, driver = ordinary(model, pool, one), Drafting(model, pool, 0.1)
    stays, ends = driver.foreseen(one, wanted), driver.send(request([5, 6], max_tokens=40))
    driver.lookahead = False
    while len(driver.lane.batch.rows) < 2:
        driver.step()
    row = next(row for row in driver.lane.batch.rows if row.ticket is ends.ticket)
    row.lookup = None
    pool.release(row.adapter)
    row.adapter = pool.acquire("nan")
    driver.step()
    assert isinstance(ends.ticket.error, ModelError)
    driver.run()
    assert stays.ids == wanted.ids
    assert driver.counts[1] > 0
    driver.assert_empty()


# --- who drafts ---


def drafts(lane: GenerateLane, **options: Any) -> bool:
    work = lane.prepare(Ticket("job", "generate"), request([3, 1, 4], **options), None)
    return all(row.lookup is not None for row in work.rows)


@pytest.mark.parametrize(("on_cpu", "limit", "usual"), [(True, None, True), (False, None, False), (True, False, False)])
def test_a_request_says_whether_it_drafts_and_else_the_worker_does(
    model: LoadedModel,
    pool: AdapterPool,
    monkeypatch: pytest.MonkeyPatch,
    on_cpu: bool,
    limit: bool | None,
    usual: bool,
) -> None:
    monkeypatch.setattr(lane_module, "on_cpu", lambda: on_cpu)
    lane = GenerateLane(model, pool, LaneLimits(compiled="none", lookup=limit))
    assert [drafts(lane, lookup=asked) for asked in (None, True, False)] == [usual, True, False]


def test_a_recurrent_model_drafts_nothing(tmp_path: Path) -> None:
    model = bridged.bridged("lfm2")
    assert not drafts(GenerateLane(model, AdapterPool(model, AdapterStore(tmp_path))), lookup=True)


def test_a_result_says_what_was_drafted_where_the_request_asked_for_it(model: LoadedModel, pool: AdapterPool) -> None:
    for lookup in (True, None):
        one = request([3, 1, 4], max_tokens=30, lookup=lookup)
        driver, sent = Drafting(model, pool, 0.3), ordinary(model, pool, one.model_copy(update={"lookup": None}))
        found = driver.foreseen(one, sent)
        driver.run()
        usage = found.result.usage
        assert (usage.drafted_tokens, usage.accepted_tokens) == (driver.counts if lookup else (None, None))
        assert ("drafted_tokens" in usage.model_dump()) == bool(lookup)


def test_next_to_a_background_nobody_drafts(model: LoadedModel, pool: AdapterPool) -> None:
    """How many rows of it fit is measured in passes of one token a row."""
    driver = Drafting(model, pool, 0.0)
    for priority in (2, 9):
        one = request([3, 1, 4], max_tokens=40, priority=priority)
        driver.foreseen(one, ordinary(model, pool, one))
    while sum(row.priority for row in driver.lane.held) == 11:
        driver.step()
    assert driver.counts == (0, 0)
    driver.run()
    assert driver.counts[1] > 0, "the other one is alone now"


# --- when it pays ---


class Clock:
    """A pass takes 1, and `token` for each further one of a row."""

    def __init__(self, token: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.widths = 0.0, list[int]()
        read, tried = Batch.read, Batch.try_drafts

        def timed_read(batch: Batch, pending: Any) -> Read:
            self._passed(1, token)
            return read(batch, pending)

        def timed_drafts(batch: Batch, width: int) -> list[Tried]:
            self._passed(width, token)
            return tried(batch, width)

        monkeypatch.setattr(Batch, "read", timed_read)
        monkeypatch.setattr(Batch, "try_drafts", timed_drafts)
        monkeypatch.setattr(lane_module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def _passed(self, width: int, token: float) -> None:
        self.widths.append(width)
        self.now += 1 + token * (width - 1)


def passes(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch, token: float, wrong: float
) -> list[int]:
    """Tokens of a row in each pass for an answer of 120 tokens; what is drafted is wrong so often."""
    one = request([3, 1, 4], max_tokens=120, temperature=2.0, seed=6)
    wanted = ordinary(model, pool, one)
    clock, driver = Clock(token, monkeypatch), Drafting(model, pool, wrong)
    driver.lane.drafter = Drafter()
    sent = driver.foreseen(one, wanted)
    (row,) = driver.lane.held
    assert row.lookup is not None
    row.lookup.rate = 1.0 - wrong
    driver.run()
    assert sent.ids == wanted.ids
    return clock.widths


def test_right_drafts_save_most_passes_where_further_tokens_cost_little(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = passes(model, pool, monkeypatch, 0.05, 0.0)
    assert len(widths) < 40
    assert widths.count(9) > 5
    assert max(widths[:LEAST]) == 1, "what a pass takes without drafts is measured first"


@pytest.mark.parametrize(("token", "wrong"), [(1.0, 0.0), (0.3, 0.9)])
def test_drafts_are_off_where_they_lose_except_for_a_few_tries(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch, token: float, wrong: float
) -> None:
    """Further tokens cost as much as a pass, or few of them are right."""
    widths = passes(model, pool, monkeypatch, token, wrong)
    assert sum(width > 1 for width in widths) <= 1 + TRIES, widths
    assert set(widths) <= {1, 2}, "the smallest size shows it"


def rows(*rates: float, most: int = 20) -> list[Any]:
    return [SimpleNamespace(lookup=SimpleNamespace(rate=rate, expects=rate > 0), most_drafted=most) for rate in rates]


def planned(drafter: Drafter, *given: Any) -> int:
    return drafter.plan(*given).width


def known(seconds: dict[int, float], count: int = 1) -> Drafter:
    """One that knows what passes of these widths take."""
    drafter = Drafter()
    for width, each in seconds.items():
        for _ in range(LEAST + 1):
            drafter.note(count, width, each)
    return drafter


def test_a_pass_is_as_wide_as_most_tokens_a_second_are_expected_of() -> None:
    drafter = known({1: 1.0, 2: 1.1, 3: 1.2, 5: 1.4, 9: 3.0})
    assert [planned(drafter, rows(rate), 100) for rate in (0.0, 0.05, 0.3, 0.9)] == [1, 1, 2, 5]
    assert planned(drafter, rows(0.9, most=1), 100) == 2, "more are not wanted"
    assert planned(drafter, rows(0.9), 3) == 3, "there is room for no more"
    assert [planned(drafter, rows(0.3), 100, ahead) for ahead in (0, 1)] == [2, 1], (
        "the token on its way has to come, too"
    )


def test_no_row_waits_much_longer_because_others_draft() -> None:
    dear, cheap = known({1: 1.0, 2: 1.2, 3: 1.6}, 4), known({1: 1.0, 2: 1.05, 3: 1.3}, 4)
    for drafter, widths in ((dear, [1, 1, 1, 3]), (cheap, [2, 2, 2, 3])):
        found = [planned(drafter, rows(*[0.9] * count, *[0.0] * (4 - count)), 3) for count in (1, 2, 3, 4)]
        assert found == widths
    assert planned(dear, rows(0.9, 0.9, 0.9, 0.05), 3) == 1, "that one is expected to gain nothing"
    silent = [*rows(0.9, 0.9, 0.9), SimpleNamespace(lookup=None, most_drafted=20)]
    assert planned(dear, silent, 3) == 1


def test_of_widths_that_nothing_is_known_of_the_next_one_is_tried() -> None:
    drafter = Drafter()
    assert planned(drafter, rows(1.0), 100) == 1
    for _ in range(LEAST):
        drafter.note(1, 1, 1.0)
        assert planned(drafter, rows(1.0), 100) == 1, "the first of a size may have been compiled"
    drafter.note(1, 1, 1.0)
    for width, wider in itertools.pairwise(WIDTHS):
        for seconds in (50.0, *[1.0] * TRIES):
            assert planned(drafter, rows(1.0), 100) == width, "its first pass may have been compiled"
            drafter.note(1, width, seconds)
        assert planned(drafter, rows(1.0), 100) == wider
    assert [planned(known({1: 1.0}), rows(rate), 100) for rate in (GUESS, GUESS + 0.1)] == [1, 2]
    # The third token costs what the second did.
    assert [planned(known({1: 1.0, 2: two}), rows(0.9), 100) for two in (1.1, 1.5, 1.9)] == [3, 3, 1]


def test_a_size_that_lost_is_tried_again_after_a_while() -> None:
    drafter = known({1: 1.0, 2: 9.0})
    for _ in range(FORGET + 1):
        assert planned(drafter, rows(0.9), 100) == 1
        drafter.note(1, 1, 1.0)
    assert planned(drafter, rows(0.9), 100) == 2


def test_one_pass_of_many_goes_without_drafts_and_says_what_that_takes() -> None:
    drafter = known({1: 1.0, 2: 1.0})
    for _ in range(WITHOUT - LEAST - 1):
        assert planned(drafter, rows(0.9), 2) == 2
        drafter.note(1, 2, 1.0)
    assert planned(drafter, rows(0.9), 2) == 1
    drafter.note(1, 1, 1.0)
    assert planned(drafter, rows(0.9), 2) == 2


# --- what is looked up ---


def looked(prompt: Sequence[int], answer: Sequence[int]) -> Lookup:
    lookup = Lookup(PromptNgrams(prompt))
    for token in answer:
        lookup.add(token)
    return lookup


@pytest.mark.parametrize(
    ("prompt", "answer", "draft"),
    [
        ([1, 2, 3, 4, 5, 6], [9, 1, 2, 3], [4, 5, 6, 9]),
        ([1, 2, 3, 4, 1, 2, 3, 5], [9, 1, 2, 3], [5, 9, 1, 2]),
        ([9], [1, 2, 3, 7, 8, 1, 2, 3], [7, 8, 1, 2]),
        ([1, 2, 3, 4], [1, 2, 3, 5, 1, 2, 3], [5, 1, 2, 3]),
        ([9], [1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], [8, 1, 2, 3]),
        ([1, 2, 3, 7, 8, 9, 1, 2], [3], [7, 8, 9, 1]),
        ([4, 4, 4], [4], [4, 4, 4, 4]),
        ([1, 2, 3, 4], [2, 3], []),
        ([1], [2], []),
    ],
    ids=["prompt", "last", "answer", "answer first", "answer last", "across", "repeats", "too short", "nothing"],
)
def test_a_draft_is_what_followed_the_last_time(prompt: list[int], answer: list[int], draft: list[int]) -> None:
    lookup = looked(prompt, answer)
    assert lookup.draft(4) == draft
    assert lookup.expects == bool(draft)
    assert lookup.draft(0) == []


def test_what_goes_on_as_expected_goes_on_at_its_place() -> None:
    """The latest place that begins alike is another one; the former has more in common."""
    lookup = looked([1, 2, 3, 4, 5, 6, 7, 0, 3, 4, 5, 8], [1, 2, 3, 4, 5])
    assert lookup.draft(2) == [6, 7]


def test_the_rate_is_that_of_expected_tokens_alone_and_of_the_last_ones_most() -> None:
    prompt = list(range(3, 40))
    assert looked(prompt, [50, 51, 52, 53]).rate == PRIOR
    right, wrong = looked(prompt, [3, 4, 5, *range(6, 30)]), looked(prompt, [3, 4, 5, 50, 3, 4, 5, 51])
    assert 0.95 < right.rate < 1.0
    assert wrong.rate < PRIOR
    before = right.rate
    right.add(59)
    assert right.rate < before


def test_the_end_of_a_long_prompt_is_looked_through() -> None:
    beginning, end = [1, 2, 3, 4], [5, 6, 7, 8]
    for between, found in ((REACH - 8, True), (REACH, False)):
        prompt = [*beginning, *[0] * between, *end]
        assert looked(prompt, beginning[:NGRAM]).expects == found
        assert looked(prompt, end[:NGRAM]).draft(1) == [8]
