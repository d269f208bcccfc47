"""Which form each matrix of a model gets: one for all, or one of mlx-lm's mixtures."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.weights.quantized import AFFINE, SMALL_FLOATS, Form
from stoker.errors import ModelError

#: mlx-lm's mixtures: bits of most matrices, and of those that lose most by rounding.
RECIPES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
_USUAL_BITS, _USUAL_GROUP = 4, 64
#: The first number in a name, by any name of the list of layers.
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
#: Parts of the names of matrices that make values: those of latent keys and values in two steps.
_VALUES = ("v_proj", "v_a_proj", "v_b_proj")


@dataclass(frozen=True)
class Recipe:
    """`usual`: the form of most matrices; `finer`: of those that a mixture gives more bits."""

    usual: Form
    finer: Form | None = None

    @classmethod
    def of(cls, bits: int | None, group_size: int | None, mode: str = AFFINE, mixture: str | None = None) -> Recipe:
        """None is what the mode has: 4 bits in groups of 64, of the affine one. Raises `ModelError` for a form that
        MLX does not have, a mixture that is not known, or one with bits or a mode in addition."""
        if mixture is None:
            usual = SMALL_FLOATS.get(mode, (_USUAL_GROUP, _USUAL_BITS))
            given = (usual[0] if group_size is None else group_size), (usual[1] if bits is None else bits)
            return cls(Form(*given, mode))
        if mixture not in RECIPES:
            raise ModelError(f"recipe {mixture!r} given; {', '.join(RECIPES)} are allowed")
        if bits is not None or mode != AFFINE:
            raise ModelError(f"the recipe {mixture} says the bits of each layer: give neither bits nor a mode with it")
        low, high = RECIPES[mixture]
        group = _USUAL_GROUP if group_size is None else group_size
        return cls(Form(group, low), Form(group, high))

    def form(self, layer: str, layers: int) -> Form:
        """Of the matrix called `layer`, in a model of so many layers.

        In a mixture the head has more bits, and in the first and last eighth of the layers, and in each third of the
        others, what makes values and what ends the feed-forward part.
        """
        if self.finer is None:
            return self.usual
        found = _LAYER.search(layer)
        index, eighth = int(found[1]) if found else 0, layers // 8
        sensitive = index < eighth or index >= 7 * layers // 8 or (index - eighth) % 3 == 2
        finer = "lm_head" in layer or (sensitive and any(part in layer for part in (*_VALUES, "down_proj")))
        return self.finer if finer else self.usual

    def __str__(self) -> str:
        if self.finer is not None:
            return f"{self.usual.bits} and {self.finer.bits} bits in groups of {self.usual.group_size}"
        mode = "" if self.usual.mode == AFFINE else f" ({self.usual.mode})"
        return f"{self.usual.bits} bits in groups of {self.usual.group_size}{mode}"
