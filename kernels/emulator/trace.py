"""What MLX would launch on a Mac: the full Metal text, its inputs and its grid, without a Mac.

MLX writes that text while it exports a graph, with every back-end. It is the text that a Mac compiles, signature
and template instantiation included, so nothing of MLX's wrapping is imitated here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    name: str
    source: str
    #: Threads in all, and of one threadgroup, in three dimensions.
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    inputs: tuple[mx.array, ...]
    #: For each input: whether its shape, its strides and its number of dimensions are passed as well.
    shape_arguments: tuple[tuple[bool, bool, bool], ...]
    outputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]
    #: What MLX fills the outputs with beforehand. The export leaves it out: set it by hand.
    init_value: float | None = None


def trace(function: Callable[..., Any], *arrays: mx.array) -> Launch:
    """The one `mx.fast.metal_kernel` call in `function(*arrays)`. Raises `ValueError` if there is anything else."""
    nodes: list[dict[str, Any]] = []
    mx.export_function(nodes.append, function, *arrays)
    primitives = [node for node in nodes if node["type"] == "primitive"]
    names = [node["name"] for node in primitives]
    if names != ["CustomKernel"]:
        raise ValueError(f"the function must be one kernel call and nothing else; its operations: {names}")
    node = primitives[0]
    name, source, *sizes = node["arguments"][:8]
    return Launch(
        name=name,
        source=source,
        grid=_triple(sizes[:3]),
        threadgroup=_triple(sizes[3:]),
        inputs=tuple(_values(nodes, arrays)[entry[0]] for entry in node["inputs"]),
        shape_arguments=tuple((bool(a), bool(b), bool(c)) for a, b, c in node["arguments"][8]),
        outputs=tuple((tuple(shape), dtype) for _, shape, dtype in node["outputs"]),
    )


def _triple(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = sizes
    return x, y, z


def _values(nodes: list[dict[str, Any]], arrays: Sequence[mx.array]) -> dict[str, mx.array]:
    """Name in the exported graph → array."""
    inputs = next(node["inputs"] for node in nodes if node["type"] == "inputs")
    values = {entry[0]: array for entry, array in zip(inputs, arrays, strict=True)}
    for node in nodes:
        if node["type"] == "constants":
            values.update({entry[0]: entry[1] for entry in node["constants"]})
    return values
