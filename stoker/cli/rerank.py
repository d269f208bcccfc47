"""`stoker rerank`: texts from the command line or a file, by how well they answer a query."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from stoker.cli import inputs
from stoker.cli.embed import source_of
from stoker.cli.options import Json, Model, Url, connect, print_json
from stoker.client import Client, RerankJob
from stoker.client.chunks import BATCH_TEXTS, JOBS_PER_WORKER, Chunk, Cutter, named
from stoker.client.options import RerankOptions
from stoker.contract.requests import RERANK
from stoker.errors import InvalidRequest

#: (score, index, text) of one text.
Scored = tuple[float, int, str]
#: Characters of a text that are shown.
SHOWN = 100


def rerank(
    query: Annotated[str, typer.Argument(help="What the texts are to answer.")],
    texts: Annotated[
        list[str],
        typer.Argument(help="Texts; or one file: .jsonl, or .txt a text a line; - for standard input."),
    ],
    model: Model = None,
    top: Annotated[int, typer.Option(min=1, help="How many to show, best first.")] = 10,
    truncate: Annotated[bool, typer.Option(help="Cut texts that are longer than the model takes.")] = False,
    prompt: Annotated[str | None, typer.Option(help="An instruction, for a model that takes one.")] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Scores from 0 to 1, or as the model makes them; default: as its files say.")
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Field of each JSON line that holds the text; default: text.")
    ] = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Score texts by how well they answer a query, and show the best of them first."""
    options: RerankOptions = {
        "truncation": "end" if truncate else "error",
        "prompt": prompt,
        "normalize": normalize,
    }
    with _given(texts, field) as given, connect(url) as client:
        model = client.choose_model(model, RERANK)
        best = heapq.nlargest(top, _scored(client, query, given, model, options), key=lambda one: (one[0], -one[1]))
    if as_json:
        print_json([{"index": index, "score": score, "text": text} for score, index, text in best])
        return
    for score, index, text in best:
        shown = " ".join(text.split())
        print(f"{score:8.4f}  {index:5}  {shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + '…'}")


@contextmanager
def _given(texts: list[str], field: str | None) -> Iterator[Iterator[str]]:
    """Those of the command line, or of the file that it names, every line of which has been checked."""
    if texts.count(inputs.STDIN) and len(texts) > 1:
        raise InvalidRequest("texts: '-' given with others; standard input is all of the texts.")
    if len(texts) > 1 or not _is_file(texts[0]):
        inputs.refuse_names(texts, inputs.OF_TEXTS, "it is read where it is given alone, without other texts.")
        if field is not None:
            raise InvalidRequest("field: given without a file of JSON lines; leave it out.")
        yield iter(texts)
        return
    with inputs.as_file(texts[0]) as path:
        source = source_of(texts[0], path, field)
        source.survey()
        yield source.texts()


def _is_file(given: str) -> bool:
    if inputs.is_unnamed(given):
        return True
    return given.endswith(inputs.OF_TEXTS) and (inputs.is_file(given) or inputs.is_pipe(given))


def _scored(client: Client, query: str, texts: Iterator[str], model: str, options: RerankOptions) -> Iterator[Scored]:
    """Some jobs at once; when one fails, or nobody wants more, the others are cancelled."""
    sent: deque[tuple[Chunk, RerankJob]] = deque()
    try:
        for chunk in _chunks(texts):
            with _naming(chunk):
                sent.append((chunk, client.rerank(query, chunk.texts, model=model, **options)))
            if len(sent) >= JOBS_PER_WORKER:
                yield from _ended(*sent[0])
                sent.popleft()
        while sent:
            yield from _ended(*sent[0])
            sent.popleft()
    finally:
        for _, job in sent:
            job.cancel()


def _chunks(texts: Iterator[str]) -> Iterator[Chunk]:
    cutter = Cutter(BATCH_TEXTS)
    for text in texts:
        yield from cutter.add(text)
    yield from cutter.rest()


def _ended(chunk: Chunk, job: RerankJob) -> Iterator[Scored]:
    with _naming(chunk):
        scores = job.result().scores
    for row, (score, text) in enumerate(zip(scores, chunk.texts, strict=True)):
        yield score, chunk.start + row, text


@contextmanager
def _naming(chunk: Chunk) -> Iterator[None]:
    """An error names its text by the index among all."""
    try:
        yield
    except InvalidRequest as error:
        raise named(error, chunk) from None
