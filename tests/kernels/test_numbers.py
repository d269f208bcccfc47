"""Every kernel's Metal text against its reference: all its shapes, all dtypes, several inputs and schedules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels import check
from kernels.backend import using
from kernels.emulator.observe import observing
from kernels.kernel import TOLERANCES, Case, Kernel
from kernels.lora import LoraSides
from kernels.lora_swiglu import LoraSwigluInput, lora_swiglu
from kernels.registry import KERNELS

SEED = 1


@cache
def cases_of(name: str, dtype: mx.Dtype) -> list[Case]:
    """Made once: each of them is a test of its own."""
    return check.cases(KERNELS[name], dtype, SEED)


def _every() -> Iterator[Any]:
    """Each case of each kernel in each dtype; quick are float32 and, by turns, one of those of 16 bits."""
    for place, kernel in enumerate(KERNELS.values()):
        for number, dtype in enumerate(kernel.dtypes):
            quick = dtype == mx.float32 or number % 2 == place % 2
            marks = [] if quick else [pytest.mark.slow]
            for index, case in enumerate(cases_of(kernel.name, dtype)):
                named = f"{kernel.name}-{str(dtype)[9:]}-{label(case)}"
                yield pytest.param(kernel, dtype, index, id=named, marks=marks)


def label(case: Case) -> str:
    """As a word of ASCII, so that a shell takes it."""
    return re.sub(r"[^a-z0-9.-]+", "_", case.label.replace("×", "x").replace("→", "to"), flags=re.IGNORECASE)


@pytest.mark.parametrize(("kernel", "dtype", "index"), list(_every()))
def test_a_kernel_gives_the_numbers_of_its_reference_under_any_schedule(
    kernel: Kernel, dtype: mx.Dtype, index: int
) -> None:
    case = cases_of(kernel.name, dtype)[index]
    assert check.run_case(kernel, case, "emulator", SEED) <= kernel.tolerances[dtype]


def test_every_kernel_has_at_least_six_cases() -> None:
    few = {kernel.name: len(cases_of(kernel.name, kernel.dtypes[0])) for kernel in KERNELS.values()}
    assert not {name: count for name, count in few.items() if count < 6}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_a_wrong_result_would_be_noticed(kernel: Kernel) -> None:
    """Each kernel's measure of error is above its tolerance for results that are slightly off, or belong elsewhere."""
    case = check.cases(kernel, mx.float32, 1)[2]
    right = kernel.reference(*case.arguments)
    assert kernel.error_of(case.arguments, right) <= kernel.tolerances[mx.float32]
    for number in range(len(right)):
        wrong = [array + (1 if index == number else 0) for index, array in enumerate(right)]
        assert kernel.error_of(case.arguments, wrong) > kernel.tolerances[mx.float32]
    assert kernel.error_of(case.arguments, [mx.full(a.shape, np.nan) for a in right]) == float("inf")


@pytest.mark.parametrize("kernel", [k for k in KERNELS.values() if k.differentiable], ids=lambda k: k.name)
def test_gradients_are_those_of_the_reference(kernel: Kernel) -> None:
    *arguments, eps = check.cases(kernel, mx.float32, 1)[2].arguments[: len(kernel.bodies[0].inputs) + 1]
    rest = check.cases(kernel, mx.float32, 1)[2].arguments[len(arguments) + 1 :]
    places = [place for place, array in enumerate(arguments) if array.dtype == mx.float32]

    def gradients(operation: object) -> list[mx.array]:
        def loss(*given: mx.array) -> mx.array:
            results = operation(*given, eps, *rest)  # type: ignore[operator]
            return sum((mx.sum(mx.sin(array)) for array in results), mx.array(0.0))

        return list(mx.grad(loss, places)(*arguments))

    with using("emulator"):
        got = gradients(kernel)
    for one, other in zip(got, gradients(kernel.reference), strict=True):
        assert np.allclose(np.array(one), np.array(other), rtol=2e-4, atol=2e-5)


def test_rows_without_adapter_come_out_bit_for_bit() -> None:
    kernel = KERNELS["lora"]
    x, y, a, b, index, gain, shift = check.cases(kernel, mx.float16, 1)[1].arguments
    with using("emulator"):
        (out,) = kernel(x, y, a, b, mx.zeros_like(index), gain, shift)
    assert mx.array_equal(out, y)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_row_without_adapter_is_gated_and_reads_none(dtype: mx.Dtype) -> None:
    """Among rows that have one, of which it says nothing: neither A and B nor gains and shifts are read."""
    given = LoraSwigluInput(*check.cases(KERNELS["lora_swiglu"], dtype, 1)[1].arguments)
    gate_sides, up_sides = (
        LoraSides(*(mx.full(side.shape, np.nan, dtype) for side in sides if side is not None)) for sides in given.sides
    )
    bare, rows = mx.arange(given.x.shape[0]) % 2 == 0, np.arange(given.x.shape[0])
    index = mx.where(bare, 0, 1).astype(mx.uint32)
    with using("emulator"):
        made = lora_swiglu(given._replace(indices=index, gate_sides=gate_sides, up_sides=up_sides))
    gate, up = (part.astype(mx.float32) for part in mx.split(given.gate, 2, axis=-1))
    wanted = gate * mx.sigmoid(gate) * up
    assert np.isnan(np.array(made.astype(mx.float32))[rows % 2 == 1]).all()
    found, expected = (np.array(array.astype(mx.float32))[rows % 2 == 0] for array in (made, wanted))
    np.testing.assert_allclose(found, expected, rtol=float(TOLERANCES[dtype]), atol=1e-6)


def test_a_row_that_is_not_finite_is_marked_and_hurts_no_other() -> None:
    logits = mx.array([[1.0, np.nan, 3.0], [np.inf, 1.0, 2.0], [-np.inf] * 3, [0.0, 2.0, 2.0], [-np.inf, 1.0, 0.0]])
    with using("emulator"):
        chosen, raw, logprob, probability = (np.array(array) for array in KERNELS["greedy"](logits))
    assert chosen.tolist() == [0, 0, 0, 1, 1]
    assert np.isnan(raw[:2]).all()
    assert raw[2:].tolist() == [-np.inf, 2.0, 1.0]
    assert np.allclose(logprob[3:], [2.0 - np.log(1 + 2 * np.exp(2.0)), 1.0 - np.log(np.e + 1)])
    assert probability.tolist() == [1.0] * 5


def test_the_same_row_draws_the_same_token_alone_and_among_others() -> None:
    kernel = KERNELS["sample"]
    case = check.cases(kernel, mx.float32, 1)[2]
    with using("emulator"):
        together = kernel(*case.arguments)
        for row in range(case.arguments[0].shape[0]):
            alone = kernel(*[a[row : row + 1] if isinstance(a, mx.array) else a for a in case.arguments])
            assert [float(x[0]) for x in alone] == [float(x[row]) for x in together]


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 1,000 draws among what top-k left of a small vocabulary; 99.9% of fair ones lie below the bound."""
    kernel, random, rows = KERNELS["sample"], np.random.default_rng(5), 1000
    logits = mx.broadcast_to(mx.array(random.normal(0, 1.5, (1, 32)), mx.float32), (rows, 32))
    column = {name: mx.full((rows, 1), value) for name, value in (("one", 1.0), ("zero", 0.0), ("warm", 1.3))}
    uniform = mx.array(random.random((rows, 1)), mx.float32)
    arguments = (column["warm"], mx.full((rows, 1), 8, mx.int32), column["one"], column["zero"], uniform)
    with using("emulator"), observing(checked=False):
        chosen = np.array(kernel(logits, *arguments, mx.full((rows, 1), False), None, None)[0])
    scores = np.array(logits[0]) / 1.3
    kept = np.argsort(scores)[-8:]
    expected = np.exp(scores[kept]) / np.exp(scores[kept]).sum() * rows
    counts = np.bincount(chosen, minlength=32)
    assert counts.sum() == counts[kept].sum()
    assert ((counts[kept] - expected) ** 2 / expected).sum() < 24.3
