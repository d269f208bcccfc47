"""One entry: a safetensors file (https://huggingface.co/docs/safetensors, "Format") that says what it is of.

Its header follows from what the reader wants: format version, owner, names, dtypes and shapes. So a reader parses
nothing. It compares the header with the one that it would write itself, and then the content with its digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.prefixes.form import Form, Tensor
from engine.weights.safetensors_header import ITEM_BYTES

#: Of what is in the file and what it means. A release that computes keys and values in another way raises it.
FORMAT = 1
#: Stands for the digest in the header whose length is asked for.
_NO_DIGEST = "0" * 64
#: Numbers travel as they lie in memory, as unsigned integers of their size.
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class DamagedEntry(Exception):
    """A file that is not what it has to be. Never leaves `engine.prefixes`."""


def write(path: Path, owner: str, form: Form, tokens: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
    """`tokens`: int32 (T,). `arrays`: the raw numbers of `form.tensors(T)`, in their order. Raises `OSError`."""
    parts = [np.ascontiguousarray(array).data for array in (tokens, *arrays)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    header = _header(owner, form, len(tokens), digest.hexdigest())
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            file.write(part)


def size(owner: str, form: Form, tokens: int) -> int:
    """Bytes of the file of an entry of so many tokens."""
    return 8 + len(_header(owner, form, tokens, _NO_DIGEST)) + sum(tensor.nbytes for tensor in _tensors(form, tokens))


def read(path: Path, owner: str, form: Form, tokens: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The tokens, int32 (`tokens`,), and the raw numbers of each tensor of the form. Raises `DamagedEntry` for any
    other file, and `OSError`."""
    wanted = _header(owner, form, tokens, _NO_DIGEST)
    start, end = 8 + len(wanted), size(owner, form, tokens)
    with open(path, "rb", buffering=0) as file:
        found = os.fstat(file.fileno()).st_size
        if found != end:
            raise DamagedEntry(f"it has {found} bytes; one of this model and length has {end}")
        said = _filled(file.fileno(), start)
        digest = _digest_in(said[8:].tobytes(), wanted)
        if said.tobytes() != len(wanted).to_bytes(8, "little") + _header(owner, form, tokens, digest):
            raise DamagedEntry("its header is of another model, version or shape")
        data = _filled(file.fileno(), end - start)
    if hashlib.sha256(data.data).hexdigest() != digest:
        raise DamagedEntry("its content is not what was written")
    first, *others = _split(data, _tensors(form, tokens))
    return first.view(np.int32), others


def read_tokens(path: Path, tokens: int) -> np.ndarray:
    """The tokens alone, int32 (`tokens`,), which `read` has not checked yet: they lie first. Raises `OSError`, and
    `DamagedEntry` for a file that ends before them."""
    with open(path, "rb", buffering=0) as file:
        length = int.from_bytes(_filled(file.fileno(), 8).tobytes(), "little")
        if length > os.fstat(file.fileno()).st_size:
            raise DamagedEntry("its header is cut off")
        file.seek(8 + length)
        return _filled(file.fileno(), 4 * tokens).view(np.int32)


def _tensors(form: Form, tokens: int) -> list[Tensor]:
    return [Tensor("tokens", "I32", (tokens,)), *form.tensors(tokens)]


def _header(owner: str, form: Form, tokens: int, digest: str) -> bytes:
    """As long for every digest of 64 characters."""
    entries: dict[str, object] = {}
    start = 0
    for tensor in _tensors(form, tokens):
        end = start + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
        start = end
    said = {"format": "mlx", "stoker_prefix": str(FORMAT), "owner": owner, "sha256": digest}
    text = json.dumps({"__metadata__": said, **entries}, separators=(",", ":")).encode()
    # The format's own alignment: numbers begin at a multiple of 8 bytes.
    return text + b" " * (-len(text) % 8)


def _digest_in(header: bytes, wanted: bytes) -> str:
    at = wanted.index(_NO_DIGEST.encode())
    return header[at : at + len(_NO_DIGEST)].decode("ascii", "replace")


def _filled(descriptor: int, size: int) -> np.ndarray:
    """The next `size` bytes, uint8."""
    made = np.empty(size, dtype=np.uint8)
    rest = made.data
    while rest:
        count = os.readv(descriptor, [rest])
        if not count:
            raise DamagedEntry("it is cut off")
        rest = rest[count:]
    return made


def _split(data: np.ndarray, tensors: Sequence[Tensor]) -> list[np.ndarray]:
    found, start = [], 0
    for tensor in tensors:
        part = data[start : start + tensor.nbytes]
        found.append(part.view(_RAW[ITEM_BYTES[tensor.dtype]]).reshape(tensor.shape))
        start += tensor.nbytes
    return found
