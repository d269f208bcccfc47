"""The prefixes on disk of one model, as its lane sees them: read in the caller's thread, taken in by the engine's."""

from __future__ import annotations

import errno
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import mlx.core as mx
import numpy as np

from engine.checkpoints.loading import LoadedModel
from engine.models.key_values import KeyValues
from engine.prefixes import entry_file
from engine.prefixes.folder import LONGER, SHORTEST, PrefixFolder
from engine.prefixes.form import Form
from engine.prefixes.identity import Adapter, Owners
from engine.prefixes.memory import PrefixCache
from engine.prefixes.pins import PINNED_PART, Beginning
from engine.prefixes.saver import Allowance, Saver
from stoker.errors import InvalidRequest

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Runs a call in the engine's thread between two steps, and waits for what it makes.
RunInEngine: TypeAlias = Callable[[Callable[[], Any]], Any]

#: A prompt of so many tokens is kept on disk at once; a shorter one when it has served again.
LONG = 512
#: Bytes that the engine's thread copies between two steps: half a millisecond to two.
COPIED = 4 << 20
#: Bytes of an entry at most: the engine's thread copies it into MLX's memory between two steps, in a tenth of a second;
#: STOKER_STALL allows a quarter.
LARGEST = 512 << 20


@dataclass(frozen=True, eq=False)
class Fetched:
    """What was read for a prompt. Several may share it."""

    adapter: Adapter
    tokens: np.ndarray
    arrays: Sequence[np.ndarray]


class Shelf:
    """`form`: of the model's entries. `run`: does something in the engine's thread."""

    def __init__(
        self,
        folder: PrefixFolder,
        saver: Saver,
        allowance: Allowance,
        model: LoadedModel,
        owners: Owners,
        form: Form,
        run: RunInEngine,
    ) -> None:
        self._folder, self._saver, self._allowance, self._run = folder, saver, allowance, run
        self._decoder, self._owners, self._form = model.decoder, owners, form
        #: Names the model with any adapter.
        self._base = owners.base
        #: One reads at a time: those that come meanwhile for the same entry share what it read.
        self._reading = threading.Lock()
        self._fetched: weakref.WeakValueDictionary[tuple[Adapter, Path], Fetched] = weakref.WeakValueDictionary()
        #: Prompts whose beginning came from the disk.
        self.hits = 0

    # --- in the caller's thread ---

    def fetch(self, adapter: Adapter, prompt: Sequence[int], cache: PrefixCache) -> Fetched | None:
        """What the disk has of a prompt's beginning, if it is worth being read: far more than is in memory."""
        if len(prompt) <= SHORTEST:
            return None
        with self._reading:
            return self._fetch(adapter, prompt, cache)

    def _fetch(self, adapter: Adapter, prompt: Sequence[int], cache: PrefixCache) -> Fetched | None:
        owner = self._owners.name(adapter)
        if owner is None:
            return None
        # The logits of the last token are needed: it goes through the model in any case.
        found = self._folder.find(owner, np.asarray(prompt[:-1], dtype=np.int32), self._form)
        if found is None or not cache.fits(self._form.nbytes(found.length)):
            return None
        spared = found.shared - cache.shared(adapter, prompt)
        if spared < SHORTEST or found.length > LONGER * spared:
            return None
        # Adapters whose files are alike share an entry on disk, and not in memory.
        key = adapter, found.path
        held = self._fetched.get(key)
        if held is None and (read := self._folder.read(found, self._form)) is not None:
            held = self._fetched[key] = Fetched(adapter, *read)
        return held

    # --- pins, in the thread of those who pin ---

    @property
    def room_for_pins(self) -> int:
        """Bytes that this model's pins may take on the disk, next to those of the machine's other models."""
        return self._folder.limit // PINNED_PART - self._folder.pinned_bytes(without=self._base)

    def size(self, beginning: Beginning) -> int:
        """Bytes of its file. Raises `InvalidRequest` for one that is too large."""
        nbytes = self._form.nbytes(len(beginning.ids))
        if nbytes > LARGEST:
            raise InvalidRequest(
                f"{len(beginning.ids)} tokens given, whose keys and values take {nbytes >> 20} MB; one on the disk "
                f"has at most {LARGEST >> 20} MB. Shorten it."
            )
        return entry_file.size(self._base, self._form, len(beginning.ids))

    def pin(self, beginnings: Sequence[Beginning]) -> None:
        """From now on these stay, once they are there, and no others. Raises `OSError`."""
        entries = []
        for beginning in beginnings:
            owner = self._owners.name(beginning.adapter)
            if owner is not None and len(beginning.ids) >= SHORTEST:
                entries.append((owner, _int32(beginning.ids), self.size(beginning)))
        self._folder.pin(self._base, entries)

    def holds(self, beginning: Beginning) -> bool:
        owner = self._owners.name(beginning.adapter)
        return owner is not None and self._folder.holds(owner, _int32(beginning.ids))

    def keep(self, beginning: Beginning, cache: PrefixCache) -> None:
        """Write one that memory has, and the disk has not. One that is shorter than an entry may be is left out. Raises
        `OSError`."""
        owner = self._owners.name(beginning.adapter)
        if owner is None or len(beginning.ids) < SHORTEST or self.holds(beginning):
            return
        arrays = self._copied(beginning.adapter, beginning.ids, weakref.ref(cache))
        if arrays is not None and not self._folder.write(owner, _int32(beginning.ids), self._form, arrays):
            raise OSError(errno.ENOSPC, "the disk is nearly full")

    # --- in the engine's thread ---

    def take_in(self, fetched: Fetched, cache: PrefixCache) -> None:
        """Let memory have what was read, unless another request has brought it."""
        tokens: list[int] = fetched.tokens.tolist()
        if cache.has(fetched.adapter, tokens):
            return
        try:
            kv = self._key_values(fetched)
        except RuntimeError as error:
            # No memory for it: the prompt is prefilled as ever.
            log.warning("a kept prefix of %d tokens is not used: %s", len(tokens), error)
            return
        cache.put(fetched.adapter, tokens, kv)
        self.hits += 1

    def _key_values(self, fetched: Fetched) -> KeyValues:
        sizes = self._decoder.kv_sizes
        arrays = [mx.array(raw).view(dtype) for raw, dtype in zip(fetched.arrays, sizes.dtypes, strict=True)]
        mx.eval(arrays)
        first, second = len(sizes.keys), len(sizes.keys) + len(sizes.values)
        return KeyValues.holding(self._decoder, (arrays[:first], arrays[first:second], arrays[second:]))

    def served(self, adapter: Adapter, tokens: Sequence[int], cache: PrefixCache) -> None:
        """The first `tokens` of a prompt were found in memory: what serves twice may serve after a restart."""
        if len(tokens) >= SHORTEST:
            self._saver.note(_Saving(self, weakref.ref(cache), adapter, tuple(tokens)))

    def kept(self, adapter: Adapter, tokens: Sequence[int], cache: PrefixCache) -> None:
        """Memory keeps a prompt from now on."""
        if len(tokens) >= LONG:
            self.served(adapter, tokens, cache)

    # --- in the saver's thread ---

    def save(self, adapter: Adapter, tokens: Sequence[int], cache: weakref.ref[PrefixCache]) -> None:
        """Write a beginning that memory has, unless the disk has nearly all of it. Raises `OSError`."""
        owner, wanted = self._owners.name(adapter), np.asarray(tokens, dtype=np.int32)
        if owner is None:
            return
        found = self._folder.find(owner, wanted, self._form)
        if found is not None and found.shared + SHORTEST > len(wanted):
            self._folder.touch(found.path)
            return
        size = self._form.nbytes(len(wanted))
        if size > LARGEST or not self._folder.takes(size) or not self._allowance.take(size):
            return
        arrays = self._copied(adapter, tokens, cache)
        if arrays is not None and not self._folder.write(owner, wanted, self._form, arrays):
            log.debug("a prefix of %d tokens is not kept on disk, which is nearly full", len(wanted))

    def _copied(
        self, adapter: Adapter, tokens: Sequence[int], cache: weakref.ref[PrefixCache]
    ) -> list[np.ndarray] | None:
        """The raw numbers of each tensor, copied by the engine's thread, a few between two steps; None if memory has
        let go of them meanwhile."""
        made: list[np.ndarray] = []
        for first, end in _portions([tensor.nbytes for tensor in self._form.tensors(len(tokens))]):
            part: list[np.ndarray] | None = self._run(partial(_copy, cache, adapter, tokens, range(first, end)))
            if part is None:
                return None
            made += part
        return made


@dataclass(frozen=True)
class _Saving:
    shelf: Shelf
    cache: weakref.ref[PrefixCache]
    adapter: Adapter
    tokens: tuple[int, ...]

    def save(self) -> None:
        self.shelf.save(self.adapter, self.tokens, self.cache)


def _copy(
    cache: weakref.ref[PrefixCache], adapter: Adapter, tokens: Sequence[int], which: range
) -> list[np.ndarray] | None:
    """In the engine's thread: nothing of MLX leaves it."""
    held = cache()
    pieces = None if held is None else held.beginning(adapter, tokens)
    if not pieces:
        return None
    return [_raw(_joined(pieces, len(tokens), index)) for index in which]


def _joined(pieces: Sequence[KeyValues], length: int, index: int) -> mx.array:
    """One tensor of a beginning of `length` tokens, whose positions are those of its pieces, one behind the other."""
    *before, last = ([*piece.keys, *piece.values] for piece in pieces)
    if index >= len(last):
        # A state is of all tokens before it.
        return pieces[-1].states[index - len(last)]
    # The last piece may be far longer than what is asked for.
    left = length - sum(piece.capacity for piece in pieces[:-1])
    return mx.concatenate([*(arrays[index] for arrays in before), last[index][:, :, :left]], axis=2)


def _int32(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)


def _raw(array: mx.array) -> np.ndarray:
    kind = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[int(array.dtype.size)]
    return np.array(mx.contiguous(array).view(kind))


def _portions(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """First and end of runs of `COPIED` bytes, one at least each."""
    found: list[tuple[int, int]] = []
    first, bytes_ = 0, 0
    for index, size in enumerate(sizes):
        if bytes_ and bytes_ + size > COPIED:
            found.append((first, index))
            first, bytes_ = index, 0
        bytes_ += size
    return [*found, (first, len(sizes))]
