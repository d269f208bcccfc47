"""What PEFT calls a layer: by its path in transformers' network, where mlx-lm's has another for some architectures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

#: How our name of a layer begins → how its name in PEFT may, the one that is written first. Those behind it are of
#: other versions of transformers, and of adapters that Stoker wrote under names of its own.
_BEGINNINGS: Sequence[tuple[re.Pattern[str], tuple[str, ...]]] = (
    # GPT-NeoX.
    (re.compile(r"h\.(?=\d+\.(attention|mlp\.dense_))"), ("gpt_neox.layers.", "model.h.")),
    # GPT-2 and GPT-J.
    (re.compile(r"h\.(?=\d)"), ("transformer.h.", "model.h.")),
    # The first OLMo has a body around its transformer, and is the only one.
    (re.compile(r"transformer\.blocks\.(?=\d+\.(att_proj|attn_out|ff_))"), ("model.transformer.blocks.",)),
    # EXAONE, Qwen 1, GPT-BigCode, DBRX, OpenELM.
    (re.compile(r"transformer\."), ("transformer.", "model.transformer.")),
    # Mamba and Nemotron-H.
    (re.compile(r"backbone\."), ("backbone.", "model.backbone.")),
    # All others; with sight, as transformers has them now and as it had them.
    (re.compile(r""), ("model.", "model.language_model.", "language_model.model.")),
)
#: GPT-2's layers are those that transformers keeps the other way round.
_TURNED = re.compile(r"h\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_proj|c_fc)")


def peft_name(layer: str) -> str:
    """PEFT's name of a layer, as it is written."""
    return _spellings(layer)[0]


def named(layers: Iterable[str], found: Iterable[str]) -> dict[str, str]:
    """PEFT's names of `layers` → ours, as the names `found` in a file are spelled: most of them, the names that are
    written first."""
    spelled: list[dict[str, str]] = []
    for layer in layers:
        for index, name in enumerate(_spellings(layer)):
            if index == len(spelled):
                spelled.append({})
            spelled[index][name] = layer
    there = set(found)
    return max(spelled, key=lambda names: len(there & names.keys()), default={})


def turned(layer: str) -> bool:
    """Whether the layer's weights lie by (in, out) in transformers."""
    return _TURNED.fullmatch(layer) is not None


@lru_cache(maxsize=8192)
def _spellings(layer: str) -> tuple[str, ...]:
    """Kept for the layers of some models: those of one are asked for with each adapter."""
    pattern, starts = next((pattern, starts) for pattern, starts in _BEGINNINGS if pattern.match(layer))
    return tuple(pattern.sub(start, layer, count=1) for start in starts)
