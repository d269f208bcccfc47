"""`stoker prefix`: beginnings of prompts that workers keep ready."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from stoker.broker.prefixes import PrefixEntry
from stoker.cli import inputs
from stoker.cli.options import Json, Model, Url, connect, print_json
from stoker.client import Client
from stoker.client.requests import Prompt
from stoker.contract.kinds import GENERATE
from stoker.contract.presence import describe_prefix
from stoker.contract.shown import as_json, brief, printable
from stoker.errors import InvalidRequest

_CHAT_OR_RAW = (
    "TEXT is a system message, or begins prompts as it is; default: a message if the model has a chat template."
)
Name = Annotated[str, typer.Argument(help="The name that it shall have.")]


def pin(
    name: Name,
    text: Annotated[str | None, typer.Argument(help="A system prompt, '-' for standard input.")] = None,
    messages: Annotated[
        str | None, typer.Option(help="File, '-' for standard input: the first messages as JSON, instead of TEXT.")
    ] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--raw", help=_CHAT_OR_RAW)] = None,
    model: Model = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter of the jobs that begin so; default: none.")] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for what the workers say.", min=0.0)] = 10.0,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Let every worker of a model keep the beginning of prompts ready: a system prompt, or a conversation's first
    messages."""
    if (text is None) == (messages is None):
        given = "both" if text is not None else "neither"
        raise InvalidRequest(f"prefix: {given} given; give a TEXT, or --messages FILE.")
    with connect(url) as client:
        chosen = client.choose_model(model, GENERATE.name)
        entry = client.prefixes.pin(
            name, _prompt(client, chosen, text, messages, chat), model=chosen, adapter=adapter, timeout=wait
        )
    print_json(_plain(entry)) if as_json else print("\n".join(_described(entry)))


def _prompt(client: Client, model: str, text: str | None, messages: str | None, chat: bool | None) -> Prompt:
    if messages is not None:
        found = inputs.read_json("messages", messages)
        if not isinstance(found, list):
            raise InvalidRequest(f"messages: {as_json(found)} given; expected a list of messages.")
        return found
    said = inputs.read_text("text") if text == inputs.STDIN else str(text)
    if chat is None:
        chat = client.models()[model].chat
    return [{"role": "system", "content": said}] if chat else said


def list_prefixes(model: Model = None, as_json: Json = False, url: Url = None) -> None:
    """List the pinned prefixes of a model, and how far each worker is with them."""
    with connect(url) as client:
        found = client.prefixes.list(model)
    if as_json:
        print_json([_plain(entry) for entry in found])
        return
    for entry in found:
        print("\n".join(_described(entry)))


def unpin(name: Annotated[str, typer.Argument(help="NAME.")], model: Model = None, url: Url = None) -> None:
    """Let a pinned prefix go."""
    with connect(url) as client:
        client.prefixes.unpin(name, model)
    print(f"{name}: unpinned")


def _plain(entry: PrefixEntry) -> dict[str, Any]:
    return {
        "model": entry.model,
        "name": entry.name,
        **entry.prefix.model_dump(mode="json", exclude_none=True),
        "tokens": entry.tokens,
        "workers": {worker: state.model_dump(mode="json") for worker, state in entry.workers.items()},
    }


def _described(entry: PrefixEntry) -> Iterator[str]:
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.prefix.time))
    of = f", adapter {entry.prefix.adapter}" if entry.prefix.adapter else ""
    tokens = f"{entry.tokens} tokens" if entry.tokens else "tokens not known yet"
    yield printable(f"{entry.name}  ({entry.model}{of})  {made} by {entry.prefix.client}, {tokens}: "
                    f"{brief(entry.prefix.shown, 60)}")  # fmt: skip
    for worker, state in entry.workers.items():
        yield f"  {printable(worker)}: {printable(describe_prefix(state))}"
