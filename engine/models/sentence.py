"""How an encoder's hidden states become one vector a text: what sentence-transformers' files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.jsonfiles import read_json, read_object
from engine.models.encoder import EncoderArgs
from stoker.errors import ModelError

#: What sentence-transformers calls a way of pooling, in its older files and in those since version 5.
_POOLINGS = {
    "mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls", "lasttoken": "lasttoken",
}  # fmt: skip


@dataclass(frozen=True)
class EmbeddingSpec:
    """`pooling` is "mean", "cls" or "lasttoken"; `dim` is that of the vectors.

    `prompts` maps a name, such as "query", to the text that goes before every text of that kind; `default_prompt` names
    the one that is used where none is asked for. A folder may have none though its model was trained with some (E5's
    `query: ` and `passage: `): they are not guessed.
    """

    max_tokens: int
    pooling: str
    normalize: bool
    dim: int
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    #: To how many numbers a vector may be cut (Kusupati et al. 2022, arXiv:2205.13147); empty: not at all.
    dimensions: Sequence[int] = ()

    @classmethod
    def from_folder(cls, folder: Path, args: EncoderArgs) -> EmbeddingSpec:
        """From sentence-transformers' files; without them, its own default: the mean, not normalized.

        Raises `ModelError` for a module or a pooling that is not supported.
        """
        limit = read_object(folder / "sentence_bert_config.json", missing={}).get("max_seq_length")
        max_tokens = min(limit, args.context) if isinstance(limit, int) and limit > 0 else args.context
        pooling, normalize = "mean", False
        for module in _modules(folder):
            kind = str(module.get("type", "")).rsplit(".", 1)[-1]
            if kind == "Pooling":
                pooling = _pooling(_inside(folder, module.get("path", "1_Pooling")) / "config.json")
            elif kind == "Normalize":
                normalize = True
            elif kind != "Transformer":
                raise ModelError(
                    f"{folder}: the module {kind or module!r} is not supported; Transformer, Pooling and Normalize are"
                )
        prompts, default = _prompts(folder / "config_sentence_transformers.json")
        cuts = _dimensions(folder / "config.json", args.dim)
        return cls(max_tokens, pooling, normalize, args.dim, prompts, default, cuts)


def _modules(folder: Path) -> list[dict[str, Any]]:
    modules = read_json(folder / "modules.json", missing=[])
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{folder / 'modules.json'}: not a list of modules")
    return modules


def _inside(folder: Path, name: object) -> Path:
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(f"{folder / 'modules.json'}: the path {name!r} leads out of the folder")
    return folder / name


def _pooling(path: Path) -> str:
    config = read_object(path, missing={})
    modes = [name.removeprefix("pooling_mode_") for name, on in config.items() if on is True and "_mode_" in name]
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ModelError(f"{path}: pooling {modes} is not supported; one of mean, cls and lasttoken is")
    if config.get("include_prompt") is False:
        raise ModelError(f"{path}: include_prompt = false is not supported: a prompt is pooled with its text")
    return _POOLINGS[modes[0]]


def _dimensions(path: Path, dim: int) -> Sequence[int]:
    """What a Matryoshka model says in its config.json: `matryoshka_dimensions`, or `is_matryoshka` for any number."""
    config = read_object(path, missing={})
    named = config.get("matryoshka_dimensions")
    if named is None:
        return range(1, dim + 1) if config.get("is_matryoshka") is True else ()
    if not isinstance(named, list) or not all(type(size) is int and 0 < size <= dim for size in named):
        raise ModelError(f"{path}: matryoshka_dimensions {named!r} is no list of numbers from 1 to {dim}")
    return tuple(sorted(named))


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    config = read_object(path, missing={})
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise ModelError(f"{path}: its prompts are not an object of strings")
    if default is not None and default not in prompts:
        raise ModelError(f"{path}: default_prompt_name {default!r} is none of its prompts ({', '.join(prompts)})")
    return prompts, default
