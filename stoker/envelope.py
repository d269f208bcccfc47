"""The old path of `stoker.broker.envelope`, for programs written against it. It goes with 1.0."""

from __future__ import annotations

from stoker.broker.envelope import *  # noqa: F403
