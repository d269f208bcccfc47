"""What `/v1/fine_tuning/jobs` takes, as options of a training job."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import Field, StringConstraints

from stoker.broker.fine_tunes import FineTune
from stoker.client.options import TrainOptions, checked_options
from stoker.client.requests import train_request
from stoker.contract.dataset import ON_WORKER
from stoker.contract.names import Rule, follows
from stoker.contract.requests import TrainRequest
from stoker.contract.shown import as_json
from stoker.errors import InvalidRequest
from stoker.gateway.errors import Names, Refused
from stoker.gateway.fields import MOST_METADATA, Body, at_most

_DEFAULT = TrainRequest.model_fields
#: What `auto` means.
EPOCHS, BATCH_SIZE, MULTIPLIER = 3, _DEFAULT["batch_size"].default, 1.0
#: What a multiplier of 1 is.
LEARNING_RATE = _DEFAULT["learning_rate"].default
_HYPER = "method.supervised.hyperparameters"
#: Options of a training job that OpenAI's fields say.
_SAID = {
    "epochs": f"{_HYPER}.n_epochs", "batch_size": f"{_HYPER}.batch_size",
    "learning_rate": f"{_HYPER}.learning_rate_multiplier", "seed": "seed", "held_out_lines": "validation_file",
}  # fmt: skip
#: What fields of a training job are called here.
NAMES = Names({**{name: f"stoker.{name}" for name in TrainOptions.__annotations__}, **_SAID, "name": "suffix"})

V = TypeVar("V", int, float)
Key = Annotated[str, StringConstraints(max_length=64)]
Text512 = Annotated[str, StringConstraints(max_length=512)]


class Hyperparameters(Body):
    n_epochs: int | Literal["auto"] = "auto"
    batch_size: int | Literal["auto"] = "auto"
    learning_rate_multiplier: float | Literal["auto"] = "auto"


class Supervised(Body):
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)


class Method(Body):
    type: Literal["supervised"]
    supervised: Supervised = Field(default_factory=Supervised)


class FineTuningBody(Body):
    REFUSED: ClassVar[Mapping[str, str]] = {"integrations": "read the job's events; leave it out"}
    IDLE: ClassVar[Mapping[str, object]] = {"integrations": []}

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    method: Method | None = None
    #: The older place of the same.
    hyperparameters: Hyperparameters | None = None
    metadata: Annotated[dict[Key, Text512], at_most(MOST_METADATA)] | None = None
    #: Options of a training job that OpenAI does not have.
    stoker: dict[str, Any] = Field(default_factory=dict)

    def record(self, job_id: str, owner: str, created: int, base: str, seed: int) -> FineTune:
        """What is remembered of it. `seed`: for one that names none. Raises `Refused`."""
        seed = seed if self.seed is None else self.seed
        # How many lines are held out is known when they are counted.
        options = self.options(seed, held_out_lines=0 if self.validation_file is None else 1)
        try:
            asked = train_request(base, self._adapter(job_id), f"{ON_WORKER}x", job_id, dict(options), as_json)
        except InvalidRequest as error:
            raise NAMES.refusal(error) from None
        return FineTune(
            id=job_id, owner=owner, created=created, model=base, adapter=asked.name, metadata=self.metadata,
            training_file=self.training_file, validation_file=self.validation_file, seed=seed, epochs=asked.epochs,
            steps=asked.steps if asked.epochs is None else None, batch_size=asked.batch_size, promote=asked.promote,
            multiplier=asked.learning_rate / LEARNING_RATE,
        )  # fmt: skip

    def _hyperparameters(self) -> Hyperparameters:
        if self.method is not None and self.hyperparameters is not None:
            message = f"hyperparameters: given with method; say them in {_HYPER}."
            raise Refused(400, message, param="hyperparameters", code="invalid_value")
        if self.method is not None:
            return self.method.supervised.hyperparameters
        return self.hyperparameters or Hyperparameters()

    def _adapter(self, job_id: str) -> str:
        if self.suffix is None:
            return f"ft-{hashlib.sha256(job_id.encode()).hexdigest()[:12]}"
        if not follows(Rule.NAME, self.suffix):
            message = f"suffix: {as_json(self.suffix)} given; it is the adapter's name. Allowed: {Rule.NAME.allowed}."
            raise Refused(400, message, param="suffix", code="invalid_value")
        return self.suffix

    def options(self, seed: int, held_out_lines: int) -> TrainOptions:
        """Of the job. Raises `Refused`."""
        asked, own = self._hyperparameters(), self._own()
        said = TrainOptions(
            batch_size=_or(asked.batch_size, BATCH_SIZE), seed=seed, held_out_lines=held_out_lines,
            learning_rate=LEARNING_RATE * _or(asked.learning_rate_multiplier, MULTIPLIER),
        )  # fmt: skip
        if "steps" not in own:
            said["epochs"] = _or(asked.n_epochs, EPOCHS)
        elif asked.n_epochs != "auto":
            raise _twice("steps", f"{_HYPER}.n_epochs")
        if held_out_lines and "held_out" in own:
            raise _twice("held_out", "validation_file")
        return cast(TrainOptions, own | said)

    def _own(self) -> dict[str, object]:
        """Stoker's own options, whose values the job's request looks at. Raises `Refused`."""
        for name, where in _SAID.items():
            if name in self.stoker:
                raise Refused(400, f"stoker.{name}: say it with {where}.", param=f"stoker.{name}", code="invalid_value")
        try:
            return checked_options(self.stoker, TrainOptions, (), as_json)
        except InvalidRequest as error:
            raise Refused(400, f"stoker.{error}", param="stoker", code="unknown_parameter") from None


def _twice(name: str, where: str) -> Refused:
    message = f"stoker.{name}: given with {where}; say one of them."
    return Refused(400, message, param=f"stoker.{name}", code="invalid_value")


def _or(value: V | Literal["auto"], auto: V) -> V:
    return auto if value == "auto" else value
