"""OpenBLAS under MLX's CPU back-end: each boot in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.platform import blas, few_rows
from engine.platform.elf import ElfError, strip_prefix

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the BLAS boot does nothing elsewhere")

SCRIPT = """
import json, sys
from pathlib import Path
if "late" in sys.argv: import mlx.core
from engine.platform import blas
assert "late" in sys.argv or "mlx.core" not in sys.modules
report = blas.boot(1, cache=Path(sys.argv[1]), library=sys.argv[2])
import mlx.core as mx
a = mx.arange(12.0).reshape(3, 4)
exact = (a @ a.T).tolist() == [[14, 38, 62], [38, 126, 214], [62, 214, 366]]
print(json.dumps([report.active, report.library, report.detail, report.threads, blas.verify(), exact]))
"""


def boot(cache: Path, *arguments: str, library: str = "") -> tuple[bool, str, str, int | None, bool, bool]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(cache), library, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@linux_only
def test_these_tests_multiply_with_openblas_though_others_were_collected_first() -> None:
    pytest.importorskip("scipy_openblas32")
    assert blas.verify()


@linux_only
def test_mlx_multiplies_with_openblas_after_boot(tmp_path: Path) -> None:
    pytest.importorskip("scipy_openblas32")
    active, library, detail, threads, verified, exact = boot(tmp_path)
    assert active
    assert verified
    assert exact
    assert threads == 1
    assert "OpenBLAS" in detail
    assert detail.endswith("; products of few rows are Stoker's own") is (shutil.which("g++") is not None)
    assert Path(library).parent == tmp_path
    assert boot(tmp_path)[1] == library, "the second boot reads the copy that the first one wrote"
    assert len(list(tmp_path.iterdir())) == 1
    assert boot(tmp_path / "plain", library=library)[:2] == (True, library)


@linux_only
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles them")
def test_where_the_products_of_few_rows_cannot_be_loaded_openblas_has_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy_openblas32")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert boot(tmp_path / "cache")[2].endswith("few rows are Stoker's own")
    (library,) = tmp_path.glob("stoker-*/few-rows-*.so")
    library.write_bytes(b"no library")
    active, _, detail, _, verified, exact = boot(tmp_path / "cache")
    assert (active, verified, exact) == (True, True, True)
    assert detail.endswith("few rows are OpenBLAS's, half as fast: is there a g++ that works?")


@linux_only
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    pytest.importorskip("scipy_openblas32")
    (tmp_path / "file").write_text("in the way")
    active, library, *_ = boot(tmp_path / "file")
    assert active
    assert not Path(library).exists(), "the temporary copy goes once it is loaded"


@linux_only
def test_what_was_loaded_says_where_it_has_older_kernels_than_the_processor_could_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy_openblas32")
    said = ", AVX2's kernels on a processor with AVX-512: is OPENBLAS_CORETYPE set?; "
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert (said in boot(tmp_path)[2]) is ("avx512f" in few_rows.processor().split())
    monkeypatch.delenv("OPENBLAS_CORETYPE")
    assert "AVX2" not in boot(tmp_path)[2]


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    active, _, detail, _, verified, exact = boot(tmp_path, library="off")
    assert (active, verified, exact) == (False, False, True)
    assert detail == "STOKER_BLAS=off"


@linux_only
def test_a_wrong_library_is_reported_and_mlx_still_works(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.so"
    wrong.write_bytes(b"no library")
    active, _, detail, _, _, exact = boot(tmp_path, library=str(wrong))
    assert not active
    assert "no fast BLAS" in detail
    assert exact


@linux_only
def test_boot_after_mlx_changes_nothing(tmp_path: Path) -> None:
    active, _, detail, *_ = boot(tmp_path, "late")
    assert (active, detail) == (False, "mlx.core is already imported")


@pytest.mark.parametrize("keep", [0, 5, 40, 64, 200, 700, 50_000])
def test_a_damaged_library_is_refused_cleanly(keep: int) -> None:
    package = pytest.importorskip("scipy_openblas32")
    source = next(Path(package.__file__).parent.glob("lib/*openblas*.so"), None)
    if source is None:
        pytest.skip("no ELF library in this platform's package")
    with pytest.raises(ElfError):
        strip_prefix(source.read_bytes()[:keep], b"scipy_")
