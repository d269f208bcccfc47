"""The reports of a training run as a curve of bounded size."""

from __future__ import annotations

from dataclasses import dataclass, field

from stoker.contract import TrainReport

#: Points of a curve. When there are more, every second one goes: the curve keeps its shape.
POINTS = 400


@dataclass
class Curve:
    """Fed with reports in order; `points`: (step, loss)."""

    points: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    last: TrainReport | None = None

    def add(self, report: TrainReport) -> None:
        self.last = report
        _add(self.points, report.step, report.loss)
        if report.held_out_loss is not None:
            _add(self.held_out, report.step, report.held_out_loss)

    @property
    def shown(self) -> list[tuple[int, float]]:
        """The points, the newest one among them."""
        end = [] if self.last is None else [(self.last.step, self.last.loss)]
        return self.points if self.points[-1:] == end else self.points + end

    @property
    def share(self) -> float:
        return self.last.step / self.last.steps if self.last else 0.0

    @property
    def text(self) -> str:
        """`step 42/100 · loss 1.23 · 61 tokens/s`."""
        if self.last is None:
            return ""
        said = f"step {self.last.step}/{self.last.steps} · loss {self.last.loss:.2f}"
        return f"{said} · {self.last.tokens_per_second:.0f} tokens/s"


def _add(points: list[tuple[int, float]], step: int, loss: float) -> None:
    # A run that was rolled back, or began anew elsewhere, repeats steps.
    while points and points[-1][0] >= step:
        points.pop()
    points.append((step, loss))
    if len(points) > POINTS:
        del points[1:-1:2]
