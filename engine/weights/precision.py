"""In which numbers a model is held and computed: a policy by device, and the flags that override it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import mlx.core as mx

from engine.platform.compiler import on_cpu
from engine.weights.quantized import Form
from engine.weights.tensors import Quantization
from stoker.errors import ModelError

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
#: What `quantize` may be. "keep": matrices stay as the file has them; "none": everything is dense.
QUANTIZE = ("4bit", "8bit", "keep", "none")
#: What `kv_bits` may be. 16: keys and values stay in what the model is computed in, which on a CPU has 32.
KV_BITS = (16, 8, 4)


@dataclass(frozen=True)
class Precision:
    """What the caller asks for; None leaves it to the policy.

    The policy, on GPUs: the file's own 16-bit dtype, else bfloat16; matrices that are stored quantized stay so. On the
    CPU back-end: float32 and dense, because its 16-bit and quantized products are 2 to 50 times slower than its dense
    ones; that costs up to 8 times the memory of a file of 4 bits. Encoders: float32 everywhere, because they are small
    and their vectors are compared with vectors made elsewhere.
    """

    dtype: mx.Dtype | None
    #: None: everything dense.
    quantization: Quantization | None
    #: Bits of the numbers of keys and values.
    kv_bits: int = 16

    @classmethod
    def of(
        cls, dtype: str | None = None, quantize: str | None = None, group_size: int = 64, kv_bits: int = 16
    ) -> Precision:
        """From the names of `DTYPES` and `QUANTIZE`, and of `KV_BITS`. Raises `ModelError` for another.

        "4bit" and "8bit" quantize every matrix whose rows fall into groups of `group_size` (32, 64 or 128), those that
        are stored in as few bits already excepted.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ModelError(f"dtype: {dtype!r} given; {', '.join(DTYPES)} are allowed")
        if quantize is not None and quantize not in QUANTIZE:
            raise ModelError(f"quantize: {quantize!r} given; {', '.join(QUANTIZE)} are allowed")
        if kv_bits not in KV_BITS:
            raise ModelError(f"kv_bits: {kv_bits!r} given; {', '.join(map(str, KV_BITS))} are allowed")
        quantization: Quantization | None = Quantization()
        if quantize == "none" or (quantize is None and on_cpu()):
            quantization = None
        elif quantize in ("4bit", "8bit"):
            bits = int(quantize[0])
            quantization = Quantization(bits, Form(group_size, bits).group_size)
        return cls(None if dtype is None else DTYPES[dtype], quantization, kv_bits)

    def for_encoder(self) -> Precision:
        """The same for an embedding model: always dense, because a worker holds both kinds with one policy,
        and these models are small."""
        return replace(self, dtype=self.dtype or mx.float32, quantization=None, kv_bits=16)

    def dtype_for(self, stored: Iterable[mx.array]) -> mx.Dtype:
        """The dtype to compute in, for a file that holds the arrays `stored`."""
        if self.dtype is not None:
            return self.dtype
        if on_cpu():
            return mx.float32
        sizes: Counter[mx.Dtype] = Counter()
        for array in stored:
            if array.dtype in (mx.float16, mx.bfloat16):
                sizes[array.dtype] += array.size
        return sizes.most_common(1)[0][0] if sizes else mx.bfloat16
