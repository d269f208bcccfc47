"""`stoker train`: send a run and follow it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from stoker.catalogue import parse_model
from stoker.cli import inputs
from stoker.cli.engine_tool import ask_engine
from stoker.cli.options import Json, Model, Url, connect, console, is_terminal, notes, print_json
from stoker.client import TrainJob
from stoker.client.options import TrainOptions
from stoker.client.requests import read_dataset, train_request
from stoker.contract import TrainReport, TrainRequest, TrainResult
from stoker.contract.dataset import ON_WORKER
from stoker.errors import InvalidRequest


def _default(name: str) -> Any:
    return TrainRequest.model_fields[name].default


def _option(help_text: str) -> Any:
    return typer.Option(help=help_text)


def train(
    name: Annotated[str, typer.Argument(help="The adapter's name.")],
    dataset: Annotated[
        str, _option('JSON lines: {"text"}, {"prompt", "completion"} or {"messages"}; - reads standard input.')
    ],
    model: Model = None,
    steps: Annotated[int | None, _option(f"Optimizer steps; default: {_default('steps')}.")] = None,
    epochs: Annotated[int | None, _option("Passes over the examples, instead of steps.")] = None,
    rank: Annotated[int, _option("Rank of the adapter.")] = _default("rank"),
    alpha: Annotated[float, _option("Scale: the update is multiplied by alpha / rank.")] = _default("alpha"),
    targets: Annotated[str, _option("Layers that are changed.")] = ",".join(_default("targets")),
    rslora: Annotated[bool, _option("Scale by alpha / sqrt(rank).")] = False,
    dora: Annotated[bool, _option("DoRA: learn norms in addition to directions.")] = False,
    dropout: Annotated[float, _option("Share of the adapter's inputs left out.")] = _default("dropout"),
    batch_size: Annotated[int, _option("Examples of a forward pass.")] = _default("batch_size"),
    accumulation: Annotated[int, _option("Forward passes a step.")] = _default("accumulation"),
    max_length: Annotated[int, _option("Most tokens of an example.")] = _default("max_length"),
    learn_prompts: Annotated[bool, _option("Let the loss count prompts too.")] = False,
    learning_rate: Annotated[float, _option("Peak rate.")] = _default("learning_rate"),
    schedule: Annotated[str, _option("constant, linear or cosine.")] = _default("schedule"),
    warmup_steps: Annotated[int, _option("Steps of linear warm-up.")] = _default("warmup_steps"),
    weight_decay: Annotated[float, _option("Decoupled, as in AdamW.")] = _default("weight_decay"),
    clip: Annotated[float, _option("Bound of the gradient's norm.")] = _default("clip"),
    label_smoothing: Annotated[float, _option("Share of the target for all tokens.")] = _default("label_smoothing"),
    gradient_checkpointing: Annotated[bool, _option("Less memory, a third more time.")] = False,
    held_out: Annotated[float, _option("Share of the examples to evaluate on.")] = _default("held_out"),
    held_out_lines: Annotated[int, _option("The last so many lines, instead of a share.")] = 0,
    eval_every: Annotated[int, _option("Steps between evaluations; 0: at the end alone.")] = _default("eval_every"),
    stop_after: Annotated[int, _option("Evaluations without a new best; 0: never.")] = _default("stop_after"),
    spike: Annotated[float, _option("A loss this many times the usual is divergence; 0: none is.")] = _default("spike"),
    checkpoint_every: Annotated[int, _option("Steps between checkpoints.")] = _default("checkpoint_every"),
    promote: Annotated[bool, _option("Serve the new version at once.")] = True,
    seed: Annotated[int, _option("The same seed, the same adapter.")] = _default("seed"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run would be; run one step here.")] = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Train a LoRA adapter on the warm base. Ctrl-C leaves the run going; `stoker cancel` ends it."""
    given = locals()
    options = cast(TrainOptions, {name: given[name] for name in TrainOptions.__annotations__ if name in given})
    if steps is None:
        del options["steps"]
    # A wrong target is the request's to refuse.
    options["targets"] = cast(Any, tuple(part.strip() for part in targets.split(",")))
    if dry_run:
        _show_plan(name, dataset, model, options, as_json)
        return
    with connect(url) as client:
        with _examples(dataset) as examples:
            job = client.train(name, examples, model=model, **options)
        notes().print(f"[dim]job {job.id}[/dim]")
        try:
            result = follow_json(job) if as_json else follow(job)
        except KeyboardInterrupt:
            notes().print(f"[dim]the run goes on: `stoker runs attach {job.id}`, `stoker cancel {job.id}`[/dim]")
            raise
        if not as_json:
            print(f"adapter {result.adapter}@{result.version}: {outcome(result)}")


@contextmanager
def _examples(dataset: str) -> Iterator[str | Path]:
    """What the client takes for a dataset: `worker:NAME` as it is given, else a file."""
    if dataset.startswith(ON_WORKER):
        yield dataset
        return
    with inputs.as_file(dataset) as path:
        yield path


def _show_plan(name: str, dataset: str, model: str | None, options: TrainOptions, as_json: bool) -> None:
    """Load the model here, run a step of the longest examples, and print what that says of the whole."""
    if model is None:
        raise InvalidRequest("model: none given; a dry run loads the model itself. Name one with --model.")
    model, sources = parse_model(model)
    request = train_request(model, name, "worker:dry-run", "dry-run", options)
    if dataset.startswith(ON_WORKER):
        raise InvalidRequest(f"dataset: {dataset!r} given; a dry run reads the file itself. Name one of this machine.")
    with inputs.as_file(dataset) as path:
        read_dataset(path)
        plan = ask_engine("plan", sources=sources, dataset=str(path), request=request.model_dump(mode="json"))
    if as_json:
        print_json(plan)
        return
    print(
        f"{plan['examples']} examples, {plan['held_out']} held out; {plan['shortest']} to {plan['longest']} tokens, "
        f"median {plan['median']}\n"
        f"an epoch: {plan['tokens_an_epoch']} tokens, {plan['learned_an_epoch']} of them learned, in "
        f"{plan['steps_an_epoch']} steps; the run: {plan['steps']} steps, {plan['epochs']:.1f} epochs\n"
        f"{plan['trained_parameters']:,} parameters are trained\n"
        f"on {plan['device']}: at most {plan['seconds_a_step']:.2f} s a step, {plan['seconds'] / 60:.1f} min in all, "
        f"{plan['memory_bytes'] / 2**30:.2f} GB"
    )


def outcome(result: TrainResult) -> str:
    said = f"loss {result.first_loss:.3f} → {result.last_loss:.3f}"
    if result.held_out_loss is not None:
        said += f", on held-out examples {result.held_out_loss:.3f} at step {result.best_step}"
    return said


def follow_json(job: TrainJob) -> TrainResult:
    for report in job.progress():
        print_json(report.model_dump(mode="json"))
    result = job.result()
    print_json(result.model_dump(mode="json"))
    return result


def follow(job: TrainJob) -> TrainResult:
    """Show a run: a bar on a terminal, a line every tenth of it elsewhere."""
    if is_terminal():
        _show_bar(job)
    else:
        for report in job.progress():
            if report.step % max(1, report.steps // 10) == 0 or report.is_last or report.note:
                print(_line(report), flush=True)
    return job.result()


def _show_bar(job: TrainJob) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console()) as progress:
        bar = progress.add_task("waiting for the worker", total=None)
        for report in job.progress():
            progress.update(bar, completed=report.step, total=report.steps, description=_numbers(report))
            if report.note:
                progress.console.print(report.note)


def _line(report: TrainReport) -> str:
    return report.note or f"step {report.step:4}/{report.steps}  {_numbers(report)}"


def _numbers(report: TrainReport) -> str:
    held_out = "" if report.held_out_loss is None else f"  held out {report.held_out_loss:.3f}"
    return f"loss {report.loss:.3f}{held_out}  {report.tokens_per_second:.0f} tokens/s"
