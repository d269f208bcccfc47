"""The broker's clock: those of clients, gateways and workers differ."""

from __future__ import annotations

from typing import Any


def seconds(reply: Any) -> float:
    """What `TIME` answers, in seconds since the epoch."""
    whole, micros = reply
    return float(whole) + float(micros) / 1e6
