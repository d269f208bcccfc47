"""A model with another one that drafts for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from typing_extensions import Unpack

from engine.checkpoints.loading import LoadedModel, PrecisionOptions, load
from engine.sparing import Pause, no_pause
from stoker.errors import ModelError


class DraftSource(NamedTuple):
    """What drafts for a model: its name, and where it can be found."""

    name: str
    sources: Sequence[str]


def with_draft(
    model: LoadedModel, draft: DraftSource, pause: Pause = no_pause, **options: Unpack[PrecisionOptions]
) -> LoadedModel:
    """`model` with one that drafts for it, loaded as `load` does with `pause` and `options`; its weights count as the
    model's. Raises `ModelError` where it cannot be loaded, or drafts nothing that `model` could take."""
    _check_kind(model, f"{draft.name} is to draft for it")
    found = load(draft.name, draft.sources, pause, **options)
    _check_kind(found, f"it is to draft for {model.name}")
    pause()
    _check_vocabulary(model, found)
    seconds = model.load_seconds + found.load_seconds
    return replace(model, draft=found, bytes=model.bytes + found.bytes, load_seconds=seconds)


def _check_kind(model: LoadedModel, wanted: str) -> None:
    if model.kind != "generate":
        fault = "it makes embeddings, and only models that generate draft, or are drafted for"
    elif model.shard is not None:
        fault = "ranks share it, and only a model that is whole here drafts, or is drafted for"
    elif model.decoder.kv_sizes.states:
        fault = "it is recurrent, and its states cannot go back behind a draft that was wrong"
    else:
        return
    raise ModelError(f"{model.name}: {wanted}, and {fault}. Take it out of STOKER_DRAFT_MODELS")


def _check_vocabulary(model: LoadedModel, draft: LoadedModel) -> None:
    """Each token of the model has to be one of the draft's, with the same id."""
    wanted, given = (each.tokenizer.inner.get_vocab(with_added_tokens=True) for each in (model, draft))
    differing = sorted((index, token) for token, index in wanted.items() if given.get(token) != index)
    if not differing:
        return
    index, token = differing[0]
    has = f"has it as {given[token]}" if token in given else "has it not"
    raise ModelError(
        f"{draft.name} ({draft.path}) is to draft for {model.name} ({model.path}), whose token {index} is {token!r}: "
        f"{draft.name} {has}, and {len(differing)} of {len(wanted)} tokens differ so. Both need one vocabulary: take a "
        "smaller model of the same family, or take it out of STOKER_DRAFT_MODELS"
    )
