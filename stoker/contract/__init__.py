"""What clients and workers say to each other: requests, results and stream entries, as frozen models, JSON only."""

from stoker.contract.codec import CONTRACT, build, decode, encode
from stoker.contract.presence import ModelCard, Presence
from stoker.contract.requests import (
    DEFAULT_TARGETS,
    LORA_TARGETS,
    AdapterRequest,
    ChatMessage,
    EmbedRequest,
    GenerateRequest,
    Request,
    TrainRequest,
)
from stoker.contract.results import (
    AdapterResult,
    Completion,
    EmbedReply,
    GenerateResult,
    Ranked,
    RerankResult,
    ToolCall,
    TrainResult,
    Usage,
)
from stoker.contract.stream import Alternative, FinishReason, StreamToken, TrainReport
from stoker.contract.vectors import Int8Vectors

__all__ = [
    "CONTRACT",
    "DEFAULT_TARGETS",
    "LORA_TARGETS",
    "AdapterRequest",
    "AdapterResult",
    "Alternative",
    "ChatMessage",
    "Completion",
    "EmbedReply",
    "EmbedRequest",
    "FinishReason",
    "GenerateRequest",
    "GenerateResult",
    "Int8Vectors",
    "ModelCard",
    "Presence",
    "Ranked",
    "Request",
    "RerankResult",
    "StreamToken",
    "ToolCall",
    "TrainReport",
    "TrainRequest",
    "TrainResult",
    "Usage",
    "build",
    "decode",
    "encode",
]
