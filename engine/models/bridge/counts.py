"""Numbers of a config.json that mlx-lm's files divide by, count to or take for a place in a list, unchecked.

MLX raises nothing for an axis that is divided by 0 or a row beyond the last: the process ends. Each file's own network
refuses what does not fit together; here is what none of them does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

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


def check(text: Mapping[str, Any], file: str, args_class: type) -> None:
    """Raise `ModelError` for a number that would end the process, or keep it busy for ever."""
    whole = {each.name for each in fields(args_class) if str(each.type) in ("<class 'int'>", "int", "Optional[int]")}
    for name, value in text.items():
        if type(value) is bool and name in whole and _COUNT.search(name):
            raise ModelError(f"config.json: {name} = {value!r}: a whole number is needed")
        if type(value) is int and (_COUNT.search(name) or _GROUP.search(name)):
            least = 1 if _GROUP.search(name) or name in _SOME.get(file, ()) else 0
            if not least <= value <= _MOST:
                raise ModelError(
                    f"config.json: {name} = {value!r}: a whole number from {least:,} to {_MOST:,} is needed"
                )
    for name, length in _PLACES.items():
        place, most = text.get(name), text.get(length)
        if type(place) is int and type(most) is int and not 0 <= place < most:
            raise ModelError(f"config.json: {name} = {place!r}: a whole number from 0 to {most - 1} is needed")
