"""One kernel body, and its launch on each back-end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from kernels.backend import Backend, backend_for

#: Template parameters of a launch: names with integers, booleans or dtypes.
Template = Sequence[tuple[str, int | bool | mx.Dtype]]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Body:
    """The text `kernels/{kernel}/{name}.metal`, with the names of its buffers in order."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    #: Headers that it needs, as paths in `kernels/`.
    headers: tuple[str, ...] = ()
    #: The kernel that it belongs to, where that has several bodies; else one of its own name.
    of: str = ""

    @property
    def kernel(self) -> str:
        return self.of or self.name

    @cached_property
    def source(self) -> str:
        return (_HERE / self.kernel / f"{self.name}.metal").read_text("utf-8")

    @cached_property
    def header(self) -> str:
        return "\n".join((_HERE / name).read_text("utf-8") for name in self.headers)

    def launch(
        self,
        arrays: Sequence[mx.array],
        *,
        template: Template,
        groups: tuple[int, int],
        threads: int,
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    ) -> list[mx.array]:
        """Run it on `groups` (x, y) threadgroups of `threads` threads, a multiple of 32. The emulator is not lazy."""
        call = {
            "template": list(template),
            "grid": (groups[0] * threads, groups[1], 1),
            "threadgroup": (threads, 1, 1),
            "output_shapes": [shape for shape, _ in outputs],
            "output_dtypes": [dtype for _, dtype in outputs],
        }
        backend = backend_for(self.kernel)
        if backend == "emulator":
            from kernels.emulator import observe

            return observe.execute(lambda *inputs: self.metal(inputs=list(inputs), **call), arrays)
        result: list[mx.array] = self._function(backend)(inputs=list(arrays), **call)
        return result

    def _function(self, backend: Backend) -> Callable[..., Any]:
        if backend == "reference":
            raise ValueError(f"the body {self.name} was launched where no kernel runs; call its public function")
        return self.metal if backend == "metal" else self.cuda

    @cached_property
    def metal(self) -> Callable[..., Any]:
        function: Any = mx.fast.metal_kernel(
            name=self.name,
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=self.source,
            header=self.header,
        )
        made: Callable[..., Any] = function
        return made

    @cached_property
    def cuda(self) -> Callable[..., Any]:
        from kernels.cuda import text

        function: Any = mx.fast.cuda_kernel(
            name=self.name,
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=text.source(self.source),
            header=text.header(self.header),
        )
        made: Callable[..., Any] = function
        return made
