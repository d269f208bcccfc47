"""Keys and values of prompts that were prefilled before: a shared beginning goes through the model once.

The keys and values of a token depend on the tokens before it (and the adapter), so those of a prompt's beginning serve
every prompt that begins the same. They are kept once for all of them (`engine.prefixes.tree`).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from engine.models.key_values import KeyValues
from engine.prefixes.tree import Node, Path, Tree

#: A shorter beginning is prefilled faster than it is found and copied.
SHORTEST = 32
#: On a CPU, where a pass takes longer with each token: with 30 tokens found of 38, a short chat took a fourth less.
SHORTEST_ON_CPU = 16


class PrefixCache:
    """Least recently used ends of prompts go first when `limit` bytes are passed; what another prompt goes on from
    stays as long as that. Beginnings that are pinned make way for running rows alone, and last. `owner` names the
    adapter's version.

    `whole`: a prompt serves those alone that begin with all of its tokens, because a recurrent layer's state cannot
    be taken back to an earlier token. `shortest`: tokens that a beginning has at least.
    """

    def __init__(self, limit: int, *, whole: bool = False, shortest: int = SHORTEST) -> None:
        self.limit, self._whole, self.shortest, self.nbytes = limit, whole, shortest, 0
        self._trees: dict[Hashable, Tree] = {}
        #: By `Node.recency`, the least recently used first, and whose each is. A node comes before the one that it goes
        #: on from: nothing goes on from the first.
        self._used: OrderedDict[object, tuple[Hashable, Node]] = OrderedDict()
        self._pins: list[tuple[Hashable, np.ndarray]] = []
        #: All nodes of pinned beginnings that are here.
        self._pinned: set[Node] = set()

    def __len__(self) -> int:
        """Runs of tokens that are kept in one piece."""
        return len(self._used)

    @property
    def kept(self) -> list[KeyValues]:
        """What is kept of each run of tokens, the least recently used first."""
        return [node.kv for _, node in self._used.values()]

    def find(self, owner: Hashable, tokens: Sequence[int]) -> tuple[list[KeyValues], int]:
        """The longest beginning of `tokens` that is here, in pieces that go on from each other, and its length: at most
        one less than `tokens` has, because the logits of the last token are needed. The last piece may be longer."""
        path = self._serving(owner, tokens)
        self._touch(path.nodes)
        return [node.kv for node in path.nodes], path.shared

    def shared(self, owner: Hashable, tokens: Sequence[int]) -> int:
        """The length that `find` would find now. From any thread."""
        return self._serving(owner, tokens).shared

    def beginning(self, owner: Hashable, tokens: Sequence[int]) -> list[KeyValues] | None:
        """The pieces that hold all of `tokens`; for a recurrent model, these alone."""
        pieces, length = self.find(owner, [*tokens, 0])
        return pieces if length == len(tokens) else None

    def has(self, owner: Hashable, tokens: Sequence[int]) -> bool:
        """Whether all of `tokens` are here, and serve. From any thread."""
        return self._is_here(self._path(owner, _int32(tokens)), len(tokens))

    def fits(self, nbytes: int) -> bool:
        """Whether a prompt of so many bytes is kept at all."""
        return nbytes <= self.limit

    def would_serve(self, first: Sequence[int], tokens: Sequence[int], found: int) -> bool:
        """Whether all tokens of a prompt, `first`, would spare another, of which `found` tokens are here already, so
        many more that it pays to wait for it."""
        shared = len(first) if self._whole else found + self.shortest
        if not found + self.shortest <= shared < len(tokens):
            return False
        return list(first[:shared]) == list(tokens[:shared])

    def pin(self, beginnings: Iterable[tuple[Hashable, Sequence[int]]]) -> None:
        """From now on these beginnings, each an owner and its tokens, are those that stay, once they are here."""
        self._pins = [(owner, _int32(tokens)) for owner, tokens in beginnings]
        self._hold_pins()

    def put(self, owner: Hashable, tokens: Sequence[int], kv: KeyValues, row: int = 0) -> None:
        """Keep the keys and values of `tokens`, which `kv` has at the first positions of a row: a copy of those that
        are not here. Nothing is kept, and nothing goes, where those that are pinned leave too little room."""
        wanted = _int32(tokens)
        if len(wanted) < self.shortest:
            return
        path = self._path(owner, wanted)
        if self._is_here(path, len(wanted)):
            self._touch(path.nodes)
            return
        if self._bytes_with(path, wanted, kv) > self.limit:
            return
        self._add(owner, path, wanted, kv, row)
        while self.nbytes > self.limit:
            self._drop(*self._oldest())
        self._hold_pins()

    def forget(self, owner: Hashable) -> None:
        """Drop all of an owner, whose keys and values are not those that its name has now."""
        tree = self._trees.pop(owner, None)
        for node in [] if tree is None else tree.nodes():
            self._let_go(node)

    def evict(self) -> bool:
        """Drop the least recently used end of a prompt, of those that are not pinned if there is one; whether there was
        any."""
        if not self._used:
            return False
        owner, node = self._oldest()
        was_pinned = node in self._pinned
        self._drop(owner, node)
        if was_pinned:
            self._hold_pins()  # of a beginning without its end nothing is pinned
        return True

    def _path(self, owner: Hashable, wanted: np.ndarray) -> Path:
        tree = self._trees.get(owner)
        return Path([], 0) if tree is None else tree.path(wanted)

    def _serving(self, owner: Hashable, tokens: Sequence[int]) -> Path:
        path = self._path(owner, _int32(tokens[:-1]))
        return path.to_end() if self._whole else path

    def _is_here(self, path: Path, length: int) -> bool:
        return 0 < path.shared == length and (not self._whole or (path.node.ends and not path.beyond))

    def _bytes_with(self, path: Path, wanted: np.ndarray, kv: KeyValues) -> int:
        """What the prompt and all that is pinned take together."""
        staying = sum(node.kv.nbytes for node in self._pinned.union(path.nodes))
        if path.beyond and path.node not in self._pinned:
            whole = path.node.kv
            staying -= whole.nbytes - whole.row_bytes(len(path.node.tokens) - path.beyond)
        return staying + kv.row_bytes(len(wanted) - path.shared, states=True)

    def _add(self, owner: Hashable, path: Path, wanted: np.ndarray, kv: KeyValues, row: int) -> None:
        """Let a path go on to the end of a prompt."""
        nodes = self._split(owner, path) if path.beyond else list(path.nodes)
        if path.shared == len(wanted):
            self._end(nodes[-1], kv, row)
        else:
            merged = self._merged(nodes, len(wanted) - path.shared)
            start = merged[-1].start if merged else path.shared
            above = weakref.ref(nodes[-1]) if nodes else None
            # Of the tokens a copy, too: a part of an array holds all of it.
            node = Node(wanted[start:].copy(), kv.row(row, len(wanted), start), len(wanted), above, True)
            self._trees.setdefault(owner, Tree(self.shortest)).put(node)
            for old in merged:
                self._let_go(old)
            self._used[node.recency] = owner, node
            self.nbytes += node.kv.nbytes
        self._touch(nodes)

    def _merged(self, nodes: list[Node], length: int) -> list[Node]:
        """Take those off the end of a path that become one with the `length` tokens behind it: what no other prompt
        goes on from, and is no longer than what comes. So a chat of n turns is about log2(n) pieces, and each token of
        it is copied as often."""
        merged: list[Node] = []
        while nodes and not self._whole and nodes[-1] not in self._pinned:
            node, goes_on = nodes[-1], 1 if merged else 0
            if len(node.children) > goes_on or len(node.tokens) > length:
                break
            merged.append(nodes.pop())
            length += len(node.tokens)
        return merged

    def _end(self, node: Node, kv: KeyValues, row: int) -> None:
        """A prompt has ended where a node does, with the states of a row."""
        self.nbytes -= node.kv.nbytes
        node.kv, node.ends = node.kv.ending(kv, row), True
        self.nbytes += node.kv.nbytes

    def _split(self, owner: Hashable, path: Path) -> list[Node]:
        """The nodes of a path, which ends where the last one does then."""
        node = path.node
        first, second = self._trees[owner].split(node, len(node.tokens) - path.beyond)
        self._used[second.recency], self._used[first.recency] = (owner, second), (owner, first)
        if node in self._pinned:
            self._pinned.remove(node)
            self._pinned.update((first, second))
        nodes = [*path.nodes[:-1], first]
        self._touch(nodes)
        return nodes

    def _hold_pins(self) -> None:
        """Find what is pinned of what is here, now that this or the pins have changed."""
        self._pinned = set()
        for owner, tokens in self._pins:
            path = self._path(owner, tokens)
            if self._is_here(path, len(tokens)):
                self._pinned.update(self._split(owner, path) if path.beyond else path.nodes)

    def _touch(self, nodes: Sequence[Node]) -> None:
        for node in reversed(nodes):
            self._used.move_to_end(node.recency)

    def _oldest(self) -> tuple[Hashable, Node]:
        """What goes first."""
        free = ((owner, node) for owner, node in self._used.values() if node not in self._pinned)
        return next(free, None) or next(iter(self._used.values()))

    def _drop(self, owner: Hashable, node: Node) -> None:
        """Drop what no other goes on from."""
        tree, last = self._trees[owner], node
        tree.drop(last)
        self._let_go(last)
        # Without a state behind it, and without prompts that go on from it, nothing of a recurrent model serves.
        while self._whole and (parent := last.parent) is not None and not (parent.ends or parent.children):
            tree.drop(parent)
            self._let_go(parent)
            last = parent
        if not tree.children:
            del self._trees[owner]

    def _let_go(self, node: Node) -> None:
        del self._used[node.recency]
        self._pinned.discard(node)
        self.nbytes -= node.kv.nbytes


def _int32(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)
