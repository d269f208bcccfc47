"""One row that fails hurts itself alone: faults in every call that a row makes, in the middle of random traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.lora import LoraWeights
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation import gathering, pacing
from engine.generation.batch import Batch
from engine.generation.lane import GenerateLane
from engine.generation.prompt import TokenizedPrompt
from engine.generation.row import Generation, Row, RowState
from engine.generation.sampling_batch import sampling_batch
from engine.generation.step import Step
from engine.models.llama import Llama
from engine.ticket import Ticket
from stoker.contract import GenerateRequest
from stoker.errors import DeadlineExceeded, JobCancelled, JobFailed, ModelError
from tests.engine import tiny
from tests.engine.conftest import TINY, RandomTensors
from tests.engine.oracle import Oracle
from tests.engine.test_generate_lane import MODES, Driver, Sent, random_requests, request
from tests.thorough import in_turn

#: The prompts of rows that are to fail begin so, and no other does.
MARK = [60, 59, 60, 59]


class Planted(Exception):
    """The fault."""


class Panic(BaseException):
    """As a library in Rust panics."""


@pytest.fixture(scope="module")
def model(ending: LoadedModel) -> LoadedModel:
    return ending


@pytest.fixture
def pool(model: LoadedModel, tmp_path: Path) -> AdapterPool:
    pool = tiny.pool(model, tmp_path)
    pool.save("nan", spoiled(tiny.adapter(model, 3, 3)), {})
    return pool


def spoiled(weights: LoraWeights) -> LoraWeights:
    for sides in weights.matrices.values():
        sides["b"] = mx.full(sides["b"].shape, mx.nan)
    return weights


def bad(generation: Generation) -> bool:
    return generation.prompt[: len(MARK)] == MARK


class BrokenGrammar:
    """One that allows everything, and fails in one of its calls."""

    def __init__(self, fails: str) -> None:
        self._fails = fails

    def mask(self) -> np.ndarray:
        mask: np.ndarray = self._call("mask", np.full(2, -1, np.int32))
        return mask

    def accept(self, token: int) -> None:
        self._call("accept", None)

    @property
    def complete(self) -> bool:
        return bool(self._call("complete", False))

    def _call(self, name: str, value: Any) -> Any:
        if name == self._fails:
            raise Planted(name)
        return value


class Failing:
    """Puts faults into the calls of marked rows, each for the time of a test."""

    def __init__(self, patch: pytest.MonkeyPatch, after: int) -> None:
        self._patch, self._after = patch, after

    def method(self, owner: type, name: str, marked: Callable[..., bool], fault: type[BaseException] = Planted) -> None:
        whole = getattr(owner, name)
        function: Any = whole.fget if isinstance(whole, property) else whole

        def call(*arguments: Any, **options: Any) -> Any:
            if marked(*arguments):
                raise fault(name)
            return function(*arguments, **options)

        self._patch.setattr(owner, name, property(call) if isinstance(whole, property) else call)

    def row(self, name: str, fault: type[BaseException] = Planted) -> None:
        """A method of the row itself, once it has a few tokens."""
        self.method(Row, name, lambda row, *_: bad(row.generation) and len(row.tokens) >= self._after, fault)

    def part(self, name: str, method: str, fault: type[BaseException] = Planted, *, after: int | None = None) -> None:
        """A call of something that the row has: its detokenizer, its scanner, its random numbers, its grammar."""
        made, after = Row.__post_init__, self._after if after is None else after

        def post_init(row: Row) -> None:
            made(row)
            if bad(row.generation):
                if name == "grammar":
                    row.grammar = BrokenGrammar(method)  # type: ignore[assignment]
                else:
                    setattr(row, name, _Breaking(getattr(row, name), method, after, fault))

        self._patch.setattr(Row, "__post_init__", post_init)

    def sampling_batch(self) -> None:
        whole = sampling_batch

        def planted(draws: Any, *rest: Any) -> Any:
            if any(draw.request.prompt.startswith(tiny.text(MARK)) for draw in draws):
                raise Planted("sampling_batch")
            return whole(draws, *rest)

        self._patch.setattr(gathering, "sampling_batch", planted)

    def prefixes(self, lane: GenerateLane, name: str) -> None:
        whole = getattr(lane.prefixes, name)

        def call(owner: Any, tokens: list[int], *rest: Any) -> Any:
            if tokens[: len(MARK)] == MARK:
                raise Planted(name)
            return whole(owner, tokens, *rest)

        self._patch.setattr(lane.prefixes, name, call)


class _Breaking:
    """Works like `whole` until `method` was called `after` times."""

    def __init__(self, whole: Any, method: str, after: int, fault: type[BaseException]) -> None:
        self._whole, self._method, self._left, self._fault = whole, method, after, fault

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            self._left -= 1
            if self._left < 0:
                raise self._fault(name)
        return getattr(self._whole, name)

    def __call__(self, position: int) -> Any:
        return self.__getattr__("__call__")(position)


FAULTS: dict[str, Callable[[Failing, GenerateLane], None]] = {
    "what is not cached": lambda failing, lane: failing.method(
        Row, "uncached", lambda row: bad(row.generation) and row.state is not RowState.NEW
    ),
    "prefix lookup": lambda failing, lane: failing.prefixes(lane, "find"),
    "prefix test": lambda failing, lane: failing.prefixes(lane, "has"),
    "prefix kept": lambda failing, lane: failing.prefixes(lane, "put"),
    "draw": lambda failing, lane: failing.row("draw"),
    "random number": lambda failing, lane: failing.part("_uniforms", "__call__"),
    "sampling_batch": lambda failing, lane: failing.sampling_batch(),
    "grammar's mask": lambda failing, lane: failing.part("grammar", "mask"),
    "grammar's token": lambda failing, lane: failing.part("grammar", "accept"),
    "grammar's end": lambda failing, lane: failing.part("grammar", "complete"),
    "detokenizer": lambda failing, lane: failing.part("_detokenizer", "add"),
    "detokenizer that panics": lambda failing, lane: failing.part("_detokenizer", "add", Panic),
    "detokenizer's end": lambda failing, lane: failing.part("_detokenizer", "finish", after=0),
    "stop strings": lambda failing, lane: failing.part("_scanner", "add"),
    "the token taken": lambda failing, lane: failing.row("accept"),
    "alternatives": lambda failing, lane: failing.row("_alternatives"),
    "publishing": lambda failing, lane: failing.method(Generation, "extend", lambda one, *_: bad(one)),
    "the result": lambda failing, lane: failing.method(Generation, "result", lambda one: bad(one)),
    "adapter": lambda failing, lane: failing.method(AdapterPool, "acquire", lambda pool, name: name == "nan"),
    "numbers that are not finite": lambda failing, lane: None,
}


def marked(name: str, number: int) -> GenerateRequest:
    """A request that fails by fault `name`."""
    adapter = "nan" if name in ("adapter", "numbers that are not finite") else None
    hot: dict[str, Any] = {"temperature": 0.9, "seed": number, "top_logprobs": 2}
    return request([*MARK, *range(10, 50)], max_tokens=6, n=1 + number % 2, adapter=adapter, ignore_eos=True, **hot)


def assert_owned(lane: GenerateLane) -> None:
    """Every row that was admitted and has not ended is in one container, the one that its state names."""
    containers = {
        RowState.WAITING: lane.waiting,
        RowState.PREFILLING: lane.prefilling,
        RowState.DECODING: lane.batch.rows,
    }
    listed = [(row, state) for state, rows in containers.items() for row in rows]
    assert sorted(map(id, lane.held)) == sorted(id(row) for row, _ in listed)
    assert all(row.state is state for row, state in listed)
    assert [row.slot for row in lane.batch.rows] == list(range(len(lane.batch.rows)))
    assert not any(row.ticket.done for row in lane.held)


@pytest.mark.parametrize(("name", "seed"), in_turn(list(FAULTS), [0, 1, 2]))
def test_a_row_that_fails_ends_its_own_job_and_leaves_nothing(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    """Joins, cancels, deadlines, preemption and several completions go on meanwhile."""
    driver = Driver(model, pool, **MODES[seed])
    FAULTS[name](Failing(monkeypatch, after=seed), driver.lane)
    random = np.random.default_rng(seed)
    good = [one.model_copy(update={"deadline": None}) for one in random_requests(100 + seed, 5)]
    waiting = [*(("good", one) for one in good), *(("bad", marked(name, number)) for number in range(3))]
    random.shuffle(waiting)
    sent = traffic(driver, waiting, random)
    driver.assert_empty()
    assert driver.lane.batch.nbytes == 0 or not driver.lane.batch.rows
    assert driver.lane.kv_bytes <= driver.lane.limits.kv_bytes

    oracle = Oracle(model, tiny.adapters(model))
    for kind, asked, one in sent:
        assert one.ticket.done
        if kind == "bad":
            with pytest.raises((Planted, JobFailed, ModelError)) as caught:
                one.ticket.result(0)
            assert isinstance(caught.value, ModelError) == (name == "numbers that are not finite")
            continue
        if one.ticket.error is None:
            for answer in one.result.completions:
                oracle.check_result(asked, answer)
        else:
            assert isinstance(one.ticket.error, JobCancelled | DeadlineExceeded)
        for completion in range(asked.n):
            oracle.check(asked, completion, [token for token in one.tokens if token.completion == completion])


def traffic(
    driver: Driver, waiting: list[tuple[str, GenerateRequest]], random: np.random.Generator
) -> list[tuple[str, GenerateRequest, Sent]]:
    sent: list[tuple[str, GenerateRequest, Sent]] = []
    for _ in range(3000):
        if not waiting and not driver.lane.busy:
            return sent
        driver.lookahead = bool(random.random() < 0.8)
        if waiting and random.random() < 0.4:
            kind, asked = waiting.pop()
            sent.append((kind, asked, driver.send(asked)))
        if sent and random.random() < 0.04:
            stop_one(*sent[random.integers(len(sent))], random)
        driver.step()
        assert_owned(driver.lane)
    raise AssertionError("the lane does not come to an end")


def stop_one(kind: str, asked: GenerateRequest, sent: Sent, random: np.random.Generator) -> None:
    """Cancel a good one, or let its deadline pass."""
    if kind == "good" and not sent.ticket.done:
        if random.random() < 0.5:
            sent.ticket.cancel()
        else:
            sent.ticket.deadline = 0.0


def test_numbers_that_are_not_finite_are_the_rows_own_error_and_stay_in_no_cache(
    model: LoadedModel, pool: AdapterPool
) -> None:
    """A masked position that is NaN would spoil the next row in its slot: 0 times NaN is NaN."""
    driver = Driver(model, pool, slots=2)
    wanted = driver.send(request([3, 1, 4], max_tokens=30))
    driver.run()
    for _ in range(3):
        neighbour = driver.send(request([3, 1, 4], max_tokens=30))
        driver.step()
        spoilt = driver.send(request(list(range(8, 50)), max_tokens=30, adapter="nan"))
        driver.run()
        with pytest.raises(ModelError, match="tiny with adapter nan gives numbers that are not finite"):
            spoilt.ticket.result(0)
        assert neighbour.ids == wanted.ids
        assert not spoilt.tokens
    again = driver.send(request([3, 1, 4], max_tokens=30))
    driver.run()
    assert again.ids == wanted.ids
    assert all(bool(mx.all(mx.isfinite(array)).item()) for array in stored(driver.lane))
    driver.assert_empty()


@pytest.mark.parametrize("cancelled", [True, False])
def test_what_a_row_leaves_in_the_batch_spoils_no_other(model: LoadedModel, pool: AdapterPool, cancelled: bool) -> None:
    """Its numbers stop being finite in the middle of its answer, or in a pass that nobody reads because it was
    cancelled; the row that gets its slot has fewer tokens, and a masked position is read all the same."""
    driver = Driver(model, pool, slots=2)
    wanted = driver.send(request([3], max_tokens=12))
    driver.run()
    stays = driver.send(request([3], max_tokens=12))
    leaves = driver.send(request([5, 6, 7, 8, 9, 10], max_tokens=12))
    batch = driver.lane.batch
    while not (batch.in_flight and len(batch.rows) == 2):
        driver.step()
    row = next(row for row in batch.rows if row.ticket is leaves.ticket)
    pool.release(row.adapter)
    row.adapter = pool.acquire("nan")
    assert batch.in_flight is not None
    batch.read(batch.in_flight)
    for one in batch.rows:
        one.cached = one.length - 1
    assert batch.launch()
    if cancelled:
        leaves.ticket.cancel()
    driver.step()
    newest = driver.send(request([3], max_tokens=12))
    driver.run()
    assert isinstance(leaves.ticket.error, JobCancelled if cancelled else ModelError)
    assert stays.ids == newest.ids == wanted.ids
    driver.assert_empty()


def stored(lane: GenerateLane) -> Iterator[mx.array]:
    caches = [lane.batch.kv, *lane.prefixes.kept]
    for kv in caches:
        if kv is not None:
            yield from (array for arrays in kv.stored for array in arrays)


def test_a_device_that_fails_ends_every_job_of_the_lane_and_the_next_ones_are_served(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(model, pool)
    wanted = driver.send(request([3, 1, 4]))
    driver.run()
    running = [driver.send(request([3, 1, 4], n=2)) for _ in range(4)]
    for _ in range(3):
        driver.step()
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("[malloc] no more")))
        with pytest.raises(RuntimeError, match="no more") as caught:
            driver.run()
    driver.lane.fail_all(caught.value)
    for one in running:
        with pytest.raises(RuntimeError, match="no more"):
            one.ticket.result(0)
    driver.assert_empty()
    assert_owned(driver.lane)
    again = driver.send(request([3, 1, 4]))
    driver.run()
    assert again.ids == wanted.ids


@pytest.mark.parametrize("lookahead", [True, False])
def test_a_job_that_ended_in_a_step_which_fails_behind_it_has_an_end(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch, lookahead: bool
) -> None:
    """Its first token was its last, and the pass of the prompt next to it fails: the lane has let go of it already."""
    # Rows of a burst have their pass a step later.
    monkeypatch.setattr(pacing, "GATHER", 0)
    driver = Driver(model, pool)
    driver.lookahead = lookahead
    short, other = driver.send(request([5, 9, 2], max_tokens=1)), driver.send(request([3, 1, 4]))
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "launch", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("[malloc] no more")))
        with pytest.raises(RuntimeError, match="no more") as caught:
            driver.run()
    driver.lane.fail_all(caught.value)
    for one in (short, other):
        with pytest.raises(RuntimeError, match="no more"):
            one.ticket.result(0)


def test_a_model_whose_weights_are_not_finite_says_so_for_each_job(tmp_path: Path) -> None:
    class Spoilt(RandomTensors):
        def take(
            self, name: str, shape: tuple[int, ...], *, transpose: bool = False, dtype: mx.Dtype | None = None
        ) -> mx.array:
            array = super().take(name, shape, transpose=transpose)
            return mx.full(array.shape, mx.nan) if name == "lm_head.weight" else array

    spoilt = tiny.loaded(Llama(TINY, Spoilt()))
    driver = Driver(spoilt, AdapterPool(spoilt, AdapterStore(tmp_path)))
    driver.lane.warm()
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 4, "repetition_penalty": 1.2}):
        sent = driver.send(request([3, 1], **options))
        driver.run()
        with pytest.raises(ModelError, match="tiny gives numbers that are not finite"):
            sent.ticket.result(0)
    driver.assert_empty()


def test_sampling_values_that_no_contract_let_through_end_their_own_job(model: LoadedModel, pool: AdapterPool) -> None:
    """A request that was built around the contract's bounds: each value makes NaN, or cannot be written as a column."""
    driver = Driver(model, pool)
    free = driver.send(request([9, 10], max_tokens=20))
    driver.run()
    neighbour = driver.send(request([9, 10], max_tokens=20))
    culprits = []
    for field, value in {"repetition_penalty": 1e-40, "temperature": 1e-300, "top_k": 2**40, "min_p": "x"}.items():
        asked = request([11, 12], max_tokens=20, temperature=1.0)
        culprits.append(driver.send(asked.model_copy(update={field: value, "deadline": 3.0})))
    driver.run()
    assert neighbour.ids == free.ids
    assert all(one.ticket.done for one in culprits)
    assert [one.ticket.error is not None for one in culprits] == [True, True, False, True]
    driver.assert_empty()


def test_what_ends_the_process_is_no_rows_own(model: LoadedModel) -> None:
    row = Generation(Ticket("x", "generate"), request([3]), TokenizedPrompt([3]), model.tokenizer, 64).rows[0]
    with pytest.raises(KeyboardInterrupt), row.guarded():
        raise KeyboardInterrupt
