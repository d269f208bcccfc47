"""What `--model` may be, and the name that follows from it on both sides."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.catalogue import (
    CATALOGUE,
    derived_name,
    drafts_of,
    from_anywhere,
    model_name,
    parse_drafts,
    parse_model,
    parse_models,
)
from stoker.contract.base import NAME_PATTERN
from stoker.errors import ConfigError
from stoker.settings import Settings


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("/models/Qwen2.5-Coder", "qwen2.5-coder", "/models/Qwen2.5-Coder"),
        ("/models/My Model.Q4_K.gguf", "my-model.q4_k", "/models/My Model.Q4_K.gguf"),
        ("/models/Größe (2)/", "gr-e-2", "/models/Größe (2)"),
        ("/models/a=b", "a-b", "/models/a=b"),
        ("/models/../models/_x", "x", "/models/_x"),
        ("hf:org/My-Model@v1.0", "my-model", "hf:org/My-Model@v1.0"),
        ("hf:org/My-GGUF:sub/Model.Q8_0.gguf", "model.q8_0", "hf:org/My-GGUF:sub/Model.Q8_0.gguf"),
        ("package:some_package/Model.gguf", "model", "package:some_package/Model.gguf"),
        ("mine=hf:org/name", "mine", "hf:org/name"),
        ("mine=/a=b", "mine", "/a=b"),
    ],
)
def test_a_source_becomes_a_model_of_its_name(text: str, name: str, source: str) -> None:
    assert parse_model(text) == (name, (source,))
    assert model_name(text) == name


def test_a_relative_path_is_the_same_model_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "My-Model").mkdir()
    (tmp_path / "plain").mkdir()
    monkeypatch.chdir(tmp_path)
    for text in ("My-Model", "./My-Model", str(tmp_path / "My-Model")):
        assert parse_model(text) == ("my-model", (str(tmp_path / "My-Model"),))
        assert model_name(text) == "my-model"
    assert parse_model("plain") == ("plain", (str(tmp_path / "plain"),))
    monkeypatch.chdir(tmp_path / "My-Model")
    assert parse_model("./.")[0] == "my-model"
    assert parse_model("Weights.gguf") == ("weights", (str(tmp_path / "My-Model" / "Weights.gguf"),))


def test_a_name_before_a_source_is_that_name_also_where_a_folder_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "My=Model").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("./mine", "mine", "/models/other", "hf:org/name"):
        assert parse_model(f"mine={source}") == ("mine", (source,))
        assert model_name(f"mine={source}") == "mine"
    assert from_anywhere("mine=./mine") == f"mine={tmp_path / 'mine'}"
    with pytest.raises(ConfigError, match="no source after '='"):
        parse_model("mine=")
    assert parse_model("./My=Model") == ("my-model", (str(tmp_path / "My=Model"),)), "a path with that sign"


def test_catalogue_names_stay_what_they_are() -> None:
    for name, sources in CATALOGUE.items():
        assert parse_model(name) == (name, sources)
        assert model_name(name) == name
    assert model_name("not-in-the-catalogue") == "not-in-the-catalogue"
    assert model_name("Not A Name") == "Not A Name", "the request's own check names what is wrong"


@pytest.mark.parametrize(
    ("text", "cause"),
    [("Unknown", "a name has 1 to 64"), ("unknown-model", "the catalogue has all-minilm-l6-v2"), ("mine=", "no source"),
     ("Mine=hf:x/y", "a name has 1 to 64"), ("=x", "a name has 1 to 64"), ("", "a name has 1 to 64"),
     ("/models/___", "no name can be made"), ("/", "no name can be made")],
)  # fmt: skip
def test_what_is_neither_is_refused(text: str, cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_model(text)
    assert cause in str(caught.value)


def test_two_models_of_one_name_are_refused() -> None:
    same = parse_models(["/a/model", "/a/model", "all-minilm-l6-v2"])
    assert same == {"model": ("/a/model",), "all-minilm-l6-v2": CATALOGUE["all-minilm-l6-v2"]}
    with pytest.raises(ConfigError, match=r"another model is called model already \(/a/model\).*NAME=/b/model"):
        parse_models(["/a/model", "/b/model"])


def test_a_draft_model_is_named_or_has_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    served = {"big": ("/big",), "small": ("/small",)}
    given = [
        "big=small",
        "other=all-minilm-l6-v2",
        "a=./Folder",
        "b=hf:org/Name",
        "c=weights.gguf",
        "d=mine=/x",
        "big=small",
    ]
    assert parse_drafts(given, served) == {
        "big": ("small", ("/small",)),
        "other": ("all-minilm-l6-v2", CATALOGUE["all-minilm-l6-v2"]),
        "a": ("folder", (str(tmp_path / "Folder"),)),
        "b": ("name", ("hf:org/Name",)),
        "c": ("weights", (str(tmp_path / "weights.gguf"),)),
        "d": ("mine", ("/x",)),
    }
    (tmp_path / "lying").mkdir()
    for text, cause in (
        ("big", "write MODEL=DRAFT"), ("big=", "write MODEL=DRAFT"), ("=small", "write MODEL=DRAFT"),
        ("Big=small", "write MODEL=DRAFT"), ("/x/big=small", "write MODEL=DRAFT"),
        ("big=lying", r"lying is no model of this worker or of the catalogue, .*A path has a slash: big=\./lying"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"STOKER_DRAFT_MODELS: '{text}' given; .*{cause}"):
            parse_drafts([text], served)
    with pytest.raises(ConfigError, match="small drafts for big already"):
        parse_drafts(["big=small", "big=/other"], served)


def test_only_for_a_whole_model_another_one_drafts(tmp_path: Path) -> None:
    asked = {"home": tmp_path, "models": ("big=/big", "small=/small"), "draft_models": ("big=small",)}
    assert drafts_of(Settings.model_validate(asked)) == {"big": ("small", ("/small",))}
    with pytest.raises(ConfigError, match=r"STOKER_DRAFT_MODELS: big=small given, with STOKER_SHARD; .* Unset one"):
        drafts_of(Settings.model_validate({**asked, "shard": True}))
    assert drafts_of(Settings.model_validate({"home": tmp_path, "shard": True})) == {}


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=100))
def test_a_derived_name_is_always_a_name(text: str) -> None:
    try:
        name = derived_name("/models/" + text)
    except ConfigError:
        return
    assert re.match(NAME_PATTERN, name)
    assert derived_name(f"/models/{name}") in (name, name.removesuffix(".gguf"))
