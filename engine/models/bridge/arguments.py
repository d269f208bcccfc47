"""What the arguments of mlx-lm's model files hold, by how a file annotates and names them: none checks any."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from types import ModuleType

from engine.models.bridge import package
from engine.models.fields import AMOUNT, COUNT, FRACTION, INDEX, KINDS, NUMBER, Kind

#: How an argument is annotated that is a number and nothing else, null aside; or a switch, a text, a list, a pair.
_NUMBERS = re.compile(r"(<class ')?(typing\.)?(Optional\[)?(int|float)('>|\]| \| None)?")
_SWITCHES = re.compile(r"(<class ')?(typing\.)?(Optional\[)?bool('>|\]| \| None)?")
_TEXTS = re.compile(r"(<class ')?(typing\.)?(Optional\[)?str('>|\]| \| None)?")
_LISTS = re.compile(
    r"(<class ')?(typing\.)?(Optional\[)?(typing\.)?[lL]ist('>)?(\[(?P<of>int|float|str|bool)\])?\]?( \| None)?"
)
_PAIRS = re.compile(r"(typing\.)?(Optional\[)?(typing\.)?Tuple\[float, float\]\]?")
#: Integers that no file computes anything with unless they are above 0.
_SIZES = re.compile(
    r"(^|_)(size|dim|d_model|n_embd|n_positions|rank|kernel|conv|cache|window|expand|"
    r"ssm|state|heads?|vocab|groups?|period|interval|step|freq|divisor|share_factor|topk|top_k|moe_k|num_inputs|"
    r"split_num|neighbor_num)$"
)
#: The number of all layers.
_LAYERS = re.compile(r"n_layers?|num(_transformer)?_layers")
#: Those of which there may be none.
_COUNTS = re.compile(
    r"(^|_)(layers|loops|experts?|experts_per_tok(en)?|sliding_window(_size)?|global_key_value_heads|offset|idx|"
    r"(moe|shared_expert)_intermediate_size|per_layer_input|zero_expert_num)$"
)
#: Numbers that something is divided by, a root is drawn of, or a power is taken of.
_POSITIVE = re.compile(
    r"(^|_)(eps|epsilon|theta|base|base_freq|(attn|final)_logit_softcapping|query_pre_attn_scalar|logits_scaling)$"
)

_FINITE = Kind("a number", lambda value: type(value) in (int, float) and abs(value) < float("inf"))
#: Some files take a number for a switch, which is true unless it is 0.
_SWITCH = Kind("true or false", lambda value: isinstance(value, int))
_TEXT = Kind("a text", lambda value: isinstance(value, str))
_LIST = Kind("a list", lambda value: isinstance(value, list))
_ITEMS: Mapping[str, Kind] = {
    "int": Kind("a list of whole numbers", lambda value: _all(value, int)),
    "float": Kind("a list of numbers", lambda value: _all(value, int, float)),
    # A text is one of letters, as Nemotron-H's pattern of layers.
    "str": Kind("a list of texts", lambda value: isinstance(value, str) or _all(value, str)),
    "bool": Kind("a list of switches", lambda value: _all(value, bool, int)),
}
_LIMITS = Kind(
    "a list of two numbers from 0 on, the smaller one first,",
    lambda value: _all(value, int, float) and len(value) == 2 and 0 <= value[0] <= value[1],
)


def _all(value: object, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(each) in kinds for each in value)


def types_of(file: str, args_class: type) -> dict[str, str]:
    """How a file annotates its arguments, by name; also those of the language model alone, where they stand in an
    object of their own."""
    found = {each.name: str(each.type) for each in dataclasses.fields(args_class)}
    if "text_config" in found:
        for inner in _dataclasses(package.load(file)):
            found = {**{each.name: str(each.type) for each in dataclasses.fields(inner)}, **found}
    return found


def _dataclasses(module: ModuleType) -> Iterator[type]:
    """Those of a model file, and of the model files that it imports."""
    siblings = f"{module.__name__.rpartition('.')[0]}."
    for value in vars(module).values():
        if isinstance(value, ModuleType) and value.__name__.startswith(siblings):
            yield from filter(_is_dataclass, vars(value).values())
        elif _is_dataclass(value):
            yield value


def _is_dataclass(value: object) -> bool:
    return isinstance(value, type) and dataclasses.is_dataclass(value)


def kind_of(name: str, types: Mapping[str, str]) -> Kind | None:
    """What a file takes for an argument; None for one that it does not read, or has in several forms."""
    annotation, known = types.get(name), KINDS.get(name)
    if annotation is None:
        return None
    if _SWITCHES.fullmatch(annotation):
        return known or _SWITCH
    if _TEXTS.fullmatch(annotation):
        return _TEXT
    if _PAIRS.fullmatch(annotation):
        return _LIMITS
    if listed := _LISTS.fullmatch(annotation):
        return _ITEMS.get(listed["of"] or "", _LIST)
    if _NUMBERS.fullmatch(annotation) is None:
        return _or_listed(known) if known in (COUNT, NUMBER) and re.search(r"\b(int|float)\b", annotation) else None
    return known if known in (COUNT, INDEX, NUMBER, AMOUNT, FRACTION) else _number(name, annotation)


def _or_listed(kind: Kind) -> Kind:
    """Or one of them a layer, as some files have it."""
    return Kind(kind.words, lambda value: isinstance(value, list) or kind.holds(value))


def _number(name: str, annotation: str) -> Kind:
    if _POSITIVE.search(name):
        return NUMBER
    if "int" not in annotation:
        return _FINITE
    if _LAYERS.fullmatch(name) or (_SIZES.search(name) and not _COUNTS.search(name)):
        return COUNT
    return INDEX if _COUNTS.search(name) else _FINITE
