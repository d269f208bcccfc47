"""How many kernels a compiled decode step launches on a GPU, counted from its graph, without one.

MLX exports the graph of a pass with every back-end, our kernels in it. What is counted:

- each kernel of ours, product, reduction, gather, scatter and so on is a launch, and each `mx.fast` operation is;
- elementwise operations that feed each other are one, as `mx.compile` makes of them;
- a write at a position that the device knows is two: its offset is computed first; a concatenation is one an input;
- a kernel of ours whose input is a part of an array, or an array in another order, costs a copy more.

Views, reshapes of whole arrays and broadcasts launch nothing. Not counted: what a GPU's library does inside of a
product (cuBLAS may add one that sums its parts), and copies of keys and values that something else still holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from bench.decode_step import RandomTensors, random_adapters
from bench.shapes import SHAPES
from engine.adapters.stacked import StackedLora
from engine.generation.draws import Draw
from engine.generation.forward_input import ForwardInput
from engine.generation.sampling_batch import sampling_batch
from engine.generation.step import Step
from engine.models import fastmath, rope, view
from engine.models.joint import JointKeyValues, JointPlaces
from engine.models.key_values import KeyValues
from engine.models.llama import Llama
from engine.models.qwen2 import Qwen2Args
from kernels.backend import using
from stoker.contract import GenerateRequest

#: The projections that adapters change in a step that is counted.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

#: Launch nothing: they give a view, or MLX's graph alone needs them.
_VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze",    "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
#: Views that leave out, repeat or reorder, so that a kernel that wants rows one after the other gets a copy.
_SCATTERED = {"AsStrided", "Slice", "Split", "Transpose"}
_ELEMENTWISE = {
    "Abs", "Add", "AsType", "BitwiseBinary", "Divide", "Equal", "Exp", "Greater", "GreaterEqual", "IsNaN", "Less",
    "LessEqual", "Log", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Multiply", "Negative",
    "NotEqual", "Power", "Select", "Sigmoid", "Sqrt", "Square", "Subtract",
}  # fmt: skip


def narrow_llama() -> Llama:
    """Qwen2.5-0.5B's layers and heads; how wide they are changes no launch."""
    narrow = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96, "head_dim": 64}
    mx.random.seed(0)
    return Llama(Qwen2Args.from_config({**SHAPES["qwen2.5-0.5b"], **narrow}), RandomTensors(mx.bfloat16))


def of_a_step(rows: int, adapters: int = 0) -> Counter[str]:
    """What a greedy decode step of Qwen2.5-0.5B launches, by kind, with so many adapters on its attention."""
    llama = narrow_llama()
    return launches(*a_step(llama, rows, random_adapters(llama, rows, adapters, ATTENTION) if adapters else None))


def a_step(
    llama: Llama, rows: int, adapters: StackedLora | None = None, **sampling: Any
) -> tuple[Callable[..., list[mx.array]], mx.array, mx.array]:
    """A step as a function of arrays, and these."""
    with using("metal"):
        assert llama.kv_sizes.joint
    kv, step, offset = JointKeyValues(llama), Step(llama, "all"), np.full(rows, 5, np.int32)
    kv.fit([256] * rows)
    request = GenerateRequest(model="m", prompt="x", **{"temperature": 0.0, **sampling})
    chosen = sampling_batch([Draw(request, 0.5)] * rows, llama.args.vocab)
    places = kv.pending(offset, rows)
    mx.eval(kv.stored, places.positions, places.segments)

    def run(tokens: mx.array, offset: mx.array) -> list[mx.array]:
        given = ForwardInput(tokens, offset, 256, adapters=adapters, places=places)
        made = step.whole(kv.stored, given, chosen)
        return [*made[1], *(array for arrays in made[0] for array in arrays)]

    return run, mx.zeros((rows, 1), mx.int32), mx.array(offset)


def a_prompt(llama: Llama, rows: int, tokens: int) -> tuple[Callable[..., list[mx.array]], mx.array, mx.array]:
    """A pass over `tokens` of each of so many prompts, of which they are the last, in the same way."""
    kv = KeyValues(llama, rows, 2 * tokens)
    return _several(
        llama, kv, None, ForwardInput(mx.zeros((rows, tokens), mx.int32), mx.full(rows, 5, dtype=mx.int32), 2 * tokens)
    )


def a_draft(llama: Llama, rows: int, tokens: int) -> tuple[Callable[..., list[mx.array]], mx.array, mx.array]:
    """A pass over a draft of each row, `tokens` with its newest, in the same way."""
    with using("metal"):
        assert llama.kv_sizes.joint
    kv = JointKeyValues(llama)
    kv.fit([256] * rows)
    places = kv.pending(np.full(rows, 5, np.int32), rows)
    given = ForwardInput(mx.zeros((rows, tokens), mx.int32), mx.full(rows, 5, dtype=mx.int32), 256, every=True)
    return _several(llama, kv, places, given)


def _several(
    llama: Llama, kv: KeyValues | JointKeyValues, places: JointPlaces | None, given: ForwardInput
) -> tuple[Callable[..., list[mx.array]], mx.array, mx.array]:
    """A greedy pass over several tokens of each row as a function of these and of where they begin; and both."""
    step, (rows, tokens) = Step(llama, "all"), given.tokens.shape
    last = None if given.every else mx.full(rows, tokens - 1, dtype=mx.int32)
    greedy = Draw(GenerateRequest(model="m", prompt="x", temperature=0.0), 0.5)
    chosen = sampling_batch([greedy] * (rows * tokens if given.every else rows), llama.args.vocab)
    mx.eval(kv.stored)

    def run(tokens: mx.array, offset: mx.array) -> list[mx.array]:
        made = step.whole(kv.stored, replace(given, tokens=tokens, offset=offset, last=last, places=places), chosen)
        return [*made[1], *(array for arrays in made[0] for array in arrays)]

    return run, given.tokens, given.offset


def launches(function: Callable[..., Any], *arrays: mx.array) -> Counter[str]:
    """What `function(*arrays)`, compiled, launches, by kind."""
    return _counted(_on_gpu(function, *arrays))


def walked(function: Callable[..., Any], *arrays: mx.array) -> int:
    """How many operations the host walks for these launches, views among them, before any are fused."""
    return len(_on_gpu(function, *arrays))


def operations(function: Callable[..., Any], *arrays: mx.array) -> Counter[str]:
    """What `function(*arrays)` runs on this machine's back-end, by MLX's names, before any are fused."""
    return Counter(node["name"] for node in _primitives(function, *arrays))


def _on_gpu(function: Callable[..., Any], *arrays: mx.array) -> list[dict[str, Any]]:
    with using("metal"), _whole_operations():
        return _primitives(function, *arrays)


def _primitives(function: Callable[..., Any], *arrays: mx.array) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = []
    mx.export_function(nodes.append, function, *arrays)
    return [node for node in nodes if node["type"] == "primitive"]


def _counted(primitives: list[dict[str, Any]]) -> Counter[str]:
    made_by = {out[0]: node for node in primitives for out in node["outputs"]}
    found: Counter[str] = Counter()
    for node in primitives:
        name, inputs = node["name"], [entry[0] for entry in node["inputs"]]
        if name in _VIEWS or name in _ELEMENTWISE:
            continue
        if name == "CustomKernel":
            found[node["arguments"][0].split("_", 2)[-1].split("__")[0]] += 1
            found["copies for kernels"] += sum(_scattered(each, made_by) for each in inputs)
        elif name == "Concatenate":
            found[name] += len(inputs)
        else:
            found[name] += 2 if name.startswith("DynamicSlice") else 1
    found["fused elementwise"] = len(_chains(primitives, made_by))
    return +found


def _scattered(name: str, made_by: dict[str, dict[str, Any]]) -> bool:
    """Whether an array is a view whose rows do not lie one after the other."""
    node = made_by.get(name)
    while node is not None and node["name"] in _VIEWS:
        (source, shape, _), (_, made, _) = node["inputs"][0], next(out for out in node["outputs"] if out[0] == name)
        long = [[size for size in sizes if size > 1] for sizes in (shape, made)]
        if node["name"] in _SCATTERED and (long[0][1:] != long[1][1:] or node["name"] == "AsStrided"):
            return True
        name, node = source, made_by.get(source)
    return False


def _chains(primitives: list[dict[str, Any]], made_by: dict[str, dict[str, Any]]) -> set[int]:
    """Elementwise operations, joined where one feeds another, views between them included."""
    root = {id(node): id(node) for node in primitives if node["name"] in _ELEMENTWISE}

    def of(key: int) -> int:
        while root[key] != key:
            key = root[key]
        return key

    for node in primitives:
        if id(node) not in root:
            continue
        for name, *_ in node["inputs"]:
            source = made_by.get(name)
            while source is not None and source["name"].startswith("Broadcast"):
                source = made_by.get(source["inputs"][0][0])
            if source is not None and id(source) in root:
                root[of(id(source))] = of(id(node))
    return {of(key) for key in root}


@contextmanager
def _whole_operations() -> Iterator[None]:
    """Operations of `mx.fast` as one each: MLX takes them apart where there is no GPU."""

    def whole(name: str) -> Callable[..., mx.array]:
        def operation(x: mx.array, *others: Any, **named: Any) -> mx.array:
            arrays = [each for each in (x, *others, *named.values()) if isinstance(each, mx.array)]
            kernel: Any = mx.fast.metal_kernel(
                name=name,
                input_names=[f"x{index}" for index in range(len(arrays))],
                output_names=["y"],
                source="y[0] = x0[0];",
            )
            call = {"grid": (32, 1, 1), "threadgroup": (32, 1, 1)}
            made: list[mx.array] = kernel(inputs=arrays, output_shapes=[x.shape], output_dtypes=[x.dtype], **call)
            return made[0]

        return operation

    names = ("rms_norm", "rope", "scaled_dot_product_attention")
    stand_ins: dict[str, Any] = {name: whole(name) for name in names}
    # A gradient of its own is nothing that MLX could export, and nothing that is launched.
    plain = patch.object(fastmath, "gated_silu", lambda gate, up: gate * mx.sigmoid(gate) * up)
    for_gpus = [patch.object(module, "on_cpu", lambda: False) for module in (view, fastmath, rope)]
    with for_gpus[0], for_gpus[1], for_gpus[2], plain, patch.multiple(mx.fast, **stand_ins):
        yield
