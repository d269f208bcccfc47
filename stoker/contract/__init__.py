"""What clients and workers say to each other: requests, results and stream entries, as frozen models, JSON only."""

from stoker.contract.codec import CONTRACT, build, decode, encode
from stoker.contract.presence import ModelCard, Presence
from stoker.contract.requests import (
    LORA_TARGETS,
    EmbedRequest,
    GenerateRequest,
    Request,
    TrainRequest,
)
from stoker.contract.results import EmbedReply, GenerateResult, TrainResult, Usage
from stoker.contract.stream import StreamToken, TrainReport

__all__ = [
    "CONTRACT",
    "LORA_TARGETS",
    "EmbedReply",
    "EmbedRequest",
    "GenerateRequest",
    "GenerateResult",
    "ModelCard",
    "Presence",
    "Request",
    "StreamToken",
    "TrainReport",
    "TrainRequest",
    "TrainResult",
    "Usage",
    "build",
    "decode",
    "encode",
]
