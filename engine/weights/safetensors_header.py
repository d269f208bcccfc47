"""The files and headers of safetensors (https://huggingface.co/docs/safetensors, "Format"), checked, without MLX."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from engine.platform.jsonfiles import check_depth, open_file, read_object
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: The format's own limit on the header (bytes).
MAX_HEADER = 100_000_000

#: Numbers of 8 bits, which MLX hands out as bytes.
FP8 = "F8_E4M3"
#: dtype -> bytes an element, of the dtypes that MLX can hold.
ITEM_BYTES = {
    FP8: 1, "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8,
}  # fmt: skip

INDEX_NAME = "model.safetensors.index.json"


def files(folder: Path) -> list[Path]:
    """The weight files of a model folder: `model.safetensors`, else its shards by the index, else its only such file.

    An index next to a whole file is left over from an earlier save, and files that it does not name are another
    model's; transformers reads neither. Raises `ModelError` if it is unclear which they are, or one is missing.
    """
    whole = folder / "model.safetensors"
    if whole.exists():
        return [whole]
    weight_map = placement(folder)
    if weight_map is not None:
        shards = [folder / shard for shard in sorted(set(weight_map.values()))]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise ModelError(
                f"{folder / INDEX_NAME}: {missing[0]}, which it names: No such file in the folder ({len(missing)} of "
                f"{len(shards)} are missing). Download or copy the model again"
            )
        return shards
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise ModelError(f"{folder}: {len(found)} safetensors files and no {INDEX_NAME}, so which to read is unclear")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelError(
            f"{folder}: only pickled weights (.bin, .pt), which can run code when they are read and are refused. "
            "Convert them once: transformers' AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    raise ModelError(f"{folder}: no safetensors file in it")


def entries(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every tensor of a model folder -> (its file, its entry in that file's header).

    Raises `ModelError` for a missing or damaged file, a tensor that two files hold, or one that the index names and no
    file holds.
    """
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    shards = files(folder)
    for file in shards:
        for name, entry in check_header(file).items():
            if name == "__metadata__":
                continue
            if name in found:
                raise ModelError(f"{file}: tensor {name!r} is in another shard too, {found[name][0].name}")
            found[name] = file, entry
    weight_map = {} if shards == [folder / "model.safetensors"] else placement(folder) or {}
    missing = weight_map.keys() - found.keys()
    if missing:
        raise ModelError(f"{folder / INDEX_NAME}: tensor {min(missing)!r} ({len(missing)} in all) is in no shard")
    return found


def placement(folder: Path) -> dict[str, str] | None:
    """Tensor -> shard by the folder's index, or None if it has none. Raises `ModelError` for a damaged one."""
    index = folder / INDEX_NAME
    if not index.exists():
        return None
    weight_map = read_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise ModelError(f"{index}: its weight_map is not an object of strings")
    for shard in weight_map.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index}: {shard!r} is no safetensors file of that folder")
    return weight_map


def check_header(path: Path) -> dict[str, Any]:
    """The parsed header of `path`, once every entry is known to be sound; else `ModelError`."""
    try:
        with open_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ModelError(f"{path}: {size} bytes are too few for a safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER, size - 8):
                raise ModelError(f"{path}: its header of {length} bytes exceeds the file ({size}) or {MAX_HEADER}")
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: its header is {as_json(header)}, not an object")
    # An entry of these three alone is one of numbers, which `_span` sees.
    check_depth(path, [entry for entry in header.values() if not (isinstance(entry, dict) and entry.keys() == _ENTRY)])
    _check_metadata(path, header.get("__metadata__"))
    spans = [(*_span(path, name, entry), name) for name, entry in header.items() if name != "__metadata__"]
    _check_cover(path, sorted(spans), size - 8 - length)
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _check_metadata(path: Path, metadata: object) -> None:
    if metadata is None:  # what MLX writes for none at all
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path}: its __metadata__ is not an object of strings")


_ENTRY = {"dtype", "shape", "data_offsets"}


def _is_count(value: object, bound: int = 2**53) -> bool:
    # True is no int here. A file has hundreds of entries, and an adapter is read next to streams.
    return type(value) is int and 0 <= value < bound


def _span(path: Path, name: str, entry: object) -> tuple[int, int]:
    """The [start, end) bytes of one tensor, after its dtype, shape and offsets agree."""
    if not isinstance(entry, dict) or not entry.keys() >= _ENTRY:
        raise ModelError(f"{path}: the entry of tensor {name!r} is incomplete")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ModelError(f"{path}: tensor {name!r} has dtype {dtype!r}; supported: {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or not all(_is_count(side, 2**31) for side in shape):
        raise ModelError(f"{path}: tensor {name!r} has an invalid shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not (_is_count(offsets[0]) and _is_count(offsets[1])):
        raise ModelError(f"{path}: tensor {name!r} has invalid data_offsets {str(offsets)[:80]}")
    start, end = offsets
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != wanted:
        raise ModelError(f"{path}: tensor {name!r} spans {end - start} bytes, and {dtype} {shape} needs {wanted}")
    return start, end


def _check_cover(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """The tensors lie one after another and fill the data exactly, as the format demands."""
    position = 0
    for start, end, name in spans:
        if start != position:
            raise ModelError(f"{path}: tensor {name!r} starts at byte {start}, not at {position} (overlap or hole)")
        position = end
    if position != size:
        raise ModelError(f"{path}: its tensors take {position} bytes, and {size} follow the header (cut off?)")
