"""What keys and values depend on: the weights as they were loaded, the adapter, and what computes with them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import threading
from pathlib import Path

from engine.adapters.peft import CONFIG_FILE, WEIGHTS_FILE
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.models.sentence_files import model_folder
from engine.platform import probe
from engine.prefixes.entry_file import FORMAT
from engine.weights.gguf_parts import parts

#: Which version of which adapter; None: the bare base.
Adapter = tuple[str, int] | None
#: Versions whose content is known at once, 3 MB; and places where one that was forgotten leaves a mark.
MOST, PLACES = 4096, 1 << 18


def model_identity(model: LoadedModel) -> str | None:
    """Of a model's weights in memory; None where they came from no file. The digest of its files looks at their ends
    alone, so their sizes and times count too: a model that was trained on, in place, is another one."""
    files = [] if not model.path.exists() else _weight_files(model.path)
    if not files:
        return None
    stamps = [(file.name, *_stamp(file)) for file in files]
    computed = (model.precision, str(model.decoder.dtype), probe.device(), importlib.metadata.version("mlx"))
    return _digest(FORMAT, model.digest, stamps, computed)


class Owners:
    """Names whose keys and values an entry has. From any thread."""

    def __init__(self, identity: str, model: str, store: AdapterStore) -> None:
        self._identity, self._model, self._store = identity, model, store
        #: A version → the stamps of its files, and the digest of their content; the one that was used last comes last.
        self._known: dict[tuple[str, int], tuple[object, str]] = {}
        #: By hash. Memory may still have of a forgotten version what other files made than it has now.
        self._forgotten = bytearray(PLACES)
        self._lock = threading.Lock()

    @property
    def base(self) -> str:
        """The name of the bare base."""
        return _digest(self._identity, None)

    def name(self, adapter: Adapter) -> str | None:
        """64 hexadecimal digits; None for an adapter whose files are gone, or are not certainly those that this process
        may have in memory."""
        if adapter is None:
            return self.base
        if adapter[1] < 0:
            return None
        try:
            content = self._content(*adapter)
        except OSError:
            return None
        return None if content is None else _digest(self._identity, content)

    def _content(self, name: str, version: int) -> str | None:
        """By what is in it: a version that was deleted and made anew may have its number again."""
        folder = self._store.folder(self._model, name, version)
        files = [folder / WEIGHTS_FILE, folder / CONFIG_FILE]
        stamps = [_stamp(file) for file in files]
        with self._lock:
            known = self._known.pop((name, version), None)
            if known is None:
                if self._forgotten[hash((name, version)) % PLACES]:
                    return None
                known = stamps, _digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
            self._known[name, version] = known
            self._forget_beyond(MOST)
        before, digest = known
        return digest if before == stamps else None

    def _forget_beyond(self, most: int) -> None:
        """What was used longest ago, and is not on the disk for this process from now on."""
        while len(self._known) > most:
            oldest = next(iter(self._known))
            del self._known[oldest]
            self._forgotten[hash(oldest) % PLACES] = 1


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return parts(path)
    folder = model_folder(path)
    return sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])


def _stamp(file: Path) -> tuple[int, int, int]:
    known = file.stat()
    return known.st_size, known.st_mtime_ns, known.st_ctime_ns


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
