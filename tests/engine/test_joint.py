"""Keys and values of several layers in one array, as a GPU's decode step keeps them, on the kernel's reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import mlx.core as mx
import numpy as np
import pytest

from engine.checkpoints.loading import LoadedModel
from engine.generation.forward_input import ForwardInput
from engine.generation.sampling_batch import SamplingBatch
from engine.generation.step import Step
from engine.models import joint
from engine.models.joint import JointKeyValues
from engine.models.key_values import KeyValues
from engine.models.llama import Llama
from engine.models.segments import PADDING, SMALLEST
from tests.engine import tiny
from tests.engine.test_generate_lane import MODES, check_traffic
from tests.thorough import quick

#: The tokens that each of three rows begins with, and how many there are.
LENGTHS = [4, 1, 7]


@pytest.fixture(autouse=True, params=[1, 6], ids=["an array a layer", "one array"])
def joint_model(request: pytest.FixtureRequest, tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A model whose rows decode over joint arrays, of as many layers as it says; the kernel runs as its reference."""
    monkeypatch.setattr(joint, "LAYERS_TOGETHER", request.param)
    apart = Llama.kv_sizes.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Llama, "kv_sizes", property(lambda llama: apart(llama)._replace(joint=True)))
    return tiny.loaded(tiny_llama, eos_ids=range(2, 8))


def begun(llama: Llama) -> tuple[KeyValues, JointKeyValues]:
    """The same rows of random keys and values, by layer and jointly."""
    random, kv = np.random.default_rng(3), KeyValues(llama, 3, 16)
    for arrays in (kv.keys, kv.values):
        arrays[:] = [mx.array(random.normal(0, 1, array.shape).astype(np.float32)) for array in arrays]
    made = tiny.joint(llama, 3, 32)
    for row, length in enumerate(LENGTHS):
        made.put(row, kv, row, length)
    return kv, made


def decode(llama: Llama, kv: KeyValues | JointKeyValues, lengths: list[int], tokens: list[int]) -> np.ndarray:
    """One step; the logit of what each row chose."""
    offset = np.array(lengths, np.int32)
    given = ForwardInput(mx.array(tokens)[:, None], mx.array(offset), 16, places=kv.pending(offset))
    return np.array(Step(llama, "none")(kv, given, SamplingBatch())[1])


def held(kv: KeyValues | JointKeyValues, lengths: list[int]) -> list[np.ndarray]:
    """Keys and values by layer, of as many rows as there are lengths and of so many positions, zeros behind."""
    kv.clear_beyond(lengths)
    return [np.array(side) for side in tiny.sides(kv, len(lengths), 16)]


def test_a_joint_cache_holds_what_one_by_layer_holds(tiny_llama: Llama) -> None:
    apart, together = begun(tiny_llama)
    for step in range(3):
        lengths, tokens = [length + step for length in LENGTHS], [5 + step, 9, 11]
        wanted = decode(tiny_llama, apart, lengths, tokens)
        np.testing.assert_allclose(decode(tiny_llama, together, lengths, tokens), wanted, rtol=1e-5, atol=1e-5)
    after = [length + 3 for length in LENGTHS]
    for got, wanted in zip(held(together, after), held(apart, after), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("change", ["put", "leave", "swap", "grow", "shrink", "fewer rows"])
def test_what_waits_is_written_before_rows_change(tiny_llama: Llama, change: str) -> None:
    """A pass' tokens are written by the next one: rows that move, come or stay behind in between keep theirs."""
    apart, together = begun(tiny_llama)
    for kv in (apart, together):
        decode(tiny_llama, kv, LENGTHS, [5, 9, 11])
    if change == "put":
        for kv in (apart, together):
            kv.put(1, KeyValues(tiny_llama, 1, 8), 0, 3)
        after = [5, 3, 8]
    elif change == "leave":
        for kv in (apart, together):
            kv.leave(0, 2, 8)
        after = [8, 2]
    elif change == "swap":
        for kv in (apart, together):
            kv.swap(0, 2, 8)
        after = [8, 2, 5]
    elif change in ("grow", "shrink"):
        (together.shrink if change == "shrink" else together.fit)([5, 2, SMALLEST + 1])
        assert not together.stored[1], "also where fewer rows stay than the pass had"
        after = [5, 2, 8]
    else:
        for kv in (apart, together):
            decode(tiny_llama, kv, [5, 2], [6, 7])
        after = [6, 3, 8]
    for got, wanted in zip(held(together, after), held(apart, after), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def in_place(kv: JointKeyValues, change: Callable[[], None]) -> bool:
    """Whether a change takes less than half of an array: 40 MB and more, so that a copy would show at once."""
    mx.eval(kv.arrays)
    mx.reset_peak_memory()
    resting = mx.get_active_memory()
    change()
    mx.eval(kv.arrays)
    return mx.get_peak_memory() - resting < kv.arrays[0].nbytes // 2


@pytest.mark.parametrize("rows", [1, 2])
def test_a_joint_cache_is_written_in_place(tiny_llama: Llama, rows: int) -> None:
    kv = tiny.joint(tiny_llama, 2, 300_000)
    offset = np.full(rows, 7, np.int32)
    kv.pending(offset)
    kv.stored = kv.arrays, [mx.ones_like(array) for array in kv.stored[1]], []
    assert in_place(kv, lambda: kv.clear_pending())
    assert tiny.sides(kv, rows, 8)[0][rows - 1, :, 7].min().item() == 1.0


def test_a_row_that_outgrows_its_segment_moves_alone_and_nothing_is_copied_but_its_own(tiny_llama: Llama) -> None:
    kv = tiny.joint(tiny_llama, 2, SMALLEST)
    kv.fit([SMALLEST, SMALLEST, 300_000])
    source = filled(tiny_llama, 20)
    for row in range(2):
        kv.put(row, source, 0, 20)
    wanted = held(kv, [20, 20])
    kv.leave(2, 2, 0)
    assert in_place(kv, lambda: kv.fit([20, SMALLEST + 1]))
    assert (kv.segment(0).size, kv.segment(1).size) == (SMALLEST, SMALLEST * 3 // 2)
    for now, then in zip(held(kv, [20, 20]), wanted, strict=True):
        np.testing.assert_array_equal(now, then)


def filled(llama: Llama, length: int) -> KeyValues:
    """A row of random keys and values."""
    random, kv = np.random.default_rng(4), KeyValues(llama, 1, length)
    for arrays in (kv.keys, kv.values):
        arrays[:] = [mx.array(random.normal(0, 1, array.shape).astype(np.float32)) for array in arrays]
    return kv


def test_a_long_row_makes_no_other_row_longer(tiny_llama: Llama) -> None:
    """In a rectangle, 15 rows of a hundred tokens would take as much as 15 of 8,000 next to one of these."""
    kv = tiny.joint(tiny_llama, 15, 100)
    kv.fit([100] * 15 + [8000])
    assert kv.nbytes <= 1.5 * (PADDING + 15 * SMALLEST + 8192) * KeyValues(tiny_llama, 1, 1).nbytes


def test_nothing_is_left_of_what_is_behind_a_row_and_of_rows_that_went(tiny_llama: Llama) -> None:
    """A masked number that is none would make none of a sum: another row may get these positions."""
    kv = tiny.joint(tiny_llama, 3, 100)
    kv.arrays = [mx.full(array.shape, mx.nan) for array in kv.arrays]
    kv.leave(2, 2, 0)
    source = filled(tiny_llama, 20)
    for row in range(2):
        kv.put(row, source, 0, 20)
    kv.clear_beyond([20, 20])
    assert all(mx.all(mx.isfinite(array)).item() for array in kv.arrays)
    assert mx.array_equal(tiny.sides(kv, 2, 20)[0][1], tiny.sides(source, 1, 20)[0][0])


def test_what_a_row_leaves_is_another_ones(tiny_llama: Llama) -> None:
    kv = tiny.joint(tiny_llama, 3, 100)
    before, freed = kv.positions, kv.segment(0)
    kv.leave(0, 2, 100)
    kv.fit([100, 100, 100])
    assert (kv.positions, kv.segment(2)) == (before, freed)
    kv.shrink([100])
    assert kv.positions < before
    arrays = list(kv.arrays)
    kv.shrink([100])
    assert all(one is other for one, other in zip(kv.arrays, arrays, strict=True)), "each row that waits asks for it"


#: Of each row how many positions it needs, where its keys and values came from, and how many of them.
Rows: TypeAlias = list[tuple[int, KeyValues, int]]


def grow(kv: JointKeyValues, model: Rows, random: np.random.Generator) -> None:
    """Let a row need more positions."""
    row = int(random.integers(len(model)))
    most, source, kept = model[row]
    model[row] = most + int(random.choice([1, 200])), source, kept
    kv.fit([most for most, _, _ in model])


def leave(kv: JointKeyValues, model: Rows, random: np.random.Generator) -> None:
    """Let a row go, and the last one take its slot."""
    row = int(random.integers(len(model)))
    kv.leave(row, len(model) - 1, 0)
    last = model.pop()
    if row < len(model):
        model[row] = last


def swap(kv: JointKeyValues, model: Rows, random: np.random.Generator) -> None:
    """Let two rows change slots."""
    row, other = random.integers(len(model), size=2).tolist()
    kv.swap(row, other, 0)
    model[row], model[other] = model[other], model[row]


@pytest.mark.parametrize("seed", range(20))
def test_segments_never_overlap_and_rows_keep_what_they_hold(tiny_llama: Llama, seed: int) -> None:
    """Rows come, grow, change places and leave, in any order; a model of plain arrays says what each holds."""
    random, kv, model = np.random.default_rng(seed), JointKeyValues(tiny_llama), Rows()
    for _ in range(30):
        action = int(random.integers(5))
        if action == 0 and len(model) < 6:
            length = int(random.choice([1, SMALLEST, SMALLEST + 1, 400]))
            kept = min(length, 20)
            kv.fit([most for most, _, _ in model] + [length])
            model.append((length, filled(tiny_llama, kept), kept))
            kv.put(len(model) - 1, model[-1][1], 0, kept)
        elif action < 4 and model:
            (grow, leave, swap)[action - 1](kv, model, random)
        elif action == 4 and model:
            kv.shrink([most for most, _, _ in model])
        held_by = sorted(kv.segment(row) for row in range(len(model)))
        assert all(one.end <= other.start for one, other in itertools.pairwise(held_by))
        assert not held_by or (held_by[0].start >= PADDING and held_by[-1].end <= kv.positions)
        for row, (most, source, kept) in enumerate(model):
            assert kv.segment(row).size >= most
            for now, then in zip(tiny.sides(kv, row + 1, kept), tiny.sides(source, 1, kept), strict=True):
                assert mx.array_equal(now[row], then[0])


@pytest.mark.parametrize("seed", quick(0, 1, 2, of=range(6)))
def test_a_request_gets_the_same_tokens_alone_and_in_any_traffic_over_joint_arrays(
    joint_model: LoadedModel, tmp_path: Path, seed: int
) -> None:
    check_traffic(joint_model, tiny.pool(joint_model, tmp_path), seed, **MODES[seed % 3])
