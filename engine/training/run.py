"""One training run with its folder: trainer, checkpoints and log together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from engine.adapters.lora import LoraWeights
from engine.checkpoints.loading import LoadedModel
from engine.platform.jsonfiles import write_json
from engine.training.carried import CHECKPOINTS, LOG_FILE
from engine.training.checkpoint import Checkpoints
from engine.training.data import TokenizedExample, dataset_digest, divided, with_steps
from engine.training.log import RunLog
from engine.training.ranks import ALONE, Ranks, RunPlan
from engine.training.state import TrainState
from engine.training.trainer import Trainer
from stoker.contract import TrainReport, TrainRequest

RUN_FILE = "run.json"
#: Reports that are repeated on resuming: more than may have been on their way when the worker died.
_REPEATED = 5000


class TrainingRun:
    """A run that goes on where its folder says, or begins.

    However often it is killed and opened again, at any moment, its reports and its adapter are bit for bit those
    of a run that nobody disturbed.
    """

    def __init__(
        self,
        model: LoadedModel,
        request: TrainRequest,
        examples: Sequence[TokenizedExample],
        folder: Path,
        kept: Callable[[], object] = lambda: None,
        ranks: Ranks = ALONE,
    ) -> None:
        """`ranks`: those that share its steps; the folder is rank 0's. `kept` is called when there is a new checkpoint.
        Raises `ModelError` for a folder of another run or with a damaged checkpoint, `DatasetError` for a dataset that
        cannot be split as asked."""
        learned, held_out = divided(examples, request)
        request = with_steps(request, len(learned))
        self._model, self._request, self._examples, self._kept = model, request, examples, kept
        self._trainer = Trainer(model.decoder, request, learned, held_out, ranks)
        made_of = {
            "model": model.name,
            "base": model.digest,
            "dataset": dataset_digest(examples),
            "request": request.model_dump(mode="json"),
        }
        self._checkpoints = Checkpoints(folder / CHECKPOINTS, made_of)
        self._log = RunLog(folder / LOG_FILE)
        self._resume()
        self._file = folder / RUN_FILE
        self._said = {**made_of, "examples": len(learned), "held_out": len(held_out)}
        self.end("running")
        self._turns: Generator[TrainReport | None, None, None] | None = None

    def _resume(self) -> None:
        state, anchor = self._checkpoints.newest()
        trainer = self._trainer
        trainer.anchor = anchor or trainer.anchor
        trainer.state = state or trainer.state
        self._log.keep(trainer.state.reports)
        #: Reports of before that may not have been heard.
        self.reported = self._log.tail(_REPEATED)

    def end(self, status: str) -> None:
        """Say in the run's folder how it stands."""
        write_json(self._file, {**self._said, "status": status, "step": self._trainer.state.step})

    def plan(self, run: str) -> RunPlan:
        """For the other ranks, before the first turn. `run`: what they shall call it."""
        assert not self.begun
        trainer = self._trainer
        return RunPlan(run, self._model.name, self._request, self._examples, trainer.state, trainer.anchor)

    @property
    def begun(self) -> bool:
        """Whether it has made a turn: until then it is as its folder has it."""
        return self._turns is not None

    @property
    def witness(self) -> str:
        """See `Trainer.witness`."""
        return self._trainer.witness

    @property
    def state(self) -> TrainState:
        return self._trainer.state

    @property
    def finished(self) -> bool:
        return self._trainer.finished

    def advance(self) -> TrainReport | None:
        """One micro-step; the report, if it was the last of a step. Raises `JobFailed` for a run that diverges."""
        trainer = self._trainer
        if self._turns is None:
            self._turns = trainer.run()
        report = next(self._turns)
        if report is None:
            return None
        self._log.append(report)
        state = trainer.state
        if report.held_out_loss is not None and state.best_step == state.step:
            self._checkpoints.save_best(state.step, trainer.adapter())
        if trainer.is_anchor and not report.note:
            self._log.sync()
            self._checkpoints.save(trainer.whole, trainer.adapter())
            self._kept()
        return report

    def pause(self) -> None:
        """Keep the run as it is now, so that the process that opens it next goes on from here. Once it has begun, ranks
        that share the model do their part of it (`FollowedRun.keep`)."""
        if not self.begun:
            return
        state = self._trainer.resumable()
        if state.micro:
            self._log.sync()
            self._checkpoints.pause(state, self._trainer.adapter(state))

    def adapter(self) -> LoraWeights:
        """What the run is for: the adapter of the step with the least held-out loss, else of the last."""
        state = self._trainer.state
        if state.best_loss is None or state.best_step == state.step:
            return self._trainer.adapter()
        return self._checkpoints.best(state.best_step, self._model.linear_shapes)
