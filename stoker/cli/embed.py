"""`stoker embed`: some texts from the command line, or a file of any length into a file of vectors."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from stoker.cli import inputs
from stoker.cli.options import Json, Model, Url, connect, notes, print_json
from stoker.cli.progress import Growing, progress
from stoker.client import Client
from stoker.client.chunks import BATCH_TEXTS
from stoker.client.options import EmbedOptions
from stoker.client.requests import embed_request
from stoker.contract.kinds import EMBED
from stoker.contract.requests import MAX_TEXTS
from stoker.errors import InvalidRequest
from stoker.files.source import Again, Source


def embed(
    texts: Annotated[
        list[str],
        typer.Argument(help="Texts, - for standard input; with --output, one file: .jsonl, or .txt a text a line."),
    ],
    model: Model = None,
    truncate: Annotated[bool, typer.Option(help="Cut texts that are longer than the model takes.")] = False,
    prompt: Annotated[str | None, typer.Option(help="Put before each text: query, passage, or any text.")] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Scale vectors to unit length; default: as the model's files say.")
    ] = None,
    dimensions: Annotated[int | None, typer.Option(help="Keep the first numbers of each vector.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or int8.")] = "float32",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the vectors: .npy, .safetensors or .parquet.")
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Field of each JSON line that holds the text; default: text.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Texts of a job.")] = BATCH_TEXTS,
    in_flight: Annotated[int | None, typer.Option(help="Jobs at once; default: four for each worker.")] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace the output; where there is none yet, begin an interrupted run anew.")
    ] = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Turn texts into vectors. An interrupted run of a file continues when the command is given again."""
    if output is None:
        inputs.refuse_without_output(in_flight=in_flight, overwrite=overwrite, batch=batch != BATCH_TEXTS)
        if field is not None and inputs.STDIN not in texts:
            raise InvalidRequest("--field: given without a file of JSON lines; leave it out.")
    # A wrong `dtype` is the request's to refuse.
    options: EmbedOptions = {
        "truncation": "end" if truncate else "error",
        "prompt": prompt,
        "normalize": normalize,
        "dimensions": dimensions,
        "dtype": dtype,  # type: ignore[typeddict-item]
    }
    from stoker.files.output import check_apart
    from stoker.files.vector_output import check_output

    with connect(url) as client:
        if output is None:
            inputs.refuse_names(texts, inputs.OF_TEXTS, "name a file for its vectors with --output.")
            _print_vectors(client, _texts(texts, field), model, options, as_json)
            return
        if len(texts) != 1:
            raise InvalidRequest(f"{len(texts)} texts given; with --output just one argument is allowed, a file.")
        check_output(output, dtype, overwrite)
        with inputs.as_file(texts[0]) as path:
            check_apart(output, path)
            source = source_of(texts[0], path, field)
            record = _embed_file(client, source, output, model, options, batch, in_flight, overwrite)
    if as_json:
        print_json(record)
    else:
        print(f"{output}: {record['rows']} vectors of {record['dim']} numbers, {record['dtype']}")


def source_of(given: str, path: Path, field: str | None) -> Source:
    """Input without a name is a text a line, or JSON lines if `field` names one of theirs."""
    plain = inputs.is_unnamed(given) and field is None
    if plain:
        _refuse_objects(Source(path, "", plain=True))
    if field is not None and path.suffix == ".txt":
        raise InvalidRequest(f"--field: {field!r} given with {path.name}, whose lines are the texts; leave it out.")
    return Source(path, field or "text", plain)


def _refuse_objects(source: Source) -> None:
    """Raise `InvalidRequest` for JSON lines that are taken for texts: they would be embedded, braces and all."""
    first = next(source.texts(), "")
    try:
        is_object = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return
    if is_object:
        raise InvalidRequest(f"{source.path.name}: JSON lines given; name the field that holds the text: --field.")


def _texts(given: list[str], field: str | None) -> list[str]:
    """The texts of the command line, in the place of `-` those of standard input."""
    if inputs.STDIN not in given:
        return given
    if given.count(inputs.STDIN) > 1:
        raise InvalidRequest("texts: '-' given twice; standard input can be read once.")
    index = given.index(inputs.STDIN)
    with inputs.as_file(inputs.STDIN) as path:
        source = source_of(inputs.STDIN, path, field)
        source.survey()
        # No job takes more, and `client.embed` says so.
        return [*given[:index], *islice(source.texts(), MAX_TEXTS + 1), *given[index + 1 :]]


def _print_vectors(client: Client, texts: list[str], model: str | None, options: EmbedOptions, as_json: bool) -> None:
    vectors = client.embed(texts, model=model, **options).result()
    if as_json:
        print_json([[float(value) for value in vector] for vector in vectors])
        return
    for text, vector in zip(texts, vectors, strict=True):
        shown = ", ".join(f"{value:+.4f}" for value in vector[:4])
        print(f"[{shown}, … {len(vector)} in all]  {text}")


def _embed_file(
    client: Client,
    source: Source,
    path: Path,
    model: str | None,
    options: EmbedOptions,
    batch: int,
    in_flight: int | None,
    overwrite: bool,
) -> dict[str, Any]:
    from stoker.files.output import opened
    from stoker.files.vector_output import VectorOutput

    rows, digest = source.survey()
    again = source.again(rows, digest)
    model = client.choose_model(model, EMBED.name)
    job = {"rows": rows, "input": digest, "model": model, **options}
    output = VectorOutput(path, rows, job)
    # Before the file is opened: options that are wrong leave nothing behind.
    embed_request(model, ["any"], options)
    left = _left(source, again, output)
    chunks = client.embed_chunks(left, model=model, batch=batch, in_flight=in_flight, **options)
    began = time.monotonic()
    with closing(chunks), opened(output, overwrite):
        before = output.done
        if before:
            notes().print(f"[dim]going on behind {before} of {rows} texts[/dim]")
        with progress(output, rows, "texts") as report:
            for vectors in chunks:
                output.write(vectors)
                report()
        again.check(output)
        output.finish()
    seconds = time.monotonic() - began
    return {"output": str(path), "rows": rows, "resumed": before, "dim": output.dim, "dtype": options["dtype"]} | {
        "seconds": round(seconds, 3)
    }


def _left(source: Source, again: Again, output: Growing) -> Iterator[str]:
    """The texts of which `output` has no vector when they are first asked for."""
    yield from islice(source.texts(again.lines()), output.done, None)
