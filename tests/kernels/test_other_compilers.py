"""The same texts in the hands of nvcc (CUDA, sm_90) and of a clang that knows address spaces, where there is one."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kernels import check
from kernels.body import Body, Template
from kernels.cuda import text
from kernels.emulator import build
from kernels.kernel import Kernel
from kernels.registry import KERNELS
from tests.kernels.conftest import launches
from tests.kernels.test_emulator import I, launch

pytestmark = pytest.mark.slow
EVERY = [pytest.param(k, dtype, id=f"{k.name}-{str(dtype)[9:]}") for k in KERNELS.values() for dtype in k.dtypes]
CLANG = (sys.executable, "-m", "ziglang", "clang")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(("kernel", "dtype"), EVERY)
def test_nvcc_compiles_every_body_for_hopper(
    kernel: Kernel, dtype: mx.Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: dict[str, str] = {}

    def launch(self: Body, arrays: Sequence[mx.array], *, template: Template, outputs: Any, **_: Any) -> list[mx.array]:
        inputs = [(name, array.dtype) for name, array in zip(self.inputs, arrays, strict=True)]
        made = [(name, dtype) for name, (_, dtype) in zip(self.outputs, outputs, strict=True)]
        texts[f"{self.name}-{len(texts)}"] = text.whole(self.name, self.source, self.header, inputs, made, template)
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(Body, "launch", launch)
    made = check.cases(kernel, dtype, 1)
    for case in (*made[:3], *made[-4:]):
        kernel.launch(*case.arguments)
    for name, source in texts.items():
        path = tmp_path / f"{name}.cu"
        path.write_text(source)
        command = ["nvcc", "-std=c++17", "-gencode=arch=compute_90,code=sm_90", "-cubin", "-o", f"{path}bin", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


needs_clang = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed")


@needs_clang
@pytest.mark.parametrize(("kernel", "dtype"), EVERY)
def test_clang_has_nothing_against_the_address_spaces(kernel: Kernel, dtype: mx.Dtype) -> None:
    for made in launches(kernel, dtype):
        assert build.address_space_errors(made, CLANG) == []


@needs_clang
def test_clang_notices_a_pointer_of_the_wrong_address_space() -> None:
    assert build.address_space_errors(launch(I + "const float* p = x; y[i] = p[i];"), CLANG)
    assert not build.address_space_errors(launch(I + "auto p = x; y[i] = p[i];"), CLANG)
