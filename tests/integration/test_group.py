"""A worker of several processes over loopback: what one process makes, and what happens when one of them is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints.loading import LoadedModel, load
from engine.training.data import allowed_length, tokenize
from engine.training.run import TrainingRun
from stoker import Client
from stoker.broker.outcome import JobStatus
from stoker.contract import TrainReport, TrainRequest
from stoker.contract.dataset import TrainInput, iterate_lines
from stoker.contract.presence import node_of
from stoker.local.broker import EmbeddedBroker
from stoker.local.process import Process
from stoker.local.stack import Stack
from stoker.settings import Settings
from tests import endless
from tests.chaos.fleet import GENERATE, processes
from tests.conftest import alive, stack_settings, wait_until
from tests.endless import CHECKPOINTS
from tests.engine import shared_model
from tests.integration.cable import Cable
from workers.ending import EXIT_CODE
from workers.group.channel import SILENCE
from workers.group.starting import LOOPBACK, free_ports

pytestmark = pytest.mark.integration

#: Micro-batches of three examples, three a step: of two ranks each has one, and its part of the third.
OPTIONS: dict[str, Any] = {
    "model": GENERATE, "steps": 6, "rank": 4, "batch_size": 3, "accumulation": 3, "max_length": 32, "dropout": 0.1,
    "checkpoint_every": 2, "held_out": 0.25, "eval_every": 2, "seed": 3, "learning_rate": 2e-3,
}  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return written(tmp_path / "rows.jsonl", "ab ")


def written(path: Path, words: str) -> Path:
    """A dataset of so many of these words, more or less often."""
    path.write_text("".join(json.dumps({"text": words * (1 + n % 7)}) + "\n" for n in range(16)))
    return path


@contextmanager
def group(home: Path, ranks: int, *, shard: bool = False, model: Path | None = None) -> Iterator[Stack]:
    """A worker of so many ranks, with a broker of its own. `model`: its files; None: those of `endless`."""
    models = (f"{GENERATE}={model or endless.write(home)}",)
    settings = stack_settings(home / "home", models=models, ranks=ranks, shard=shard, grace=1.0)
    with Stack(settings, flower=False, own_broker=True) as stack:
        stack.wait_until_warm()
        yield stack


def alone(rows: Path, model: LoadedModel, folder: Path, **options: Any) -> list[TrainReport]:
    """What one process makes of it, in this one."""
    request = TrainRequest(name="alone", dataset="dataset:x", **{**OPTIONS, **options})
    lines = iterate_lines(TrainInput(rows).lines(), "dataset")
    examples = tokenize(lines, model.tokenizer, allowed_length(request, model.context))
    run, reports = TrainingRun(model, request, examples, folder), list[TrainReport]()
    while not run.finished:
        report = run.advance()
        reports += [] if report is None else [report]
    return reports


def same(found: list[TrainReport], wanted: list[TrainReport]) -> None:
    """Within what the order of a sum makes of float32."""
    assert [(report.index, report.step) for report in found] == [(report.index, report.step) for report in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-4)
        assert (ours.held_out_loss is None) == (theirs.held_out_loss is None)
        assert (ours.held_out_loss or 0.0) == pytest.approx(theirs.held_out_loss or 0.0, rel=1e-5)
        assert (ours.tokens, ours.learning_rate, ours.epoch) == (theirs.tokens, theirs.learning_rate, theirs.epoch)


def made_of(report: TrainReport) -> dict[str, Any]:
    """What a report says of the run, and not of the machine."""
    return report.model_dump(exclude={"tokens_per_second", "memory_bytes", "published"})


def ranks_of(stack: Stack) -> list[int]:
    """The process of each rank, rank 0 first."""
    with Client(settings=stack.settings) as client:
        (presence,) = client.workers()
    here = str(stack.settings.logs)
    guards = {pid: args for pid, args in processes() if "workers.rank" in args and "guard.py" in args and here in args}
    found = {args.partition("/rank-")[2].partition(".")[0]: pid for pid, args in guards.items()}
    return [presence.pid, *(child_of(found[number]) for number in sorted(found))]


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@pytest.mark.timeout(120)
def test_a_run_on_two_ranks_makes_what_it_makes_on_one_while_rank_0_serves_streams(tmp_path: Path, rows: Path) -> None:
    with group(tmp_path, 2) as stack, Client(settings=stack.settings) as client:
        job = client.train("style", dataset=rows, **OPTIONS)
        text = client.generate("ab", model=GENERATE, max_tokens=40, seed=1).result(timeout=60).text
        found = list(job.progress(timeout=60))
        assert job.result(timeout=60).last_loss == found[-1].loss
        assert text
        (presence,) = client.workers()
        assert presence.place == "cpu, 2 ranks"
        pids = ranks_of(stack)
        assert len(set(pids)) == 2
    assert not [pid for pid in pids if alive(pid)]
    same(found, alone(rows, load(GENERATE, [str(tmp_path / endless.MODEL)]), tmp_path / "alone"))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_ends_the_group_and_its_run_goes_on_when_that_is_back(
    tmp_path: Path, rows: Path, lost: int, how: signal.Signals
) -> None:
    options = {**OPTIONS, "steps": 20, "checkpoint_every": 5}
    with group(tmp_path, 3) as stack, Client(settings=stack.settings) as client:
        job = client.train("style", dataset=rows, **options)
        pids = ranks_of(stack)
        reports = job.progress(timeout=90)
        found = [next(reports) for _ in range(7)]
        os.kill(pids[lost], how)
        assert stack.worker is not None
        ended = stack.worker
        # Rank 0 may be the one that does not see it.
        code = wait_until(lambda: ended.returncode, "the worker ends", seconds=2 * SILENCE)
        assert code in (70, 128 + signal.SIGKILL)
        wait_until(lambda: not [pid for pid in pids if alive(pid)], "no rank is left", seconds=5)
        stack.start_worker()
        found += list(reports)
        assert job.result(timeout=60).steps == 20
        calm = list(client.train("calm", dataset=rows, **options).progress(timeout=90))
        log = (stack.settings.logs / "worker.log").read_text()
    assert lost == 0 or f"rank {lost} on" in log
    assert [made_of(report) for report in found] == [made_of(report) for report in calm]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ranks_whose_cable_is_cut_end_and_their_run_goes_on_when_the_group_is_back(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two hosts: neither rank sees the other's process, and nothing says that the cable is cut."""
    options = {**OPTIONS, "steps": 120, "checkpoint_every": 20}
    models = (f"{GENERATE}={endless.write(tmp_path)}",)
    settings = stack_settings(tmp_path / "home", models=models, group="studio", grace=1.0)
    with ExitStack() as leaving:
        first, cable = two_hosts(leaving, settings, monkeypatch)
        stack = leaving.enter_context(Stack(settings, flower=False, own_broker=True))
        stack.wait_until_warm()
        client = leaving.enter_context(Client(settings=stack.settings))
        job = client.train("style", dataset=rows, **options)
        reports = job.progress(timeout=90)
        found = [next(reports) for _ in range(7)]
        cable.cut()
        assert stack.worker is not None
        ended = stack.worker
        assert wait_until(lambda: ended.returncode, "rank 0 ends", seconds=2 * SILENCE) == EXIT_CODE
        assert wait_until(lambda: first.returncode, "rank 1 ends", seconds=2 * SILENCE) == EXIT_CODE
        assert job.status() is JobStatus.RUNNING, "the cable was cut in the middle"
        two_hosts(leaving, settings, monkeypatch)
        stack.start_worker()
        found += list(reports)
        calm = list(client.train("calm", dataset=rows, **options).progress(timeout=90))
        assert "no sign of life" in (stack.settings.logs / "worker.log").read_text()
    assert [made_of(report) for report in found] == [made_of(report) for report in calm]


def two_hosts(leaving: ExitStack, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> tuple[Process, Cable]:
    """Rank 1 of a group whose rank 0 is the next worker, and the cable over which all goes between them."""
    cable = Cable()
    leaving.callback(cable.close)
    ports = free_ports(2)
    files = []
    for rank in range(2):
        # Each has its own port, and reaches the other's by the cable.
        seen = [port if number == rank else cable.port_to(port) for number, port in enumerate(ports)]
        # Next to the home: in a folder of other things none is made.
        files.append(settings.home.with_name(f"hosts-{cable.port}-{rank}.json"))
        files[rank].write_text(json.dumps([[f"{LOOPBACK}:{port}"] for port in seen]))
    monkeypatch.setenv("MLX_HOSTFILE", str(files[0]))
    monkeypatch.setenv("MLX_RANK", "0")
    env = {"STOKER_URL": "", "CABLE": str(cable.port), "MLX_HOSTFILE": str(files[1]), "MLX_RANK": "1"}
    command = [sys.executable, "-m", "tests.integration.apps.relayed_rank"]
    log = settings.logs / "rank-1.log"
    follower = Process("rank 1", command, log=log, env={**settings.environment(), **env}, grace=1.0)
    leaving.callback(follower.stop)
    return follower, cable


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("what", "lost", "how"),
    [
        *(("heads", lost, how) for lost in (0, 1) for how in (signal.SIGKILL, signal.SIGSTOP)),
        ("layers", 0, signal.SIGSTOP),
        ("layers", 1, signal.SIGKILL),
    ],
)
def test_what_ranks_that_share_a_model_do_goes_on_when_a_lost_group_is_back(
    tmp_path: Path, rows: Path, what: str, lost: int, how: signal.Signals
) -> None:
    asked: dict[str, Any] = {
        "model": GENERATE, "max_tokens": 600, "temperature": 1.5, "seed": 5, "ignore_eos": True,
    }  # fmt: skip
    longer = {"steps": 20, "checkpoint_every": 5}
    options = {**OPTIONS, **longer}
    model = None
    if what == "layers":
        model, rows = shared_model.write(tmp_path / "odd", shared_model.ODD), written(rows, "t3 t11 t7 ")
    with group(tmp_path, 2, shard=True, model=model) as stack, Client(settings=stack.settings) as client:
        (worker,) = client.workers()
        assert [state.shared for state in worker.states] == [what]
        calm = client.generate("ab", **asked).result(timeout=60)
        reports = client.train("style", dataset=rows, **options).progress(timeout=120)
        trained = list(islice(reports, 7))
        job = client.generate("ab", **asked)
        stream = job.stream(timeout=90)
        found = [next(stream) for _ in range(20)]
        os.kill(ranks_of(stack)[lost], how)
        assert stack.worker is not None
        ended = stack.worker
        code = wait_until(lambda: ended.returncode, "the worker ends", seconds=2 * SILENCE)
        assert code in (70, 128 + signal.SIGKILL)
        stack.start_worker()
        found += list(stream)
        assert job.result(timeout=60).token_ids == calm.token_ids
        trained += list(reports)
    files = model or tmp_path / endless.MODEL
    same(trained, alone(rows, load(GENERATE, [str(files)]), tmp_path / "alone", **longer))
    assert [token.index for token in found] == list(range(600))
    assert tuple(token.token_id for token in found) == calm.token_ids


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_mlx_launch_starts_a_group_and_another_model_is_refused_by_name(tmp_path: Path, rows: Path) -> None:
    model = endless.write(tmp_path)
    broker = EmbeddedBroker(stack_settings(tmp_path / "home"), port=0)
    command = [str(Path(sys.executable).parent / "stoker"), "worker", "--group", "studio"]
    launch = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "-p", str(free_ports(1)[0])]
    env = {**os.environ, "STOKER_URL": broker.start(), "STOKER_HOME": str(tmp_path / "home")}
    try:
        with (
            launched([*launch, "--", *command, "--model", f"{GENERATE}={model}"], env),
            Client(env["STOKER_URL"]) as client,
        ):
            (presence,) = wait_until(client.workers, "it is warm", seconds=180)
            assert (presence.ranks, node_of(presence.worker).partition("@")[0]) == (2, "studio")
            job = client.train("style", dataset=rows, **{**OPTIONS, "steps": 2})
            assert job.result(timeout=60).steps == 2
        # Rank 1 has another model than rank 0.
        other = f"{GENERATE}={CHECKPOINTS / 'qwen2-tied'}"
        script = f'[ "$MLX_RANK" = 1 ] && export STOKER_MODELS="{other}"; exec "$@"'
        env["STOKER_MODELS"] = f"{GENERATE}={model}"
        with launched([*launch, "--", "bash", "-c", script, "rank", *command], env) as process:
            said, _ = process.communicate(timeout=180)
        assert "rank 1: weights" in said
        assert f"given of model {GENERATE}; rank 0 has weights" in said
    finally:
        broker.stop()


@contextmanager
def launched(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.communicate(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
