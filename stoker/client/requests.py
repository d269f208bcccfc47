"""Requests as a caller gives them: prompts, texts and datasets in all their forms, checked before anything is sent."""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, SupportsIndex

from stoker.broker.outcome import lost, spoiled
from stoker.contract import AdapterRequest, EmbedRequest, GenerateRequest, TrainRequest, build
from stoker.contract.dataset import ON_WORKER, iterate_lines, iterate_mappings, to_lines
from stoker.contract.kinds import ABILITIES, JobKind
from stoker.contract.lines import pieces
from stoker.contract.names import Rule, checked
from stoker.contract.prefixes import PinnedPrefix
from stoker.contract.shown import as_json, brief, trouble
from stoker.contract.uploads import Upload
from stoker.contract.wording import Show
from stoker.errors import DatasetError, InvalidRequest

#: What `dataset` may be: a file of JSON lines, `worker:NAME` for one under the worker's data root, or the examples.
Dataset = str | os.PathLike[str] | Iterable[Mapping[str, object]]

#: What `generate` continues: a text, token ids, or messages such as `{"role": "user", "content": "Hello"}`.
Prompt = str | Sequence[int] | Sequence[Mapping[str, object]]


def known_ability(job_id: str, ability: str | None) -> str:
    """What a job's record says that its model must be able to do. Raises `JobLost` if there is no record, and for one
    that no client wrote."""
    if ability is None:
        raise lost(job_id)
    if ability not in ABILITIES:
        raise spoiled(f"record (kind {ability[:40]!r}) of job {job_id}", ability.encode())
    return ability


def known_kind(job_id: str, kind: str | None) -> JobKind:
    """The kind of such a job."""
    return ABILITIES[known_ability(job_id, kind)]


def checked_job_id(job_id: str | None) -> str:
    """The caller's id, or a new one. Raises `InvalidRequest` for one that could be taken for something else."""
    if job_id is None:
        return str(uuid.uuid4())
    return checked(Rule.JOB_ID, "job_id", job_id)


def known_by(job_id: object) -> str:
    """The id that a caller asks for a job by. Raises `InvalidRequest` for what is no text that a broker could hold: no
    job has such an id."""
    if isinstance(job_id, str) and not any("\ud800" <= letter <= "\udfff" for letter in job_id):
        return job_id
    return checked(Rule.JOB_ID, "job_id", job_id)


def draw_seed() -> int:
    return secrets.randbelow(2**63)


def embed_request(model: str, texts: Sequence[str], fields: Mapping[str, object]) -> EmbedRequest:
    if isinstance(texts, str):
        raise InvalidRequest("texts: one text given; expected a list of texts, such as ['a warm model'].")
    # Of a mapping the names would be taken for the texts.
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise InvalidRequest(f"texts: a {type(texts).__name__} given; expected a list of texts.")
    return build(EmbedRequest, {"model": model, "texts": tuple(texts), **fields})


def rerank_request(model: str, query: str, texts: Sequence[str], fields: Mapping[str, object]) -> EmbedRequest:
    if not isinstance(query, str):
        raise InvalidRequest(f"query: {brief(query)} given; expected a text.")
    return embed_request(model, texts, {**fields, "query": query})


def generate_request(
    model: str, prompt: Prompt | None, seed: int | None, fields: Mapping[str, object], show: Show = brief
) -> GenerateRequest:
    """`prompt`: a text, token ids, or the messages of a conversation; None if `fields` have one of them by name.
    `show`: how errors spell values."""
    seed = draw_seed() if seed is None else seed
    return build(GenerateRequest, {"model": model, "seed": seed, **_prompt_fields(prompt, show), **fields}, show)


def _prompt_fields(prompt: Prompt | None, show: Show) -> dict[str, object]:
    if prompt is None or isinstance(prompt, str):
        return {} if prompt is None else {"prompt": prompt}
    # What is iterable too: of bytes the numbers would be taken for ids, of one message the names for messages.
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | bytearray | memoryview | Mapping):
        # Of bytes the kind says more than the first of them.
        given = as_json(prompt) if show is as_json else f"a {type(prompt).__name__}"
        raise InvalidRequest(f"prompt: {given} given; expected a text, a list of token ids, or a list of messages.")
    items = tuple(prompt)
    return {"prompt_ids" if items and isinstance(items[0], SupportsIndex) else "messages": items}


def pinned_prefix(request: GenerateRequest, client: str) -> PinnedPrefix:
    """What is pinned of a request: what its prompt depends on. `client`: the key of who pins it."""
    asked = request.model_dump(mode="json", include=set(PinnedPrefix.model_fields), exclude_none=True)
    return PinnedPrefix(id=uuid.uuid4().hex, time=0.0, client=client, **asked)


def train_request(
    model: str, name: str, dataset: Dataset, job_id: str, fields: Mapping[str, object], show: Show = brief
) -> TrainRequest:
    if "steps" in fields and fields.get("epochs") is not None:
        raise InvalidRequest("steps and epochs given; say one of them.")
    source = dataset if _on_worker(dataset) else str(Upload.of("dataset", job_id, b""))
    return build(TrainRequest, {"model": model, "name": name, "dataset": source, **fields}, show)


def adapter_request(model: str, name: str, job_id: str, fields: Mapping[str, object]) -> AdapterRequest:
    upload = str(Upload.of("adapter", job_id, b""))
    return build(AdapterRequest, {"model": model, "name": name, "upload": upload, **fields})


def _on_worker(dataset: Dataset) -> bool:
    return isinstance(dataset, str) and dataset.startswith(ON_WORKER)


def read_dataset(dataset: Dataset) -> bytes:
    """The dataset as it is uploaded; empty for one that the worker has. A bad line raises `DatasetError` with its
    number."""
    if _on_worker(dataset):
        return b""
    if not isinstance(dataset, str | os.PathLike | Iterable):
        raise DatasetError(f"dataset: a {type(dataset).__name__} given; expected a path, or a list of examples.")
    if not isinstance(dataset, str | os.PathLike):
        return to_lines(iterate_mappings(dataset, "dataset"), "dataset")
    path = Path(dataset)
    try:
        with _opened(path) as file:
            return to_lines(iterate_lines(pieces(file), path.name), path.name)
    except OSError as error:
        raise DatasetError(f"{brief(str(path), 160)}: cannot be read ({trouble(error)}).") from None


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except ValueError as error:
        # With a NUL in it, or half a surrogate pair, it is no path.
        raise DatasetError(f"{brief(str(path), 160)}: cannot be read ({error}).") from None
