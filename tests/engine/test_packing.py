"""Packing: every text once, little padding, few shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.embedding.forward import PLANNED
from engine.embedding.pacer import EmbedPacer
from engine.embedding.packing import Grid, evenly, near_runs, shapes, shares

LENGTHS = st.lists(st.integers(1, 600), min_size=1, max_size=80)


@given(LENGTHS, st.integers(1, 9))
def test_shares_hold_every_text_once_and_are_sorted(lengths: list[int], count: int) -> None:
    runs = shares(lengths, count)
    assert sorted(index for run in runs for index in run) == list(range(len(lengths)))
    assert 1 <= len(runs) <= count
    assert all(runs)
    flat = [lengths[index] for run in runs for index in run]
    assert flat == sorted(flat)


def test_shares_are_of_about_one_size() -> None:
    lengths = np.random.default_rng(1).integers(8, 257, 100).tolist()
    sizes = [sum(lengths[index] for index in run) for run in shares(lengths, 4)]
    assert max(sizes) - min(sizes) <= 2 * 256


@given(LENGTHS, st.integers(1, 9))
def test_a_step_loses_fewer_texts_than_there_are_streams(lengths: list[int], count: int) -> None:
    assert max(1, len(lengths) - count + 1) <= evenly(lengths, count) <= len(lengths)


@pytest.mark.parametrize(
    ("lengths", "kept"), [([9], 1), ([9] * 2, 2), ([9] * 3, 2), ([30, 9, 9, 9], 4), ([9] * 40, 40)]
)
def test_two_streams_get_as_much_each(lengths: list[int], kept: int) -> None:
    assert evenly(lengths, 2) == kept


@given(LENGTHS)
def test_runs_hold_every_text_once_and_pad_it_by_an_eighth_at_the_most(lengths: list[int]) -> None:
    widths = [width for rows, width in near_runs(sorted(lengths)) for _ in range(rows)]
    assert len(widths) == len(lengths)
    for length, width in zip(sorted(lengths), widths, strict=True):
        assert length <= width <= length + width / 8


def test_texts_of_one_length_are_one_run_without_padding() -> None:
    assert near_runs([7, 7, 16, 17, 18, 30]) == [(2, 7), (3, 18), (1, 30)]


@given(LENGTHS, st.integers(1, 8192))
def test_shapes_hold_every_text_once_within_their_bounds(lengths: list[int], tokens: int) -> None:
    found = shapes(lengths, Grid(tokens))
    assert sorted(index for shape in found for index in shape.indices) == list(range(len(lengths)))
    for shape in found:
        assert 1 <= len(shape.indices) <= shape.rows
        assert max(lengths[index] for index in shape.indices) <= shape.width
        assert shape.rows == 1 or shape.rows * shape.width <= tokens


@pytest.mark.parametrize(("texts", "rows"), [(3, [4]), (5, [4, 1]), (6, [8]), (11, [8, 4]), (12, [16]), (20, [16, 4])])
def test_a_batch_that_is_filled_to_three_quarters_is_one(texts: int, rows: list[int]) -> None:
    assert [shape.rows for shape in shapes([8] * texts, Grid(16 * 8))] == rows


@given(st.integers(1, 100_000))
def test_a_width_is_an_eighth_wider_than_its_text_at_the_most(length: int) -> None:
    grid = Grid(16_384)
    width = grid.width_of(length)
    assert length <= width <= max(length * 1.125, length + 7)
    assert width % 8 == 0
    assert grid.width_of(width) == width


@pytest.mark.parametrize("grid", [PLANNED, Grid(16_384)])
def test_no_shape_is_wider_than_the_model_reads(grid: Grid) -> None:
    bounded = replace(grid, longest=150)
    assert [bounded.width_of(length) for length in (1, 149, 150)] == [8, 150, 150]
    assert max(width for _, width in bounded.all(150)) == 150


def test_padding_is_a_small_part_of_a_realistic_mix() -> None:
    lengths = np.random.default_rng(3).integers(8, 257, 1000).tolist()
    found = shapes(lengths, Grid(16_384))
    assert sum(shape.rows * shape.width for shape in found) < 1.2 * sum(lengths)
    assert len(found) < 20


def test_few_shapes_serve_all_traffic() -> None:
    random = np.random.default_rng(4)
    found = {
        (shape.rows, shape.width)
        for _ in range(300)
        for shape in shapes(random.integers(1, 257, random.integers(1, 400)).tolist(), Grid(16_384))
    }
    assert len(found) < 250


@given(LENGTHS)
def test_a_grid_knows_every_shape_that_it_gives(lengths: list[int]) -> None:
    for grid in (PLANNED, Grid(4096), Grid(100, factor=4)):
        known = list(grid.all(max(lengths)))
        assert {(shape.rows, shape.width) for shape in shapes(lengths, grid)} <= set(known)
        assert len(known) == len(set(known))


def test_where_each_shape_is_planned_there_are_few() -> None:
    assert len(list(PLANNED.all(256))) == 60
    assert [width for rows, width in PLANNED.all(256) if rows == 1] == [8, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert [rows for rows, width in PLANNED.all(24) if width == 24] == [1, 4, 16, 64, 256, 1024, 1365]


@pytest.mark.parametrize(("texts", "rows"), [(1, 1), (2, 4), (5, 16), (70, 256), (129, 256), (600, 256)])
def test_a_batch_may_be_as_empty_as_a_further_batch_would_take(texts: int, rows: int) -> None:
    assert Grid(256 * 16, factor=4, batch=3 * 1024).rows_of(texts, 16) == rows
    assert Grid(256 * 16, factor=4, batch=0).rows_of(5, 16) == 4
    assert Grid(256 * 16, factor=4, batch=2000).rows_of(70, 16) == 64


def test_texts_of_one_length_fill_their_batches() -> None:
    found = shapes([128] * 1000, Grid(16_384))
    assert [(shape.rows, len(shape.indices)) for shape in found] == [(128, 128)] * 7 + [(128, 104)]


@pytest.mark.parametrize(("tokens", "seconds", "wanted"), [(1000, 1.0, 100), (100, 10.0, 50), (10_000, 0.1, 2000)])
def test_a_step_is_as_large_as_the_machine_is_fast(tokens: int, seconds: float, wanted: int) -> None:
    pacer = EmbedPacer(0.1, least=50, most=2000)
    assert pacer.tokens == 50
    pacer.note(tokens, seconds)
    assert pacer.tokens == wanted


def test_one_slow_step_does_not_halve_the_next() -> None:
    """It may have compiled a shape. A machine that stays slow is followed within a few steps."""
    pacer = EmbedPacer(1.0, least=1, most=10_000)
    pacer.note(1000, 1.0)
    pacer.note(1000, 10.0)
    assert pacer.tokens == 775
    for _ in range(12):
        pacer.note(1000, 10.0)
    assert 100 <= pacer.tokens < 130
