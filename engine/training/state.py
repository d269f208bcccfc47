"""All that a run is at one moment: with the dataset and the request, its whole future follows from this."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from engine.training.guard import WINDOW
from engine.training.optimizer import Moments


@dataclass(frozen=True)
class TrainState:
    """Immutable, as MLX's arrays are: keeping an old state costs its arrays and no copy.

    Randomness needs no state: dropout and the order of batches are functions of the seed and of `micro`.
    """

    #: float32 (size,), as `FlatLayout` lays them out.
    weights: mx.array
    moments: Moments
    #: Optimizer steps done, and micro-steps: the position in the data.
    step: int = 0
    micro: int = 0
    #: Of the step under way: the sum of the gradients so far (None: nothing yet), of the losses, and the targets.
    gradient: mx.array | None = None
    loss_sum: float = 0.0
    targets: int = 0
    tokens: int = 0
    #: Losses of the last steps, for the guard.
    recent: tuple[float, ...] = ()
    first_loss: float = 0.0
    last_loss: float = 0.0
    last_rate: float = 0.0
    #: Reports made. It never goes back, not even with a rollback.
    reports: int = 0
    rollbacks: int = 0
    #: What the schedule's rate is multiplied by.
    rate_factor: float = 1.0
    best_loss: float | None = None
    best_step: int = 0
    #: Evaluations since the best.
    stale: int = 0
    #: Fields of the report of a step that is done and not evaluated yet.
    unreported: dict[str, float] | None = None

    def stepped(self, weights: mx.array, moments: Moments, loss: float, fields: dict[str, float]) -> TrainState:
        """After an optimizer step of this loss; its report is yet to be made."""
        return replace(
            self,
            weights=weights,
            moments=moments,
            step=self.step + 1,
            gradient=None,
            loss_sum=0.0,
            targets=0,
            recent=(*self.recent, loss)[-WINDOW:],
            first_loss=self.first_loss if self.step else loss,
            last_loss=loss,
            last_rate=fields["learning_rate"],
            unreported=fields,
        )

    @property
    def arrays(self) -> dict[str, mx.array]:
        found = {"weights": self.weights, "first": self.moments.first, "second": self.moments.second}
        return found if self.gradient is None else {**found, "gradient": self.gradient}

    @property
    def numbers(self) -> dict[str, Any]:
        """Everything else, as JSON: floats survive it bit for bit."""
        names = set(self.__dataclass_fields__) - {"weights", "moments", "gradient"}
        return {name: getattr(self, name) for name in sorted(names)}

    @classmethod
    def of(cls, arrays: dict[str, mx.array], numbers: dict[str, Any]) -> TrainState:
        """The inverse. Raises `KeyError` or `TypeError` for what is missing or unknown."""
        return cls(
            weights=arrays["weights"],
            moments=Moments(arrays["first"], arrays["second"]),
            gradient=arrays.get("gradient"),
            **{**numbers, "recent": tuple(numbers["recent"])},
        )
