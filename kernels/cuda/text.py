"""What is put around a body for `mx.fast.cuda_kernel`, and, to compile without a GPU, what MLX puts around that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

_SHIM = (Path(__file__).parent / "shim.h").read_text("utf-8")
_THREAD = "((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x)"
#: Metal's attributes in CUDA's terms.
_ATTRIBUTES = {
    "threads_per_threadgroup": "const uint3 {} = {{blockDim.x, blockDim.y, blockDim.z}};",
    "threadgroups_per_grid": "const uint3 {} = {{gridDim.x, gridDim.y, gridDim.z}};",
    "thread_position_in_grid": "const uint3 {} = {{blockIdx.x * blockDim.x + threadIdx.x, "
    "blockIdx.y * blockDim.y + threadIdx.y, blockIdx.z * blockDim.z + threadIdx.z}};",
    "thread_position_in_threadgroup": "const uint3 {} = {{threadIdx.x, threadIdx.y, threadIdx.z}};",
    "threadgroup_position_in_grid": "const uint3 {} = {{blockIdx.x, blockIdx.y, blockIdx.z}};",
    "thread_index_in_threadgroup": f"const uint {{}} = {_THREAD};",
    "thread_index_in_simdgroup": f"const uint {{}} = {_THREAD} & 31;",
    "simdgroup_index_in_threadgroup": f"const uint {{}} = {_THREAD} >> 5;",
    "simdgroups_per_threadgroup": "const uint {} = (blockDim.x * blockDim.y * blockDim.z + 31) >> 5;",
}
_C_TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.uint8: "uint8_t",
    mx.bool_: "bool",
}


def source(body: str) -> str:
    """`body` with the attributes that it names declared: MLX declares none on CUDA."""
    declared = [line.format(name) for name, line in _ATTRIBUTES.items() if re.search(rf"\b{name}\b", body)]
    return "\n".join([*declared, '#line 1 "body"', body])


def header(shared: str) -> str:
    """The shim and then `shared`, the bodies' own header."""
    return f"{_SHIM}\n{shared}"


def whole(
    name: str,
    body: str,
    shared: str,
    inputs: Sequence[tuple[str, mx.Dtype]],
    outputs: Sequence[tuple[str, mx.Dtype]],
    template: Sequence[tuple[str, int | bool | mx.Dtype]],
) -> str:
    """The file that MLX 0.32.4 gives to NVRTC, for nvcc: to find on any machine what would not compile on a GPU.

    Bodies that name an input's `_strides` or `_ndim` are not covered.
    """
    parameters = []
    for n, dtype in inputs:
        parameters.append(f"    const {_C_TYPES[dtype]}* {n}")
        if re.search(rf"\b{n}_shape\b", body):
            parameters.append(f"    const __grid_constant__ Shape {n}_shape")
    parameters += [f"    {_C_TYPES[dtype]}* {n}" for n, dtype in outputs]
    declared = [
        f"  using {n} = {_C_TYPES[value]};" if isinstance(value, mx.Dtype) else _constant(n, value)
        for n, value in template
    ]
    return "\n".join(
        [
            "#include <cstdint>",
            "#include <cuda_bf16.h>",
            "#include <cuda_fp16.h>",
            header(shared),
            "namespace mlx::core::cu {",
            "struct Shape { int32_t sizes[10]; __device__ int32_t operator[](int i) const { return sizes[i]; } };",
            f"__global__ void custom_kernel_{name}(",
            ",\n".join(parameters) + ") {",
            *declared,
            source(body),
            "}",
            "}  // namespace mlx::core::cu",
            "",
        ]
    )


def _constant(name: str, value: int | bool) -> str:
    kind = "bool" if isinstance(value, bool) else "int"
    return f"  constexpr {kind} {name} = {str(value).lower()};"
