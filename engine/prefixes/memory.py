"""Keys and values of prompts that were prefilled before: a shared beginning goes through the model once.

The keys and values of a token depend on the tokens before it (and the adapter), so those of a prompt's beginning serve
every prompt that begins the same.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from engine.models.cache import KeyValues

#: A shorter beginning is prefilled faster than it is found and copied.
SHORTEST = 32
#: On a CPU, where a pass takes longer with each token: with 30 tokens found of 38, a short chat took a fourth less.
SHORTEST_ON_CPU = 16

#: Whose tokens, and which.
_Key: TypeAlias = tuple[Hashable, bytes]


@dataclass(frozen=True)
class Entry:
    tokens: np.ndarray
    kv: KeyValues


class PrefixCache:
    """Least recently used entries go first when `limit` bytes are passed; those that are pinned make way for running
    rows alone, and last. `owner` names the adapter's version.

    `whole`: an entry serves prompts alone that begin with all of its tokens, because a recurrent layer's state cannot
    be taken back to an earlier token. `shortest`: tokens that a beginning has at least.
    """

    def __init__(self, limit: int, *, whole: bool = False, shortest: int = SHORTEST) -> None:
        self.limit, self._whole, self.shortest, self.nbytes = limit, whole, shortest, 0
        self._pinned: frozenset[_Key] = frozenset()
        self._entries: OrderedDict[_Key, Entry] = OrderedDict()
        #: The first `shortest` tokens → the entries that begin so: no other can serve, and there may be thousands.
        self._alike: defaultdict[_Key, dict[_Key, None]] = defaultdict(dict)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def kept(self) -> list[KeyValues]:
        """What is kept for each beginning, the least recently used first."""
        return [entry.kv for entry in self._entries.values()]

    def find(self, owner: Hashable, tokens: Sequence[int]) -> tuple[KeyValues | None, int]:
        """The entry that shares the longest beginning with `tokens`, and its length: at most one less than
        `tokens` has, because the logits of the last token are needed."""
        key, best = self._longest(owner, tokens)
        if key is None:
            return None, 0
        self._entries.move_to_end(key)
        return self._entries[key].kv, best

    def shared(self, owner: Hashable, tokens: Sequence[int]) -> int:
        """The length that `find` would find now. From any thread."""
        return self._longest(owner, tokens)[1]

    def beginning(self, owner: Hashable, tokens: Sequence[int]) -> KeyValues | None:
        """What holds all of `tokens` at its first positions; for a recurrent model, these alone."""
        kv, length = self.find(owner, [*tokens, 0])
        return kv if length == len(tokens) else None

    def _longest(self, owner: Hashable, tokens: Sequence[int]) -> tuple[_Key | None, int]:
        wanted = np.asarray(tokens[:-1], dtype=np.int32)
        best, key = 0, None
        # A copy, which is made at once: entries come and go while another thread looks.
        for candidate in list(self._alike.get(self._beginning(owner, wanted), ())):
            entry = self._entries.get(candidate)
            if entry is None:
                continue
            kept = entry.tokens
            # Most differ from the best one where that ends, behind a system prompt that all share.
            if min(len(kept), len(wanted)) <= best or kept[best] != wanted[best]:
                continue
            shared = shared_length(kept, wanted)
            if shared > best and (not self._whole or shared == len(kept)):
                best, key = shared, candidate
        return key, best

    def has(self, owner: Hashable, tokens: Sequence[int]) -> bool:
        return self._key(owner, tokens) in self._entries

    def fits(self, nbytes: int) -> bool:
        """Whether an entry of so many bytes is kept at all."""
        return nbytes <= self.limit

    def would_serve(self, first: Sequence[int], tokens: Sequence[int], found: int) -> bool:
        """Whether an entry of all tokens of a prompt, `first`, would spare another, of which `found` tokens are here
        already, so many more that it pays to wait for it."""
        shared = len(first) if self._whole else found + self.shortest
        if not found + self.shortest <= shared < len(tokens):
            return False
        return list(first[:shared]) == list(tokens[:shared])

    def pin(self, beginnings: Iterable[tuple[Hashable, Sequence[int]]]) -> None:
        """From now on these entries, each an owner and its tokens, are those that stay, once they are here."""
        self._pinned = frozenset(self._key(owner, tokens) for owner, tokens in beginnings)

    def put(self, owner: Hashable, tokens: Sequence[int], kv: KeyValues) -> None:
        """Keep `kv`, one row with the keys and values of `tokens` at its first positions. Nothing is kept, and nothing
        goes, where those that are pinned leave too little room."""
        if not self.fits(kv.nbytes) or len(tokens) < self.shortest:
            return
        key = self._key(owner, tokens)
        self._drop(key)
        if self._pinned_bytes + kv.nbytes > self.limit:
            return
        while self.nbytes + kv.nbytes > self.limit and (oldest := self._oldest_unpinned()) is not None:
            self._drop(oldest)
        entry = self._entries[key] = Entry(np.asarray(tokens, dtype=np.int32), kv)
        self._alike[self._beginning(owner, entry.tokens)][key] = None
        self.nbytes += kv.nbytes

    def forget(self, owner: Hashable) -> None:
        """Drop all of an owner, whose keys and values are not those that its name has now."""
        for key in [key for key in self._entries if key[0] == owner]:
            self._drop(key)

    def evict(self) -> bool:
        """Drop the least recently used entry, of those that are not pinned if there is one; whether there was any."""
        if not self._entries:
            return False
        self._drop(self._oldest_unpinned() or next(iter(self._entries)))
        return True

    @property
    def _pinned_bytes(self) -> int:
        return sum(self._entries[key].kv.nbytes for key in self._pinned if key in self._entries)

    def _oldest_unpinned(self) -> _Key | None:
        return next((key for key in self._entries if key not in self._pinned), None)

    def _drop(self, key: _Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self.nbytes -= entry.kv.nbytes
        beginning = self._beginning(key[0], entry.tokens)
        del self._alike[beginning][key]
        if not self._alike[beginning]:
            del self._alike[beginning]

    def _beginning(self, owner: Hashable, tokens: np.ndarray) -> _Key:
        return owner, tokens[: self.shortest].tobytes()

    @staticmethod
    def _key(owner: Hashable, tokens: Sequence[int]) -> _Key:
        return owner, np.asarray(tokens, dtype=np.int32).tobytes()


def shared_length(left: np.ndarray, right: np.ndarray) -> int:
    """How many tokens of both are alike, from the first on."""
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length
