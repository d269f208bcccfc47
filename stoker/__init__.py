"""Stoker: a job queue that keeps a language model hot. Clients import this; it needs neither MLX nor worker code."""

from stoker.aio import AsyncClient, AsyncEmbedJob, AsyncGenerateJob, AsyncTrainJob
from stoker.client import Client, EmbedJob, GenerateJob, Job, TrainJob
from stoker.client_core import JobStatus
from stoker.contract import GenerateResult, StreamToken, TrainReport, TrainResult
from stoker.errors import StokerError

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncEmbedJob",
    "AsyncGenerateJob",
    "AsyncTrainJob",
    "Client",
    "EmbedJob",
    "GenerateJob",
    "GenerateResult",
    "Job",
    "JobStatus",
    "StokerError",
    "StreamToken",
    "TrainJob",
    "TrainReport",
    "TrainResult",
    "__version__",
]
