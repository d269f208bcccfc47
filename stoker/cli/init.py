"""`stoker init`: small files to try the commands on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from stoker.errors import ConfigError, InvalidRequest
from stoker.files.durable import write_whole

DATASET, TEXTS = "style.jsonl", "texts.txt"


def init(
    folder: Annotated[Path, typer.Argument(help="Where to; default: here.")] = Path(),
) -> None:
    """Write a small dataset to train on, and texts to embed. Files that are there already stay."""
    files = {folder / DATASET: conversations(), folder / TEXTS: _shipped("sentences.txt")}
    for path in files:
        if path.exists():
            raise InvalidRequest(f"{path} is there already. Name another folder: stoker init FOLDER.")
    for path, content in files.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, partial(Path.write_text, data=content, encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error}).") from None
        print(f"{path}: {len(content.splitlines())} lines")


def conversations() -> str:
    """The demo's dataset as conversations of one question and one answer, a JSON line each."""
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in _questions())


def _questions() -> Iterator[list[dict[str, str]]]:
    for line in _shipped("house_style.jsonl").splitlines():
        example = json.loads(line)
        question = example["prompt"].removeprefix("Q: ").removesuffix("\nA:")
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": example["completion"].strip()}]


def _shipped(name: str) -> str:
    return resources.files("stoker.data").joinpath(name).read_text(encoding="utf-8")
