"""What a run minimises, as functions of the vector of all that is trained."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from engine.adapters.flat import Matrices
from engine.adapters.lora import LoraConfig, TrainableLora, dropout_keys
from engine.models.decoder import Decoder, DecoderBlock
from engine.training.flat import Layout
from engine.training.loss import Columns, cross_entropy
from stoker.contract import TrainRequest


class Objective:
    """The losses of a batch, which MLX differentiates and compiles: `weights` is a vector as `layout` has it, `inputs`
    int32 (rows, tokens), `wanted` the positions, targets and weights of a `TrainingBatch`.

    `squares`: of DoRA, what `square_norms` finds of each layer; it may come later, and before the first call.
    """

    def __init__(
        self,
        decoder: Decoder,
        request: TrainRequest,
        config: LoraConfig,
        layout: Layout,
        squares: Mapping[str, mx.array],
    ) -> None:
        self._decoder, self.request, self._config, self._layout = decoder, request, config, layout
        self.squares = squares
        self._linears, shard = decoder.linears, decoder.shard
        self._columns = None if shard is None else Columns(shard, decoder.args.vocab)

    def training_loss(
        self,
        weights: mx.array,
        key: mx.array,
        inputs: mx.array,
        *wanted: mx.array,
        drawn: tuple[int, int] | None = None,
    ) -> mx.array:
        """`drawn`: as `TrainableLora` has it."""
        matrices = self._matrices(weights)
        keys = dropout_keys(matrices, key) if self.request.dropout else {}
        return self._loss(self._hidden(inputs, matrices, keys, drawn), self.request.label_smoothing, *wanted)

    def held_out_loss(self, weights: mx.array, inputs: mx.array, *wanted: mx.array) -> mx.array:
        return self._loss(self._hidden(inputs, self._matrices(weights), {}), 0.0, *wanted)

    def _matrices(self, weights: mx.array) -> Matrices:
        """The weights as the forward pass multiplies them: rounded to what the model computes in, and A and B scaled by
        √s each. Of the whole vector, and so of its slope, at once: it is launching that takes the time, and there are
        some hundred matrices. DoRA takes them as they are: its norms are in float32."""
        if self.request.dora:
            return self._layout.unpack(weights)
        return self._layout.unpack((weights * self._config.scale**0.5).astype(self._decoder.dtype))

    def _loss(
        self, hidden: mx.array, smoothing: float, positions: mx.array, targets: mx.array, weights: mx.array
    ) -> mx.array:
        """Sum of the losses of a batch's targets.

        Only the hidden states that predict a target go through the output head: with prompts masked and a vocabulary
        of 50,000 or more this is most of the step's memory, and a good part of its time.
        """
        chosen = hidden.reshape(-1, hidden.shape[-1])[positions]
        return cross_entropy(self._decoder.own_logits, chosen, targets, weights, smoothing, self._columns)

    def _hidden(
        self,
        inputs: mx.array,
        matrices: Matrices,
        keys: dict[str, mx.array],
        drawn: tuple[int, int] | None = None,
    ) -> mx.array:
        """Hidden states after the final norm; dropout where there are keys."""
        if not self.request.gradient_checkpointing:
            return self._decoder(inputs, adapters=self._adapters(matrices, keys, drawn))

        def checkpointed(layer: DecoderBlock, x: mx.array) -> mx.array:
            # What is to be differentiated must come as an argument of what is checkpointed, and nothing else may.
            own = {linear.name: matrices[linear.name] for linear in layer.linears if linear.name in matrices}
            run = mx.checkpoint(lambda x, own: layer(x, None, self._adapters(own, keys, drawn)))
            found: mx.array = run(x, own)
            return found

        return self._decoder(inputs, adapters=self._adapters(matrices, keys, drawn), run_block=checkpointed)

    def _adapters(self, matrices: Matrices, keys: dict[str, mx.array], drawn: tuple[int, int] | None) -> TrainableLora:
        return TrainableLora(
            matrices,
            self._config.scale if self.request.dora else 1.0,
            linears=self._linears,
            squares=self.squares,
            dropout=self.request.dropout if keys else 0.0,
            keys=keys,
            drawn=drawn,
            shard=self._decoder.shard,
        )
