"""The files of weights of a model folder that is written: one, or several with their index."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from engine.platform.jsonfiles import write_json
from engine.weights import safetensors


class Shards:
    """`count`: of the files. `bytes`: of the tensors written so far."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count
        self._placement: dict[str, str] = {}
        self._written = self.bytes = 0

    def write(self, arrays: dict[str, mx.array]) -> None:
        """The next file. Raises `OSError`."""
        self._written += 1
        several = f"model-{self._written:05}-of-{self._count:05}.safetensors"
        name = several if self._count > 1 else "model.safetensors"
        safetensors.write(self._folder / name, arrays)
        self.bytes += sum(array.nbytes for array in arrays.values())
        self._placement |= dict.fromkeys(arrays, name)

    def close(self) -> None:
        """The index, where there are several. Raises `OSError`."""
        if self._count > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self._placement.items()))}
            write_json(self._folder / safetensors.INDEX_NAME, index)
