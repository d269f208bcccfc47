"""What `stoker models` asks of the engine, in a process of its own: `python -m workers.models_tool COMMAND JSON`.

Prints one JSON object: what the command found, or `{"error": {"name", "message"}}`. Progress goes to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.checkpoints.sources import resolve
from stoker.contract import TrainRequest
from stoker.errors import InvalidRequest, StokerError
from stoker.settings import load_settings
from workers.machine import boot_blas


def pull(sources: Sequence[str]) -> dict[str, Any]:
    """Download, if it is on the hub; the local path."""
    return {"path": str(resolve(sources))}


def inspect(sources: Sequence[str]) -> dict[str, Any]:
    from engine.checkpoints.inspecting import inspect as look

    return look(resolve(sources, download=False)).to_json()


def verify(sources: Sequence[str]) -> dict[str, Any]:
    from engine.checkpoints.verifying import verify as check

    path = resolve(sources, download=False)
    found = check(path, _show if sys.stderr.isatty() else lambda done, total: None)
    return {"path": str(path), "ok": True, "tensors": found.tensors, "numbers": found.numbers}


def quantize(
    sources: Sequence[str], target: str, bits: int | None, group_size: int | None, mode: str, recipe: str | None
) -> dict[str, Any]:
    from engine.checkpoints.quantizing import quantize_folder

    source = resolve(sources)
    try:
        done = quantize_folder(source, Path(target).expanduser().absolute(), bits, group_size, mode, recipe)
    except OSError as error:
        raise InvalidRequest(f"{target}: cannot be written: {error}") from error
    return {**asdict(done), "path": str(done.path)}


def export(sources: Sequence[str], adapter: str, target: str) -> dict[str, Any]:
    from engine.adapters.merging import merge

    try:
        done = merge(sources, Path(adapter), Path(target).expanduser().absolute())
    except OSError as error:
        raise InvalidRequest(f"{target}: cannot be written: {error}") from error
    return {**asdict(done), "path": str(done.path)}


def plan(sources: Sequence[str], dataset: str, request: dict[str, Any]) -> dict[str, Any]:
    # Before MLX is imported, as in a worker: what is measured shall be a worker's.
    boot_blas(load_settings())
    from engine.training.planning import plan as look

    return look(sources, Path(dataset), TrainRequest(**request))


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "pull": pull,
    "inspect": inspect,
    "verify": verify,
    "quantize": quantize,
    "export": export,
    "plan": plan,
}


def _show(done: int, total: int) -> None:
    print(f"\rtensor {done + 1} of {total}", end="\n" if done + 1 == total else "", file=sys.stderr, flush=True)


def main(command: str, arguments: str) -> int:
    """Run one command; the exit code is the error's."""
    try:
        print(json.dumps(COMMANDS[command](**json.loads(arguments))))
    except StokerError as error:
        print(json.dumps({"error": {"name": type(error).__name__, "message": str(error)}}))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
