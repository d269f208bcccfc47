"""Attention of one new token a row, from the projections on: norms, rotation, and what is stored, each row as far as it
has any."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from kernels import packed_kv
from kernels.attend.arguments import AttendAdapters, AttendInput
from kernels.attend.cases import cases, timings
from kernels.backend import Backend
from kernels.body import Body, Template
from kernels.kernel import Arrays, Kernel, difference, exactly, float_bits, refuse_dtype
from kernels.lora.arguments import LoraInput, LoraSides
from kernels.lora.op import HIGHEST_RANK, lora_reference, times_a

_BODY = Body(
    "attend",
    (
        *("q", "k", "v", "stored", "fresh", "segment", "offset", "period", "q_weight", "k_weight", "x", "index"),
        *(f"{side}{part}" for part in range(3) for side in LoraSides._fields),
    ),
    ("y", "made"),
    ("packed.h", "low_rank.h", "stored.h", "codes.h"),
)
#: Threads of a threadgroup that has one head. With few rows a GPU is idle unless heads spread over it, and eight
#: simdgroups read a head's keys in an eighth of the turns: on an H100 a row of 4,096 takes a third of the time that it
#: takes with the heads of a group in one threadgroup (`bench.kernels`).
HEAD_THREADS = 256
#: Rows with adapters up to which a threadgroup has one head. Each head repeats what the adapter adds to k and v: with
#: more rows that is more work than the GPU has room for.
FEW_ROWS = 8
#: Threads of a threadgroup that has the heads of a group, at most. Apple's GPUs take fewer than 1,024 of a kernel that
#: needs many registers.
THREADS: dict[Backend, int] = {"metal": 512, "cuda": 768, "emulator": 512}
#: Keys that a lane has under way at once.
DEPTH = 4


def attend(given: AttendInput) -> tuple[mx.array, mx.array]:
    """(rows, heads · dim): softmax(scale · q Kᵀ) V over what is stored and the new token. And `fresh` with this layer's
    new keys and values behind it, (rows, heads, width): they are the caller's to store. Packed, the new token is seen
    as what its words stand for."""
    y, made = KERNEL(*given)
    return y, made


def unfit(heads: int, kv_heads: int, dim: int, dtype: mx.Dtype, bits: int = 16) -> str | None:
    """Why the body cannot take heads of this kind, of numbers in `bits`, or None."""
    if heads % kv_heads or heads // kv_heads > min(THREADS.values()) // 32:
        return f"{heads} heads over {kv_heads} of keys"
    of_lane = pack(dtype, bits)
    lanes = dim // of_lane
    fits = dim % of_lane == 0 and dim % 2 == 0 and 0 < lanes <= 32 and not lanes & (lanes - 1)
    return None if fits else f"heads of {dim}"


def _reference(given: AttendInput) -> Arrays:
    queries, new = _projected(given)
    kept, before = _kept(given, new), [] if given.fresh is None else [given.fresh]
    return [_attended(given, queries, _numbers(given, kept)), mx.concatenate([*before, kept[:, :, 0]], axis=1)]


def _projected(given: AttendInput) -> tuple[mx.array, mx.array]:
    """Queries (rows, heads, 1, dim), and the new token's keys, then values, (rows, 2 · kv_heads, 1, dim)."""
    rows, dim, kv_heads = given.q.shape[0], given.dim, given.kv_heads
    counts = (given.heads, kv_heads, kv_heads)
    parts = [
        x[:, start : start + count * dim]
        for x, start, count in zip((given.q, given.k, given.v), given.starts, counts, strict=True)
    ]
    if given.adapters is not None:
        parts = [_adapted(part, sides, given.adapters) for part, sides in zip(parts, given.adapters.sides, strict=True)]
    queries, keys, values = (part.reshape(rows, count, 1, dim) for part, count in zip(parts, counts, strict=True))
    queries = _turned(queries, given.q_weight, given)
    return queries, mx.concatenate([_turned(keys, given.k_weight, given), values], axis=1)


def _kept(given: AttendInput, x: mx.array) -> mx.array:
    return x if given.bits == 16 else packed_kv.pack(x, given.bits)


def _numbers(given: AttendInput, kept: mx.array) -> mx.array:
    return kept if given.bits == 16 else packed_kv.unpack(kept, given.dim, given.bits, given.q.dtype)


def _attended(given: AttendInput, queries: mx.array, new: mx.array) -> mx.array:
    """Attention over what is stored and these keys and values of the new token."""
    rows, kv_heads, offset = queries.shape[0], given.kv_heads, given.offset[:, None]
    first = 0 if given.fresh is None else given.fresh.shape[1]
    layer = _numbers(given, given.stored[first : first + 2 * kv_heads])
    run, shared, own = (given.segment[:, part, None] for part in range(3))
    positions = mx.arange(layer.shape[1])[None]
    lies = mx.where(positions < shared, run + positions, own + positions - shared)
    layer = layer[:, mx.clip(lies, 0, layer.shape[1] - 1)].swapaxes(0, 1)
    seen = positions < offset
    if given.window is not None:
        seen = seen & (positions > offset - given.window)
    y = mx.fast.scaled_dot_product_attention(
        queries,
        mx.concatenate([layer[:, :kv_heads], new[:, :kv_heads]], axis=2),
        mx.concatenate([layer[:, kv_heads:], new[:, kv_heads:]], axis=2),
        scale=given.scale,
        mask=mx.concatenate([seen, mx.ones((rows, 1), mx.bool_)], axis=1)[:, None, None],
    )
    return y.reshape(rows, -1)


def _error(arguments: tuple[Any, ...], results: Arrays) -> float:
    """As `Kernel.error_of`. Packed, a number next to the border of two codes may take either: it counts as wrong as far
    as it is further off than the reference's, and attention is held to what was kept of the new token."""
    given, (y, made) = AttendInput(*arguments), results
    if given.bits == 16:
        return difference(results, exactly(lambda *fields: _reference(AttendInput(*fields)), arguments))
    first = made.shape[1] - 2 * given.kv_heads
    if given.fresh is not None and not mx.array_equal(made[:, :first], given.fresh):
        return float("inf")
    found = packed_kv.unpack(made[:, first:, None], given.dim, given.bits, mx.float32)

    def expected(*fields: Any) -> Arrays:
        exact = AttendInput(*fields)
        queries, new = _projected(exact)
        off = mx.abs(_numbers(exact, _kept(exact, new)) - new)
        return [_attended(exact, queries, found), new + mx.clip(found - new, -off, off)]

    return difference([y, found], exactly(expected, arguments))


def _adapted(y: mx.array, sides: LoraSides | None, adapters: AttendAdapters) -> mx.array:
    if sides is None:
        return y
    given = LoraInput(adapters.x[:, None], y[:, None], sides.a, sides.b, adapters.indices, sides.gain, sides.shift)
    return lora_reference(given)[0][:, 0]


def _turned(x: mx.array, weight: mx.array | None, given: AttendInput) -> mx.array:
    x = x if weight is None else mx.fast.rms_norm(x, weight, given.eps)
    offset, periods = given.offset, given.period
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=periods)


def pack(dtype: mx.Dtype, bits: int = 16) -> int:
    """Numbers of a head that a lane has: as many as it loads at once, or where they are packed fill a word."""
    return 16 // int(dtype.size) if bits == 16 else packed_kv.LANE_NUMBERS


def _refuse(given: AttendInput) -> str | None:
    q, stored, fresh, offset = given.q, given.stored, given.fresh, given.offset
    rows = q.shape[0]
    first = 0 if fresh is None else fresh.shape[1]
    width = given.dim if given.bits == 16 else packed_kv.words_of(given.dim, given.bits)
    if stored.ndim != 3 or first + 2 * given.kv_heads > stored.shape[0] or stored.shape[2] != width:
        return "shapes"
    if offset.dtype != mx.int32 or offset.shape != (rows,):
        return "offsets that are not int32 (rows,)"
    if given.segment.dtype != mx.int32 or given.segment.shape != (rows, 3):
        return "segments that are not int32 (rows, 3)"
    if given.period.dtype != mx.float32:
        return f"periods of dtype {given.period.dtype}"
    kept = [array for array in (stored, fresh) if array is not None]
    if given.bits < 16 and (reason := refuse_dtype(*kept, dtypes=(mx.uint32,))):
        return reason
    found = (q, given.k, given.v, given.q_weight, given.k_weight, *(kept if given.bits == 16 else ()))
    if reason := refuse_dtype(*(array for array in found if array is not None)):
        return reason
    if reason := unfit(given.heads, given.kv_heads, given.dim, q.dtype, given.bits):
        return reason
    if given.adapters is not None and (reason := _refuse_adapters(given, given.adapters)):
        return reason
    return None if given.scale > 0 else "a scale that is not positive"


def _refuse_adapters(given: AttendInput, adapters: AttendAdapters) -> str | None:
    sides = [each for each in adapters.sides if each is not None]
    if not sides or len({each.a.shape for each in sides}) > 1:
        return "adapters of several shapes"
    if adapters.indices.dtype not in (mx.int32, mx.uint32):
        return f"indices of dtype {adapters.indices.dtype}"
    arrays = [array for each in sides for array in each if array is not None]
    if reason := refuse_dtype(*arrays) or refuse_dtype(adapters.x, given.q):
        return reason
    rank, threads = sides[0].a.shape[-1], _threads(given)
    columns = dict(times_a(sides[0].a, threads))["COLUMNS"]
    return None if 0 < rank <= HIGHEST_RANK and threads % columns == 0 else f"rank {rank} for {threads} threads"


def _together(given: AttendInput) -> int:
    """Heads that a threadgroup has."""
    repeats = given.adapters is not None and given.q.shape[0] > FEW_ROWS
    return given.heads // given.kv_heads if repeats else 1


def _threads(given: AttendInput) -> int:
    together = _together(given)
    return HEAD_THREADS if together == 1 else THREADS.get(KERNEL.backend, 512) // 32 // together * together * 32


def _launch(given: AttendInput) -> Arrays:
    q, k, v, stored, fresh, segment, offset, period, q_weight, k_weight = given[:10]
    rows, dim, group, width = q.shape[0], given.dim, given.heads // given.kv_heads, stored.shape[2]
    grouped = dim if given.bits == 16 else packed_kv.group_of(dim, given.bits)
    together, threads = _together(given), _threads(given)
    made = (0 if fresh is None else fresh.shape[1]) + 2 * given.kv_heads
    # What is absent is stood for by an array that is there: a new one would be a launch of its own.
    absent = (stored if fresh is None else fresh, *(period if each is None else each for each in (q_weight, k_weight)))
    adapters, sizes = _adapter_arguments(given, threads)
    return _BODY.launch(
        (q, k, v, stored, absent[0], segment, offset, period, *absent[1:], *adapters),
        template=[
            *(
                ("T", q.dtype),
                ("DIM", dim),
                ("BITS", given.bits),
                ("WIDTH", width),
                ("GROUPED", grouped),
                ("GROUP", group),
                ("KV_HEADS", given.kv_heads),
                ("TOGETHER", together),
                ("SPLITS", threads // together // 32),
            ),
            *(("DEPTH", DEPTH), ("PACK", pack(q.dtype, given.bits)), ("WINDOW", given.window or 0)),
            *(("SCALE", float_bits(given.scale)), ("EPS", float_bits(given.eps))),
            *(("NORM", q_weight is not None), ("FIRST", fresh is None)),
            *zip(("Q_ROW", "K_ROW", "V_ROW"), (x.shape[1] for x in (q, k, v)), strict=True),
            *zip(("Q_START", "K_START", "V_START"), given.starts, strict=True),
            *sizes,
        ],
        groups=(rows, given.heads // together),
        threads=threads,
        outputs=[((rows, given.heads * dim), q.dtype), ((rows, made, width), stored.dtype)],
    )


def _adapter_arguments(given: AttendInput, threads: int) -> tuple[list[mx.array], Template]:
    """The buffers from `x` on, and their parameters."""
    adapters = given.adapters
    if adapters is None:
        sizes: Template = [("ADAPTED", 0), ("S", given.q.dtype), *((name, 0) for name in ("GAIN", "SHIFT"))]
        return [given.q, given.offset, *[given.stored] * 12], [
            *sizes,
            *((name, 1) for name in ("IN", "RANK", "A_PACK", "COLUMNS", "STEPS")),
        ]
    a = next(each.a for each in adapters.sides if each is not None)
    none = LoraSides(a, a)
    sides = [none if each is None else each for each in adapters.sides]

    def bits(has: list[bool]) -> int:
        return sum(1 << part for part, one in enumerate(has) if one)

    by_name = dict(times_a(a, threads))
    return [adapters.x, adapters.indices, *(a if array is None else array for each in sides for array in each)], [
        *(("ADAPTED", bits([each is not None for each in adapters.sides])), ("S", a.dtype)),
        *(("GAIN", bits([each.gain is not None for each in sides])),),
        *(("SHIFT", bits([each.shift is not None for each in sides])),),
        *(("IN", a.shape[1]), ("RANK", a.shape[2]), ("A_PACK", by_name["PACK"])),
        *(("COLUMNS", by_name["COLUMNS"]), ("STEPS", by_name["STEPS"])),
    ]


KERNEL = Kernel(
    name="attend",
    reason="rows of different lengths make MLX's own take a mask, and with one it is not fused: a launch for some nine",
    bodies=(_BODY,),
    launch=lambda *fields: _launch(AttendInput(*fields)),
    reference=lambda *fields: _reference(AttendInput(*fields)),
    refuse=lambda *fields: _refuse(AttendInput(*fields)),
    cases=cases,
    timings=timings,
    error=_error,
    # The rotation's angle is rounded as in `rope`, and turned queries and keys are rounded before they are multiplied.
    tolerances={mx.float32: 5e-4, mx.float16: 5e-3, mx.bfloat16: 3e-2},
)
