"""What sentence-transformers' files say of a folder, as far as it can be known without a model: MLX is not needed.

They count where there is a `modules.json`, which names the folder of each part; without one sentence-transformers
takes none of them into account and makes the mean of what the model gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from engine.models.allowed import ANYTHING, Table
from engine.platform.jsonfiles import read_json, read_object
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: The names that the settings of the transformer have had; the first that is there counts.
_SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
#: The package whose classes modules are; others of the same names come with code of their own.
_PACKAGE = "sentence_transformers."
#: The fields of modules.json. `kwargs` are what a caller may pass on, which nobody does here.
_MODULE = Table(("type", "path", "name"), {"idx": ANYTHING, "kwargs": ANYTHING})
#: Of the transformer's settings, what goes on to transformers' own classes: what changes no number, or is asked for
#: in Stoker's own ways.
_MODEL = Table(
    (),
    dict.fromkeys(
        (
            "torch_dtype", "dtype", "attn_implementation", "add_pooling_layer", "device_map", "low_cpu_mem_usage",
            "use_safetensors", "trust_remote_code",
        ),
        ANYTHING,
    ),
)  # fmt: skip
_PROCESSOR = Table((), dict.fromkeys(("use_fast", "trust_remote_code"), ANYTHING))
_CONFIG = Table((), dict.fromkeys(("trust_remote_code", "use_cache"), ANYTHING))
#: The names that each of them has had.
_PASSED_ON = {
    "model_kwargs": _MODEL, "model_args": _MODEL, "processor_kwargs": _PROCESSOR, "tokenizer_args": _PROCESSOR,
    "config_kwargs": _CONFIG, "config_args": _CONFIG,
}  # fmt: skip

#: Limits and additions for texts of one kind are refused, except where they are null.
_FOR_KINDS = ("query_length", "document_length", "query_expansion", "tokenizer_name_or_path")


class _Task(NamedTuple):
    """What a transformer is for, and what its output is called by itself, and among the modules."""

    name: str
    output: str
    module_output: str

    @property
    def settings(self) -> Table:
        """What its file may say. A pair may become two messages for the chat template; a text may not."""
        text = {"method": "forward", "method_output_name": self.output}
        talks = () if self is _EMBEDS else ({"text": text, "message": {**text, "format": "flat"}},)
        return Table(
            ("max_seq_length", "do_lower_case", *_PASSED_ON),
            {
                "transformer_task": (self.name,),
                "module_output_name": (self.module_output,),
                "modality_config": ({"text": text}, *talks),
                "processing_kwargs": ({},),
                "unpad_inputs": ANYTHING,
                "backend": ANYTHING,
                **dict.fromkeys(_FOR_KINDS, ()),
            },
        )


_EMBEDS = _Task("feature-extraction", "last_hidden_state", "token_embeddings")
#: Of rerankers, by what comes behind the transformer: nothing, or what makes a score of logits.
_RERANKS = {
    (): _Task("sequence-classification", "logits", "scores"),
    ("LogitScore",): _Task("text-generation", "logits", "causal_logits"),
}
#: `similarity_fn_name`: how a caller compares vectors. A default length of the vectors is asked for by `dimensions`.
_MODEL_CONFIG = Table(
    ("prompts", "default_prompt_name"),
    {
        "__version__": ANYTHING,
        "similarity_fn_name": ANYTHING,
        "model_type": ("SentenceTransformer",),
        "truncate_dim": (),
    },
)
#: The same of a reranker. `activation_fn`: what its scores go through.
_RERANKER_CONFIG = Table(
    ("prompts", "default_prompt_name", "activation_fn"), {"__version__": ANYTHING, "model_type": ("CrossEncoder",)}
)
#: Decoders by `model_type` that embed where there is a modules.json, and generate where there is none; of T5, which is
#: not run where there is none, the encoder.
POOLED_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "t5")


@dataclass(frozen=True)
class SentenceFiles:
    """`modules`: those of modules.json, in order. `transformer`: the folder of the model itself and its tokenizer.
    `settings`: of that module."""

    root: Path
    transformer: Path
    modules: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path) -> SentenceFiles:
        """Of a folder, with or without these files. Raises `ModelError` for what is damaged or not supported."""
        modules = _modules(root / "modules.json")
        if not modules:
            return cls(root, root)
        paths = [module["path"] for module in modules if kind_of(module) == "Transformer"]
        transformer = inside(root, paths[0]) if paths else root
        return cls(root, transformer, modules, _settings(transformer, _task(modules)))

    @property
    def lowercase(self) -> bool:
        """Whether every text is written in small letters before it is encoded."""
        return self._switch("do_lower_case")

    def max_tokens(self, positions: int) -> int:
        """The most tokens of a text: its own limit, else the tokenizer's; never more than the model's `positions`."""
        limit = self.settings.get("max_seq_length")
        if limit is None:
            config = read_object(self.transformer / "tokenizer_config.json", missing={})
            limit = config.get("model_max_length", config.get("max_len"))
        if limit is None:
            return positions
        if not isinstance(limit, int | float) or isinstance(limit, bool) or not limit >= 1:
            raise ModelError(
                f"{self.transformer}: max_seq_length or model_max_length {as_json(limit)} is no number of tokens"
            )
        return int(min(limit, positions))

    def prompts(self) -> tuple[dict[str, str], str | None]:
        """The prompts by name, and the name of the one that is used where none is asked for."""
        path, config = self._own()
        prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
        if not isinstance(prompts, dict) or not all(isinstance(prompt, str | None) for prompt in prompts.values()):
            raise ModelError(f"{path}: its prompts are not an object of strings")
        prompts = {name: prompt or "" for name, prompt in prompts.items()}
        if not isinstance(default, str | None):
            raise ModelError(f"{path}: default_prompt_name is {as_json(default)}, not a text")
        if default in ("query", "document"):  # which sentence-transformers has in every model, empty
            prompts.setdefault(default, "")
        if default is not None and default not in prompts:
            raise ModelError(
                f"{path}: default_prompt_name {as_json(default)} is none of its prompts ({', '.join(prompts)})"
            )
        return prompts, default

    @property
    def activation(self) -> object:
        """What the scores of a reranker go through; None where nothing is said."""
        return self._own()[1].get("activation_fn")

    def _own(self) -> tuple[Path, dict[str, Any]]:
        """What is said of the whole model, and where."""
        path = self.root / "config_sentence_transformers.json"
        config = read_object(path, missing={}) if self.modules else {}
        (_MODEL_CONFIG if _task(self.modules) is _EMBEDS else _RERANKER_CONFIG).check(config, str(path))
        return path, config

    def _switch(self, name: str) -> bool:
        value = self.settings.get(name)
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"{self.transformer}: {name} is {as_json(value)}, not true or false")
        return value is True


def _modules(path: Path) -> list[dict[str, Any]]:
    """What modules.json lists; nothing where there is none. Raises `ModelError`."""
    modules = read_json(path, missing=())
    if modules == ():
        return []
    if not isinstance(modules, list) or not modules or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{path}: not a list of modules, or an empty one")
    names = [module.get("name") for module in modules if module.get("name") is not None]
    for module in modules:
        _MODULE.check(module, str(path))
        if not isinstance(module.get("type"), str) or not isinstance(module.get("path"), str):
            raise ModelError(f"{path}: a module without a type or a path: {as_json(module)}")
        if not module["type"].startswith(_PACKAGE):
            raise ModelError(
                f"{path}: the module {as_json(module['type'])} is not supported: it is none of sentence-transformers', "
                "and code that comes with a model is never run"
            )
        if names.count(module.get("name")) > 1:
            raise ModelError(f"{path}: two modules are called {as_json(module['name'])}")
    return modules


def _task(modules: Sequence[Mapping[str, Any]]) -> _Task:
    """What the modules use the transformer for."""
    first, *rest = [kind_of(module) for module in modules] or [""]
    return _RERANKS.get(tuple(rest), _EMBEDS) if first == "Transformer" else _EMBEDS


def _settings(transformer: Path, task: _Task) -> dict[str, Any]:
    """Of the transformer: the first of its files that says anything."""
    for name in _SETTINGS:
        path = transformer / name
        settings = read_object(path, missing={})
        if not settings:
            continue
        (task if settings.get("transformer_task") == task.name else _EMBEDS).settings.check(settings, str(path))
        for key, table in _PASSED_ON.items():
            values = settings.get(key) or {}
            if not isinstance(values, dict):
                raise ModelError(f"{path}: {key} is {as_json(values)}, not an object")
            table.check(values, f"{path}: {key}")
        return settings
    return {}


def model_folder(path: Path) -> Path:
    """Where config.json and the weights of a model folder are: in it, or in the part that its modules.json names."""
    return SentenceFiles.of(path).transformer


def pools_decoder(root: Path, architecture: object) -> bool:
    """Whether a folder holds a decoder whose hidden states are made into vectors, as its modules.json says."""
    return architecture in POOLED_DECODERS and bool(SentenceFiles.of(root).modules)


def kind_of(module: Mapping[str, Any]) -> str:
    """The name of a module's class."""
    return str(module.get("type", "")).rsplit(".", 1)[-1]


def inside(root: Path, name: object) -> Path:
    """The folder `name` of a module. Raises `ModelError` for one that leads out of `root`."""
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(f"{root / 'modules.json'}: the path {as_json(name)} leads out of the folder")
    return root / name
