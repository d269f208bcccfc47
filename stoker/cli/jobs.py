"""Commands that send jobs: embed, generate, train, cancel."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from stoker.cli.options import Json, Model, Url, connect, is_terminal, notes, print_json
from stoker.client import Client
from stoker.contract import GenerateResult
from stoker.errors import InvalidRequest


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to be continued; '-' reads standard input.")],
    model: Model = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter to generate with.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to make.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0: among all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that add up to this.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same text.")] = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Continue a prompt, token by token. Ctrl-C cancels the job."""
    text = _read_input() if prompt == "-" else prompt
    with connect(url) as client:
        warn_if_cold(client, model, "generate")
        job = client.generate(
            text,
            model=model,
            adapter=adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        if as_json:
            print_json(job.result().model_dump(mode="json"))
            return
        for token in job.stream():
            print(token.text, end="", flush=True)
        print()
        if is_terminal():
            notes.print(f"[dim]{describe(job.result())}[/dim]")


def _read_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise InvalidRequest("prompt: standard input is not UTF-8.") from None


def warn_if_cold(client: Client, model: str | None, kind: str) -> None:
    """Say so when a job will have to wait: silence would look like a hang."""
    warm = {card.model for worker in client.workers() for card in worker.models if kind in card.kinds}
    if model is not None and model in client.models() and model not in warm:
        notes.print(f"[dim]no worker holds {model} warm now: the job waits for one[/dim]")


def describe(result: GenerateResult) -> str:
    usage = result.usage
    decode = usage.run_seconds - usage.first_token_seconds
    speed = f"{(usage.completion_tokens - 1) / decode:.1f} tokens/s, " if decode > 0 else ""
    return (
        f"{usage.completion_tokens} tokens, {speed}first after {usage.first_token_seconds:.2f} s, "
        f"{result.finish_reason}, on {usage.worker}"
    )


def list_jobs(as_json: Json = False, url: Url = None) -> None:
    """List jobs that have not ended: waiting or running, and on which worker."""
    with connect(url) as client:
        found = client.jobs()
    if as_json:
        print_json(found)
        return
    for job_id, record in found.items():
        state = f"running on {record['worker']}" if "worker" in record else "waiting"
        who = f"{record['client']}, priority {record['priority']}"
        print(f"{job_id}  {record['kind']:8} {record['model']:24} {who}, {state}, {record['age']:.0f} s old")


def list_dead(as_json: Json = False, url: Url = None) -> None:
    """List jobs that were put aside because they killed one worker after another."""
    with connect(url) as client:
        found = client.dead()
    if as_json:
        print_json(found)
        return
    for job_id, letter in found.items():
        workers = ", ".join(
            death["worker"] + (f" ({death['trouble']})" if "trouble" in death else "") for death in letter["history"]
        )
        print(f"{job_id}  {letter['kind']:8} {letter['model']:24} killed {workers}")


def retry(
    job_id: Annotated[str, typer.Argument(help="As `stoker jobs dead` lists it.")],
    url: Url = None,
) -> None:
    """Send a dead job again, under its own id."""
    with connect(url) as client:
        print(f"{client.retry(job_id).id}: sent again")


def cancel(
    job_id: Annotated[str, typer.Argument(help="As printed when the job was sent, or shown in Flower.")],
    url: Url = None,
) -> None:
    """Stop a job, whether it waits or runs."""
    with connect(url) as client:
        job = client.job(job_id)
        job.cancel()
        print(f"{job_id}: asked to stop; it was {job.status()}")
