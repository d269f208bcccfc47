"""How an encoder's hidden states become one vector a text: what sentence-transformers' files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from engine.models.allowed import ANYTHING, Table
from engine.models.encoder import EmbedderArgs
from engine.models.fields import Fields
from engine.models.sentence_files import SentenceFiles, inside, kind_of
from engine.platform.jsonfiles import read_object
from stoker.errors import ModelError

_POOLINGS = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean")
#: Switches of older files, each for a way of pooling.
_SWITCHES = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
_POOLING = Table(
    ("pooling_mode", *_SWITCHES),
    {
        "embedding_dimension": ANYTHING,
        "word_embedding_dimension": ANYTHING,
        # Without it a prompt would not be pooled with its text.
        "include_prompt": (True,),
    },
)
_NORMALIZE = Table((), dict.fromkeys(("module_input_name", "module_output_name"), ("sentence_embedding",)))
#: Of a Dense module: torch's classes by their names, without their modules.
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "Sigmoid", "SiLU", "GELU")
_DENSE = Table(
    ("in_features", "out_features", "bias", "activation_function"),
    {
        "use_residual": (False,),
        **dict.fromkeys(("module_input_name", "module_output_name"), ("sentence_embedding",)),
    },
)


@dataclass(frozen=True)
class DenseSpec:
    """A linear layer of the vectors with its activation. `folder`: where its weights are."""

    folder: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str

    @classmethod
    def from_folder(cls, folder: Path) -> DenseSpec:
        """Raises `ModelError` for what is not supported."""
        path = folder / "config.json"
        config = read_object(path)
        _DENSE.check(config, str(path))
        fields = Fields(config, str(path))
        named = config.get("activation_function", "torch.nn.modules.activation.Tanh")
        package, _, activation = str(named).rpartition(".")
        if not package.startswith("torch.nn") or activation not in _ACTIVATIONS:
            raise ModelError(
                f"{path}: activation_function {str(named)[:100]!r} is not supported; {', '.join(_ACTIVATIONS)} of "
                "torch.nn are"
            )
        inputs, outputs = fields.count("in_features"), fields.count("out_features")
        return cls(folder, inputs, outputs, fields.flag("bias", default=True), activation)


class _Parts(NamedTuple):
    """What comes behind the transformer; by default what sentence-transformers does without a modules.json."""

    pooling: str = "mean"
    dense: tuple[DenseSpec, ...] = ()
    normalize: bool = False


@dataclass(frozen=True)
class EmbeddingSpec:
    """`pooling` is one of `_POOLINGS`; `dim` is that of the vectors.

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
    #: What the pooled vectors go through, one after the other.
    dense: tuple[DenseSpec, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path, args: EmbedderArgs) -> EmbeddingSpec:
        """From sentence-transformers' files; without them, its own default: the mean, not normalized.

        Raises `ModelError` for a module or a pooling that is not supported.
        """
        files = SentenceFiles.of(folder)
        parts = _modules(folder, files.modules) if files.modules else _Parts()
        prompts, default = files.prompts()
        dim = _outputs(parts.dense, args.dim)
        cuts = read_dimensions(files.transformer / "config.json", dim)
        longest = files.max_tokens(args.context)
        return cls(longest, parts.pooling, parts.normalize, dim, prompts, default, cuts, files.lowercase, parts.dense)


def _outputs(dense: Sequence[DenseSpec], dim: int) -> int:
    """The numbers of a vector behind `dense`, of `dim` before. Raises `ModelError` where one does not fit the next."""
    for each in dense:
        if each.inputs != dim:
            raise ModelError(f"{each.folder}: in_features is {each.inputs}, and what comes in has {dim}")
        dim = each.outputs
    return dim


def _modules(folder: Path, modules: Sequence[Mapping[str, Any]]) -> _Parts:
    """What is behind the transformer. Raises `ModelError` for other modules, and other orders of these."""
    kinds = [kind_of(module) for module in modules]
    # In use, Dropout drops nothing.
    known = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")
    for kind in kinds:
        if kind not in known:
            raise ModelError(
                f"{folder}: the module {kind} is not supported; {', '.join(known[:-1])} and {known[-1]} are"
            )
    rest = [kind for kind in kinds[2:] if kind != "Dropout"]
    # Lengths are made one at the very end: what comes behind would have to see vectors of that length.
    if kinds[:2] != ["Transformer", "Pooling"] or rest != sorted(rest) or not set(rest) <= {"Dense", "Normalize"}:
        raise ModelError(
            f"{folder / 'modules.json'}: the modules {', '.join(kinds)}; supported is a Transformer, then one Pooling, "
            "then Dense, then Normalize"
        )
    for module, kind in zip(modules, kinds, strict=True):
        if kind == "Normalize":
            path = inside(folder, module["path"]) / "config.json"
            # As in sentence-transformers: the folder may hold none, or the transformer's own.
            _NORMALIZE.check(_named(read_object(path, missing={})), str(path))
    named = zip(modules, kinds, strict=True)
    dense = [DenseSpec.from_folder(inside(folder, module["path"])) for module, kind in named if kind == "Dense"]
    return _Parts(_pooling(inside(folder, modules[1]["path"]) / "config.json"), tuple(dense), "Normalize" in kinds)


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("module_input_name", "module_output_name") if name in config}


def _pooling(path: Path) -> str:
    config = read_object(path)
    _POOLING.check(config, str(path))
    fields = Fields(config, str(path))
    modes: object = [mode for name, mode in _SWITCHES.items() if fields.flag(name)] or ["mean"]
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
    if isinstance(modes, list) and len(modes) == 1:
        modes = modes[0]
    if not isinstance(modes, str) or modes not in _POOLINGS:
        raise ModelError(f"{path}: pooling {str(modes)[:100]} is not supported; one of {', '.join(_POOLINGS)} is")
    return str(modes)


def read_dimensions(path: Path, dim: int) -> Sequence[int]:
    """What a Matryoshka model says in its config.json: `matryoshka_dimensions`, or `is_matryoshka` for any number."""
    config = read_object(path, missing={})
    named = config.get("matryoshka_dimensions")
    if named is None:
        return range(1, dim + 1) if config.get("is_matryoshka") is True else ()
    if not isinstance(named, list) or not all(type(size) is int and 0 < size <= dim for size in named):
        raise ModelError(f"{path}: matryoshka_dimensions {named!r} is no list of numbers from 1 to {dim}")
    return tuple(sorted(named))
