"""Stoker: a job queue that keeps a language model hot. Clients import this; it needs neither MLX nor worker code.

Names are imported when they are first used: worker code and `stoker models`, which need a module or two of this
package, do not wait for the client's broker libraries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stoker.broker.outcome import JobStatus
    from stoker.client import AdapterJob, Client, EmbedJob, GenerateJob, Job, RerankJob, TrainJob
    from stoker.client._async.client import AsyncClient
    from stoker.client._async.jobs import (
        AsyncAdapterJob,
        AsyncEmbedJob,
        AsyncGenerateJob,
        AsyncJob,
        AsyncRerankJob,
        AsyncTrainJob,
    )
    from stoker.contract import GenerateResult, RerankResult, StreamToken, ToolCall, TrainReport, TrainResult
    from stoker.errors import StokerError

__version__ = "0.1.0"

_HOMES = {
    "stoker.client._async.client": ("AsyncClient",),
    "stoker.client._async.jobs": (
        "AsyncAdapterJob",
        "AsyncEmbedJob",
        "AsyncGenerateJob",
        "AsyncJob",
        "AsyncRerankJob",
        "AsyncTrainJob",
    ),
    "stoker.client": ("AdapterJob", "Client", "EmbedJob", "GenerateJob", "Job", "RerankJob", "TrainJob"),
    "stoker.broker.outcome": ("JobStatus",),
    "stoker.contract": ("GenerateResult", "RerankResult", "StreamToken", "ToolCall", "TrainReport", "TrainResult"),
    "stoker.errors": ("StokerError",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # Type checkers would take every name for one that there is.

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AdapterJob",
    "AsyncAdapterJob",
    "AsyncClient",
    "AsyncEmbedJob",
    "AsyncGenerateJob",
    "AsyncJob",
    "AsyncRerankJob",
    "AsyncTrainJob",
    "Client",
    "EmbedJob",
    "GenerateJob",
    "GenerateResult",
    "Job",
    "JobStatus",
    "RerankJob",
    "RerankResult",
    "StokerError",
    "StreamToken",
    "ToolCall",
    "TrainJob",
    "TrainReport",
    "TrainResult",
    "__version__",
]
