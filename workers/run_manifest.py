"""What a store has of one training run: which files its newest checkpoints consist of, and of which parts each file."""

from __future__ import annotations

import logging
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from engine.training.carried import FILE, Position
from stoker.contract.base import Message

log = logging.getLogger(__name__)

#: `<sha256>-<bytes>`, and behind that, in a store that is no broker, who wrote it.
_PART = r"[0-9a-f]{64}-[0-9]{1,10}"
PartName = Annotated[str, StringConstraints(pattern=rf"^{_PART}(-[0-9a-f]{{8}})?$")]


def content_name(data: bytes) -> str:
    """How a part with this content is called."""
    return f"{sha256(data).hexdigest()}-{len(data)}"


def content_of(part: str) -> str:
    """The same, from a part's whole name."""
    return "-".join(part.split("-")[:2])


def size_of(part: str) -> int:
    return int(part.split("-")[1])


class StoredFile(Message):
    name: Annotated[str, StringConstraints(pattern=rf"^({FILE.pattern})$")]
    parts: tuple[PartName, ...]


class Manifest(Message):
    """`files`: in the order in which they have to be written."""

    form: Literal[1] = 1
    reports: int = Field(ge=0)
    micro: int = Field(ge=0)
    #: What the run is made of: model, base, dataset and request.
    made_of: dict[str, Any]
    files: tuple[StoredFile, ...]

    @property
    def position(self) -> Position:
        return Position(self.reports, self.micro)

    @property
    def parts(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(part for file in self.files for part in file.parts))

    @classmethod
    def parse(cls, raw: bytes | None, job_id: str) -> Manifest | None:
        """None where there is none, and for what this release did not write."""
        if not raw:
            return None
        try:
            return cls.model_validate_json(raw)
        except ValidationError:
            log.warning("job %s: the manifest of its checkpoints is of another form: it is left out", job_id)
            return None
