"""Whether `mx.compile` fuses on this machine."""

from __future__ import annotations

import functools
import logging

import mlx.core as mx

from engine.platform import gxx, preamble

log = logging.getLogger(__name__)


def on_cpu() -> bool:
    """Whether arrays are computed on the CPU back-end here."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


@functools.cache
def fuses_on_cpu() -> bool:
    """Whether the CPU back-end can compile fused loops here: it runs g++, once a kernel, and keeps the result.

    Without g++ MLX runs a compiled function operation by operation, which is right, and slower than a plain call of
    `mx.exp`; with a g++ that does not work (no headers, a folder that forbids execution) it raises, so compiling is
    then switched off for the process.
    """
    if gxx.found() is None:
        log.warning("no g++: MLX's CPU back-end runs without fused kernels, about half as fast")
        return False
    preamble.compile_once()
    try:
        mx.eval(mx.compile(lambda x: mx.abs(x) * 0.75 + 0.25)(mx.zeros((3,))))
    except RuntimeError as error:
        log.warning("g++ does not work (%s): MLX's CPU back-end runs without fused kernels", str(error)[:200])
        mx.disable_compile()
        return False
    return True
