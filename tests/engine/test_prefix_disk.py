"""Prefixes on disk: a worker that starts again makes the same tokens, with less work; no file and no disk hurts it."""

from __future__ import annotations

import errno
import fcntl
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from engine.adapters.peft import CONFIG_FILE, WEIGHTS_FILE
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel, load
from engine.engine import Engine
from engine.generation.limits import LaneLimits
from engine.models.key_values import KeyValues
from engine.models.kv_sizes import KvSide, KvSizes, StateShape
from engine.models.llama import Llama
from engine.prefixes import entry_file, folder, shelf
from engine.prefixes.disk import DiskLimits, PrefixDisk
from engine.prefixes.folder import SHORTEST, PrefixFolder
from engine.prefixes.form import Form
from engine.prefixes.identity import Owners, model_identity
from engine.prefixes.memory import PrefixCache
from engine.prefixes.saver import TIMES_A_DAY, WAITING, Allowance, Saver, Saving
from engine.prefixes.shelf import LONG, RunInEngine, Shelf
from stoker.contract import GenerateRequest
from stoker.errors import WorkerUnavailable
from tests import endless, powercut
from tests.conftest import wait_until
from tests.engine import bridged, tiny
from tests.engine.test_generate_lane import Driver, Sent, request

SYSTEM = np.random.default_rng(1).integers(3, 60, 100).tolist()
ASKED = [[*SYSTEM, *np.random.default_rng(seed).integers(3, 60, 9).tolist()] for seed in range(2, 6)]
LIMIT = 64 << 20
FORM = Form.of(KvSizes([KvSide(2, 4, mx.float32)] * 2, [KvSide(2, 4, mx.float32)] * 2))
assert FORM is not None


def at_once(call: Callable[[], Any]) -> Any:
    return call()


def form_of(model: LoadedModel) -> Form:
    form = Form.of(model.decoder.kv_sizes)
    assert form is not None
    return form


class AtOnce(Saver):
    """Saves where it is asked to, in the engine's thread: a lane's next turn finds it done."""

    def note(self, saving: Saving) -> None:
        saving.save()


class Machine:
    """The disk of a machine, and workers of it."""

    def __init__(self, home: Path, limit: int = LIMIT) -> None:
        self.home, self.limit = home, limit
        self.store = AdapterStore(home / "adapters")

    @property
    def prefixes(self) -> Path:
        return self.home / "prefixes"

    @property
    def files(self) -> list[Path]:
        return sorted(self.prefixes.glob("*/*.safetensors"))

    def shelf(
        self, model: LoadedModel, identity: str = "weights", saver: Saver | None = None, run: RunInEngine = at_once
    ) -> Shelf:
        owners = Owners(identity, model.name, self.store)
        place = PrefixFolder(self.prefixes, self.limit, reserve=0)
        return Shelf(place, saver or AtOnce(), Allowance(self.limit), model, owners, form_of(model), run)

    def worker(self, model: LoadedModel, identity: str = "weights", **limits: Any) -> Worker:
        return Worker(model, AdapterPool(model, self.store), shelf=self.shelf(model, identity), **limits)


class Worker(Driver):
    def answers(self, prompts: Sequence[list[int]], **options: Any) -> list[Sent]:
        found = []
        for prompt in prompts:
            found.append(self.send(request(prompt, **{"max_tokens": 4, **options})))
            self.run()
        return found

    @property
    def hits(self) -> int:
        return self.lane.load.disk_hits


def cached(sent: Sent) -> int:
    return sent.result.usage.cached_tokens


@pytest.fixture
def model(tiny_llama: Llama) -> LoadedModel:
    return tiny.loaded(tiny_llama, eos_ids=[])


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def warm(machine: Machine, model: LoadedModel) -> Machine:
    """One whose disk has the system prompt."""
    machine.worker(model).answers(ASKED[:2])
    assert len(machine.files) == 1
    return machine


# --- what serves ---


@pytest.mark.parametrize("adapter", [None, "one"])
def test_a_worker_that_starts_again_reads_what_served_twice_and_makes_the_same_tokens(
    machine: Machine, model: LoadedModel, adapter: str | None
) -> None:
    AdapterPool(model, machine.store).save("one", tiny.adapter(model, 2, 1), {})
    first = machine.worker(model)
    first.answers(ASKED[:1], adapter=adapter)
    assert machine.files == [], "it may never come again"
    first.answers(ASKED[1:2], adapter=adapter)
    assert [len(machine.files), first.hits] == [1, 0]
    second = machine.worker(model)
    how: dict[str, Any] = {"adapter": adapter, "temperature": 0.8, "seed": 3}
    found = second.answers(ASKED[2:], **how)
    wanted = Worker(model, AdapterPool(model, machine.store)).answers(ASKED[2:], **how)
    assert [sent.ids for sent in found] == [sent.ids for sent in wanted]
    assert found[0].tokens == first.answers(ASKED[2:3], **how)[0].tokens, "to the bit as from memory"
    assert [cached(sent) for sent in found] == [len(SYSTEM), len(SYSTEM)]
    assert second.hits == 1, "the second prompt found it in memory"


@pytest.mark.parametrize("name", ["lfm2", "gpt_oss", "deepseek_v3"])
def test_other_architectures_read_theirs_and_recurrent_ones_whole(machine: Machine, name: str) -> None:
    model = bridged.bridged(name)
    asked = [[*SYSTEM, 7], [*SYSTEM, 7, *ASKED[0][-5:]], [*SYSTEM, 7, *ASKED[1][-5:]]]
    machine.worker(model).answers(asked[:2])
    assert len(machine.files) == 1
    second = machine.worker(model)
    (found,) = second.answers(asked[2:])
    (wanted,) = Worker(model, AdapterPool(model, machine.store)).answers(asked[2:])
    assert found.ids == wanted.ids
    assert [cached(found), second.hits] == [len(SYSTEM) + 1, 1]
    third = machine.worker(model)
    (other,) = third.answers([[*SYSTEM, 8]])
    served = [0, 0] if name == "lfm2" else [len(SYSTEM), 1]
    assert [cached(other), third.hits] == served, "a state cannot be taken back"


@pytest.mark.parametrize("name", ["lfm2", "gpt_oss"])
def test_a_beginning_in_pieces_comes_back_from_the_disk_as_it_was(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Several prompts left it; a portion of it is copied at a time."""
    model, numbers = bridged.bridged(name), np.random.default_rng(7).integers(3, 60, 90).tolist()
    monkeypatch.setattr(shelf, "COPIED", 1000)
    shelf_, first, again = machine.shelf(model), PrefixCache(LIMIT, whole=name == "lfm2"), PrefixCache(LIMIT)
    kv = KeyValues(model.decoder, 1, len(numbers))
    for arrays in (kv.keys, kv.values, kv.states):
        arrays[:] = [mx.random.normal(array.shape).astype(array.dtype) for array in arrays]
    for length in (70, 75, 90):
        first.put(None, [*numbers[:length], 1], kv.row(0, length))
        other = [*numbers[: length - 5], 2, 3, 4]
        first.put(None, other, KeyValues(model.decoder, 1, len(other)))
    first.put(None, numbers, kv)
    pieces = first.beginning(None, numbers)
    assert pieces is not None
    assert len(pieces) > 3
    shelf_.served(None, numbers, first)
    assert len(machine.files) == 1
    fetched = machine.shelf(model).fetch(None, [*numbers, 9], again)
    assert fetched is not None
    shelf_.take_in(fetched, again)
    (whole,) = again.kept
    stored = [KeyValues(model.decoder, 1, len(numbers)) for _ in range(2)]
    for one, of in zip(stored, (pieces, [whole]), strict=True):
        one.put_pieces(0, of, len(numbers))
    for left, right in zip(*(one.stored for one in stored), strict=True):
        assert all(mx.array_equal(*pair).item() for pair in zip(left, right, strict=True))


def test_a_long_prompt_is_kept_at_once_and_a_short_one_never(machine: Machine, model: LoadedModel) -> None:
    long = np.random.default_rng(8).integers(3, 60, LONG).tolist()
    worker = machine.worker(model)
    worker.answers([long])
    assert len(machine.files) == 1
    short = SYSTEM[: SHORTEST - 1]
    worker.answers([[*short, 3, 4], [*short, 5, 6], [*short, 7, 8]])
    assert len(machine.files) == 1
    (again,) = machine.worker(model).answers([long])
    assert cached(again) == LONG - 1, "the last token goes through the model"


def test_completions_of_one_job_are_no_second_use(machine: Machine, model: LoadedModel) -> None:
    machine.worker(model, slots=2).answers(ASKED[:1], n=4, temperature=0.9, seed=1)
    assert machine.files == []


def test_what_the_disk_nearly_has_is_not_written_again(warm: Machine, model: LoadedModel) -> None:
    """Prompts that begin alike often share a few tokens more or less."""
    worker = warm.worker(model)
    worker.answers([[*SYSTEM, 9, 9, index] for index in range(3, 8)])
    assert len(warm.files) == 1


def test_another_model_or_adapter_reads_nothing(warm: Machine, model: LoadedModel) -> None:
    AdapterPool(model, warm.store).save("one", tiny.adapter(model, 2, 1), {})
    other = warm.worker(model, "other weights")
    assert [cached(sent) for sent in other.answers(ASKED[2:3])] == [0]
    adapted = warm.worker(model)
    assert [cached(sent) for sent in adapted.answers(ASKED[2:3], adapter="one")] == [0]
    assert [other.hits, adapted.hits] == [0, 0]


def test_a_version_that_was_made_anew_under_its_old_number_reads_nothing(machine: Machine, model: LoadedModel) -> None:
    pool = AdapterPool(model, machine.store)
    pool.save("one", tiny.adapter(model, 2, 1), {})
    old = machine.worker(model)
    old.answers(ASKED[:2], adapter="one")
    assert len(machine.files) == 1
    shutil.rmtree(machine.store.folder("tiny", "one", 1))
    AdapterPool(model, machine.store).save("one", tiny.adapter(model, 2, 9), {})
    new = machine.worker(model)
    (found,) = new.answers(ASKED[2:3], adapter="one")
    assert [cached(found), new.hits] == [0, 0]
    other = [token % 50 + 4 for token in SYSTEM]
    old.answers([[*other, 3], [*other, 4]], adapter="one")
    assert len(machine.files) == 1, "what is in its memory is not what those files say"


def test_an_adapter_is_named_by_what_is_in_both_of_its_files(machine: Machine, model: LoadedModel) -> None:
    names = set()
    for number, file in enumerate((WEIGHTS_FILE, CONFIG_FILE), 1):
        AdapterPool(model, machine.store).save("one", tiny.adapter(model, 2, 1), {}, number)
        names.add(Owners("weights", "tiny", machine.store).name(("one", number)))
        with (machine.store.folder("tiny", "one", number) / file).open("ab") as content:
            content.write(b" ")
        names.add(Owners("weights", "tiny", machine.store).name(("one", number)))
    assert len(names) == 3, "two copies, and each with one file changed"


def test_of_many_versions_those_used_longest_ago_are_forgotten_and_named_no_more(
    machine: Machine, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.prefixes.identity.MOST", 2)
    for version in (1, 2, 3):
        AdapterPool(model, machine.store).save("one", tiny.adapter(model, 2, version), {}, version)
    owners = Owners("weights", "tiny", machine.store)
    first, _, again, third = (owners.name(("one", version)) for version in (1, 2, 1, 3))
    assert owners.name(("one", 2)) is None, "its files may have become others since"
    assert [owners.name(("one", version)) for version in (1, 3)] == [first, third]
    assert first == again != third


def test_adapters_of_equal_files_share_an_entry_on_disk_and_not_in_memory(machine: Machine, model: LoadedModel) -> None:
    for name in ("one", "two"):
        AdapterPool(model, machine.store).save(name, tiny.adapter(model, 2, 1), {})
    machine.worker(model).answers(ASKED[:2], adapter="one")
    shelf_, cache = machine.shelf(model), PrefixCache(LIMIT)
    found = [shelf_.fetch((name, 1), ASKED[2], cache) for name in ("one", "two")]
    assert [None if each is None else each.adapter for each in found] == [("one", 1), ("two", 1)]


def test_requests_that_come_together_read_a_file_once(warm: Machine, model: LoadedModel) -> None:
    shelf_, cache = warm.shelf(model), PrefixCache(LIMIT)
    first, second = (shelf_.fetch(None, prompt, cache) for prompt in ASKED[2:])
    assert first is not None
    assert first is second
    shelf_.take_in(first, cache)
    assert second is not None
    shelf_.take_in(second, cache)
    assert [shelf_.hits, len(cache)] == [1, 1]
    assert shelf_.fetch(None, ASKED[2], cache) is None, "memory has it"


def test_memory_that_is_too_small_for_an_entry_leaves_it_on_the_disk(warm: Machine, model: LoadedModel) -> None:
    assert warm.shelf(model).fetch(None, ASKED[2], PrefixCache(1000)) is None
    worker = warm.worker(model, kv_bytes=100_000)
    assert [cached(sent) for sent in worker.answers(ASKED[2:3])] == [0]


def test_a_long_entry_is_not_read_for_the_little_that_is_shared(machine: Machine, model: LoadedModel) -> None:
    long = [*SYSTEM[:SHORTEST], *np.random.default_rng(8).integers(3, 60, 8 * SHORTEST).tolist()]
    machine.worker(model).answers([long])
    assert len(machine.files) == 1
    assert machine.shelf(model).fetch(None, ASKED[0], PrefixCache(LIMIT)) is None
    assert machine.shelf(model).fetch(None, long, PrefixCache(LIMIT)) is not None


def test_16_bits_come_back_as_they_were(machine: Machine) -> None:
    sizes = KvSizes([KvSide(2, 4, mx.bfloat16)], [KvSide(1, 8, mx.float16)], [StateShape((3, 2), mx.float32)])
    form = Form.of(sizes)
    assert form is not None
    assert [tensor.shape for tensor in form.tensors(5)] == [(1, 2, 5, 4), (1, 1, 5, 8), (1, 3, 2)]
    assert Form.of(KvSizes([KvSide(1, 1, mx.complex64)], [])) is None
    raw: list[np.ndarray] = [
        np.arange(40, dtype=np.uint16),
        np.arange(40, dtype=np.uint16),
        np.arange(6, dtype=np.uint32),
    ]
    path = machine.home / "entry.safetensors"
    tokens = np.arange(5, dtype=np.int32)
    entry_file.write(path, "owner", form, tokens, raw)
    found, arrays = entry_file.read(path, "owner", form, 5)
    assert found.tolist() == tokens.tolist()
    assert [array.ravel().tolist() for array in arrays] == [array.tolist() for array in raw]
    assert path.stat().st_size == entry_file.size("owner", form, 5)
    # Any reader of the format reads it.
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    assert {name: (array.dtype, array.shape) for name, array in loaded.items()} == {
        "tokens": (mx.int32, (5,)),
        "keys.0": (mx.bfloat16, (1, 2, 5, 4)),
        "values.0": (mx.float16, (1, 1, 5, 8)),
        "states.0": (mx.float32, (1, 3, 2)),
    }
    with safe_open(path, "np") as opened:
        assert opened.metadata()["owner"] == "owner"


# --- files that cannot serve ---


def cut(content: bytes) -> bytes:
    return content[:-1]


def grown(content: bytes) -> bytes:
    return content + b"\0"


def emptied(content: bytes) -> bytes:
    return b""


def header_alone(content: bytes) -> bytes:
    return content[:200]


def flipped(at: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        index = at(content)
        return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]

    return damage


def of_another_version(content: bytes) -> bytes:
    return content.replace(b'"stoker_prefix":"1"', b'"stoker_prefix":"0"')


def of_another_shape(content: bytes) -> bytes:
    return content.replace(b'"shape":[1,2,64,4]', b'"shape":[2,1,64,4]')


def of_another_owner(content: bytes) -> bytes:
    return content.replace(b'"owner":"owner"', b'"owner":"other"')


BAD = {
    "cut off": cut, "too long": grown, "empty": emptied, "a header that is cut off": header_alone,
    "another version": of_another_version, "another shape": of_another_shape, "another owner": of_another_owner,
    "the last number": flipped(lambda content: len(content) - 1),
    "a token": flipped(lambda content: 8 + int.from_bytes(content[:8], "little") + 40),
    "the header's length": flipped(lambda content: 0),
    "the digest": flipped(lambda content: content.index(b'"sha256":"') + 12),
    "a bracket": flipped(lambda content: 8),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_removed_with_one_line(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    entry(PrefixFolder(tmp_path, LIMIT, reserve=0), 5)
    (file,) = tmp_path.glob("*/*")
    content = file.read_bytes()
    assert damage(content) != content
    file.write_bytes(damage(content))
    place = PrefixFolder(tmp_path, LIMIT, reserve=0)
    assert [has(place, 5), has(place, 5), file.exists()] == [False, False, False]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"the kept prefix {file} is not used: it")
    assert entry(place, 5)
    assert has(place, 5), "one that is whole is used again"


def test_a_bad_file_is_never_used(warm: Machine, model: LoadedModel) -> None:
    (file,) = warm.files
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
    worker = warm.worker(model)
    (found,) = worker.answers(ASKED[2:3])
    (wanted,) = Worker(model, AdapterPool(model, warm.store)).answers(ASKED[2:3])
    assert found.tokens == wanted.tokens
    assert [cached(found), worker.hits, warm.files] == [0, 0, []]


def test_an_entry_under_the_name_of_another_is_not_used(warm: Machine, model: LoadedModel) -> None:
    (file,) = warm.files
    other = file.with_name(file.name.replace("100-", "100-")[:-44] + "0" * 32 + ".safetensors")
    file.rename(other)
    worker = warm.worker(model)
    worker.answers(ASKED[2:3])
    assert [worker.hits, other.exists()] == [0, False]


def test_a_file_that_cannot_be_read_now_stays(
    warm: Machine, model: LoadedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(entry_file, "read", refused)
    worker = warm.worker(model)
    assert [cached(sent) for sent in worker.answers(ASKED[2:3])] == [0]
    assert [len(caplog.records), len(warm.files)] == [1, 1]


def test_a_file_that_another_worker_removes_meanwhile_is_no_trouble(
    warm: Machine, model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    place = PrefixFolder(warm.prefixes, LIMIT)
    form, owner = form_of(model), Owners("weights", "tiny", warm.store).name(None)
    assert owner is not None
    found = place.find(owner, np.array(ASKED[2], dtype=np.int32), form)
    assert found is not None
    shutil.rmtree(warm.prefixes)
    assert place.read(found, form) is None
    worker = warm.worker(model)
    worker.answers(ASKED)
    assert [len(warm.files), caplog.records] == [1, []], "a folder that has gone is made again"


# --- a disk that takes nothing ---


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_at_any_point_is_one_error(tmp_path: Path, error: int) -> None:
    refused = 0

    def write() -> None:
        entry(PrefixFolder(tmp_path / "prefixes", LIMIT, reserve=0), 5)

    for raised in powercut.each_refusal(error, write):
        assert isinstance(raised, OSError)
        shutil.rmtree(tmp_path / "prefixes", ignore_errors=True)
        refused += 1
    assert refused > 5


def test_a_disk_that_takes_nothing_hurts_no_request(
    machine: Machine, model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = [sent.ids for sent in Worker(model, AdapterPool(model, machine.store)).answers(ASKED)]
    saver = Saver()
    worker = Worker(model, AdapterPool(model, machine.store), shelf=machine.shelf(model, saver=saver))
    with powercut.refusing(1, errno.EROFS) as refusal:
        assert [sent.ids for sent in worker.answers(ASKED)] == wanted
        wait_until(lambda: refusal.happened, "the disk was asked")
        saver.end(10)
    assert [record.getMessage() for record in caplog.records] == [
        "prefixes are not kept on disk now: [Errno 30] Read-only file system"
    ]


def entry(place: PrefixFolder, number: int, length: int = SHORTEST, size: int = 1) -> bool:
    """Write one of `size` times the least that there is."""
    assert FORM is not None
    tokens = np.full(length * size, number, dtype=np.int32)
    return place.write("owner", tokens, FORM, numbers(number, len(tokens)))


def numbers(number: int, length: int) -> list[np.ndarray]:
    assert FORM is not None
    return [np.full(tensor.shape, number, dtype=np.uint32) for tensor in FORM.tensors(length)]


def has(place: PrefixFolder, number: int) -> bool:
    """Whether it can be read, and then as it was written."""
    assert FORM is not None
    found = place.find("owner", np.full(SHORTEST, number, dtype=np.int32), FORM)
    read = None if found is None else place.read(found, FORM)
    if read is None:
        return False
    tokens, arrays = read
    assert set(tokens.tolist()) == {number}
    assert all((array == number).all() for array in arrays)
    return True


def size_of(count: int) -> int:
    assert FORM is not None
    return count * entry_file.size("owner", FORM, SHORTEST)


def test_whenever_the_power_goes_an_entry_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    root = tmp_path / "disk" / "prefixes"
    root.parent.mkdir()
    before = PrefixFolder(root, size_of(2), reserve=0)
    entry(before, 1)
    entry(before, 2)
    with powercut.recorded(root.parent) as disk:
        assert entry(PrefixFolder(root, size_of(2), reserve=0), 3)
        disk.mark("written")
    cuts = disk.cuts()
    assert len(cuts) > 10
    for cut_ in cuts:
        with cut_.restored(tmp_path / "after") as after:
            place = PrefixFolder(after / "prefixes", size_of(2), reserve=0)
            there = [number for number in (1, 2, 3) if has(place, number)]
            assert 2 in there, cut_
            assert not cut_.finished or there == [2, 3], cut_
            # What was left behind counts, and goes.
            assert entry(place, 4)
            assert has(place, 4)
            files = [path for path in after.rglob("*") if path.is_file() and path.name != ".lock"]
            assert all(path.suffix == ".safetensors" and not path.name.startswith(".") for path in files), cut_
            assert sum(path.stat().st_size for path in files) <= size_of(2), cut_


def test_the_entry_that_served_longest_ago_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "TOUCH_EVERY", -1.0)
    place = PrefixFolder(tmp_path, size_of(3), reserve=0)
    for number in (1, 2, 3):
        entry(place, number)
    assert has(place, 1)
    entry(place, 4)
    assert [number for number in (1, 2, 3, 4) if has(place, number)] == [1, 3, 4]
    assert place.nbytes == size_of(3)


def test_entries_are_bounded_in_number_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "MOST", 2)
    place = PrefixFolder(tmp_path, LIMIT, reserve=0)
    for number in range(6):
        entry(place, number)
        assert has(place, number)
    assert [number for number in range(6) if has(place, number)] == [4, 5]


def test_an_entry_that_would_leave_no_room_for_others_is_not_kept(machine: Machine, model: LoadedModel) -> None:
    place = PrefixFolder(machine.home, 1000)
    assert [place.takes(500), place.takes(501)] == [True, False]
    machine.limit = form_of(model).nbytes(len(SYSTEM))
    machine.worker(model).answers(ASKED)
    assert machine.files == []


def test_a_disk_that_is_nearly_full_is_left_alone(tmp_path: Path) -> None:
    assert not entry(PrefixFolder(tmp_path, LIMIT, reserve=1 << 60), 1)
    assert not list(tmp_path.glob("*/*"))


def test_a_limit_that_became_smaller_holds_from_the_start(tmp_path: Path) -> None:
    place = PrefixFolder(tmp_path, LIMIT, reserve=0)
    for number in range(5):
        entry(place, number)
    smaller = PrefixFolder(tmp_path, size_of(2), reserve=0)
    smaller.look()
    assert [number for number in range(5) if has(smaller, number)] == [3, 4]
    assert smaller.nbytes == size_of(2)
    assert len(list(tmp_path.iterdir())) == 3, "no empty folder stays, except for the lock's file"


def test_several_writers_at_once_keep_the_limit_and_every_entry_whole(tmp_path: Path) -> None:
    def work(seed: int) -> None:
        place = PrefixFolder(tmp_path, size_of(6), reserve=0)
        for number in np.random.default_rng(seed).integers(0, 12, 30).tolist():
            if not has(place, number):
                entry(place, number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = list(tmp_path.glob("*/*"))
    assert 0 < sum(path.stat().st_size for path in files) <= size_of(6)
    place = PrefixFolder(tmp_path, size_of(6))
    assert sum(has(place, number) for number in range(12)) == len(files)


def test_one_writes_and_removes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[bool] = []
    write = entry_file.write

    def seen(*given: Any) -> None:
        with (tmp_path / ".lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(True)
        write(*given)

    monkeypatch.setattr(entry_file, "write", seen)
    assert entry(PrefixFolder(tmp_path, LIMIT, reserve=0), 1)
    assert refused == [True]


def test_nobody_else_may_read_what_was_asked(warm: Machine) -> None:
    assert {file.stat().st_mode & 0o777 for file in warm.files} == {0o600}


# --- the thread, and how much it writes ---


class Noted:
    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.done = error, threading.Event()

    def save(self) -> None:
        self.done.set()
        if self.error is not None:
            raise self.error


def test_trouble_is_said_once_until_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    saver, full = Saver(), OSError(errno.ENOSPC, "No space left on device")
    all_ = [Noted(full), Noted(full), Noted(), Noted(full), Noted(RuntimeError("a defect")), Noted()]
    for noted in all_:
        saver.note(noted)
    assert all_[-1].done.wait(10)
    saver.end(10)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in said] == [
        "prefixes are not kept on disk now", "prefixes are not kept on disk now", "a prefix could not be kept on disk"
    ]  # fmt: skip


def test_what_cannot_be_written_in_time_is_left_out() -> None:
    class Slow(Noted):
        def save(self) -> None:
            super().save()
            assert go_on.wait(10)

    go_on, saver, slow = threading.Event(), Saver(), Slow()
    saver.note(slow)
    assert slow.done.wait(10)
    others = [Noted() for _ in range(2 * WAITING)]
    for noted in others:
        saver.note(noted)
    go_on.set()
    assert others[WAITING - 1].done.wait(10)
    saver.end(10)
    assert sum(noted.done.is_set() for noted in others) == WAITING


def test_a_stopping_engine_ends_the_thread() -> None:
    saver, last = Saver(), Noted()
    saver.note(Noted(WorkerUnavailable("the worker is stopping")))
    wait_until(lambda: not any(thread.name == "prefixes to disk" for thread in threading.enumerate()), "it has ended")
    saver.note(last)
    saver.end(10)
    assert not last.done.is_set()


def test_a_disk_is_not_worn_out_by_prompts_that_never_come_again() -> None:
    now = [0.0]
    allowance = Allowance(1000, lambda: now[0])
    assert [allowance.take(400), allowance.take(400), allowance.take(100)] == [True, False, True]
    now[0] = 24 * 3600 / TIMES_A_DAY / 10
    assert [allowance.take(101), allowance.take(100), allowance.take(1)] == [False, True, False]
    now[0] += 10 * 24 * 3600
    assert [allowance.take(501), allowance.take(500)] == [False, True]


def test_a_worker_writes_no_more_than_it_is_allowed_to(machine: Machine, model: LoadedModel) -> None:
    machine.limit = 2 * form_of(model).nbytes(LONG) + 100_000
    worker = machine.worker(model)
    worker.answers([np.random.default_rng(seed).integers(3, 60, LONG).tolist() for seed in (1, 2, 3)], max_tokens=1)
    assert len(machine.files) == 1


def test_a_prefix_that_memory_has_let_go_of_is_not_written(machine: Machine, model: LoadedModel) -> None:
    shelf_, cache = machine.shelf(model), PrefixCache(LIMIT)
    shelf_.served(None, SYSTEM, cache)
    assert machine.files == []


# --- the engine ---


def test_an_engine_that_starts_again_reads_what_its_own_thread_wrote(tmp_path: Path) -> None:
    folder_ = endless.write(tmp_path)

    def answers(prompts: Sequence[list[int]], limit: int = LIMIT) -> list[tuple[Any, ...]]:
        engine = Engine(
            {"tiny": (str(folder_),)}, adapters=tmp_path / "adapters", publish=lambda entries: None,
            limits=LaneLimits(compiled="none"), prefixes=DiskLimits(tmp_path / "prefixes", limit),
        )  # fmt: skip
        engine.start()
        found = []
        try:
            for prompt in prompts:
                asked = GenerateRequest(model="tiny", prompt_ids=tuple(prompt), max_tokens=3)
                result = engine.submit("job", asked).result(60)
                found.append((result.token_ids, result.usage.cached_tokens))
            if limit:
                wait_until(lambda: engine.prefix_bytes > 0, "the prefix is on the disk")
            return [*found, (engine.loads["tiny"].disk_hits,)]
        finally:
            engine.stop()

    prompts = [[token % 20 + 3 for token in prompt] for prompt in ASKED]
    *_, hits = answers(prompts[:2])
    assert hits == (0,)
    found, hits = answers(prompts[2:3])
    assert [found[1], hits] == [len(SYSTEM), (1,)]
    (wanted, none), off = answers(prompts[2:3], limit=0)
    assert [found[0], none, off] == [wanted, 0, (0,)]


def test_weights_are_named_by_their_files_and_by_what_is_computed_with_them(tmp_path: Path) -> None:
    folder_ = endless.write(tmp_path)
    names = [model_identity(load("tiny", [str(folder_)])), model_identity(load("other", [str(folder_)]))]
    assert names[0] == names[1], "a name is no content"
    names.append(model_identity(load("tiny", [str(folder_)], dtype="bfloat16")))
    names += [model_identity(load("tiny", [str(folder_)], kv_bits=bits)) for bits in (8, 4)]
    weights = folder_ / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content)
    # As a fine-tuning in place would: the digest looks at both ends of a file alone.
    names.append(model_identity(load("tiny", [str(folder_)])))
    assert len(set(names)) == 5
    assert None not in names


def test_a_model_without_files_keeps_its_prefixes_in_memory(machine: Machine, model: LoadedModel) -> None:
    disk = PrefixDisk(DiskLimits(machine.prefixes, LIMIT), machine.store, lambda call: call())
    assert model_identity(model) is None
    assert disk.shelf(model) is None


def test_what_is_copied_between_two_steps_is_bounded(
    machine: Machine, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[np.ndarray]] = []

    def run(call: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
        calls.append(call())
        return calls[-1]

    monkeypatch.setattr(shelf, "COPIED", 10_000)
    worker = Worker(model, AdapterPool(model, machine.store), shelf=machine.shelf(model, run=run))
    worker.answers(ASKED[:2])
    assert len(machine.files) == 1
    sizes = [sum(array.nbytes for array in call) for call in calls]
    assert len(sizes) > 1
    assert max(sizes) <= 10_000
