"""Prompts that begin alike as a tree: what they share is there once, and each goes on from where it differs.

A radix tree over tokens with keys and values at its nodes, as RadixAttention has it (Zheng et al., "SGLang: Efficient
Execution of Structured Language Model Programs", 2024, https://arxiv.org/abs/2312.07104).

Other threads look while the engine's thread changes it: tokens and end of a node stay what they are, and a change is
the one assignment that puts a node, or two for one, into the dict of what goes on from a position. Who looks sees what
was there before or what is there after.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from engine.models.key_values import KeyValues
from engine.models.openings import shared_length

#: What the next tokens are found by: the first ones at the beginning, one behind it.
_Step: TypeAlias = bytes | int
#: What goes on from one position.
Children: TypeAlias = "dict[_Step, Node]"


@dataclass(eq=False, slots=True, weakref_slot=True)
class Node:
    """`tokens`: int32, those behind its parent's. `kv`: of these positions alone, with the states behind the last one
    where there are any. `end`: where the last one is among all from the beginning on. `recency`: what `PrefixCache`
    orders nodes by, from the least recently used on; of a node that is split, the second half has it. `ends`: a prompt
    ended here, with the states that it left. `above`: its parent, by a weak reference: without circles of nodes, one
    that goes frees its memory at once."""

    tokens: np.ndarray
    kv: KeyValues
    end: int
    above: weakref.ref[Node] | None
    ends: bool
    children: Children = field(default_factory=dict)
    recency: object = field(default_factory=object)

    @property
    def parent(self) -> Node | None:
        return None if self.above is None else self.above()

    @property
    def start(self) -> int:
        return self.end - len(self.tokens)


@dataclass(frozen=True)
class Path:
    """Nodes that go on from each other, and how many tokens they share with those that were looked for: all of each
    node's, except perhaps the last one's."""

    nodes: list[Node]
    shared: int

    @property
    def node(self) -> Node:
        """The last one."""
        return self.nodes[-1]

    @property
    def beyond(self) -> int:
        """Tokens of the last node that are not shared."""
        return self.nodes[-1].end - self.shared if self.nodes else 0

    def to_end(self) -> Path:
        """The part of it that ends where a prompt ended."""
        nodes = list(self.nodes)
        while nodes and not (nodes[-1].ends and nodes[-1].end <= self.shared):
            nodes.pop()
        return Path(nodes, nodes[-1].end if nodes else 0)


class Tree:
    """The prompts of one owner. Those that share fewer than `shortest` tokens share no node: nothing as short serves,
    and each node of a path takes launches."""

    def __init__(self, shortest: int) -> None:
        self._shortest = shortest
        self.children: Children = {}

    def path(self, tokens: np.ndarray) -> Path:
        """The nodes that hold the longest beginning of `tokens`, int32. From any thread."""
        nodes: list[Node] = []
        at, children = 0, self.children
        while at < len(tokens) and (node := children.get(self._step(tokens[at:], at))) is not None:
            nodes.append(node)
            at += shared_length(node.tokens, tokens[at:])
            if at < node.end:
                break
            children = node.children
        return Path(nodes, at)

    def put(self, node: Node) -> None:
        """Let a node go on from its parent, instead of one that goes on with the same token."""
        self._siblings(node)[self._step(node.tokens, node.start)] = node

    def drop(self, node: Node) -> None:
        del self._siblings(node)[self._step(node.tokens, node.start)]

    def _siblings(self, node: Node) -> Children:
        """What goes on from where the node does, the node included."""
        parent = node.parent
        return self.children if parent is None else parent.children

    def split(self, node: Node, length: int) -> tuple[Node, Node]:
        """Put two instead of a node, the first of which has `length` of its tokens."""
        first_kv, second_kv = node.kv.halves(length)
        first = Node(node.tokens[:length].copy(), first_kv, node.start + length, node.above, False)
        # The same dict: a thread that looks at the whole goes on where the engine's thread goes on.
        second = Node(
            node.tokens[length:].copy(), second_kv, node.end, weakref.ref(first), node.ends, node.children, node.recency
        )
        for child in node.children.values():
            child.above = weakref.ref(second)
        self.put(second)
        self.put(first)
        return first, second

    def nodes(self) -> Iterator[Node]:
        left = list(self.children.values())
        while left:
            node = left.pop()
            left += node.children.values()
            yield node

    def _step(self, tokens: np.ndarray, at: int) -> _Step:
        """By what tokens are found that go on from position `at`."""
        return int(tokens[0]) if at else tokens[: self._shortest].tobytes()
