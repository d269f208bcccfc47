"""The old path of `stoker.broker.ledger`, for programs written against it. It goes with 1.0."""

from __future__ import annotations

from stoker.broker.ledger import *  # noqa: F403
