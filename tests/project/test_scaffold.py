"""The project's frame: what the wheel holds, what the lock files say, and that the other files are whole."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HASHED = ["runtime.txt", "dev.txt", "models.txt", "decoders.txt", "build.txt", "browser.txt"]

#: Put together here, so that this file does not hold what it looks for.
REGISTRY_HOSTS = [
    "pypi" + ".org",
    "python" + "hosted.org",
    "npmjs" + ".org",
    "npmjs" + ".com",
    "anaconda" + ".org",
    "ghcr" + ".io",
    "docker" + ".io",
    "index" + "-url =",
    "--index" + "-url",
    "--extra-index" + "-url",
    "--find" + "-links",
    "--trusted" + "-host",
]
#: Where a person's or a build machine's files lie; paths inside the image (/app, /src, /opt/venv, /var) are not meant.
LOCAL_PATHS = [
    r"/" + r"Users/[a-z]",
    r"/" + r"home/[a-z]",
    r"/" + r"root/",
    r"/" + r"work/",
    r"/" + r"tmp/[a-z]/",
    r"/" + r"opt/(?!venv\b|homebrew\b)[a-z]",
    r"file:" + r"///[a-z]",
]


def project_files() -> list[Path]:
    """Everything that is, or would be, committed."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def modules_of(node: ast.AST) -> list[str]:
    """The absolute module names that an import statement loads."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return [f"{node.module}.{alias.name}" if node.module == "stoker" else node.module for alias in node.names]
    return []


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", text_of(ROOT / "Makefile"), re.MULTILINE))


def test_the_wheel_holds_stoker_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"stoker"}
    assert "stoker/errors.py" in names
    assert "stoker/py.typed" in names, "type checkers read the annotations of a package that has it"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_engine_knows_only_the_contract_the_errors_and_the_files_of_stoker() -> None:
    """import-linter can forbid modules by name, and cannot say "all except these"."""
    allowed = ("stoker.contract", "stoker.errors", "stoker.files")
    imported = {
        (file.relative_to(ROOT).as_posix(), name)
        for file in (ROOT / "engine").rglob("*.py")
        for node in ast.walk(ast.parse(text_of(file)))
        for name in modules_of(node)
        if name.split(".")[0] == "stoker"
    }
    assert not {(file, name) for file, name in imported if not name.startswith(allowed)}


def test_the_engine_the_kernels_and_the_tasks_read_no_environment() -> None:
    """Settings are given when a process starts: `workers/` and `stoker/settings.py` read them."""
    read = {
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for package in ("engine", "kernels", "tasks")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(text_of(file)))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb"))
        or (isinstance(node, ast.alias) and node.name in ("environ", "environb", "getenv", "getenvb"))
    }
    assert not read


def test_texts_are_read_and_written_as_utf_8_in_every_locale() -> None:
    """Without an encoding Python takes the locale's: a script with an arrow in a comment ends `stoker up` in Japan."""
    places = {"read_text": 1, "write_text": 2}
    found = {
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for package in ("stoker", "tasks", "workers", "engine", "kernels", "bench")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(text_of(file)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if len(node.args) < places.get(node.func.attr, 0) and all(given.arg != "encoding" for given in node.keywords)
    }
    assert not found


def test_no_file_names_a_registry() -> None:
    found = [
        f"{file.relative_to(ROOT)}: {host}"
        for file in project_files()
        for host in REGISTRY_HOSTS
        if host in text_of(file)
    ]
    assert not found


def test_no_file_names_a_path_of_one_machine() -> None:
    pattern = re.compile("(?<![A-Za-z0-9_.@}~-])(?:" + "|".join(LOCAL_PATHS) + ")")
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}" for file in project_files() for match in pattern.finditer(text_of(file))
    ]
    assert not found


@pytest.mark.parametrize("name", HASHED)
def test_every_locked_requirement_is_pinned_and_hashed(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert lines
    for line in lines:
        assert re.match(r"[a-z0-9][a-z0-9._-]*==[^ ;]+", line), line
        assert "--hash=sha256:" in line, line
        assert "://" not in line, line


def test_the_lock_holds_the_exact_pins_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["worker"]]
    pins = {re.sub(r"\[.*?\]", "", line.split(";")[0].strip()) for line in requirements if "==" in line.split(";")[0]}
    assert {"celery==5.7.0", "kombu==5.7.0", "redis==8.1.0", "mlx==0.32.4"} <= pins
    for name in ("runtime.txt", "dev.txt"):
        locked = (ROOT / "requirements" / name).read_text(encoding="utf-8")
        missing = [pin for pin in pins if not re.search(rf"^{re.escape(pin)}(?![0-9.])", locked, re.MULTILINE)]
        assert not missing, name


def test_the_lock_covers_linux_and_macos() -> None:
    locked = (ROOT / "requirements" / "runtime.txt").read_text(encoding="utf-8")
    assert re.search(r"^mlx-metal==.*sys_platform == 'darwin'", locked, re.MULTILINE)
    assert re.search(r"^mlx-cpu==.*sys_platform == 'linux'", locked, re.MULTILINE)


def test_the_workflow_tests_both_systems_by_make() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert any("ubuntu" in job["runs-on"] for job in jobs.values())
    macos = "\n".join(step.get("run", "") for step in jobs["macos"]["steps"])
    assert "make test" in macos
    assert "stoker kernels check" in macos


def test_the_image_copies_only_what_dockerignore_lets_through() -> None:
    allowed = {line[1:] for line in text_of(ROOT / ".dockerignore").splitlines() if line.startswith("!")}
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", text_of(ROOT / "Dockerfile"), re.MULTILINE)
        for name in line.split()[:-1]
    }
    assert copied
    assert copied <= allowed


def test_the_continuous_integration_script_can_be_run() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_every_make_target_that_a_text_names_exists() -> None:
    texts = [ROOT / "README.md", ROOT / "deploy/README.md", ROOT / ".ci/run", *ROOT.glob("docs/**/*.md")]
    texts += [ROOT / ".github/workflows/ci.yml", ROOT / "requirements/README.md", ROOT / "tests/goldens/README.md"]
    named = {
        target
        for file in texts
        for target in re.findall(r"(?:`|^\s*(?:\$ |- run: )?)make ([a-z][a-z-]*)", text_of(file), re.MULTILINE)
    }
    assert {"check", "test"} <= named
    assert named <= make_targets()


def test_make_lists_its_targets() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    shown = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for target in ("demo", "test", "check", "bench-all", "clean"):
        assert f"make {target} " in shown


def test_an_old_python_is_refused_with_a_remedy(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.6" && exit 0\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    command = ["make", "venv", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "needs Python 3.11 or later" in refused.stderr
    assert "Python 3.9.6" in refused.stderr
    assert "PYTHON=" in refused.stderr


#: Words that the project's English does without, put together here so that this file does not hold them.
AVOIDED = (
    "who" + "ever",
    "what" + "ever",
    "which" + "ever",
    "some" + "body",
    "some" + "one",
    "any" + "body",
    "be" + "side",
    "so" + " long",
    "to" + "ld",
    "tel" + "l",
    "tel" + "ls",
)


def test_no_text_of_the_project_has_a_word_that_it_does_without() -> None:
    # A file's method keeps its name.
    word = re.compile(rf"(?<!\.)\b(?:{'|'.join(AVOIDED)})\b", re.IGNORECASE)
    # The goldens' texts stay as transformers was asked them.
    places = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in project_files()
        if file.parent != ROOT / "tests/goldens"
        if file.suffix in (".py", ".md", ".lua", ".metal", ".h", ".cpp")
        for number, line in enumerate(text_of(file).splitlines(), 1)
        if word.search(line)
    ]
    assert not places
