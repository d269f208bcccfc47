"""How an encoder's hidden states become one vector a text: what sentence-transformers' files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from engine.models.allowed import ANYTHING, Table
from engine.models.encoder import EmbedderArgs
from engine.models.fields import Fields
from engine.models.sentence_files import SentenceFiles, inside, kind_of
from engine.platform.jsonfiles import read_object
from stoker.contract.shown import as_json
from stoker.errors import ModelError

_POOLINGS = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean")
#: One of `_POOLINGS`, or several, whose vectors stand one behind the other.
Pooling: TypeAlias = str | tuple[str, ...]
#: Switches of older files, each for a way of pooling, in the order in which sentence-transformers puts their vectors.
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
                f"{path}: activation_function {as_json(named)} is not supported; {', '.join(_ACTIVATIONS)} of "
                "torch.nn are"
            )
        inputs, outputs = fields.count("in_features"), fields.count("out_features")
        return cls(folder, inputs, outputs, fields.flag("bias", default=True), activation)


@dataclass(frozen=True)
class NormSpec:
    """A LayerNorm of the vectors. `folder`: where its weights are."""

    folder: Path
    dim: int

    @classmethod
    def from_folder(cls, folder: Path) -> NormSpec:
        """Raises `ModelError` for what is not supported."""
        path = folder / "config.json"
        config = read_object(path)
        Table(("dimension",)).check(config, str(path))
        return cls(folder, Fields(config, str(path)).count("dimension"))

    @property
    def inputs(self) -> int:
        return self.dim

    @property
    def outputs(self) -> int:
        return self.dim


#: What may stand behind the pooling, by the name of its module.
_HEADS: Mapping[str, type[DenseSpec] | type[NormSpec]] = {"Dense": DenseSpec, "LayerNorm": NormSpec}


class _Parts(NamedTuple):
    """What comes behind the transformer; by default what sentence-transformers does without a modules.json."""

    pooling: Pooling = "mean"
    heads: tuple[DenseSpec | NormSpec, ...] = ()
    normalize: bool = False


@dataclass(frozen=True)
class EmbeddingSpec:
    """`dim` is that of the vectors.

    `prompts` maps a name, such as "query", to the text that goes before every text of that kind; `default_prompt` names
    the one that is used where none is asked for. A folder may have none though its model was trained with some (E5's
    `query: ` and `passage: `): they are not guessed.
    """

    max_tokens: int
    pooling: Pooling
    normalize: bool
    dim: int
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    #: To how many numbers a vector may be cut (Kusupati et al. 2022, arXiv:2205.13147); empty: not at all.
    dimensions: Sequence[int] = ()
    #: Whether every text is written in small letters before its tokenizer sees it.
    lowercase: bool = False
    #: What the pooled vectors go through, one after the other.
    heads: tuple[DenseSpec | NormSpec, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path, args: EmbedderArgs) -> EmbeddingSpec:
        """From sentence-transformers' files; without them, its own default: the mean, not normalized.

        Raises `ModelError` for a module or a pooling that is not supported.
        """
        files = SentenceFiles.of(folder)
        parts = _modules(folder, files.modules) if files.modules else _Parts()
        prompts, default = files.prompts()
        dim = _outputs(parts.heads, args.dim * (1 if isinstance(parts.pooling, str) else len(parts.pooling)))
        cuts = read_dimensions(files.transformer / "config.json", dim)
        longest = files.max_tokens(args.context)
        return cls(longest, parts.pooling, parts.normalize, dim, prompts, default, cuts, files.lowercase, parts.heads)


def _outputs(heads: Sequence[DenseSpec | NormSpec], dim: int) -> int:
    """The numbers of a vector behind `heads`, of `dim` before. Raises `ModelError` where one does not fit the next."""
    for each in heads:
        if each.inputs != dim:
            named = "in_features" if isinstance(each, DenseSpec) else "dimension"
            raise ModelError(f"{each.folder}: {named} is {each.inputs}, and what comes in has {dim}")
        dim = each.outputs
    return dim


def _modules(folder: Path, modules: Sequence[Mapping[str, Any]]) -> _Parts:
    """What is behind the transformer. Raises `ModelError` for other modules, and other orders of these."""
    kinds = [kind_of(module) for module in modules]
    # In use, Dropout drops nothing.
    known = ("Transformer", "Pooling", *_HEADS, "Normalize", "Dropout")
    for kind in kinds:
        if kind not in known:
            raise ModelError(
                f"{folder}: the module {kind} is not supported; {', '.join(known[:-1])} and {known[-1]} are"
            )
    rest = [kind for kind in kinds[2:] if kind != "Dropout"]
    heads = [kind for kind in rest if kind in _HEADS]
    # Lengths are made one at the very end: what comes behind would have to see vectors of that length.
    if kinds[:2] != ["Transformer", "Pooling"] or rest != heads + ["Normalize"] * (len(rest) - len(heads)):
        raise ModelError(
            f"{folder / 'modules.json'}: the modules {', '.join(kinds)}; supported is a Transformer, then one Pooling, "
            f"then {' and '.join(_HEADS)}, then Normalize"
        )
    for module, kind in zip(modules, kinds, strict=True):
        if kind == "Normalize":
            path = inside(folder, module["path"]) / "config.json"
            # As in sentence-transformers: the folder may hold none, or the transformer's own.
            _NORMALIZE.check(_named(read_object(path, missing={})), str(path))
    named = zip(modules, kinds, strict=True)
    specs = [_HEADS[kind].from_folder(inside(folder, module["path"])) for module, kind in named if kind in _HEADS]
    return _Parts(_pooling(inside(folder, modules[1]["path"]) / "config.json"), tuple(specs), "Normalize" in kinds)


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("module_input_name", "module_output_name") if name in config}


def _pooling(path: Path) -> Pooling:
    config = read_object(path)
    _POOLING.check(config, str(path))
    fields = Fields(config, str(path))
    modes: object = [mode for name, mode in _SWITCHES.items() if fields.flag(name)] or ["mean"]
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
    named = tuple(modes) if isinstance(modes, list) else (modes,)
    if not named or not all(mode in _POOLINGS for mode in named):
        raise ModelError(
            f"{path}: pooling {as_json(modes)} is not supported; {', '.join(_POOLINGS)}, and lists of these are"
        )
    return str(named[0]) if len(named) == 1 else tuple(map(str, named))


def read_dimensions(path: Path, dim: int) -> Sequence[int]:
    """What a Matryoshka model says in its config.json: `matryoshka_dimensions`, or `is_matryoshka` for any number."""
    config = read_object(path, missing={})
    named = config.get("matryoshka_dimensions")
    if named is None:
        return range(1, dim + 1) if config.get("is_matryoshka") is True else ()
    if not isinstance(named, list) or not all(type(size) is int and 0 < size <= dim for size in named):
        raise ModelError(f"{path}: matryoshka_dimensions {as_json(named)} is no list of numbers from 1 to {dim}")
    return tuple(sorted(named))
