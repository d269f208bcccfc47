"""What the tests of kernels share: a compiler, and everything compiled at once before the first of them runs."""

from __future__ import annotations

import mlx.core as mx
import pytest

from kernels import check
from kernels.backend import using
from kernels.emulator import build, observe
from kernels.emulator.trace import Launch
from kernels.kernel import Kernel
from kernels.registry import KERNELS

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
        launch.without_barrier(number)
        for kernel in KERNELS.values()
        for launch in launches(kernel)
        for number in range(len(launch.barriers))
    )


def launches(kernel: Kernel, dtype: mx.Dtype = mx.float32) -> list[Launch]:
    """What the first shape of `kernel` launches, without running it."""
    case = check.cases(kernel, dtype, 1)[0]
    with observe.observing(dry=True) as found, using("emulator"):
        kernel(*case.arguments)
    return found


def body_of(launch: Launch) -> str:
    """The name of a launch's body: MLX makes custom_kernel_{body}_{template}{types} of it."""
    names = [body.name for kernel in KERNELS.values() for body in kernel.bodies]
    return max((name for name in names if launch.name.startswith(f"custom_kernel_{name}_")), key=len)
