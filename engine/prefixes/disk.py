"""What an engine has of prefixes on disk: one folder and one thread for all of its models."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.prefixes.folder import PrefixFolder
from engine.prefixes.form import Form
from engine.prefixes.identity import Owners, model_identity
from engine.prefixes.saver import Allowance, Saver
from engine.prefixes.shelf import RunInEngine, Shelf

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DiskLimits:
    """`folder`: of all entries. `bytes`: what they may take; 0: nothing is read or written."""

    folder: Path
    bytes: int


class PrefixDisk:
    """`run`: does something in the engine's thread, between two steps."""

    def __init__(self, limits: DiskLimits | None, store: AdapterStore, run: RunInEngine) -> None:
        self._store, self._run = store, run
        self._saver = Saver()
        self._folder = PrefixFolder(limits.folder, limits.bytes) if limits is not None and limits.bytes else None
        self._allowance = Allowance(0 if self._folder is None else self._folder.limit)

    def shelf(self, model: LoadedModel) -> Shelf | None:
        """For a model that generates; None where its prefixes stay in memory alone."""
        if self._folder is None:
            return None
        form, identity = Form.of(model.decoder.kv_sizes), model_identity(model)
        if form is None or identity is None:
            log.info("prefixes of %s stay in memory: they have numbers of a type that no file takes", model.name)
            return None
        owners = Owners(identity, model.name, self._store)
        return Shelf(self._folder, self._saver, self._allowance, model, owners, form, self._run)

    @property
    def nbytes(self) -> int:
        """What all entries take, when this process looked last."""
        return 0 if self._folder is None else self._folder.nbytes

    def start(self) -> None:
        """Count what there is, and remove what is beyond the limit."""
        if self._folder is not None:
            self._folder.look()
            self._saver.start()

    def end(self, timeout: float) -> None:
        self._saver.end(timeout)
