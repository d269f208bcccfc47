"""Products of few rows on Linux CPUs, in place of OpenBLAS's: `few_rows.cc`, compiled once on a machine.

A decode step multiplies one row, or a few, with every matrix of the model. OpenBLAS copies each matrix into an order of
its own first, at a third of what memory gives. What it does for many rows is as good as can be, so those stay its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
from pathlib import Path

from engine.platform import gxx
from stoker.files.durable import write_whole
from stoker.files.private import trusted

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cc")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
#: Threads of OpenBLAS up to which one thread is faster here: more of them together get more out of memory.
THREADS = 3


def compiled(folder: Path) -> Path | None:
    """The library, from `folder` or compiled into it, half a second; None where g++ is missing or does not work."""
    compiler = gxx.found()
    if compiler is None or platform.machine() not in ("x86_64", "aarch64"):
        return None
    target = folder / f"few-rows-{_key(compiler)}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not trusted(folder):
            raise PermissionError(f"others may write to {folder}")
        if not trusted(target):
            write_whole(target, lambda draft: gxx.compile(compiler, (*FLAGS, str(SOURCE)), draft))
    except gxx.ERRORS as error:
        log.info("products of few rows are left to OpenBLAS: %s could not be compiled (%s)", SOURCE.name, error)
        return None
    return target


def load(library: Path, blas: ctypes.CDLL) -> ctypes.CDLL:
    """Load it for the whole process, before what it stands before. Raises `OSError`, `AttributeError`."""
    loaded = ctypes.CDLL(str(library))
    loaded.few_rows_begin(ctypes.cast(blas.cblas_sgemm, ctypes.c_void_p))
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def switch(loaded: ctypes.CDLL, threads: int) -> None:
    """Take products of few rows, or leave them to an OpenBLAS with so many threads."""
    loaded.few_rows_switch(int(threads <= THREADS))


def _key(compiler: Path) -> str:
    """What the library is for: this source, this g++ and this processor, since machines may share a folder."""
    state = compiler.stat()
    parts = (SOURCE.read_bytes(), repr((FLAGS, state.st_size, state.st_mtime_ns, processor())).encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def processor() -> str:
    """What the processor can do, as Linux says it."""
    lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
