"""The input of a job that travels apart from its request: a dataset, or an adapter's files.

Its name says whose it is, how long it is, and its digest. A large one is sent in parts; every sending has a random name
of its own, so what a sending that died left behind is never taken for a part of another, and a reader knows whether it
has the whole."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Literal

from stoker.contract.names import Rule, checked
from stoker.errors import InvalidRequest, JobLost

Kind = Literal["dataset", "adapter"]


@dataclass(frozen=True)
class Upload:
    """`str()` of it is its name, which a request carries and the broker keeps it under (`keys.blob`)."""

    kind: Kind
    job_id: str
    #: Which sending it is.
    sending: str
    size: int
    sha256: str

    @classmethod
    def of(cls, kind: Kind, job_id: str, data: bytes) -> Upload:
        return cls(kind, job_id, secrets.token_hex(8), len(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def parse(cls, name: str, kind: Kind, job_id: str) -> Upload:
        """The upload of that name, which has to be of this kind and of this job. Raises `InvalidRequest`."""
        checked(Rule.JOB_ID, "job id", job_id)
        found = re.fullmatch(rf"{kind}:{re.escape(job_id)}:([0-9a-f]{{16}}):([0-9]{{1,12}}):([0-9a-f]{{64}})", name)
        if found is None:
            raise InvalidRequest(
                f"{kind}: {name[:300]!r} given; allowed: an upload of this very job, "
                f"{kind}:{job_id}:SENDING:SIZE:SHA256. Send the job again with a client of this release."
            )
        return cls(kind, job_id, found[1], int(found[2]), found[3])

    def __str__(self) -> str:
        return f"{self.kind}:{self.job_id}:{self.sending}:{self.size}:{self.sha256}"


class UploadCheck:
    """Takes the parts of an upload as they are read, and says in the end whether they are the whole."""

    def __init__(self, upload: Upload) -> None:
        self._upload, self._size, self._digest = upload, 0, hashlib.sha256()

    def add(self, part: bytes) -> bytes:
        self._size += len(part)
        self._digest.update(part)
        return part

    def end(self) -> None:
        """Raises `JobLost` for bytes that are not those that were sent."""
        wanted = self._upload
        if self._size != wanted.size:
            raise JobLost(
                f"job {wanted.job_id}: its {wanted.kind} is not whole on the broker: {self._size} bytes, and "
                f"{wanted.size} were sent. Send the job again, under another id."
            )
        if self._digest.hexdigest() != wanted.sha256:
            raise JobLost(
                f"job {wanted.job_id}: its {wanted.kind} on the broker is not what was sent: the digest differs. "
                "Send the job again, under another id."
            )
