"""`stoker adapters`: what the commands change, and what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stoker.broker import keys, registry
from stoker.broker.connection import connect
from stoker.broker.registry import AdapterEntry
from stoker.cli import app
from stoker.client._sync.adapters import Adapters
from stoker.contract import ModelCard, Presence
from stoker.errors import InvalidRequest, UnknownAdapter
from stoker.settings import Settings


class Commands:
    """`stoker adapters …` on one broker, of the model `m`."""

    def __init__(self, settings: Settings) -> None:
        self._url, self.redis = str(settings.url), connect(settings)
        card = ModelCard(model="m", architecture="llama", kinds=("adapters",), context=64, parameters=1)
        now = float(self.redis.time()[0])
        worker = Presence(
            worker="w", host="here", pid=5, device="cpu", started=now, time=now, models=(card,), adapters={}, lanes={},
            memory_bytes=1,
        )  # fmt: skip
        self.redis.set(keys.worker("w"), worker.model_dump_json(), ex=60)
        self.redis.zadd(keys.WORKERS, {"w": now})
        self.redis.hset(keys.MODELS, f"m/{card.contract}", card.model_copy(update={"seen": now}).model_dump_json())
        for key in (keys.WORKERS, keys.MODELS):
            self.redis.expire(key, 60)
        for version in (1, 2):
            known = {"rank": 8, "method": "lora", "source": "trained", "time": 5.0, "steps": 20}
            registry.register(self.redis, "m", "style", version, known, promote=True)

    def __call__(self, *words: str, fails: bool = False) -> str:
        done = CliRunner().invoke(app, ["adapters", *words, "--model", "m", "--url", self._url])
        assert bool(done.exception) == fails, done.output
        return str(done.exception) if fails else done.stdout

    @property
    def serving(self) -> int | None:
        return registry.parse("m", "style", self.redis.hgetall(keys.adapter("m", "style"))).serving


@pytest.fixture
def adapters(broker: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Commands]:
    monkeypatch.setenv("STOKER_HOME", str(tmp_path))
    commands = Commands(broker)
    yield commands
    commands.redis.flushall()
    commands.redis.close()


def test_a_list_says_of_each_version_what_it_is_and_which_one_serves(adapters: Commands) -> None:
    for words in (["list"], ["show", "style"]):
        name, first, second = adapters(*words).splitlines()
        assert name == "style  (m)"
        assert "style@1" in first
        assert "serves" not in first
        assert "rank 8" in second
        assert second.endswith("serves")


@pytest.mark.parametrize("words", [["list"], ["show", "style"]])
def test_programs_get_the_registry_as_json(adapters: Commands, words: list[str]) -> None:
    said: Any = json.loads(adapters(*words, "--json"))
    entry = said[0] if words == ["list"] else said
    assert (entry["name"], entry["model"], entry["serving"]) == ("style", "m", 2)
    assert entry["versions"]["1"]["rank"] == 8


def test_versions_are_promoted_rolled_back_deactivated_and_unloaded(adapters: Commands) -> None:
    assert (adapters("promote", "style@1"), adapters.serving) == ("style: version 1 serves\n", 1)
    assert (adapters("rollback", "style"), adapters.serving) == ("style: version 2 serves\n", 2)
    assert adapters("unload", "style@1") == "style@1: unloaded\n"
    assert "style@1" not in adapters("list")
    assert (adapters("deactivate", "style"), adapters.serving) == ("style: no version serves\n", None)


def test_the_version_that_serves_is_not_unloaded(adapters: Commands) -> None:
    assert "style@2" in adapters("unload", "style@2", fails=True)
    assert adapters.serving == 2


def test_an_adapter_that_was_removed_is_in_no_list(adapters: Commands) -> None:
    registry.register(adapters.redis, "m", "other", 1, {"rank": 8}, promote=True)
    adapters("remove", "style")
    assert "style" not in adapters("list")
    assert [entry["name"] for entry in json.loads(adapters("list", "--json"))] == ["other"]


def test_an_adapter_is_removed_from_the_registry_and_from_this_disk_and_no_other(
    adapters: Commands, tmp_path: Path
) -> None:
    for name in ("style", "other"):
        folder = tmp_path / "adapters/m" / name / "1"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    assert adapters("remove", "style") == "style: 2 versions removed\n"
    assert "style@" not in adapters("list")
    assert [path.name for path in (tmp_path / "adapters/m").iterdir()] == ["other"]


def test_a_version_that_a_job_makes_while_an_adapter_is_removed_stays(
    adapters: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "adapters/m/style"
    for version in (1, 2):
        (home / str(version)).mkdir(parents=True)
    unload = Adapters.unload

    def made_meanwhile(self: Adapters, adapter: str, model: str | None = None) -> AdapterEntry:
        (home / "3").mkdir(exist_ok=True)
        registry.register(adapters.redis, "m", "style", 3, {"rank": 8}, promote=True)
        return unload(self, adapter, model)

    monkeypatch.setattr(Adapters, "unload", made_meanwhile)
    assert adapters("remove", "style") == "style: 2 versions removed\n"
    assert [path.name for path in home.iterdir()] == ["3"]
    assert adapters.serving == 3


@pytest.mark.parametrize("verb", ["show", "remove", "rollback", "deactivate"])
def test_a_version_where_the_whole_adapter_is_meant_is_refused_and_changes_nothing(
    adapters: Commands, verb: str
) -> None:
    for version in (1, 9):
        assert f"'style@{version}' given; name the adapter alone" in adapters(verb, f"style@{version}", fails=True)
    before = adapters("show", "style")
    adapters("deactivate", "style")
    assert "name the adapter alone" in adapters(verb, "style@1", fails=True)
    assert adapters("show", "style").splitlines()[0] == before.splitlines()[0]


def test_an_adapter_that_is_not_there_is_one_error(adapters: Commands) -> None:
    for words in (["show", "none"], ["promote", "none@1"], ["remove", "none"]):
        assert "none" in adapters(*words, fails=True)


@pytest.mark.parametrize(
    ("base", "options", "folder"),
    [
        ("smollm2-135m-instruct", [], "smollm2-135m-instruct"),
        ("/models/Mini", [], "mini"),
        ("own=/models/mini", [], "own"),
        ("/models/mini", ["--model", "served"], "served"),
        ("/models/mini", ["--model", "/models/Served Here"], "served-here"),
    ],
)
def test_an_adapter_is_exported_from_the_folder_of_the_name_that_its_base_is_served_under(
    base: str, options: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def ask_engine(verb: str, **given: Any) -> dict[str, Any]:
        asked.append({"verb": verb, **given})
        return {"path": "out", "layers": 3}

    monkeypatch.setenv("STOKER_HOME", str(tmp_path))
    monkeypatch.setattr("stoker.cli.adapters.ask_engine", ask_engine)
    for version in ("2", "10"):
        (tmp_path / "adapters" / folder / "style" / version).mkdir(parents=True)
    done = CliRunner().invoke(app, ["adapters", "export", "style@2", base, "out", *options])
    assert done.stdout == "out: 3 layers merged\n", done.output
    (given,) = asked
    assert given["adapter"] == str(tmp_path / "adapters" / folder / "style" / "2")
    assert (given["verb"], given["target"]) == ("export", "out")
    missing = CliRunner().invoke(app, ["adapters", "export", "style@3", base, "out", *options])
    assert f"'style@3' given; of those of style for {folder} this machine's disk has: 2, 10. " in str(missing.exception)
    other = CliRunner().invoke(app, ["adapters", "export", "none@3", base, "out", *options])
    assert "this machine's disk has: none. " in str(other.exception)
    assert asked == [given]
    no_version = CliRunner().invoke(app, ["adapters", "export", "style", base, "out"])
    assert type(no_version.exception) is InvalidRequest
    nowhere = CliRunner().invoke(app, ["adapters", "export", "style@2", base, "out", "--model", "../x y"])
    assert type(nowhere.exception) is UnknownAdapter


def test_every_adapter_is_in_the_list(adapters: Commands) -> None:
    registry.register(adapters.redis, "m", "another", 7, {"rank": 4, "method": "dora"}, promote=True)
    shown = adapters("list")
    assert ("another" in shown, "style" in shown, "dora" in shown) == (True, True, True)
    assert [entry["name"] for entry in json.loads(adapters("list", "--json"))] == ["another", "style"]
