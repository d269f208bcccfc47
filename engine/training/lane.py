"""Training runs of one model, which take turns: one micro-step of one run at a time.

Turns are fair by time: a run with long steps has fewer of them. Each run has its state, its folder and its end for
itself, so that it makes what it would make alone, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from engine.adapters.lora import chosen_targets
from engine.adapters.pool import AdapterPool
from engine.checkpoints.loading import LoadedModel
from engine.fair import FairShare
from engine.ticket import StepOutput, Ticket
from engine.training.data import TokenizedExample, allowed_length, tokenize
from engine.training.ranks import ALONE, Group
from engine.training.run import TrainingRun
from stoker.contract import TrainReport, TrainRequest, TrainResult, Usage
from stoker.contract.dataset import TrainInput, iterate_lines
from stoker.contract.names import Rule, checked
from stoker.errors import DatasetError, JobCancelled, StokerError, WorkerUnavailable

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
    """`runs`: where each run has its folder, named as its job. `group`: the ranks that share the steps; a turn of the
    lane is for when they are ready."""

    kind = TrainRequest.kind

    def __init__(self, model: LoadedModel, pool: AdapterPool, runs: Path, group: Group = ALONE) -> None:
        self._model, self._folder, self._group = model, runs, group
        #: Where its adapters serve.
        self.pool = pool
        #: Every job that was admitted and has not ended; None: its first turn comes.
        self._runs: dict[TrainWork, TrainingRun | None] = {}
        self._share: FairShare[TrainWork] = FairShare({})

    @property
    def busy(self) -> bool:
        return bool(self._runs)

    @property
    def held(self) -> list[TrainWork]:
        """Every job that was admitted and has not ended."""
        return list(self._runs)

    def prepare(self, ticket: Ticket[TrainResult], request: TrainRequest, data: TrainInput | None) -> TrainWork:
        if data is None:
            raise DatasetError("dataset: gone from the broker before the run began. Send the job again.")
        limit = allowed_length(request, self._model.context)
        chosen_targets(self._model.linear_shapes, request.targets)
        lines = iterate_lines(data.lines(), "dataset")
        examples = tokenize(lines, self._model.tokenizer, limit, learn_prompts=request.learn_prompts)
        return TrainWork(ticket, request, examples, data.version, data.kept)

    def admit(self, work: TrainWork) -> None:
        self._runs[work] = None
        self._share.add(work, 1.0, urgent=False)

    def drop_stopped(self) -> None:
        for work in [work for work in self._runs if work.ticket.stopping]:
            self._stop(work)

    def _stop(self, work: TrainWork) -> None:
        """A run that goes to another worker is kept as it is; one that is cancelled is over."""
        run, reason = self._runs[work], work.ticket.stop
        if run is not None:
            if isinstance(reason, WorkerUnavailable):
                self._pause(work, run)
            else:
                status = "cancelled" if isinstance(reason, JobCancelled) else str(reason)
                _try(lambda: run.end(status), "that a run was stopped could not be noted in its folder")
        work.ticket.fail_stopped()
        self._leave(work)

    def _pause(self, work: TrainWork, run: TrainingRun) -> None:
        def pause() -> None:
            if self._model.shard is not None and run.begun:
                self._group.keep(work.ticket.job_id)
            run.pause()

        _try(pause, "a run could not be kept as it was: it goes on from its last regular checkpoint")

    def run(self, *, lookahead: bool = True) -> StepOutput:
        """One micro-step of the run whose turn it is; after its last one, save its adapter."""
        work = self._share.choose(self._ready())
        if work is None:
            return StepOutput()
        with self._share.charge(work):
            output, over = self._turn(work)
        if over:
            self._leave(work)
        return output

    def _ready(self) -> Collection[TrainWork]:
        """The runs that may have a turn. A worker that was frozen may get a job again that it has: both would write
        into one folder, so the second waits until the first has ended."""
        first: dict[str, TrainWork] = {}
        for work in self._runs:
            first.setdefault(work.ticket.job_id, work)
        return first.values()

    def _turn(self, work: TrainWork) -> tuple[StepOutput, bool]:
        """What it made, and whether the run is over."""
        run = self._runs[work]
        try:
            if run is None:
                return self._begin(work), False
            self._group.check(work.ticket.job_id)
            if run.finished:
                return self._finish(work, run), True
            report = self._advance(work, run)
        except Exception as error:
            self._fail(work, run, error)
            return StepOutput(), True
        if report is not None:
            work.ticket.progress = report.step / report.steps
        return StepOutput(entries=[] if report is None else [(work.ticket, report)]), False

    def _begin(self, work: TrainWork) -> StepOutput:
        work.ticket.start()
        name = checked(Rule.JOB_ID, "job id", work.ticket.job_id)
        run = TrainingRun(self._model, work.request, work.examples, self._folder / name, work.kept, self._group)
        self._runs[work] = run
        if self._group.size > 1:
            self._group.begin(run.plan(name))
        # What was reported before may not have reached the broker: it drops what it has.
        return StepOutput(entries=[(work.ticket, report) for report in run.reported])

    def _advance(self, work: TrainWork, run: TrainingRun) -> TrainReport | None:
        """A turn of the run, on all ranks."""
        if self._group.size == 1:
            return run.advance()
        self._group.advance(work.ticket.job_id)
        try:
            report = run.advance()
        except (StokerError, OSError):
            # All ranks have met the same, or it is of the run's folder, behind the turn.
            raise
        except Exception as error:
            if self._model.shard is not None:
                # The others are in the middle of the same pass: there is no way back for one alone.
                self._group.lose(f"a turn of a run failed on rank 0: {type(error).__name__}: {error}")
            raise
        self._group.advanced(work.ticket.job_id, run.witness)
        return report

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
        return output

    @staticmethod
    def _fail(work: TrainWork, run: TrainingRun | None, error: Exception) -> None:
        """The run's own failure (divergence, a full disk): the others are not to blame."""
        if run is not None:
            _try(lambda: run.end(f"failed: {error}"), "that a run failed could not be noted in its folder")
        work.ticket.fail(error)

    def _leave(self, work: TrainWork) -> None:
        self._share.remove(work)
        if self._runs[work] is not None:
            self._group.end(work.ticket.job_id)
        # Last, when nothing can fail any more: a job that is neither held nor in the step's output would be lost.
        del self._runs[work]

    def fail_all(self, error: BaseException) -> None:
        for work, run in self._runs.items():
            if run is not None:
                if isinstance(error, WorkerUnavailable):
                    self._pause(work, run)
                self._group.end(work.ticket.job_id)
            work.ticket.fail(error)
        self._runs, self._share = {}, FairShare({})


def _try(note: Callable[[], None], said: str) -> None:
    """What is only noted of a run must not keep its job from ending; a full disk refuses every note."""
    try:
        note()
    except Exception as error:
        log.warning("%s: %s", said, error)
