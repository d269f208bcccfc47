"""One rank of training runs: `python -m tests.engine.rank_child HOME CASES`, with MLX's variables for the ring.

CASES: a list of the options of runs and of the turns after which each is paused (0: it ends). The folders of rank 0
are those of `training_child.open_run`; the last line that it prints has the reports of each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from engine.platform import blas

blas.boot(1)

import mlx.core as mx  # noqa: E402

from engine.training.data import tokenize  # noqa: E402
from engine.training.followed import FollowedRun, RunHeader, header_of, send  # noqa: E402
from engine.training.ranks import MlxRanks, text_of_rank_0  # noqa: E402
from engine.training.run import TrainingRun  # noqa: E402
from tests.engine import tiny  # noqa: E402
from tests.engine.training_child import EXAMPLES, tiny_model  # noqa: E402


def header_shared(ranks: MlxRanks, header: RunHeader | None) -> RunHeader:
    """Rank 0's."""
    text = "" if header is None else header.model_dump_json()
    return RunHeader.model_validate_json(text_of_rank_0(ranks, text, 1 << 14))


def agreed(ranks: MlxRanks, witness: str) -> None:
    """Every rank has made the same."""
    letters = mx.array([int(part, 16) % 1000 for part in (witness or "0-0").split("-")], mx.int32)
    assert ranks.sum(letters).tolist() == (letters * ranks.size).tolist()


def lead(ranks: MlxRanks, run: TrainingRun, turns: int) -> list[dict[str, Any]]:
    plan = run.plan("run")
    header_shared(ranks, header_of(plan))
    send(ranks, plan)
    found = [report.model_dump() for report in run.reported]
    while not run.finished and turns:
        # So that the others end where rank 0 does.
        ranks.sum(mx.ones((1,)))
        report = run.advance()
        found += [] if report is None else [report.model_dump()]
        agreed(ranks, run.witness)
        turns -= 1
    if not run.finished:
        run.pause()
    ranks.sum(mx.zeros((1,)))
    return found


def follow(ranks: MlxRanks) -> None:
    run = FollowedRun(tiny_model().decoder, header_shared(ranks, None), ranks)
    while ranks.sum(mx.zeros((1,))).item():
        agreed(ranks, run.advance())


def main(home: Path, cases: list[tuple[str, dict[str, Any], int]]) -> None:
    size = len(json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text()))
    ranks, found = MlxRanks(int(os.environ["MLX_RANK"]), size), []
    ranks.meet("ring")
    for name, options, turns in cases:
        if ranks.rank:
            follow(ranks)
            continue
        model = tiny_model()
        examples = tokenize(EXAMPLES, model.tokenizer, 64)
        run = TrainingRun(model, tiny.asking(**options), examples, home / name, ranks=ranks)
        found.append(lead(ranks, run, turns or 10_000))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
