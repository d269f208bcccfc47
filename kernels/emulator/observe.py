"""Runs kernels on the emulator as they are called, and keeps what was launched for those who ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from kernels.emulator.run import run
from kernels.emulator.trace import Launch, trace


@dataclass
class EmulatorSettings:
    """How the emulator runs what is called."""

    seed: int = 1
    checked: bool = True
    #: Only trace: results are zeros.
    dry: bool = False
    #: What changes a launch before it runs: how tests plant defects.
    change: Callable[[Launch], Launch] = lambda launch: launch
    launches: list[Launch] = field(default_factory=list)


_settings = EmulatorSettings()


@contextmanager
def observing(
    *,
    seed: int = 1,
    checked: bool = True,
    dry: bool = False,
    change: Callable[[Launch], Launch] = lambda launch: launch,
) -> Iterator[list[Launch]]:
    """Within it kernels on the emulator run like that; the list receives their launches."""
    global _settings
    before, _settings = _settings, EmulatorSettings(seed, checked, dry, change)
    try:
        yield _settings.launches
    finally:
        _settings = before


def execute(function: Callable[..., Any], arrays: Sequence[mx.array]) -> list[mx.array]:
    """The outputs of the one kernel call in `function(*arrays)`. Raises `KernelDefect`, `CompileError`."""
    launch = _settings.change(trace(function, *arrays))
    _settings.launches.append(launch)
    if _settings.dry:
        return [mx.zeros(shape, dtype) for shape, dtype in launch.outputs]
    return run(launch, seed=_settings.seed, checked=_settings.checked)
