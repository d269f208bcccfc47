"""LoRA (Hu et al., 2021) and DoRA (Liu et al., 2024) of a batch in which each row has its own adapter or none."""

from __future__ import annotations

import mlx.core as mx

from kernels.body import Body
from kernels.kernel import DTYPES, Arrays, Kernel
from kernels.lora.arguments import LoraInput
from kernels.lora.cases import cases, timings

_BODY = Body("lora", ("x", "y", "a", "b", "index", "gain", "shift"), ("out",), ("packed.h", "low_rank.h"))
HIGHEST_RANK = 64
_THREADS = 256
#: Rows of A that a thread has under way at once.
_DEPTH = 4


def lora(given: LoraInput) -> mx.array:
    """gain · y + shift + (x A) B with each row's own of all, in the shape and dtype of `y`."""
    return KERNEL(*given)[0]


def lora_reference(given: LoraInput) -> Arrays:
    x, y, a, b, index, gain, shift = given
    if x.ndim == 2:
        made = lora_reference(given._replace(x=x[:, None], y=y[:, None]))
        return [array[:, 0] for array in made]
    # The CPU back-end gathers matrices of float32 alone.
    dtype = mx.float32 if mx.default_device().type == mx.DeviceType.cpu else x.dtype
    inner = mx.gather_mm(x.astype(dtype), a.astype(dtype), rhs_indices=index)
    update = mx.gather_mm(inner, b.astype(dtype), rhs_indices=index).astype(y.dtype)
    if gain is not None:
        y = y * gain[index][:, None]
    if shift is not None:
        y = y + shift[index][:, None]
    return [y + update]


def refuse_lora(given: LoraInput) -> str | None:
    x, y, a, b, index, gain, shift = given
    if x.shape[1:-1] not in ((), (1,)):
        return "more than one token a row"
    if not 0 < a.shape[-1] <= HIGHEST_RANK:
        return f"rank {a.shape[-1]}"
    if index.dtype not in (mx.int32, mx.uint32):
        return f"indices of dtype {index.dtype}"
    arrays = [array for array in (x, y, a, b, gain, shift) if array is not None]
    return next((f"dtype {array.dtype}" for array in arrays if array.dtype not in DTYPES), None)


def _launch(given: LoraInput) -> Arrays:
    x, y, a, b, index, gain, shift = given
    rows, inputs, outputs, rank = x.shape[0], x.shape[-1], y.shape[-1], a.shape[-1]
    # What is absent is stood for by an array that is there: a new one would be a launch of its own.
    return _BODY.launch(
        (x, y, a, b, index, a if gain is None else gain, a if shift is None else shift),
        template=[
            *(("T", y.dtype), ("S", a.dtype), ("IN", inputs), ("OUT", outputs), ("RANK", rank)),
            *(*times_a(a, _THREADS), ("SIMDGROUPS", _THREADS // 32)),
            *(("GAIN", gain is not None), ("SHIFT", shift is not None)),
        ],
        groups=(rows, -(-outputs // _THREADS)),
        threads=_THREADS,
        outputs=[(y.shape, y.dtype)],
    )


def times_a(a: mx.array, threads: int) -> list[tuple[str, int]]:
    """The parameters of `times_a` in `low_rank.h`, for matrices (adapters, in, rank) and a threadgroup of so many."""
    _, inputs, rank = a.shape
    pack = 16 // int(a.dtype.size)
    pack = pack if rank % pack == 0 else 1
    columns = 1 << (rank // pack - 1).bit_length()
    steps = -(-inputs // (threads // columns))
    return [("PACK", pack), ("COLUMNS", columns), ("STEPS", steps), ("DEPTH", _DEPTH)]


KERNEL = Kernel(
    name="lora",
    reason="one launch for three (two gather_mm and an addition); rows without adapter read no matrix",
    bodies=(_BODY,),
    launch=lambda *fields: _launch(LoraInput(*fields)),
    reference=lambda *fields: lora_reference(LoraInput(*fields)),
    refuse=lambda *fields: refuse_lora(LoraInput(*fields)),
    cases=cases,
    timings=timings,
    # The reference rounds x A and (x A) B to 16 bits, the kernel only its result.
    tolerances={mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2},
)
