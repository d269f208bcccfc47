"""Drafts by prompt lookup: code editing, extraction and free text on SmolLM2's real weights, with drafts and without.

Both sides are lanes over the same model and answer the same prompts by turns, one answer (or one batch of eight) each;
a sample is the ratio of one such pair, of the wall clock and of the process' own CPU time, decoding alone. Their tokens
are compared. `--tokens N` makes longer or shorter answers. `--model SOURCE --draft SOURCE`: the same with a draft model
in addition to what is looked up, which is measured where there are two models of one vocabulary.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.report import Record, Row, by_turns, parser, row
from stoker.catalogue import CATALOGUE
from stoker.settings import load_settings
from workers.machine import boot_blas

boot_blas(load_settings())

from engine.adapters.pool import AdapterPool  # noqa: E402
from engine.adapters.store import AdapterStore  # noqa: E402
from engine.checkpoints.drafts import DraftSource, with_draft  # noqa: E402
from engine.checkpoints.loading import LoadedModel, load  # noqa: E402
from engine.generation.lane import GenerateLane  # noqa: E402
from engine.ticket import Ticket  # noqa: E402
from stoker.contract import ChatMessage, GenerateRequest, GenerateResult  # noqa: E402

MODEL = "smollm2-135m-instruct"
STREAMS, TIMES, TOKENS, QUICK_TOKENS = 8, 3, 64, 24

FUNCTIONS = (
    '''def total(items):
    """Add up the prices of the items."""
    result = 0
    for item in items:
        if item.price is None:
            continue
        result += item.price * item.count
    return result
''',
    """def read_lines(path, limit):
    lines = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            lines.append(line.rstrip())
            if len(lines) >= limit:
                break
    return lines
""",
    """class Queue:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("the queue is empty")
        return self.items.pop(0)
""",
    """def words(text):
    counts = {}
    for word in text.lower().split():
        word = word.strip(".,;:!?")
        if word:
            counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda pair: -pair[1])
""",
)
CHANGES = ("Add a comment above each line of this code", "Repeat this code with a better name for the first variable")
TEXTS = (
    """The mine at Harrow Hill opened again on Monday after eleven years. Two hundred people work there in three
shifts. The owner, Northern Coal, says that the seam will last for at least fifteen years. The town's mayor,
Anna Whitfield, called it the best news of the decade. Environmental groups have announced a protest for
Saturday.""",
    """Order 4711 was placed on March 3 by Maria Lopez of 12 Garden Street, Bristol. It holds two lamps at 39.90 each
and one oak table at 420.00. The table will be delivered on March 17 between 9 and 12 o'clock, the lamps were
sent by mail on March 4. Payment was made by credit card.""",
    """The river Elve rises in the hills above Tarn and flows for ninety miles to the sea at Port Mallory. Three dams
were built on it between 1921 and 1954. Salmon came back in 2009, after the lowest dam was given a ladder for
fish. In dry summers the upper valley has no water for weeks, and farmers share what the middle dam lets
through.""",
    """The committee met on Tuesday to discuss the new library. Mr. Osei presented two plans: one keeps the old hall
and adds a wing with a reading room, the other replaces the building. The first costs four million and takes
two years, the second seven million and three years. The committee asked for a report on the roof before it
decides.""",
)
ASKED = ("Summarize this text in two sentences", "List the facts of this text in its own words")
FREE = (
    "Write a story about a lighthouse keeper.", "Why is the sky blue?", "Write a poem about winter in the city.",
    "How do I learn to play the piano?", "Describe a market in the morning.", "What is a good name for a small cafe?",
    "Explain why leaves change their colour.", "Write a letter to a friend who has moved away.",
)  # fmt: skip
TASKS: dict[str, Sequence[str]] = {
    "code editing": [f"{change}:\n\n```python\n{code}```" for code in FUNCTIONS for change in CHANGES],
    "summaries, extraction": [f"{asked}:\n\n{text}" for text in TEXTS for asked in ASKED],
    "free text": FREE,
}


@dataclass(frozen=True)
class Run:
    """What one side took for some prompts at once, from the moment that all had their first tokens: seconds."""

    wall: float
    cpu: float
    answers: list[tuple[int, ...]]
    drafted: int
    accepted: int


def run(lane: GenerateLane, prompts: Sequence[str], tokens: int, *, lookup: bool) -> Run:
    before = lane.load
    tickets: list[Ticket[GenerateResult]] = []
    for prompt in prompts:
        said = (ChatMessage(role="user", content=prompt),)
        request = GenerateRequest(model=MODEL, messages=said, max_tokens=tokens, lookup=lookup)
        tickets.append(Ticket(f"bench-{len(tickets)}", "generate"))
        lane.admit(lane.prepare(tickets[-1], request, None))
    results: dict[str, GenerateResult] = {}
    while lane.prefilling or lane.waiting:
        lane.run(lookahead=False)
    wall, cpu = time.perf_counter(), time.process_time()
    while lane.busy:
        results |= {ticket.job_id: result for ticket, result in lane.run().ended}
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after, answers = lane.load, [results[ticket.job_id].token_ids for ticket in tickets]
    return Run(wall, cpu, answers, after.drafted - before.drafted, after.accepted - before.accepted)


def rows_of(model: LoadedModel, pool: AdapterPool, task: str, streams: int, tokens: int, times: int) -> list[Row]:
    """One stream answers `times` of the prompts; more of them answer all, `times` times."""
    lanes = {lookup: GenerateLane(model, pool) for lookup in (False, True)}
    for lane in lanes.values():
        # Else the first rows are far ahead, without drafts, when the last has its first token.
        lane.step.mixes = False
    prompts = TASKS[task]
    groups = [prompts] * times if streams > 1 else [[prompt] for prompt in prompts[:times]]
    turn = {lookup: iter(groups) for lookup in lanes}

    def answer(lookup: bool) -> Run:
        return run(lanes[lookup], next(turn[lookup]), tokens, lookup=lookup)

    found = by_turns({str(lookup): partial(answer, lookup) for lookup in lanes}, len(groups), warm=0)
    pairs = list(zip(found["False"], found["True"], strict=True))
    made = sum(len(one) for _, with_ in pairs for one in with_.answers)
    drafted, accepted = (sum(getattr(with_, side) for _, with_ in pairs) for side in ("drafted", "accepted"))
    differ = sum(one != two for plain, with_ in pairs for one, two in zip(plain.answers, with_.answers, strict=True))
    name = f"{task}, {streams} stream{'s' if streams > 1 else ''}"
    return [
        row(f"{name}: without drafts / with, wall clock", "times", [plain.wall / with_.wall for plain, with_ in pairs]),
        row(f"{name}: without drafts / with, CPU time", "times", [plain.cpu / with_.cpu for plain, with_ in pairs]),
        row(f"{name}: drafts that were right, of all tokens", "", [accepted / made]),
        row(f"{name}: drafts that were right, of all drafts", "", [accepted / max(1, drafted)]),
        row(f"{name}: answers that differ", "", [differ]),
    ]


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, help=f"of an answer, at most ({TOKENS}; {QUICK_TOKENS} in the quick form)")
    made.add_argument("--model", help=f"where the model is ({MODEL})")
    made.add_argument("--draft", help="where one is that drafts for it")
    options = made.parse_args()
    tokens = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    model = load(MODEL, [options.model] if options.model else CATALOGUE[MODEL])
    if options.draft:
        model = with_draft(model, DraftSource("draft", [options.draft]))
    record = Record("draft-model" if options.draft else "lookup", options.out, tokens=tokens)
    with tempfile.TemporaryDirectory() as home:
        pool = AdapterPool(model, AdapterStore(Path(home)))
        for streams, times in ((1, 2),) if options.quick else ((1, len(FREE)), (STREAMS, TIMES)):
            for task in TASKS:
                record.part(f"{task}, {streams}", partial(rows_of, model, pool, task, streams, tokens, times))
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
