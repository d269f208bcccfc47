"""What `lora_swiglu` is called with."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from kernels.lora.arguments import LoraInput, LoraSides


class LoraSwigluInput(NamedTuple):
    """One new token a row of a gated MLP. A tuple, as `Kernel` is called with its fields one by one.

    `x`: (rows, IN) or (rows, 1, IN), the input of both layers. `gate`, `up`: (…, width) each, what the layers made of
    it, `outputs` numbers from `starts` on; they may be one array. `indices`, and the sides of each layer: as in
    `LoraInput`; of one rank and dtype; None where adapters do not change a layer.
    """

    x: mx.array
    gate: mx.array
    up: mx.array
    starts: tuple[int, int]
    outputs: int
    indices: mx.array
    gate_sides: LoraSides | None
    up_sides: LoraSides | None

    @property
    def sides(self) -> list[LoraSides]:
        """Those that there are."""
        return [sides for sides in (self.gate_sides, self.up_sides) if sides is not None]

    @property
    def layers(self) -> tuple[mx.array | LoraInput, mx.array | LoraInput]:
        """Gate and up: what the layer made, (…, outputs), and what adapters change of it where they do."""
        gate, up = (y[..., at : at + self.outputs] for y, at in zip((self.gate, self.up), self.starts, strict=True))
        return self._layer(gate, self.gate_sides), self._layer(up, self.up_sides)

    def _layer(self, y: mx.array, sides: LoraSides | None) -> mx.array | LoraInput:
        if sides is None:
            return y
        return LoraInput(self.x, y, sides.a, sides.b, self.indices, sides.gain, sides.shift)
