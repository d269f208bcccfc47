"""Merging an adapter into a copy of its base, and planning a run: what the commands around adapters and runs do."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.merging import merge
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import load
from engine.training import planning
from engine.training.data import tokenize, with_steps
from engine.training.planning import plan
from engine.training.trainer import Trainer
from engine.weights import safetensors
from stoker.contract.dataset import TrainInput, iterate_lines
from stoker.errors import DatasetError, ModelError
from tests import powercut
from tests.engine import bridged, tiny

BASES = Path(__file__).parents[1] / "goldens" / "architectures"
TOKENS = mx.array([[7, 9, 11, 13, 40, 41, 63, 5]])


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", ["qwen2-untied", "llama-llama3"])
def test_a_merged_model_gives_the_logits_of_base_and_adapter(tmp_path: Path, name: str, dora: bool) -> None:
    base = load("tiny", [str(BASES / name)])
    weights = tiny.adapter(base, 3, 1, dora=dora)
    AdapterStore(tmp_path).write("tiny", "style", weights, {})
    done = merge([str(BASES / name)], tmp_path / "tiny/style/1", tmp_path / "merged")
    assert done.layers == len(base.linear_shapes)
    merged = load("merged", [str(tmp_path / "merged")])
    wanted = base.decoder.logits(base.decoder(TOKENS, adapters=tiny.trainable(base, weights)))
    found = merged.decoder.logits(merged.decoder(TOKENS))
    assert np.abs(np.array(found) - np.array(wanted)).max() < 1e-3
    with pytest.raises(ModelError, match="exists already"):
        merge([str(BASES / name)], tmp_path / "tiny/style/1", tmp_path / "merged")


def test_a_merged_model_is_of_the_dtype_of_its_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASES / "qwen2-untied", base)
    for path in safetensors.files(base):
        arrays = {name: array.astype(mx.bfloat16) for name, array in safetensors.read(path).items()}
        safetensors.write(path, arrays)
    AdapterStore(tmp_path).write("tiny", "style", tiny.adapter(load("tiny", [str(base)]), 2, 1), {})
    merge([str(base)], tmp_path / "tiny/style/1", tmp_path / "merged")
    assert {array.dtype for array in safetensors.read_folder(tmp_path / "merged").values()} == {mx.bfloat16}


def test_a_base_that_does_not_generate_is_named_by_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^{BASES / 'mpnet'} makes embeddings"):
        merge([str(BASES / "mpnet")], tmp_path / "style", tmp_path / "merged")


def test_a_merge_that_cannot_be_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no adapter_config\.json in it"):
        merge([str(BASES / "qwen2-untied")], tmp_path / "empty", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_base_whose_files_only_mlx_lms_model_file_can_read_is_refused_by_name(tmp_path: Path) -> None:
    """Its layers may have other names there, or lie turned round: the copy would be the base, or wrong."""
    bridged.write_hub_folder(tmp_path / "base", "gemma3")
    base = load("tiny", [str(tmp_path / "base")])
    AdapterStore(tmp_path).write("tiny", "style", tiny.adapter(base, 2, 1), {})
    with pytest.raises(ModelError, match=r"merging into a gemma3 is not supported; into llama, mistral"):
        merge([str(tmp_path / "base")], tmp_path / "tiny/style/1", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_of_few_bits_or_of_one_file_is_refused(tmp_path: Path) -> None:
    """What is rounded already would be rounded again; and of one file there is nothing to copy along."""
    base = tmp_path / "base"
    shutil.copytree(BASES / "qwen2-tied", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization": {"bits": 4, "group_size": 32}}))
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    for source in (base, tmp_path / "base.gguf"):
        with pytest.raises(ModelError, match=f"{source}: merging needs a model folder .*, not quantized"):
            merge([str(source)], tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_is_there_whole_or_not_whenever_the_power_fails(tmp_path: Path) -> None:
    """With the files that are copied along with its weights."""
    base = load("tiny", [str(BASES / "qwen2-untied")])
    AdapterStore(tmp_path).write("tiny", "style", tiny.adapter(base, 2, 1, targets=("q_proj",)), {})
    (tmp_path / "disk").mkdir()
    with powercut.recorded(tmp_path / "disk") as disk:
        merge([str(BASES / "qwen2-untied")], tmp_path / "tiny/style/1", tmp_path / "disk/merged")
    wanted = {f"merged/{path.name}": path.read_bytes() for path in (tmp_path / "disk/merged").iterdir()}
    assert "merged/tokenizer.json" in wanted
    for cut in disk.cuts():
        found = {name: content for name, content in cut.tree.items() if name.startswith("merged/")}
        assert found in ((wanted,) if cut.finished else ({}, wanted)), cut


def test_a_plan_counts_what_a_run_would_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    path = tmp_path / "x.jsonl"
    rows = [{"prompt": "ab", "completion": "cd"}, {"text": "abcdef"}, {"text": "ab"}, {"text": "abc"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    request = tiny.asking(steps=10, batch_size=2, max_length=16, held_out=0.25, accumulation=3)
    found = plan([str(BASES / "qwen2-tied")], path, request)
    assert (found["examples"], found["held_out"], found["steps_an_epoch"]) == (3, 1, 1)
    assert found["epochs"] == 30, "a batch of two is an epoch: the third example waits for another"
    assert found["seconds_a_step"] == 3, "of as many passes as a step accumulates"
    assert 0 < found["learned_an_epoch"] < found["tokens_an_epoch"]
    assert found["seconds"] == pytest.approx(10 * found["seconds_a_step"])
    assert found["memory_bytes"] > 0
    path.write_text('{"text": "ab"}\nnonsense')
    with pytest.raises(DatasetError, match=r"x\.jsonl, line 2"):
        plan([str(BASES / "qwen2-tied")], path, request)


@pytest.mark.parametrize(
    ("examples", "size", "accumulation"), [(10, 2, 2), (10, 4, 1), (7, 2, 3), (3, 8, 1), (5, 5, 4)]
)
def test_a_plan_says_the_steps_and_epochs_that_the_run_reports(
    tmp_path: Path, examples: int, size: int, accumulation: int
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * examples)
    asked = tiny.asking(epochs=1, batch_size=size, max_length=16, accumulation=accumulation, checkpoint_every=1)
    found = plan([str(BASES / "qwen2-tied")], path, asked)
    model = load("tiny", [str(BASES / "qwen2-tied")])
    learned = tokenize(iterate_lines(TrainInput(path).lines(), "x"), model.tokenizer, 16)
    reports = [each for each in Trainer(model.decoder, with_steps(asked, examples), learned).run() if each is not None]
    assert found["steps"] == found["steps_an_epoch"] == len(reports)
    assert found["epochs"] == reports[-1].epoch >= 1
    assert all((report.epoch or 0) < 1 for report in reports[:-1]), "one step less is no epoch"
