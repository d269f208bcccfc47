"""What holds for every model file of mlx-lm that runs over Stoker's keys and values: each check against mlx-lm itself.

`make test-models` runs them all for every architecture and writes the table of docs/models.md; the suite runs them for
a few.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.models.bridge import package, weights
from engine.models.bridge.decoder import BridgedDecoder
from engine.models.bridge.linears import adapter_name
from engine.models.key_values import KeyValues
from engine.training.data import TokenizedExample, collate
from engine.training.trainer import Trainer, _arrays
from engine.weights import safetensors
from tests.engine import cached, test_generate_lane, tiny
from tests.engine.architectures import VOCAB, config

#: Of what the largest logit is, in float32.
CLOSE = 1e-4
LENGTH = 30
STEPS = 10


def network(name: str, seed: int = 5) -> tuple[nn.Module, Any]:
    """mlx-lm's network of a tiny configuration, every weight random: norms, biases and sinks too."""
    mx.random.seed(seed)
    made, args = weights.network_of(config(name), name)
    made.eval()
    mx.eval(made.parameters())
    noisy = [(path, _noisy(array)) for path, array in tree_flatten(made.parameters())]
    made.update(tree_unflatten(noisy))
    mx.eval(made.parameters())
    return made, args


def _noisy(array: mx.array) -> mx.array:
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array + 0.1 * mx.random.normal(array.shape, array.dtype)


def bridged(name: str) -> LoadedModel:
    """The same over Stoker's keys and values."""
    made, args = network(name)
    return loaded(BridgedDecoder(name, made, args, config(name)))


def loaded(decoder: BridgedDecoder) -> LoadedModel:
    vocabulary = min(VOCAB, decoder.args.vocab)
    return LoadedModel(
        name="tiny",
        path=Path("tiny"),
        kind="generate",
        architecture=decoder.args.architecture,
        model=decoder,
        tokenizer=tiny.tokenizer(vocabulary, range(2, 8)),
        context=decoder.args.context,
        parameters=decoder.parameters,
        bytes=decoder.nbytes,
        load_seconds=0.0,
        linear_shapes=decoder.linear_shapes,
    )


def write_folder(folder: Path, name: str, *, bits: int | None = None, **fields: Any) -> nn.Module:
    """A model folder as mlx-lm writes one, of the network that is returned; `fields` change its config.json."""
    made, _ = network(name)
    described = {**config(name), **fields}
    if bits is not None:
        nn.quantize(made, 32, bits, class_predicate=lambda _, module: hasattr(module, "to_quantized") and (
            module.weight.shape[-1] % 32 == 0))  # fmt: skip
        described["quantization"] = {"group_size": 32, "bits": bits}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(described))
    tiny.tokenizer(60).inner.save(str(folder / "tokenizer.json"))
    safetensors.write(folder / "model.safetensors", dict(tree_flatten(made.parameters())))
    return made


def write_hub_folder(folder: Path, name: str) -> nn.Module:
    """The same in the layout of the hub: experts one by one, or in blocks of mxfp4, and the parts that see."""
    made = write_folder(folder, name)
    if name == "gpt_oss":
        nn.quantize(made, 32, 4, mode="mxfp4", class_predicate=_is_expert)
        form = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        (folder / "config.json").write_text(json.dumps({**config(name), "quantization_config": form}))
    arrays = dict(tree_flatten(made.parameters()))
    if name == "gemma3":
        arrays |= {"vision_tower.patch.weight": mx.zeros((2, 2)), "multi_modal_projector.weight": mx.zeros((2, 2))}
    safetensors.write(folder / "model.safetensors", dict(_as_on_the_hub(arrays)), {"format": "pt"})
    return made


def _is_expert(path: str, module: nn.Module) -> bool:
    return ".experts." in path and hasattr(module, "to_quantized")


def _as_on_the_hub(arrays: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    for path, array in arrays.items():
        if ".switch_mlp." in path:
            for number, expert in enumerate(array):
                yield path.replace("switch_mlp", f"experts.{number}"), expert
        elif ".experts.gate_proj." in path:
            pair = mx.stack([array, arrays[path.replace("gate_proj", "up_proj")]], axis=2).flatten(1, 2)
            yield _packed(path.replace("gate_proj", "gate_up_proj"), pair)
        elif ".experts.down_proj." in path:
            yield _packed(path, array)
        elif ".experts.up_proj." not in path:
            yield path, array


def _packed(path: str, array: mx.array) -> tuple[str, mx.array]:
    """gpt-oss's names: codes as blocks of 16 bytes."""
    stem, _, part = path.rpartition(".")
    if part == "weight":
        return f"{stem}_blocks", array.view(mx.uint8).reshape(*array.shape[:2], -1, 16)
    return f"{stem}_{part}", array


def prompts(count: int = 3, length: int = LENGTH) -> list[list[int]]:
    found: list[list[int]] = np.random.default_rng(3).integers(3, 60, (count, length)).tolist()
    return found


def reference(model: nn.Module, row: Sequence[int]) -> np.ndarray:
    """mlx-lm's own logits at every position (tokens, vocabulary): a prompt, then token by token, over its own cache."""
    caches = package.load("cache").make_prompt_cache(model)
    parts = [row[:9], row[9:13], *([token] for token in row[13:])]
    logits = [model(mx.array([part]), cache=caches) for part in parts]
    return np.array(mx.concatenate(logits, axis=1)[0].astype(mx.float32))


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.isfinite(wanted).all()
    apart, bound = np.abs(found - wanted).max(), CLOSE * max(1.0, np.abs(wanted).max())
    assert apart < bound, f"{apart} apart, {bound} allowed"


def check_logits(name: str) -> None:
    """At every position: whole sequences, exact and padded prompts, and rows of different lengths that decode."""
    wanted = [reference(network(name)[0], row) for row in prompts()]
    model = bridged(name).decoder
    whole = np.array(model.logits(model(mx.array(prompts()))))
    batch, starts = KeyValues(model, 4, 64), [20, 5, 9]
    for index, (row, start) in enumerate(zip(prompts(), starts, strict=True)):
        assert_close(whole[index], wanted[index])
        kv = KeyValues(model, 1, 64)
        padded = not model.kv_sizes.states and index != 1
        for begin in range(0, start, 7):
            piece = row[begin : min(begin + 7, start)]
            given = piece + [1] * (7 - len(piece)) if padded else piece
            how = {} if padded else {"exact": True, "kv_length": begin + len(piece)}
            found = cached.through(model, kv, [given], [begin], **how)[0, : len(piece)]
            assert_close(found, wanted[index][begin : begin + len(piece)])
        batch.put(index, kv, 0, start)
    for step in range(LENGTH - max(starts)):
        at = [start + step for start in starts]
        tokens = [[row[position]] for row, position in zip(prompts(), at, strict=True)]
        found = cached.through(model, batch, tokens, at, kv_length=48)
        for index, position in enumerate(at):
            assert_close(found[index, 0], wanted[index][position])


def check_traffic(model: LoadedModel, folder: Path, seed: int, **limits: Any) -> None:
    """The same tokens alone and in random traffic of requests with adapters and without."""
    pool = AdapterPool(model, AdapterStore(folder))
    made = {which: tiny.adapter(model, rank, rank, targets_of(model)) for which, rank in (("one", 2), ("two", 5))}
    for which, weights_ in made.items():
        pool.save(which, weights_, {})
    test_generate_lane.check_traffic(model, pool, seed, made, **limits)


def merged(name: str, adapter: Any) -> nn.Module:
    """mlx-lm's network with W + s·AB in place of W."""
    model, _ = network(name)
    for path, module in model.named_modules():
        sides = adapter.matrices.get(adapter_name(path))
        if sides is not None and isinstance(module, nn.Linear):
            module.weight = module.weight + adapter.config.scale * (sides["a"] @ sides["b"]).T
    return model


def check_adapters(name: str, folder: Path) -> None:
    """Rows with one adapter, with another and with none in one pass, each as mlx-lm with the weights merged.

    An adapter that adds twice as much as a weight has makes a recurrent state so sensitive that mlx-lm's own logits of
    a whole prompt and of single tokens are 5e-4 apart: these add half as much as a weight has.
    """
    model = bridged(name)
    targets = targets_of(model)
    pool = AdapterPool(model, AdapterStore(folder))
    made = {which: tiny.adapter(model, rank, rank, targets, size=0.25) for which, rank in (("one", 2), ("two", 5))}
    for which, weights_ in made.items():
        pool.save(which, weights_, {})
    rows = prompts()
    wanted = [reference(network(name)[0], rows[0]), *(reference(merged(name, made[w]), rows[i + 1]) for i, w in
              enumerate(("one", "two")))]  # fmt: skip
    given = pool.rows([0, pool.acquire("one"), pool.acquire("two")])
    decoder = model.decoder
    found = np.array(decoder.logits(decoder(mx.array(rows), adapters=given)))
    for index in range(3):
        assert_close(found[index], wanted[index])
    assert np.abs(wanted[1] - reference(network(name)[0], rows[1])).max() > 0.01, "an adapter changes something"


def targets_of(model: LoadedModel) -> tuple[str, ...]:
    """The last names of all layers that an adapter may change."""
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in model.linear_shapes}))


def check_training(name: str) -> None:
    """A falling loss over ten steps, a gradient as differences give it, and a run that goes on as if never killed."""
    model = bridged(name)
    run = trainer(model, targets=targets_of(model))
    losses, middle = [], None
    for report in run.run():
        if report is not None:
            losses.append(report.loss)
        if report is not None and report.step == STEPS // 2:
            middle = run.state
    assert losses[-1] < 0.9 * losses[0], losses
    assert middle is not None
    again = trainer(bridged(name), targets=targets_of(model))
    again.state = again.anchor = middle
    for _ in again.run():
        pass
    assert mx.array_equal(again.state.weights, run.state.weights)
    check_gradient(run)


def trainer(model: LoadedModel, **options: Any) -> Trainer:
    """A short run that learns the prompts by heart."""
    asked = tiny.asking(**{"steps": STEPS, "batch_size": 3, "learning_rate": 0.02, "rank": 4, **options})
    return Trainer(model.decoder, asked, examples())


def examples() -> list[TokenizedExample]:
    return [TokenizedExample.of([(row[:4], False), (row[4:20], True)]) for row in prompts()]


def check_gradient(run: Trainer) -> None:
    """The slope along the gradient, by differences; and the same gradient where each layer's input alone is kept.

    The choice of experts jumps, and a step may cross such a jump: at one of three points at least none does.
    """
    batch = _arrays(collate(examples(), 1))

    def loss(weights_: mx.array) -> mx.array:
        return run.objective.training_loss(weights_, mx.array([0, 1], dtype=mx.uint32), *batch)

    slopes = []
    for share in (1.0, 0.9, 0.8):
        point = share * run.state.weights
        gradient = mx.grad(loss)(point)
        size = mx.linalg.norm(gradient)
        step = 0.02 / size * gradient / size
        slopes.append(float((loss(point + step) - loss(point - step)) / 0.04))
    assert any(abs(slope - 1.0) < 0.1 for slope in slopes), f"{slopes} of the slope"
    saving = run.request.model_copy(update={"gradient_checkpointing": True})
    run.objective.request = saving
    apart = float(mx.max(mx.abs(mx.grad(loss)(point) - gradient)))
    assert apart < 1e-3 * max(1.0, float(mx.max(mx.abs(gradient)))), f"{apart} apart where inputs alone are kept"
