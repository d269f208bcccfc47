"""What a body cannot take is refused by a reason of its own, and what was chosen for a while is forgotten behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels import backend
from kernels.attend import AttendInput, unfit
from kernels.attend_stored import StoredAttention
from kernels.cuda import text
from kernels.emulator import observe
from kernels.kernel import Kernel
from kernels.lora import LoraInput, LoraSides
from kernels.lora_swiglu import LoraSwigluInput
from kernels.mean_pool import MeanPoolInput
from kernels.registry import KERNELS
from kernels.sample import SampleInput


def given(name: str, number: int = 0, dtype: mx.Dtype = mx.float32) -> tuple[Any, ...]:
    """The arguments of one of a kernel's cases."""
    return list(KERNELS[name].cases(dtype, np.random.default_rng(1)))[number].arguments


def changed(name: str, kind: Any, **fields: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Those of the first case, some of them changed."""
    made = kind(*given(name))
    return tuple(made._replace(**{field: change(getattr(made, field)) for field, change in fields.items()}))


def at(name: str, position: int, change: Callable[[Any], Any], number: int = 0) -> tuple[Any, ...]:
    arguments = list(given(name, number))
    arguments[position] = change(arguments[position])
    return tuple(arguments)


def half(array: mx.array) -> mx.array:
    return array.astype(mx.float16)


def floats(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


def integers(array: mx.array) -> mx.array:
    return array.astype(mx.int64)


def wide(width: int) -> tuple[mx.array, mx.array]:
    return mx.zeros((1, 1, width)), mx.zeros((width,))


def too_wide() -> tuple[Any, ...]:
    x, *lora, weight, eps = given("lora_add_rms_norm")
    x, weight = wide(8193)
    lora[1], lora[3] = x, mx.zeros((2, 1, 8193))
    return (x, *lora, weight, eps)


def gated(**fields: Callable[[Any], Any]) -> Callable[[], tuple[Any, ...]]:
    return lambda: changed("lora_swiglu", LoraSwigluInput, **fields)


def gated_by(**sides: Callable[[mx.array], mx.array]) -> Callable[[], tuple[Any, ...]]:
    """With some of up's sides changed."""

    def change(before: LoraSides) -> LoraSides:
        return before._replace(**{name: change(getattr(before, name)) for name, change in sides.items()})

    return gated(up_sides=change)


#: The first of `attend`'s cases that is packed, in 8 bits.
PACKED = 10
REFUSED: dict[str, tuple[str, Callable[[], tuple[Any, ...]], str]] = {
    "a sum that is broadcast": ("add_layer_norm", lambda: at("add_layer_norm", 1, lambda x: x[..., :1]), "broadcast"),
    "a row that is broadcast": ("add_rms_norm", lambda: at("add_rms_norm", 1, lambda x: x[:1], 3), "broadcast"),
    "two dtypes of a norm": ("add_layer_norm", lambda: at("add_layer_norm", 2, half), "dtypes differ"),
    "two dtypes of a sum": ("add_rms_norm", lambda: at("add_rms_norm", 1, half), "dtypes differ"),
    "an eps of 0": ("add_rms_norm", lambda: at("add_rms_norm", 3, lambda eps: 0.0), "eps"),
    "offsets of 64 bits": ("attend", lambda: changed("attend", AttendInput, offset=integers), "int32"),
    "an offset too few": ("attend", lambda: changed("attend", AttendInput, offset=lambda o: o[:-1]), "int32"),
    "periods of 16 bits": ("attend", lambda: changed("attend", AttendInput, period=half), "periods"),
    "storage by rows": ("attend", lambda: changed("attend", AttendInput, stored=lambda s: s[None]), "shapes"),
    "storage without the layer": ("attend", lambda: changed("attend", AttendInput, stored=lambda s: s[:5]), "shapes"),
    "a segment too few": ("attend", lambda: changed("attend", AttendInput, segment=lambda s: s[:-1]), "(rows, 3)"),
    "starts alone": ("attend", lambda: changed("attend", AttendInput, segment=lambda s: s[:, 0]), "(rows, 3)"),
    "segments of 64 bits": ("attend", lambda: changed("attend", AttendInput, segment=integers), "(rows, 3)"),
    "two dtypes of attention": ("attend", lambda: changed("attend", AttendInput, stored=half), "dtypes differ"),
    "words of more bits": ("attend", lambda: changed("attend", AttendInput, bits=lambda _: 8), "shapes"),
    "words of half as many bits": ("attend", lambda: at("attend", -1, lambda _: 4, PACKED), "shapes"),
    "numbers in the place of words": ("attend", lambda: at("attend", 3, floats, PACKED), "dtype"),
    "numbers among words": ("attend", lambda: at("attend", 4, floats, PACKED), "dtypes differ"),
    "no scale": ("attend", lambda: changed("attend", AttendInput, scale=lambda scale: 0.0), "scale"),
    "two tokens a row": (
        "attend_stored",
        lambda: changed("attend_stored", StoredAttention, q=lambda q: mx.repeat(q, 2, axis=2)),
        "shapes",
    ),
    "values of another shape": (
        "attend_stored",
        lambda: changed("attend_stored", StoredAttention, values=lambda v: v[:, :, 1:]),
        "shapes",
    ),
    "stored offsets of 64 bits": (
        "attend_stored",
        lambda: changed("attend_stored", StoredAttention, offset=integers),
        "int32",
    ),
    "a stored offset too few": (
        "attend_stored",
        lambda: changed("attend_stored", StoredAttention, offset=lambda o: o[:-1]),
        "int32",
    ),
    "stored words of more bits": (
        "attend_stored",
        lambda: changed("attend_stored", StoredAttention, bits=lambda _: 8),
        "shapes",
    ),
    "stored numbers in the place of words": ("attend_stored", lambda: at("attend_stored", 2, floats, -1), "dtypes dif"),
    "heads that fill no words": ("pack_kv", lambda: (mx.zeros((1, 1, 1, 12)),) * 2 + (8,), "heads of 12"),
    "values of another length": ("pack_kv", lambda: at("pack_kv", 1, lambda v: v[:, :, :0]), "shapes"),
    "no new tokens": ("pack_kv", lambda: (mx.zeros((1, 1, 0, 64)),) * 2 + (8,), "shapes"),
    "keys of integers": ("pack_kv", lambda: (mx.zeros((1, 1, 1, 64), mx.int32),) * 2 + (8,), "dtype"),
    "logits of integers": ("greedy", lambda: at("greedy", 0, integers), "dtype"),
    "a row of no logits": ("greedy", lambda: at("greedy", 0, lambda x: x[:, :0]), "shape"),
    "two tokens to adapt": (
        "lora",
        lambda: changed("lora", LoraInput, x=lambda x: mx.repeat(x, 2, axis=1)),
        "more than one token",
    ),
    "a rank of 65": (
        "lora",
        lambda: changed("lora", LoraInput, a=lambda a: mx.zeros((2, 8, 65)), b=lambda b: mx.zeros((2, 65, 40))),
        "rank 65",
    ),
    "indices of 64 bits": ("lora", lambda: changed("lora", LoraInput, indices=integers), "indices"),
    "an adapter of integers": ("lora", lambda: changed("lora", LoraInput, b=integers), "dtype"),
    "a row that is too wide": ("lora_add_rms_norm", too_wide, "width 8193"),
    "a residual of one": ("lora_add_rms_norm", lambda: at("lora_add_rms_norm", 0, lambda x: x[..., :1]), "shapes"),
    "a norm of another dtype": ("lora_add_rms_norm", lambda: at("lora_add_rms_norm", 8, half), "dtypes differ"),
    "five rows": ("norm_project", lambda: at("norm_project", 0, lambda x: mx.repeat(x, 5, axis=0)), "shape (5, 8)"),
    "rows of several tokens": ("norm_project", lambda: at("norm_project", 0, lambda x: x[:, None]), "shape (1, 1, 8)"),
    "rows of integers": ("norm_project", lambda: at("norm_project", 0, integers), "dtype"),
    "a row that fills no words": ("norm_project", lambda: at("norm_project", 0, lambda x: x[:, :6]), "1 rows of 6"),
    "rows that a threadgroup cannot hold": (
        "norm_project",
        lambda: (*[mx.zeros((2, 4096))] * 2, mx.zeros(4096), mx.zeros((2, 4096)), None, 1e-6),
        "2 rows of 4096",
    ),
    "weights that take long to read": (
        "norm_project",
        lambda: (*[mx.zeros((1, 1024))] * 2, mx.zeros(1024), mx.zeros((32770, 1024)), None, 1e-6),
        "weights",
    ),
    "gate without up": ("norm_project", lambda: at("norm_project", 3, lambda m: m[:1]), "a gate without up"),
    "a gate with a bias": ("norm_project", lambda: at("norm_project", 4, lambda _: mx.zeros(1)), "or with a bias"),
    "a bias of other outputs": ("norm_project", lambda: at("norm_project", 4, lambda b: b[:0], 6), "do not fit"),
    "no outputs": ("norm_project", lambda: at("norm_project", 3, lambda m: m[:0], 5), "weights of shape"),
    "weights of 16 bits": ("norm_project", lambda: at("norm_project", 3, half), "dtypes differ"),
    "a residual of fewer": ("norm_project", lambda: at("norm_project", 1, lambda r: r[:, :4]), "do not fit"),
    "an eps of 0 before a product": ("norm_project", lambda: at("norm_project", 5, lambda _: 0.0), "eps"),
    "two tokens to gate": (
        "lora_swiglu",
        gated(**dict.fromkeys(("x", "gate", "up"), lambda x: mx.repeat(x[:, None], 2, axis=1))),
        "more than one token",
    ),
    "a gate of fewer rows": ("lora_swiglu", gated(gate=lambda gate: gate[:0]), "shapes"),
    "an up that ends too soon": ("lora_swiglu", gated(up=lambda up: up[:, :-1]), "shapes"),
    "a gate and an up of two dtypes": ("lora_swiglu", gated(up=half), "dtypes differ"),
    "nothing to adapt": (
        "lora_swiglu",
        gated(gate_sides=lambda _: None, up_sides=lambda _: None),
        "no adapters",
    ),
    "two ranks of gate and up": ("lora_swiglu", gated_by(a=lambda a: mx.repeat(a, 2, axis=2)), "several shapes"),
    "two dtypes of adapters": ("lora_swiglu", gated_by(a=half), "dtypes differ"),
    "an up's adapter of integers": ("lora_swiglu", gated_by(b=integers), "dtype"),
    "a gate's rank of 65": (
        "lora_swiglu",
        gated(gate_sides=lambda _: LoraSides(mx.zeros((2, 8, 65)), mx.zeros((2, 65, 40))), up_sides=lambda _: None),
        "rank 65",
    ),
    "a gate's indices of 64 bits": ("lora_swiglu", gated(indices=integers), "indices"),
    "lengths of 64 bits": ("mean_pool", lambda: changed("mean_pool", MeanPoolInput, lengths=integers), "lengths"),
    "a text without its residual": (
        "mean_pool",
        lambda: changed("mean_pool", MeanPoolInput, residual=lambda r: r[:, :, :1]),
        "shapes",
    ),
    "a vector that is too wide": (
        "mean_pool",
        lambda: (*[mx.zeros((1, 1, 2049))] * 2, *[mx.zeros(2049)] * 2, mx.array([1], mx.int32), 1e-5),
        "width 2049",
    ),
    "a grammar of fewer tokens": (
        "sample",
        lambda: changed("sample", SampleInput, allowed=lambda _: mx.zeros((1, 4999 // 32), mx.uint32)),
        "grammar",
    ),
    "top-k of 64 bits": ("sample", lambda: changed("sample", SampleInput, top_k=integers), "top_k"),
    "a temperature of 16 bits": ("sample", lambda: changed("sample", SampleInput, temperature=half), "float32"),
    "one token to draw from": ("sample", lambda: changed("sample", SampleInput, logits=lambda x: x[:, :1]), "shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_body_cannot_take_is_refused_by_its_reason(name: str) -> None:
    kernel, arguments, words = REFUSED[name]
    assert words in (KERNELS[kernel].refuse(*arguments()) or "it is taken")


@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_says_that_it_takes_is_not_refused(name: str) -> None:
    kernel: Kernel = KERNELS[name]
    for dtype in kernel.dtypes:
        cases = list(kernel.cases(dtype, np.random.default_rng(1)))
        assert {kernel.refuse(*case.arguments) for case in cases} == {None}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype", "bits", "fits"),
    [
        (14, 2, 64, mx.float32, 16, True),
        (8, 8, 16, mx.float16, 16, True),
        # 24 lanes of 4 numbers: a lane's neighbours are found by powers of two.
        (4, 4, 96, mx.float32, 16, False),
        (4, 4, 96, mx.float16, 16, False),
        (4, 4, 60, mx.float16, 16, False),
        (4, 4, 256, mx.float32, 16, False),
        (4, 4, 256, mx.float16, 16, True),
        (5, 2, 64, mx.float32, 16, False),
        (17, 1, 64, mx.float32, 16, False),
        # Packed, a lane has eight numbers of any dtype.
        (4, 4, 256, mx.float32, 4, True),
        (4, 4, 8, mx.float32, 8, True),
        (4, 4, 4, mx.float32, 8, False),
        (4, 4, 96, mx.float16, 8, False),
    ],
)
def test_heads_fit_whose_numbers_are_a_power_of_two_of_lanes(
    heads: int, kv_heads: int, dim: int, dtype: mx.Dtype, bits: int, fits: bool
) -> None:
    assert (unfit(heads, kv_heads, dim, dtype, bits) is None) is fits


class Broken(Exception):
    pass


def test_a_back_end_and_what_observes_it_are_those_of_before_also_when_something_fails_within() -> None:
    x = mx.ones((1, 4))
    arguments = (x, x, mx.ones(4), 1e-6)
    with observe.observing(dry=True) as outer:
        with pytest.raises(Broken), backend.using("emulator"), observe.observing() as inner:
            raise Broken
        assert {kernel.backend for kernel in KERNELS.values()} == {backend.of_machine()}
        with backend.using("emulator"):
            h, _ = KERNELS["add_rms_norm"](*arguments)
        assert (len(outer), len(inner)) == (1, 0)
        assert h.tolist() == mx.zeros_like(x).tolist(), "dry still"


def test_a_kernel_for_cuda_has_its_parameters_as_constants_of_their_own_types() -> None:
    made = text.whole(
        "k",
        "y[0] = x[0] * N;",
        "",
        [("x", mx.float16)],
        [("y", mx.bool_)],
        [("N", 3), ("ON", True), ("T", mx.bfloat16)],
    )
    assert "constexpr int N = 3;" in made
    assert "constexpr bool ON = true;" in made
    assert "using T = __nv_bfloat16;" in made
    assert "const __half* x" in made
    assert "bool* y" in made
