"""From a model's sources to a model that is ready to run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import mlx.core as mx
from typing_extensions import Unpack

from engine.checkpoints.inspecting import check_blocks, check_layers
from engine.checkpoints.kv_bits import keep_in_bits
from engine.checkpoints.reranking import pairing_of
from engine.checkpoints.sources import naming, resolve
from engine.checkpoints.vocabulary import check_ids, check_segments
from engine.models.bridge import gguf_models, package
from engine.models.bridge.decoder import BridgedDecoder
from engine.models.causal import CausalEncoder
from engine.models.decoder import Decoder
from engine.models.embedders import ENCODERS, encoder
from engine.models.encoder import Encoder
from engine.models.heads import Head, head_of
from engine.models.llama import Llama, LlamaArgs
from engine.models.mistral import MistralArgs
from engine.models.qwen2 import Qwen2Args
from engine.models.qwen3 import Qwen3Args
from engine.models.rerank_files import RerankFiles, without_own
from engine.models.rerankers import score_heads, spec_of
from engine.models.sentence import EmbeddingSpec
from engine.models.sentence_files import model_folder, pools_decoder
from engine.models.shard import Shard
from engine.models.sharded import shared
from engine.platform.jsonfiles import read_config
from engine.sparing import Pause, no_pause
from engine.text.pairs import Pairing
from engine.text.tokenizer import Tokenizer
from engine.weights import safetensors_header
from engine.weights.digest import weights_digest
from engine.weights.folder import folder_tensors, gguf_tensors
from engine.weights.gguf import GGUF
from engine.weights.precision import Precision
from engine.weights.tensors import Tensors
from stoker.contract import ModelCard
from stoker.errors import ModelError

#: Decoders by `model_type` of config.json; all run `Llama`.
DECODERS: dict[str, type[LlamaArgs]] = {
    args.architecture: args for args in (LlamaArgs, MistralArgs, Qwen2Args, Qwen3Args)
}
#: Decoders by `general.architecture` of GGUF, in which a Mistral is a `llama`.
GGUF_DECODERS: dict[str, type[LlamaArgs]] = {name: DECODERS[name] for name in gguf_models.FAMILY}


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
    model: Decoder | Encoder = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    context: int
    parameters: int
    bytes: int
    load_seconds: float
    embedding: EmbeddingSpec | None = None
    linear_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    #: What the pooled vectors go through (kind "embed" only).
    heads: Sequence[Head] = field(default=(), repr=False)
    #: In which numbers its weights were asked for: the same files make other weights with another one.
    precision: str = ""
    #: This process's part of a model that ranks share (kind "generate" only); None: all of it is here.
    shard: Shard | None = field(default=None, repr=False)
    #: How a query and a text become one sequence (a model that reranks alone, which is one of kind "embed").
    pairing: Pairing | None = field(default=None, repr=False)
    #: What drafts for it (kind "generate" only), counted in `bytes`; None: no model does.
    draft: LoadedModel | None = field(default=None, repr=False)

    @functools.cached_property
    def digest(self) -> str:
        """Names the contents of its files: what an adapter was trained on."""
        return weights_digest(model_folder(self.path))

    @property
    def summary(self) -> str:
        split = "" if self.shard is None else f"{self.shard.size} ranks share its {self.shard.split}, "
        drafts = "" if self.draft is None else f"{self.draft.name} drafts, "
        parameters = f"{self.parameters / 1e6:.0f} M parameters"
        return f"{self.architecture}, {parameters}, {split}{drafts}{self.load_seconds:.1f} s"

    def card(self, kinds: tuple[str, ...], kv_tokens: int = 0) -> ModelCard:
        """What a worker that runs jobs of `kinds` on this model, and has memory for so many tokens, reports of it."""
        return ModelCard(
            model=self.name,
            architecture=self.architecture,
            kinds=kinds,
            context=self.context,
            parameters=self.parameters,
            dim=self.embedding.dim if self.embedding else 0,
            reranks=self.pairing is not None,
            chat=self.kind == "generate" and bool(self.tokenizer.templates),
            kv_bits=self.decoder.kv_bits if self.kind == "generate" else 16,
            kv_tokens=kv_tokens,
        )

    @property
    def decoder(self) -> Decoder:
        """The model of kind "generate". Raises `ModelError` for an encoder."""
        if not isinstance(self.model, Encoder):
            return self.model
        raise ModelError(f"{self.name} makes embeddings; it neither generates nor trains")

    @property
    def llama(self) -> Llama:
        """The model where it is of the Llama family, with all that this has beyond a decoder. Raises `ModelError`."""
        if isinstance(self.model, Llama):
            return self.model
        raise ModelError(f"{self.name} is a {self.architecture}, which is not of the Llama family")

    @property
    def encoder(self) -> Encoder:
        """The model of kind "embed". Raises `ModelError` for a decoder."""
        if isinstance(self.model, Encoder):
            return self.model
        raise ModelError(f"{self.name} generates; it makes no embeddings")


class PrecisionOptions(TypedDict, total=False):
    """What `Precision.of` takes."""

    dtype: str | None
    quantize: str | None
    group_size: int
    kv_bits: int


@dataclass(frozen=True)
class _Load:
    """What is asked for. `path`: the model's; `start`: when its load began."""

    name: str
    path: Path
    precision: Precision
    start: float
    pause: Pause
    shard: Shard | None


def load(
    name: str,
    sources: Sequence[str],
    pause: Pause = no_pause,
    shard: Shard | None = None,
    **options: Unpack[PrecisionOptions],
) -> LoadedModel:
    """The model called `name`, from the first of `sources` that is available, with every weight evaluated.

    `pause` is called between the pieces of the load. `shard`: this process's part of a model that generates; None: all
    of it. `options` are those of `Precision.of`. Raises `ModelError` when no source is available, the value of an
    option is unknown, or the model is damaged, of an architecture not supported, or cannot be cut so.
    """
    start = time.perf_counter()
    precision = Precision.of(**options)
    path = resolve(sources)
    asked = _Load(name, path, precision, start, pause, shard)
    with naming(path):
        if path.is_file():
            if path.suffix != ".gguf":
                raise ModelError(f"{path}: a model is a folder with config.json and safetensors, or a .gguf file")
            loaded = _load_gguf(asked)
        else:
            config = read_config(model_folder(path))
            architecture = config.get("model_type")
            if (files := RerankFiles.of(path, config)) is not None:
                loaded = _load_reranker(asked, config, files)
            elif architecture in ENCODERS or pools_decoder(path, architecture):
                loaded = _load_encoder(asked, config)
            elif isinstance(architecture, str) and architecture in DECODERS:
                loaded = _load_decoder(asked, config)
            elif (file := package.file_of(config)) is not None:
                loaded = _load_bridged(asked, config, file)
            else:
                raise package.unknown(architecture, tuple(sorted((*ENCODERS, *DECODERS))))
    pause()
    # GPUs keep what was freed for reuse; what loading freed will not be asked for again.
    mx.clear_cache()
    return loaded


def _load_encoder(asked: _Load, config: dict[str, Any]) -> LoadedModel:
    folder, precision, pause = asked.path, asked.precision.for_encoder(), asked.pause
    inner = model_folder(folder)
    tensors, config = folder_tensors(inner, config, precision, pause)
    model = encoder(config, tensors)
    tensors.finish(ignore=model.unused)
    spec = EmbeddingSpec.from_folder(folder, model.args)
    behind = [folder_tensors(each.folder, {}, precision, pause)[0] for each in spec.heads]
    pause()
    tokenizer = Tokenizer.from_folder(inner, lowercase=spec.lowercase, ends=isinstance(model, CausalEncoder))
    pause()
    check_ids(folder, tokenizer, model.args.vocab)
    if model.typed:
        check_segments(folder, tokenizer)
    heads = [head_of(each, found) for each, found in zip(spec.heads, behind, strict=True)]
    measures = _measures([tensors, *behind], asked.start)
    return _embedding(asked, config["model_type"], model, tokenizer, spec, heads, measures)


def _load_reranker(asked: _Load, config: dict[str, Any], files: RerankFiles) -> LoadedModel:
    folder, inner, pause = asked.path, files.sentence.transformer, asked.pause
    tensors, config = folder_tensors(inner, without_own(config), asked.precision.for_encoder(), pause)
    model = encoder(config, tensors)
    pause()
    tokenizer = Tokenizer.from_folder(inner, lowercase=files.sentence.lowercase)
    pause()
    heads = score_heads(files, config, model, tokenizer, tensors)
    tensors.finish(ignore=model.unused)
    check_ids(folder, tokenizer, model.args.vocab)
    pairing = pairing_of(folder, files, model, tokenizer)
    spec = spec_of(files, config, model)
    measures = _measures([tensors], asked.start)
    return _embedding(asked, config["model_type"], model, tokenizer, spec, heads, measures, pairing)


def _embedding(
    asked: _Load,
    architecture: str,
    model: Encoder,
    tokenizer: Tokenizer,
    spec: EmbeddingSpec,
    heads: Sequence[Head],
    measures: dict[str, Any],
    pairing: Pairing | None = None,
) -> LoadedModel:
    asked.pause()
    _warm(lambda: model(mx.zeros((1, min(8, model.args.context)), mx.int32)))
    return LoadedModel(
        name=asked.name,
        path=asked.path,
        kind="embed",
        architecture=architecture,
        model=model,
        tokenizer=tokenizer,
        context=spec.max_tokens,
        embedding=spec,
        heads=heads,
        pairing=pairing,
        **measures,
    )


def _load_decoder(asked: _Load, config: dict[str, Any]) -> LoadedModel:
    inner = model_folder(asked.path)
    tensors, config = folder_tensors(inner, config, asked.precision, asked.pause)
    model = _llama(asked, DECODERS[config["model_type"]].from_config(config), tensors)
    asked.pause()
    return _decoder(asked, model, Tokenizer.from_folder(inner), tensors)


def _load_bridged(asked: _Load, config: dict[str, Any], file: str) -> LoadedModel:
    inner = model_folder(asked.path)
    check_layers(inner / "config.json", config, len(safetensors_header.entries(inner)))
    model = BridgedDecoder.from_folder(inner, config, file, asked.precision, asked.pause, asked.shard)
    asked.pause()
    return _bridged(asked, model, Tokenizer.from_folder(inner))


def _bridged(asked: _Load, model: BridgedDecoder, tokenizer: Tokenizer) -> LoadedModel:
    seconds = time.perf_counter() - asked.start
    measures = {"parameters": model.parameters, "bytes": model.nbytes, "load_seconds": seconds}
    return _generating(asked, model, model.args.architecture, tokenizer, measures)


def _load_gguf(asked: _Load) -> LoadedModel:
    path, precision, pause = asked.path, asked.precision, asked.pause
    gguf = GGUF(path)
    model = gguf_models.model_of(gguf.metadata)
    if model is not None:
        check_blocks(gguf)
        decoder = BridgedDecoder.from_gguf(gguf, model, precision, pause, asked.shard)
        pause()
        return _bridged(asked, decoder, Tokenizer.from_gguf(gguf))
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{path}: the tensor 'token_embd.weight' is missing or no matrix")
    tied = "output.weight" not in gguf.tensors
    args = GGUF_DECODERS[gguf.metadata["general.architecture"]].from_gguf(
        gguf.metadata, vocab=embedding.shape[0], tied=tied
    )
    heads = (args.heads, args.kv_heads) if args.gguf_permuted else None
    tensors = gguf_tensors(gguf, heads, precision, pause)
    llama = _llama(asked, args, tensors)
    pause()
    return _decoder(asked, llama, Tokenizer.from_gguf(gguf), tensors)


def _llama(asked: _Load, args: LlamaArgs, tensors: Tensors) -> Llama:
    return Llama(args, tensors) if asked.shard is None else shared(args, tensors, asked.shard)


def _decoder(asked: _Load, model: Llama, tokenizer: Tokenizer, tensors: Tensors) -> LoadedModel:
    tensors.finish(ignore=model.unused)
    return _generating(asked, model, model.args.architecture, tokenizer, _measures([tensors], asked.start))


def _generating(
    asked: _Load, model: Decoder, architecture: str, tokenizer: Tokenizer, measures: dict[str, Any]
) -> LoadedModel:
    path = asked.path
    asked.pause()
    check_ids(path, tokenizer, model.args.vocab)
    if tokenizer.manners.cleans_spaces:
        raise ModelError(
            f"{path}: clean_up_tokenization_spaces = true is not supported for a model that generates: its text would "
            "change behind what was streamed. Set it to false in tokenizer_config.json"
        )
    asked.pause()
    keep_in_bits(asked.name, model, asked.precision.kv_bits)
    if asked.shard is None:
        # Else all ranks have to do it at the same time: their lanes do.
        _warm(lambda: model.logits(model(mx.zeros((1, 8), mx.int32))))
    return LoadedModel(
        name=asked.name,
        path=path,
        kind="generate",
        architecture=architecture,
        model=model,
        tokenizer=tokenizer,
        context=model.args.context,
        linear_shapes=model.linear_shapes,
        precision=repr(asked.precision),
        shard=model.shard,
        **measures,
    )


def _warm(forward: Callable[[], mx.array]) -> None:
    """Run once, so that kernels are compiled before the first request waits for them."""
    mx.eval(forward())


def _measures(parts: Sequence[Tensors], start: float) -> dict[str, Any]:
    taken = [tensor for tensors in parts for tensor in tensors.taken.values()]
    return {
        "parameters": sum(tensors.parameters for tensors in parts),
        "bytes": sum(tensor.nbytes for tensor in taken),
        "load_seconds": time.perf_counter() - start,
    }
