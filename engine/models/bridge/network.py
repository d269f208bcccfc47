"""A network of mlx-lm's, cut between its body and its head, and its layers one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from stoker.errors import ModelError

#: Two computations of the same logits, in different orders.
_CLOSE = {mx.float32: 1e-3, mx.float16: 1e-2, mx.bfloat16: 5e-2}


class Body:
    """Stands for a network's body: it runs it and keeps what it gave, or gives what it was given."""

    def __init__(self, body: nn.Module) -> None:
        self._body = body
        self.hidden: mx.array | None = None
        self.given: mx.array | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if self.given is not None:
            return self.given
        self.hidden = self._body(*args, **keywords)
        return self.hidden


class Cut:
    """A network as two functions: `hidden` of tokens, and `head` of hidden states.

    mlx-lm's files have one call for both, each with its own names, soft caps and scales. So the whole call is made with
    its body replaced: for `hidden` by one that keeps what it gives, and nobody evaluates its logits; for `head` by one
    that gives the hidden states at once. Where body and head cannot be distinguished, hidden states are the logits.
    """

    def __init__(self, network: nn.Module, path: Sequence[str]) -> None:
        self._network, self._body = network, None
        if path:
            inner: Any = network
            for name in path:
                inner = getattr(inner, name)
            self._body = Body(inner)
            self._network = _replaced(network, path, self._body)

    @property
    def has_head(self) -> bool:
        """Whether hidden states are not the logits."""
        return self._body is not None

    def hidden(self, tokens: mx.array, caches: list[Any]) -> mx.array:
        body = self._body
        logits: mx.array = self._network(tokens, cache=caches)
        if body is None:
            return logits
        found, body.hidden = body.hidden, None
        assert found is not None
        return found

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (…, vocab) of hidden states (…, dim)."""
        body = self._body
        if body is None:
            return hidden
        body.given = hidden.reshape(1, -1, hidden.shape[-1])
        try:
            logits: mx.array = self._network(mx.zeros((1, 1), mx.int32), cache=None)
        finally:
            body.given = None
        return logits.reshape(*hidden.shape[:-1], -1)


#: What a network is tried on: rows and tokens of different numbers.
TRIED = ((0, 1, 2), (2, 0, 1))


def cut(network: nn.Module, caches: Callable[[], list[Any]], wanted: mx.array) -> Cut:
    """The deepest cut that gives the network's own logits, `wanted`, of `TRIED`. Raises `ModelError` if none does."""
    tokens = mx.array(TRIED, dtype=mx.int32)
    for path in (*sorted(_bodies(network), key=len, reverse=True), ()):
        made = Cut(network, path)
        try:
            hidden = made.hidden(tokens, caches())
            logits = made.head(hidden)
        except Exception:  # a module that is no body may fail in any way
            continue
        if hidden.shape[:2] == tokens.shape and hidden.ndim == 3 and same(logits, wanted):
            return made
    raise ModelError("mlx-lm's model file gives other logits once its layers are run one by one; it is not supported")


def same(logits: mx.array, wanted: mx.array) -> bool:
    """Whether these are the same logits, in what a model computes them in."""
    if logits.shape != wanted.shape:
        return False
    first, second = logits.astype(mx.float32), wanted.astype(mx.float32)
    bound = _CLOSE[wanted.dtype] * (1.0 + mx.max(mx.abs(second)))
    return bool(mx.max(mx.abs(first - second)) <= bound)


def _bodies(network: nn.Module, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The modules that could be a body: those that hold all layers, outermost first."""
    for name, child in network.children().items():
        if isinstance(child, nn.Module) and any(isinstance(part, list) for _, part in _within(child)):
            yield (*path, name)
            yield from _bodies(child, (*path, name))


def _within(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, part in module.children().items():
        yield name, part
        if isinstance(part, nn.Module):
            yield from _within(part)


def _replaced(network: nn.Module, path: Sequence[str], body: object) -> nn.Module:
    """The network with another body; its other parts are shared."""
    made = copy.copy(network)
    first, *rest = path
    made.pop(first)
    inner = network[first]
    object.__setattr__(made, first, _replaced(inner, rest, body) if rest else body)
    return made
