"""Training runs of one model: one at a time, one micro-step a turn."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.adapters.lora import chosen_targets
from engine.adapters.pool import AdapterPool
from engine.checkpoints.loading import LoadedModel
from engine.ticket import StepOutput, Ticket
from engine.training.data import TokenizedExample, tokenize
from engine.training.run import TrainingRun
from stoker.contract import TrainRequest, TrainResult, Usage
from stoker.contract.dataset import TrainInput, iterate_lines
from stoker.contract.names import Rule, checked
from stoker.errors import DatasetError, InvalidRequest, JobCancelled, WorkerUnavailable

log = logging.getLogger(__name__)


@dataclass(eq=False)
class TrainWork:
    ticket: Ticket[TrainResult]
    request: TrainRequest
    examples: list[TokenizedExample]
    #: The adapter's version; None: the next one.
    version: int | None
    #: See `TrainInput`.
    kept: Callable[[], object]


class TrainLane:
    """`runs`: where each run has its folder, named as its job."""

    kind = TrainRequest.kind

    def __init__(self, model: LoadedModel, pool: AdapterPool, runs: Path) -> None:
        self._model, self._runs = model, runs
        #: Where its adapters serve.
        self.pool = pool
        self._waiting: deque[TrainWork] = deque()
        self._current: TrainWork | None = None
        self._run: TrainingRun | None = None

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._current)

    @property
    def held(self) -> list[TrainWork]:
        """Every job that was admitted and has not ended."""
        return [*self._waiting, *([self._current] if self._current else [])]

    def prepare(self, ticket: Ticket[TrainResult], request: TrainRequest, data: TrainInput | None) -> TrainWork:
        if data is None:
            raise DatasetError("dataset: gone from the broker before the run began. Send the job again.")
        if request.max_length > self._model.context:
            raise InvalidRequest(
                f"max_length: {request.max_length} given; {request.model} takes {self._model.context}."
            )
        chosen_targets(self._model.linear_shapes, request.targets)
        lines = iterate_lines(data.lines(), "dataset")
        examples = tokenize(lines, self._model.tokenizer, request.max_length, learn_prompts=request.learn_prompts)
        return TrainWork(ticket, request, examples, data.version, data.kept)

    def admit(self, work: TrainWork) -> None:
        self._waiting.append(work)

    def drop_stopped(self) -> None:
        for work in [work for work in self._waiting if work.ticket.stopping]:
            work.ticket.fail_stopped()
            self._waiting.remove(work)
        if self._current is not None and self._current.ticket.stopping:
            self._stop(self._current)

    def _stop(self, work: TrainWork) -> None:
        """A run that goes to another worker is kept as it is; one that is cancelled is over."""
        if self._run is not None:
            run, reason = self._run, work.ticket.stop
            if isinstance(reason, WorkerUnavailable):
                self._pause(run)
            else:
                status = "cancelled" if isinstance(reason, JobCancelled) else str(reason)
                _try(lambda: run.end(status), "that a run was stopped could not be noted in its folder")
        work.ticket.fail_stopped()
        self._close()

    @staticmethod
    def _pause(run: TrainingRun) -> None:
        _try(run.pause, "a run could not be kept as it was: it goes on from its last regular checkpoint")

    def run(self, *, lookahead: bool = True) -> StepOutput:
        """One micro-step of the current run; after the last one, save the adapter."""
        work = self._current
        try:
            if work is None or self._run is None:
                return self._begin()
            if self._run.finished:
                return self._finish(work, self._run)
            report = self._run.advance()
        except Exception as error:
            return self._fail(error)
        if report is not None:
            work.ticket.progress = report.step / report.steps
        return StepOutput(entries=[] if report is None else [(work.ticket, report)])

    def _begin(self) -> StepOutput:
        work = self._current = self._waiting.popleft()
        work.ticket.start()
        name = checked(Rule.JOB_ID, "job id", work.ticket.job_id)
        self._run = TrainingRun(self._model, work.request, work.examples, self._runs / name, work.kept)
        # What was reported before may not have reached the broker: it drops what it has.
        return StepOutput(entries=[(work.ticket, report) for report in self._run.reported])

    def _finish(self, work: TrainWork, run: TrainingRun) -> StepOutput:
        request, state = work.request, run.state
        notes = {
            "model": request.model,
            "base": self._model.digest,
            "name": request.name,
            "job": work.ticket.job_id,
            "request": request.model_dump(mode="json"),
            "global_step": state.best_step if state.best_loss is not None else state.step,
            "loss": state.last_loss,
            "held_out_loss": state.best_loss,
            "learning_rate": state.last_rate,
        }
        version = self.pool.save(request.name, run.adapter(), notes, work.version)
        result = TrainResult(
            model=request.model,
            adapter=request.name,
            version=version,
            steps=state.step,
            first_loss=state.first_loss,
            last_loss=state.last_loss,
            best_step=state.best_step if state.best_loss is not None else state.step,
            held_out_loss=state.best_loss,
            rollbacks=state.rollbacks,
            tokens=state.tokens,
            usage=Usage(run_seconds=work.ticket.run_seconds),
        )
        # The adapter is there: the run is done, whether its folder says so or not.
        _try(lambda: run.end("done"), "that a run is done could not be noted in its folder")
        output = StepOutput()
        output.end(work.ticket, result)
        # Last, when nothing can fail any more: a job that is in neither would be lost.
        self._close()
        return output

    def _fail(self, error: Exception) -> StepOutput:
        """The run's own failure (divergence, a full disk): the runs that wait are not to blame."""
        run = self._run
        if run is not None:
            _try(lambda: run.end(f"failed: {error}"), "that a run failed could not be noted in its folder")
        if self._current is not None:
            self._current.ticket.fail(error)
        self._close()
        return StepOutput()

    def _close(self) -> None:
        self._current = self._run = None

    def fail_all(self, error: BaseException) -> None:
        if self._run is not None and isinstance(error, WorkerUnavailable):
            self._pause(self._run)
        for work in self.held:
            work.ticket.fail(error)
        self._waiting.clear()
        self._close()


def _try(note: Callable[[], None], said: str) -> None:
    """What is only noted of a run must not keep its job from ending; a full disk refuses every note."""
    try:
        note()
    except Exception as error:
        log.warning("%s: %s", said, error)
