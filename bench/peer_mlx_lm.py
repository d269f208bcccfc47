"""mlx-lm as a child process: requests as lines of JSON in, times of tokens out. Run by `bench.generate`.

`python -m bench.peer_mlx_lm FOLDER`, where mlx-lm is installed and the checkout is on the path.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    # The same BLAS as on Stoker's side, without its own products; before MLX, which binds to what it finds.
    from engine.platform import blas

    report = blas.boot(library=os.environ.get("STOKER_BLAS", ""), own=False)
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator, generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(sys.argv[1]))
    mx.eval(model.parameters())

    def one(prompt: list[int], tokens: int) -> list[float]:
        began = time.perf_counter()
        return [time.perf_counter() - began for _ in generate_step(mx.array(prompt), model, max_tokens=tokens)]

    def many(prompts: list[list[int]], tokens: int) -> list[list[float]]:
        generator = BatchGenerator(model, max_tokens=tokens, completion_batch_size=len(prompts))
        began = time.perf_counter()
        indices = {uid: index for index, uid in enumerate(generator.insert(prompts))}
        times: list[list[float]] = [[] for _ in prompts]
        while any(len(line) < tokens for line in times):
            for response in generator.next_generated():
                times[indices[response.uid]].append(time.perf_counter() - began)
        generator.close()
        return times

    def answer(asked: dict[str, Any]) -> Any:
        prompts, tokens = asked["prompts"], asked["tokens"]
        return [one(prompts[0], tokens)] if len(prompts) == 1 else many(prompts, tokens)

    print(json.dumps({"blas": report.detail, "device": str(mx.default_device())}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
