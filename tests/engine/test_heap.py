"""What is freed goes back to the system if it is large, and stays if it is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from engine.platform.heap import MAPPED, arrange

assert arrange()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc.mallinfo2.restype = Info
# Freeing a mapped block is what would raise glibc's own threshold.
for _ in range(3):
    before = libc.mallinfo2().hblks
    block = libc.malloc(8 * MAPPED)
    assert libc.mallinfo2().hblks == before + 1, "mapped by itself"
    libc.free(block)
    assert libc.mallinfo2().hblks == before

# A smaller one stays with the heap, its pages too: they need not be made anew for the next.
small = MAPPED - 4096
libc.free(libc.malloc(small))
assert libc.mallinfo2().keepcost >= small, libc.mallinfo2().keepcost
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_large_blocks_go_back_to_the_system_and_small_ones_stay() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
