"""A residual's addition, the RMSNorm after it, and the product that reads it, of a few rows."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from kernels.body import Body
from kernels.kernel import DTYPES, Arrays, Kernel, float_bits, refuse_dtype
from kernels.norm_project.cases import cases, timings

_BODY = Body("norm_project", ("x", "r", "w", "m", "bias"), ("h", "y"), ("common.h", "packed.h"))
#: With more rows a product's own tiles read the weights as seldom, and multiply faster.
MOST_ROWS = 4
#: Numbers of the rows that a threadgroup holds, as float32: half of its memory.
_HELD = 4096
#: Beyond this what is read takes so much longer than a launch that a product of MLX's own is the safer choice.
_MOST_WEIGHTS = 1 << 25
_THREADS = 256
#: Threadgroups that are enough to keep a large GPU busy.
_GROUPS = 1024


class ProjectInput(NamedTuple):
    """`x`, `residual`: (rows, D). `weight`: (D,), the norm's. `columns`: (OUT, D), those of the matrix M, or where it
    is `gated` (2·OUT, D), those of G and then those of U. `bias`: (OUT,), or None. All of one dtype. `eps`: the
    norm's."""

    x: mx.array
    residual: mx.array
    weight: mx.array
    columns: mx.array
    bias: mx.array | None
    eps: float
    gated: bool = False

    @property
    def outputs(self) -> int:
        return self.columns.shape[0] // (2 if self.gated else 1)


def norm_project(given: ProjectInput) -> tuple[mx.array, mx.array]:
    """(h, y): h = x + residual, (rows, D); of u = h / sqrt(mean(h²) + eps) · weight y = u M + bias, (rows, OUT), or
    gated y = silu(u G) · (u U), silu(x) = x / (1 + e^−x) (SwiGLU: Shazeer, 2020). Not differentiated."""
    h, y = KERNEL(*given)
    return h, y


def takes(x: mx.array, columns: mx.array) -> bool:
    """Whether the kernel runs, and is made for so many rows of such weights."""
    return KERNEL.active and _unfit(x, columns) is None


def _unfit(x: mx.array, columns: mx.array) -> str | None:
    """Why these shapes and dtypes cannot be taken."""
    if x.ndim != 2 or not 0 < x.shape[0] <= MOST_ROWS:
        return f"shape {x.shape}"
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    pack = 16 // int(x.dtype.size)
    if x.shape[1] % pack or x.shape[0] * -(-x.shape[1] // (32 * pack)) * 32 * pack > _HELD:
        return f"{x.shape[0]} rows of {x.shape[1]} numbers"
    if columns.ndim != 2 or not 0 < columns.size <= _MOST_WEIGHTS:
        return f"weights of shape {columns.shape}"
    return None


def _refuse(given: ProjectInput) -> str | None:
    x, residual, weight, columns, bias, eps, gated = given
    arrays = [x, residual, weight, columns, *([] if bias is None else [bias])]
    if reason := _unfit(x, columns) or refuse_dtype(*arrays):
        return reason
    if gated and (columns.shape[0] % 2 or bias is not None):
        return "a gate without up, or with a bias"
    whole = residual.shape == x.shape and weight.shape == columns.shape[1:] == x.shape[1:]
    if not whole or (bias is not None and bias.shape != (given.outputs,)):
        return "shapes that do not fit together"
    return None if eps > 0 else "eps is not positive"


def _reference(given: ProjectInput) -> Arrays:
    x, residual, weight, columns, bias, eps, gated = given
    h = x + residual
    normed = mx.fast.rms_norm(h, weight, eps)
    if not gated:
        return [h, normed @ columns.T if bias is None else mx.addmm(bias, normed, columns.T)]
    gate, up = mx.split(normed @ columns.T, 2, axis=-1)
    return [h, gate * mx.sigmoid(gate) * up]


def _launch(given: ProjectInput) -> Arrays:
    x, residual, weight, matrix, bias, eps, gated = given
    (rows, width), outputs, pack = x.shape, given.outputs, 16 // int(x.dtype.size)
    of_group = _THREADS // 32  # outputs
    columns = 2 if gated else 1
    while -(-outputs // of_group) > _GROUPS and columns < 4:
        of_group, columns = 2 * of_group, 2 * columns
    return _BODY.launch(
        # A bias that is absent is stood for by an array that is there: a new one would be a launch of its own.
        (x, residual, weight, matrix, weight if bias is None else bias),
        template=[
            *(("T", x.dtype), ("D", width), ("OUT", outputs), ("ROWS", rows), ("GATED", gated)),
            *(("BIAS", bias is not None), ("COLUMNS", columns), ("PACK", pack)),
            *(("STEPS", -(-width // (32 * pack))), ("EPS", float_bits(eps))),
        ],
        groups=(-(-outputs // of_group), 1),
        threads=_THREADS,
        outputs=[(x.shape, x.dtype), ((rows, outputs), x.dtype)],
    )


KERNEL = Kernel(
    name="norm_project",
    reason="one launch for two or three: of one row each launch costs more than what it computes",
    bodies=(_BODY,),
    launch=lambda *fields: _launch(ProjectInput(*fields)),
    reference=lambda *fields: _reference(ProjectInput(*fields)),
    refuse=lambda *fields: _refuse(ProjectInput(*fields)),
    cases=cases,
    timings=timings,
    # The reference rounds what it norms and each product to 16 bits, and the kernel sums in another order.
    tolerances={mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2},
)
