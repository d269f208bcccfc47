"""The old path of `stoker.broker.keys`, for programs written against it. It goes with 1.0."""

from __future__ import annotations

from stoker.broker.keys import *  # noqa: F403
