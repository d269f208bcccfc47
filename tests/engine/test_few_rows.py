"""Products of few rows, which Stoker takes from OpenBLAS on Linux CPUs."""

from __future__ import annotations

import ctypes
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.platform import few_rows

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="g++ of Linux compiles them"
)

_POINTER = ctypes.c_void_p
_SGEMM = ctypes.CFUNCTYPE(
    None,
    *[ctypes.c_int] * 6,
    *(ctypes.c_float, _POINTER, ctypes.c_int, _POINTER, ctypes.c_int, ctypes.c_float, _POINTER, ctypes.c_int),
)
AS_IT_IS, TRANSPOSED = 111, 112


@dataclass
class Products:
    """The library, before a BLAS that does nothing and is counted."""

    library: ctypes.CDLL
    passed_on: int = 0

    def __post_init__(self) -> None:
        def blas_of_nothing(*_: Any) -> None:
            self.passed_on += 1

        self._blas = _SGEMM(blas_of_nothing)
        self.library.few_rows_begin(self._blas)
        few_rows.switch(self.library, 1)
        self._sgemm = _SGEMM(("cblas_sgemm", self.library))

    def __call__(
        self, a: np.ndarray, b: np.ndarray, *, turned: tuple[bool, bool] = (False, True), onto: np.ndarray | None = None
    ) -> np.ndarray | None:
        """a (m, k) times b (k, n), each stored as its transpose where `turned`, with gaps between its rows; on top of
        twice `onto`. None: it was passed on."""
        stored = [np.pad(x.T if t else x, ((0, 0), (0, 3))).copy() for x, t in zip((a, b), turned, strict=True)]
        c = np.full((a.shape[0], b.shape[1] + 2), np.nan, np.float32)
        if onto is not None:
            c[:, :-2] = onto
        before = self.passed_on
        orders = [TRANSPOSED if t else AS_IT_IS for t in turned]
        places = [part for x in stored for part in (x.ctypes.data, x.shape[1])]
        sizes = a.shape[0], b.shape[1], a.shape[1]
        beta = 0.0 if onto is None else 2.0
        self._sgemm(101, *orders, *sizes, 0.5, *places, beta, c.ctypes.data, c.shape[1])
        assert np.isnan(c[:, -2:]).all(), "nothing is written next to the product"
        return None if self.passed_on > before else c[:, :-2]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = few_rows.compiled(tmp_path_factory.mktemp("cache"))
    assert path is not None
    return path


@pytest.fixture
def products(kept: Path) -> Products:
    # Its own: the one that this process multiplies with goes on as it is.
    return Products(ctypes.CDLL(str(kept)))


def _numbers(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def test_products_of_any_size_and_order_are_right_and_stay_in_their_place(products: Products) -> None:
    random, taken = np.random.default_rng(0), 0
    for _ in range(1500):
        m, n, k = (int(size) for size in random.integers((1, 1, 0), (40, 70, 90)))
        turned = bool(random.integers(2)), bool(random.integers(2))
        a, b = _numbers(random, m, k), _numbers(random, k, n)
        onto = _numbers(random, m, n) if random.integers(2) else None
        made = products(a, b, turned=turned, onto=onto)
        if made is None:
            continue
        taken += 1
        exact = 0.5 * (a.astype(np.float64) @ b) + (0 if onto is None else 2.0 * onto)
        assert np.abs(made - exact).max() < 1e-5 * max(1, k)
    assert taken > 300


def test_a_row_does_not_depend_on_how_many_come_with_it(products: Products) -> None:
    random = np.random.default_rng(1)
    for turned, most in (((False, True), 16), ((False, False), 8), ((True, False), 8)):
        a, b = _numbers(random, most, 77), _numbers(random, 77, 53)
        alone = products(a[:1], b, turned=turned)
        for rows in range(2, most + 1):
            made = products(a[:rows], b, turned=turned)
            assert made is not None
            assert alone is not None
            assert made[0].tobytes() == alone[0].tobytes(), (turned, rows)


def test_a_product_of_few_columns_has_the_numbers_of_its_transpose(products: Products) -> None:
    """Attention's scores of one new token: as many rows as there are keys."""
    random = np.random.default_rng(2)
    keys, queries = _numbers(random, 500, 64), _numbers(random, 3, 64)
    scores, turned = products(keys, queries.T), products(queries, keys.T)
    assert scores is not None
    assert turned is not None
    assert (scores == turned.T).all()


def test_products_of_many_rows_and_those_of_many_threads_are_the_blas_own(products: Products) -> None:
    random = np.random.default_rng(3)
    assert products(_numbers(random, 64, 8), _numbers(random, 8, 9)) is None
    few = _numbers(random, 2, 8), _numbers(random, 8, 9)
    assert products(*few) is not None
    few_rows.switch(products.library, few_rows.THREADS + 1)
    assert products(*few) is None
    assert products(few[1].T, few[0].T) is None


def test_they_are_compiled_once_for_a_machine(kept: Path) -> None:
    before = kept.stat().st_mtime_ns
    assert few_rows.compiled(kept.parent) == kept
    assert kept.stat().st_mtime_ns == before


def test_a_library_that_others_may_have_written_is_compiled_anew(tmp_path: Path) -> None:
    path = few_rows.compiled(tmp_path)
    assert path is not None
    path.write_bytes(b"another's")
    path.chmod(0o666)
    assert few_rows.compiled(tmp_path) == path
    assert path.read_bytes()[:4] == b"\x7fELF"


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert few_rows.compiled(tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compiler", [None, "exit 1"])
def test_without_a_compiler_that_works_the_blas_keeps_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None
) -> None:
    if compiler is not None:
        (tmp_path / "g++").write_text(f"#!/bin/sh\n{compiler}\n")
        (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert few_rows.compiled(tmp_path / "cache") is None
    assert not list(tmp_path.glob("cache/*"))
