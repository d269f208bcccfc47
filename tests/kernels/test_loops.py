"""No loop of a kernel depends on data or on rounding for its end: a GPU has no way out of one that never ends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kernels
from tests.kernels.loops import unbounded

HERE = Path(kernels.__file__).parent
#: All except what stands in for Metal on CUDA, where loops are of constants.
TEXTS = sorted(
    path for ending in ("*.metal", "*.h") for path in HERE.rglob(ending) if path.parent.name not in ("cuda", "runtime")
)
#: Loops that end by another argument, by file: none.
EXCEPTIONS: dict[str, list[str]] = {}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_loop_has_a_bound_that_no_number_breaks(path: Path) -> None:
    assert unbounded(path.read_text()) == EXCEPTIONS.get(path.name, [])


def test_all_texts_are_read_and_have_loops() -> None:
    assert {"sample_pick.metal", "sample_pick.h", "attend.metal", "mean_pool.metal"} <= {path.name for path in TEXTS}
    assert sum(len(re.findall(r"\bfor \(", path.read_text())) for path in TEXTS) > 60


REFUSED = {
    "while": "while (i < 3) i++;",
    "do": "do { i++; } while (i < 3);",
    "no bound": "for (;;) { break; }",
    "a bound from memory": "for (uint i = 0; i < uint(lengths[row]); i++) x += 1;",
    "a variable": "for (uint i = 0; i < size; i++) x += 1;",
    "a variable that is no constant": "uint n = N; n = data[0]; for (uint i = 0; i < n; i++) x += 1;",
    "a constant from memory": "const uint n = uint(lengths[row]); for (uint i = 0; i < n; i++) x += 1;",
    "the larger of two": "for (uint i = 0; i < metal::max(n, N); i++) x += 1;",
    "a step from memory": "for (uint i = 0; i < N; i += steps[row]) x += 1;",
    "a step backwards": "for (uint i = N; i < N; i--) x += 1;",
    "a shift that may stay at 0": "for (uint step = LANES; step < 32; step <<= 1) x += 1;",
    "a body that changes the variable": "for (uint i = 0; i < N; i++) { if (x) i -= 1; }",
    "a body of one line that does": "for (uint i = 0; i < N; i++) i = 0;",
    "either of two": "for (uint i = 0; i < N || x > y; i++) x += 1;",
    "a variable x": "for (uint i = 0; i < x; i++) y += 1;",
    "a constant of two meanings": "const uint n = m; for (uint i = 0; i < n; i++) x += 1; const uint n = N;",
    "a sum with a number from memory": "for (uint i = 0; i < N + n; i++) x += 1;",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=list(REFUSED))
def test_a_loop_that_may_not_end_is_refused(text: str) -> None:
    assert unbounded(text)


TAKEN = {
    "a template": "for (int i = 0; i < ITEMS; i++) { x[i] = 0.0f; }",
    "threads": "const uint threads = threads_per_threadgroup.x; for (uint i = t; i < uint(D); i += threads) x += 1;",
    "a shape": "const uint n = uint(x_shape[1]); for (uint i = 0; i < n; i++) x += 1;",
    "the smaller of two": "const uint n = metal::min(uint(lengths[row]), N); for (uint i = 0; i < n; i++) x += 1;",
    "halving": "for (uint step = 16; step > LANES / 2; step >>= 1) x += 1;",
    "a bound and more": "for (uint i = 0; i < uint(N) && found == 0; i += 32) x += i;",
    "a comparison in the body": "for (uint i = 0; i < N; i++) { if (i == 3) x += 1; }",
}


@pytest.mark.parametrize("text", TAKEN.values(), ids=list(TAKEN))
def test_a_loop_with_a_bound_is_taken(text: str) -> None:
    assert unbounded(text) == []
