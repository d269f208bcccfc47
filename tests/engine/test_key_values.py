"""Keys, values and states of rows: each follows its row, and no row sees what is another's or beyond its window."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from engine.models.key_values import KeyValues
from engine.models.kv_sizes import KvSide, KvSizes, StateShape
from engine.models.view import View
from engine.platform.compiler import on_cpu

FLOAT = mx.float32


class Mixed:
    """A model of two layers that attend, with keys and values of their own sizes, and two that keep states."""

    kv_sizes = KvSizes(
        [KvSide(2, 3, FLOAT), KvSide(1, 4, FLOAT)],
        [KvSide(2, 2, FLOAT), KvSide(1, 5, FLOAT)],
        [StateShape((4,), FLOAT), StateShape((2, 3), FLOAT)],
    )


def filled(rows: int, capacity: int, first: int = 1) -> KeyValues:
    """Each row with numbers of its own in all that is kept of it: `first`, and one more for each row."""
    kv = KeyValues(Mixed(), rows, capacity)
    kv.stored = tuple([array + numbers(rows, first, array.ndim) for array in arrays] for arrays in kv.stored)  # type: ignore[assignment]
    return kv


def numbers(rows: int, first: int, dimensions: int) -> mx.array:
    return mx.arange(first, first + rows).astype(FLOAT).reshape(-1, *[1] * (dimensions - 1))


def of_rows(kv: KeyValues, length: int) -> list[list[float]]:
    """For each row, the numbers that its first `length` positions and its states hold."""
    found = []
    for row in range(kv.rows):
        sides = [array[row, :, :length] for array in (*kv.keys, *kv.values)]
        arrays = [np.array(array).ravel() for array in (*sides, *(state[row] for state in kv.states))]
        found.append(sorted(set(np.concatenate(arrays).tolist())))
    return found


@pytest.mark.parametrize(("rows", "capacity"), [(5, 8), (2, 8), (3, 12), (4, 4)])
def test_what_is_kept_of_a_row_stays_with_it_when_the_storage_changes_its_size(rows: int, capacity: int) -> None:
    kv = filled(3, 8)
    kv.resize(rows, capacity)
    assert {array.shape[0] for arrays in kv.stored for array in arrays} == {rows}
    assert {array.shape[2] for array in (*kv.keys, *kv.values)} == {capacity}
    assert of_rows(kv, min(8, capacity)) == [[1.0], [2.0], [3.0], [0.0], [0.0]][:rows]


def test_what_is_kept_of_a_row_goes_with_it_into_another_storage_and_within_one() -> None:
    kv, other = filled(3, 8), filled(2, 6, first=11)
    kv.put(1, other, 1, 6)
    assert of_rows(kv, 6) == [[1.0], [12.0], [3.0]]
    kv.leave(0, 2, 8)
    assert of_rows(kv, 8)[0] == [3.0]
    alone = kv.row(1, 6)
    assert (alone.rows, alone.capacity, of_rows(alone, 6)) == (1, 6, [[12.0]])
    assert of_rows(other, 6) == [[11.0], [12.0]], "the source keeps its own"


@pytest.mark.skipif(not on_cpu(), reason="a GPU copies all arrays faster than a row is waited for")
@pytest.mark.parametrize("change", [lambda kv: kv.leave(0, 2, 4096), lambda kv: kv.swap(0, 2, 4096)])
def test_a_row_that_moves_takes_memory_for_itself_alone(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[KeyValues], None]
) -> None:
    kv = filled(16, 4096)
    # What is only on its way may come before the row is written, or not: here it does not.
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: None)
    mx.eval(kv.stored)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    change(kv)
    mx.eval(kv.stored)
    assert mx.get_peak_memory() - before < 3 * kv.nbytes / kv.rows
    assert of_rows(kv, 4096)[0] == [3.0]


def test_nothing_of_a_row_that_is_gone_is_left_and_of_the_others_what_they_have() -> None:
    kv = filled(3, 8)
    kv.clear_beyond([8, 0, 5])
    assert of_rows(kv, 5) == [[1.0], [0.0], [3.0]]
    assert of_rows(kv, 8)[2] == [0.0, 3.0]
    assert {float(np.array(state[2]).min()) for state in kv.states} == {3.0}


def test_a_pass_of_fewer_rows_changes_the_states_of_those_alone() -> None:
    kv = filled(3, 8)
    view = View(kv.stored, mx.array([1, 1]), (2, 1), 8)
    for index, shape in enumerate(Mixed.kv_sizes.states):
        assert [np.unique(np.array(row)).tolist() for row in view.state(index)] == [[1.0], [2.0]]
        view.set_state(index, mx.full((2, *shape.shape), 7.0))
    kv.stored = view.written
    for state in kv.states:
        assert [np.unique(np.array(row)).tolist() for row in state] == [[7.0], [7.0], [3.0]]


@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_a_new_token_sees_itself_and_what_its_window_holds_before_it(window: int | None) -> None:
    offsets, tokens, length = [0, 4, 9], 2, 12
    view = View(filled(3, 12).stored, mx.array(offsets), (3, tokens), length, window=window)
    seen = np.array(view.mask)[:, 0]
    for row, offset in enumerate(offsets):
        for token in range(tokens):
            position = offset + token
            first = 0 if window is None else max(0, position + 1 - window)
            assert np.flatnonzero(seen[row, token]).tolist() == list(range(first, position + 1))
