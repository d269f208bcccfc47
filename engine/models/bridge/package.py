"""mlx-lm's model files, without the rest of mlx-lm. No MLX until a file is asked for.

Importing `mlx_lm` itself sets the process's limit of open files, changes its environment and needs transformers. So its
folder is imported under a name of our own: a package with nothing in it but the way to its files, of which those of
`models` are loaded one by one.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from stoker.contract.shown import as_json
from stoker.errors import ModelError

RELEASE = "0.32.2"
_NAME = "stoker_mlx_lm"
#: `model_type` -> the file that has it, where the names differ (`MODEL_REMAPPING` of mlx-lm's `utils.py`).
REMAPPING: Mapping[str, str] = {
    "mistral": "llama",
    "llava": "mistral3",
    "phi-msft": "phixtral",
    "falcon_mamba": "mamba",
    "joyai_llm_flash": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "qwen2_5_vl": "qwen2_vl",
    "minimax_m2": "minimax",
    "iquestcoder": "llama",
    "xverse": "llama",
    "gemma4_unified": "gemma4",
    "deepseek_v41_text": "deepseek_v41",
}
#: The same by `model_type` and one of `architectures` (`MODEL_ARCHITECTURE_REMAPPING`).
ARCHITECTURE_REMAPPING: Mapping[tuple[str, str], str] = {
    ("bailing_hybrid", "BailingMoeV3ForCausalLM"): "bailing_moe_v3"
}
#: Files that are not run, and why.
REFUSED: Mapping[str, str] = {
    "deepseek_v32": "it writes into its cache past every call of it",
    "glm_moe_dsa": "it writes into its cache past every call of it",
    "minimax_m3_vl": "it writes into its cache past every call of it",
    "deepseek_v41": "it keeps a cache of its own kind",
    "gpt_bigcode": "it needs one position for all rows of a batch",
    "llama4": "it needs one position for all rows of a batch",
    "afm7": "it takes positions from how many keys are read",
    "recurrent_gemma": "it computes a text's first token otherwise than from an empty state",
    "phi3small": "its sparse attention ends the process on a CPU",
    "gear": "mlx-lm's own file does not run",
    "plamo3": "mlx-lm's file computes its window otherwise with a cache than without one",
    "plamo2": "its file imports the whole of mlx-lm, which changes the process",
    "olmo": "its file needs the package of another project, and ends the process without it",
    "prism_hadamard_qwen35": "its packed weights can only come with a checkpoint, and nothing here was held to one",
    "dbrx": "it reads the router's choice of every token on the host",
}
_MODEL = re.compile(r"^class Model\(|^from \S+ import .*\bModel\b", re.MULTILINE)

_WINDOW = re.compile(r"^    sliding_window\b|^    text_config: (?:dict|Dict)\b", re.MULTILINE)
#: A file whose arguments are another's, or more than these.
_INHERITED = re.compile(r"^class ModelArgs\((\w+)\.ModelArgs\)", re.MULTILINE)


@functools.cache
def folder() -> Path | None:
    """Where mlx-lm is installed; None without it, or with another release than `RELEASE`."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations or metadata.version("mlx-lm") != RELEASE:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def files() -> frozenset[str]:
    """The names of mlx-lm's model files."""
    root = folder()
    if root is None:
        return frozenset()
    found = (root / "models").glob("*.py")
    return frozenset(path.stem for path in found if _MODEL.search(path.read_text(encoding="utf-8")))


def file_of(config: Mapping[str, Any]) -> str | None:
    """The model file for a config.json; None if there is none that runs here."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    stated = config.get("architectures")
    for architecture in stated if isinstance(stated, list) else (stated,):
        if isinstance(architecture, str) and (kind, architecture) in ARCHITECTURE_REMAPPING:
            return ARCHITECTURE_REMAPPING[kind, architecture]
    name = REMAPPING.get(kind, kind)
    return name if name in files() and name not in REFUSED else None


@functools.cache
def reads_window(name: str) -> bool:
    """Whether a model file takes a sliding window, itself or with all that config.json says of its language model; by
    its text, without MLX."""
    root = folder()
    path = None if root is None else root / "models" / f"{name}.py"
    if path is None or not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    return bool(_WINDOW.search(text)) or any(reads_window(other) for other in _INHERITED.findall(text) if other != name)


def unknown(kind: object, own: tuple[str, ...]) -> ModelError:
    """What to say of a `model_type` that neither this engine (`own`) nor mlx-lm has."""
    if isinstance(kind, str) and REMAPPING.get(kind, kind) in REFUSED:
        return ModelError(f"architecture {as_json(kind)} is not supported: {REFUSED[REMAPPING.get(kind, kind)]}")
    if kind == "t5":
        return ModelError(
            'architecture "t5" generates no text here; its encoder makes vectors, of a folder with a modules.json of '
            "sentence-transformers"
        )
    known = sorted({*own, *files(), *REMAPPING} - REFUSED.keys())
    near = difflib.get_close_matches(kind, known, n=3, cutoff=0.5) if isinstance(kind, str) else []
    said = f"; the nearest names are {', '.join(near)}" if near else ""
    if folder() is None:
        said += f". mlx-lm {RELEASE}, which has most, is not installed: pip install --no-deps mlx-lm=={RELEASE}"
    return ModelError(
        f"architecture {as_json(kind)} is not supported{said}. {', '.join(own)} and mlx-lm's {len(files())} model "
        "files are"
    )


def load(name: str) -> ModuleType:
    """One of `files`, imported. Raises `ModelError` for one that cannot be."""
    _package()
    try:
        return importlib.import_module(f"{_NAME}.models.{name}")
    except ImportError as error:
        raise ModelError(f"mlx-lm's model file {name} cannot be loaded: {error}") from error


def _package() -> None:
    """The package of our own, made once; its submodules are mlx-lm's files."""
    if _NAME in sys.modules:
        return
    root = folder()
    if root is None:
        raise ModelError(f"mlx-lm {RELEASE} is not installed: pip install --no-deps mlx-lm=={RELEASE}")
    module = ModuleType(_NAME)
    module.__path__ = [str(root)]
    sys.modules[_NAME] = module
    # Here, because it imports MLX; and before the first file takes mlx-lm's own from there.
    from engine.models.bridge.attention import scaled_dot_product_attention

    base = importlib.import_module(f"{_NAME}.models.base")
    base.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[attr-defined]
