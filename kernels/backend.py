"""On what a kernel runs, and which kernels are in use.

| back-end | when | runs |
|---|---|---|
| `metal` | a Mac's GPU is MLX's default device | the body, by `mx.fast.metal_kernel` |
| `cuda` | an NVIDIA GPU is | the same body behind `kernels/cuda/shim.h`, by `mx.fast.cuda_kernel` |
| `reference` | otherwise, or switched off | the formula in MLX's own operations |
| `emulator` | only when asked for by `using` | the Metal text on the CPU: for tests and checks, very slow |

`STOKER_KERNELS` is `auto` (all of them, the default), `off`, or names with commas between.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

import mlx.core as mx

Backend = Literal["metal", "cuda", "reference", "emulator"]

_forced: Backend | None = None


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Within it every kernel runs on `backend`, whatever `STOKER_KERNELS` says. Raises `ValueError` for no back-end."""
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
    machine = of_machine()
    return machine if machine != "reference" and chosen(name, os.environ.get("STOKER_KERNELS", "auto")) else "reference"


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


@cache
def chosen(name: str, setting: str) -> bool:
    """Whether `setting`, a value of STOKER_KERNELS, has the kernel `name` in use. Raises as `parse` does."""
    return name in parse(setting)


def parse(setting: str) -> frozenset[str]:
    """The kernels that a value of STOKER_KERNELS names. Raises `ValueError` for a name that there is not."""
    from kernels.registry import NAMES  # which imports every kernel, and each of them this module

    value = setting.strip().lower()
    if value in ("", "auto"):
        return frozenset(NAMES)
    if value == "off":
        return frozenset()
    names = frozenset(part.strip() for part in value.split(",") if part.strip())
    if unknown := sorted(names - set(NAMES)):
        raise ValueError(
            f"STOKER_KERNELS={setting!r}: there is no kernel {', '.join(unknown)}; it is auto, off, or some of "
            f"{', '.join(NAMES)} with commas between"
        )
    return names
