"""The metadata of a GGUF file as its architecture's keys; those that nothing asks for are an error. No MLX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.models.allowed import ANYTHING, Inert, Table
from engine.models.fields import Fields
from stoker.errors import ModelError

#: Keys that change nothing, and the values with which they do not.
_INERT: Inert = {
    **dict.fromkeys(("vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length",
                     "attention.layer_norm_epsilon"), ANYTHING),
    "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,), "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,), "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,), "rope.scaling.yarn_log_multiplier": (0.0,),
}  # fmt: skip


class _Recorded(Mapping[str, Any]):
    """Remembers what it was asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_, self.asked = values, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


class Keys(Fields):
    """The keys of one architecture, asked for without its name before them."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._start = f"{architecture}."
        own = {key: value for key, value in metadata.items() if key.startswith(self._start)}
        self._recorded = _Recorded(own)
        super().__init__(self._recorded, "GGUF metadata")

    def get(self, name: str) -> Any:
        return self._recorded.get(self._start + name)

    def count(self, name: str, default: int | None = None) -> int:
        return super().count(self._start + name, default)

    def index(self, name: str, default: int) -> int:
        return super().index(self._start + name, default)

    def number(self, name: str, default: float | None = None) -> float:
        return super().number(self._start + name, default)

    def only(self, name: str, allowed: object) -> None:
        super().only(self._start + name, allowed)

    def refuse(self, name: str, why: str) -> ModelError:
        value = str(self.get(name))[:100]
        return ModelError(f"{self._where}: {self._start}{name} = {value} is not supported: {why}")

    def finish(self) -> None:
        """Raise `ModelError` for a key that nothing asked for and that could change something."""
        inert = {self._start + name: values for name, values in _INERT.items()}
        Table(self._recorded.asked, inert).check(self._recorded.values_, self._where)


def scaling(keys: Keys, *kinds: str) -> dict[str, Any] | None:
    """`rope_scaling`, of one of these kinds."""
    kind, factor = keys.get("rope.scaling.type") or "none", keys.number("rope.scale_linear", 1.0)
    if kind == "none":
        kind = "linear" if factor != 1.0 else kind
    else:
        factor = keys.number("rope.scaling.factor", factor)
    if kind == "none":
        return None
    if kind not in kinds:
        raise keys.refuse("rope.scaling.type", f"{' and '.join(('none', *kinds))} are for this architecture")
    made = {"type": kind, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        made["original_max_position_embeddings"] = keys.count("rope.scaling.original_context_length")
        made["beta_fast"] = keys.number("rope.scaling.yarn_beta_fast", 32.0)
        made["beta_slow"] = keys.number("rope.scaling.yarn_beta_slow", 1.0)
    return made
