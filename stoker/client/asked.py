"""Bulk generation without the broker: what a request may look like, and whose error is whose."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from stoker.client.chunks import JOBS_PER_WORKER, Part
from stoker.client.model_choice import named_model
from stoker.client.options import GenerateItem, GenerateManyOptions, GenerateOptions, checked_options
from stoker.client.requests import Prompt, generate_request
from stoker.contract import Presence
from stoker.contract.kinds import GENERATE
from stoker.contract.shown import as_json, brief
from stoker.errors import BrokerUnavailable, ConfigError, InvalidRequest, StokerError

T = TypeVar("T")

#: One request of `generate_many`: a prompt, or a prompt with options of its own; or why there is none.
Ask: TypeAlias = Prompt | GenerateItem | InvalidRequest

#: Names of a request that are parameters of `generate`.
_NAMED = ("prompt", "model", "seed")


@dataclass
class Asked(Part):
    """One request, as `generate` takes it; or `error`, which says why that would not."""

    item: GenerateItem
    error: InvalidRequest | None = None

    @property
    def model(self) -> str | None:
        """The one that is named. What is no text is refused by `generate`."""
        model = self.item.get("model")
        return model if isinstance(model, str) else None if model is None else ""


def asked(given: object, common: GenerateItem) -> Asked:
    """What is asked by `given`, whose own options win over `common`."""
    if isinstance(given, InvalidRequest):
        return Asked({}, given)
    if isinstance(given, Mapping):
        try:
            checked_options({name: given[name] for name in given if name not in _NAMED}, GenerateOptions, _NAMED)
        except InvalidRequest as error:
            return Asked({}, error)
        return Asked({**common, **given})
    # What can be no prompt is refused by `generate`, as every other value that is wrong.
    return Asked({**common, "prompt": given})  # type: ignore[typeddict-item]


def refusal_of_line(fields: Mapping[str, object], common: GenerateManyOptions) -> InvalidRequest | None:
    """What is wrong with a request out of a file, in the spelling of JSON; None where `generate` may take it. Its own
    options win over `common`."""
    item = {**common, **fields}
    model, prompt, seed = (item.pop(name, None) for name in ("model", "prompt", "seed"))
    try:
        checked_options(item, GenerateOptions, _NAMED, as_json)
        named_model(model, as_json)  # type: ignore[arg-type]  # it may be anything
        generate_request("any", prompt, seed, item, as_json)  # type: ignore[arg-type]
    except InvalidRequest as error:
        return error
    return None


def checked_asks(requests: T) -> T:
    """Raises `InvalidRequest` for what is no iterable of requests."""
    if isinstance(requests, str | Mapping):
        kind = "text" if isinstance(requests, str) else "request"
        raise InvalidRequest(f"requests: one {kind} given; expected many, such as a list or a generator of them.")
    if not isinstance(requests, Iterable | AsyncIterable):
        raise InvalidRequest(f"requests: {brief(requests)} given; expected an iterable of prompts or requests.")
    return requests


def common_options(model: str | None, seed: int | None, options: GenerateManyOptions) -> GenerateItem:
    """What all requests of a call have. Raises `InvalidRequest` for what is wrong for each of them."""
    fields = checked_options(options, GenerateManyOptions, ("requests", "model", "seed", "in_flight", "attempts"))
    # Any prompt will do: only the options are looked at.
    generate_request("any", [{"role": "user", "content": "any"}], seed, fields)
    return {"model": named_model(model), "seed": seed, **options}  # type: ignore[typeddict-item]  # a prompt is still to come


def own(error: StokerError) -> StokerError:
    """An error that belongs to one request, and is its result. Raises what would meet each request alike."""
    if isinstance(error, BrokerUnavailable | ConfigError):
        raise error
    return error


def generation_share(worker: Presence) -> int:
    """Generation jobs that one bulk call keeps in flight for a worker: half of those that it runs at once, so that the
    other half is free for others."""
    _, room = worker.lanes.get(GENERATE.name, (0, 0))
    return max(JOBS_PER_WORKER, room // 2)
