"""What MLX writes around a body is part of what was tested: an upgrade that changes it must be looked at.

To accept a change: delete `signatures/` and run this file twice.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.kernel import Kernel
from kernels.registry import KERNELS
from tests.kernels.conftest import body_of, launches

GOLDENS = Path(__file__).parent / "signatures"


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_mlx_wraps_a_body_as_it_did_when_it_was_written(kernel: Kernel) -> None:
    missing = []
    for launch in launches(kernel):
        before, rest = launch.source.split("[[kernel]] void ", 1)
        signature, body = rest.split(") {\n", 1)
        instance = body.rsplit("\ntemplate [[host_name", 1)[1]
        template = before.rstrip().rsplit("\n", 1)[-1]
        text = f"{template}\n[[kernel]] void {signature}) {{\n…\ntemplate [[host_name{instance}".rstrip() + "\n"
        golden = GOLDENS / f"{body_of(launch)}.txt"
        if not golden.exists():
            GOLDENS.mkdir(exist_ok=True)
            golden.write_text(text)
            missing.append(golden.name)
        assert text == golden.read_text()
    assert not missing, "they were not there; they are now: read them, and commit them"
