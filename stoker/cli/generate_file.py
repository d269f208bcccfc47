"""`stoker generate FILE -o OUT`: the requests of a file, each with one line of its answer or its error."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from stoker.cli import inputs
from stoker.cli.options import notes
from stoker.cli.progress import progress
from stoker.client import Client
from stoker.client.asked import Ask, refusal_of_line
from stoker.client.options import GenerateManyOptions
from stoker.contract.kinds import GENERATE
from stoker.errors import InvalidRequest
from stoker.files.line_output import SUFFIXES, LineOutput
from stoker.files.output import check_apart, check_path, opened
from stoker.files.requests import RequestFile, RequestLine


@dataclass(frozen=True)
class FileRun:
    """What the command line says for all requests of a file. `chat`: each prompt is a message."""

    output: Path
    model: str | None
    seed: int | None
    chat: bool
    in_flight: int | None
    overwrite: bool
    options: GenerateManyOptions

    def answer(self, client: Client, given: str) -> dict[str, Any]:
        """Answer the requests of the file `given`, and say what came of it. A run that was interrupted goes on."""
        check_path(self.output, SUFFIXES, self.overwrite)
        with inputs.as_file(given) as path:
            check_apart(self.output, path)
            return self._answer(client, RequestFile(path))

    def _answer(self, client: Client, source: RequestFile) -> dict[str, Any]:
        rows, digest = source.survey()
        again = source.again(rows, digest)
        model = client.choose_model(self.model, GENERATE.name)
        output, sent = LineOutput(self.output, rows, self._job(rows, digest, model)), deque[RequestLine]()
        # Before the file is opened: options that are wrong leave nothing behind.
        answers = client.generate_many(
            self._asks(source.requests(again.lines()), output, sent),
            model=model,
            seed=self.seed,
            in_flight=self.in_flight,
            **self.options,
        )
        began = time.monotonic()
        with closing(answers), opened(output, self.overwrite):
            before = output.done
            if before:
                notes().print(f"[dim]going on behind {before} of {rows} requests[/dim]")
            with progress(output, rows, "answers") as report:
                for answer in answers:
                    output.write(sent.popleft().answered(answer))
                    report()
            again.check(output)
            output.finish()
        seconds = round(time.monotonic() - began, 3)
        record = {"output": str(self.output), "rows": rows, "resumed": before, "errors": output.errors}
        return record | {"seconds": seconds}

    def _job(self, rows: int, digest: str, model: str) -> dict[str, Any]:
        """What a run has in common with those that may go on with its file. Another priority gives the same answers."""
        options = {name: value for name, value in self.options.items() if name != "priority"}
        return {"rows": rows, "input": digest, "model": model, "seed": self.seed, "chat": self.chat, **options}

    def _asks(self, requests: Iterator[RequestLine], output: LineOutput, sent: deque[RequestLine]) -> Iterator[Ask]:
        """What each line asks that has no answer in `output`; `sent` has those whose answers are still to come."""
        for request in islice(requests, output.done, None):
            sent.append(request)
            yield self._ask(request.fields)

    def _ask(self, fields: dict[str, Any] | InvalidRequest) -> Ask:
        if isinstance(fields, InvalidRequest):
            return fields
        if self.chat and "messages" not in fields and isinstance(prompt := fields.get("prompt"), str):
            rest = {name: value for name, value in fields.items() if name != "prompt"}
            fields = {**rest, "messages": [{"role": "user", "content": prompt}]}
        # `generate_many` would say the same of it, as Python spells values.
        return refusal_of_line(fields, self.options) or cast(Ask, fields)
