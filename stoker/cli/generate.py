"""Commands that generate: one continuation, and a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from stoker.cli import inputs
from stoker.cli.jobs import warn_if_cold
from stoker.cli.options import Json, Model, Url, connect, is_terminal, notes, print_json
from stoker.client import Client
from stoker.client.options import GenerateOptions
from stoker.contract import GenerateResult
from stoker.errors import InvalidRequest, TextTooLong

Adapter = Annotated[str | None, typer.Option(help="LoRA adapter to generate with.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to make.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest that add up to this.")]
Seed = Annotated[int | None, typer.Option(help="The same seed, the same text.")]


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to be continued; '-' reads standard input.")],
    model: Model = None,
    adapter: Adapter = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0: among all.")] = 0,
    top_p: TopP = 1.0,
    min_p: Annotated[float, typer.Option(help="Sample among those this much as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: say less again.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    n: Annotated[int, typer.Option(help="Completions of the prompt.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user message of a chat.")] = False,
    json_schema: Annotated[str | None, typer.Option(help="File: the answer is JSON that fits this schema.")] = None,
    regex: Annotated[str | None, typer.Option(help="The answer matches this expression.")] = None,
    seed: Seed = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Continue a prompt, token by token. Ctrl-C cancels the job."""
    if prompt == json_schema == inputs.STDIN:
        raise InvalidRequest("json_schema: standard input given, which is the prompt already. Name a file.")
    text = inputs.read_text("prompt") if prompt == inputs.STDIN else prompt
    with connect(url) as client:
        warn_if_cold(client, model, "generate")
        job = client.generate(
            [{"role": "user", "content": text}] if chat else text,
            model=model,
            adapter=adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop or ()),
            n=n,
            json_schema=None if json_schema is None else inputs.read_json("json_schema", json_schema),
            regex=regex,
            seed=seed,
        )
        if as_json or n > 1:
            _print_whole(job.result(), as_json)
            return
        for token in job.stream():
            print(token.text, end="", flush=True)
        print()
        if is_terminal():
            notes().print(f"[dim]{describe(job.result())}[/dim]")


def _print_whole(result: GenerateResult, as_json: bool) -> None:
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    for number, completion in enumerate(result.completions, 1):
        print(f"--- {number}\n{completion.text}")


def describe(result: GenerateResult) -> str:
    usage = result.usage
    decode = usage.run_seconds - usage.first_token_seconds
    speed = f"{(usage.completion_tokens - 1) / decode:.1f} tokens/s, " if decode > 0 else ""
    return (
        f"{usage.completion_tokens} tokens, {speed}first after {usage.first_token_seconds:.2f} s, "
        f"{result.finish_reason}, on {usage.worker}"
    )


def chat(
    model: Model = None,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="The system's message, before all others.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = None,
    url: Url = None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, /clear forgets the talk, /exit or Ctrl-D ends it."""
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    options: GenerateOptions = {
        "adapter": adapter,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
    }
    with connect(url) as client:
        warn_if_cold(client, model, "generate")
        for said in _lines():
            if said == "/clear":
                messages = list(start)
                continue
            messages.append({"role": "user", "content": said})
            try:
                messages.append({"role": "assistant", "content": _answer(client, messages, model, seed, options)})
            except TextTooLong:
                messages.pop()
                notes().print("[dim]the talk has become too long for the model: /clear forgets it[/dim]")


def _lines() -> Iterator[str]:
    """What is typed, or the lines of a file or pipe, until `/exit` or the end."""
    try:
        for line in _typed() if sys.stdin.isatty() else inputs.lines():
            said = line.strip()
            if said == "/exit":
                return
            if said:
                yield said
    except (EOFError, KeyboardInterrupt):
        pass
    print()


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except UnicodeDecodeError:
            notes().print("[dim]that was not in the terminal's encoding: say it again[/dim]")


def _answer(
    client: Client, messages: list[dict[str, str]], model: str | None, seed: int | None, options: GenerateOptions
) -> str:
    """Show an answer as it is made. Ctrl-C ends it (and cancels the job); what was said until then counts."""
    said = ""
    stream = client.generate(list(messages), model=model, seed=seed, **options).stream()
    try:
        for token in stream:
            said += token.text
            print(token.text, end="", flush=True)
    except KeyboardInterrupt:
        notes().print(" [dim](stopped)[/dim]", end="")
    print()
    return said
