"""Numbers of a config.json that mlx-lm's files make a network of, divide by, count to or take for a place, unchecked.

Of what is no number they make a network of other shapes, or an error that names no field. MLX raises nothing for an
axis that is divided by 0 or a row beyond the last: the process ends. Each file's own network refuses what does not fit
together; here is what none of them does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from engine.models.fields import AMOUNT, COUNT, FLAG, INDEX, KINDS, NUMBER
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: How the argument of a file is annotated that is a number and nothing else, null aside.
_NUMBERS = re.compile(r"(<class ')?(typing\.)?(Optional\[)?(int|float)('>|\]| \| None)?")
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


def check(text: Mapping[str, Any], file: str, args_class: type) -> None:
    """Raise `ModelError` for what is no number where one is needed, and for one that would end the process or keep it
    busy for ever."""
    types = {each.name: str(each.type) for each in fields(args_class)}
    for name, value in text.items():
        _check_number(name, value, types)
        if type(value) is int and (_COUNT.search(name) or _GROUP.search(name)):
            least = 1 if _GROUP.search(name) or name in ("num_hidden_layers", *_SOME.get(file, ())) else 0
            if not least <= value <= _MOST:
                raise ModelError(
                    f"config.json: {name} = {as_json(value)}: a whole number from {least:,} to {_MOST:,} is needed"
                )
    for name, length in _PLACES.items():
        place, most = text.get(name), text.get(length)
        if type(place) is int and type(most) is int and not 0 <= place < most:
            raise ModelError(f"config.json: {name} = {as_json(place)}: a whole number from 0 to {most - 1} is needed")


def _check_number(name: str, value: object, types: Mapping[str, str]) -> None:
    """`types`: of the file's arguments. Where the language model's stand in an object of their own, their names say."""
    kind, nested = KINDS.get(name), "text_config" in types and name not in types
    if nested:
        wanted = kind in (COUNT, INDEX, NUMBER, AMOUNT)
    else:
        wanted = _NUMBERS.fullmatch(types.get(name, "")) is not None
    if kind is FLAG and value is not None and "bool" in types.get(name, ""):
        kind.check(value, name, "config.json")
    if value is None or not wanted:
        return
    size = kind is COUNT or _COUNT.search(name) is not None
    # Gemma 3n's are a list, one a layer.
    listed = nested and name == "intermediate_size" and isinstance(value, list)
    number = isinstance(value, int if size else int | float) and not isinstance(value, bool) and value == value
    if not number and not listed:
        raise ModelError(f"config.json: {name} = {as_json(value)}: a {'whole ' if size else ''}number is needed")
