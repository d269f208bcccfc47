"""Out of memory: what it looks like, and how often a job may try again.

A step that fails for want of memory fails every job of its lane, and the worker cannot know which of them was the one
too many. So each goes back to its queue, and the lane holds half as many for a while (`Lanes.shrink`): the small ones
get through, and one that is too large by itself fails in the end.
"""

from __future__ import annotations

import re

#: Attempts of a job that may end so before the job fails.
TRIES = 3

#: MLX raises RuntimeError on every back-end: these are the texts of Metal, CUDA and the CPU's allocator.
_SAYS = re.compile(
    r"bad_alloc|out of memory|OutOfMemory|insufficient memory|unable to allocate|attempting to allocate", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_SAYS.search(str(error))))
