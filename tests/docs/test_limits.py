"""Each limit that a page names is the one that holds: a number that changes in one place alone is found here."""

from __future__ import annotations

import re

import pytest

from engine.prefixes import folder, memory, saver, shelf
from stoker.broker import keys
from stoker.client import chunks
from stoker.contract import dataset, prefixes
from stoker.gateway import (
    batch_lines,
    batch_run,
    batch_runner,
    batches,
    bodies,
    command,
    events,
    files,
    protocol,
    uploads,
)
from stoker.monitor import app, watch
from stoker.settings import Settings
from tests.docs.pages import ROOT

WORDS = {"two": 2, "three": 3, "four": 4, "ten": 10, "a million": 1_000_000}
HOUR, DAY, MB, GB = 3600, 24 * 3600, 2**20, 2**30
KEPT = Settings()
#: Page, what it says of a limit → the limit.
LIMITS = {
    ("gateway", r"a comment every (\w+) seconds of silence"): events.KEEP_ALIVE,
    ("gateway", r"reads nothing for (\d+) seconds counts as gone"): events.SLOW,
    ("gateway", r"`created_at`\), up to (\d+) MiB"): uploads.MOST_BYTES / MB,
    ("gateway", r"It is kept for (\d+) days"): keys.FILE_TTL / DAY,
    ("gateway", r"room for (\d+) files"): files.MOST_FILES,
    ("gateway", r"files of (\d+) GiB together"): files.MOST_STORED / GB,
    ("gateway", r"of at most (a million) lines"): batch_lines.MOST_LINES,
    ("gateway", r"lines of at most (\d+) MiB"): bodies.MOST_BYTES / MB,
    ("gateway", r"other hours from `1h` to `(\d+)h`"): batches.LONGEST_WINDOW,
    ("gateway", r"A job that failed is asked (\w+) times"): chunks.ATTEMPTS,
    ("gateway", r"Up to (\w+) batches run at a time"): batch_runner.AT_ONCE,
    ("gateway", r"What is done is written every (\w+) seconds"): batch_run.COMMIT_EVERY,
    ("gateway", r"within (\d+) seconds when it is killed"): keys.RUNNER_TTL,
    ("gateway", r"Batches can be asked for (\d+) days"): keys.BATCH_TTL / DAY,
    ("gateway", r"a client has at most (\d+) that have not ended"): batches.MOST_OPEN,
    ("gateway", r"Headers have (\d+) seconds"): protocol.HEADERS_WITHIN,
    ("gateway", r"Headers have \d+ seconds and (\d+) KiB"): command.MOST_HEADERS / 2**10,
    ("gateway", r"taken what waits for it within (\d+) seconds"): protocol.TAKEN_WITHIN,
    ("gateway", r"when its connection is closed has (\d+) seconds"): protocol.FLUSHED_WITHIN,
    ("embed", r"into jobs of `batch` \((\d+)\)"): chunks.BATCH_TEXTS,
    ("embed", r"under way \((\w+) for each worker"): chunks.JOBS_PER_WORKER,
    ("embed", r"one that failed again, (\w+) times in all"): chunks.ATTEMPTS,
    ("embed", r"for (\d+) hours, or for \d+ minutes from the first time"): keys.RESULT_TTL / HOUR,
    ("embed", r"or for (\d+) minutes from the first time"): keys.FETCHED_TTL / 60,
    ("generate", r"for (\d+) hours after the end\. A job that waits"): keys.RESULT_TTL / HOUR,
    ("generate", r"A job that waits for a worker is forgotten after (\d+) days"): keys.PENDING_TTL / DAY,
    ("generate", r"from (\d+) tokens on \(\d+ on a GPU\)"): memory.SHORTEST_ON_CPU,
    ("generate", r"from \d+ tokens on \((\d+) on a GPU\)"): memory.SHORTEST,
    ("generate", r"a beginning of at least (\d+) tokens"): folder.SHORTEST,
    ("generate", r"a prompt of at least \*\*(\d+) tokens\*\* at once"): shelf.LONG,
    ("generate", r"that spares it (\d+) tokens more than memory would"): folder.SHORTEST,
    ("generate", r"`STOKER_PREFIX_DISK` megabytes at most \((\d+)"): KEPT.prefix_disk,
    ("generate", r"there are ([\d,]+) at most"): folder.MOST,
    ("generate", r"half of that, or (\d+) MB"): shelf.LARGEST / MB,
    ("generate", r"is written at most (\d+) times a day"): saver.TIMES_A_DAY,
    ("generate", r"while less than (\d+) MB of the disk are free"): folder.RESERVE / MB,
    ("generate", r"copies up to (\d+) MB between two steps"): shelf.COPIED / MB,
    ("generate", r"A model has at most (\d+) pins"): prefixes.MOST_PREFIXES,
    ("generate", r"each of at most ([\d,]+) characters as JSON"): prefixes.LONGEST_PREFIX,
    ("train", r"At most ([\d,]+) examples"): dataset.MAX_EXAMPLES,
    ("train", r"examples and (\d+) MiB can be uploaded"): dataset.MAX_DATASET_BYTES / MB,
    ("train", r"What an upload that died has left is gone after (\d+) minutes"): keys.UPLOAD_TTL / 60,
    ("train", r"(\d+) days behind the last checkpoint"): keys.PENDING_TTL / DAY,
    ("train", r"(\d+) days for a dead letter, whose retry"): keys.DEAD_TTL / DAY,
    ("cli", r"workers keep (\d+), for \d+ days"): KEPT.keep_runs,
    ("cli", r"workers keep \d+, for (\d+) days"): KEPT.keep_days,
    ("cli", r"days, with (\d+) GB of checkpoints"): KEPT.keep_megabytes / 2**10,
    ("monitor", r"the last ([\d,]+) jobs of it"): app.TASKS,
    ("monitor", r"writes its numbers into the broker every (\w+) seconds"): keys.METRICS_EVERY,
    ("monitor", r"they go (\w+) seconds after its last word"): keys.PRESENCE_TTL,
    ("monitor", r"what the workers wrote, at most every (\w+) seconds"): watch.COUNTED,
}


@pytest.mark.parametrize(("page", "said"), LIMITS)
def test_a_limit_that_a_page_names_is_the_one_that_holds(page: str, said: str) -> None:
    text = " ".join((ROOT / "docs" / f"{page}.md").read_text("utf-8").split())
    (number,) = re.findall(said, text)
    assert (WORDS.get(number) or int(number.replace(",", ""))) == LIMITS[page, said]
