"""A disk that takes nothing: what it looks like."""

from __future__ import annotations

import errno

#: No space left, the user's quota used up, a file beyond what the process may write.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
#: Mounted for reading alone (which a damaged file system becomes), a drive that fails, a folder of another user's.
_UNUSABLE = frozenset({errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM})


def trouble(error: BaseException) -> str | None:
    """What is wrong with the disk if that caused `error`, else None: a mended disk lets the job go on."""
    if not isinstance(error, OSError):
        return None
    if error.errno in _FULL:
        return "is full"
    return "cannot be used" if error.errno in _UNUSABLE else None
