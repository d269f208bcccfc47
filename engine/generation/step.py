"""One pass of a batch through the model, from tokens to tokens, and the keys and values it leaves.

`Step` is one function for decoding and prefilling: `tokens` are (rows, 1) or (rows, many). `mx.compile` traces it once
for every set of shapes; so rows, tokens and columns come in few sizes (`bucket`), and the traces are counted.
"""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx

from engine.adapters.stacked import StackedLora
from engine.generation.sampling import Columns, choose
from engine.models.attention import Mask
from engine.models.compiler import fuses_on_cpu, on_cpu
from engine.models.llama import Llama


def bucket(least: int, smallest: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16 … that is at least `least` and `smallest`: at most half too much."""
    size = max(1, least, smallest)
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= size else power


class KeyValues:
    """Keys and values of every layer, each (rows, kv_heads, capacity, head_dim), in the model's dtype.

    Whoever writes takes the arrays out of here and puts the new ones back before they are evaluated: MLX then writes
    in place, because nobody else holds the old ones. Held by anybody, they would be copied whole at every step.
    """

    def __init__(self, model: Llama, rows: int, capacity: int) -> None:
        args = model.args
        shape = (rows, args.kv_heads, capacity, args.head_dim)
        self.keys = [mx.zeros(shape, model.dtype) for _ in range(args.layers)]
        self.values = [mx.zeros(shape, model.dtype) for _ in range(args.layers)]

    @property
    def rows(self) -> int:
        return int(self.keys[0].shape[0])

    @property
    def capacity(self) -> int:
        return int(self.keys[0].shape[2])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def resize(self, rows: int, capacity: int) -> None:
        """More or fewer rows and columns; what fits stays. One layer at a time, so that old and new never both exist
        in full."""
        if (rows, capacity) == (self.rows, self.capacity):
            return
        for arrays in (self.keys, self.values):
            for layer in range(len(arrays)):
                arrays[layer] = _resized(arrays[layer], rows, capacity)
                mx.eval(arrays[layer])

    def put(self, row: int, source: KeyValues, source_row: int, length: int) -> None:
        """Copy the first `length` columns of a row of `source` (which may be this) to `row`."""
        for target, origin in ((self.keys, source.keys), (self.values, source.values)):
            for layer, array in enumerate(origin):
                target[layer][row : row + 1, :, :length] = array[source_row : source_row + 1, :, :length]

    def row(self, row: int, length: int) -> KeyValues:
        """A copy of a row's first `length` columns, which is on its way."""
        made = object.__new__(KeyValues)
        made.keys = [mx.contiguous(array[row : row + 1, :, :length]) for array in self.keys]
        made.values = [mx.contiguous(array[row : row + 1, :, :length]) for array in self.values]
        mx.async_eval(made.keys, made.values)  # type: ignore[no-untyped-call]
        return made


def bytes_per_token(model: Llama) -> int:
    """What one token's keys and values take: two arrays of the grouped heads in every layer."""
    args = model.args
    return 2 * args.layers * args.kv_heads * args.head_dim * int(model.dtype.size)


def _resized(array: mx.array, rows: int, capacity: int) -> mx.array:
    array = array[:rows, :, :capacity]
    more = [(0, rows - array.shape[0]), (0, 0), (0, capacity - array.shape[2]), (0, 0)]
    return mx.pad(array, more) if any(after for _, after in more) else mx.contiguous(array)


class View:
    """A `LayerCache` over keys and values for one pass: row i's new tokens lie at `offset[i]` and after it.

    `columns`: how many of the columns are read, a bound for every row. `exact`: one row, of which every column read is
    filled by this pass: then attention is causal and needs no mask.
    """

    def __init__(self, kv: tuple[list[mx.array], list[mx.array]], offset: mx.array, shape: tuple[int, int], **how: Any):
        self.keys, self.values = list(kv[0]), list(kv[1])
        self.offset, self._columns = offset, int(how["columns"])
        self._rows, self._tokens = shape
        # With one token, too: a sliding window hides what lies before it.
        self.mask: Mask = "causal"
        if not how["exact"]:
            columns = mx.arange(self._columns)[None, None]
            positions = offset[:, None, None] + mx.arange(self._tokens)[None, :, None]
            seen = columns <= positions
            if how["window"] is not None:
                seen = seen & (columns > positions - how["window"])
            self.mask = seen[:, None]

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys[layer] = self._write(self.keys[layer], keys)
        self.values[layer] = self._write(self.values[layer], values)
        read = slice(0, self._rows), slice(None), slice(0, self._columns)
        return self.keys[layer][read], self.values[layer][read]

    def stored(self, layer: int) -> tuple[mx.array, mx.array]:
        return self.keys[layer], self.values[layer]

    def _write(self, storage: mx.array, new: mx.array) -> mx.array:
        if self._rows == storage.shape[0] == 1:
            return mx.slice_update(storage, new, self.offset, axes=(2,))
        rows = mx.arange(self._rows)
        if self._tokens == 1:
            storage[rows, :, self.offset] = new[:, :, 0]
        else:
            positions = self.offset[:, None] + mx.arange(self._tokens)[None]
            storage[rows[:, None], :, positions] = new.swapaxes(1, 2)
        return storage


#: What is compiled. "all": the whole pass of prompts and of decoding, sampling included: for GPUs, where each kernel
#: that is launched costs. "decode": the model's part of decoding: for CPUs, where g++ takes a second for a new kernel,
#: and padding a prompt costs what it would save. "none".
Compiled = Literal["all", "decode", "none"]


def usual() -> Compiled:
    """What pays on this machine."""
    if not on_cpu():
        return "all"
    return "decode" if fuses_on_cpu() else "none"


class Step:
    """The pass itself. `traces`: how often it was traced: once for each set of shapes, where it is compiled."""

    def __init__(self, model: Llama, compiled: Compiled) -> None:
        self._model, self.traces = model, 0
        #: Whether decoding and prompts come in buckets.
        self.decode_buckets, self.prompt_buckets = compiled != "none", compiled == "all"
        self._pass = mx.compile(self._whole) if compiled == "all" else self._whole
        self._decode = mx.compile(self._forward) if compiled == "decode" else self._forward

    def __call__(
        self,
        kv: KeyValues,
        tokens: mx.array,
        offset: mx.array,
        *,
        columns: int,
        last: mx.array | None = None,
        sampling: Columns | None = None,
        adapters: StackedLora | None = None,
        exact: bool = False,
    ) -> tuple[mx.array, ...]:
        """Put `tokens` int32 (rows, many) through the model, row i's at position `offset[i]`; nothing is evaluated.

        Returns what `sampling.choose` makes of each row's token at index `last[i]` (None: the only one); nothing when
        `sampling` is None, for a chunk in the middle of a prompt.
        """
        tree = None if adapters is None else (adapters.stacks, adapters.indices)
        stored = kv.keys, kv.values
        keys, values, chosen = self._pass(stored, tokens, offset, last, sampling, tree, columns, exact)
        kv.keys, kv.values = keys, values
        return tuple(chosen)

    def _whole(
        self,
        stored: tuple[list[mx.array], list[mx.array]],
        tokens: mx.array,
        offset: mx.array,
        last: mx.array | None,
        sampling: Columns | None,
        tree: Any,
        columns: int,
        exact: bool,
    ) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
        forward = self._decode if tokens.shape[1] == 1 and not exact else self._forward
        keys, values, logits = forward(stored, tokens, offset, last, tree, columns, exact, sampling is not None)
        if logits is None or sampling is None:
            return keys, values, []
        newest = tokens[:, 0] if "fresh" in sampling else None
        return keys, values, list(choose(logits, sampling, newest))

    def _forward(
        self,
        stored: tuple[list[mx.array], list[mx.array]],
        tokens: mx.array,
        offset: mx.array,
        last: mx.array | None,
        tree: Any,
        columns: int,
        exact: bool,
        wanted: bool,
    ) -> tuple[list[mx.array], list[mx.array], mx.array | None]:
        self.traces += 1
        model = self._model
        rows, many = tokens.shape
        view = View(stored, offset, (rows, many), columns=columns, exact=exact, window=model.args.window)
        adapters = None if tree is None else StackedLora(*tree)
        hidden = model(tokens, cache=view, adapters=adapters)
        if not wanted:
            return view.keys, view.values, None
        final = hidden[:, -1] if last is None else hidden[mx.arange(rows), last]
        return view.keys, view.values, model.head(final)
