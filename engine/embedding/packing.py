"""How texts of many lengths become batches with next to no padding: pure arithmetic on their lengths.

A CPU is fed packed batches: texts of about a length share their attention, padded for it by an eighth at most. A
GPU would spend its time launching many small kernels that way; it is fed few shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Shape(NamedTuple):
    """A padded batch: the texts at `indices` go into the first rows of (rows, width)."""

    indices: list[int]
    rows: int
    width: int


def shares(lengths: Sequence[int], count: int) -> list[list[int]]:
    """The indices of `lengths`, sorted by length, in at most `count` runs of about as many tokens each.

    Sorted, so that texts of about one length meet in one run and share its attention.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    total, before = sum(lengths), 0
    runs: list[list[int]] = [[] for _ in range(count)]
    for index in order:
        # By where the middle of the text falls.
        runs[min(count - 1, (2 * before + lengths[index]) * count // (2 * total))].append(index)
        before += lengths[index]
    return [run for run in runs if run]


def evenly(lengths: Sequence[int], count: int) -> int:
    """How many of the first texts fall into the most even `shares`: all, or up to `count` − 1 less.

    Three texts of one length keep two cores busy for three quarters of their time, two of them for all of it.
    """

    def idle(texts: int) -> float:
        sizes = [sum(lengths[index] for index in run) for run in shares(lengths[:texts], count)]
        return 1.0 - sum(sizes) / (count * max(sizes))

    if count == 1:
        return len(lengths)
    fewest = max(1, len(lengths) - count + 1)
    # A hundredth more of a core is not worth a text less.
    return min(range(len(lengths), fewest - 1, -1), key=lambda texts: round(idle(texts), 2))


def near_runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(texts, width) of the runs of sorted `lengths` that are padded to their longest, by an eighth at most.

    A run's attention is some ten small operations a layer, and nearly every text of a mix has a length of its own: with
    runs of one length alone, 64 of them took a fifth longer.
    """
    found: list[tuple[int, int]] = []
    end = len(lengths)
    while end:
        width, start = lengths[end - 1], end - 1
        while start and 8 * (width - lengths[start - 1]) <= width:
            start -= 1
        found.append((end - start, width))
        end = start
    return found[::-1]


@dataclass(frozen=True)
class Grid:
    """The shapes that there are, of at most `tokens` tokens or one text; every new one costs a compilation.

    `widths`: how many widths lie between two powers of two. `factor`: a number of rows is so many times the one below;
    the last is what fills a batch. `batch`: a batch takes as long as so many tokens of padding. `longest`: tokens that
    the model reads; it has no position, and no bias of one, beyond them.
    """

    tokens: int
    widths: int = 8
    factor: int = 2
    batch: int = 0
    longest: int = 1 << 30

    def width_of(self, length: int) -> int:
        """`length` rounded up to a width of the grid: a multiple of 8, or `longest`."""
        step = 8 if length <= 8 else max(8, (1 << ((length - 1).bit_length() - 1)) // self.widths)
        return min(max(self.longest, length), -(-length // step) * step)

    def most(self, width: int) -> int:
        """Rows of that width that fill a batch."""
        return max(1, self.tokens // width)

    def rows_of(self, texts: int, width: int) -> int:
        """Rows of the next batch, where so many texts are left: what holds them all unless that leaves too much
        empty."""
        below, rows = 1, 1
        while rows < texts and rows < self.most(width):
            below, rows = rows, min(self.factor * rows, self.most(width))
        empty = (rows - texts) * width
        return rows if empty <= max(self.batch, rows * width // 4) else below

    def all(self, longest: int) -> Iterator[tuple[int, int]]:
        """(rows, width) of every shape for texts of up to `longest` tokens, the small ones first."""
        width, last = 0, self.width_of(longest)
        while width < last:
            width, rows = self.width_of(width + 1), 1
            while rows < self.most(width):
                yield rows, width
                rows *= self.factor
            yield self.most(width), width


def shapes(lengths: Sequence[int], grid: Grid) -> list[Shape]:
    """Padded batches of the grid's shapes that hold every text once, longest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    found, start = [], 0
    while start < len(order):
        width = grid.width_of(lengths[order[start]])
        rows = grid.rows_of(len(order) - start, width)
        found.append(Shape(order[start : start + rows], rows, width))
        start += rows
    return found
