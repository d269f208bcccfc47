"""Products with the experts of a mixture, in blocks: the numbers of single rows, and how many products."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from engine.models.bridge import experts, package
from engine.models.bridge.experts import BLOCK, in_blocks

WIDE, OUT, COUNT = 12, 20, 5


def weights() -> mx.array:
    return mx.array(np.random.default_rng(1).normal(size=(COUNT, OUT, WIDE)).astype(np.float32)).swapaxes(-1, -2)


def rows(count: int) -> mx.array:
    return mx.array(np.random.default_rng(2).normal(size=(count, 1, WIDE)).astype(np.float32))


#: Rows of each expert: few, none, whole blocks, a row more than those, all of one.
SPREADS = [[1], [0, 3, 0, 0, 1], [BLOCK, 2 * BLOCK, 0, BLOCK, 1], [BLOCK + 1] * COUNT, [0, 0, 0, 0, 50], [50]]


@pytest.mark.parametrize("spread", SPREADS)
def test_each_row_has_the_product_with_its_own_expert(spread: list[int]) -> None:
    owners = np.repeat(np.arange(len(spread)), spread).astype(np.uint32)
    x, weight = rows(len(owners)), weights()
    found = in_blocks(x, weight, mx.array(owners))
    wanted = np.stack([np.array(x[row]) @ np.array(weight[owner]) for row, owner in enumerate(owners)])
    assert found.shape == (len(owners), 1, OUT)
    assert np.allclose(np.array(found), wanted, atol=1e-5)


def test_as_many_products_are_made_as_there_are_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    plain: Any = mx.gather_mm

    def noting(x: mx.array, *rest: Any, **options: Any) -> Any:
        made.append(x.shape)
        return plain(x, *rest, **options)

    monkeypatch.setattr(mx, "gather_mm", noting)
    in_blocks(rows(80), weights(), mx.zeros(80, mx.uint32))
    in_blocks(rows(2), weights(), mx.zeros(2, mx.uint32))
    assert made == [(80 // BLOCK + COUNT, BLOCK, WIDE), (2, BLOCK, WIDE)]


def test_a_networks_experts_have_the_same_numbers_in_blocks_with_biases_and_gradients() -> None:
    layers = package.load("switch_layers")
    mx.random.seed(3)
    plain = layers.SwitchGLU(WIDE, OUT, COUNT, bias=True)
    for part in (plain.up_proj, plain.gate_proj, plain.down_proj):
        part.bias = mx.random.normal(part.bias.shape)
    mx.eval(plain.parameters())
    x, chosen = rows(40)[:, 0], mx.array(np.random.default_rng(4).integers(0, COUNT, (40, 2)).astype(np.uint32))
    few = x[:4], chosen[:4]  # too few to be sorted
    wanted, wanted_few = plain(x, chosen), plain(*few)
    slope = mx.grad(lambda given: plain(given, chosen).square().sum())(x)
    mx.eval(wanted, wanted_few, slope)
    holder = nn.Sequential(plain)
    experts.block(holder)
    assert type(plain.up_proj) is not layers.SwitchLinear
    assert np.allclose(np.array(plain(x, chosen)), np.array(wanted), atol=1e-5)
    assert np.allclose(np.array(plain(*few)), np.array(wanted_few), atol=1e-6)
    again = mx.grad(lambda given: plain(given, chosen).square().sum())(x)
    assert np.allclose(np.array(again), np.array(slope), rtol=1e-3, atol=1e-4)
