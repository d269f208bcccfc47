"""How long a kernel takes next to its reference: what is counted, by a clock that only the calls move."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels import measure as measuring
from kernels.kernel import Arrays, Timing
from kernels.measure import CHAIN, copy_bandwidth, measure


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    # Compiled, a call would move the clock when it is traced alone.
    mx.disable_compile()
    yield clock
    mx.enable_compile()


def operation(clock: SimpleNamespace, micros: float) -> Any:
    """It takes `micros`, and its first three calls a second: a machine warms up, and a shape is compiled."""
    calls = [0]

    def run(x: mx.array, factor: float) -> Arrays:
        calls[0] += 1
        clock.now += 1.0 if calls[0] <= 3 else micros * 1e-6
        return [x * factor]

    return run


def test_a_kernel_and_its_reference_are_timed_in_turn_without_their_first_calls(clock: SimpleNamespace) -> None:
    kernel: Any = operation(clock, 10.0)
    kernel.name, kernel.reference = "it", operation(clock, 40.0)
    timing = Timing("2 × 3", (mx.ones((2, 3)), 2.0), 5000)
    # Two that count: with the three before them, the median would be one of those.
    found = measure(kernel, timing, "float16", times=2, copy=1e9)
    assert (found.kernel, found.dtype, found.shape, found.bytes) == ("it", "float16", "2 × 3", 5000)
    assert (found.alone, found.builtin_alone) == pytest.approx((10.0, 40.0)), "of one call"
    assert (found.chained, found.builtin_chained) == pytest.approx((10.0, 40.0)), "of one call of the chain"
    assert found.bandwidth == pytest.approx(0.5), "GB/s"
    assert found.floor == pytest.approx(5.0), "µs"
    assert "(0.25 ×)" in found.line
    assert "floor 5.0 µs" in found.line


def test_each_call_of_a_chain_waits_for_the_one_before(clock: SimpleNamespace) -> None:
    given: list[float] = []

    def run(x: mx.array) -> Arrays:
        clock.now += 1e-6
        given.append(float(np.array(x)[0]))
        return [x + 1.0]

    kernel: Any = run
    kernel.name, kernel.reference = "it", lambda x: [x]
    timing = Timing("1", (mx.zeros((1,)),), 1, lambda arguments, made: (made[0],))
    measure(kernel, timing, "float32", times=1)
    assert given[-CHAIN:] == list(range(CHAIN))


def test_a_copy_reads_and_writes_what_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    assert copy_bandwidth(4096, times=3) == pytest.approx(8192.0)
