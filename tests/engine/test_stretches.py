"""A pass in parts: layers that compute alike share what is compiled, and what comes out is what all layers make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bench.decode_step import random_adapters
from engine.adapters.stacked import StackedLora
from engine.generation.forward_input import ForwardInput
from engine.generation.sampling_batch import SamplingBatch
from engine.generation.step import Compiled, Step
from engine.models import joint
from engine.models.joint import JointKeyValues
from engine.models.key_values import KeyValues
from engine.models.layers import QuantizedLinear
from engine.models.llama import Block, Llama
from engine.weights.quantized import Form, quantize
from tests.engine import tiny
from tests.engine.conftest import TINY, RandomTensors

ROWS, LENGTHS = 3, np.array([4, 1, 7], np.int32)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases and norms of heads": {"qkv_bias": True, "qk_norm": True},
    "a window": {"window": 3},
}


def llama(layers: int, **switches: Any) -> Llama:
    mx.random.seed(5)
    return Llama(replace(TINY, layers=layers, **switches), RandomTensors())


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows decode over joint arrays; the kernel runs as its reference."""
    apart = Llama.kv_sizes.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Llama, "kv_sizes", property(lambda llama: apart(llama)._replace(joint=True)))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Block]:
    """The layers that Python goes through."""
    found: list[Block] = []
    plain = Block.forward

    def noting(self: Block, *given: Any) -> Any:
        found.append(self)
        return plain(self, *given)

    monkeypatch.setattr(Block, "forward", noting)
    return found


def outcome(llama: Llama, compiled: Compiled, adapters: StackedLora | None = None) -> list[np.ndarray]:
    """What two passes choose, with its logit, and the keys and values behind them."""
    kv: KeyValues | JointKeyValues
    kv = tiny.joint(llama, ROWS, 16) if llama.kv_sizes.joint else KeyValues(llama, ROWS, 16)
    step, found = Step(llama, compiled), []
    for number in range(2):
        offset = LENGTHS + number
        tokens, places = mx.array([[5], [9], [11]]), kv.pending(offset)
        given = ForwardInput(tokens, mx.array(offset), 16, adapters=adapters, places=places)
        found += [np.array(each) for each in step(kv, given, SamplingBatch())]
    kv.clear_beyond([12] * ROWS)
    return [*found, *(np.array(array) for array in tiny.sides(kv, ROWS, 16))]


def check(llama: Llama, adapters: StackedLora | None = None) -> None:
    """In parts, compiled, as all at once, not compiled."""
    wanted = outcome(llama, "none", adapters)
    for got, number in zip(outcome(llama, "decode", adapters), wanted, strict=True):
        np.testing.assert_allclose(got, number, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapted", [None, ("q_proj", "v_proj", "o_proj", "down_proj")], ids=["bare", "adapted"])
@pytest.mark.parametrize("form", FORMS)
def test_a_pass_in_parts_gives_what_all_layers_give(form: str, adapted: tuple[str, ...] | None) -> None:
    model = llama(8, **FORMS[form])
    adapters = None if adapted is None else random_adapters(model, ROWS, 2, adapted, rank=3)
    check(model, adapters)


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("together", [1, 3, 6])
def test_it_does_over_joint_arrays_too(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(joint, "LAYERS_TOGETHER", together)
    model = llama(7)
    adapters = random_adapters(model, ROWS, 2, ("k_proj", "up_proj"), rank=3)
    check(model, adapters)


def test_adapters_of_some_layers_stay_theirs() -> None:
    model = llama(8)
    every = random_adapters(model, ROWS, 2, rank=3)
    some = {name: stack for name, stack in every.stacks.items() if name.startswith(("layers.5.", "layers.6."))}
    check(model, StackedLora(some, every.indices))


def test_python_goes_through_the_layers_of_one_part_alone(traced: list[Block]) -> None:
    """All 24 as one function would be a turn of the engine several times as long, for which each stream waits."""
    model = llama(24)
    outcome(model, "decode")
    assert traced == model.layers[: joint.LAYERS_TOGETHER]


def test_python_goes_through_the_layers_of_one_part_for_prompts_on_gpus_too(traced: list[Block]) -> None:
    """A new size of chunk held streams up for as long as all layers take to be traced."""
    model = llama(24)
    given = ForwardInput(mx.zeros((1, 16), mx.int32), mx.zeros(1, mx.int32), 64, last=mx.array([15]))
    Step(model, "all")(KeyValues(model, 1, 64), given, SamplingBatch())
    assert traced == model.layers[: joint.LAYERS_TOGETHER]


def test_layers_that_compute_otherwise_have_a_trace_of_their_own(traced: list[Block]) -> None:
    """One matrix of few bits among dense ones."""
    model = llama(12)
    first, second = model.stretches.parts
    assert second.pattern is first.pattern is first
    odd = model.layers[8].self_attn
    odd.o_proj = QuantizedLinear(odd.o_proj.name, quantize(odd.o_proj.weight.T, Form(32, 4)))
    first, second = model.stretches.parts
    assert (first.pattern, second.pattern) == (first, second)
    outcome(model, "decode")
    assert traced == model.layers
    check(model)


def test_a_trace_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that fails."""
    model = llama(12)
    before = [layer.mlp.down_proj.weight for layer in model.layers]
    wanted = np.array(model(mx.array([[1, 2, 3]])))
    outcome(model, "decode")
    assert all(layer.mlp.down_proj.weight is kept for layer, kept in zip(model.layers, before, strict=True))
    monkeypatch.setattr(Block, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outcome(model, "decode")
    monkeypatch.undo()
    assert all(layer.mlp.down_proj.weight is kept for layer, kept in zip(model.layers, before, strict=True))
    assert np.array_equal(np.array(model(mx.array([[1, 2, 3]]))), wanted)
