"""LoRA and DoRA in the forward pass of training, and what an adapter is.

LoRA (Hu et al. 2021, arXiv:2106.09685): y = x W + s · (x A) B, with W frozen, s = alpha / rank.
rsLoRA (Kalajdzievski 2023, arXiv:2312.03732): the same with s = alpha / sqrt(rank).
DoRA (Liu et al. 2024, arXiv:2402.09353): y = m / ‖W + s·AB‖ · (x W + s · (x A) B), the norm that of each output's
weights, and no gradient through it (section 4.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from engine.adapters.flat import Flat, Matrices
from engine.models.layers import Linear
from engine.models.shard import Shard
from stoker.contract import DEFAULT_TARGETS
from stoker.errors import InvalidRequest


@dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float
    #: Last names of the layers that are changed, such as `q_proj`, or longer ends of their names.
    targets: tuple[str, ...]
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class LoraWeights:
    """One adapter. `given`: its matrices, or all their numbers in one array."""

    config: LoraConfig
    given: Matrices | Flat

    @cached_property
    def matrices(self) -> Matrices:
        """By layer `a` (in, rank) and `b` (rank, out), and with DoRA `m` (out,), float32."""
        return self.given.matrices() if isinstance(self.given, Flat) else self.given

    @property
    def sides(self) -> dict[str, set[str]]:
        """By layer, which of them there are."""
        if not isinstance(self.given, Flat):
            return {layer: set(matrices) for layer, matrices in self.given.items()}
        found: dict[str, set[str]] = {}
        for place in self.given.places:
            found.setdefault(place.layer, set()).add(place.side)
        return found

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for sides in self.matrices.values() for array in sides.values())


def same(first: Matrices, second: Matrices) -> bool:
    """Whether all numbers of two adapters are the same, layer by layer and side by side."""
    return first.keys() == second.keys() and all(
        sides.keys() == second[name].keys()
        and all(bool(mx.array_equal(array, second[name][side])) for side, array in sides.items())
        for name, sides in first.items()
    )


def target_shapes(shapes: Mapping[str, tuple[int, int]], targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """The layers of a model, name → (in, out), that are one of `targets` or end with one, as in PEFT."""
    endings = tuple(f".{target}" for target in targets)
    return {name: shape for name, shape in shapes.items() if name in targets or name.endswith(endings)}


#: What a fused layer of attention is called, where there is no `q_proj`.
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "in_proj", "att_proj")
_OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo")


def chosen_targets(shapes: Mapping[str, tuple[int, int]], asked: tuple[str, ...]) -> tuple[str, ...]:
    """The last names of the layers to train: those asked for; by default those of attention, or else all.

    Raises `InvalidRequest` for one that the model has not, or whose layers no adapter applies to (experts).
    """
    missing = [target for target in asked if not target_shapes(shapes, (target,))]
    if not missing:
        return asked
    names = sorted({name.rsplit(".", 1)[-1] for name in shapes})
    if asked != DEFAULT_TARGETS:
        raise InvalidRequest(
            f"targets: {missing[0]} given; the model has no such layer that LoRA may change. {', '.join(names)} are"
        )
    found = tuple(name for name in names if name in (*asked, *_FUSED, *_OUT))
    return found or tuple(names)


def initialise(
    config: LoraConfig, shapes: Mapping[str, tuple[int, int]], seed: int, squares: Mapping[str, mx.array] | None = None
) -> LoraWeights:
    """A fresh adapter that changes nothing yet: A uniform in ±1/√in as in PEFT, B zero, m the norms of the base.

    `shapes`: (in, out) of the model's layers; `squares`: for DoRA, the `square_norms` of those that are changed. The
    same seed, the same A.
    """
    random = np.random.default_rng(seed)
    matrices: Matrices = {}
    for name, (width_in, width_out) in sorted(target_shapes(shapes, config.targets).items()):
        bound = width_in**-0.5
        a = random.uniform(-bound, bound, (width_in, config.rank)).astype(np.float32)
        matrices[name] = {"a": mx.array(a), "b": mx.zeros((config.rank, width_out))}
        if squares is not None:
            matrices[name]["m"] = mx.sqrt(squares[name])
    return LoraWeights(config, matrices)


def square_norms(linear: Linear) -> mx.array:
    """The sum of squares of each output's frozen weights, (out,), float32; evaluated, so that W is not kept dense. Of a
    layer whose inputs ranks share, all of them ask for it at the same time."""
    norms = linear.total(mx.sum(mx.square(linear.dense().astype(mx.float32)), axis=0))
    mx.eval(norms)
    return norms


def adapted_norms(
    linear: Linear, squares: mx.array, sides: Mapping[str, mx.array], scale: float, dtype: mx.Dtype
) -> mx.array:
    """‖W + s·AB‖ of each output, (out,), from `squares` = `square_norms(linear)`. `dtype`: what the layer computes in.

    The sum is never made: ‖w + s·Ab‖² = ‖w‖² + 2s·(wᵀA)·b + s²·bᵀ(AᵀA)b, which costs what `rank` more tokens would,
    and asks of W only its product, so W may have any form. Together, as `square_norms`.
    """
    a, b = sides["a"], sides["b"]
    rows = linear(a.T.astype(dtype))
    if linear.bias is not None:
        rows = rows - linear.bias
    cross = mx.sum(rows.astype(b.dtype) * b, axis=0)
    own = mx.sum((linear.total(a.T @ a) @ b) * b, axis=0)
    # Rounding may take an output without weights below zero.
    return mx.sqrt(mx.maximum(squares + 2.0 * scale * cross + scale**2 * own, 1e-30))


class TrainableLora:
    """An adapter in the forward pass of training: one for all rows, differentiable in its matrices.

    `linears` is needed for DoRA alone: name → frozen layer. `squares`: name → its `square_norms`.
    `dropout` p sets each input of A to 0 with probability p and divides the others by 1 − p; its draws depend on `key`
    and on the layer alone. `drawn`: (examples, first), where x has the examples of a larger batch from `first` on: the
    draws are those that they have in it. `shard`: where `matrices` are a rank's parts of an adapter, whose inputs have
    the draws of the whole.
    """

    apart = True

    def __init__(
        self,
        matrices: Matrices,
        scale: float,
        *,
        linears: Mapping[str, Linear] | None = None,
        squares: Mapping[str, mx.array] | None = None,
        dropout: float = 0.0,
        keys: Mapping[str, mx.array] | None = None,
        drawn: tuple[int, int] | None = None,
        shard: Shard | None = None,
    ) -> None:
        self._matrices, self._scale, self._shard = matrices, scale, shard
        self.anchor: mx.array | None = next(iter(next(iter(matrices.values())).values())).reshape(-1)[0]
        self._linears, self._squares = linears or {}, squares or {}
        self._dropout, self._keys, self._drawn = dropout, keys or {}, drawn

    def apply(self, name: str, x: mx.array, y: mx.array) -> mx.array:
        """`x`: (rows, tokens, in), the layer's input; `y`: (rows, tokens, out), what the frozen layer made of it."""
        sides = self._matrices.get(name)
        if sides is None:
            return y
        # The master weights are float32; they are multiplied in what the model computes in.
        a, b = sides["a"].astype(x.dtype), sides["b"].astype(x.dtype)
        within = self._dropped(name, x) @ a
        within = within if self._scale == 1.0 else self._scale * within
        if "m" not in sides:
            return mx.addmm(y, within, b)
        update = within @ b
        linear = self._linears[name]
        norms = mx.stop_gradient(adapted_norms(linear, self._squares[name], sides, self._scale, x.dtype))
        gain = (sides["m"] / norms).astype(y.dtype)
        if linear.bias is None:
            return gain * (y + update)
        return gain * (y - linear.bias + update) + linear.bias

    def _dropped(self, name: str, x: mx.array) -> mx.array:
        if not self._dropout:
            return x
        (rows, tokens, width), shard = x.shape, self._shard
        examples, first = self._drawn or (rows, 0)
        whole = width if shard is None else shard.whole(name, (0, width))[1]
        kept = mx.random.bernoulli(1.0 - self._dropout, (examples, tokens, whole), key=self._keys[name])
        kept = kept[first : first + rows]
        if shard is not None and whole != width:
            kept = kept[..., shard.own(whole)]
        return mx.where(kept, x * (1.0 / (1.0 - self._dropout)), mx.zeros_like(x))


def dropout_keys(names: Iterable[str], key: mx.array) -> dict[str, mx.array]:
    """A key for each layer, from one of the step's."""
    ordered = sorted(names)
    return dict(zip(ordered, mx.random.split(key, len(ordered)), strict=True))
