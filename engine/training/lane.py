"""Training runs of one model: one at a time, one step a turn."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field

from engine.adapters.lora import LoraWeights
from engine.adapters.pool import AdapterPool
from engine.loading import LoadedModel
from engine.ticket import StepOutput, Ticket
from engine.training.data import TokenizedExample, tokenize
from engine.training.trainer import train
from stoker.contract import TrainReport, TrainRequest, TrainResult, Usage
from stoker.contract.dataset import read_lines
from stoker.errors import DatasetError, InvalidRequest


@dataclass(eq=False)
class TrainWork:
    ticket: Ticket
    request: TrainRequest
    examples: list[TokenizedExample]
    reports: list[TrainReport] = field(default_factory=list)


class TrainLane:
    kind = "train"

    def __init__(self, model: LoadedModel, pool: AdapterPool) -> None:
        self._model, self._pool = model, pool
        self._waiting: deque[TrainWork] = deque()
        self._current: TrainWork | None = None
        self._steps: Generator[TrainReport, None, LoraWeights] | None = None

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._current)

    def prepare(self, ticket: Ticket, request: TrainRequest, data: bytes | None) -> TrainWork:
        if data is None:
            raise DatasetError("dataset: gone from the broker before the run began. Send the job again.")
        if request.max_length > self._model.context:
            raise InvalidRequest(
                f"max_length: {request.max_length} given; {request.model} takes {self._model.context}."
            )
        examples = read_lines(data.splitlines(), "dataset")
        return TrainWork(ticket, request, tokenize(examples, self._model.tokenizer, request.max_length))

    def admit(self, work: TrainWork) -> None:
        self._waiting.append(work)

    def drop_stopped(self) -> None:
        for work in [work for work in self._waiting if work.ticket.stopping]:
            self._waiting.remove(work)
            work.ticket.fail_stopped()
        if self._current is not None and self._current.ticket.stopping:
            self._current.ticket.fail_stopped()
            self._close()

    def run(self) -> StepOutput:
        """One optimizer step of the current run; after the last one, save and promote the adapter."""
        work, steps = self._begin()
        try:
            report = next(steps)
        except StopIteration as end:
            return self._end(work, end.value)
        except Exception as error:
            return self._fail(work, error)
        work.reports.append(report)
        return StepOutput(entries=[(work.ticket.job_id, report)])

    def _end(self, work: TrainWork, weights: LoraWeights) -> StepOutput:
        try:
            result = self._finish(work, weights)
        except Exception as error:
            return self._fail(work, error)
        self._close()
        return StepOutput(ended=[(work.ticket, result)])

    def _fail(self, work: TrainWork, error: Exception) -> StepOutput:
        """The run's own failure (divergence, a full disk): the runs that wait are not to blame."""
        work.ticket.fail(error)
        self._close()
        return StepOutput()

    def _begin(self) -> tuple[TrainWork, Generator[TrainReport, None, LoraWeights]]:
        if self._current is None or self._steps is None:
            self._current = self._waiting.popleft()
            self._current.ticket.start()
            self._steps = train(self._model, self._current.examples, self._current.request)
        return self._current, self._steps

    def _finish(self, work: TrainWork, weights: LoraWeights) -> TrainResult:
        request, reports = work.request, work.reports
        notes = {
            "model": request.model,
            "name": request.name,
            "job": work.ticket.job_id,
            "request": request.model_dump(mode="json"),
            "global_step": len(reports),
            "loss": reports[-1].loss,
            "learning_rate": reports[-1].learning_rate,
            "timestamp": time.time(),
        }
        version = self._pool.save(request.name, weights, notes)
        return TrainResult(
            model=request.model,
            adapter=request.name,
            version=version,
            steps=len(reports),
            first_loss=reports[0].loss,
            last_loss=reports[-1].loss,
            tokens=reports[-1].tokens,
            usage=Usage(run_seconds=work.ticket.run_seconds),
        )

    def _close(self) -> None:
        if self._steps is not None:
            self._steps.close()
        self._current = self._steps = None

    def fail_all(self, error: BaseException) -> None:
        for work in (*self._waiting, *([self._current] if self._current else [])):
            work.ticket.fail(error)
        self._waiting.clear()
        self._close()
