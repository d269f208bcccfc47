"""What all sources of MLX's fused loops begin with, compiled once on a machine.

MLX's CPU back-end has g++ compile each loop from a source of its own, and the templates that every source includes are
nearly all of that work. g++ takes a file with `.gch` behind the name of a header, in the folder of the source, for the
compiled header (GCC manual, "Using Precompiled Headers"): a loop takes 0.3 s of processor time then, and 1.5 without.
It ignores a file that another g++ made, or that was made with other flags.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from engine.platform import gxx
from stoker.files.durable import write_whole
from stoker.files.locks import try_lock

log = logging.getLogger(__name__)

#: The header, below MLX's includes, and the flags that MLX compiles with.
HEADER = "mlx/backend/cpu/compiled_preamble.h"
FLAGS = ("-std=c++17", "-O3", "-Wall", "-fPIC")


def loops_folder() -> Path:
    """Where MLX keeps its loops: in the folder for temporary files."""
    return Path(tempfile.gettempdir()) / "mlx" / str(mx.__version__) / "cpu"  # type: ignore[attr-defined]


def compile_once() -> bool:
    """Compile the header unless this g++ has; whether it is there. Only g++ of Linux is known to take it."""
    compiler, header = gxx.found(), Path(mx.__file__).parent / "include" / HEADER
    if sys.platform != "linux" or compiler is None or not header.exists():
        return False
    target = loops_folder() / f"{HEADER}.gch"
    if _is_of(target, compiler):
        return True
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.parent) as alone:
            if alone:
                write_whole(target, lambda draft: gxx.compile(compiler, _words(header), draft))
            return alone
    except gxx.ERRORS as error:
        log.info("each fused loop takes g++ a second: what they share could not be compiled (%s)", error)
        return False


def _is_of(target: Path, compiler: Path) -> bool:
    """Whether a header was compiled since g++ was installed."""
    try:
        return target.stat().st_mtime >= compiler.stat().st_ctime
    except OSError:
        return False


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether no other process compiles the header now; one that does is not waited for."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield try_lock(descriptor)
    finally:
        os.close(descriptor)


def _words(header: Path) -> tuple[str, ...]:
    return (*FLAGS, "-I", str(header.parents[HEADER.count("/")]), "-x", "c++-header", str(header))
