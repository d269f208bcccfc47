"""`stoker generate`: one answer, or one continuation; with --output those of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stoker.cli import inputs
from stoker.cli.generate_file import FileRun
from stoker.cli.options import Json, Model, Url, connect, for_output, is_terminal, notes, print_json
from stoker.client.options import GenerateManyOptions
from stoker.contract import GenerateResult
from stoker.contract.kinds import GENERATE
from stoker.contract.requests import LOWEST_PRIORITY
from stoker.errors import InvalidRequest, JobError

Adapter = Annotated[str | None, typer.Option(help="LoRA adapter to generate with.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to make.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest that add up to this.")]
Seed = Annotated[int | None, typer.Option(help="The same seed, the same text.")]

CHAT_OR_RAW = "The prompt is a message, or a text to continue; default: a message if the model has a chat template."


def generate(
    prompt: Annotated[
        str,
        typer.Argument(
            help="What to answer or continue, '-' for standard input; with --output, a file of requests: .jsonl."
        ),
    ],
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
    lookup: Annotated[
        bool | None, typer.Option("--lookup/--no-lookup", help="Draft from prompt and answer; default: where it pays.")
    ] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--raw", help=CHAT_OR_RAW)] = None,
    json_schema: Annotated[str | None, typer.Option(help="File: the answer is JSON that fits this schema.")] = None,
    regex: Annotated[str | None, typer.Option(help="The answer matches this expression.")] = None,
    seed: Seed = None,
    priority: Annotated[
        int | None, typer.Option(help="0 is served first, 9 last; default: 5, and 9 for a file.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the answers to a file of requests: .jsonl.")
    ] = None,
    in_flight: Annotated[
        int | None, typer.Option(help="Requests of a file at once; default: half of what each worker can run.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace the output; where there is none yet, begin an interrupted run anew.")
    ] = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Answer a prompt, or continue it, token by token. Ctrl-C cancels the job.

    A model with a chat template gets the prompt as a message; --raw lets it continue the text instead. With --output
    each line of a file is a request, and an interrupted run continues when the command is given again.
    """
    if prompt == json_schema == inputs.STDIN:
        raise InvalidRequest("json_schema: standard input given, which is the prompt already. Name a file.")
    if output is None:
        inputs.refuse_without_output(in_flight=in_flight, overwrite=overwrite)
    options: GenerateManyOptions = {
        "adapter": adapter,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": tuple(stop or ()),
        "n": n,
        "lookup": lookup,
        "json_schema": None if json_schema is None else inputs.read_json("json_schema", json_schema),
        "regex": regex,
    }
    if priority is not None:
        options["priority"] = priority
    with connect(url) as client:
        if output is not None:
            options.setdefault("priority", LOWEST_PRIORITY)
            run = FileRun(output, model, seed, bool(chat), in_flight, overwrite, options)
            _report(run.answer(client, prompt), as_json)
            return
        text = _prompt(prompt)
        model = client.choose_model(model, GENERATE.name)
        if chat is None:
            chat = client.models()[model].chat
        job = client.generate(
            [{"role": "user", "content": text}] if chat else text,
            model=model,
            seed=seed,
            **options,
        )
        if as_json or n > 1:
            _print_whole(job.result(), as_json)
            return
        for token in job.stream():
            print(for_output(token.text), end="", flush=True)
        print()
        if is_terminal():
            notes().print(f"[dim]{describe(job.result())}[/dim]")


def _prompt(given: str) -> str:
    inputs.refuse_names([given], inputs.OF_REQUESTS, "name a file for the answers to its requests with --output.")
    text = inputs.read_text("prompt") if given == inputs.STDIN else given
    if not text.strip():
        # As a message a model would answer it, and what a pipe has lost would not be missed.
        where = inputs.STDIN_NAME if given == inputs.STDIN else "an empty text"
        raise InvalidRequest(f"prompt: {where} given, without a character that is not a space; say something.")
    return text


def _report(record: dict[str, Any], as_json: bool) -> None:
    """What came of a file. Raises `JobError` if some of its requests have no answer."""
    if as_json:
        print_json(record)
    else:
        print(f"{record['output']}: {record['rows'] - record['errors']} answers to {record['rows']} requests")
    if record["errors"]:
        raise JobError(
            f"{record['errors']} of {record['rows']} requests have no answer; their lines in {record['output']} say "
            "why, under `error`. To try them again, put them into a file of their own."
        )


def _print_whole(result: GenerateResult, as_json: bool) -> None:
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    for number, completion in enumerate(result.completions, 1):
        print(f"--- {number}\n{for_output(completion.text)}")


def describe(result: GenerateResult) -> str:
    usage = result.usage
    decode = usage.run_seconds - usage.first_token_seconds
    speed = f"{(usage.completion_tokens - 1) / decode:.1f} tokens/s, " if decode > 0 else ""
    return (
        f"{usage.completion_tokens} tokens, {speed}first after {usage.first_token_seconds:.2f} s, "
        f"{result.finish_reason}, on {usage.worker}"
    )
