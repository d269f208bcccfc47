"""Embeddings compared with their peers; on a GPU `python -m bench.embed --gpu`."""

from __future__ import annotations

import sys

from bench.report import parser


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--gpu", action="store_true", help="16 bits on the GPU at hand, random weights, no broker")
    options = made.parse_args()
    if options.gpu:
        from bench import embed_gpu

        return embed_gpu.main(options.out, quick=options.quick)
    from bench import embed_cpu

    return embed_cpu.main(options.out, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
