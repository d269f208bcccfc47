"""Values of a config.json that mlx-lm's files make a network of, divide by, count to or take for a place, unchecked.

Of what is of another kind they make a network of other shapes, other numbers in silence, or an error that names no
field. MLX raises nothing for an axis that is divided by 0 or a row beyond the last: the process ends. Each file's own
network refuses what does not fit together; here is what none of them does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.models.bridge.arguments import kind_of, types_of
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: What is counted: layers, loops, heads, experts.
_COUNT = re.compile(r"_(layers?|loops|heads?|experts|experts_per_tok(en)?)$")
#: What something is divided by: groups, and their sizes.
_GROUP = re.compile(r"(^|_)groups?(_norm_size|_size)?$")
#: More than any network has of anything; a loop of so many ends.
_MOST = 1 << 16
#: Model file -> counts that may not be 0, which others may have none of.
_SOME: Mapping[str, tuple[str, ...]] = dict.fromkeys(("longcat_flash", "longcat_flash_ngram"), ("n_routed_experts",))
#: Field -> the field that says how long the list is in which it is a place.
_PLACES = {"altup_active_idx": "altup_num_inputs"}
#: How many experts there are, and how many of them a token goes through.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token")


def check(text: Mapping[str, Any], file: str, args_class: type) -> None:
    """Raise `ModelError` for a value of another kind than its field's, and for one that would end the process or keep
    it busy for ever."""
    for name, length in _PLACES.items():
        place, most = text.get(name), text.get(length)
        if type(place) is int and type(most) is int and not 0 <= place < most:
            raise _needed(name, place, f"a whole number from 0 to {most - 1}")
    types = types_of(file, args_class)
    for name, value in text.items():
        if type(value) is int and (_COUNT.search(name) or _GROUP.search(name)):
            least = 1 if _GROUP.search(name) or name in ("num_hidden_layers", *_SOME.get(file, ())) else 0
            if not least <= value <= _MOST:
                raise _needed(name, value, f"a whole number from {least:,} to {_MOST:,}")
        kind = kind_of(name, types)
        if value is not None and kind is not None and not kind.holds(value):
            raise _needed(name, value, kind.words)
    some = any(type(text.get(name)) is int and text[name] > 0 for name in _EXPERTS)
    for name in _CHOSEN:
        if some and name in types and text.get(name) == 0:
            raise _needed(name, 0, "a positive integer")


def _needed(name: str, value: object, words: str) -> ModelError:
    return ModelError(f"config.json: {name} = {as_json(value)}: {words} is needed")
