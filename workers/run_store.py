"""The checkpoints of a training run where every worker finds them.

The manifest, by which a run is resumed, lies in the broker and is written by the job's owner alone, in one step: before
it, the former one is whole, and behind it, the new one is. Parts that no manifest needs are swept with the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from engine.training import carried
from engine.training.carried import OpenFile, Snapshot
from stoker.broker import keys
from stoker.contract.names import Rule, checked
from workers.artifacts import RUNS, Artifacts
from workers.job_lease import JobLease
from workers.run_manifest import Manifest, StoredFile, content_name, content_of, size_of
from workers.run_parts import BrokerParts, FolderParts, NoRoom, Parts
from workers.services.runtime import Fenced


class Damaged(Exception):
    """What the store has of a run is not what was put there."""


class RunStore:
    def __init__(self, lease: JobLease) -> None:
        runtime, job_id = lease.runtime, checked(Rule.JOB_ID, "job id", lease.job_id)
        folder = Artifacts(runtime.settings, runtime.redis).folder(f"{RUNS}/{job_id}")
        self._lease, self._redis = lease, runtime.redis
        self._most = runtime.settings.checkpoint_megabytes * 2**20
        self._parts: Parts = BrokerParts(lease) if folder is None else FolderParts(folder, lease.token)

    def manifest(self) -> Manifest | None:
        return Manifest.parse(self._raw(), self._lease.job_id)

    def _raw(self) -> bytes | None:
        raw: bytes | None = self._redis.hget(keys.checkpoint(self._lease.job_id), "manifest")
        return raw

    def put(self, snapshot: Snapshot, go_on: Callable[[], object] = lambda: None) -> None:
        """Keep a run as it is in `snapshot`, whole or not at all. `go_on` is called before each part, and breaks it off
        by what it raises. Raises `Fenced`, `NoRoom` and `StoreTrouble`."""
        try:
            self._put(snapshot, go_on)
        except Fenced:
            self._parts.fenced()
            raise

    def _put(self, snapshot: Snapshot, go_on: Callable[[], object]) -> None:
        raw = self._raw() or b""
        before = Manifest.parse(raw, self._lease.job_id)
        committed = before.parts if before else []
        wanted = [[content for content, _ in self._pieces(file, go_on)] for file in snapshot.files]
        needed = {content for contents in wanted for content in contents} | set(map(content_of, committed))
        self._check_size(needed)
        there = self._parts.there(committed)
        if there.keys() - needed:
            # Of an upload that was cut: what it left must not stand in the way of this one.
            self._lease.keep_manifest(raw.decode(), self._parts.in_broker(committed))
            there = self._parts.there(committed)
        files = [StoredFile(name=file.name, parts=tuple(self._sent(file, there, go_on))) for file in snapshot.files]
        now = _manifest(snapshot, files)
        go_on()
        if not self._lease.keep_manifest(now.model_dump_json(), self._parts.in_broker(now.parts)):
            raise Damaged("parts are gone that were put there")
        self._parts.committed(committed, now.parts)

    def _pieces(self, file: OpenFile, go_on: Callable[[], object]) -> Iterator[tuple[str, bytes]]:
        for start in range(0, file.size, self._parts.size):
            go_on()
            data = file.read(start, self._parts.size)
            yield content_name(data), data

    def _sent(self, file: OpenFile, there: dict[str, str], go_on: Callable[[], object]) -> Iterator[str]:
        for content, data in self._pieces(file, go_on):
            if content not in there:
                there[content] = self._parts.put(content, data)
            yield there[content]

    def _check_size(self, contents: set[str]) -> None:
        bytes_of_all = sum(map(size_of, contents))
        if bytes_of_all > self._most:
            raise NoRoom(
                f"its checkpoints, the former and the new, take {bytes_of_all} bytes, and {self._most} are allowed "
                "(STOKER_CHECKPOINT_MEGABYTES)"
            )

    def install(self, manifest: Manifest, run: Path) -> None:
        """Write the checkpoints of the manifest into a run's folder. Raises `Damaged` and `StoreTrouble`."""
        parts = {file.name: file.parts for file in manifest.files}

        def fetch(name: str, draft: Path) -> None:
            with draft.open("wb") as out:
                for part in parts[name]:
                    out.write(self.fetched(part))

        carried.install(run, list(parts), fetch)

    def fetched(self, part: str) -> bytes:
        """A part as it was put there. Raises `Damaged`."""
        data = self._parts.get(part)
        if data is None or content_name(data) != content_of(part):
            raise Damaged(f"the part {part} is {'gone' if data is None else 'damaged'}")
        return data

    def clear(self) -> None:
        """The run has ended. What lies in the broker went with the job."""
        self._parts.clear()


def _manifest(snapshot: Snapshot, files: list[StoredFile]) -> Manifest:
    notes = snapshot.notes
    made_of, position = dict(notes.made_of), notes.position
    return Manifest(reports=position.reports, micro=position.micro, made_of=made_of, files=tuple(files))
