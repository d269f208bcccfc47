"""`stoker generate`: one answer, or one continuation."""

from __future__ import annotations

from typing import Annotated

import typer

from stoker.cli import inputs
from stoker.cli.options import Json, Model, Url, connect, is_terminal, notes, print_json
from stoker.contract import GenerateResult
from stoker.contract.kinds import GENERATE
from stoker.errors import InvalidRequest

Adapter = Annotated[str | None, typer.Option(help="LoRA adapter to generate with.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to make.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest that add up to this.")]
Seed = Annotated[int | None, typer.Option(help="The same seed, the same text.")]

CHAT_OR_RAW = "The prompt is a message, or a text to continue; default: a message if the model has a chat template."


def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer or continue; '-' reads standard input.")],
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
    chat: Annotated[bool | None, typer.Option("--chat/--raw", help=CHAT_OR_RAW)] = None,
    json_schema: Annotated[str | None, typer.Option(help="File: the answer is JSON that fits this schema.")] = None,
    regex: Annotated[str | None, typer.Option(help="The answer matches this expression.")] = None,
    seed: Seed = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Answer a prompt, or continue it, token by token. Ctrl-C cancels the job.

    A model with a chat template gets the prompt as a message; --raw lets it continue the text instead.
    """
    if prompt == json_schema == inputs.STDIN:
        raise InvalidRequest("json_schema: standard input given, which is the prompt already. Name a file.")
    text = inputs.read_text("prompt") if prompt == inputs.STDIN else prompt
    schema = None if json_schema is None else inputs.read_json("json_schema", json_schema)
    with connect(url) as client:
        model = client.choose_model(model, GENERATE.name)
        if chat is None:
            chat = client.models()[model].chat
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
            json_schema=schema,
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
