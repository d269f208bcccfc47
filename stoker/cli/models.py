"""Commands about models: list, pull, inspect, quantize, verify; and load, unload, pin, unpin at a running worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

import typer

from stoker.catalogue import CATALOGUE, parse_model
from stoker.cli.engine_tool import Inspected, ask_engine
from stoker.cli.options import Json, Url, connect, print_json
from stoker.contract.control import ModelReport

Source = Annotated[
    str, typer.Argument(help="A name of the catalogue, a folder or .gguf file, package:NAME/PATH, or hf:org/name.")
]


def list_models(as_json: Json = False) -> None:
    """List the catalogue: short names, and where each model is looked for."""
    if as_json:
        print_json({name: list(sources) for name, sources in CATALOGUE.items()})
        return
    for name, sources in CATALOGUE.items():
        print(f"{name}\n  " + "\n  ".join(sources))


def pull(source: Source, as_json: Json = False) -> None:
    """Download a model into the hub's cache, if it is not there, and print its path."""
    found = ask_engine("pull", sources=parse_model(source)[1])
    print_json(found) if as_json else print(found["path"])


def inspect(source: Source, as_json: Json = False) -> None:
    """Show what a model is and the memory it needs, from its headers: nothing is loaded or downloaded."""
    found = ask_engine("inspect", sources=parse_model(source)[1])
    print_json(found) if as_json else print("\n".join(_describe(found)))


def verify(source: Source, as_json: Json = False) -> None:
    """Check a model's files throughout: headers, names, shapes, tokenizer, and that every weight is a number."""
    found = ask_engine("verify", sources=parse_model(source)[1])
    if as_json:
        print_json(found)
    else:
        print(f"ok  {found['path']}: {found['tensors']} tensors, {found['numbers']:,} numbers")


def quantize(
    source: Source,
    target: Annotated[str, typer.Argument(help="Folder to write; it must not exist.")],
    bits: Annotated[int | None, typer.Option(help="Bits of a weight: 2, 3, 4, 5, 6 or 8; 4 if not given.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128; 64 if not given.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="affine, or one that has its own bits and groups: mxfp4, mxfp8, nvfp4.")
    ] = "affine",
    recipe: Annotated[
        str | None,
        typer.Option(help="Bits by layer, as in mlx-lm: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a quantized copy of a safetensors model, in the layout that mlx-lm reads too."""
    found = ask_engine(
        "quantize", sources=parse_model(source)[1], target=target, bits=bits, group_size=group_size, mode=mode,
        recipe=recipe,
    )  # fmt: skip
    if as_json:
        print_json(found)
    else:
        print(
            f"{found['path']}: {found['quantized']} matrices of {found['form']}, {found['dense']} tensors as they "
            f"were, {_size(found['bytes_before'])} → {_size(found['bytes_after'])}"
        )


Held = Annotated[str, typer.Argument(help="NAME.", metavar="NAME")]
Worker = Annotated[str | None, typer.Option(help="Worker, as `stoker status` names it; default: the only one.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds to wait; default: for as long as the worker lives.")]


def load(
    model: Annotated[
        str, typer.Argument(help="A name, a path on the worker's machine, hf:org/name, or NAME=SOURCE.", metavar="NAME")
    ],
    worker: Worker = None,
    timeout: Timeout = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Make a model warm at a worker that runs. The model that was used longest ago makes way if it has to."""
    with connect(url) as client:
        _said(client.models.load(model, worker=worker, timeout=timeout), "warm", as_json)


def unload(model: Held, worker: Worker = None, timeout: Timeout = None, as_json: Json = False, url: Url = None) -> None:
    """Free all that a model takes at a worker. It must not be pinned, and no job of it may run there."""
    with connect(url) as client:
        _said(client.models.unload(model, worker=worker, timeout=timeout), "unloaded", as_json)


def pin(model: Held, worker: Worker = None, timeout: Timeout = None, as_json: Json = False, url: Url = None) -> None:
    """Let a model neither make way for another nor be unloaded."""
    with connect(url) as client:
        _said(client.models.pin(model, worker=worker, timeout=timeout), "pinned", as_json)


def unpin(model: Held, worker: Worker = None, timeout: Timeout = None, as_json: Json = False, url: Url = None) -> None:
    """Let a model make way again."""
    with connect(url) as client:
        _said(client.models.unpin(model, worker=worker, timeout=timeout), "not pinned", as_json)


def _said(report: ModelReport, done: str, as_json: bool) -> None:
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    if report.was_warm:
        print(
            f"{report.model.partition('=')[0]}: warm already at {report.worker}, as its files were when it was loaded. "
            "To have them read anew, unload it first"
        )
        return
    way = f"; made way: {', '.join(report.made_way)}" if report.made_way else ""
    print(
        f"{report.model.partition('=')[0]}: {done} at {report.worker} after {report.seconds:.1f} s, which has "
        f"{_size(report.memory_bytes)} in memory now{way}"
    )


def _describe(found: Inspected) -> Iterator[str]:
    yield str(found["path"])
    embeds = "reranks" if found.get("reranks") else "makes embeddings"
    use = {"generate": "generates and trains", "embed": embeds}.get(found["kind"], "not supported")
    yield _row("architecture", f"{found['architecture']} ({use})")
    yield _row("format", f"{found['format']}, {_size(found['file_bytes'])}")
    yield _row("parameters", f"{found['parameters'] / 1e6:,.1f} M in {found['tensors']} tensors")
    parts = sorted(found["dtypes"].items(), key=lambda item: -item[1])
    yield _row("dtypes", ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in parts))
    yield _row("quantization", found["quantization"] or "none")
    yield _row("context", f"{found['context']:,} tokens")
    yield _row("sizes", f"{found['layers']} layers, width {found['dim']}, vocabulary {found['vocabulary']:,}")
    yield _row("chat template", "yes" if found["chat_template"] else "no")
    yield _row("weights", _sizes(found["weight_bytes"]))
    if found["cache_bytes_per_1000"] is not None:
        yield _row("KV cache", f"per 1,000 tokens: {_sizes(found['cache_bytes_per_1000'])}")
    for note in found["notes"]:
        yield _row("note", note)


def _row(name: str, text: str) -> str:
    return f"  {name:14} {text}"


def _sizes(forms: Mapping[str, int]) -> str:
    return ", ".join(
        f"{_size(count)} {'as stored' if form == 'stored' else f'in {form}'}" for form, count in forms.items()
    )


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
