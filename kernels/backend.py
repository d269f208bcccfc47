"""On what a kernel runs, and which kernels are in use.

| back-end | when | runs |
|---|---|---|
| `metal` | a Mac's GPU is MLX's default device | the body, by `mx.fast.metal_kernel` |
| `cuda` | an NVIDIA GPU is | the same body behind `kernels/cuda/shim.h`, by `mx.fast.cuda_kernel` |
| `reference` | otherwise, or switched off | the formula in MLX's own operations |
| `emulator` | only when asked for by `using` | the Metal text on the CPU: for tests and checks, very slow |

Which kernels are in use is given when a process starts (`kernels.registry.use`); all of them are where nothing is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

import mlx.core as mx

Backend = Literal["metal", "cuda", "reference", "emulator"]

_forced: Backend | None = None
#: Names of the kernels in use; None: all of them.
_in_use: frozenset[str] | None = None


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Within it every kernel runs on `backend`, those not in use too. Raises `ValueError` for no back-end."""
    global _forced
    if backend not in get_args(Backend):
        raise ValueError(f"back-end {backend!r}: it is one of {', '.join(get_args(Backend))}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def backend_for(name: str) -> Backend:
    """On what the kernel `name` runs now."""
    if _forced is not None:
        return _forced
    return of_machine() if _in_use is None or name in _in_use else "reference"


def use_only(names: frozenset[str] | None) -> None:
    """From now on these kernels are in use in this process and no others; None: all of them."""
    global _in_use
    _in_use = names


def of_machine() -> Backend:
    """The back-end of MLX's default device."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return "reference"
    return _gpu()


@cache
def _gpu() -> Backend:
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else "reference"
