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


THREADS = """
import ctypes, threading
from pathlib import Path
from engine.platform.heap import HEAPS, KEPT, MAPPED, arrange

assert arrange()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

over, before, threads = threading.Event(), resident(), []

def work(done):
    blocks = [libc.malloc(MAPPED // 4) for _ in range(40)]
    for block in blocks:
        libc.memset(block, 1, MAPPED // 4)
    for block in blocks:
        libc.free(block)
    done.set()
    over.wait()

for _ in range(16):
    done = threading.Event()
    threads.append(threading.Thread(target=work, args=(done,)))
    threads[-1].start()
    done.wait()
grown = resident() - before
over.set()
assert grown < (HEAPS + 1) * KEPT, grown
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_threads_share_heaps_so_that_what_each_keeps_does_not_add_up() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


HOLES = """
import ctypes
from engine.platform.heap import KEPT, arrange, give_back, resident

assert arrange()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
MB = 1 << 20

before, blocks, held = resident(), [], []
for _ in range(300):
    blocks.append(libc.malloc(MB))
    libc.memset(blocks[-1], 1, MB)
    held.append(libc.malloc(1000))
for block in blocks:
    libc.free(block)
with_holes = resident() - before
assert with_holes > 250 * MB, with_holes
assert give_back()
assert resident() - before < KEPT + 20 * MB, resident() - before
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_what_lies_free_between_blocks_that_are_held_can_be_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
