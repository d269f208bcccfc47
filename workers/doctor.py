"""What `stoker doctor` asks of the engine's process: `python -m workers.doctor` prints a JSON list of checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stoker.catalogue import parse_models
from stoker.errors import ConfigError, ModelError
from stoker.settings import load_settings
from workers.machine import boot_blas


def checks() -> list[dict[str, Any]]:
    settings = load_settings()
    report = boot_blas(settings)
    from engine.platform.probe import describe_device

    found = [
        {"name": "mlx", "ok": True, "detail": describe_device()},
        {"name": "blas", "ok": True, "detail": str(report)},
        kernels_check(settings.kernels),
    ]
    return found + [_model_check(*model) for model in parse_models(settings.models).items()]


def kernels_check(setting: str) -> dict[str, Any]:
    from engine.platform.probe import choose_kernels, describe_kernels

    try:
        choose_kernels(setting)
        return {"name": "kernels", "ok": True, "detail": describe_kernels()}
    except ConfigError as error:
        return {"name": "kernels", "ok": False, "detail": str(error)}


def _model_check(name: str, sources: Sequence[str]) -> dict[str, Any]:
    from engine.checkpoints.sources import resolve

    try:
        return {"name": "model", "ok": True, "detail": f"{name}: {resolve(sources)}"}
    except ModelError as error:
        return {"name": "model", "ok": False, "detail": str(error)}


if __name__ == "__main__":
    print(json.dumps(checks()))
