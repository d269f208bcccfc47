"""The chat templates that come with a model, by name: of a folder as transformers 5 finds them, of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.platform.jsonfiles import MAX_BYTES, read_bytes, read_object
from stoker.errors import InvalidRequest, ModelError

DEFAULT = "default"
#: The one that is taken where tools are given, if there is one.
TOOL_USE = "tool_use"
#: Where a folder has templates of other names.
FOLDER = "additional_chat_templates"
_GGUF = "tokenizer.chat_template"


def choose(templates: Mapping[str, str], tools: bool, model: str) -> str:
    """The template for a conversation with or without tools. Raises `InvalidRequest` if there is none."""
    if tools and TOOL_USE in templates:
        return templates[TOOL_USE]
    if DEFAULT in templates:
        return templates[DEFAULT]
    if not templates:
        raise InvalidRequest(f"messages given, and {model} has no chat template: give a prompt.")
    allowed = f"; with tools it has {TOOL_USE!r}" if TOOL_USE in templates else ""
    raise InvalidRequest(
        f"messages given, and {model} has no default chat template, only {', '.join(sorted(templates))}{allowed}: "
        "give a prompt."
    )


def folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Of files of their own; else of `config`, which is tokenizer_config.json's; else of chat_template.json."""
    files = {DEFAULT: folder / "chat_template.jinja"} if (folder / "chat_template.jinja").exists() else {}
    files |= {path.stem: path for path in sorted((folder / FOLDER).glob("*.jinja"))}
    if files:
        return {name: _text(path) for name, path in files.items()}
    if config.get("chat_template") is not None:
        return _named(config["chat_template"], folder / "tokenizer_config.json")
    older = folder / "chat_template.json"
    return _named(read_object(older, missing={}).get("chat_template"), older)


def gguf_templates(where: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """`tokenizer.chat_template`, and `tokenizer.chat_template.NAME` for others. Raises `ModelError` for one that is no
    text."""
    named = {key.removeprefix(f"{_GGUF}."): value for key, value in metadata.items() if key.startswith(f"{_GGUF}.")}
    every = {**named, DEFAULT: metadata.get(_GGUF, named.get(DEFAULT))}
    found = {name: template for name, template in every.items() if template is not None}
    for name, template in found.items():
        if not isinstance(template, str):
            raise ModelError(f"{where}: the chat template {name!r} is a {type(template).__name__}, not a text")
    return found


def _text(path: Path) -> str:
    try:
        return read_bytes(path, MAX_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: {error}") from error


def _named(value: object, path: Path) -> dict[str, str]:
    """One template, or several as a list of objects or an object."""
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if isinstance(value, Mapping) and all(isinstance(part, str) for pair in value.items() for part in pair):
        return dict(value)
    if value is None:
        return {}
    raise ModelError(f"{path}: chat_template is neither a text nor a list of objects with name and template")
