"""The old path of parts of `stoker.client` and `stoker.broker`, for programs written against it. It goes with 1.0."""

from __future__ import annotations

from stoker.broker.outcome import (
    JobStatus,
    Outcome,
    announced,
    lost,
    read_vectors,
    result_as,
    spoiled,
    status_of,
)
from stoker.client.model_choice import Choices, choose_model, parse_cards, parse_presences
from stoker.client.requests import (
    Dataset,
    Prompt,
    adapter_request,
    checked_job_id,
    draw_seed,
    embed_request,
    generate_request,
    known_kind,
    read_dataset,
    train_request,
)
from stoker.client.submission import Submission, job_record

__all__ = [
    "Choices",
    "Dataset",
    "JobStatus",
    "Outcome",
    "Prompt",
    "Submission",
    "adapter_request",
    "announced",
    "checked_job_id",
    "choose_model",
    "draw_seed",
    "embed_request",
    "generate_request",
    "job_record",
    "known_kind",
    "lost",
    "parse_cards",
    "parse_presences",
    "read_dataset",
    "read_vectors",
    "result_as",
    "spoiled",
    "status_of",
    "train_request",
]
