"""A wrong value in a config.json is refused by its field, with what is given and allowed, before any weight is read."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import load
from engine.models.allowed import RENAMED, TABLES
from engine.models.embedders import encoder
from engine.models.fields import INDEX, KINDS
from stoker.errors import ModelError
from tests.engine.bridged import write_folder

GOLDENS = Path(__file__).parents[1] / "goldens"
#: One folder of each architecture.
FOLDERS = {
    json.loads(path.read_text())["model_type"]: path.parent
    for group in ("rerankers", "vectors", "architectures")
    for path in sorted((GOLDENS / group).glob("*/config.json"))
}
#: What no architecture has by default.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
WRONG: tuple[Any, ...] = (True, False, 0, -1, 1.5, "8", [], {}, 1e30, float("nan"))


#: Those of them that are right for a kind.
RIGHT: dict[str, tuple[Any, ...]] = {
    "a positive integer": (), "an integer from 0 on": (0,), "a positive number": (1.5, 1e30),
    "a number from 0 on": (0, 1.5, 1e30), "true or false": (True, False), "an object": ({},),
}  # fmt: skip


def wrong(name: str) -> Iterator[Any]:
    """Values that the field cannot have."""
    right = [repr(value) for value in RIGHT[KINDS[name].words]]
    return (value for value in WRONG if repr(value) not in right)


def refused(config: dict[str, Any], where: str, called: str, name: str, value: object) -> None:
    # Where 0 is none, an architecture may need some.
    words = {KINDS[name].words, *(["a positive integer"] if KINDS[name] is INDEX else [])}
    said = re.escape(f"{where}: {called} is {json.dumps(value)}, not ")
    with pytest.raises(ModelError, match=f"{said}({'|'.join(words)})$"):
        # Nothing of the weights is there to be asked for.
        encoder(config, object())  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", FOLDERS)
def test_a_value_of_a_wrong_kind_is_refused_by_its_field(architecture: str) -> None:
    config = json.loads((FOLDERS[architecture] / "config.json").read_text())
    others = RENAMED.get(architecture, {})
    for name in TABLES[architecture].used:
        kept = {key: value for key, value in config.items() if others.get(key) != name}
        for value in wrong(name) if name in KINDS else ():
            refused({**kept, name: value}, "config.json", name, name, value)
    for original, name in others.items():
        for value in wrong(name):
            refused({**config, original: value}, "config.json", original, name, value)


@pytest.mark.parametrize("architecture", [name for name, folder in FOLDERS.items() if "rope_parameters" in
                                          json.loads((folder / "config.json").read_text())])  # fmt: skip
def test_a_base_of_rope_that_is_none_is_refused_with_the_object_it_stands_in(architecture: str) -> None:
    config = json.loads((FOLDERS[architecture] / "config.json").read_text())
    kinds = [kind for kind, value in config["rope_parameters"].items() if isinstance(value, dict)]
    # An object in place of a number would be one for a kind of layers.
    for value in (value for value in wrong("rope_theta") if value != {}):
        for kind in kinds or [None]:
            changed = copy.deepcopy(config)
            (changed["rope_parameters"][kind] if kind else changed["rope_parameters"])["rope_theta"] = value
            where = ": ".join(["config.json: rope_parameters", *([kind] if kind else [])])
            refused(changed, where, "rope_theta", "rope_theta", value)


@pytest.mark.parametrize(("group", "name", "field", "kind"), [
    ("vectors", "t5", "d_model", "a positive integer"), ("vectors", "distilbert", "dim", "a positive integer"),
    ("decoders", "mixtral", "hidden_size", "a positive integer"),
])  # fmt: skip
def test_inspecting_calls_a_wrong_size_by_the_name_that_the_file_has(
    tmp_path: Path, group: str, name: str, field: str, kind: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(GOLDENS / group / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: True}))
    with pytest.raises(ModelError, match=rf"config\.json: {field} is true, not {kind}"):
        inspect(folder)


def respelled(architecture: str, *, own: bool) -> dict[str, Any]:
    """Its config.json with the architecture's own names of fields, or with the usual ones."""
    config: dict[str, Any] = json.loads((FOLDERS[architecture] / "config.json").read_text())
    names = RENAMED.get(architecture, {})
    for original, name in names.items():
        values = [config.pop(each) for each in (original, name) if each in config]
        config |= {(original if own else name): value for value in values}
    return config


@pytest.mark.parametrize("own", [True, False], ids=["own names", "usual names"])
@pytest.mark.parametrize("architecture", RENAMED)
def test_a_size_that_is_missing_is_called_as_the_file_calls_the_others(architecture: str, own: bool) -> None:
    config = respelled(architecture, own=own)
    for original, name in RENAMED[architecture].items():
        called = original if own else name
        if name in SIZES:
            with pytest.raises(ModelError, match=rf"^config\.json: {called} is missing; a positive integer is needed$"):
                encoder({key: value for key, value in config.items() if key != called}, object())  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", RENAMED)
def test_where_a_file_has_no_size_at_all_one_is_called_as_its_architecture_does(architecture: str) -> None:
    config = respelled(architecture, own=True)
    bare = {key: value for key, value in config.items() if key not in RENAMED[architecture]}
    with pytest.raises(ModelError, match=rf"json: ({'|'.join(RENAMED[architecture])}) is missing"):
        encoder(bare, object())  # type: ignore[arg-type]


@pytest.mark.parametrize(("architecture", "dim", "heads"), [
    ("nomic_bert", "n_embd", "n_head"), ("distilbert", "dim", "n_heads"),
    ("bert", "hidden_size", "num_attention_heads"), ("gte", "hidden_size", "num_attention_heads"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_called_as_the_file_calls_them(architecture: str, dim: str, heads: str) -> None:
    config = {**respelled(architecture, own=True), heads: 5}
    with pytest.raises(ModelError, match=rf"^config\.json: {dim} is \d+, .*{heads},? 5"):
        encoder(config, object())  # type: ignore[arg-type]


@pytest.mark.parametrize(("group", "name", "field"), [
    ("vectors", "t5", "d_model"), ("vectors", "distilbert", "n_heads"), ("decoders", "mixtral", "num_hidden_layers"),
    ("own", "gpt2", "n_layer"),
])  # fmt: skip
def test_inspecting_calls_a_missing_size_by_the_name_that_the_architecture_has(
    tmp_path: Path, group: str, name: str, field: str
) -> None:
    folder = tmp_path / "m"
    if group == "own":
        write_folder(folder, name)
    else:
        shutil.copytree(GOLDENS / group / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != field}))
    with pytest.raises(ModelError, match=rf"config\.json: {field} is missing; a positive integer is needed"):
        inspect(folder)


@pytest.mark.parametrize(("name", "change", "said"), [
    ("electra", {"sentence_transformers": {"activation_fn": []}}, r"activation_fn \[\] is not supported"),
    ("deberta-v2", {"pooler_hidden_act": {}}, r"pooler_hidden_act = {} is not supported"),
])  # fmt: skip
def test_a_list_or_an_object_in_place_of_a_name_is_refused(
    tmp_path: Path, name: str, change: dict[str, Any], said: str
) -> None:
    shutil.copytree(GOLDENS / "rerankers" / name, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=said):
        load("it", [str(tmp_path / "m")])
