"""Rows that begin alike have the positions of that once: who shares what, what it takes, and the same tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.pool import AdapterPool
from engine.checkpoints.loading import LoadedModel
from engine.generation.batch import Batch
from engine.generation.row import Row
from engine.models import openings
from engine.models.buckets import bucket
from engine.models.joint import JointKeyValues
from engine.models.key_values import KeyValues
from engine.models.llama import Llama
from engine.models.openings import FEWEST, Kept, Opening, Share, Span, own_lengths, share
from engine.models.segments import PADDING, SMALLEST
from engine.ticket import Ticket
from kernels import backend
from kernels.emulator import build
from stoker.contract import GenerateRequest, GenerateResult
from tests.engine import test_drafts, test_generate_lane, tiny
from tests.engine.conftest import TINY, RandomTensors
from tests.engine.test_generate_lane import MODES, Driver, check_traffic, random_requests, request
from tests.engine.test_joint import Rows, grow, leave, swap
from tests.engine.test_kv_bits import packing
from tests.thorough import quick

SYSTEM = [3 + n % 40 for n in range(150)]


@pytest.fixture
def joint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows decode over joint arrays; the kernel runs as its reference."""
    apart = Llama.kv_sizes.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Llama, "kv_sizes", property(lambda llama: apart(llama)._replace(joint=True)))


# --- who shares what ---


def opening(*parts: tuple[int, int], owner: int = 0) -> Opening:
    """So many tokens of each of these numbers."""
    return Opening(owner, np.concatenate([np.full(count, token, np.int32) for token, count in parts]))


def asked(which: Opening, others: int = 0) -> Span:
    return Span(len(which.tokens) + 1, which, others)


@pytest.mark.parametrize(
    ("length", "other", "common"), [(FEWEST, 1, FEWEST), (FEWEST - 1, 1, 0), (300, 0, 0), (300, 1, 300)]
)
def test_rows_have_in_common_what_they_begin_with_where_that_is_long_and_of_one_adapter(
    length: int, other: int, common: int
) -> None:
    first, second = (opening((7, length), (token, 50), owner=owner) for token, owner in ((8, 1), (9, other)))
    assert [first.common(second) for _ in range(2)] == [common] * 2
    assert first.common(first) == length + 50
    assert first.common(opening((7, length), owner=1)) == (length if length >= FEWEST else 0)


def test_a_row_shares_the_longest_run_and_of_those_as_good_the_shortest() -> None:
    system, longer = opening((1, 200)), opening((1, 200), (2, 300))
    kept = [Kept(longer, longer), Kept(system, system), Kept(longer, longer)]
    assert share(asked(opening((1, 200), (3, 9))), kept) == Share(1, 200)
    assert share(asked(opening((1, 200), (2, 250), (3, 9))), kept) == Share(0, 450)
    assert share(asked(opening((4, 500))), kept) is None
    assert share(Span(600), kept) is None


def test_a_row_begins_a_run_only_where_it_is_plainly_longer_than_one_that_is_there() -> None:
    """Each row shares one run: one that was cut for a few tokens would share those alone from then on."""
    system, whole = opening((1, 200)), opening((1, 200), (2, 300))
    kept = [Kept(system, system), Kept(whole)]
    assert share(asked(opening((1, 200), (2, 100), (3, 9))), kept) == Share(0, 200)
    assert share(asked(opening((1, 200), (2, FEWEST), (3, 9))), kept) == Share(1, 200 + FEWEST)


def test_a_row_with_others_that_begin_alike_stays_whole_where_that_takes_less() -> None:
    """Behind a system prompt that all share, 16 answers to one long document hold it once."""
    system, document = opening((1, 200)), opening((1, 200), (2, 3000))
    kept = [Kept(opening((1, 200), (9, 4)), system)]
    assert share(asked(document), kept) == Share(0, 200)
    assert share(asked(document, others=15), kept) is None
    assert own_lengths([asked(document, 15)] * 16, kept) == [3201] + [1] * 15
    # Others that come one by one: the second shows that there are several, the third has what it left whole.
    assert own_lengths([asked(document)] * 4, kept) == [3001, 3201, 1, 1]


def test_what_rows_that_are_to_come_share_among_each_other_is_known_before() -> None:
    same, other = opening((1, 200), (2, 30)), opening((1, 200), (3, 40))
    assert own_lengths([asked(same), asked(other), asked(same), Span(7)], []) == [231, 41, 31, 7]
    assert own_lengths([asked(same), asked(Opening(2, same.tokens))], []) == [231, 231]


# --- what storage holds ---


def filled(llama: Llama, length: int, seed: int) -> KeyValues:
    """A row of random keys and values."""
    random, kv = np.random.default_rng(seed), KeyValues(llama, 1, length)
    for arrays in (kv.keys, kv.values):
        arrays[:] = [mx.array(random.normal(0, 1, array.shape).astype(np.float32)) for array in arrays]
    return kv


def come(kv: JointKeyValues, lengths: Sequence[int], span: Span, source: KeyValues) -> None:
    kv.fit(lengths, [span])
    kv.add(len(lengths), span, source, 0)


def holds(kv: JointKeyValues, row: int, source: KeyValues, length: int) -> bool:
    """Whether a row has the first `length` positions of the source."""
    found, wanted = tiny.sides(kv, row + 1, length), tiny.sides(source, 1, length)
    return all(mx.array_equal(one[row], other[0]).item() for one, other in zip(found, wanted, strict=True))


def test_sixteen_completions_hold_their_prompt_once(tiny_llama: Llama) -> None:
    length, prompt = 8000, opening((1, 4000), (2, 4000))
    source, kv, lengths = filled(tiny_llama, length, 1), JointKeyValues(tiny_llama), list[int]()
    token = kv.nbytes // PADDING
    counted = kv.bytes_of([], [asked(prompt, 15)] * 16)
    for _ in range(16):
        come(kv, lengths, asked(prompt, 15), source)
        lengths.append(length + 1)
    assert kv.positions == PADDING + bucket(bucket(length + 1) + 15 * SMALLEST) == 12_289
    assert counted == kv.nbytes == kv.positions * token
    assert (
        JointKeyValues(tiny_llama).bytes_of([], [Span(length + 1)] * 16)
        == (PADDING + bucket(16 * bucket(length + 1))) * token
    )
    assert all(holds(kv, row, source, length) for row in (0, 7, 15))
    assert {kv.segment(row).shared for row in range(16)} == {length}


def test_thirty_requests_behind_one_system_prompt_need_it_once(tiny_llama: Llama) -> None:
    """6,000 tokens, and 200 of each."""
    empty = JointKeyValues(tiny_llama)
    token = empty.nbytes // PADDING
    spans = [asked(opening((1, 6000), (2 + row, 200))) for row in range(30)]
    assert empty.bytes_of([], spans) == (PADDING + 16_384) * token
    assert empty.bytes_of([], [Span(6201)] * 30) == (PADDING + 262_144) * token


def test_requests_behind_one_beginning_hold_it_once_and_the_first_may_leave(tiny_llama: Llama) -> None:
    kv, lengths, sources = JointKeyValues(tiny_llama), list[int](), list[KeyValues]()
    for row in range(5):
        source = filled(tiny_llama, 1030, row)
        if sources:
            for mine, first in ((source.keys, sources[0].keys), (source.values, sources[0].values)):
                for layer, array in enumerate(first):
                    mine[layer][:, :, :1000] = array[:, :, :1000]
        sources.append(source)
        come(kv, lengths, asked(opening((1, 1000), (2 + row, 30))), source)
        lengths.append(1031)
    assert [kv.segment(row).size for row in range(5)] == [bucket(1031) - 1000] + [SMALLEST] * 4
    kv.leave(0, 4, 1031)
    order = [4, 1, 2, 3]
    assert all(holds(kv, row, sources[place], 1030) for row, place in enumerate(order))
    kv.shrink([1031] * 4)
    assert kv.positions == PADDING + bucket(1000 + 4 * SMALLEST)
    assert all(holds(kv, row, sources[place], 1030) for row, place in enumerate(order))
    for last in (3, 2, 1, 0):
        kv.leave(0, last, 1031)
    kv.shrink([])
    assert kv.positions == PADDING + 1, "the run went with the last that had it"


def test_what_no_row_has_of_a_run_any_more_is_anothers(tiny_llama: Llama) -> None:
    kv, source, long = JointKeyValues(tiny_llama), filled(tiny_llama, 900, 1), opening((1, 200), (2, 700))
    come(kv, [], asked(long), source)
    come(kv, [901], asked(long), source)
    come(kv, [901] * 2, asked(opening((1, 200), (3, 40))), source)
    assert [kv.segment(row).shared for row in range(3)] == [900, 900, 200]
    kv.leave(1, 2, 0)
    kv.leave(0, 1, 0)
    run = kv.segment(0).run
    assert run is not None
    assert run.size == 200
    assert kv.bytes_of([241]) == kv.nbytes
    positions = kv.positions
    come(kv, [241], Span(700), source)
    assert kv.positions == positions
    assert holds(kv, 0, source, 240)


def test_what_some_rows_would_take_by_themselves_goes_by_what_they_share_now(tiny_llama: Llama) -> None:
    """Were it counted as if they came anew, rows would make way for one that has no room all the same."""
    kv, source, document = JointKeyValues(tiny_llama), filled(tiny_llama, 3200, 1), opening((1, 200), (2, 3000))
    token, lengths = kv.nbytes // PADDING, list[int]()
    for span in [asked(which) for which in (document, opening((1, 200), (3, 1)), document, document)]:
        come(kv, lengths, span, source)
        lengths.append(span.length)
    assert [kv.segment(row).shared for row in range(4)] == [200, 200, 3200, 3200]

    def positions(rows: list[int], *more: Span) -> int:
        return kv.bytes_of_some(rows, [lengths[row] for row in rows], more) // token - PADDING

    assert positions([0, 2]) == bucket(200 + bucket(3001) + 3200 + SMALLEST)
    assert positions([2], asked(document)) == bucket(3200 + 2 * SMALLEST)
    assert positions([0, 1], asked(document)) == bucket(200 + bucket(3001) + SMALLEST + bucket(3201))
    assert JointKeyValues(tiny_llama).bytes_of([], [asked(document)] * 2) // token - PADDING == bucket(
        bucket(3201) + SMALLEST
    )


def test_rows_with_other_adapters_share_nothing_with_each_other(tiny_llama: Llama) -> None:
    kv, prompt = JointKeyValues(tiny_llama), opening((1, 300))
    for row, owner in enumerate([0, 1, 2, 1]):
        come(kv, [301] * row, asked(Opening(owner, prompt.tokens)), filled(tiny_llama, 300, owner))
    assert [kv.segment(row).shared for row in range(4)] == [0, 300, 0, 300]
    assert kv.segment(1).run is kv.segment(3).run
    assert all(holds(kv, row, filled(tiny_llama, 300, owner), 300) for row, owner in enumerate([0, 1, 2, 1]))


def test_a_row_that_is_reset_leaves_the_run_that_others_have(tiny_llama: Llama) -> None:
    kv, source, prompt = JointKeyValues(tiny_llama), filled(tiny_llama, 300, 1), opening((1, 300))
    for row in range(2):
        come(kv, [301] * row, asked(prompt), source)
    kv.clear_beyond([0, 300])
    assert holds(kv, 1, source, 300)
    kv.arrays = [mx.where(mx.arange(kv.positions)[None, :, None] <= 300, array, mx.nan) for array in kv.arrays]
    kv.clear_beyond([300, 300])
    assert all(mx.all(mx.isfinite(array)).item() for array in kv.arrays)


@pytest.mark.parametrize("seed", range(20))
def test_rows_keep_what_they_hold_with_any_rows_that_they_share_it_with(tiny_llama: Llama, seed: int) -> None:
    """Rows of a few beginnings come, grow, change places, leave and are laid out anew, in any order; plain arrays say
    what each holds."""
    random, kv, model = np.random.default_rng(seed), JointKeyValues(tiny_llama), Rows()
    shared = 0
    for _ in range(40):
        action = int(random.integers(6))
        lengths = [most for most, _, _ in model]
        if action in (0, 1) and len(model) < 7:
            owner, cut, end = (int(random.integers(2)) for _ in range(3))
            parts = [(1, 140), (2 + cut, 10 + 200 * cut), (4 + end, 5)][: 1 + int(random.integers(1, 3))]
            which = opening(*parts, owner=owner)
            source, kept = written(tiny_llama, which, seed), len(which.tokens) + int(random.integers(2))
            span = Span(kept + 1 + int(random.choice([0, 100])), which, int(random.integers(3)))
            counted, before = kv.bytes_of(lengths, [span]), kv.nbytes
            kv.fit(lengths, [span])
            assert kv.nbytes <= max(before, counted), "no more than was counted"
            kv.add(len(model), span._replace(length=kept + 1), source, 0)
            model.append((kept + 1, source, kept))
        elif action in (2, 3, 4) and model:
            (grow, leave, swap)[action - 2](kv, model, random)
        elif action == 5 and model:
            kv.shrink(lengths)
            kv.clear_beyond([kept for _, _, kept in model])
        check(kv, len(model))
        shared += sum(kv.segment(row).shared > 0 for row in range(len(model)))
        for row, (most, source, kept) in enumerate(model):
            assert kv.segment(row).room >= most
            assert holds(kv, row, source, kept)
    assert shared


def written(llama: Llama, which: Opening, seed: int) -> KeyValues:
    """Keys and values that depend on each token and on those before it, as a model's do."""
    made = filled(llama, 1, seed + which.owner)
    code = mx.array(np.cumsum([*which.tokens, 50]).astype(np.float32))[None, None, :, None]
    made.keys, made.values = ([array + code for array in arrays] for arrays in (made.keys, made.values))
    made.capacity = len(which.tokens) + 1
    return made


def check(kv: JointKeyValues, rows: int) -> None:
    """No position is given out twice, and each run is as long as what a row has of it."""
    segments = [kv.segment(row) for row in range(rows)]
    runs = {id(one.run): one.run for one in segments if one.run is not None}
    taken = sorted((one.start, one.end) for one in segments)
    taken = sorted([*taken, *((one.start, one.start + one.size) for one in runs.values())])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
    assert not taken or (taken[0][0] >= PADDING and taken[-1][1] <= kv.positions)
    for run in runs.values():
        assert run.size == max(one.shared for one in segments if one.run is run)


# --- what a lane does ---


@pytest.fixture
def unshared(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(openings, "FEWEST", 1 << 30)


def answers(driver: Driver, requests: Sequence[GenerateRequest]) -> list[list[tuple[int, ...]]]:
    sent = [driver.send(one) for one in requests]
    driver.run()
    driver.assert_empty()
    return [[answer.token_ids for answer in one.result.completions] for one in sent]


def most_shared(driver: Driver) -> Callable[[], int]:
    """How many rows have shared at once."""
    found = [0]
    plain = driver.lane.batch.join

    def join(row: Row, source: KeyValues, source_row: int) -> None:
        plain(row, source, source_row)
        kv = driver.lane.batch.kv
        assert isinstance(kv, JointKeyValues)
        found[0] = max(found[0], sum(kv.segment(row).shared > 0 for row in range(len(driver.lane.batch.rows))))

    driver.lane.batch.join = join  # type: ignore[method-assign]
    return lambda: found[0]


MIXED = [
    request(SYSTEM, n=4, max_tokens=9, temperature=0.9, seed=1, ignore_eos=True),
    request([*SYSTEM, 5, 6], max_tokens=30, ignore_eos=True),
    request([*SYSTEM, 5, 6], adapter="one", max_tokens=12, ignore_eos=True),
    request([*SYSTEM, 8], adapter="one", n=2, max_tokens=20, temperature=0.8, seed=3, ignore_eos=True),
    request([*SYSTEM[:140], 9] * 2, max_tokens=20, ignore_eos=True),
    request([9, 8, 7], max_tokens=15, ignore_eos=True),
]


def check_shared_and_alone(model: LoadedModel, pool: AdapterPool, unshared: Callable[[], None]) -> None:
    """`MIXED` at once, of which rows share, and each by itself without."""
    driver = Driver(model, pool, slots=10)
    shared = most_shared(driver)
    found = answers(driver, MIXED)
    assert shared() >= 7
    unshared()
    assert found == [answers(Driver(model, pool, slots=1), [one])[0] for one in MIXED]


@pytest.mark.usefixtures("joint")
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_rows_that_share_get_the_tokens_that_they_get_without(
    model: LoadedModel, pool: AdapterPool, unshared: Callable[[], None], bits: int
) -> None:
    model = packing(model, bits) if bits < 16 else model
    check_shared_and_alone(model, pool, unshared)


@pytest.mark.usefixtures("joint")
def test_rows_with_a_window_that_share_get_the_same_tokens(tmp_path: Path, unshared: Callable[[], None]) -> None:
    mx.random.seed(7)
    model = tiny.loaded(Llama(replace(TINY, window=20), RandomTensors()), eos_ids=[])
    pool = tiny.pool(model, tmp_path)
    check_shared_and_alone(model, pool, unshared)


@pytest.fixture
def eager(joint: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All random requests begin alike, the first has two completions, and few tokens are shared too; how much each row
    shared as it came."""
    monkeypatch.setattr(openings, "FEWEST", 8)

    def alike(seed: int, count: int) -> list[GenerateRequest]:
        first, *others = random_requests(seed, count)
        asked = [first.model_copy(update={"n": 2}), *others]
        return [one.model_copy(update={"prompt": f"{tiny.text(SYSTEM[:30])} {one.prompt}"}) for one in asked]

    for module in (test_generate_lane, test_drafts):
        monkeypatch.setattr(module, "random_requests", alike)
    found, plain = list[int](), JointKeyValues.add

    def add(kv: JointKeyValues, row: int, span: Span, source: KeyValues, source_row: int) -> None:
        plain(kv, row, span, source, source_row)
        found.append(kv.segment(row).shared)

    monkeypatch.setattr(JointKeyValues, "add", add)
    return found


@pytest.mark.parametrize("seed", quick(1, 2, of=range(5)))
def test_a_request_gets_the_same_tokens_alone_and_in_any_traffic_of_rows_that_share(
    tiny_llama: Llama, tmp_path: Path, eager: list[int], seed: int
) -> None:
    model = tiny.loaded(tiny_llama, eos_ids=range(2, 8))
    check_traffic(model, tiny.pool(model, tmp_path), seed, **MODES[seed % 3])
    assert any(eager)


@pytest.mark.parametrize("seed", quick(2, of=range(4)))
def test_with_drafts_rows_that_share_get_the_tokens_of_ordinary_decoding(
    tiny_llama: Llama, tmp_path: Path, eager: list[int], seed: int
) -> None:
    model = tiny.loaded(tiny_llama, eos_ids=range(2, 8))
    test_drafts.check(model, tiny.pool(model, tmp_path), seed, 0.2)
    assert any(eager)


@pytest.mark.skipif(not build.available(), reason="the emulator needs g++")
def test_completions_through_the_kernel_share_their_prompt(model: LoadedModel, pool: AdapterPool) -> None:
    """The whole lane as a GPU runs it, in the emulator: the tokens are those of a rectangle."""
    asked = request(SYSTEM, n=3, max_tokens=4, temperature=0.9, seed=1, ignore_eos=True)
    wanted = answers(Driver(model, pool), [asked])
    with backend.using("emulator"):
        driver = Driver(model, pool)
        shared = most_shared(driver)
        assert answers(driver, [asked]) == wanted
    assert shared() == 3


# --- what memory holds ---


@pytest.mark.usefixtures("joint")
def test_completions_have_slots_at_once_where_memory_holds_their_prompt_once(
    model: LoadedModel, pool: AdapterPool, unshared: Callable[[], None]
) -> None:
    """A prompt of 600 tokens, and memory for four of it and a half: one is on its way next to those that decode."""
    asked = request([3 + n % 50 for n in range(600)], n=8, max_tokens=40, ignore_eos=True, temperature=0.9, seed=4)
    limit, most, found = 4600 * model.decoder.kv_sizes.token_bytes, list[int](), []
    for _ in range(2):
        driver = Driver(model, pool, slots=8, kv_bytes=limit, prefix_share=0.2)
        sent, rows = driver.send(asked), 0
        while not sent.ticket.done:
            driver.step()
            rows = max(rows, len(driver.lane.batch.rows))
            assert driver.lane.kv_bytes <= limit
        most.append(rows)
        found.append([answer.token_ids for answer in sent.result.completions])
        unshared()
    assert most[0] == 8
    assert most[1] < 5
    assert found[0] == found[1]


@pytest.mark.usefixtures("joint")
def test_of_a_prompt_on_its_way_what_is_there_alone_counts_as_shared(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    ticket: Ticket[GenerateResult] = Ticket("job", "generate")
    (row,) = driver.lane.prepare(ticket, request([7] * 600, max_tokens=1), None).rows
    span = driver.lane.batch.span(row, 201)
    assert span.opening is not None
    assert span.opening.tokens.tolist() == [7] * 200
    assert driver.lane.batch.span(row, 601).opening is row.generation.opening(0)


@pytest.mark.usefixtures("joint")
def test_rows_that_share_lose_their_slots_and_go_on_with_the_same_tokens(model: LoadedModel, pool: AdapterPool) -> None:
    """Bulk that shares a beginning with a stream makes way in the middle, and joins the run again."""
    bulk = [request([*SYSTEM, 9 + n], max_tokens=260, priority=9, ignore_eos=True) for n in range(4)]
    stream = request([*SYSTEM, 5], max_tokens=150, priority=0, n=2, temperature=0.9, seed=2, ignore_eos=True)
    alone = [answers(Driver(model, pool), [one])[0] for one in (*bulk, stream)]
    limit = 1300 * model.decoder.kv_sizes.token_bytes
    driver = Driver(model, pool, slots=6, kv_bytes=limit, prefix_share=0.0)
    shared, sent = most_shared(driver), [driver.send(one) for one in bulk]
    while len(sent[0].tokens) < 30:
        driver.step()
    sent.append(driver.send(stream))
    while driver.lane.busy:
        driver.step()
        assert driver.lane.kv_bytes <= limit
    assert driver.lane.preempted
    assert shared() > 2
    assert [[answer.token_ids for answer in one.result.completions] for one in sent] == alone


@pytest.mark.usefixtures("joint")
def test_a_version_whose_files_became_others_shares_nothing_with_rows_of_the_old_ones(
    model: LoadedModel, pool: AdapterPool
) -> None:
    """Both have one name: rows of the old weights go on next to rows of the new."""
    asked = request([*SYSTEM, 5], adapter="one", max_tokens=30, ignore_eos=True)
    pool.save("other", tiny.adapter(model, 2, 9), {})
    wanted, new = (
        answers(Driver(model, pool), [asked.model_copy(update={"adapter": name})])[0] for name in ("one", "other")
    )
    driver = Driver(model, pool)
    first = driver.send(asked)
    while len(first.tokens) < 3:
        driver.step()
    driver.lane.forget("one", 1)
    pool.read = lambda *_: tiny.adapter(model, 2, 9)  # type: ignore[method-assign]
    second = driver.send(asked)
    driver.run()
    assert [answer.token_ids for answer in first.result.completions] == wanted
    assert [answer.token_ids for answer in second.result.completions] == new != wanted


def test_rows_in_a_rectangle_share_nothing(model: LoadedModel, pool: AdapterPool) -> None:
    """CPUs, and models of mlx-lm's files: what storage takes is counted without."""
    driver = Driver(model, pool, slots=4)
    batch: Batch = driver.lane.batch
    span = Span(301, opening((1, 300)), 3)
    assert (
        batch.bytes_for([], [span] * 4)
        == batch.bytes_for([], [Span(301)] * 4)
        == KeyValues(model.decoder, 4, 384).nbytes
    )
    answers(driver, [request(SYSTEM, n=4, max_tokens=3)])
