"""Out of memory is distinguished from other errors by what MLX says."""

from __future__ import annotations

import pytest

from workers.memory import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[metal::malloc] Attempting to allocate 98304000000 bytes which is greater than the maximum"),
        RuntimeError("[malloc_or_wait] Unable to allocate 4096 bytes."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("cudaMallocAsync failed: out of memory"),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU…OutOfMemory)"),
    ],
)
def test_each_back_ends_text_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("[matmul] shapes (2, 3) and (4, 5)"), ValueError("out of memory")])
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)
