"""The client's options, as type checkers and callers meet them: the requests' own fields; any other is an error."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import subprocess
import sys
import types
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import mypy.api
import pytest

from stoker import AsyncClient, Client
from stoker.client import options
from stoker.client._async.adapters import AsyncAdapters
from stoker.client._sync.adapters import Adapters
from stoker.contract import AdapterRequest, ChatMessage, EmbedRequest, GenerateRequest, TrainRequest
from stoker.errors import InvalidRequest
from stoker.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "tests/stoker/typed_program.py"

#: Options, the request that they fill, and the fields that the call or the client gives by itself.
CALLS: dict[str, tuple[Any, Any, set[str]]] = {
    "embed": (options.EmbedOptions, EmbedRequest, {"model", "texts", "query"}),
    "rerank": (options.RerankOptions, EmbedRequest, {"model", "texts", "query", "dimensions", "dtype"}),
    "generate": (options.GenerateOptions, GenerateRequest, {"model", "prompt", "seed"}),
    "train": (options.TrainOptions, TrainRequest, {"model", "name", "dataset"}),
    "load": (options.AdapterOptions, AdapterRequest, {"model", "name", "upload"}),
}
#: What a request understands under a name that is none of its fields.
ALSO = {"embed": {"truncate": bool}, "rerank": {"truncate": bool}}
#: Fields that take more than their own type: one text stands for a tuple of one.
WIDER = {"stop": Sequence[str] | str}


def accepted(declared: Any) -> Any:
    """What a caller may give for a field of this type: any sequence for a tuple, a mapping for a message."""
    if declared is ChatMessage:
        return ChatMessage | Mapping[str, object]
    if declared is Any:
        return object
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is Annotated:
        return accepted(arguments[0])
    if origin is tuple:
        return Sequence[accepted(arguments[0])]  # type: ignore[misc]
    if origin is dict:
        return Mapping[accepted(arguments[0]), accepted(arguments[1])]  # type: ignore[misc]
    if origin in (Union, types.UnionType):
        return Union[tuple(accepted(argument) for argument in arguments)]  # noqa: UP007
    return declared


@pytest.mark.parametrize("call", CALLS)
def test_the_options_are_the_requests_fields_with_their_types(call: str) -> None:
    typed, request, given = CALLS[call]
    fields = get_type_hints(request, include_extras=True)
    wanted = {name: WIDER.get(name, accepted(fields[name])) for name in request.model_fields if name not in given}
    assert get_type_hints(typed) == wanted | ALSO.get(call, {})


def test_a_bulk_call_takes_what_generate_takes_except_prompts_and_a_request_of_it_takes_both() -> None:
    of_all, of_one = (set(get_type_hints(typed)) for typed in (options.GenerateManyOptions, options.GenerateItem))
    assert of_all == set(get_type_hints(options.GenerateOptions)) - {"prompt_ids", "messages"}
    assert of_one == set(GenerateRequest.model_fields)


@pytest.mark.parametrize("call", CALLS)
def test_every_option_may_be_left_out_and_every_other_field_is_a_parameter(call: str) -> None:
    typed, request, given = CALLS[call]
    assert typed.__required_keys__ == frozenset()
    required = {name for name, field in request.model_fields.items() if field.is_required()}
    assert required <= given


@pytest.mark.parametrize("call", CALLS)
def test_the_docstring_shows_each_option_with_its_default(call: str) -> None:
    typed, request, _ = CALLS[call]
    for owner in (Adapters, AsyncAdapters) if call == "load" else (Client, AsyncClient):
        said = " ".join((inspect.getdoc(getattr(owner, call)) or "").split())
        for name in typed.__annotations__.keys() - ALSO.get(call, {}).keys():
            default = repr(request.model_fields[name].default).replace("'", '"')
            assert f" {name}={default}" in said, f"{owner.__name__}.{call}: {name}"


MISSPELT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "generate": (lambda client: client.generate("x", max_token=16), r"max_token: .*did you mean max_tokens\? Allowed"),
    "a parameter": (lambda client: client.generate("x", jobid="a"), r"jobid: .*did you mean job_id\? Allowed"),
    "embed": (lambda client: client.embed(["x"], normalise=True), r"normalise: .*did you mean normalize\? Allowed"),
    "rerank": (
        lambda client: client.rerank("q", ["x"], normalise=True),
        r"normalise: .*did you mean normalize\? Allowed",
    ),
    "embed_many": (lambda client: client.embed_many(["x"], bacth=3), r"bacth: .*did you mean batch\? Allowed"),
    "embed_chunks": (
        lambda client: client.embed_chunks(["x"], inflight=3),
        r"inflight: .*did you mean in_flight\? Allowed",
    ),
    "generate_many": (
        lambda client: client.generate_many(["x"], inflight=3),
        r"inflight: .*did you mean in_flight\? Allowed",
    ),
    "train": (
        lambda client: client.train("x", [], lerning_rate=1),
        r"lerning_rate: .*did you mean learning_rate\? Allowed",
    ),
    "load": (lambda client: client.adapters.load("x", ".", promot=True), r"promot: .*did you mean promote\? Allowed"),
    "nothing like it": (
        lambda client: client.embed(["x"], zzz=1),
        r"zzz: no such option\. Allowed: deadline, .*truncate",
    ),
}


@pytest.mark.parametrize("case", MISSPELT)
def test_a_misspelt_option_is_refused_at_once_with_the_one_that_was_meant(case: str) -> None:
    call, said = MISSPELT[case]
    # No broker is there: nothing is asked before the options are known.
    settings = Settings(url="redis://127.0.0.1:1/0", patience=0)
    with Client(settings=settings) as client, pytest.raises(InvalidRequest, match=said):
        call(client)

    async def awaited() -> None:
        async with AsyncClient(settings=settings) as client:
            reply = call(client)
            if isinstance(reply, Awaitable):
                await reply

    with pytest.raises(InvalidRequest, match=said):
        asyncio.run(awaited())


def test_no_call_takes_options_that_nobody_typed() -> None:
    loose = [path for path in (ROOT / "stoker").rglob("*.py") if "**options: Any" in path.read_text()]
    assert not loose


@pytest.mark.slow
def test_mypy_knows_the_results_and_finds_each_misspelt_option() -> None:
    """The lines that are wrong carry `type: ignore`, and mypy reports one that is not needed."""
    found, trouble, status = mypy.api.run(
        ["--no-error-summary", "--config-file", str(ROOT / "pyproject.toml"), PROGRAM]
    )
    assert (found, trouble, status) == ("", "", 0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_pyright_knows_the_same() -> None:
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checked_program_holds_a_misspelt_option_for_each_call() -> None:
    text = (ROOT / PROGRAM).read_text()
    for call in (
        "generate",
        "generate_many",
        "embed",
        "rerank",
        "embed_many",
        "embed_chunks",
        "train",
        "adapters.load",
    ):
        assert f"client.{call}(" in text.partition("def misspelt(")[2].partition("def mistyped(")[0]
