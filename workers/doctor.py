"""What `stoker doctor` asks of the engine's process: `python -m workers.doctor` prints a JSON list of checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.catalogue import parse_models
from stoker.errors import ConfigError, ModelError
from stoker.local.checks import Check
from stoker.settings import Settings, load_settings
from workers.machine import boot_blas

if TYPE_CHECKING:
    from engine.platform.blas import BlasReport


def checks() -> list[Check]:
    settings = load_settings()
    blas = blas_check(boot_blas(settings))
    from engine.platform.probe import describe_device

    found = [Check("mlx", True, describe_device()), blas, kernels_check(settings.kernels)]
    return found + [_model_check(settings, *model) for model in parse_models(settings.models).items()]


def blas_check(report: BlasReport) -> Check:
    """After `boot_blas`: MLX is bound to the BLAS that was found then."""
    from engine.platform import blas

    shown = report.detail + (f", {report.threads} threads, {report.library}" if report.active else "")
    if report.active and not blas.verify():
        detail = f"{shown}, and MLX does not use it: expect a thirtieth of its speed"
        return Check("blas", False, detail, "unset LD_PRELOAD, or name an OpenBLAS with STOKER_BLAS")
    return Check("blas", True, shown)


def kernels_check(setting: str) -> Check:
    """What STOKER_KERNELS = `setting` chooses."""
    from engine.platform.probe import choose_kernels, describe_kernels

    try:
        choose_kernels(setting)
    except ConfigError as error:
        return Check("kernels", False, str(error), "correct STOKER_KERNELS")
    return Check("kernels", True, describe_kernels())


def _model_check(settings: Settings, name: str, sources: Sequence[str]) -> Check:
    from engine.checkpoints.sources import resolve
    from engine.platform.probe import device

    dense = "16 bit" if settings.dtype in ("float16", "bfloat16") else "32 bit"
    try:
        path = resolve(sources)
    except ModelError as error:
        return Check("model", False, str(error), f"`stoker models pull {name}`, or correct STOKER_MODELS")
    return memory_check(name, path, dense if device() == "cpu" else "stored")


def memory_check(name: str, path: Path, form: str, machine: int | None = None) -> Check:
    """Whether a model's weights, in the form in which they are held (`Inspection.weight_bytes`), fit into the memory
    that MLX may use: `machine` bytes, None: those of this machine."""
    from engine.checkpoints.inspecting import inspect
    from engine.platform.probe import memory

    try:
        needed = inspect(path).weight_bytes[form]
    except ModelError as error:
        return Check("model", False, f"{name}: {error}", f"`stoker models verify {name}` says more")
    has = machine or memory()
    detail = f"{name}: {path}, {needed / 2**30:.2f} of {has / 2**30:.1f} GB"
    remedy = "serve a quantized copy (`stoker models quantize`), or a smaller model"
    return Check("model", needed < has, detail, "" if needed < has else remedy)


if __name__ == "__main__":
    print(json.dumps([asdict(check) for check in checks()]))
