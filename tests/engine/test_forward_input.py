"""What a pass takes, apart and together again: what `mx.compile` gets of it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from engine.adapters.stacked import StackedLora
from engine.generation.draws import Draw
from engine.generation.forward_input import ForwardInput, filled, flatten, skeleton
from engine.generation.sampling_batch import SamplingBatch, sampling_batch
from stoker.contract import GenerateRequest


def given(number: int, kv_length: int = 64) -> ForwardInput:
    stacks = {"q": {"a": mx.full((2, 4, 8), number), "b": mx.full((2, 8, 4), number)}}
    adapters = StackedLora(stacks, mx.array([number], mx.uint32))
    return ForwardInput(mx.array([[number]]), mx.array([number]), kv_length, last=mx.array([number]), adapters=adapters)


def sampling(number: int) -> SamplingBatch:
    request = GenerateRequest(
        model="m", prompt="x", temperature=1.0 + number, top_k=5, presence_penalty=0.5, logit_bias={3: 1.0}
    )
    mask = np.full(2, number, dtype=np.int32)
    return sampling_batch([Draw(request, 0.5, {number: 1}, mask, fresh=True)], 64)


def parts(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
    arrays: list[Any] = []
    key: list[Any] = []
    flatten(value, arrays, key)
    return arrays, tuple(key)


def test_a_trace_gets_the_arrays_of_each_pass() -> None:
    first, second = given(1), given(2)
    made = filled(skeleton(first), iter(parts(second)[0]))
    assert made.tokens is second.tokens
    assert made.offset is second.offset
    assert made.last is second.last
    assert made.adapters.stacks is second.adapters.stacks  # type: ignore[union-attr]
    assert (made.kv_length, made.exact) == (64, False)
    later = sampling(2)
    found = filled(skeleton(sampling(1)), iter(parts(later)[0]))
    assert found.random.temperature is later.random.temperature  # type: ignore[union-attr]
    assert found.random.ranks.width == later.random.ranks.width  # type: ignore[union-attr]
    assert found.penalties.fresh is later.penalties.fresh  # type: ignore[union-attr]
    assert found.bias.values is later.bias.values  # type: ignore[union-attr]
    assert found.mask is later.mask


def test_passes_share_a_trace_if_their_shapes_and_settings_are_the_same() -> None:
    assert parts(given(1))[1] == parts(given(2))[1]
    assert parts(sampling(1))[1] == parts(sampling(2))[1]
    assert parts(given(1))[1] != parts(given(1, kv_length=128))[1]
    longer = ForwardInput(mx.array([[1, 2]]), mx.array([1]), 64)
    assert parts(longer)[1] != parts(ForwardInput(mx.array([[1]]), mx.array([1]), 64))[1]
    assert parts(sampling(1))[1] != parts(SamplingBatch())[1]
