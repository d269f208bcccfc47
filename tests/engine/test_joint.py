"""Keys and values of several layers in one array, as a GPU's decode step keeps them, on the kernel's reference."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation.forward_input import ForwardInput
from engine.generation.sampling_batch import SamplingBatch
from engine.generation.step import Step
from engine.models import joint
from engine.models.cache import KeyValues, write
from engine.models.joint import JointKeyValues
from engine.models.llama import Llama
from tests.engine import tiny
from tests.engine.test_generate_lane import MODES, adapters, check_traffic
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
    made = JointKeyValues(llama, 4, 32)
    for row, length in enumerate(LENGTHS):
        made.put(row, kv, row, length)
    return kv, made


def decode(llama: Llama, kv: KeyValues | JointKeyValues, lengths: list[int], tokens: list[int]) -> np.ndarray:
    """One step; the logit of what each row chose."""
    offset = np.array(lengths, np.int32)
    given = ForwardInput(mx.array(tokens)[:, None], mx.array(offset), 16, positions=kv.pending(offset))
    return np.array(Step(llama, "none")(kv, given, SamplingBatch())[1])


def held(kv: KeyValues | JointKeyValues, lengths: list[int]) -> list[np.ndarray]:
    """Keys and values by layer, of as many rows as there are lengths and of so many positions, zeros behind."""
    kv.clear_beyond(lengths + [0] * (kv.rows - len(lengths)))
    sides = (
        [array for pair in zip(kv.keys, kv.values, strict=True) for array in pair]
        if isinstance(kv, KeyValues)
        else [side for array in kv.arrays for side in mx.split(array, array.shape[1] // kv.heads, axis=1)]
    )
    return [np.array(side[: len(lengths), :, :16]) for side in sides]


def test_a_joint_cache_holds_what_one_by_layer_holds(tiny_llama: Llama) -> None:
    apart, together = begun(tiny_llama)
    for step in range(3):
        lengths, tokens = [length + step for length in LENGTHS], [5 + step, 9, 11]
        wanted = decode(tiny_llama, apart, lengths, tokens)
        np.testing.assert_allclose(decode(tiny_llama, together, lengths, tokens), wanted, rtol=1e-5, atol=1e-5)
    after = [length + 3 for length in LENGTHS]
    for got, wanted in zip(held(together, after), held(apart, after), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("change", ["put", "move", "swap", "resize", "fewer rows"])
def test_what_waits_is_written_before_rows_change(tiny_llama: Llama, change: str) -> None:
    """A pass' tokens are written by the next one: rows that move, come or stay behind in between keep theirs."""
    apart, together = begun(tiny_llama)
    for kv in (apart, together):
        decode(tiny_llama, kv, LENGTHS, [5, 9, 11])
    if change == "put":
        for kv in (apart, together):
            kv.put(1, KeyValues(tiny_llama, 1, 8), 0, 3)
        after = [5, 3, 8]
    elif change == "move":
        for kv in (apart, together):
            kv.move(0, 2, 8)
        after = [8, 2, 8]
    elif change == "swap":
        for kv in (apart, together):
            kv.swap(0, 2, 8)
        after = [8, 2, 5]
    elif change == "resize":
        together.resize(3, 64)
        assert not together.stored[1], "also where fewer rows stay than the pass had"
        after = [5, 2, 8]
    else:
        for kv in (apart, together):
            decode(tiny_llama, kv, [5, 2], [6, 7])
        after = [6, 3, 8]
    for got, wanted in zip(held(together, after), held(apart, after), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_joint_cache_is_written_in_place(tiny_llama: Llama, rows: int) -> None:
    """40 MB and more an array: a copy would show at once."""
    kv = JointKeyValues(tiny_llama, 2, 300_000)
    array = kv.arrays[0]
    positions, fresh = mx.array([7] * rows, mx.uint32), mx.ones((rows, array.shape[1], array.shape[3]))
    mx.eval(kv.arrays, positions, fresh)
    mx.reset_peak_memory()
    resting = mx.get_active_memory()
    write(array, fresh, positions)
    mx.eval(array)
    assert mx.get_peak_memory() - resting < array.nbytes // 2
    assert array[rows - 1, :, 7].min().item() == 1.0


@pytest.mark.parametrize("seed", quick(0, 1, 2, of=range(6)))
def test_a_request_gets_the_same_tokens_alone_and_in_any_traffic_over_joint_arrays(
    joint_model: LoadedModel, tmp_path: Path, seed: int
) -> None:
    pool = AdapterPool(joint_model, AdapterStore(tmp_path))
    for name, weights in adapters(joint_model).items():
        pool.save(name, weights, {})
    check_traffic(joint_model, pool, seed, **MODES[seed % 3])
