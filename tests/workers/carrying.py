"""Runs to carry without an engine: their folders, and owners of their jobs in a real broker."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stoker.broker import keys, ledger, policy
from stoker.broker.ledger.record import Field
from stoker.client.requests import train_request
from stoker.client.submission import job_record
from stoker.contract import TrainRequest
from stoker.files.durable import remove_folder
from stoker.settings import Settings
from workers.job_lease import JobLease

QUEUE = keys.queue("m", "train")


def asked(**options: Any) -> TrainRequest:
    return train_request("m", "style", [{"text": "a"}], "job", options)


def made_of(request: TrainRequest, base: str = "base") -> dict[str, Any]:
    return {"model": "m", "base": base, "dataset": "d", "request": request.model_dump(mode="json")}


class RunFolder:
    """What the engine writes of a run: a report a step, and the files of its checkpoints."""

    def __init__(self, home: Path, request: TrainRequest, size: int = 100, base: str = "base") -> None:
        self.path, self._size, self._made_of = home / "runs/job", size, made_of(request, base)
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        (self.path / "log.jsonl").touch()

    @classmethod
    def of(cls, path: Path, request: TrainRequest) -> RunFolder:
        """One that is there."""
        return cls(path.parent.parent, request)

    def _write(self, name: str, notes: dict[str, Any] | None) -> None:
        folder = self.path / "checkpoints" / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(f"weights of {name}".encode() * self._size)
        if notes is not None:
            (folder / "trainer.safetensors").write_bytes(f"state of {name}".encode() * self._size)
            (folder / "stoker.json").write_text(json.dumps(notes))

    def save(self, step: int, best: int = 0) -> None:
        """A regular checkpoint behind `step` reports."""
        self.report(step)
        self._write_best(best)
        state = {"reports": step, "micro": step, "best_step": best}
        self._write(f"step-{step:08}", {"made_of": self._made_of, "state": state})

    def pause(self, reports: int, micro: int, best: int = 0) -> None:
        self.report(reports)
        self._write_best(best)
        state = {"reports": reports, "micro": micro, "best_step": best}
        self._write(f"paused-{reports:08}-{micro:08}", {"made_of": self._made_of, "state": state})

    def _write_best(self, step: int) -> None:
        if step and not (self.path / f"checkpoints/best-{step:08}").exists():
            self._write(f"best-{step:08}", None)

    def drop(self, step: int) -> None:
        remove_folder(self.path / f"checkpoints/step-{step:08}")

    def report(self, upto: int) -> None:
        (self.path / "log.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, upto + 1)))


def files(run: Path) -> dict[str, bytes]:
    """All that is in a run's folder."""
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()}


class Worker:
    """A worker with a disk of its own. `own` makes it the owner of the job, as its message would."""

    def __init__(self, settings: Settings, redis: Any, home: Path, name: str = "w", **changes: Any) -> None:
        settings = settings.model_copy(update={"home": home, **changes})
        engine = SimpleNamespace(model=lambda name: SimpleNamespace(digest="base"))
        self.runtime: Any = SimpleNamespace(settings=settings, redis=redis, name=name, engine=engine)
        self.redis, self.home, self.name = redis, home, name

    def own(self, request: TrainRequest) -> JobLease:
        """A job that is new is submitted, and taken from the owner that it has."""
        ledger.submit(self.redis, "job", job_record(request, "job"))
        policy.decide(self.redis, "crashes", 1000)
        token = f"token-{self.name}"
        assert ledger.claim(self.redis, "job", QUEUE, token, self._tag(), self.name).state == "run"
        return JobLease(self.runtime, "job", QUEUE, token, "tag")

    def _tag(self) -> str:
        found = self.redis.hget(keys.job("job"), Field.TAG)
        return found.decode() if found else "tag"

    def job(self, request: TrainRequest) -> Any:
        return SimpleNamespace(id="job", runtime=self.runtime, lease=self.own(request))
