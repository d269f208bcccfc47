"""What sentence-transformers' files say of a folder, as far as it can be known without a model: MLX is not needed.

They count where there is a `modules.json`, which names the folder of each part; without one sentence-transformers
takes none of them into account and makes the mean of what the model gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.platform.jsonfiles import read_json, read_object
from stoker.errors import ModelError

#: The names that the settings of the transformer have had; the first that is there counts.
_SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
#: Settings that change what a text's tokens or hidden states are, and what they may be.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "processing_kwargs": ({},),
    "processor_kwargs": ({},),
    "tokenizer_args": ({},),
    "config_kwargs": ({},),
    "config_args": ({},),
    "tokenizer_name_or_path": (),
}


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
        path = root / "modules.json"
        modules = read_json(path, missing=[])
        if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
            raise ModelError(f"{path}: not a list of modules")
        if not modules:
            return cls(root, root)
        paths = [module.get("path", "") for module in modules if kind_of(module) == "Transformer"]
        transformer = inside(root, paths[0]) if paths else root
        found = next((transformer / name for name in _SETTINGS if (transformer / name).is_file()), None)
        settings = {} if found is None else read_object(found)
        for name, allowed in _ONLY.items():
            value = settings.get(name)
            if value is not None and value not in allowed:
                raise ModelError(f"{found}: {name} = {str(value)[:60]} is not supported")
        return cls(root, transformer, modules, settings)

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
            raise ModelError(f"{self.transformer}: max_seq_length or model_max_length {limit!r} is no number of tokens")
        return int(min(limit, positions))

    def prompts(self) -> tuple[dict[str, str], str | None]:
        """The prompts by name, and the name of the one that is used where none is asked for."""
        path = self.root / "config_sentence_transformers.json"
        config = read_object(path, missing={}) if self.modules else {}
        prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
        if not isinstance(prompts, dict) or not all(isinstance(prompt, str | None) for prompt in prompts.values()):
            raise ModelError(f"{path}: its prompts are not an object of strings")
        prompts = {name: prompt or "" for name, prompt in prompts.items()}
        if default in ("query", "document"):  # which sentence-transformers has in every model, empty
            prompts.setdefault(default, "")
        if default is not None and default not in prompts:
            raise ModelError(f"{path}: default_prompt_name {default!r} is none of its prompts ({', '.join(prompts)})")
        return prompts, default

    def _switch(self, name: str) -> bool:
        value = self.settings.get(name)
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"{self.transformer}: {name} is {value!r}, not true or false")
        return value is True


def model_folder(path: Path) -> Path:
    """Where config.json and the weights of a model folder are: in it, or in the part that its modules.json names."""
    return SentenceFiles.of(path).transformer if (path / "modules.json").is_file() else path


def kind_of(module: Mapping[str, Any]) -> str:
    """The name of a module's class."""
    return str(module.get("type", "")).rsplit(".", 1)[-1]


def inside(root: Path, name: object) -> Path:
    """The folder `name` of a module. Raises `ModelError` for one that leads out of `root`."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(f"{root / 'modules.json'}: the path {name!r} leads out of the folder")
    return root / name
