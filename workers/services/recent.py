"""The entries that the broker took last of each stream, for a broker that loses some of them again.

A replica that becomes the primary has what was replicated until then, which may be less than what the old one had
taken. What comes behind would leave a gap in the stream for ever.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.ticket import Entry

#: Entries that are kept of one stream: seconds of a fast one.
ENTRIES = 256
#: Streams of which some are kept at most. Those that stand still go first.
STREAMS = 512


class Recent:
    """For one thread; any other may ask whether something of a job is kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, deque[Entry]] = OrderedDict()

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._kept

    def forget(self, job_id: str) -> None:
        """The job publishes nothing more: 256 tokens with their alternatives take megabytes."""
        self._kept.pop(job_id, None)

    def took(self, entries: list[Entry]) -> None:
        """The broker has these now."""
        for pair in entries:
            job_id = pair[0]
            if not self.follows(pair):
                # The job begins here, or again.
                self._kept[job_id] = deque(maxlen=ENTRIES)
            self._kept[job_id].append(pair)
            self._kept.move_to_end(job_id)
        while len(self._kept) > STREAMS:
            self._kept.popitem(last=False)

    def follows(self, pair: Entry) -> bool:
        """Whether the entry comes right behind the last one that was taken."""
        job_id, entry = pair
        kept = self._kept.get(job_id)
        return kept is not None and kept[-1][1].index + 1 == entry.index

    def since(self, job_id: str, index: int) -> list[Entry]:
        """What is kept of the job's, from this index on."""
        return [pair for pair in self._kept.get(job_id, ()) if pair[1].index >= index]
