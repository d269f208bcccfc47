"""Which back-end runs, what STOKER_KERNELS turns off, and that what a kernel cannot take falls back and is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from kernels import backend, registry
from kernels.add_rms_norm import KERNEL, add_rms_norm
from kernels.emulator.observe import observing
from kernels.lora import LoraSides
from kernels.lora_swiglu import LoraSwigluInput, lora_swiglu
from kernels.registry import KERNELS, NAMES

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _all_in_use() -> Iterator[None]:
    yield
    registry.use("auto")


def test_on_a_cpu_the_reference_runs_under_every_setting() -> None:
    for setting in ("auto", "sample", "off"):
        registry.use(setting)
        assert {kernel.backend for kernel in KERNELS.values()} == {"reference"}


def test_on_a_gpu_the_setting_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "of_machine", lambda: "metal")
    for setting, active in (("auto", set(NAMES)), ("off", set()), ("lora, Sample", {"lora", "sample"})):
        registry.use(setting)
        assert {name for name, kernel in KERNELS.items() if kernel.active} == active


def test_where_nothing_was_chosen_all_are_in_use() -> None:
    code = (
        "from kernels import backend; from kernels.registry import KERNELS; backend.of_machine = lambda: 'metal'\n"
        "assert all(kernel.active for kernel in KERNELS.values())"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_setting_with_a_name_that_there_is_not_says_which_there_are() -> None:
    with pytest.raises(ValueError, match=r"STOKER_KERNELS='lora,lore': there is no kernel lore; .*sample, attend"):
        registry.use("lora,lore")
    assert all(name in registry.parse("") for name in NAMES), "what was refused changed nothing"


def test_what_a_kernel_cannot_take_falls_back_and_is_counted() -> None:
    x, w = mx.ones((2, 8), mx.float32), mx.ones(8, mx.float16)
    before = KERNEL.fallbacks.total()
    with backend.using("emulator"), observing() as launches:
        h, y = add_rms_norm(x, x, w.astype(mx.float32), 1e-6)
        assert len(launches) == 1
        add_rms_norm(x, mx.ones(8), w.astype(mx.float32), 1e-6)
        add_rms_norm(x, x, w, 1e-6)
    assert len(launches) == 1
    assert KERNEL.fallbacks.total() == before + 2
    assert "shapes that are broadcast" in KERNEL.fallbacks
    assert h.tolist() == (x + x).tolist()
    assert y.shape == x.shape


@pytest.mark.parametrize(("rows", "groups"), [(1, 10), (8, 10), (9, 5), (32, 5)])
def test_with_many_rows_a_threadgroup_gates_as_many_outputs_as_there_are_inputs(rows: int, groups: int) -> None:
    """Each reads A of gate and up anew: of Qwen2.5-0.5B's layers 512 outputs are made of more of A than of B."""
    x, whole, sides = mx.zeros((rows, 896)), mx.zeros((rows, 2 * 4864)), LoraSides(mx.zeros((1, 896, 8)), mx.zeros(0))
    given = LoraSwigluInput(x, whole, whole, (0, 4864), 4864, mx.zeros(rows, mx.uint32), sides, sides)
    with backend.using("emulator"), observing(dry=True) as launches:
        lora_swiglu(given)
    assert [(launch.grid[0] // launch.threadgroup[0], launch.grid[1]) for launch in launches] == [(rows, groups)]


def test_a_back_end_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="it is one of metal, cuda, reference, emulator"), backend.using("rocm"):  # type: ignore[arg-type]
        pass


def test_the_check_command_prints_a_line_for_each_dtype_and_writes_a_report(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "kernels.check", "--kernel", "add_rms_norm", "--report", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "3 of 3 passed" in done.stdout
    written = json.loads(report.read_text())
    assert written["backend"] == "emulator"
    assert [(row["dtype"], row["passed"]) for row in written["checked"]] == [
        ("float32", True), ("float16", True), ("bfloat16", True),
    ]  # fmt: skip


def test_no_sanitizer_of_the_package_name_imports_mlx() -> None:
    """transformers asks a package of the name `kernels` for its version: that must not load MLX."""
    code = "import sys, kernels; sys.exit('mlx' in sys.modules or not kernels.__version__)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
