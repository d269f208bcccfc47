"""A fast BLAS for MLX's CPU back-end on Linux.

The Linux wheel of MLX links the reference BLAS (2 to 4 GFLOP/s on two cores); OpenBLAS is 30 to 40 times faster. The
package `scipy-openblas32` carries OpenBLAS, with its functions called `scipy_cblas_sgemm` and so on. `boot` writes
a copy with the plain names into a cache and loads it for the whole process, before MLX is loaded, so that MLX's
calls bind to it. Before it comes `few_rows`, which takes the products that OpenBLAS is slow at. On macOS (Accelerate,
Metal) and with MLX CUDA there is nothing to do.

Nothing here raises: without a fast BLAS the engine is slow, not wrong.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from engine.platform import few_rows
from engine.platform.elf import ElfError, strip_prefix
from stoker.files.durable import write_whole
from stoker.files.private import temporary_folder, trusted

log = logging.getLogger(__name__)

_PREFIX = b"scipy_"
#: Part of the cached copy's name: raise it when `strip_prefix` writes something else than before.
_CACHE_VERSION = 1
_TEMPORARY = "stoker-blas-"


@dataclass(frozen=True)
class BlasReport:
    """What `boot` did: whether a fast BLAS was loaded, from which file, why or why not, and its thread count."""

    active: bool
    library: str
    detail: str
    threads: int | None = None


_loaded: ctypes.CDLL | None = None
#: What stands before it, with its file.
_before: tuple[ctypes.CDLL, Path] | None = None
_report: BlasReport | None = None


def boot(threads: int | None = None, *, cache: Path | None = None, library: str = "", own: bool = True) -> BlasReport:
    """Make MLX's CPU back-end use OpenBLAS; call it before anything imports `mlx.core`.

    `threads`: OpenBLAS's thread count; if None, one fewer than there are cores: its threads wait for each other by
    spinning, and a product is 20 times slower once one of them finds no core. `cache`: where the renamed copy is kept,
    `~/.stoker/cache` if None. `library`, a value of STOKER_BLAS: `off`, the path of an OpenBLAS with plain names, or
    nothing. `own`: with the products of `few_rows` where they can be compiled. A second call changes the thread count
    only. Never raises.
    """
    global _loaded, _before, _report
    if _report is not None and _report.active:
        if threads:
            set_threads(threads)
        return _report
    try:
        path, reason = _choose(cache, library)
        if path is None:
            _report = BlasReport(False, "", reason)
            return _report
        loaded = ctypes.CDLL(str(path))
        loaded.cblas_sgemm, loaded.openblas_set_num_threads  # noqa: B018 - AttributeError if it is no OpenBLAS
        _before = _few_rows(loaded) if own else None
        # RTLD_GLOBAL puts the library before libmlx's own dependencies in the dynamic linker's search.
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except (OSError, AttributeError, ElfError) as error:
        _report = BlasReport(False, "", f"no fast BLAS: {error}")
        log.warning("MLX runs on its slow reference BLAS: %s", error)
        return _report
    if path.parent.name.startswith(_TEMPORARY):
        shutil.rmtree(path.parent, ignore_errors=True)  # the mapping outlives the file
    _loaded = loaded
    whose = "Stoker's own" if _before is not None else "OpenBLAS's, half as fast: is there a g++ that works?"
    _report = BlasReport(True, str(path), f"{_config(loaded)}; products of few rows are {whose if own else 'its own'}")
    set_threads(threads or max(1, len(os.sched_getaffinity(0)) - 1))
    return _report


def set_threads(count: int) -> None:
    """Set OpenBLAS's thread count; does nothing where `boot` loaded none."""
    global _report
    if _loaded is None or _report is None:
        return
    _loaded.openblas_set_num_threads(ctypes.c_int(count))
    if _before is not None:
        few_rows.switch(_before[0], count)
    _report = BlasReport(_report.active, _report.library, _report.detail, count)


@contextmanager
def one_thread() -> Iterator[None]:
    """One BLAS thread inside, for callers that keep the cores busy themselves."""
    before = None if _report is None else _report.threads
    if before is None or before == 1:
        yield
        return
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


def verify() -> bool:
    """Whether MLX's matrix products really go to the library that `boot` loaded; logs a warning if not.

    Asks the dynamic linker which file the process-wide `cblas_sgemm` comes from: libmlx binds to that one, because it
    was loaded later and without a symbolic-binding flag. False, without a warning, where `boot` loaded none.
    """
    if _loaded is None or _report is None:
        return False
    found = _file_of("cblas_sgemm")
    expected = _report.library if _before is None else str(_before[1])
    right = found is not None and os.path.realpath(found) == os.path.realpath(expected)
    if not right:
        log.warning("MLX's matrix products go to %s, not to %s", found or "an unknown library", expected)
    return right


def _choose(cache: Path | None, wanted: str) -> tuple[Path | None, str]:
    """The library to load and "", or None and why there is nothing to load."""
    if wanted.lower() == "off":
        return None, "STOKER_BLAS=off"
    if not sys.platform.startswith("linux"):
        return None, f"nothing to do on {sys.platform}"
    if "mlx.core" in sys.modules:
        log.warning("engine.platform.blas.boot() came after `import mlx.core`: MLX keeps the BLAS that it has")
        return None, "mlx.core is already imported"
    if wanted:
        return Path(wanted), ""
    if _has_package("mlx_cuda_12", "mlx_cuda_13", "mlx_cuda"):
        return None, "nothing to do with MLX CUDA"
    source = _packaged_library()
    if source is None:
        log.warning("MLX runs on its slow reference BLAS: install scipy-openblas32, or name one in STOKER_BLAS")
        return None, "scipy-openblas32 is not installed"
    return _renamed_copy(source, cache or Path.home() / ".stoker" / "cache"), ""


def _few_rows(loaded: ctypes.CDLL) -> tuple[ctypes.CDLL, Path] | None:
    """The products that go before those of OpenBLAS, with their file; None where there are none."""
    path = few_rows.compiled(temporary_folder())
    try:
        return None if path is None else (few_rows.load(path, loaded), path)
    except (OSError, AttributeError) as error:
        log.warning("products of few rows are left to OpenBLAS: %s", error)
        return None


def _has_package(*names: str) -> bool:
    from importlib.metadata import PackageNotFoundError, distribution

    for name in names:
        with suppress(PackageNotFoundError):
            distribution(name)
            return True
    return False


def _packaged_library() -> Path | None:
    spec = importlib.util.find_spec("scipy_openblas32")
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in sorted(Path(folder, "lib").glob("*openblas*.so")):
            return path
    return None


def _renamed_copy(source: Path, cache: Path) -> Path:
    """`source` with plain names, from `cache` or written there (a folder of this user's where that is not writable)."""
    state = source.stat()
    key = f"{_CACHE_VERSION}:{source}:{state.st_size}:{state.st_mtime_ns}"
    name = f"openblas-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if trusted(cache / name):
        return cache / name
    image = strip_prefix(source.read_bytes(), _PREFIX)
    try:
        return _written(cache / name, image)
    except OSError as error:
        log.info("cannot keep the renamed OpenBLAS in %s (%s); using a temporary folder", cache, error)
        # A folder that nobody else can have prepared: a shared, guessable name would let others choose the library.
        return _written(Path(tempfile.mkdtemp(prefix=_TEMPORARY)) / name, image)


def _written(path: Path, image: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda draft: draft.write_bytes(image))
    return path


def _config(library: ctypes.CDLL) -> str:
    library.openblas_get_config.restype = ctypes.c_char_p
    text = library.openblas_get_config()
    named = text.decode(errors="replace").strip() if text else "OpenBLAS"
    return (
        f"{named}, AVX2's kernels on a processor with AVX-512: is OPENBLAS_CORETYPE set?" if _narrow(named) else named
    )


def _narrow(named: str) -> bool:
    """Whether these are AVX2's kernels on a processor with AVX-512, where large products take 1.7 times as long."""
    return not {"Haswell", "Zen"}.isdisjoint(named.split()) and "avx512f" in few_rows.processor().split()


class _DlInfo(ctypes.Structure):
    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _file_of(symbol: str) -> str | None:
    """The file that the process-wide `symbol` is defined in."""
    process = ctypes.CDLL(None)
    try:
        address = ctypes.cast(getattr(process, symbol), ctypes.c_void_p)
        info = _DlInfo()
        if not process.dladdr(address, ctypes.byref(info)):
            return None
    except AttributeError:
        return None
    return info.file.decode(errors="replace") if info.file else None
