"""A residual's addition, the RMSNorm after it, and the gated products that read it, of a few rows (Shazeer, 2020)."""

from __future__ import annotations

import mlx.core as mx

from kernels.body import Body
from kernels.kernel import DTYPES, Arrays, Kernel, float_bits, refuse_dtype
from kernels.norm_gate_up.cases import cases, timings

_BODY = Body("norm_gate_up", ("x", "r", "w", "m"), ("h", "y"), ("common.h", "packed.h"))
#: With more rows a product's own tiles read the weights as seldom, and multiply faster.
MOST_ROWS = 4
#: Numbers of the rows that a threadgroup holds, as float32: half of its memory.
_HELD = 4096
#: Beyond this what is read takes so much longer than a launch that a product of MLX's own is the safer choice.
_MOST_WEIGHTS = 1 << 25
_THREADS = 256
#: Threadgroups that are enough to keep a large GPU busy.
_GROUPS = 1024


def norm_gate_up(
    x: mx.array, residual: mx.array, weight: mx.array, gate_up: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """(h, y): h = x + residual, u = h / sqrt(mean(h²) + eps) · weight, y = silu(u G) · (u U).

    `x`, `residual`: (rows, D), as h. `weight`: (D,). `gate_up`: (2·OUT, D), the columns of G and then those of U.
    All of one dtype. y: (rows, OUT). Not differentiated.
    """
    h, y = KERNEL(x, residual, weight, gate_up, eps)
    return h, y


def takes(x: mx.array, gate_up: mx.array) -> bool:
    """Whether the kernel runs, and is made for so many rows of such weights."""
    return KERNEL.active and _unfit(x, gate_up) is None


def _unfit(x: mx.array, matrix: mx.array) -> str | None:
    """Why these shapes and dtypes cannot be taken."""
    if x.ndim != 2 or not 0 < x.shape[0] <= MOST_ROWS:
        return f"shape {x.shape}"
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    pack = 16 // int(x.dtype.size)
    if x.shape[1] % pack or x.shape[0] * -(-x.shape[1] // (32 * pack)) * 32 * pack > _HELD:
        return f"{x.shape[0]} rows of {x.shape[1]} numbers"
    if matrix.ndim != 2 or not matrix.size or matrix.shape[0] % 2 or matrix.size > _MOST_WEIGHTS:
        return f"weights of shape {matrix.shape}"
    return None


def _refuse(x: mx.array, residual: mx.array, weight: mx.array, matrix: mx.array, eps: float) -> str | None:
    if reason := _unfit(x, matrix) or refuse_dtype(x, residual, weight, matrix):
        return reason
    if residual.shape != x.shape or weight.shape != x.shape[1:] or matrix.shape[1:] != x.shape[1:]:
        return "shapes that do not fit together"
    return None if eps > 0 else "eps is not positive"


def _reference(x: mx.array, residual: mx.array, weight: mx.array, matrix: mx.array, eps: float) -> Arrays:
    h = x + residual
    gate, up = mx.split(mx.fast.rms_norm(h, weight, eps) @ matrix.T, 2, axis=-1)
    return [h, gate * mx.sigmoid(gate) * up]


def _launch(x: mx.array, residual: mx.array, weight: mx.array, matrix: mx.array, eps: float) -> Arrays:
    rows, width = x.shape
    outputs, pack, simdgroups = matrix.shape[0] // 2, 16 // int(x.dtype.size), _THREADS // 32
    each = 1 if -(-outputs // simdgroups) <= _GROUPS else 2
    return _BODY.launch(
        (x, residual, weight, matrix),
        template=[
            *(("T", x.dtype), ("D", width), ("OUT", outputs), ("ROWS", rows), ("EACH", each), ("PACK", pack)),
            *(("STEPS", -(-width // (32 * pack))), ("EPS", float_bits(eps))),
        ],
        groups=(-(-outputs // (simdgroups * each)), 1),
        threads=_THREADS,
        outputs=[(x.shape, x.dtype), ((rows, outputs), x.dtype)],
    )


KERNEL = Kernel(
    name="norm_gate_up",
    reason="one launch for three: of one row each launch costs more than what it computes",
    bodies=(_BODY,),
    launch=_launch,
    reference=_reference,
    refuse=_refuse,
    cases=cases,
    timings=timings,
    # The reference rounds what it norms and each product to 16 bits, and the kernel sums in another order.
    tolerances={mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2},
)
