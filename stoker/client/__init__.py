"""The clients. `_async` is the source; `_sync`, the blocking client, is generated from it."""

from stoker.client._sync.adapters import Adapters
from stoker.client._sync.client import Client
from stoker.client._sync.jobs import AdapterJob, EmbedJob, GenerateJob, Job, RerankJob, TrainJob

__all__ = ["AdapterJob", "Adapters", "Client", "EmbedJob", "GenerateJob", "Job", "RerankJob", "TrainJob"]
