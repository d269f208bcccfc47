"""What `attend` keeps of a new token whose keys and values are packed: the words that the plain form makes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from kernels import check, packed_kv
from kernels.attend import AttendInput, attend
from kernels.backend import using
from kernels.kernel import Case
from kernels.registry import KERNELS

KERNEL = KERNELS["attend"]


def unturned(keys: mx.array, values: mx.array, bits: int) -> AttendInput:
    """One head (rows, dim) of each, at the first position, where nothing is turned and nothing stored."""
    rows, dim = keys.shape
    stored, nothing = packed_kv.pack(mx.zeros((2, rows, dim)), bits), mx.zeros((rows,), mx.int32)
    whole = mx.concatenate([keys, keys, values], axis=1)
    return AttendInput(
        *(whole, whole, whole, stored, None, mx.zeros((rows, 3), mx.int32), nothing, mx.ones((dim // 2,)), None, None),
        *((0, dim, 2 * dim), 1, 1, dim**-0.5),
        bits=bits,
    )


def kept(given: AttendInput) -> tuple[np.ndarray, mx.array]:
    """What the kernel gives, and the words that it keeps."""
    with using("emulator"):
        y, made = attend(given)
    return np.array(y.astype(mx.float32)), made


@pytest.mark.parametrize(("bits", "dim", "dtype"), [(8, 64, mx.bfloat16), (4, 128, mx.float32)], ids=str)
def test_the_words_of_a_new_token_are_those_of_the_plain_form_bit_for_bit(bits: int, dim: int, dtype: mx.Dtype) -> None:
    """So what a row's cache holds does not say which of both wrote it. Numbers of any size, equal ones too."""
    random = np.random.default_rng(bits)
    scales = np.array([1.0, 1e-4, 2e-7, 1e4, 1.0, 0.0])[:, None]
    keys, values = (mx.array(random.normal(0, scales, (6, dim)).astype(np.float32)).astype(dtype) for _ in range(2))
    values[4] = 2.5
    given = unturned(keys, values, bits)
    y, made = kept(given)
    assert made.dtype == mx.uint32
    for side, x in enumerate((keys, values)):
        assert mx.array_equal(made[:, side], packed_kv.pack(x, bits))
    # A row without others attends to its own value, as the words have it.
    alone = packed_kv.unpack(made[:, 1], dim, bits, mx.float32).astype(dtype).astype(mx.float32)
    assert np.array_equal(y, np.array(alone))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e6])
def test_a_number_that_cannot_be_kept_marks_its_group_and_hurts_no_other_row(value: float) -> None:
    x = np.random.default_rng(1).normal(0, 1, (3, 128)).astype(np.float32)
    x[1, 37] = value
    y, made = kept(unturned(mx.zeros((3, 128)), mx.array(x), 4))
    found = np.array(packed_kv.unpack(made[:, 1], 128, 4, mx.float32))
    assert not np.isfinite(found[1, 32:64]).any()
    assert np.isfinite(np.delete(found, 1, axis=0)).all()
    assert np.isfinite(found[1, [*range(32), *range(64, 128)]]).all()
    assert np.isfinite(np.delete(y, 1, axis=0)).all()
    assert not np.isfinite(y[1]).all()


def packed_case(bits: int) -> tuple[AttendInput, Case]:
    found = check.cases(KERNEL, mx.float32, 1)
    case = next(case for case in found if AttendInput(*case.arguments).bits == bits)
    return AttendInput(*case.arguments), case


@pytest.mark.parametrize("bits", [8, 4])
def test_wrong_words_would_be_noticed(bits: int) -> None:
    """A code next to the right one, a code elsewhere, the layers before, numbers of another row."""
    given, case = packed_case(bits)
    y, made = KERNEL.reference(*case.arguments)
    tolerance = KERNEL.tolerances[mx.float32]

    def error(y: mx.array, made: mx.array) -> float:
        return KERNEL.error_of(case.arguments, [y, made])

    assert error(y, made) <= tolerance
    heads = 2 * given.kv_heads
    before, new = made[:, :-heads], made[:, -heads:]
    assert error(y, mx.concatenate([before, new ^ 1], axis=1)) > tolerance
    assert error(y, mx.concatenate([before, new[:, ::-1]], axis=1)) > tolerance
    assert error(y + 1e-2, made) > tolerance
    assert error(y, mx.full(made.shape, 0xFFFFFFFF, mx.uint32)) == float("inf")
    if given.fresh is not None:
        assert error(y, mx.concatenate([before ^ 1, new], axis=1)) == float("inf")


@pytest.mark.parametrize("bits", [8, 4])
def test_wrong_words_of_a_key_that_weighs_nothing_would_be_noticed(bits: int) -> None:
    """A row without others attends to its own value, with any key."""
    random = np.random.default_rng(2)
    keys, values = (mx.array(random.normal(0, 1, (3, 64)).astype(np.float32)) for _ in range(2))
    given = unturned(keys, values, bits)
    y, made = KERNEL.reference(*given)
    wrong = mx.concatenate([made[:, :1] ^ 1, made[:, 1:]], axis=1)
    assert KERNEL.error_of(given, [y, made]) <= KERNEL.tolerances[mx.float32] < KERNEL.error_of(given, [y, wrong])


#: Numbers of rows' positions: those of a batch of keys, of the last one alone, and of all that a row has.
SHARED = [0, 1, 33, 127, 128, 200]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("window", [None, 50])
def test_a_row_gets_the_same_bit_for_bit_however_many_positions_it_shares(bits: int, window: int | None) -> None:
    """And wherever they lie: what it gets would depend on who is there with it else."""
    random, dim, (rows, length) = np.random.default_rng(bits), 64, (len(SHARED), 200)
    sequence = mx.array(random.normal(0, 1, (4, length, dim)).astype(np.float32))
    width, starts = 6 * dim, (0, 2 * dim, 4 * dim)
    one = mx.array(random.normal(0, 1, (1, width)).astype(np.float32))
    whole = mx.broadcast_to(one, (rows, width))

    def attended(places: list[tuple[int, int, int]], size: int) -> list[np.ndarray]:
        """Of a row at each of these places, with other numbers wherever none has its own."""
        stored = mx.array(random.normal(0, 9, (4, size, dim)).astype(np.float32))
        for run, shared, own in places:
            stored[:, run : run + shared] = sequence[:, :shared]
            stored[:, own : own + length - shared] = sequence[:, shared:]
        given = AttendInput(
            *(whole[: len(places)],) * 3,
            stored if bits == 16 else packed_kv.pack(stored, bits),
            fresh=None,
            segment=mx.array(places, mx.int32),
            offset=mx.full((len(places),), length, mx.int32),
            period=mx.arange(1.0, 33.0),
            q_weight=None,
            k_weight=None,
            starts=starts,
            heads=2,
            kv_heads=2,
            scale=0.125,
            window=window,
            bits=bits,
        )
        with using("emulator"):
            y, made = attend(given)
        return [np.array(y), np.array(made)]

    alone = attended([(0, 0, 5)], length + 5)
    # All share one run that lies behind what is their own, and the last one has nothing else.
    together = attended([(1300, shared, 7 + 200 * row) for row, shared in enumerate(SHARED)], 1500)
    for got, wanted in zip(together, alone, strict=True):
        assert all(np.array_equal(row, wanted[0]) for row in got)


def test_a_segment_beyond_the_storage_reads_nothing_beyond_it() -> None:
    """Places that no storage has are read where it ends, so that a fault of the host's is no fault of the device."""
    given = AttendInput(*check.cases(KERNEL, mx.float32, 1)[0].arguments)
    for segment in ((10**6, 70, 10**6), (-1, 10**6, -1), (0, -1, 3)):
        with using("emulator"):
            y, _ = attend(given._replace(segment=mx.array([segment] * 2, mx.int32)))
        assert np.isfinite(np.array(y)).all()
