"""A decoder whose architecture is one of mlx-lm's model files, as the engine's lanes and its trainer run one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.models.bridge import blocks, experts, gguf_configs, gguf_weights, linears, package, slots, weights
from engine.models.bridge.configs import BridgeArgs, context_of
from engine.models.bridge.gguf_models import GgufModel
from engine.models.bridge.network import TRIED, cut
from engine.models.cache import KvSizes, View
from engine.models.decoder import RunBlock
from engine.models.joint import Cache
from engine.models.layers import LayerAdapters, Linear
from engine.platform.compiler import on_cpu
from engine.sparing import Pause, no_pause
from engine.weights.gguf import GGUF
from engine.weights.precision import Precision
from stoker.errors import ModelError

_GROUPED = ("gemma2",)
#: Layers that a network may be taken to have: what config.json says of them is not held against its weights.
_MOST = 4096


class BridgedDecoder:
    """The model: tokens to hidden states to logits. Its weights never change; adapters come with each call."""

    #: Ranks share no such model.
    shard: None = None

    def __init__(self, file: str, network: nn.Module, args: object, config: Mapping[str, Any]) -> None:
        self._network = network
        caches = network.make_cache() if hasattr(network, "make_cache") else _default_caches(network)
        self._slots = slots.shapes_of(caches)
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
        self.linears: dict[str, Linear] = linears.unwrap(network, made, ran)
        if not probing.shares:
            # A layer that is run again would lose the gradient through the keys that it reads of another.
            blocks.stage(network, self._pass)
        self._cut = cut(network, lambda: self._open(slots.Whole()), logits)
        self._sizes, self.dtype = sizes, _computed_in(sizes, logits)
        # Of a model that also sees, the language model's own: they have its defaults.
        args = getattr(network.get("language_model"), "args", args)
        context = context_of(config, args, attends=bool(sizes.keys))
        self.args = BridgeArgs(str(config["model_type"]), vocab=logits.shape[-1], context=context)
        self.parameters, self.nbytes = linears.parameters_of(network)

    @classmethod
    def from_folder(
        cls, folder: Path, config: Mapping[str, Any], file: str, precision: Precision, pause: Pause = no_pause
    ) -> BridgedDecoder:
        """`pause` is called between the weights. Raises `ModelError` for a config.json or weights that mlx-lm's `file`
        cannot run, or would run otherwise."""
        network, args = weights.network_of(config, file)
        weights.read(folder, config, network, precision, pause)
        pause()
        return cls(file, network, args, config)

    @classmethod
    def from_gguf(cls, gguf: GGUF, model: GgufModel, precision: Precision, pause: Pause = no_pause) -> BridgedDecoder:
        """From a file of this architecture. Raises `ModelError` as `from_folder` does."""
        config = gguf_configs.config_of(gguf, model)
        network, args = weights.network_of(config, model.file)
        gguf_weights.read(gguf, model, config, network, precision, pause)
        pause()
        return cls(model.file, network, args, config)

    def _probe(self) -> tuple[slots.Probing, dict[str, bool], mx.array]:
        """What each layer keeps, which linear layers ran, and some logits."""
        probing, ran = slots.Probing(), self._pass.ran
        tokens = mx.array(TRIED, dtype=mx.int32)
        self._pass.ran = ran = {}
        try:
            with self._pass.begun(None, *tokens.shape):
                logits: mx.array = self._network(tokens, cache=self._open(probing))
            mx.eval(logits)
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
        return self._sizes

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
        return self.logits(hidden)

    def head(self, hidden: mx.array) -> mx.array:
        """The same in the model's own dtype."""
        return self._cut.head(hidden)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        return {name: linear.shape for name, linear in self.linears.items()}


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


def _default_caches(network: nn.Module) -> list[Any]:
    """As mlx-lm's `make_prompt_cache`: keys and values for each layer."""
    return [package.load("cache").KVCache() for _ in network.layers]


def _computed_in(sizes: KvSizes, logits: mx.array) -> mx.Dtype:
    """What adapters' products are computed in."""
    return sizes.values[0].dtype if sizes.values else logits.dtype
