"""A small random model of the Llama family, whole or shared by ranks that are threads of this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx
import numpy as np

from engine.models.llama import Llama, LlamaArgs
from engine.models.shard import Shard
from engine.models.sharded import SharedLlama, shared
from engine.weights.tensors import Quantization, Tensors
from tests.engine import tiny

T = TypeVar("T")
#: Twelve heads and six of keys go to 2, 3 and 6 ranks; 67 rows of the vocabulary to none evenly.
ARGS = LlamaArgs(
    layers=2, dim=96, hidden=192, heads=12, kv_heads=6, head_dim=16, vocab=67, context=4096, rope_base=10_000.0,
    norm_eps=1e-5, tied=False,
)  # fmt: skip
#: Three heads over one of keys go to no two ranks; five layers go to two and to three, not as many each.
ODD = replace(ARGS, layers=5, heads=3, kv_heads=1)


def arrays(args: LlamaArgs) -> dict[str, mx.array]:
    """The tensors of a checkpoint, large enough that its tokens differ."""
    random = np.random.default_rng(0)
    width, kv_width = args.heads * args.head_dim, args.kv_heads * args.head_dim
    sides = {
        "self_attn.q_proj": (width, args.dim), "self_attn.k_proj": (kv_width, args.dim),
        "self_attn.v_proj": (kv_width, args.dim), "self_attn.o_proj": (args.dim, width),
        "mlp.gate_proj": (args.hidden, args.dim), "mlp.up_proj": (args.hidden, args.dim),
        "mlp.down_proj": (args.dim, args.hidden),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (args.vocab, args.dim)}
    ones = {"model.norm.weight": args.dim}
    for layer in range(args.layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.{part}.weight": shape for part, shape in sides.items()}
        ones |= {f"{name}.{part}_layernorm.weight": args.dim for part in ("input", "post_attention")}
        if args.qk_norm:
            ones |= {f"{name}.self_attn.{part}_norm.weight": args.head_dim for part in "qk"}
        if args.qkv_bias:
            shapes |= {f"{name}.self_attn.{part}_proj.bias": (sides[f"self_attn.{part}_proj"][0],) for part in "qkv"}
    if not args.tied:
        shapes["lm_head.weight"] = (args.vocab, args.dim)
    found = {name: random.normal(0, 1.6 * args.dim**-0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    found |= {name: random.uniform(0.5, 1.5, size).astype(np.float32) for name, size in ones.items()}
    return {name: mx.array(array) for name, array in found.items()}


def tensors(args: LlamaArgs, quantization: Quantization | None = None, groups: dict[str, int] | None = None) -> Tensors:
    found = arrays(args)
    readers: dict[str, Callable[[], mx.array]] = {name: lambda name=name: found[name] for name in found}  # type: ignore[misc]
    shapes = {name: tuple(array.shape) for name, array in found.items()}
    return Tensors(readers, shapes, "random", mx.float32, quantization, groups=groups)


def whole(args: LlamaArgs = ARGS, quantization: Quantization | None = None) -> Llama:
    return Llama(args, tensors(args, quantization))


def write(folder: Path, args: LlamaArgs = ARGS) -> Path:
    """The files of one, with a tokenizer whose text is its ids."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "model_type": args.architecture, "vocab_size": args.vocab, "hidden_size": args.dim,
        "intermediate_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads, "head_dim": args.head_dim, "max_position_embeddings": args.context,
        "rms_norm_eps": args.norm_eps, "rope_theta": args.rope_base, "tie_word_embeddings": args.tied,
        "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays(args), {"format": "mlx"})
    tiny.inner_tokenizer(args.vocab).save(str(folder / "tokenizer.json"))
    return folder


class _Meeting:
    """Where threads leave what they have, and take what all have."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.left: list[np.ndarray] = [np.zeros(0)] * size


class ThreadShard(Shard):
    """A part whose ranks are threads: what they sum is there when all have come."""

    __slots__ = ("_meeting",)

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        super().__init__(rank, len(meeting.left))
        self._meeting = meeting

    def _exchanged(self, x: mx.array) -> list[np.ndarray]:
        self._meeting.left[self.rank] = np.array(x)
        self._meeting.barrier.wait()
        found = list(self._meeting.left)
        self._meeting.barrier.wait()
        return found

    def sum(self, x: mx.array) -> mx.array:
        @mx.custom_function
        def total(x: mx.array) -> mx.array:
            return mx.array(np.sum(self._exchanged(x), axis=0))

        # As MLX's own.
        @total.vjp
        def _(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
            return cotangent

        return cast("mx.array", total(x))

    def joined(self, x: mx.array) -> mx.array:
        return mx.array(np.concatenate(self._exchanged(x), axis=-1))


def on_ranks(size: int, do: Callable[[Shard], T]) -> list[T]:
    """What each of so many ranks makes of it."""
    meeting = _Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(do, ThreadShard(rank, meeting)) for rank in range(size)]
        return [future.result(60) for future in futures]


def part(shard: Shard, args: LlamaArgs = ARGS, quantization: Quantization | None = None) -> SharedLlama:
    return shared(args, tensors(args, quantization), shard)


def changed(**changes: Any) -> LlamaArgs:
    return replace(ARGS, **changes)
