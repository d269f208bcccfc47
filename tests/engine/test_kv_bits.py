"""Keys and values in 8 and 4 bits: rows keep what batching promises, more of them fit, and errors are within bounds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.pool import AdapterPool
from engine.checkpoints.kv_bits import keep_in_bits, unfit
from engine.checkpoints.loading import LoadedModel
from engine.generation.forward_input import ForwardInput
from engine.generation.kv_budget import KvBudget
from engine.generation.sampling_batch import SamplingBatch
from engine.generation.step import Step
from engine.models.attention import attention
from engine.models.bridge.decoder import BridgedDecoder
from engine.models.key_values import KeyValues
from engine.models.kv_sizes import KvSide, KvSizes
from engine.models.llama import Llama
from engine.models.shard import Shard
from engine.prefixes.memory import PrefixCache
from engine.weights.precision import Precision
from kernels import packed_kv
from stoker.errors import ModelError
from tests.engine import bridged, tiny
from tests.engine.cached import through
from tests.engine.conftest import TINY, RandomTensors
from tests.engine.oracle import whole
from tests.engine.test_drafts import check as check_drafts
from tests.engine.test_generate_lane import MODES, Driver, check_traffic, request
from tests.engine.test_prefix_disk import ASKED, SYSTEM, Machine, cached
from tests.thorough import quick

BITS = [8, 4]


def packing(model: LoadedModel, bits: int) -> LoadedModel:
    """One that was loaded so."""
    keep_in_bits(model.name, model.decoder, bits)
    assert model.decoder.kv_bits == bits
    return replace(model, precision=repr(Precision.of(kv_bits=bits)))


@pytest.fixture(params=BITS, ids=["8 bits", "4 bits"])
def bits(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture
def packed(bits: int) -> LoadedModel:
    mx.random.seed(7)
    return packing(tiny.loaded(Llama(TINY, RandomTensors()), eos_ids=range(2, 8)), bits)


@pytest.fixture
def pool(packed: LoadedModel, tmp_path: Path) -> AdapterPool:
    return tiny.pool(packed, tmp_path)


# --- the numbers ---


@pytest.mark.parametrize("size", [8, 16, 64, 80, 96, 128])
def test_a_number_is_at_most_half_a_step_of_its_group_off(bits: int, size: int) -> None:
    x = np.random.default_rng(size).normal(0, 3, (2, 3, 5, size)).astype(np.float32)
    kept = packed_kv.pack(mx.array(x), bits)
    assert (kept.dtype, kept.shape) == (mx.uint32, (2, 3, 5, packed_kv.words_of(size, bits)))
    found = np.array(packed_kv.unpack(kept, size, bits, mx.float32))
    groups = (-1, packed_kv.group_of(size, bits))
    step = np.ptp(x.reshape(groups), axis=1, keepdims=True) / (2**bits - 1)
    # The step and the least number have 11 bits themselves.
    rounded = np.abs(x.reshape(groups)).max(axis=1, keepdims=True) * 2.0**-10
    assert (np.abs(found - x).reshape(groups) <= step / 2 + rounded).all()
    assert np.abs(found - x).max() > step.min() / 4, "they are no more exact than their bits"


def test_what_a_token_has_depends_on_no_other(bits: int) -> None:
    x = mx.array(np.random.default_rng(1).normal(0, 1, (4, 2, 9, 64)).astype(np.float32))
    kept = packed_kv.pack(x, bits)
    for row, token in ((0, 0), (3, 8), (2, 4)):
        alone = packed_kv.pack(x[row : row + 1, :, token : token + 1], bits)
        assert mx.array_equal(kept[row : row + 1, :, token : token + 1], alone)


@pytest.mark.parametrize("value", [0.0, 2.5, -1000.0])
def test_equal_numbers_stay_what_they_are(bits: int, value: float) -> None:
    found = packed_kv.unpack(packed_kv.pack(mx.full((1, 64), value), bits), 64, bits, mx.float32)
    assert mx.array_equal(found, mx.full((1, 64), value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e6])
def test_a_number_that_cannot_be_kept_shows(bits: int, value: float) -> None:
    """Its row ends with `ModelError`, as one with numbers that are not finite does. Others have their own."""
    x = np.ones((2, 1, 64), np.float32)
    x[0, 0, 5] = value
    found = np.array(packed_kv.unpack(packed_kv.pack(mx.array(x), bits), 64, bits, mx.float32))
    assert not np.isfinite(found[0, 0, :32]).any(), "its group, at least"
    assert (found[1] == 1.0).all()


def test_16_bits_stay_in_the_dtype_of_the_model(bits: int) -> None:
    x = mx.array(np.random.default_rng(1).normal(0, 1, (2, 64))).astype(mx.bfloat16)
    side = KvSide(2, 64, mx.bfloat16, bits)
    assert side.unpack(side.pack(x)).dtype == mx.bfloat16
    assert KvSide(2, 64, mx.bfloat16).pack(x) is x


# --- the memory ---


@pytest.mark.parametrize(("size", "ratios"), [(64, {8: 16 / 8.5, 4: 16 / 5}), (80, {8: 16 / 10, 4: 16 / 6})])
def test_so_many_more_rows_fit_scales_counted(bits: int, size: int, ratios: dict[int, float]) -> None:
    """A word of 32 bits for 64 numbers, or for 16 where heads of 80 have no larger group."""
    sides = [KvSide(3, size, mx.bfloat16)] * 2
    plain = KvSizes(sides, sides)
    assert plain.token_bytes / plain.in_bits(bits).token_bytes == pytest.approx(ratios[bits])
    kept = KeyValues(Sized(plain.in_bits(bits)), 2, 32)
    assert kept.nbytes == sum(array.nbytes for array in (*kept.keys, *kept.values))


class Sized:
    def __init__(self, sizes: KvSizes) -> None:
        self.kv_sizes = sizes


def test_the_budget_counts_the_bytes_that_are_taken(packed: LoadedModel, pool: AdapterPool, bits: int) -> None:
    """Heads of 8 numbers in float32: 32 bytes become 12 or 8."""
    ratio = {8: 32 / 12, 4: 32 / 8}[bits]
    driver = Driver(packed, pool, kv_bytes=1 << 20)
    packed.decoder.kv_bits = 16
    before = KvBudget(packed.decoder, 1 << 20, driver.lane.batch, PrefixCache(0)).most_tokens
    assert driver.lane.budget.most_tokens / before == pytest.approx(ratio, rel=0.01)
    packed.decoder.kv_bits = bits
    driver.send(request([3] * 40, max_tokens=8))
    for _ in range(4):
        driver.step()
    kv = driver.lane.batch.kv
    assert kv is not None
    assert driver.lane.batch.nbytes == sum(array.nbytes for arrays in kv.stored for array in arrays)


# --- batching ---


@pytest.mark.parametrize("seed", quick(0, 1, 2, of=range(30)))
def test_a_request_gets_the_same_tokens_alone_and_in_any_traffic(
    packed: LoadedModel, pool: AdapterPool, seed: int
) -> None:
    """Of priorities, with adapters, completions, cancels, prefixes, short memory: those of one pass over the whole."""
    check_traffic(packed, pool, seed, **MODES[seed % 3])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
def test_the_same_holds_for_compiled_passes(packed: LoadedModel, pool: AdapterPool, seed: int) -> None:
    check_traffic(packed, pool, seed, compiled=["decode", "all"][seed % 2])


def test_prompts_and_single_tokens_leave_the_same(packed: LoadedModel) -> None:
    """In chunks, one by one, next to others in rows of another length: what a token sees of those before it, in the
    same pass too, is what was packed of them. Products of few rows are rounded otherwise than those of many, so a
    number next to the border of two codes may take either."""
    decoder = packed.decoder
    ids = np.random.default_rng(4).integers(3, 60, (3, 24)).tolist()
    wanted = [whole(decoder, row) for row in ids]
    prompt, batch = KeyValues(decoder, 1, 32), KeyValues(decoder, 3, 32)
    for start, end in ((0, 7), (7, 8), (8, 24)):
        found = through(decoder, prompt, [ids[0][start:end]], [start], exact=True, kv_length=end)
        np.testing.assert_allclose(found[0], wanted[0][start:end], atol=1e-3)
    for at in range(24):
        found = through(decoder, batch, [[row[at]] for row in ids], [at] * 3)
        for row in range(3):
            np.testing.assert_allclose(found[row, 0], wanted[row][at], atol=1e-3)
    same = [(one[:, :, :24] == other[:1, :, :24]).flatten() for one, other in zip(prompt.keys, batch.keys, strict=True)]
    assert np.array(mx.concatenate(same)).mean() > 0.99


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows decode over the arrays of GPUs; the kernel that packs and reads them runs as its reference."""
    apart = Llama.kv_sizes.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Llama, "kv_sizes", property(lambda llama: apart(llama)._replace(joint=True)))


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("seed", quick(3, of=range(3, 8)))
def test_the_same_holds_over_the_arrays_that_gpus_decode_over(
    packed: LoadedModel, pool: AdapterPool, seed: int
) -> None:
    check_traffic(packed, pool, seed, **MODES[seed % 3])


@pytest.mark.usefixtures("joined")
def test_a_pass_over_drafts_packs_and_reads_them_too(packed: LoadedModel, pool: AdapterPool) -> None:
    check_drafts(packed, pool, 2, 0.3, tiny.adapters(packed))


def test_both_kinds_of_arrays_hold_the_same_words(packed: LoadedModel) -> None:
    """So a row's answer does not say which of both it decoded over."""
    decoder, steps = packed.decoder, 12
    ids = np.random.default_rng(5).integers(3, 60, (3, steps)).tolist()
    apart, together = KeyValues(decoder, 3, 16), tiny.joint(decoder, 3, 16)
    for at in range(steps):
        offset = np.full(3, at, np.int32)
        tokens = mx.array([[row[at]] for row in ids], mx.int32)
        for kv in (apart, together):
            given = ForwardInput(tokens, mx.array(offset), 16, places=kv.pending(offset))
            Step(decoder, "none")(kv, given, SamplingBatch())
    together.clear_beyond([steps] * 3)
    found, wanted = (mx.concatenate(tiny.sides(kv, 3, 16), axis=1) for kv in (together, apart))
    same = np.array(found == wanted)
    assert found.dtype == mx.uint32
    assert same.mean() > 0.99


def test_a_resumed_stream_has_the_tokens_of_one_that_was_not_disturbed(packed: LoadedModel, pool: AdapterPool) -> None:
    for adapter in (None, "one"):
        asked = request([5, 9, 14] * 9, max_tokens=24, temperature=0.9, seed=4, n=2, adapter=adapter, ignore_eos=True)
        driver = Driver(packed, pool)
        wanted = driver.send(asked)
        driver.run()
        for published in (1, 13, 30):
            other = Driver(packed, pool)
            neighbour = other.send(request([8] * 11, max_tokens=30))
            resumed = other.send(asked, wanted.tokens[:published])
            other.run()
            assert [one.token_ids for one in resumed.result.completions] == [
                one.token_ids for one in wanted.result.completions
            ]
            assert neighbour.ticket.done


@pytest.mark.parametrize("seed", range(2))
def test_with_drafts_a_request_gets_the_tokens_of_ordinary_decoding(
    packed: LoadedModel, pool: AdapterPool, seed: int
) -> None:
    check_drafts(packed, pool, seed, 0.3, tiny.adapters(packed))


# --- prefixes ---


def test_a_kept_prefix_serves_workers_of_its_own_bits_alone(tmp_path: Path) -> None:
    machine, hits = Machine(tmp_path), {}
    for bits in (16, 8, 4):
        mx.random.seed(7)
        model = packing(tiny.loaded(Llama(TINY, RandomTensors()), eos_ids=[]), bits)
        first = machine.worker(model, identity=model.precision)
        first.answers(ASKED[:2])
        again = machine.worker(model, identity=model.precision)
        (found,) = again.answers(ASKED[2:3], max_tokens=12)
        undisturbed = Driver(model, AdapterPool(model, machine.store))
        wanted = undisturbed.send(request(ASKED[2], max_tokens=12))
        undisturbed.run()
        assert found.ids == wanted.ids
        hits[bits] = first.hits, again.hits, cached(found)
    assert hits == dict.fromkeys((16, 8, 4), (0, 1, len(SYSTEM)))
    assert len(machine.files) == 3
    sizes = sorted(file.stat().st_size for file in machine.files)
    assert sizes[0] < sizes[1] < sizes[2]


# --- models ---


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt_oss", None),
        ("gemma3_text", None),
        ("lfm2", "its recurrent layers keep states, whose errors would add up"),
        ("deepseek_v3", "it keeps 1 times 16 numbers of a token, and 1 times 8: no keys and values of heads"),
    ],
)
def test_a_model_that_keeps_something_else_stays_at_16_bits_with_one_line(
    name: str, why: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = bridged.bridged(name).decoder
    with caplog.at_level(logging.WARNING):
        keep_in_bits(name, decoder, 8)
    said = f"model {name} keeps its keys and values in 16 bits, 8 were asked for: {why}"
    assert caplog.messages == ([] if why is None else [said])
    assert decoder.kv_bits == (8 if why is None else 16)
    assert decoder.kv_sizes.packed == (why is None)


def test_a_model_of_mlx_lms_file_that_ranks_share_stays_at_16_bits(caplog: pytest.LogCaptureFixture) -> None:
    decoder = bridged.bridged("gpt_oss").decoder
    assert isinstance(decoder, BridgedDecoder)
    decoder.shard = Shard(0, 2)
    keep_in_bits("m", decoder, 8)
    assert decoder.kv_bits == 16
    assert "ranks share its layers" in caplog.text


def test_heads_that_fill_no_words_stay_as_they_are() -> None:
    sides = [KvSide(2, 12, mx.float32)]
    assert unfit(KvSizes(sides, sides), 8) == "its heads have 12 numbers, which is no multiple of 8"
    assert unfit(KvSizes([KvSide(2, 24, mx.float32)], [KvSide(2, 24, mx.float32)]), 4) is None


@pytest.mark.parametrize("name", ["gpt_oss", "gemma3_text"])
def test_windows_and_sinks_of_mlx_lms_files_see_what_was_packed(name: str, tmp_path: Path) -> None:
    model = bridged.bridged(name)
    plain = whole(model.decoder, bridged.prompts()[0])
    keep_in_bits(name, model.decoder, 8)
    decoder = model.decoder
    (ids, *_), kv = bridged.prompts(), KeyValues(decoder, 1, 64)
    first = through(decoder, kv, [ids[:20]], [0], exact=True, kv_length=20)[0]
    later = [through(decoder, kv, [[token]], [at])[0, 0] for at, token in enumerate(ids[20:], 20)]
    found, again = np.concatenate([first, later]), KeyValues(decoder, 1, 64)
    at_once = through(decoder, again, [ids], [0], exact=True, kv_length=len(ids))[0]
    np.testing.assert_allclose(found, at_once, atol=1e-3)
    assert 0 < relative(found, plain) < 0.05


@pytest.mark.parametrize("given", [5, 0, 32, "8"])
def test_other_bits_are_refused_with_those_that_are_allowed(given: Any) -> None:
    with pytest.raises(ModelError, match=rf"kv_bits: {given!r} given; 16, 8, 4 are allowed"):
        Precision.of(kv_bits=given)


# --- errors ---


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_what_attention_gives_is_within_its_bound(bits: int) -> None:
    """64 keys and values of normal numbers, heads of 64: a hundredth and a tenth of what 16 bits give."""
    random = np.random.default_rng(0)
    queries, keys, values = (mx.array(random.normal(0, 1, (1, 2, 64, 64)).astype(np.float32)) for _ in range(3))
    side = KvSide(2, 64, mx.float32, bits)
    wanted = attention(queries, keys, values, scale=0.125, mask="causal")
    found = attention(queries, *(side.unpack(side.pack(x)) for x in (keys, values)), scale=0.125, mask="causal")
    assert relative(np.array(found), np.array(wanted)) < {8: 0.01, 4: 0.11}[bits]


@pytest.fixture
def restored(smollm2: LoadedModel) -> Iterator[LoadedModel]:
    """Others use it too."""
    yield smollm2
    smollm2.decoder.kv_bits = 16


@pytest.mark.slow
def test_what_real_weights_give_is_within_its_bounds(restored: LoadedModel, bits: int) -> None:
    """Logits by how far they are from their mean, and perplexity: docs/generate.md has what was measured."""
    page = (Path(__file__).parents[2] / "docs" / "generate.md").read_text("utf-8")
    ids = list(restored.tokenizer.encode(page))[:300]
    wanted = centred(whole(restored.decoder, ids))
    keep_in_bits("smollm2", restored.decoder, bits)
    found = centred(whole(restored.decoder, ids))
    assert relative(found, wanted) < {8: 0.02, 4: 0.25}[bits]
    assert perplexity(found, ids) / perplexity(wanted, ids) - 1 < {8: 0.005, 4: 0.15}[bits]


def centred(logits: np.ndarray) -> np.ndarray:
    found: np.ndarray = logits.astype(np.float64) - logits.mean(axis=-1, keepdims=True)
    return found


def perplexity(logits: np.ndarray, ids: list[int]) -> float:
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return float(np.exp((np.log(np.exp(logits[:-1]).sum(axis=-1)) - chosen).mean()))
