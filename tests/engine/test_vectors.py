"""Embedding models in the layout of their real folders, against what sentence-transformers makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import LoadedModel, load
from engine.checkpoints.verifying import verify
from engine.embedding.forward import Forward, PackedForward, PaddedForward
from engine.embedding.lane import EmbedLane
from engine.models import fastmath
from engine.ticket import Ticket
from engine.weights import safetensors
from stoker.contract import EmbedRequest
from stoker.errors import ModelError, TextTooLong

GOLDENS = Path(__file__).parents[1] / "goldens"
SAID = json.loads((GOLDENS / "vectors.json").read_text())
WANTED = np.load(GOLDENS / "vectors.npz")
TEXTS: list[str] = SAID["texts"]
FOLDERS = ("xlm-roberta", "bge-m3", "max", "sqrt", "weighted", "dense")
FORWARDS: dict[str, Callable[[LoadedModel], Forward]] = {
    "packed": lambda model: PackedForward(model, 2),
    "padded": PaddedForward,
}
CLOSE = 1e-4


def opened(name: str) -> LoadedModel:
    return load(name, [str(GOLDENS / "vectors" / name)])


def embedded(model: LoadedModel, texts: list[str], forward: Forward | None = None, **options: Any) -> np.ndarray:
    """The vectors of one job."""
    lane = EmbedLane(model, forward=forward)
    ticket: Ticket[Any] = Ticket("j", "embed")
    request = EmbedRequest(model=model.name, texts=tuple(texts), **{"truncation": "end", **options})
    lane.admit(lane.prepare(ticket, request, None))
    while lane.busy:
        for ended, found in lane.run().ended:
            ended.resolve(found)
    vectors: np.ndarray = ticket.result(0).vectors
    return vectors


@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("name", FOLDERS)
def test_vectors_are_those_of_sentence_transformers(
    name: str, forward: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all texts in one batch, the longest cut; by the polynomials, and by the plain operations of a GPU."""
    if plain:
        monkeypatch.setattr(fastmath, "fuses_on_cpu", lambda: False)
    model = opened(name)
    for kind, prompt in (("plain", ""), ("default", None), ("query", "query")):
        found = embedded(model, TEXTS, FORWARDS[forward](model), prompt=prompt)
        assert np.abs(found - WANTED[f"{name}.{kind}"]).max() < CLOSE


@pytest.mark.parametrize("name", FOLDERS)
def test_a_text_alone_has_the_vector_that_it_has_in_a_mixed_batch(name: str) -> None:
    model = opened(name)
    together = embedded(model, TEXTS)
    alone = np.concatenate([embedded(model, [text]) for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-5


@pytest.mark.parametrize("name", FOLDERS)
def test_texts_are_cut_where_sentence_transformers_cuts_them(name: str) -> None:
    model, said = opened(name), SAID["checkpoints"][name]
    assert model.context == inspect(model.path).context
    for text, ids in zip(TEXTS, said["token_ids"], strict=True):
        assert model.tokenizer.encode_cut(text, min(model.context, said["longest"])) == ids
    longest = max(TEXTS, key=len)
    assert len(model.tokenizer.encode(longest)) > model.context
    with pytest.raises(TextTooLong, match=f"{name} takes {model.context}"):
        embedded(model, [longest], truncation="error")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_verified_as_it_is_loaded(name: str) -> None:
    path = GOLDENS / "vectors" / name
    assert inspect(path).kind == "embed"
    assert verify(path).inspection.supported


def changed(tmp_path: Path, name: str, file: str, change: dict[str, Any]) -> Path:
    """A copy of the folder `name` with other fields in one of its files; None takes a field out."""
    shutil.copytree(GOLDENS / "vectors" / name, tmp_path / "model")
    path = tmp_path / "model" / file
    content = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [("xlm-roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
     ("xlm-roberta", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
     ("xlm-roberta", {"adapter_layers": 2}, "the field adapter_layers = 2"),
     ("xlm-roberta", {"pad_token_id": -1}, "pad_token_id is -1, not an integer from 0 on"),
     ("xlm-roberta", {"pad_token_id": 65}, "the first 66 of them are for padding"),
     ("xlm-roberta", {"auto_map": {"AutoModel": "own.Own"}}, "auto_map")],
)  # fmt: skip
def test_what_a_config_asks_for_in_vain_is_refused_by_name(
    tmp_path: Path, name: str, change: dict[str, Any], cause: str
) -> None:
    path = changed(tmp_path, name, "config.json", change)
    for check in (verify, lambda path: load("it", [str(path)])):
        with pytest.raises(ModelError, match=cause):
            check(path)


def test_roberta_is_xlm_r_by_another_name(tmp_path: Path) -> None:
    path = changed(tmp_path, "xlm-roberta", "config.json", {"model_type": "roberta"})
    tokens = mx.array([[0, 9, 1, 20, 2]])
    assert mx.array_equal(load("it", [str(path)]).encoder(tokens), opened("xlm-roberta").encoder(tokens))


def test_the_layers_behind_the_pooling_say_how_long_a_vector_is() -> None:
    model = opened("dense")
    assert model.card(("embed",)).dim == 16
    assert model.parameters == opened("max").parameters + 32 * 48 + 48 * 16 + 16
    assert verify(model.path).tensors == verify(GOLDENS / "vectors" / "max").tensors + 3


@pytest.mark.parametrize(
    ("tensors", "cause"),
    [({"linear.weight": (16, 48)}, "'linear.bias' of shape \\(16,\\) is missing"),
     ({"linear.weight": (16, 32), "linear.bias": (16,)}, "has shape \\(16, 32\\), not \\(16, 48\\)"),
     ({"linear.weight": (16, 48), "linear.bias": (16,), "residual.weight": (2, 2)}, "residual.weight")],
)  # fmt: skip
def test_a_layer_behind_the_pooling_is_checked_as_the_model_is(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], cause: str
) -> None:
    path = changed(tmp_path, "dense", "3_Dense/config.json", {})
    safetensors.write(path / "3_Dense" / "model.safetensors", {name: mx.ones(of) for name, of in tensors.items()})
    for check in (verify, lambda path: load("it", [str(path)])):
        with pytest.raises(ModelError, match=cause):
            check(path)


def test_a_layer_behind_the_pooling_that_holds_no_numbers_is_found(tmp_path: Path) -> None:
    path = changed(tmp_path, "dense", "3_Dense/config.json", {})
    arrays = {"linear.weight": mx.full((16, 48), mx.nan), "linear.bias": mx.ones(16)}
    safetensors.write(path / "3_Dense" / "model.safetensors", arrays)
    with pytest.raises(ModelError, match=r"'linear\.weight' holds values that are infinite or no numbers"):
        verify(path)
