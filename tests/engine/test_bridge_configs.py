"""What a config.json of a real folder says in other words than mlx-lm's files read, leaves out, or asks for apart."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from engine.models.bridge import package, weights
from stoker.errors import ModelError
from tests.engine.architectures import config
from tests.engine.bridged import network

#: A field that a file does not have.
ABSENT = object()
FULL, SLIDING = "full_attention", "sliding_attention"
ROW = mx.array([[*range(1, 31)]])


def described(name: str, **fields: Any) -> dict[str, Any]:
    return {field: value for field, value in {**config(name), **fields}.items() if value is not ABSENT}


def made_of(name: str, filled: nn.Module, **fields: Any) -> nn.Module:
    """The network of a config.json that is changed so, with the weights of another."""
    made, _ = weights.network_of(described(name, **fields), name)
    made.load_weights(tree_flatten(filled.parameters()))
    return made


def logits(made: nn.Module) -> np.ndarray:
    return np.array(made(ROW))


def exaone(pattern: str | None) -> nn.Module:
    """mlx-lm's own network with these letters, its weights random."""
    file = package.load("exaone4")
    filled, _ = network("exaone4")
    own = file.Model(file.ModelArgs.from_dict(described("exaone4", sliding_window_pattern=pattern)))
    own.load_weights(tree_flatten(filled.parameters()))
    return own


@pytest.mark.parametrize(
    ("letters", "fields"),
    [
        ("LLLG", {"sliding_window_pattern": "LLLG", "layer_types": [SLIDING, SLIDING, SLIDING, FULL]}),
        ("LLLG", {"sliding_window_pattern": 4}),
        ("LGGL", {"sliding_window_pattern": ABSENT, "layer_types": [SLIDING, FULL, FULL, SLIDING]}),
        ("LG", {"sliding_window_pattern": "LG"}),
        (None, {"sliding_window_pattern": "LLLG", "sliding_window": None, "layer_types": [FULL] * 4}),
        (None, {"sliding_window_pattern": None, "sliding_window": None, "layer_types": [FULL] * 4}),
    ],
    ids=["letters and a list", "a number", "a list", "letters", "no window", "no pattern"],
)
def test_an_exaone_4_has_windows_where_its_list_of_layers_says(letters: str | None, fields: dict[str, Any]) -> None:
    """LG AI's own folders have the letters and the list, which was refused."""
    own = exaone(letters)
    np.testing.assert_array_equal(logits(made_of("exaone4", own, **fields)), logits(own))


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": [FULL, SLIDING]},
        {"layer_types": ["chunked_attention"] * 4},
        {"layer_types": [[FULL]] * 4},
        {"sliding_window_pattern": "LX"},
        {"sliding_window_pattern": 0},
        {"sliding_window_pattern": 1 << 40},
    ],
    ids=["too few", "another kind", "lists", "letters", "zero", "huge"],
)
def test_what_is_no_pattern_of_an_exaone_4_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"layer_types|sliding_window_pattern"):
        weights.network_of(described("exaone4", **fields), "exaone4")


def test_layers_of_a_cohere_2_without_a_pattern_are_held_against_its_own() -> None:
    """Each fourth has no window, where Gemma's sixth has none."""
    without = described("cohere2", sliding_window_pattern=ABSENT, layer_types=[SLIDING, SLIDING, SLIDING, FULL])
    assert weights.network_of(without, "cohere2")[1].sliding_window_pattern == 4
    with pytest.raises(ModelError, match="layer_types"):
        weights.network_of({**without, "layer_types": [SLIDING] * 4}, "cohere2")
