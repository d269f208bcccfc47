"""A full disk: what it looks like."""

from __future__ import annotations

import errno
from typing import TypeGuard

#: No space left, the user's quota used up, a file beyond what the process may write.
_SAYS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_full(error: BaseException) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in _SAYS
