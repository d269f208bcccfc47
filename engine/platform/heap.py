"""The C library's heap on Linux, where MLX's CPU back-end keeps its arrays."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

#: Blocks of this many bytes and more are mapped by themselves. The arrays of an embedding step (up to 3 MB) are not: to
#: map and clear each of them anew cost mixed texts a fifth to a third of their speed.
MAPPED = 4 << 20
#: What may lie free at the end of the heap. glibc's 128 KiB have it give back the last array that is freed, and fault
#: its pages in again for the next one: 12 ms of the 15 that e^x of 3 MB took.
KEPT = 64 << 20
#: Heaps of the process: glibc would give a thread its own, up to eight a core, and each of them keeps `KEPT`. A worker
#: that had a few thousand odd requests in its 26 threads held 500 MB that way, for nothing.
HEAPS = 2
#: glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def arrange() -> bool:
    """Have blocks of `MAPPED` bytes go back to the system when they are freed, smaller ones stay; whether that worked.

    glibc raises its own threshold to the largest block it ever saw freed, up to 32 MiB: then the arrays of a step lie
    among small blocks, and what is free between them stays resident (in a soak 15 to 120 MiB, coming and going). A
    prompt of 256 tokens takes as long with either.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    options = {_M_MMAP_THRESHOLD: MAPPED, _M_TRIM_THRESHOLD: KEPT, _M_ARENA_MAX: HEAPS}
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in options.items())


def give_back() -> bool:
    """Give the system all whole pages that lie free, except `KEPT` at the heap's end; whether any were given.

    What is free between blocks that are held stays resident otherwise: a thousand odd texts, each megabytes for a
    moment, left 90 MB that way, and 45 with this. It takes up to 0.1 s: for a worker that rests.
    """
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and trim(ctypes.c_size_t(KEPT)) == 1


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say it the way that Linux does."""
    said = Path("/proc/self/statm")
    return int(said.read_text("utf-8").split()[1]) * resource.getpagesize() if said.exists() else 0
