"""Keys and values of new tokens in 8 or 4 bits, as `kernels.packed_kv` makes them, by one launch."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from kernels import packed_kv
from kernels.body import Body
from kernels.kernel import Arrays, Kernel, exactly, refuse_dtype
from kernels.pack_kv.cases import cases, timings

_BODY = Body("pack_kv", ("keys", "values"), ("kept_keys", "kept_values"), ("codes.h",))
_THREADS = 256


def pack_kv(keys: mx.array, values: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    """`packed_kv.pack` of both, uint32 (…, words), bit for bit. `keys`, `values`: (rows, heads, tokens, size) of one
    shape and dtype. Not differentiated."""
    kept_keys, kept_values = KERNEL(keys, values, bits)
    return kept_keys, kept_values


def _reference(keys: mx.array, values: mx.array, bits: int) -> Arrays:
    return [packed_kv.pack(keys, bits), packed_kv.pack(values, bits)]


def _refuse(keys: mx.array, values: mx.array, bits: int) -> str | None:
    if keys.shape != values.shape or keys.ndim != 4 or not keys.size:
        return "shapes"
    if not packed_kv.fits(keys.shape[-1], bits):
        return f"heads of {keys.shape[-1]}"
    return refuse_dtype(keys, values)


def _launch(keys: mx.array, values: mx.array, bits: int) -> Arrays:
    *outer, dim = keys.shape
    width, of_lane = packed_kv.words_of(dim, bits), packed_kv.LANE_NUMBERS
    return _BODY.launch(
        (keys, values),
        template=[
            *(("T", keys.dtype), ("DIM", dim), ("BITS", bits), ("WIDTH", width)),
            *(("GROUPED", packed_kv.group_of(dim, bits)), ("PACK", of_lane)),
        ],
        groups=(-(-keys.size // (of_lane * _THREADS)), 2),
        threads=_THREADS,
        outputs=[((*outer, width), mx.uint32)] * 2,
    )


def _error(arguments: tuple[Any, ...], results: Arrays) -> float:
    """None, or all: a word is the reference's or wrong."""
    same = all(mx.array_equal(*pair) for pair in zip(results, exactly(_reference, arguments), strict=True))
    return 0.0 if same else float("inf")


KERNEL = Kernel(
    name="pack_kv",
    reason="one launch for some twenty: bounds of groups, their steps, codes and words of keys, and again of values",
    bodies=(_BODY,),
    launch=_launch,
    reference=_reference,
    refuse=_refuse,
    cases=cases,
    timings=timings,
    error=_error,
)
