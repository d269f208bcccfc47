"""What a model is, read from its headers alone: no weight is loaded and MLX is not imported."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.checkpoints.sources import naming
from engine.checkpoints.stored_forms import FLOATS, mlx_form, stored_forms
from engine.models import allowed
from engine.models.bridge import configs, gguf_models, package
from engine.models.fields import Fields, check_kind, renamed, spelled
from engine.models.rerank_files import RerankFiles
from engine.models.sentence_files import SentenceFiles, model_folder, pools_decoder
from engine.platform.jsonfiles import read_config, read_object
from engine.text.templates import folder_templates, gguf_templates
from engine.weights import foreign_sections, safetensors_header
from engine.weights.gguf import GGUF
from stoker.errors import ModelError

#: `model_type` of config.json, or `general.architecture` of GGUF -> what the model is for.
KINDS = {
    "llama": "generate", "mistral": "generate", "qwen2": "generate", "qwen3": "generate",
    "bert": "embed", "mpnet": "embed", "xlm-roberta": "embed", "roberta": "embed", "modernbert": "embed",
    "nomic_bert": "embed", "gte": "embed", "camembert": "embed", "distilbert": "embed", "electra": "embed",
    "albert": "embed", "deberta-v2": "embed",
}  # fmt: skip


@dataclass(frozen=True)
class _Found:
    """What the files say. `unread`: why a GGUF is not; `stored`: bytes of all tensors; `cached`: heads of keys and
    values, and a head's size."""

    path: Path
    format: str
    architecture: object
    unread: str | None
    tensors: int
    dtypes: Mapping[str, int]
    stored: int
    quantization: str | None
    context: int
    layers: int
    dim: int
    vocabulary: int
    cached: tuple[int, int]
    window: object
    chat_template: bool
    file_bytes: int
    reranks: bool = False


@dataclass(frozen=True)
class Inspection:
    """One model. `parameters` counts weights of every form; `dtypes` says how many are held in which form.

    `weight_bytes` and `cache_bytes_per_1000` (keys and values of 1,000 tokens of one sequence; None for an encoder)
    give bytes by form: "stored" as in the files, "16 bit" and "32 bit" dense. `supported`: whether Stoker runs the
    architecture.
    """

    path: Path
    format: str
    architecture: str
    kind: str
    supported: bool
    parameters: int
    tensors: int
    dtypes: Mapping[str, int]
    quantization: str | None
    context: int
    layers: int
    dim: int
    vocabulary: int
    chat_template: bool
    file_bytes: int
    weight_bytes: Mapping[str, int]
    cache_bytes_per_1000: Mapping[str, int] | None
    notes: tuple[str, ...] = field(default=())
    #: Whether a model of kind "embed" scores pairs instead of making vectors.
    reranks: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "path": str(self.path), "notes": list(self.notes)}


def inspect(path: Path) -> Inspection:
    """The model at `path`, a folder or a .gguf file. Raises `ModelError` if it is damaged or no model."""
    with naming(path):
        if path.is_dir():
            return _folder(path)
        if path.suffix == ".gguf":
            return _gguf(path)
    raise ModelError(f"{path}: a model is a folder with config.json and safetensors, or a .gguf file")


def _folder(path: Path) -> Inspection:
    folder = model_folder(path)
    config = read_config(folder)
    reranks = RerankFiles.of(path, config) is not None
    names = allowed.RENAMED.get(str(config.get("model_type")), {})
    called = spelled(config, names)
    if config.get("model_type") not in KINDS:
        config = {**config, **configs.text_config(config), "model_type": config.get("model_type")}
        called = _names_of(package.file_of(config)) | called
        config = {**config, **_sizes_of_any(config)}
    config = renamed(config, names)
    files = safetensors_header.files(folder)
    entries = {name: entry for name, (_, entry) in safetensors_header.entries(folder).items()}
    fields = Fields(config, str(folder / "config.json"), called)
    heads, dim = fields.count("num_attention_heads"), fields.count("hidden_size")
    section, foreign = config.get("quantization") or {}, foreign_sections.read(config)
    dtypes, stored = stored_forms(entries, section if isinstance(section, Mapping) else {}, foreign)
    return _inspection(
        _Found(
            path=path,
            format="safetensors" if len(files) == 1 else f"safetensors, {len(files)} files",
            architecture=config.get("model_type"),
            unread=None,
            tensors=len(entries),
            dtypes=dtypes,
            stored=stored,
            quantization=mlx_form(section) if section else (None if foreign is None else str(foreign)),
            context=_folder_context(path, config, fields, reranks),
            layers=fields.count("num_hidden_layers"),
            dim=dim,
            vocabulary=fields.count("vocab_size"),
            cached=_cached(config, fields, heads, dim),
            window=_window(config),
            chat_template=bool(folder_templates(folder, read_object(folder / "tokenizer_config.json", missing={}))),
            file_bytes=sum(file.stat().st_size for file in files),
            reranks=reranks,
        )
    )


#: The names under which mlx-lm's model files have a size.
_NAMES = {
    "num_attention_heads": ("n_head", "num_heads", "n_heads"),
    "hidden_size": ("n_embd", "d_model", "model_dim", "hidden_dim", "dim"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers", "num_transformer_layers"),
    "vocab_size": ("num_vocab",),
    "max_position_embeddings": (
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "max_sequence_length",
        "seq_length",
        "model_max_length",
        "max_target_positions",
        "block_size",
    ),
}


#: Model files that attend nowhere: memory alone limits a text.
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv7"})
#: What is served where neither config.json nor the model file says how long a text may be.
_NO_CONTEXT = 4096
#: The arguments of a model file, and the file whose arguments they are too; a number that one has by default.
_ARGUMENTS = re.compile(
    r"^class ModelArgs\((?:(?P<of>\w+)\.ModelArgs|\w+)\):\n(?P<fields>(?:[ ].*\n|\n)*)", re.MULTILINE
)
_ARGUMENT = re.compile(r"^    (\w+):", re.MULTILINE)
_DEFAULT = re.compile(r"^    (\w+): (?:int|Optional\[int\]) = (\d+)$", re.MULTILINE)


def check_layers(where: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Before a network is made for mlx-lm's model files, which make each layer before any weight is looked for: raise
    `ModelError` for more layers than the model has tensors. They would take all memory, and hours."""
    text = configs.text_config(config)
    for name in ("num_hidden_layers", *_NAMES["num_hidden_layers"]):
        _check_count(where, name, text.get(name), tensors)


def check_blocks(gguf: GGUF) -> None:
    """The same of a GGUF file."""
    name = f"{gguf.metadata.get('general.architecture')}.block_count"
    _check_count(gguf.path, name, gguf.metadata.get(name), len(gguf.tensors))


def _check_count(where: Path, name: str, value: object, tensors: int) -> None:
    if isinstance(value, int) and value > tensors:
        raise ModelError(f"{where}: {name} is {value}, and the model has {tensors} tensors; the file is damaged")


def _sizes_of_any(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of an architecture that has other names for them; 1 head where a model attends nowhere.
    Raises `ModelError` for one that is none, by the name that the file has for it."""
    found: dict[str, Any] = {}
    for name, others in _NAMES.items():
        if config.get(name) is None:
            other = next((other for other in others if config.get(other) is not None), name)
            found[name] = config.get(other)
            check_kind(found[name], name, "config.json", other)
    if "num_attention_heads" in found and found["num_attention_heads"] is None:
        found["num_attention_heads"] = 1
    return {name: value for name, value in found.items() if value is not None}


def _names_of(file: str | None) -> dict[str, str]:
    """What mlx-lm's model file calls the sizes for which it has a name of its own, by the usual one."""
    arguments = _arguments_of(file)
    own = set() if arguments is None else set(_ARGUMENT.findall(arguments["fields"]))
    found = {name: next((other for other in others if other in own), name) for name, others in _NAMES.items()}
    return {name: other for name, other in found.items() if name not in own}


def _arguments_of(file: str | None) -> re.Match[str] | None:
    """The class of a model file's arguments, by its text, without MLX."""
    root = package.folder()
    text = "" if root is None or file is None else (root / "models" / f"{file}.py").read_text(encoding="utf-8")
    return _ARGUMENTS.search(text)


def kind_of(architecture: str) -> str:
    """What a model of this architecture is for; "unknown" if nothing here runs it."""
    return KINDS.get(architecture) or ("generate" if package.file_of({"model_type": architecture}) else "unknown")


def _cached(config: Mapping[str, Any], fields: Fields, heads: int, dim: int) -> tuple[int, int]:
    """(heads of keys and values, size of a head)."""
    architecture = str(config.get("model_type"))
    own = "num_key_value_heads" not in config and allowed.KEY_VALUE_HEADS.get(architecture)
    size = 128 if architecture == "qwen3" else max(1, dim // heads)
    return fields.count("num_key_value_heads", own or heads), fields.count("head_dim", size)


def _window(config: Mapping[str, Any]) -> object:
    """The sliding window that a file states, or the one that its architecture has without it."""
    if config.get("model_type") == "mistral":
        return config.get("sliding_window", allowed.MISTRAL_WINDOW)
    return config.get("sliding_window", allowed.MISTRAL_WINDOW) if config.get("use_sliding_window") else None


def _gguf(path: Path) -> Inspection:
    gguf = GGUF(path)
    meta = gguf.metadata
    architecture, model, unread = meta.get("general.architecture"), None, None
    try:
        model = gguf_models.model_of(meta)
    except ModelError as error:
        unread = str(error)
    fields = Fields(meta, str(path))
    heads = fields.count(f"{architecture}.attention.head_count")
    dim = fields.count(f"{architecture}.embedding_length")
    dtypes: Counter[str] = Counter()
    for info in gguf.tensors.values():
        dtypes[info.type.name] += math.prod(info.shape)
    largest = max(dtypes, key=dtypes.__getitem__) if dtypes else "F32"
    vocabulary = meta.get("tokenizer.ggml.tokens")
    return _inspection(
        _Found(
            path=path,
            format="gguf" if len(gguf.files) == 1 else f"gguf, {len(gguf.files)} files",
            architecture=architecture if model is None else model.file,
            unread=unread,
            tensors=len(gguf.tensors),
            dtypes=dict(dtypes),
            stored=sum(info.bytes for info in gguf.tensors.values()),
            quantization=None if largest in FLOATS else largest,
            context=fields.count(f"{architecture}.context_length"),
            layers=fields.count(f"{architecture}.block_count"),
            dim=dim,
            vocabulary=len(vocabulary) if isinstance(vocabulary, list) else 0,
            cached=(
                fields.count(f"{architecture}.attention.head_count_kv", heads),
                fields.count(f"{architecture}.attention.key_length", max(1, dim // heads)),
            ),
            window=meta.get(f"{architecture}.attention.sliding_window"),
            chat_template=bool(gguf_templates(path, meta)),
            file_bytes=sum(file.stat().st_size for file in gguf.files),
        )
    )


def _inspection(found: _Found) -> Inspection:
    name = found.architecture if isinstance(found.architecture, str) else str(found.architecture)
    kind = kind_of(name) if found.unread is None else "unknown"
    if found.reranks or (found.path.is_dir() and pools_decoder(found.path, name)):
        kind = "embed"
    parameters = sum(found.dtypes.values())
    heads, size = found.cached
    per_token = 2 * found.layers * heads * size
    notes = []
    if kind == "unknown":
        notes.append(found.unread or str(package.unknown(name, tuple(KINDS))))
    if isinstance(found.window, int) and not isinstance(found.window, bool) and found.window < found.context:
        notes.append(f"a sliding window of {found.window} tokens")
    return Inspection(
        path=found.path,
        format=found.format,
        architecture=name,
        kind=kind,
        supported=kind != "unknown",
        parameters=parameters,
        tensors=found.tensors,
        dtypes=found.dtypes,
        quantization=found.quantization,
        context=found.context,
        layers=found.layers,
        dim=found.dim,
        vocabulary=found.vocabulary,
        chat_template=found.chat_template,
        file_bytes=found.file_bytes,
        weight_bytes={"stored": found.stored, "16 bit": 2 * parameters, "32 bit": 4 * parameters},
        cache_bytes_per_1000=None if kind == "embed" else {"16 bit": 2000 * per_token, "32 bit": 4000 * per_token},
        notes=tuple(notes),
        reranks=found.reranks,
    )


def _usual_context(file: str | None) -> int:
    """What is served of a model whose config.json does not say how long a text may be: what mlx-lm's model file has
    by default."""
    arguments = _arguments_of(file)
    if arguments is not None:
        defaults = dict(_DEFAULT.findall(arguments["fields"]))
        names = ("max_position_embeddings", *_NAMES["max_position_embeddings"])
        found = next((int(defaults[name]) for name in names if name in defaults), None)
        if found is not None or arguments["of"]:
            return found or _usual_context(arguments["of"])
    return configs.RECURRENT_CONTEXT if file in _RECURRENT else _NO_CONTEXT


def _folder_context(path: Path, config: Mapping[str, Any], fields: Fields, reranks: bool) -> int:
    """What the model takes, or what its sentence-transformers files or mlx-lm's file limit that to."""
    architecture = config.get("model_type")
    file = None if architecture in KINDS else package.file_of(config)
    usual = allowed.CONTEXT.get(str(architecture)) or _usual_context(file)
    # T5 reads no field of the kind.
    positions = usual if architecture == "t5" else fields.count("max_position_embeddings", usual)
    if architecture in ("mpnet", "xlm-roberta", "roberta", "camembert"):
        # Those up to padding's stand for no token; MPNet's padding is 1 throughout.
        positions -= 1 + (1 if architecture == "mpnet" else fields.index("pad_token_id", 1))
    embeds = reranks or KINDS.get(str(architecture)) == "embed" or pools_decoder(path, architecture)
    if embeds:
        return SentenceFiles.of(path).max_tokens(positions)
    return positions if file is None else configs.shown_context(config, file, positions)
