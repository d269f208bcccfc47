"""Configuration fields, read with a clear error for each that is absent, wrong or not supported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stoker.contract.shown import as_json
from stoker.errors import ModelError

_LARGEST = 1 << 31


def among(value: object, allowed: tuple[object, ...]) -> bool:
    """Whether it is one of them, where JSON's true is no 1."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed)


@dataclass(frozen=True)
class Kind:
    """What a field holds: `words` for messages, and whether a value is of the kind. In Python true is an integer; here
    it is none."""

    words: str
    holds: Callable[[Any], bool]

    def check(self, value: object, name: str, where: str) -> None:
        """Raise `ModelError` for a value of the field `name` that is not of this kind."""
        if not self.holds(value):
            raise ModelError(f"{where}: {name} is {as_json(value)}, not {self.words}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


COUNT = Kind("a positive integer", lambda value: _whole(value) and 0 < value < _LARGEST)
INDEX = Kind("an integer from 0 on", lambda value: _whole(value) and 0 <= value < _LARGEST)
NUMBER = Kind("a positive number", lambda value: _number(value) and 0 < value < float("inf"))
AMOUNT = Kind("a number from 0 on", lambda value: _number(value) and 0 <= value < float("inf"))
FRACTION = Kind("a number above 0 and up to 1", lambda value: _number(value) and 0 < value <= 1)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))

#: What fields hold in every architecture that reads them, whether or not the others of a file leave them a meaning.
#: Those that are in no line have more than one form, which the code that reads them checks.
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(
        (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "max_position_embeddings", "original_max_position_embeddings", "embedding_size",
            "num_hidden_groups", "inner_group_num", "attention_head_size", "d_model", "d_kv", "d_ff", "num_layers",
            "num_heads", "relative_attention_num_buckets", "relative_attention_max_distance", "local_attention",
            "global_attn_every_n_layers", "sliding_window_pattern", "_sliding_window_pattern",
        ),
        COUNT,
    ),
    # Where an architecture has some of it, its code asks for more than 0.
    **dict.fromkeys(("sliding_window", "max_window_layers", "type_vocab_size"), INDEX),
    **dict.fromkeys(
        (
            "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rope_theta", "global_rope_theta",
            "local_rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "factor", "low_freq_factor",
            "high_freq_factor", "attention_factor", "beta_fast", "beta_slow",
        ),
        NUMBER,
    ),
    **dict.fromkeys(("mscale", "mscale_all_dim"), AMOUNT),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), FRACTION),
    **dict.fromkeys(
        (
            "tie_word_embeddings", "use_sliding_window", "use_bidirectional_attention", "norm_bias", "attention_bias",
            "mlp_bias", "relative_attention", "position_biased_input", "share_att_key", "is_gated_act", "truncate",
        ),
        FLAG,
    ),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), OBJECT),
}  # fmt: skip


def check_kind(value: object, name: str, where: str, called: str | None = None) -> None:
    """Raise `ModelError` for a value that the field `name` cannot have; null is absent. `called`: what the file calls
    the field."""
    kind = KINDS.get(name)
    if kind is not None and value is not None:
        kind.check(value, called or name, where)


def renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`config` with other names for some of its fields. Raises `ModelError` where one is given twice, differently, or
    has a value of a wrong kind: from here on its own name is not known."""
    found = {name: value for name, value in config.items() if name not in names}
    for original, name in names.items():
        value = config.get(original)
        check_kind(value, name, "config.json", original)
        if value is not None and found.setdefault(name, value) != value:
            raise ModelError(
                f"config.json: {original} is {as_json(value)}, and {name}, which is the same, {as_json(found[name])}"
            )
    return found


def spelled(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """What `config` calls the fields that `names` gives usual names, by these. One that is not there is called as the
    architecture does, unless the file has usual names alone."""
    usual = any(config.get(name) is not None for name in names.values())
    usual = usual and all(config.get(own) is None for own in names)
    return {
        name: own
        for own, name in names.items()
        if config.get(own) is not None or (config.get(name) is None and not usual)
    }


class Fields:
    """A view of `values` (parsed JSON or GGUF metadata); `where` is what messages call it. `names`: of a field what
    messages call it, where that is another name (`spelled`)."""

    def __init__(self, values: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None):
        self._values, self._where, self._names = values, where, names or {}

    def called(self, name: str) -> str:
        """What messages call a field."""
        return self._names.get(name, name)

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        return int(self._of(COUNT, name, default))

    def index(self, name: str, default: int) -> int:
        """An integer from 0 on."""
        return int(self._of(INDEX, name, default))

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        return float(self._of(NUMBER, name, default))

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        return bool(self._of(FLAG, name, default))

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object; an empty one where there is none."""
        found: Mapping[str, Any] = self._of(OBJECT, name, {})
        return found

    def only(self, name: str, allowed: object) -> None:
        """Refuse any value except `allowed`; absent and null count as allowed."""
        value = self._values.get(name)
        if not among(value, (None, allowed)):
            raise ModelError(
                f"{self._where}: {self.called(name)} = {as_json(value)} is not supported; only {as_json(allowed)} is"
            )

    def _of(self, kind: Kind, name: str, default: object) -> Any:
        value = self._values.get(name)
        value = default if value is None else value
        if value is None and name not in self._values:
            raise ModelError(f"{self._where}: {self.called(name)} is missing; {kind.words} is needed")
        kind.check(value, self.called(name), self._where)
        return value
