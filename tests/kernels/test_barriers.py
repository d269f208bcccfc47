"""Every barrier is needed, and the emulator sees each one's absence: the numbers that come out may be any."""

from __future__ import annotations

import mlx.core as mx
import pytest

from kernels import check
from kernels.backend import using
from kernels.emulator import observe
from kernels.emulator.run import KernelDefect
from kernels.emulator.trace import Launch
from kernels.kernel import Case, Kernel
from kernels.registry import KERNELS
from tests.kernels.conftest import body_of, launches, without_barriers

SMALL = (mx.float16, mx.bfloat16)


def _missing(kernel: Kernel, dtype: mx.Dtype) -> list[str]:
    """The barriers whose absence goes unnoticed in all shapes."""
    unnoticed = []
    for launch in launches(kernel, dtype):
        for number in range(len(without_barriers(launch))):
            if not any(_noticed(kernel, case, body_of(launch), number) for case in check.cases(kernel, dtype, 1)):
                unnoticed.append(f"barrier {number} of {body_of(launch)}")
    return unnoticed


def _noticed(kernel: Kernel, case: Case, body: str, number: int) -> bool:
    def change(launch: Launch) -> Launch:
        return without_barriers(launch)[number] if body_of(launch) == body else launch

    if case.large:
        return False
    try:
        with observe.observing(change=change), using("emulator"):
            kernel(*case.arguments)
    except KernelDefect as defect:
        return bool(defect.kinds & {"RACE", "UNINITIALISED", "BARRIER_DIVERGENCE", "SIMD_DIVERGENCE"})
    return False


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_every_barrier_removed_in_turn_is_flagged(kernel: Kernel) -> None:
    assert _missing(kernel, mx.float32) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", SMALL, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_every_barrier_removed_in_turn_is_flagged_in_16_bits(kernel: Kernel, dtype: mx.Dtype) -> None:
    assert _missing(kernel, dtype) == []
