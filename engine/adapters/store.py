"""Adapters on disk: `ROOT/MODEL/NAME/VERSION/` in PEFT's layout, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.adapters.lora import LoraConfig, LoraWeights, Matrices, target_shapes
from engine.weights import safetensors
from engine.weights.files import sync_folder, write_whole
from stoker.errors import ModelError, UnknownAdapter

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
#: PEFT's name for our layer `layers.0.self_attn.q_proj` is this before it.
_PEFT_PREFIX = "base_model.model.model."
#: PEFT's fields that make something else of the sum, and what they are in plain LoRA.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
_PEFT_TENSOR = re.compile(re.escape(_PEFT_PREFIX) + r"(.+)\.lora_([AB])\.weight")


class AdapterStore:
    """Finds, reads and writes the adapters of every model under one root."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self, model: str) -> list[str]:
        folder = self._root / model
        return sorted(path.name for path in folder.iterdir() if self._versions(path)) if folder.is_dir() else []

    def latest(self, model: str, name: str) -> int:
        """The newest version; raises `UnknownAdapter` with the names there are."""
        versions = self._versions(self._root / model / name)
        if not versions:
            names = ", ".join(self.names(model)) or "none"
            raise UnknownAdapter(
                f"adapter {name!r} given; {model} has: {names}. Train it with `stoker train {name} --dataset FILE`."
            )
        return max(versions)

    def read(self, model: str, name: str, version: int, shapes: Mapping[str, tuple[int, int]]) -> LoraWeights:
        """Load one version and check it against the model's layers, name → (in, out)."""
        folder = self._root / model / name / str(version)
        config = _read_config(folder / CONFIG_FILE)
        return LoraWeights(config, _read_matrices(folder / WEIGHTS_FILE, config, shapes))

    def write(self, model: str, name: str, weights: LoraWeights, notes: Mapping[str, Any]) -> int:
        """Write a new version and return its number. Until the last rename nobody can see it."""
        home = self._root / model / name
        home.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=home))
        try:
            _write_files(draft, model, weights, notes)
            return self._publish(draft, home)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def _publish(self, draft: Path, home: Path) -> int:
        while True:
            version = max(self._versions(home), default=0) + 1
            try:
                # A folder cannot be renamed onto one that holds files: two writers never share a number.
                os.rename(draft, home / str(version))
            except OSError:
                if not (home / str(version)).exists():
                    raise
                continue
            sync_folder(home)
            return version

    @staticmethod
    def _versions(folder: Path) -> list[int]:
        return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def _write_files(folder: Path, model: str, weights: LoraWeights, notes: Mapping[str, Any]) -> None:
    tensors = {}
    for name, pair in weights.matrices.items():
        tensors[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = pair["a"].T
        tensors[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = pair["b"].T
    safetensors.write(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": weights.config.rank,
        "lora_alpha": weights.config.alpha,
        "target_modules": sorted(weights.config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    for name, fields in ((CONFIG_FILE, config), ("stoker.json", dict(notes))):
        text = json.dumps(fields, indent=2)
        _write_text(folder / name, text)


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text))


def _read_config(path: Path) -> LoraConfig:
    try:
        fields = json.loads(path.read_bytes())
        config = LoraConfig(int(fields["r"]), float(fields["lora_alpha"]), tuple(map(str, fields["target_modules"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: no readable PEFT configuration ({type(error).__name__}: {error}).") from None
    for name, plain in _PLAIN.items():
        if fields.get(name) not in (None, plain):
            raise ModelError(f"{path}: {name} {fields[name]!r}; only plain LoRA can be read, with {name} {plain!r}.")
    if not 1 <= config.rank <= 256:
        raise ModelError(f"{path}: rank {config.rank}; allowed: 1 to 256.")
    return config


def _read_matrices(path: Path, config: LoraConfig, shapes: Mapping[str, tuple[int, int]]) -> Matrices:
    matrices: Matrices = {}
    for tensor, array in safetensors.read(path).items():
        match = _PEFT_TENSOR.fullmatch(tensor)
        if match is None or match[1] not in shapes:
            raise ModelError(f"{path}: tensor {tensor} belongs to no layer of this model.")
        name, side = match[1], match[2].lower()
        width_in, width_out = shapes[name]
        expected = (config.rank, width_in) if side == "a" else (width_out, config.rank)
        if array.shape != expected:
            raise ModelError(f"{path}: tensor {tensor} is {array.shape}; this model and rank need {expected}.")
        matrices.setdefault(name, {})[side] = array.T
    for name in target_shapes(shapes, config.targets):
        missing = {"a", "b"} - set(matrices.get(name, {}))
        if missing:
            raise ModelError(f"{path}: layer {name} lacks lora_{' and lora_'.join(sorted(missing)).upper()}.")
    return matrices
