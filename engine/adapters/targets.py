"""Which layers an adapter changes, by the rules of PEFT (`check_target_module_exists` of its `tuners_utils.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.platform.limited import LimitedProcess, LimitPassed
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: What PEFT takes for each architecture here where the file names no targets.
_DEFAULT = ("q_proj", "v_proj")
_ALL = "all-linear"
#: PEFT finds the number of a layer by this, or by `layers_pattern` in front of the number.
_NUMBER = r".*?\.[^.]*\.(?P<idx>\d+)\."
SECONDS = 2.0
_matcher = LimitedProcess(
    Path(__file__).with_name("pattern_process.py"), "matches the patterns of adapters", "computing"
)


def target_layers(where: str, fields: Mapping[str, Any], layers: Mapping[str, str]) -> set[str]:
    """Those of `layers`, PEFT's name → ours, that an adapter of these fields of PEFT's config changes, by our names.
    Raises `ModelError` naming a field that is not as PEFT takes it."""
    keys = list(layers)
    targets = fields.get("target_modules")
    numbers = _numbers(where, fields)
    if isinstance(targets, str):
        if numbers is not None:
            raise ModelError(f"{where}: layers_to_transform goes with a list of target_modules, not with a pattern")
        every = targets.lower() == _ALL
        found = set(keys) if every else set(_matches(where, "target_modules", targets, keys))
    else:
        names = _names(where, "target_modules", _DEFAULT if targets is None else targets)
        found = _named(keys, names)
        if numbers is not None:
            found = {key for key in found if key in names} | _of_layers(where, fields, sorted(found), numbers)
    return {layers[key] for key in found - _excluded(where, fields, keys)}


def _named(keys: Iterable[str], names: Sequence[str]) -> set[str]:
    """The keys that are one of `names`, or end with one behind a dot."""
    endings = tuple(f".{name}" for name in names)
    return {key for key in keys if key in names or key.endswith(endings)}


def _excluded(where: str, fields: Mapping[str, Any], keys: Sequence[str]) -> set[str]:
    excluded = fields.get("exclude_modules") or ()
    if isinstance(excluded, str):
        return set(_matches(where, "exclude_modules", excluded, keys))
    return _named(keys, _names(where, "exclude_modules", excluded))


def _numbers(where: str, fields: Mapping[str, Any]) -> set[int] | None:
    """The layers of `layers_to_transform`; None for all."""
    value = fields.get("layers_to_transform")
    if value is None or value == []:
        if fields.get("layers_pattern"):
            raise ModelError(f"{where}: layers_pattern goes with layers_to_transform, which is not there")
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in numbers):
        raise ModelError(f"{where}: layers_to_transform {as_json(value)} is neither a number nor a list of numbers")
    return set(numbers)


def _of_layers(where: str, fields: Mapping[str, Any], keys: Sequence[str], numbers: set[int]) -> set[str]:
    """Those of `keys` that belong to a layer of one of `numbers`."""
    stated = fields.get("layers_pattern") or []
    names = _names(where, "layers_pattern", [stated] if isinstance(stated, str) else stated)
    patterns = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in names] or [_NUMBER]
    found: dict[str, str] = {}
    for pattern in patterns:
        # The first pattern that matches a key says its number.
        found = _matches(where, "layers_pattern", pattern, keys, beginning=True) | found
    return {key for key, number in found.items() if number.isdigit() and int(number) in numbers}


def _names(where: str, field: str, value: object) -> Sequence[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ModelError(f"{where}: {field} {as_json(value)} is neither a pattern nor a list of names")
    return value


def _matches(where: str, field: str, pattern: str, keys: Sequence[str], *, beginning: bool = False) -> dict[str, str]:
    """The keys that the regular expression `pattern` matches, each with its group `idx`."""
    try:
        request = {"pattern": pattern, "names": list(keys), "beginning": beginning}
        found = _matcher.ask(request, SECONDS)
    except LimitPassed:
        raise ModelError(f"{where}: {field} {as_json(pattern)} takes too long to match; name the layers") from None
    if "" in found:
        raise ModelError(f"{where}: {field} {as_json(pattern)} is no regular expression ({found['']})")
    return found
