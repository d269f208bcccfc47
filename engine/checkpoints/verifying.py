"""Whether a model is whole: headers, names and shapes against its configuration, its tokenizer, and every number.

One piece of one tensor is in memory at a time, so a model can be verified that would not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from engine.checkpoints.inspecting import KINDS, Inspection, check_blocks, check_layers, inspect
from engine.checkpoints.loading import DECODERS, GGUF_DECODERS
from engine.checkpoints.reranking import pairing_of
from engine.checkpoints.sources import naming
from engine.checkpoints.vocabulary import check_ids, check_segments
from engine.models.bridge import gguf_configs, gguf_models, gguf_weights, package, weights
from engine.models.bridge.configs import text_config
from engine.models.embedders import encoder
from engine.models.encoder import Encoder
from engine.models.heads import head_of
from engine.models.llama import Llama
from engine.models.rerank_files import RerankFiles, without_own
from engine.models.rerankers import score_heads, spec_of
from engine.models.sentence import EmbeddingSpec
from engine.models.sentence_files import model_folder, pools_decoder
from engine.platform.jsonfiles import read_config
from engine.text.tokenizer import Tokenizer
from engine.weights import safetensors, safetensors_header
from engine.weights.folder import joined
from engine.weights.gguf import GGUF
from engine.weights.gguf_names import llama_name
from engine.weights.safetensors_header import FP8
from engine.weights.tensors import Stored, Tensors
from stoker.errors import ModelError

#: dtype -> (its words, the bits of the exponent). All of them set: infinite, or no number; of 8 bits, all except the
#: sign.
_EXPONENTS = {
    "F32": ("<u4", 0x7F80_0000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), FP8: ("u1", 0x7F),
}  # fmt: skip
#: Bytes of a file that are looked at at once.
_PIECE = 16 << 20


@dataclass(frozen=True)
class Verification:
    """What was found sound: the model, how many tensors, and how many numbers were looked at."""

    inspection: Inspection
    tensors: int
    numbers: int


def verify(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Check the model at `path` throughout; `progress` gets the number of tensors done and in all.

    Raises `ModelError` that names the first defect.
    """
    inspection = inspect(path)
    if not inspection.supported:
        raise ModelError(f"{path}: {inspection.notes[0]}")
    with naming(path):
        checked = _gguf(path, progress) if path.is_file() else _folder(path, progress)
    return Verification(inspection, *checked)


class _Outline(Tensors):
    """Checks names and shapes; nothing that the layers get is ever computed."""

    def _dense(self, name: str, array: mx.array, transpose: bool) -> mx.array:
        return array.T if transpose else array


def _folder(path: Path, progress: Callable[[int, int], None]) -> tuple[int, int]:
    folder = model_folder(path)
    config = read_config(folder)
    file = package.file_of(config)
    if config.get("model_type") not in KINDS and file is not None and not pools_decoder(path, config["model_type"]):
        _bridged(folder, config, file)
        return _finite_safetensors([folder], progress)
    stored, rest = joined(folder, config, safetensors.read_folder(folder), mx.float32)
    outline = _outline(stored, folder)
    tokenizer, files = Tokenizer.from_folder(folder), RerankFiles.of(path, rest)
    model, heads = _built(path, rest, outline, files, tokenizer)
    outline.finish(ignore=model.unused)
    check_ids(folder, tokenizer, model.args.vocab)
    if files is not None and isinstance(model, Encoder):
        pairing_of(folder, files, model, tokenizer)
    elif isinstance(model, Encoder) and model.typed:
        check_segments(folder, tokenizer)
    return _finite_safetensors([folder, *heads], progress)


def _outline(stored: Mapping[str, Stored], folder: Path) -> _Outline:
    readers = {name: partial(stored.__getitem__, name) for name in stored}
    return _Outline(readers, {name: tuple(each.shape) for name, each in stored.items()}, str(folder), mx.float32)


def _bridged(folder: Path, config: Mapping[str, Any], file: str) -> None:
    """Names, shapes and tokenizer of a model that runs mlx-lm's `file`. No weight is computed."""
    check_layers(folder / "config.json", config, len(safetensors_header.entries(folder)))
    network, _ = weights.network_of(config, file)
    arrays, config = weights.translated(folder, config, safetensors.read_folder(folder), mx.float32)
    weights.fill(folder, config, network, arrays)
    rows = text_config(config).get("vocab_size")
    if isinstance(rows, int):
        check_ids(folder, Tokenizer.from_folder(folder), rows)


def _built(
    folder: Path, config: Mapping[str, Any], outline: Tensors, files: RerankFiles | None, tokenizer: Tokenizer
) -> tuple[Llama | Encoder, list[Path]]:
    """The model, and the folders of what comes behind its pooling."""
    architecture = config["model_type"]
    if files is not None:
        config = without_own(config)
        model = encoder(config, outline)
        score_heads(files, config, model, tokenizer, outline)
        spec_of(files, config, model)
        return model, []
    if architecture in DECODERS and not pools_decoder(folder, architecture):
        return Llama(DECODERS[architecture].from_config(config), outline), []
    model = encoder(config, outline)
    specs = EmbeddingSpec.from_folder(folder, model.args).heads
    for each in specs:
        head_of(each, _outline(safetensors.read_folder(each.folder), each.folder))
    return model, [each.folder for each in specs]


def _gguf(path: Path, progress: Callable[[int, int], None]) -> tuple[int, int]:
    gguf = GGUF(path)
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{path}: the tensor 'token_embd.weight' is missing")
    model = gguf_models.model_of(gguf.metadata)
    if model is None:
        _gguf_family(gguf, embedding.shape[0])
    else:
        check_blocks(gguf)
        config = gguf_configs.config_of(gguf, model)
        gguf_weights.outline(gguf, model, config, weights.network_of(config, model.file)[0])
    check_ids(path, Tokenizer.from_gguf(gguf), embedding.shape[0])
    numbers = 0
    for done, name in enumerate(gguf.tensors):
        progress(done, len(gguf.tensors))
        for values in gguf.pieces(name):
            numbers += values.size
            if not np.isfinite(values).all():
                raise ModelError(f"{path}: tensor {name!r} holds values that are infinite or no numbers")
    return len(gguf.tensors), numbers


def _gguf_family(gguf: GGUF, vocab: int) -> None:
    args = GGUF_DECODERS[gguf.metadata["general.architecture"]].from_gguf(
        gguf.metadata, vocab=vocab, tied="output.weight" not in gguf.tensors
    )
    shapes = {llama_name(name) or name: info.shape for name, info in gguf.tensors.items()}
    outline = _Outline(
        {name: partial(mx.zeros, shape) for name, shape in shapes.items()}, shapes, str(gguf.path), mx.float32
    )
    outline.finish(ignore=Llama(args, outline).unused)


def _finite_safetensors(folders: Sequence[Path], progress: Callable[[int, int], None]) -> tuple[int, int]:
    entries = [entry for folder in folders for entry in safetensors.entries(folder).items()]
    numbers = 0
    for done, (name, (file, entry)) in enumerate(entries):
        progress(done, len(entries))
        if entry["dtype"] in _EXPONENTS:
            numbers += _check_finite(file, name, entry)
    return len(entries), numbers


def _check_finite(file: Path, name: str, entry: Mapping[str, Any]) -> int:
    """How many numbers the tensor has, all of them finite."""
    words, exponent = _EXPONENTS[entry["dtype"]]
    start, end = entry["data_offsets"]
    with open(file, "rb") as data:
        data.seek(8 + int.from_bytes(data.read(8), "little") + start)
        for position in range(start, end, _PIECE):
            piece = np.frombuffer(data.read(min(_PIECE, end - position)), words)
            if (piece & exponent == exponent).any():
                raise ModelError(f"{file}: tensor {name!r} holds values that are infinite or no numbers")
    return int(end - start) // np.dtype(words).itemsize
