"""The emulator itself: planted defects are named, what is right passes, and reports quote the line."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator.build import CompileError
from kernels.emulator.run import KernelDefect, run
from kernels.emulator.trace import Launch, trace

X = mx.arange(64, dtype=mx.float32)
I = "const uint i = thread_position_in_grid.x; const uint l = thread_position_in_threadgroup.x;\n"  # noqa: E741
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"


def launch(body: str, *, x: mx.array = X, grid: int = 64, threads: int = 32, out: int = 64, **options: Any) -> Launch:
    """A body over `x` with the float32 output `y`."""
    kernel: Any = mx.fast.metal_kernel(name="planted", input_names=["x"], output_names=["y"], source=body, **options)
    sizes = {"grid": (grid, 1, 1), "threadgroup": (threads, 1, 1)}
    call = {**sizes, "output_shapes": [(out,)], "output_dtypes": [mx.float32]}
    return trace(lambda a: kernel(inputs=[a], **call), x)


DEFECTS = {
    "a read beyond the end": (I + "y[i] = x[i + 1];", "OUT_OF_BOUNDS"),
    "a write beyond the end": (I + "y[i] = x[i]; y[i + 64] = 0.0f;", "OUT_OF_BOUNDS"),
    "an index below zero": (I + "y[i] = x[int(i) - 1];", "OUT_OF_BOUNDS"),
    "an array too small": (I + "threadgroup float s[16]; s[l] = x[i]; y[i] = s[l];", "OUT_OF_BOUNDS"),
    "too much threadgroup memory": (I + "threadgroup float s[9000]; s[l] = x[i]; y[i] = s[l];", "THREADGROUP_MEMORY"),
    "an output left unwritten": (I + "if (i < 63) y[i] = x[i];", "UNWRITTEN_OUTPUT"),
    "two threadgroups write one cell": (I + "y[i] = x[i]; y[l] = x[i];", "RACE"),
    "a plain addition to a shared cell": (
        I + f"threadgroup float s[1]; if (l == 0) s[0] = 0.0f; {BARRIER} s[0] += x[i]; {BARRIER} y[i] = s[0];",
        "RACE",
    ),
    "lockstep taken for granted": (I + "threadgroup float s[32]; s[l] = x[i]; y[i] = s[l ^ 1];", "RACE"),
    "a barrier for the other memory": (
        I + "threadgroup float s[64]; s[l] = x[i]; threadgroup_barrier(mem_flags::mem_device); y[i] = s[l ^ 32];",
        "RACE",
    ),
    "a read before any write": (I + f"threadgroup float s[32]; {BARRIER} y[i] = s[l];", "UNINITIALISED"),
    "an output read before it is written": (I + "const float old = y[i]; y[i] = old + x[i];", "UNINITIALISED"),
    "a barrier that some threads do not reach": (I + f"if (l < 16) {{ {BARRIER} }} y[i] = x[i];", "BARRIER_DIVERGENCE"),
    "two barriers, one each": (
        I + f"if (l < 16) {{ {BARRIER} }} else {{\n {BARRIER} }} y[i] = x[i];",
        "BARRIER_DIVERGENCE",
    ),
    "an early return before a barrier": (I + f"y[i] = x[i]; if (l > 20) return; {BARRIER}", "BARRIER_DIVERGENCE"),
    "a simd function in half the lanes": (
        I + "float s = x[i]; if (l < 16) s = metal::simd_sum(s); y[i] = s;",
        "SIMD_DIVERGENCE",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_named(name: str) -> None:
    body, kind = DEFECTS[name]
    threads = 64 if "other memory" in name else 32
    with pytest.raises(KernelDefect) as found:
        run(launch(body, threads=threads))
    assert kind in found.value.kinds


RIGHT = {
    "a barrier between": I + f"threadgroup float s[64]; s[l] = x[i]; {BARRIER} y[i] = s[l ^ 32];",
    "a simdgroup barrier between lanes": I
    + "threadgroup float s[64]; s[l] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[l ^ 1];",
    "an atomic counter": I
    + f"threadgroup atomic_uint n[1]; if (l == 0) atomic_store_explicit(&n[0], 0u, memory_order_relaxed); {BARRIER}"
    + f"atomic_fetch_add_explicit(&n[0], 1u, memory_order_relaxed); {BARRIER}"
    + "y[i] = float(atomic_load_explicit(&n[0], memory_order_relaxed));",
    "a simdgroup that returns as a whole": I + "y[i] = x[i]; if (l >= 32) return; y[i] = metal::simd_max(x[i]);",
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes_under_many_schedules(name: str) -> None:
    planted = launch(RIGHT[name], threads=64)
    results = {tuple(np.array(run(planted, seed=seed)[0]).tolist()) for seed in range(8)}
    assert len(results) == 1


NOT_PORTABLE = {
    "16 bits become float silently": (I + "y[i] = x[i] * 2.0f;", X.astype(mx.float16)),
    "a double": (I + "y[i] = x[i] * 2.0;", X),
    "the shape of a scalar": (I + "y[i] = float(x_shape[0]);", mx.array(2.0)),
    "a name that Metal has not": (I + "y[i] = __expf(x[i]);", X),
}


@pytest.mark.parametrize("name", NOT_PORTABLE)
def test_what_not_every_back_end_takes_does_not_compile(name: str) -> None:
    body, x = NOT_PORTABLE[name]
    with pytest.raises(CompileError):
        run(launch(body, x=x))


def test_an_attribute_that_only_the_header_names_does_not_compile() -> None:
    with pytest.raises(CompileError):
        run(launch("y[0] = x[HERE];", header="#define HERE thread_position_in_grid.x\n"))


def test_a_grid_that_is_no_multiple_of_the_threadgroup_is_refused() -> None:
    with pytest.raises(KernelDefect) as found:
        run(launch(I + "y[i] = x[i];", grid=60, out=60))
    assert found.value.kinds == {"LAUNCH"}


def test_a_report_quotes_the_line_of_the_body() -> None:
    with pytest.raises(KernelDefect) as found:
        run(launch(I + "threadgroup float s[32];\ns[l] = x[i];\ny[i] = s[l ^ 1];"))
    assert "body:4 `y[i] = s[l ^ 1];`" in str(found.value)


def test_strides_and_shapes_are_passed_as_mlx_passes_them() -> None:
    body = I + "y[i] = x[elem_to_loc(i, x_shape, x_strides, x_ndim)];"
    (y,) = run(launch(body, x=mx.arange(128, dtype=mx.float32).reshape(64, 2)[:, 0], ensure_row_contiguous=True))
    assert y.tolist() == list(range(0, 128, 2))


def test_more_than_one_kernel_in_a_function_is_refused() -> None:
    with pytest.raises(ValueError, match="one kernel call and nothing else"):
        trace(lambda a: a + 1, X)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_floats_round_as_mlx_rounds_them(dtype: mx.Dtype) -> None:
    values = mx.concatenate([mx.random.normal((4000,)) * 10.0 ** mx.random.uniform(-9, 5, (4000,)), mx.zeros(96)])
    body = I + "y[i] = T(x[i]);"
    kernel: Any = mx.fast.metal_kernel(name="rounding", input_names=["x"], output_names=["y"], source=body)
    call = {"grid": (4096, 1, 1), "threadgroup": (64, 1, 1), "output_shapes": [(4096,)], "output_dtypes": [dtype]}
    (y,) = run(trace(lambda a: kernel(inputs=[a], template=[("T", dtype)], **call), values))
    assert mx.array_equal(y, values.astype(dtype))
