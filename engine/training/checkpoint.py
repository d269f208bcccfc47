"""Checkpoints of one run on disk: each a folder, written whole or not at all.

step-00000040/               a regular one, every `checkpoint_every` steps and at the end
    adapter_config.json, adapter_model.safetensors     the adapter, as PEFT reads it
    trainer.safetensors                                weights, optimizer, gradient accumulated so far
    stoker.json                                        what else the state is, and what it was made of
paused-00000043-00000044/    the same, by reports and micro-steps: where a stopping worker left the run
best-00000035/               the adapter alone, of the step with the least held-out loss
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from engine.adapters import peft
from engine.adapters.lora import LoraWeights
from engine.platform.jsonfiles import NOTES_FILE, read_object, write_json
from engine.training.carried import BEST_STEP, KEEP, PAUSED, STATE, STATE_FILE, STEP, best_name
from engine.training.state import TrainState
from engine.weights import safetensors
from stoker.errors import ModelError
from stoker.files.durable import draft_folder, flush, make_folders, publish, remove_folder


class Checkpoints:
    """Those of one run, under `root`. `made_of` (model, base, request) is written into each, and must be that of any
    that is read."""

    def __init__(self, root: Path, made_of: Mapping[str, Any]) -> None:
        self._root, self._made_of = root, dict(made_of)
        make_folders(root)

    def save(self, state: TrainState, adapter: LoraWeights) -> None:
        """Write a regular checkpoint, to which a run that diverges is rolled back, and drop those before."""
        self.write(f"{STEP}{state.step:08}", state, adapter)
        regular = sorted(path.name for path in self._own(STATE) if path.name.startswith(STEP))[-KEEP:]
        # What was paused is behind the run now.
        kept = {*regular, best_name(state.best_step)}
        for path in [*self._own(STATE), *self._own(BEST_STEP)]:
            if path.name not in kept:
                remove_folder(path)

    def pause(self, state: TrainState, adapter: LoraWeights) -> None:
        """Write a checkpoint to go on from, wherever in a step the run is."""
        name = f"{PAUSED}{state.reports:08}-{state.micro:08}"
        self.write(name, state, adapter)

    def write(self, name: str, state: TrainState, adapter: LoraWeights) -> None:
        """Write one under this name, and drop none."""
        self._write(name, lambda draft: self._fill(draft, state, adapter))

    def save_best(self, step: int, adapter: LoraWeights) -> None:
        """Keep the adapter of the best step so far, and of those before what a state that is kept goes back to."""
        # One that is there comes from before a rollback.
        remove_folder(self._root / best_name(step))
        self._write(best_name(step), lambda draft: peft.write(draft, self._made_of["model"], adapter))
        states = map(self._numbers, self._own(STATE))
        kept = {best_name(step), *(best_name(numbers.get("best_step", 0)) for numbers in states)}
        for path in self._own(BEST_STEP):
            if path.name not in kept:
                remove_folder(path)

    def best(self, step: int, shapes: Mapping[str, tuple[int, int]]) -> LoraWeights:
        """Raises `ModelError` if it is not there."""
        return peft.read(self._root / best_name(step), shapes)

    def newest(self) -> tuple[TrainState | None, TrainState | None]:
        """The newest state, and that of the newest regular checkpoint; None where there is none yet.

        Raises `ModelError` for a damaged checkpoint, or one that was made of something else.
        """
        found = {path.name: self._numbers(path) for path in self._own(STATE)}
        latest = max(found, key=lambda name: (found[name]["reports"], found[name]["micro"]), default=None)
        regular = max((name for name in found if name.startswith(STEP)), default=None)
        anchor = self._state(regular, found[regular]) if regular else None
        if latest is None or latest == regular:
            return anchor, anchor
        return self._state(latest, found[latest]), anchor

    def _own(self, named: re.Pattern[str]) -> list[Path]:
        """The folders of these names. What people put next to them, as a copy of one, is neither read nor deleted."""
        return [path for path in self._root.iterdir() if named.fullmatch(path.name)]

    def _fill(self, draft: Path, state: TrainState, adapter: LoraWeights) -> None:
        peft.write(draft, self._made_of["model"], adapter)
        safetensors.write(draft / STATE_FILE, state.arrays)
        notes = {
            "global_step": state.step,
            "loss": state.last_loss,
            "learning_rate": state.last_rate,
            "timestamp": time.time(),
            "made_of": self._made_of,
            "state": state.numbers,
        }
        write_json(draft / NOTES_FILE, notes)

    def _write(self, name: str, fill: Callable[[Path], object]) -> None:
        """One that is there already stays: runs repeat bit for bit, so it is the same."""
        if (self._root / name).exists():
            # The process that renamed it may have died before it was on disk.
            flush(self._root)
            return
        with draft_folder(self._root) as draft:
            fill(draft)
            publish(draft, self._root / name)

    def _numbers(self, path: Path) -> dict[str, Any]:
        notes = read_object(path / NOTES_FILE)
        made_of = notes.get("made_of")
        if made_of != self._made_of:
            differing = [name for name, value in self._made_of.items() if dict(made_of or {}).get(name) != value]
            raise ModelError(
                f"{path}: made of another {' and '.join(differing)} than this run. "
                f"Start a new run, or delete {self._root.parent}."
            )
        numbers = notes.get("state")
        if not isinstance(numbers, dict) or not all(
            isinstance(numbers.get(name), int) for name in ("reports", "micro")
        ):
            raise ModelError(f"{path / NOTES_FILE}: holds no state of a run.")
        return numbers

    def _state(self, name: str, numbers: dict[str, Any]) -> TrainState:
        arrays = safetensors.read(self._root / name / STATE_FILE)
        mx.eval(arrays)
        try:
            return TrainState.of(arrays, numbers)
        except (KeyError, TypeError) as error:
            raise ModelError(f"{self._root / name}: no whole state of a run ({error}).") from None
