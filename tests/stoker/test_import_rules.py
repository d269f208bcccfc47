"""Importing the client loads no engine and no worker: the line that the project promises, word for word."""

from __future__ import annotations

import graphlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

PROMISE = (
    "import stoker,sys; assert not {m.split('.')[0] for m in sys.modules} & "
    "{'mlx','tasks','workers','engine','kernels'}"
)


def test_importing_stoker_loads_neither_mlx_nor_worker_code() -> None:
    subprocess.run([sys.executable, "-c", PROMISE], check=True)


def test_the_command_line_loads_neither_mlx_nor_worker_code() -> None:
    subprocess.run([sys.executable, "-c", PROMISE.replace("import stoker", "import stoker.cli")], check=True)


def test_importing_the_workers_app_loads_no_mlx(tmp_path: Path) -> None:
    """Flower and `celery inspect` import it on machines that hold no model."""
    code = "import workers.celery.app, sys; assert 'mlx' not in sys.modules and 'engine' not in sys.modules"
    env = {**os.environ, "STOKER_URL": "redis://broker.example/0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_no_module_imports_itself_through_others() -> None:
    """`TYPE_CHECKING` counts. import-linter sees circles of siblings, none between a package and a module within it."""
    graph = grimp.build_graph(
        "engine", "kernels", "stoker", "tasks", "workers", exclude_type_checking_imports=False, cache_dir=None
    )
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert sum(map(len, imports.values())) > 100
    graphlib.TopologicalSorter(imports).prepare()


#: What takes long to load, or what a client does not need at all.
HEAVY = {"redis", "hiredis", "numpy", "safetensors", "celery", "kombu", "rich", "matplotlib", "pyarrow", "tokenizers"}
#: And what a client needs only when it is made.
LATE = {*HEAVY, "pydantic_settings"}


def loaded(code: str, heavy: set[str] = HEAVY) -> set[str]:
    """The heavy packages that a program has loaded at its end."""
    said = f"{code}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}} & {heavy!r}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", said], check=True, capture_output=True, text=True)
    return set(done.stderr.split())


IMPORTS = ["Client", "AsyncClient", "GenerateResult", "StokerError", "JobStatus", "TrainJob", "AsyncTrainJob"]


def test_a_program_that_imports_the_client_loads_what_is_heavy_when_it_needs_it() -> None:
    assert loaded(f"from stoker import {', '.join(IMPORTS)}", LATE) == set()


def test_a_client_that_is_made_has_loaded_redis_and_no_numpy() -> None:
    made = "from stoker import Client; Client('redis://127.0.0.1:1/0').close()"
    assert loaded(made) == {"redis", "hiredis"}
    decoded = (
        "from stoker.contract import vectors as v; import numpy as np; v.load(v.save(np.ones((1, 2), 'f4'), 'int8'))"
    )
    assert loaded(decoded) == {"numpy", "safetensors"}


COMMANDS: dict[str, set[str]] = {"--version": set(), "--help": set(), "embed --help": set(), "models list": set()}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_loads_only_what_it_needs(words: str) -> None:
    code = (
        f"import sys; sys.argv[1:] = {words.split()!r}\n"
        "import stoker.cli\n"
        "try: stoker.cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code"
    )
    assert loaded(code) == COMMANDS[words]


def test_the_version_is_printed_without_the_command_tree() -> None:
    code = "import sys; sys.argv[1:] = ['--version']; import stoker.cli; stoker.cli.main(); "
    code += "assert not {'typer', 'pydantic', 'stoker.cli.commands'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert re.fullmatch(r"stoker \d+\.\d+\.\d+\n", done.stdout)


def test_a_command_without_its_extra_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['typer'] = None; sys.argv[1:] = ['status']; import stoker.cli; stoker.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "stoker: typer is missing, which the command needs: pip install '.[cli]', from a checkout.\n"
    assert done.returncode == 2


def test_the_monitor_without_its_extra_says_how_to_install_it_and_loads_no_mlx_with_it() -> None:
    code = "import sys; sys.modules['flower'] = None; sys.argv[1:] = ['flower']; import stoker.cli; stoker.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    needed = "pip install '.[monitor]', from a checkout"
    assert done.stderr == f"stoker: flower is missing, which the monitor needs: {needed}.\n"
    assert done.returncode == 2
    subprocess.run(
        [sys.executable, "-c", PROMISE.replace("import stoker", "import stoker.monitor.command")], check=True
    )


def test_the_gateway_without_its_extra_says_how_to_install_it_and_loads_no_mlx_with_it() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; sys.argv[1:] = ['serve']; import stoker.cli; stoker.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    needed = "pip install '.[gateway]', from a checkout"
    assert done.stderr == f"stoker: uvicorn is missing, which the gateway needs: {needed}.\n"
    assert done.returncode == 2
    subprocess.run(
        [sys.executable, "-c", PROMISE.replace("import stoker", "import stoker.gateway.command")], check=True
    )


def test_a_client_depends_on_no_package_of_the_worker_or_the_command() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[A-Za-z0-9_-]+", line)[0] for line in project["dependencies"]}  # type: ignore[index]
    assert names == {"redis", "numpy", "pydantic", "pydantic-settings", "safetensors", "typing_extensions"}
    worker = set(project["optional-dependencies"]["worker"])
    assert worker >= set(project["optional-dependencies"]["cli"]), "a worker is started by the command"
    assert {"celery==5.7.0", "kombu==5.7.0"} <= worker
    assert worker >= set(project["optional-dependencies"]["monitor"]), "`stoker up` starts the monitor"
    assert worker >= set(project["optional-dependencies"]["gateway"]), "and the gateway"
