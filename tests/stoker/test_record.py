"""A job's record has one owner: `stoker/broker/ledger/record.py`. Nobody else names its fields or reads its key."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.broker import keys
from stoker.broker.ledger.record import Field, NewJob, listed, owner, summary
from stoker.client.requests import adapter_request, embed_request, generate_request, train_request
from stoker.client.submission import job_record
from stoker.contract.requests import Request
from tests.mutants.entries import CHECKOUT

LEDGER = CHECKOUT / "stoker/broker/ledger"
#: What reads and writes a hash.
COMMANDS = {
    "hget",
    "hset",
    "hmget",
    "hgetall",
    "hincrby",
    "hincrbyfloat",
    "hdel",
    "hsetnx",
    "hexists",
    "hmset",
    "hscan",
}
#: The part of a script's command behind the names that stand for a record's key there.
CALL = re.compile(r"redis\.p?call\('(H[A-Z]+)', (?:job|key|of|job_prefix \.\. of|KEYS\[1\]), ((?:[^()]|\([^()]*\))*)\)")


def sources() -> list[Path]:
    folders = ("stoker", "workers", "tasks", "engine", "bench", "tests", "examples")
    return [path for folder in folders for path in sorted((CHECKOUT / folder).rglob("*.py"))]


def is_record_key(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("keys.job", "job_key")
    return any(
        isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.startswith(keys.job(""))
        for part in ast.walk(node)
    )


def faults(source: str, *, product: bool) -> Iterator[str]:
    """Lines that name a field of the record, or that read the record at all where the `product` does."""
    tree = ast.parse(source)
    named = {target.id for node in ast.walk(tree) if isinstance(node, ast.Assign) and is_record_key(node.value)
             for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
            continue
        key, *others = node.args
        if node.func.attr not in COMMANDS or not (
            is_record_key(key) or (isinstance(key, ast.Name) and key.id in named)
        ):
            continue
        if product or any(isinstance(name, ast.Constant) for name in others[:1]):
            yield f"{node.lineno}: {ast.unparse(node)}"


def test_no_other_file_reads_the_record_or_names_a_field_of_it() -> None:
    found = {}
    for path in sources():
        name, text = path.relative_to(CHECKOUT).as_posix(), path.read_text()
        # Most files name no command of a hash, and take long to parse.
        product = not name.startswith("tests/")
        lines = list(faults(text, product=product)) if any(command in text for command in COMMANDS) else []
        if lines and name != "stoker/broker/ledger/record.py":
            found[name] = lines
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        'redis.hget(keys.job(job_id), "kind")',
        'pipeline.hset(keys.job(job_id), "trouble", what)',
        'await redis.hmget(keys.job(job_id), "kind", "token")',
        'redis.hget(f"stoker:job:{job_id}", "kind")',
        'key = keys.job(job_id)\nredis.hincrby(key, "out_of_memory", 1)',
        "redis.hgetall(keys.job(job_id))",
    ],
)
def test_a_file_that_does_is_found(source: str) -> None:
    assert list(faults(source, product=True))


def fields_of(script: str) -> set[str]:
    """The fields that a script names in its commands on a record."""
    found = set()
    for command, arguments in CALL.findall(script):
        names = [part.strip() for part in re.split(r",(?![^()]*\))", arguments)]
        if command in ("HSET", "HMSET"):
            names = names[::2]
        elif command in ("HINCRBY", "HSETNX"):
            names = names[:1]
        found |= {name.strip("'") for name in names if name.startswith("'")}
    return found


def test_the_scripts_name_the_fields_that_the_record_has_and_no_others() -> None:
    scripts = sorted(LEDGER.glob("*.lua"))
    found = {path.name: fields_of(path.read_text()) for path in scripts}
    known = {field.value for field in Field}
    assert {name: fields - known for name, fields in found.items() if fields - known} == {}
    written = set().union(*found.values()) | set(NewJob.__dataclass_fields__)
    assert known - written == set(), "a field that nobody writes"


def test_a_script_that_names_another_field_is_found() -> None:
    assert fields_of("redis.call('HSET', job, 'tokn', token, 'tag', tag)") == {"tokn", "tag"}
    assert fields_of("redis.call('HMGET', job_prefix .. of, 'a', 'b')") == {"a", "b"}
    assert fields_of("redis.call('HSET', KEYS[1], 'a', string.format('%.6f', now), 'b', x)") == {"a", "b"}


REQUESTS: list[Request] = [
    generate_request("m", "x", 0, {}),
    embed_request("m", ["x"], {}),
    train_request("m", "style", [], "job", {}),
    adapter_request("m", "style", "job", {}),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.kind)
def test_what_a_client_writes_is_a_mapping_of_the_records_fields(request_: Request) -> None:
    record = job_record(request_, "job", "a-client")
    assert set(record) <= {field.value for field in Field}
    assert {name: record[name] for name in record} == dict(record.items())
    assert (record["kind"], record["client"], record["priority"]) == (request_.kind, "a-client", "5")
    assert ("blob" in record) == (request_.kind in ("train", "adapters"))
    with pytest.raises(KeyError):
        record["token"]


def test_what_no_client_wrote_is_read_as_nothing() -> None:
    assert summary("x").parse([None] * 7) == summary("x").parse([None] * 7)
    assert summary("x").parse([None, None, b"token", None, None, None, None]).owned
    assert listed("x").parse([b"kind", b"m", b"c", b"five", None]) is None
    assert listed("x").parse([b"kind", b"m", b"c", None, None]) is None
    assert owner("x").parse(ValueError("WRONGTYPE")) is None
    assert owner("x").parse([b"\xff"]) == "\ufffd"
