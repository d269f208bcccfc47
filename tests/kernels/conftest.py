"""What the tests of kernels share: a compiler, and everything compiled at once before the first of them runs."""

from __future__ import annotations

import re
from dataclasses import replace

import mlx.core as mx
import pytest

from kernels import check
from kernels.backend import using
from kernels.emulator import build, observe
from kernels.emulator.trace import Launch
from kernels.kernel import Kernel
from kernels.registry import KERNELS

#: A call of a barrier, in a body or in a shared header.
BARRIER = re.compile(r"\b(?:threadgroup|simdgroup)_barrier\s*\([^;]*\)\s*;")
#: Up to so many tests compile what they run themselves.
FEW = 20


@pytest.fixture(scope="session", autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    """One kernel after the other would leave a core idle. Texts that were compiled before are not compiled again."""
    if not build.available():
        pytest.skip("no g++: the emulator needs it")
    if len(request.session.items) <= FEW:
        return
    check.prepare(KERNELS.values())
    build.build_all(
        without for kernel in KERNELS.values() for launch in launches(kernel) for without in without_barriers(launch)
    )


def launches(kernel: Kernel, dtype: mx.Dtype = mx.float32) -> list[Launch]:
    """What the first shape of `kernel` launches, without running it."""
    case = check.cases(kernel, dtype, 1)[0]
    with observe.observing(dry=True) as found, using("emulator"):
        kernel(*case.arguments)
    return found


def without_barriers(launch: Launch) -> list[Launch]:
    """The same launch once for each of its barriers, with that one taken out."""
    text = launch.source
    spans = [match.span() for match in BARRIER.finditer(text)]
    return [replace(launch, source=f"{text[:start]}/* a barrier was here */;{text[end:]}") for start, end in spans]


def body_of(launch: Launch) -> str:
    """The name of a launch's body: MLX makes custom_kernel_{body}_{template}{types} of it."""
    names = [body.name for kernel in KERNELS.values() for body in kernel.bodies]
    return max((name for name in names if launch.name.startswith(f"custom_kernel_{name}_")), key=len)
