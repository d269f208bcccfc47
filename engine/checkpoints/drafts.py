"""A model with another one that drafts for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from typing_extensions import Unpack

from engine.checkpoints.inspecting import Inspection, inspect
from engine.checkpoints.loading import LoadedModel, PrecisionOptions, load
from engine.checkpoints.sources import naming, resolve
from engine.models.sentence_files import model_folder
from engine.sparing import Pause, no_pause
from engine.text.tokenizer import Tokenizer
from engine.weights.gguf import GGUF
from stoker.errors import ModelError


class DraftSource(NamedTuple):
    """What drafts for a model: its name, and where it can be found."""

    name: str
    sources: Sequence[str]


class _Side(NamedTuple):
    """One of the two, as their vocabularies are compared."""

    name: str
    path: Path
    tokenizer: Tokenizer


def with_draft(
    model: LoadedModel, draft: DraftSource, pause: Pause = no_pause, **options: Unpack[PrecisionOptions]
) -> LoadedModel:
    """`model` with one that drafts for it, loaded as `load` does with `pause` and `options`; its weights count as the
    model's. Raises `ModelError` where it cannot be loaded, or drafts nothing that `model` could take."""
    _check_loaded(model, f"{draft.name} is to draft for it")
    found = load(draft.name, draft.sources, pause, **options)
    _check_loaded(found, f"it is to draft for {model.name}")
    pause()
    _check_vocabulary(*(_Side(each.name, each.path, each.tokenizer) for each in (model, found)))
    seconds = model.load_seconds + found.load_seconds
    return replace(model, draft=found, bytes=model.bytes + found.bytes, load_seconds=seconds)


def inspect_both(model: DraftSource, draft: DraftSource) -> tuple[Inspection, Inspection]:
    """`model` and what is to draft for it, by their headers and tokenizers alone: no weight is loaded, and nothing is
    downloaded. Raises `ModelError` as `with_draft` does, except for a recurrent model, which its weights alone show."""
    found = []
    for each, wanted in ((model, f"{draft.name} is to draft for it"), (draft, f"it is to draft for {model.name}")):
        found.append(inspect(resolve(each.sources, download=False)))
        _check_kind(each.name, found[-1].kind, wanted)
    sides = zip((model, draft), found, strict=True)
    _check_vocabulary(*(_Side(each.name, seen.path, _tokenizer(seen.path)) for each, seen in sides))
    return found[0], found[1]


def _tokenizer(path: Path) -> Tokenizer:
    with naming(path):
        return Tokenizer.from_gguf(GGUF(path)) if path.is_file() else Tokenizer.from_folder(model_folder(path))


def _check_loaded(model: LoadedModel, wanted: str) -> None:
    _check_kind(model.name, model.kind, wanted)
    if model.shard is not None:
        raise _unfit(
            model.name, wanted, "ranks share it, and only a model that is whole here drafts, or is drafted for"
        )
    if model.decoder.kv_sizes.states:
        raise _unfit(model.name, wanted, "it is recurrent, and its states cannot go back behind a draft that was wrong")


def _check_kind(name: str, kind: str, wanted: str) -> None:
    if kind == "embed":
        raise _unfit(name, wanted, "it makes embeddings, and only models that generate draft, or are drafted for")
    if kind != "generate":
        raise _unfit(name, wanted, "nothing here runs its architecture")


def _unfit(name: str, wanted: str, fault: str) -> ModelError:
    return ModelError(f"{name}: {wanted}, and {fault}. Take it out of STOKER_DRAFT_MODELS")


def _check_vocabulary(model: _Side, draft: _Side) -> None:
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
