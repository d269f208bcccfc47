"""One new token a row is turned as `mx.fast.rope` turns it, by angles that all layers of a compiled pass share."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from engine.models.rope import LinearScaling, Llama3, Rope, Scaling, Yarn

SCALINGS = {
    "plain": None,
    "linear": LinearScaling(4.0),
    "llama3": Llama3(8.0, 1.0, 4.0, 64),
    "yarn": Yarn(4.0, 1.0, 3.0, 1.1),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_token_alone_is_turned_as_it_is_among_others(scaling: Scaling, dtype: mx.Dtype) -> None:
    rope, offset = Rope(16, 10_000.0, scaling), mx.array([0, 7, 5000], mx.int32)
    x = mx.array(np.random.default_rng(0).normal(size=(3, 2, 2, 16)).astype(np.float32)).astype(dtype)
    alone, among = rope(x[:, :, :1], offset), rope(x, offset)[:, :, :1]
    assert alone.dtype == dtype
    # Where several tokens are turned, MLX does it. At position 5,000 the last bit of a frequency turns by 6e-4.
    np.testing.assert_allclose(
        np.array(alone.astype(mx.float32)),
        np.array(among.astype(mx.float32)),
        atol=2e-3 if dtype == mx.float32 else 2e-2,
    )
    if dtype == mx.float32:
        assert float(mx.abs(alone - among)[:2].max()) < 2e-6


def test_layers_of_a_compiled_pass_share_their_angles(tmp_path: Path) -> None:
    rope, x = Rope(16, 10_000.0), mx.ones((1, 2, 1, 16))

    def two_layers(x: mx.array, y: mx.array, offset: mx.array) -> list[mx.array]:
        return [rope(x, offset), rope(y, offset)]

    made = mx.compile(two_layers)(x, x + 1.0, mx.array([3], mx.int32))
    mx.export_to_dot(str(tmp_path / "graph.dot"), *made)
    graph = (tmp_path / "graph.dot").read_text("utf-8")
    assert (graph.count('"Cos"'), graph.count('"Sin"')) == (1, 1)
