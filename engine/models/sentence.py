"""How an encoder's hidden states become one vector a text: what sentence-transformers' files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.models.encoder import EncoderArgs
from engine.models.sentence_files import SentenceFiles, inside, kind_of
from engine.platform.jsonfiles import read_object
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
    #: Whether every text is written in small letters before its tokenizer sees it.
    lowercase: bool = False

    @classmethod
    def from_folder(cls, folder: Path, args: EncoderArgs) -> EmbeddingSpec:
        """From sentence-transformers' files; without them, its own default: the mean, not normalized.

        Raises `ModelError` for a module or a pooling that is not supported.
        """
        files = SentenceFiles.of(folder)
        pooling, normalize = None if files.modules else "mean", False
        for module in files.modules:
            kind = kind_of(module)
            if kind == "Pooling":
                pooling = _pooling(inside(folder, module.get("path", "1_Pooling")) / "config.json")
            elif kind == "Normalize":
                normalize = True
            elif kind != "Transformer":
                raise ModelError(
                    f"{folder}: the module {kind or module!r} is not supported; Transformer, Pooling and Normalize are"
                )
        if pooling is None:
            raise ModelError(f"{folder / 'modules.json'}: no Pooling among its modules; a text needs one vector")
        prompts, default = files.prompts()
        cuts = _dimensions(files.transformer / "config.json", args.dim)
        longest = files.max_tokens(args.context)
        return cls(longest, pooling, normalize, args.dim, prompts, default, cuts, files.lowercase)


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
