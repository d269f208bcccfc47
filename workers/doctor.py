"""What `stoker doctor` asks of the engine's process: `python -m workers.doctor` prints a JSON list of checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.catalogue import CATALOGUE, drafts_of, parse_models
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
    return [*found, *model_checks(settings), *draft_checks(settings)]


def model_checks(settings: Settings) -> list[Check]:
    """Of the models that a worker of these settings holds."""
    try:
        models = parse_models(settings.models)
    except ConfigError as error:
        return [Check("model", False, str(error), "correct STOKER_MODELS")]
    return [_model_check(settings, *model) for model in models.items()]


def draft_checks(settings: Settings, machine: int | None = None) -> list[Check]:
    """Of what drafts for models, by their headers and tokenizers. `machine`: as in `memory_check`."""
    try:
        known = {**CATALOGUE, **parse_models((*settings.models, *settings.on_demand))}
        drafts = drafts_of(settings)
    except ConfigError as error:
        # Where the models are at fault, `model_checks` says it.
        return [Check("draft", False, str(error), "correct STOKER_DRAFT_MODELS")] if settings.draft_models else []
    return [_draft_check(settings, name, known.get(name), draft, machine) for name, draft in drafts.items()]


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

    try:
        path = resolve(sources, download=False)
    except ModelError as error:
        return Check("model", False, str(error), f"`stoker models pull {name}`, or correct STOKER_MODELS")
    return memory_check(name, path, _form(settings))


def _form(settings: Settings) -> str:
    """In which weights are held, as `Inspection.weight_bytes` calls it."""
    from engine.platform.probe import device

    dense = "16 bit" if settings.dtype in ("float16", "bfloat16") else "32 bit"
    return dense if device() == "cpu" else "stored"


def _draft_check(
    settings: Settings,
    name: str,
    sources: Sequence[str] | None,
    draft: tuple[str, Sequence[str]],
    machine: int | None,
) -> Check:
    from engine.checkpoints.drafts import DraftSource, inspect_both
    from engine.platform.probe import memory

    if sources is None:
        return Check("draft", True, f"{draft[0]} drafts for {name}, if this worker is asked to load it")
    try:
        found = inspect_both(DraftSource(name, sources), DraftSource(*draft))
    except ModelError as error:
        remedy = "`stoker models pull` fetches what is not here; else correct STOKER_DRAFT_MODELS"
        return Check("draft", False, f"{draft[0]} cannot draft for {name}: {error}", remedy)
    needed, has = sum(each.weight_bytes[_form(settings)] for each in found), machine or memory()
    detail = f"{draft[0]} drafts for {name}: {found[1].path}, {needed / 2**30:.2f} of {has / 2**30:.1f} GB together"
    remedy = "take it out of STOKER_DRAFT_MODELS, or serve quantized copies (`stoker models quantize`)"
    return Check("draft", needed < has, detail, "" if needed < has else remedy)


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
