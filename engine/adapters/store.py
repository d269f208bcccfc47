"""Adapters on disk: `ROOT/MODEL/NAME/VERSION/` in PEFT's layout, written whole or not at all."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.adapters import peft
from engine.adapters.lora import LoraWeights, same
from engine.platform.jsonfiles import NOTES_FILE as NOTES_FILE
from engine.platform.jsonfiles import read_object, write_json
from stoker.contract.base import parse_adapter
from stoker.contract.names import Rule, checked, follows
from stoker.errors import ModelError, UnknownAdapter
from stoker.files.durable import draft_folder, flush, publish, sweep

log = logging.getLogger(__name__)


class AdapterStore:
    """Finds, reads and writes the adapters of every model under one root."""

    def __init__(self, root: Path) -> None:
        self._root = root
        #: For those who put other files in the place of a version's: jobs of several lanes may find at once that they
        #: have to, and the second must not take the files of the first, nor use the old ones from memory.
        self.replacing = threading.Lock()

    def names(self, model: str) -> list[str]:
        folder = self._root / checked(Rule.NAME, "model", model)
        return sorted(path.name for path in folder.iterdir() if _versions(path)) if folder.is_dir() else []

    def folder(self, model: str, name: str, version: int) -> Path:
        return self._home(model, name) / checked(Rule.VERSION, "version", str(version))

    def _home(self, model: str, name: str) -> Path:
        """Where the versions of an adapter are. Names may come from a registry that another program wrote."""
        return self._root / checked(Rule.NAME, "model", model) / checked(Rule.NAME, "adapter", name)

    def newest(self, model: str, name: str) -> int:
        """The highest version; 0 if there is none."""
        return max(_versions(self._home(model, name)), default=0)

    def has(self, model: str, name: str, version: int) -> bool:
        return version in _versions(self._home(model, name))

    def stamp(self, model: str, name: str, version: int) -> int:
        """Another number for other files under the number of a version; 0 where there are none."""
        try:
            return self.folder(model, name, version).stat().st_ino
        except FileNotFoundError:
            return 0

    def resolve(self, model: str, adapter: str) -> tuple[str, int]:
        """`name` (its newest version) or `name@version` as (name, version); raises `UnknownAdapter` with those there
        are."""
        name, version = parse_adapter(adapter)
        found = _versions(self._home(model, name))
        if not found:
            names = ", ".join(self.names(model)) or "none"
            raise UnknownAdapter(
                f"adapter {name!r} given; {model} has: {names}. Train it with `stoker train {name} --dataset FILE`."
            )
        if version is not None and version not in found:
            raise UnknownAdapter(
                f"adapter {adapter!r} given; of {name} there are {', '.join(map(str, sorted(found)))}."
            )
        return name, max(found) if version is None else version

    def read(self, model: str, name: str, version: int, shapes: Mapping[str, tuple[int, int]]) -> LoraWeights:
        """Load one version and check it against the model's layers, name → (in, out)."""
        return peft.read(self.folder(model, name, version), shapes)

    def write(
        self, model: str, name: str, weights: LoraWeights, notes: Mapping[str, Any], version: int | None = None
    ) -> int:
        """Write a version, by default the next one, and return its number. Until the last rename nobody can see it.

        A `version` that is there already stays as it is: a caller that numbers versions gives each number to one run.
        """

        def fill(draft: Path) -> None:
            peft.write(draft, model, weights)
            write_json(draft / NOTES_FILE, notes)

        return self.install(model, name, fill, version)

    def install(self, model: str, name: str, fill: Callable[[Path], object], version: int | None = None) -> int:
        """The same for the files that `fill` puts into the folder that it is given."""
        home = self._home(model, name)
        with draft_folder(home) as draft:
            fill(draft)
            while True:
                number = version or max(_versions(home), default=0) + 1
                if publish(draft, home / str(number)) or version is not None:
                    return number

    def adopt(
        self,
        model: str,
        name: str,
        weights: LoraWeights,
        notes: Mapping[str, Any],
        version: int,
        shapes: Mapping[str, tuple[int, int]],
    ) -> None:
        """Have a version that is the same on every disk of a group. What is here under its number and is another, of
        another registry or damaged, is set aside. `shapes`: of the model's layers, name → (in, out). Raises `OSError`.
        """
        if self.has(model, name, version) and not self._is(model, name, version, weights, shapes):
            aside = self.set_aside(model, name, version)
            log.warning(
                "adapter %s@%d of %s: files here were others than rank 0 has; they are in %s",
                name,
                version,
                model,
                aside,
            )
        self.write(model, name, weights, notes, version)

    def _is(
        self, model: str, name: str, version: int, weights: LoraWeights, shapes: Mapping[str, tuple[int, int]]
    ) -> bool:
        try:
            found = self.read(model, name, version, shapes)
        except ModelError:
            return False
        return found.config.scale == weights.config.scale and same(found.matrices, weights.matrices)

    def maker(self, model: str, name: str, version: int) -> str | None:
        """The job that made a version; None where its files do not say."""
        try:
            job = read_object(self.folder(model, name, version) / NOTES_FILE, {}).get("job")
        except ModelError:
            return None
        return job if isinstance(job, str) else None

    def set_aside(self, model: str, name: str, version: int) -> Path:
        """Take the number from the files of a version, and return the folder where they are. Raises `OSError`."""
        folder = self.folder(model, name, version)
        aside = folder.with_name(f"{version}-{secrets.token_hex(4)}")
        os.rename(folder, aside)
        flush(folder.parent)
        return aside

    def sweep(self) -> None:
        """Delete what writers that died left behind."""
        for home in self._root.glob("*/*"):
            if home.is_dir():
                sweep(home)


def _versions(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if follows(Rule.VERSION, path.name)] if folder.is_dir() else []
