"""From a model's sources to a model that is ready to run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from engine.models.bert import Bert, BertArgs, EmbeddingSpec
from engine.models.compiler import on_cpu
from engine.models.llama import Llama, LlamaArgs
from engine.sources import resolve
from engine.text.tokenizer import Tokenizer
from engine.weights import safetensors
from engine.weights.gguf import GGUF
from engine.weights.gguf_names import llama_name, unpermute
from engine.weights.tensors import Reader, Tensors
from stoker.errors import ModelError

#: `model_type` of config.json, or `general.architecture` of GGUF.
FOLDER_ARCHITECTURES = ("bert", "llama")
GGUF_ARCHITECTURES = ("llama",)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights in memory. `context`: the most tokens it takes; `bytes`: of its weights.

    `embedding` says how a text becomes a vector (kind "embed" only); `linear_shapes` maps the dotted name of every
    linear layer that an adapter may change to (in, out) (kind "generate" only).
    """

    name: str
    path: Path
    kind: Literal["generate", "embed"]
    architecture: str
    model: Llama | Bert = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    context: int
    parameters: int
    bytes: int
    load_seconds: float
    embedding: EmbeddingSpec | None = None
    linear_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    @property
    def decoder(self) -> Llama:
        """The model of kind "generate". Raises `ModelError` for an encoder."""
        if isinstance(self.model, Llama):
            return self.model
        raise ModelError(f"{self.name} makes embeddings; it neither generates nor trains")

    @property
    def encoder(self) -> Bert:
        """The model of kind "embed". Raises `ModelError` for a decoder."""
        if isinstance(self.model, Bert):
            return self.model
        raise ModelError(f"{self.name} generates; it makes no embeddings")


def load(name: str, sources: Sequence[str]) -> LoadedModel:
    """The model called `name`, from the first of `sources` that is available, with every weight evaluated.

    Raises `ModelError` when no source is available, or the model is damaged or of an architecture not supported.
    """
    start = time.perf_counter()
    path = resolve(sources)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: a model is a folder with config.json and safetensors, or a .gguf file")
        return _load_gguf(name, path, start)
    config = _read_config(path)
    architecture = config.get("model_type")
    if architecture == "bert":
        return _load_bert(name, path, config, start)
    if architecture == "llama":
        return _load_llama(name, path, config, start)
    raise ModelError(f"{path}: architecture {architecture!r} is not supported; {', '.join(FOLDER_ARCHITECTURES)} are")


def _dtype() -> mx.Dtype:
    """float32 on the CPU back-end, whose 16-bit matrix products are 2 to 50 times slower; bfloat16 on GPUs."""
    return mx.float32 if on_cpu() else mx.bfloat16


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no config.json in it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    return config


def _folder_tensors(folder: Path, dtype: mx.Dtype) -> Tensors:
    arrays = safetensors.read_folder(folder)
    shapes = {name: array.shape for name, array in arrays.items()}
    # `pop` lets go of the file's form of a tensor as soon as a layer has its own.
    readers: dict[str, Reader] = {name: _popper(arrays, name) for name in shapes}
    return Tensors(readers, shapes, str(folder), dtype)


def _popper(arrays: dict[str, mx.array], name: str) -> Reader:
    return lambda: arrays.pop(name)


def _load_bert(name: str, folder: Path, config: dict[str, Any], start: float) -> LoadedModel:
    args = BertArgs.from_config(config)
    spec = EmbeddingSpec.from_folder(folder, args)
    # Embedding models are small, and their vectors are compared with vectors made elsewhere: always float32.
    tensors = _folder_tensors(folder, mx.float32)
    model = Bert(args, tensors)
    # The position ids are a buffer; the pooler and the heads serve BERT's pre-training.
    tensors.finish(ignore=lambda tensor: tensor.endswith("position_ids") or "pooler." in tensor or "cls." in tensor)
    tokenizer = Tokenizer.from_folder(folder)
    _check_vocabulary(folder, tokenizer, args.vocab)
    _warm(lambda: model(mx.zeros((1, 8), mx.int32)))
    return LoadedModel(
        name=name,
        path=folder,
        kind="embed",
        architecture="bert",
        model=model,
        tokenizer=tokenizer,
        context=spec.max_tokens,
        embedding=spec,
        **_measures(tensors, start),
    )


def _load_llama(name: str, folder: Path, config: dict[str, Any], start: float) -> LoadedModel:
    args = LlamaArgs.from_config(config)
    tensors = _folder_tensors(folder, _dtype())
    model = Llama(args, tensors)
    # A tied head is sometimes written a second time; older checkpoints hold the rotary frequencies.
    tensors.finish(ignore=lambda tensor: (args.tied and tensor == "lm_head.weight") or tensor.endswith("inv_freq"))
    return _llama(name, folder, model, Tokenizer.from_folder(folder), tensors, start)


def _load_gguf(name: str, path: Path, start: float) -> LoadedModel:
    gguf = GGUF(path)
    architecture = gguf.metadata.get("general.architecture")
    if architecture != "llama":
        names = ", ".join(GGUF_ARCHITECTURES)
        raise ModelError(f"{path}: architecture {architecture!r} is not supported in GGUF; {names} is")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{path}: the tensor 'token_embd.weight' is missing or no matrix")
    args = LlamaArgs.from_gguf(gguf.metadata, vocab=embedding.shape[0], tied="output.weight" not in gguf.tensors)
    tensors = _gguf_tensors(gguf, args)
    model = Llama(args, tensors)
    tensors.finish()
    return _llama(name, path, model, Tokenizer.from_gguf(gguf), tensors, start)


def _gguf_tensors(gguf: GGUF, args: LlamaArgs) -> Tensors:
    readers: dict[str, Reader] = {}
    shapes = {}
    for stored, info in gguf.tensors.items():
        name = llama_name(stored) or stored
        heads = {"q_proj": args.heads, "k_proj": args.kv_heads}.get(name.split(".")[-2] if "." in name else "", 0)
        readers[name] = _gguf_reader(gguf, stored, heads)
        shapes[name] = info.shape
    return Tensors(readers, shapes, str(gguf.path), _dtype())


def _gguf_reader(gguf: GGUF, stored: str, heads: int) -> Reader:
    def read() -> mx.array:
        values = gguf.dequantize(stored)
        return mx.array(unpermute(values, heads) if heads else values)

    return read


def _llama(name: str, path: Path, model: Llama, tokenizer: Tokenizer, tensors: Tensors, start: float) -> LoadedModel:
    _check_vocabulary(path, tokenizer, model.args.vocab)
    _warm(lambda: model.logits(model(mx.zeros((1, 8), mx.int32))))
    return LoadedModel(
        name=name,
        path=path,
        kind="generate",
        architecture="llama",
        model=model,
        tokenizer=tokenizer,
        context=model.args.context,
        linear_shapes=model.linear_shapes,
        **_measures(tensors, start),
    )


def _check_vocabulary(path: Path, tokenizer: Tokenizer, vocab: int) -> None:
    if tokenizer.vocab_size > vocab:
        raise ModelError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab}")


def _warm(forward: Callable[[], mx.array]) -> None:
    """Run once, so that kernels are compiled before the first request waits for them."""
    mx.eval(forward())


def _measures(tensors: Tensors, start: float) -> dict[str, Any]:
    arrays = tensors.taken.values()
    return {
        "parameters": sum(array.size for array in arrays),
        "bytes": sum(array.nbytes for array in arrays),
        "load_seconds": time.perf_counter() - start,
    }
