"""Adapters that were made elsewhere, on their way into the store: one a turn."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.adapters import mlx_lm, peft
from engine.adapters.lora import LoraWeights
from engine.adapters.pool import AdapterPool
from engine.checkpoints.loading import LoadedModel
from engine.platform.jsonfiles import NOTES_FILE, read_object
from engine.ticket import StepOutput, Ticket
from stoker.contract import AdapterRequest, AdapterResult, Usage
from stoker.contract.bundle import AdapterInput
from stoker.errors import ModelError


@dataclass(eq=False)
class AdapterWork:
    ticket: Ticket[AdapterResult]
    request: AdapterRequest
    files: AdapterInput


class AdapterLane:
    kind = AdapterRequest.kind

    def __init__(self, model: LoadedModel, pool: AdapterPool) -> None:
        self._model, self._pool = model, pool
        self._waiting: deque[AdapterWork] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    @property
    def held(self) -> list[AdapterWork]:
        """Every job that was admitted and has not ended."""
        return list(self._waiting)

    def prepare(self, ticket: Ticket[AdapterResult], request: AdapterRequest, data: AdapterInput) -> AdapterWork:
        return AdapterWork(ticket, request, data)

    def admit(self, work: AdapterWork) -> None:
        self._waiting.append(work)

    def drop_stopped(self) -> None:
        for work in [work for work in self._waiting if work.ticket.stopping]:
            work.ticket.fail_stopped()
            self._waiting.remove(work)

    def run(self, *, lookahead: bool = True) -> StepOutput:
        # It waits until its end is known: what breaks the engine off meanwhile ends it with those that wait.
        work = self._waiting[0]
        work.ticket.start()
        output = StepOutput()
        try:
            output.end(work.ticket, self._take(work))
        except Exception as error:
            work.ticket.fail(error)
        self._waiting.popleft()
        return output

    def _take(self, work: AdapterWork) -> AdapterResult:
        request, files = work.request, work.files
        try:
            weights = read_adapter(files.folder, self._model)
        except ModelError as error:
            # The folder is this worker's, and gone when the client reads this.
            raise ModelError(str(error).replace(str(files.folder), files.source)) from error
        notes: dict[str, Any] = {"model": request.model, "base": self._model.digest, "name": request.name}
        notes["job"] = work.ticket.job_id
        version = self._pool.save(request.name, weights, notes, files.version)
        return AdapterResult(
            model=request.model,
            adapter=request.name,
            version=version,
            rank=weights.config.rank,
            method="dora" if weights.config.dora else "lora",
            usage=Usage(run_seconds=work.ticket.run_seconds),
        )

    def fail_all(self, error: BaseException) -> None:
        for work in self._waiting:
            work.ticket.fail(error)
        self._waiting.clear()


def read_adapter(folder: Path, model: LoadedModel) -> LoraWeights:
    """An adapter in PEFT's or mlx-lm's layout, or a checkpoint of ours. Raises `ModelError` for one that is damaged, of
    other shapes, or that says that it was made on another base."""
    if (folder / NOTES_FILE).is_file():
        notes = read_object(folder / NOTES_FILE)
        made_of = notes.get("made_of", notes)
        base = made_of.get("base") if isinstance(made_of, dict) else None
        if base not in (None, model.digest):
            raise ModelError(
                f"{folder}: an adapter of another base (digest {base}); {model.name} here is {model.digest}. "
                "Load it for the model that it was trained on."
            )
    if (folder / mlx_lm.WEIGHTS_FILE).is_file():
        return mlx_lm.read(folder, model.linear_shapes)
    return peft.read(folder, model.linear_shapes)
