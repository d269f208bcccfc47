"""A decoder whose architecture is one of mlx-lm's model files, as the engine's lanes and its trainer run one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.models.bridge import blocks, experts, gguf_configs, gguf_weights, linears, package, sharing, slots, weights
from engine.models.bridge.configs import BridgeArgs, context_of
from engine.models.bridge.gguf_models import GgufModel
from engine.models.bridge.network import TRIED, cut
from engine.models.decoder import RunBlock
from engine.models.joint import Cache
from engine.models.kv_sizes import KvSizes
from engine.models.layers import LayerAdapters
from engine.models.shard import Shard
from engine.models.view import View
from engine.platform.compiler import on_cpu
from engine.sparing import Pause, no_pause
from engine.weights.gguf import GGUF
from engine.weights.precision import Precision
from stoker.errors import ModelError

_GROUPED = ("gemma2",)
#: Layers that a network may be taken to have: what config.json says of them is not held against its weights.
_MOST = 4096


class BridgedDecoder:
    """The model: tokens to hidden states to logits. Its weights never change; adapters come with each call.

    `shard`: the rank of this process, which gets its layers of the network alone; None: all. `pause` is called between
    the weights. Raises `ModelError` for a file that does not run so.
    """

    kv_bits = 16

    def __init__(
        self,
        file: str,
        network: nn.Module,
        args: object,
        config: Mapping[str, Any],
        shard: Shard | None = None,
        pause: Pause = no_pause,
    ) -> None:
        self._network, self.shard = network, None if shard is None else shard.by_layers()
        if shard is None:
            weights.evaluate(network, pause)
        self._slots = slots.shapes_of(_caches(network))
        # Some files take the mask of the first full layer from its cache, also where there is none.
        self._slots += [slots.SlotShape(0)] * (min(_first_full(network), _MOST) - len(self._slots))
        self._pass = linears.Pass()
        #: Model files whose scores have an axis for the queries of one key.
        self._grouped = file in _GROUPED
        if on_cpu():
            experts.block(network)
        made = linears.wrap(network, self._pass)
        before = _weights(network)
        probing, ran, logits = self._probe()
        sizes = probing.sizes
        self._rewritten = [(module, name, weight) for module, name, weight in before if module[name] is not weight]
        with self._kept_weights():
            pass
        self.linears = linears.unwrap(network, made, ran)
        self.linear_shapes = {name: linear.shape for name, linear in self.linears.items()}
        self.parameters, self.nbytes = linears.parameters_of(network)
        self._sizes, self.dtype = sizes, _computed_in(sizes, logits)
        if self.shard is not None:
            logits = self._share(probing, logits.shape[-1], self.shard, pause)
        elif not probing.shares:
            # A layer that is run again would lose the gradient through the keys that it reads of another.
            blocks.stage(network, self._pass)
        self._cut = cut(network, lambda: self._open(slots.Whole()), logits)
        # Of a model that also sees, the language model's own: they have its defaults.
        args = getattr(network.get("language_model"), "args", args)
        context = context_of(config, args, attends=bool(sizes.keys))
        self.args = BridgeArgs(str(config["model_type"]), vocab=logits.shape[-1], context=context)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        file: str,
        precision: Precision,
        pause: Pause = no_pause,
        shard: Shard | None = None,
    ) -> BridgedDecoder:
        """Raises `ModelError` for a config.json or weights that mlx-lm's `file` cannot run, or would run otherwise."""
        network, args = weights.network_of(config, file)
        weights.read(folder, config, network, precision)
        pause()
        return cls(file, network, args, config, shard, pause)

    @classmethod
    def from_gguf(
        cls, gguf: GGUF, model: GgufModel, precision: Precision, pause: Pause = no_pause, shard: Shard | None = None
    ) -> BridgedDecoder:
        """From a file of this architecture. Raises `ModelError` as `from_folder` does."""
        config = gguf_configs.config_of(gguf, model)
        network, args = weights.network_of(config, model.file)
        others = () if shard is None else sharing.others(network, shard)
        gguf_weights.read(gguf, model, config, network, precision, pause, others)
        pause()
        return cls(model.file, network, args, config, shard, pause)

    def _share(self, probing: slots.Probing, vocab: int, shard: Shard, pause: Pause) -> mx.array:
        """Keep this rank's part alone; logits of `TRIED` that all ranks make."""
        if probing.shares:
            raise ModelError(
                "some of its layers read the keys and values of others, so ranks cannot share them. Serve it without "
                "STOKER_SHARD."
            )
        network, parts = self._network, sharing.parts_of(self._network, shard)
        sharing.share(network, vocab, parts, shard, self._pass)
        weights.evaluate(network, pause)
        _, self.nbytes = linears.parameters_of(network)
        self.linears = {name: linear for name, linear in self.linears.items() if linear.here}
        self._rewritten = [(module, name, weight) for module, name, weight in self._rewritten if name in module]
        kept = probing.kept(parts, shard.rank)
        self._slots = [None if shape is None else shape.moved(kept) for shape in self._slots]
        self._sizes = kept.sizes
        try:
            return self._tried(slots.Whole())
        except Exception as error:
            raise ModelError(
                "mlx-lm's file runs parts of its layers by themselves, so ranks cannot share them "
                f"({type(error).__name__}: {error}). Serve it without STOKER_SHARD."
            ) from error

    def _tried(self, view: slots.SlotView) -> mx.array:
        tokens = mx.array(TRIED, dtype=mx.int32)
        with self._pass.begun(None, *tokens.shape):
            logits: mx.array = self._network(tokens, cache=self._open(view))
        return logits

    def _probe(self) -> tuple[slots.Probing, dict[str, bool], mx.array]:
        """What each layer keeps, which linear layers ran, and some logits. Nothing is evaluated of a network that ranks
        share: all of it is here, and too large."""
        probing, ran = slots.Probing(lambda: self._pass.layer), dict[str, bool]()
        self._pass.ran = ran
        try:
            if self.shard is not None:
                with sharing.noted(self._network, self._pass):
                    return probing, ran, self._tried(probing)
            logits = self._tried(probing)
            mx.eval(logits)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"mlx-lm's model file does not run over Stoker's keys and values ({type(error).__name__}: {error})"
            ) from error
        finally:
            self._pass.ran = None
        return probing, ran, logits

    def _open(self, view: slots.SlotView) -> list[Any]:
        return [None if shape is None else shape.open(view) for shape in self._slots]

    @property
    def kv_sizes(self) -> KvSizes:
        return self._sizes.in_bits(self.kv_bits)

    @property
    def stretches(self) -> None:
        """A file of mlx-lm's runs its layers itself."""
        return None

    def __call__(
        self,
        tokens: mx.array,
        cache: Cache | None = None,
        adapters: LayerAdapters | None = None,
        run_block: RunBlock | None = None,
    ) -> mx.array:
        """Hidden states (B, T, dim) of `tokens` int32 (B, T), as `Llama` gives them.

        `run_block` runs each layer, except one that is given more than hidden states that a gradient could need.
        """
        view: slots.SlotView = slots.Whole()
        if cache is not None:
            if not isinstance(cache, View):
                raise TypeError(f"a {type(cache).__name__} given; a View is needed")
            view = slots.Stepping(cache, grouped=self._grouped)
        with self._pass.begun(adapters, *tokens.shape), self._kept_weights():
            self._pass.run_block = run_block
            try:
                return self._cut.hidden(tokens, self._open(view))
            finally:
                self._pass.run_block = None

    @contextmanager
    def _kept_weights(self) -> Iterator[None]:
        """Put back what the network's file writes into its own weights: a trace must leave nothing in them."""
        yield
        for module, name, weight in self._rewritten:
            module[name] = weight

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits (…, vocab), float32, of hidden states (…, dim)."""
        return self.head(hidden).astype(mx.float32)

    def own_logits(self, hidden: mx.array) -> mx.array:
        if self.shard is None:
            return self.logits(hidden)
        self._pass.own_columns = True
        try:
            found = self.logits(self.shard.spread(hidden))
        finally:
            self._pass.own_columns = False
        return found if self._cut.has_head else self.shard.vocabulary(found.T).T

    def head(self, hidden: mx.array) -> mx.array:
        """The same in the model's own dtype."""
        return self._cut.head(hidden)


def _weights(network: nn.Module) -> list[tuple[nn.Module, str, mx.array]]:
    return [
        (module, name, value)
        for module in network.modules()
        for name, value in module.items()
        if isinstance(value, mx.array)
    ]


def _first_full(network: nn.Module) -> int:
    """Behind how many layers the first has none of their windows, where one of so many sees all; else 0."""
    holders = [part for module in network.modules() for part in (module, getattr(module, "args", None))]
    stated = [getattr(part, "sliding_window_pattern", 0) for part in holders]
    return max((count for count in stated if type(count) is int), default=0)


def _caches(network: nn.Module) -> list[Any]:
    """As mlx-lm's `make_prompt_cache`: the network's own, or keys and values for each layer. Raises `ModelError`."""
    if not hasattr(network, "make_cache"):
        return [package.load("cache").KVCache() for _ in network.layers]
    try:
        return list(network.make_cache())
    except Exception as error:
        raise ModelError(
            f"config.json: mlx-lm's file cannot make its caches of it ({type(error).__name__}: {error})"
        ) from error


def _computed_in(sizes: KvSizes, logits: mx.array) -> mx.Dtype:
    """What adapters' products are computed in."""
    return sizes.values[0].dtype if sizes.values else logits.dtype
