"""Metal text to a shared object, by g++; kept by its hash, so that a text is compiled once on a machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kernels.emulator.trace import Launch

RUNTIME = Path(__file__).parent / "runtime"
#: Where compiled kernels are kept; None: in the user's cache.
_folder: Path | None = None
#: Strict: a conversion that Metal makes silently and CUDA refuses, or a double, is an error.
_FLAGS = ("-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing")
_KERNEL_FLAGS = (
    *("-g1", "-Wall", "-Wextra", "-Werror", "-Wdouble-promotion", "-Wfloat-conversion", "-Wshadow"),
    *("-Wno-attributes", "-Wno-unused", "-Wno-unknown-pragmas", "-Wno-sign-compare"),
)

_ARRAY = re.compile(r"\bthreadgroup\s+((?:metal::)?[\w:]+(?:<[^;<>]*>)?)\s+(\w+)\s*((?:\[[^\]]+\])+)\s*;")
_BUFFER = re.compile(r"(const )?(?:device|constant) (atomic<\w+>|\w+)([*&]) (\w+) \[\[buffer\((\d+)\)\]\]")
_ATTRIBUTE = re.compile(r"\w+ (\w+) \[\[\w+\]\]")


class CompileError(ValueError):
    """The text is not a kernel that all back-ends take; the message is the compiler's."""


@dataclass(frozen=True)
class Built:
    """A compiled kernel."""

    library: Path
    #: Names of the buffers, in the order of MLX's signature.
    buffers: tuple[str, ...]
    #: The lines before MLX's signature and those of the body, as reports quote them.
    header: tuple[str, ...]
    body: tuple[str, ...]


def keep_in(folder: Path) -> None:
    """From now on compiled kernels are kept there."""
    global _folder
    _folder = folder
    _runtime.cache_clear()


def available() -> bool:
    """Whether there is a compiler."""
    return shutil.which("g++") is not None


def build(launch: Launch, *, checked: bool = True) -> Built:
    """Compile `launch`; with `checked`, every load and store goes through the shadow memory. Raises `CompileError`."""
    text, buffers, header, body = _translate(launch)
    flags = [*_FLAGS, *_KERNEL_FLAGS, *(("-Og", "-fsanitize=thread") if checked else ("-O2",))]
    runtime = _runtime()
    digest = _digest(text, *flags, runtime.name, (RUNTIME / "metal.hpp").read_text("utf-8"))

    def compile_to(output: Path, folder: Path) -> None:
        source, objects = folder / "kernel.cpp", folder / "kernel.o"
        source.write_text(text, "utf-8")
        _gcc(*flags, f"-I{RUNTIME}", "-c", str(source), "-o", str(objects))
        # No libtsan: the runtime supplies the sanitizer's hooks.
        _gcc("-shared", str(objects), str(runtime), "-o", str(output), "-lm")

    library = _kept(f"{launch.name[:40]}-{digest}.so", compile_to)
    return Built(library, buffers, tuple(header.split("\n")), tuple(body.split("\n")))


def build_all(launches: Iterable[Launch], *, checked: bool = True) -> None:
    """Compile several at once, for the sake of time: `build` then finds them. Errors are left for `build` to raise."""

    def attempt(launch: Launch) -> None:
        with contextlib.suppress(CompileError):
            build(launch, checked=checked)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(attempt, launches))


def address_space_errors(launch: Launch, clang: Iterable[str]) -> list[str]:
    """What a compiler that knows address spaces has against the text; g++ takes all pointers for the same."""
    text = _translate(launch)[0].rsplit('\nextern "C" void entry', 1)[0]
    text = re.sub(r"template \[\[host_name.*?\[\[kernel\]\] ", "template ", text)
    options = (
        "-fsyntax-only",
        "-std=c++17",
        "-DEMULATOR_SYNTAX_ONLY",
        "-Wno-unknown-attributes",
        "-Wno-undefined-inline",
    )
    command = [*clang, *options, "-Wno-undefined-internal", f"-I{RUNTIME}", "-x", "c++", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return [line for line in done.stderr.splitlines() if "error:" in line]


def _translate(launch: Launch) -> tuple[str, tuple[str, ...], str, str]:
    """The C++ text, the buffers' names, and MLX's text before and after its signature.

    MLX's text stays as it is except for the declarations of threadgroup arrays; `#line` makes positions count from the
    body's own first line.
    """
    header, rest = launch.source.split(f"[[kernel]] void {launch.name}(\n", 1)
    signature, body = rest.split(") {\n", 1)
    arguments, buffers = [], []
    for parameter in signature.split(",\n"):
        if buffer := _BUFFER.fullmatch(parameter.strip()):
            const, type_name, reference, name, index = buffer.groups()
            arguments.append(f"{'*' if reference == '&' else ''}({const or ''}{type_name}*)buffers[{index}]")
            buffers.append(name)
        elif attribute := _ATTRIBUTE.fullmatch(parameter.strip()):
            arguments.append(f"attributes->{attribute[1]}")
        else:
            raise CompileError(f"MLX's signature of {launch.name} has a parameter of an unknown form: {parameter!r}")
    instance = re.search(r"template \[\[host_name.*?decltype\((.*?)\) ", body, re.DOTALL)
    kernel = f'{header}[[kernel]] void {launch.name}(\n{signature}) {{\n#line 1 "body"\n{body}'
    kernel = _ARRAY.sub(lambda m: f"THREADGROUP_ARRAY({m[1]}, {m[2]}, {m[3]});", kernel)
    call = f"{instance[1] if instance else launch.name}({', '.join(arguments)})"
    entry = f'extern "C" void entry(void** buffers, const Attributes* attributes) {{ {call}; }}\n'
    return f'#include "metal.hpp"\n#line 1 "header"\n{kernel}\n{entry}', tuple(buffers), header, body


@cache
def _runtime() -> Path:
    digest = _digest((RUNTIME / "runtime.cpp").read_text("utf-8"), (RUNTIME / "abi.h").read_text("utf-8"), *_FLAGS)
    source = str(RUNTIME / "runtime.cpp")
    return _kept(f"runtime-{digest}.o", lambda output, _: _gcc(*_FLAGS, "-O2", "-c", source, "-o", str(output)))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def _kept(name: str, make: Callable[[Path, Path], None]) -> Path:
    """The cached file `name`, made by `make(output, folder to work in)` if it is absent; safe between processes."""
    root = _folder or Path.home() / ".cache" / "stoker" / "kernels"
    path = root / name
    if path.exists():
        return path
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        output = Path(folder) / name
        make(output, Path(folder))
        output.replace(path)
    return path


def _gcc(*arguments: str) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(done.stderr[:4000])
