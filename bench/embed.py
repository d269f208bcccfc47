"""Embeddings compared with their peers: `make bench-embed`; on a GPU `python -m bench.embed --gpu --out DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.report import RESULTS


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench.embed", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="16 bits on the GPU at hand, random weights, no broker")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows of --gpu")
    options = parser.parse_args(arguments)
    if options.gpu:
        from bench import embed_gpu

        embed_gpu.main(options.out)
    else:
        from bench import embed_cpu

        embed_cpu.main()


if __name__ == "__main__":
    main()
