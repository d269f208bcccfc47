"""The prefix cache: what it finds is shared to the last token, never the whole of what is asked, and kept once."""

from __future__ import annotations

import gc
import threading
import weakref
import zlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from engine.models import openings
from engine.models.key_values import KeyValues
from engine.models.kv_sizes import KvSide, KvSizes, StateShape
from engine.models.llama import Llama
from engine.prefixes import tree
from engine.prefixes.memory import SHORTEST, PrefixCache

LENGTH = 60


class Attending:
    """One head, whose arrays of some tokens are small."""

    kv_sizes = KvSizes([KvSide(1, 64, mx.float32)] * 2, [KvSide(1, 64, mx.float32)] * 2)


class Hybrid:
    """Two heads, and a state."""

    kv_sizes = KvSizes([KvSide(2, 4, mx.float32)], [KvSide(2, 2, mx.float32)], [StateShape((3,), mx.float32)])


def of(tokens: Sequence[int], model: type[Attending | Hybrid] = Attending, seed: str = "") -> KeyValues:
    """Numbers that each say which tokens are up to theirs."""
    kv = KeyValues(model(), 1, len(tokens))
    said = numbers(tokens, seed)
    for array in (*kv.keys, *kv.values):
        array[:] = mx.array(said)[None, None, :, None]
    kv.states = [mx.full(array.shape, said[-1]) for array in kv.states]
    return kv


def numbers(tokens: Sequence[int], seed: str = "") -> np.ndarray:
    raw = np.asarray(tokens, dtype=np.int32).tobytes()
    ends = range(4, len(raw) + 4, 4)
    return np.array([zlib.crc32(seed.encode() + raw[:end]) & 0xFFFFF for end in ends], dtype=np.float32)


def joined(pieces: Sequence[KeyValues], length: int) -> KeyValues:
    kv = KeyValues(Hybrid() if pieces[-1].keys[0].shape[1] == 2 else Attending(), 1, length)
    kv.put_pieces(0, pieces, length)
    return kv


def assert_is(pieces: Sequence[KeyValues], tokens: Sequence[int], seed: str = "") -> None:
    """That pieces hold what was put for these tokens, and the state behind the last."""
    kv, said = joined(pieces, len(tokens)), numbers(tokens, seed)
    for array in (*kv.keys, *kv.values):
        assert (np.array(array) == said[None, None, :, None]).all()
    for state in kv.states:
        assert (np.array(state) == said[-1]).all()


def assert_sound(cache: PrefixCache) -> None:
    """That bytes are those that are kept, and that nothing goes before what goes on from it."""
    assert cache.nbytes == sum(kv.nbytes for kv in cache.kept)
    used, trees = vars(cache)["_used"], vars(cache)["_trees"]
    order = {id(node): index for index, (_, node) in enumerate(used.values())}
    nodes = [node for of_owner in trees.values() for node in of_owner.nodes()]
    assert len(nodes) == len(order) == len(cache)
    for node in nodes:
        assert node.kv.capacity == len(node.tokens) > 0
        if node.parent is not None:
            assert order[id(node)] < order[id(node.parent)]
            assert node.start == node.parent.end
            assert node in node.parent.children.values()


@pytest.fixture
def cache(tiny_llama: Llama) -> PrefixCache:
    made = PrefixCache(1 << 20)
    made.put("base", list(range(LENGTH)), KeyValues(tiny_llama, 1, LENGTH))
    return made


# --- what is found ---


@pytest.mark.parametrize("shared", range(SHORTEST - 1, LENGTH + 1))
@pytest.mark.parametrize("more", [1, 2, 30])
def test_a_hit_is_as_long_as_what_is_shared(cache: PrefixCache, shared: int, more: int) -> None:
    asked = [*range(shared), *[1000 + index for index in range(more)]]
    assert cache.find("base", asked)[1] == (shared if shared >= SHORTEST else 0)


@pytest.mark.parametrize("length", range(SHORTEST - 1, LENGTH + 1))
def test_the_last_token_is_never_part_of_a_hit(cache: PrefixCache, length: int) -> None:
    """Its logits are needed: it has to go through the model."""
    found = cache.find("base", list(range(length)))[1]
    assert found == (length - 1 if length > SHORTEST else 0)


def test_the_longest_of_several_is_found_and_only_its_owners() -> None:
    cache = PrefixCache(1 << 20)
    first, longer = list(range(LENGTH)), [*range(40), *range(500, 520)]
    for owner in ("base", "other"):
        for tokens in (first, longer):
            cache.put(owner, tokens, of(tokens, seed=owner))
    for owner in ("base", "other"):
        pieces, length = cache.find(owner, [*longer, 7])
        assert length == len(longer)
        assert_is(pieces, longer, owner)
    assert cache.find("third", [*longer, 7]) == ([], 0)
    cache.forget("base")
    assert [cache.shared(owner, [*longer, 7]) for owner in ("base", "other")] == [0, len(longer)]
    assert_sound(cache)


@pytest.mark.parametrize("model", [Attending, Hybrid])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_found_is_what_a_look_at_every_prompt_finds(seed: int, model: type[Attending | Hybrid]) -> None:
    """Prompts of few tokens, so that many begin alike and branch anywhere. As long as nothing goes, all is found."""
    random, whole = np.random.default_rng(seed), model is Hybrid
    cache = PrefixCache(1 << 30, whole=whole, shortest=3)
    kept: set[tuple[str, tuple[int, ...]]] = set()
    for _ in range(300):
        owner = str(random.choice(["base", "other"]))
        tokens = tuple(random.integers(0, 2, random.integers(1, 12)).tolist())
        begun = tokens[:-1]
        fits = [other for name, other in kept if name == owner and (not whole or other == begun[: len(other)])]
        longest = max((_shared(other, begun) for other in fits), default=0)
        assert cache.shared(owner, tokens) == (longest if longest >= 3 else 0)
        pieces, length = cache.find(owner, tokens)
        assert length == cache.shared(owner, tokens)
        if pieces:
            assert_is(pieces, tokens[:length], owner)
        cache.put(owner, tokens, of(tokens, model, owner))
        if len(tokens) >= 3:
            kept.add((owner, tokens))
        assert all(cache.has(*key) for key in kept)
        assert_sound(cache)


@pytest.mark.parametrize("model", [Attending, Hybrid])
@pytest.mark.parametrize("seed", range(6))
def test_as_prompts_come_and_go_what_is_found_is_right_and_pins_stay(
    seed: int, model: type[Attending | Hybrid]
) -> None:
    random, whole = np.random.default_rng(seed), model is Hybrid
    token, state = model.kv_sizes.token_bytes, model.kv_sizes.state_bytes
    cache = PrefixCache(60 * token + 5 * state, whole=whole, shortest=3)
    put: set[tuple[str, tuple[int, ...]]] = set()
    pins: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(400):
        owner = str(random.choice(["base", "other"]))
        tokens = tuple(random.integers(0, 3, random.integers(1, 14)).tolist())
        here = [pin for pin in pins if cache.has(*pin)]
        pieces, length = cache.find(owner, tokens)
        if pieces:
            assert_is(pieces, tokens[:length], owner)
            assert any(name == owner and other[:length] == tokens[:length] for name, other in put)
        match random.integers(0, 20):
            case 0:
                pins = [(owner, tokens[:8])]
                cache.pin(pins)
                here = []
            case 1:
                cache.forget(owner)
                put = {key for key in put if key[0] != owner}
                here = [pin for pin in here if pin[0] != owner]
            case 2:
                assert cache.evict() or not cache.nbytes
                here = []
            case _:
                cache.put(owner, tokens, of(tokens, model, owner))
                put.add((owner, tokens))
        assert all(cache.has(*pin) for pin in here)
        assert cache.nbytes <= cache.limit
        assert_sound(cache)
    while cache.evict():
        assert_sound(cache)
    assert cache.nbytes == len(cache) == 0


def test_a_beginning_is_found_by_its_length_however_many_go_on_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    whole = openings.shared_length

    def shared_length(left: np.ndarray, right: np.ndarray) -> int:
        compared.append(min(len(left), len(right)))
        return whole(left, right)

    cache, system, kept = PrefixCache(1 << 30), list(range(1000, 1100)), of(range(103))
    for number in range(300):
        cache.put("base", [*system, number, number, number], kept)
    monkeypatch.setattr(tree, "shared_length", shared_length)
    assert cache.shared("base", [*system, 299, 299, 5, 5]) == 102
    assert compared == [100, 3]


# --- what is kept ---


@pytest.mark.parametrize("model", [Attending, Hybrid])
def test_prompts_behind_one_beginning_keep_it_once(model: type[Attending | Hybrid]) -> None:
    cache = PrefixCache(1 << 30, whole=model is Hybrid)
    system, tails = list(range(1000, 1200)), [[number, *range(number)] for number in range(1, 30)]
    for tail in tails:
        cache.put("base", [*system, *tail], of([*system, *tail], model))
    tokens, states = len(system) + sum(map(len, tails)), len(tails)
    assert cache.nbytes == tokens * model.kv_sizes.token_bytes + states * model.kv_sizes.state_bytes
    assert len(cache) == 1 + len(tails)
    for tail in tails:
        pieces, length = cache.find("base", [*system, *tail, 7])
        assert length == len(system) + len(tail)
        assert_is(pieces, [*system, *tail])
    assert_sound(cache)


def test_the_end_alone_is_copied_out_of_what_prompts_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage of several rows, on whose other positions nothing is kept."""
    copied: list[tuple[int, int, int]] = []
    whole = KeyValues.row

    def row(kv: KeyValues, row: int, end: int, start: int = 0) -> KeyValues:
        copied.append((row, start, end))
        return whole(kv, row, end, start)

    cache, system = PrefixCache(1 << 20), list(range(1000, 1100))
    first, second, third = [*system, 1, 2, 3], [*system, 4, 5], [*system, 4, 5, 6]
    cache.put("base", first, of(first))
    storage = KeyValues(Attending(), 3, 128)
    for index, tokens in enumerate((second, third), 1):
        storage.put(index, of(tokens), 0, len(tokens))
    monkeypatch.setattr(KeyValues, "row", row)
    cache.put("base", third, storage, 2)
    cache.put("base", second, storage, 1)
    assert copied == [(2, 100, 103)], "what is the beginning of another is there"
    longer = [*third, 7]
    cache.put("base", longer, of(longer))
    assert copied[1:] == [(0, 103, 104)], "what is longer than what comes stays as it is"
    for tokens in (first, second, third, longer):
        pieces, length = cache.find("base", [*tokens, 9])
        assert length == len(tokens)
        assert_is(pieces, tokens)


def test_a_half_that_goes_gives_back_its_memory() -> None:
    """Also where arrays are small: MLX would let both halves hold them whole."""
    cache = PrefixCache(1 << 30)
    prompts = [[*range(1000, 1064), *range(number, number + 64)] for number in (100, 200)]
    stored = [KeyValues(Attending(), 1, len(tokens)) for tokens in prompts]
    for kv in stored:
        kv.keys, kv.values = ([mx.random.normal(array.shape) for array in arrays] for arrays in (kv.keys, kv.values))
    mx.eval([kv.stored for kv in stored])
    mx.synchronize()
    # A larger block that an earlier test has let go of would serve, and count whole.
    mx.clear_cache()
    before, token = mx.get_active_memory(), Attending.kv_sizes.token_bytes
    for tokens, kv in zip(prompts, stored, strict=True):
        cache.put("base", tokens, kv)
    mx.eval([kv.stored for kv in cache.kept])
    for left in (192, 128, 64, 0):
        # MLX has some bytes of its own in each array.
        assert mx.get_active_memory() - before == pytest.approx(left * token, abs=2 * token)
        assert cache.evict() == bool(left)


def test_what_is_forgotten_is_freed_at_once() -> None:
    """With a collector of circles that rests, as it may for minutes."""
    gc.collect()
    gc.disable()
    try:
        for let_go in (lambda cache: cache.forget("base"), lambda cache: None):
            cache = PrefixCache(1 << 30)
            for tokens in ([*range(50), 101], [*range(50), 102, 103], [*range(45), 1, 2], list(range(40))):
                cache.put("base", tokens, of(tokens))
            cache.pin([("base", list(range(36)))])
            held = [weakref.ref(kv) for kv in cache.kept]
            assert len(held) == 6
            let_go(cache)
            del cache
            assert [kv() for kv in held] == [None] * 6
    finally:
        gc.enable()


def test_a_chat_is_kept_in_few_pieces_however_many_turns_it_has() -> None:
    """Each piece takes launches when it is found."""
    cache, chat = PrefixCache(1 << 30), list(range(100))
    for turn in range(64):
        chat += [1000 + turn, *range(49)]
        cache.put("base", chat, of(chat))
        pieces, length = cache.find("base", [*chat, 7])
        assert length == len(chat)
        assert len(pieces) <= 1 + np.log2(turn + 2)
        assert cache.nbytes == len(chat) * Attending.kv_sizes.token_bytes
    assert_is(pieces, chat)
    assert_sound(cache)


def test_what_another_prompt_goes_on_from_becomes_no_part_of_a_longer_one() -> None:
    cache, system = PrefixCache(1 << 30), list(range(40))
    for tail in ([101, 1], [102, 1], list(range(200, 300))):
        cache.put("base", [*system, *tail], of([*system, *tail]))
    assert len(cache) == 4
    assert_is(cache.find("base", [*system, 102, 1, 7])[0], [*system, 102, 1])
    assert_sound(cache)


def test_bytes_are_counted_in_and_out(cache: PrefixCache, tiny_llama: Llama) -> None:
    random = np.random.default_rng(0)
    for _ in range(400):
        cache.put("base", random.integers(0, 9, LENGTH).tolist(), KeyValues(tiny_llama, 1, LENGTH))
        assert cache.nbytes == sum(kv.nbytes for kv in cache.kept) <= 1 << 20
    while cache.evict():
        pass
    assert cache.nbytes == 0


def test_a_prompt_that_is_kept_already_is_counted_once(cache: PrefixCache, tiny_llama: Llama) -> None:
    before = cache.nbytes
    cache.put("base", list(range(LENGTH)), KeyValues(tiny_llama, 1, LENGTH))
    cache.put("base", list(range(LENGTH - 5)), KeyValues(tiny_llama, 1, LENGTH))
    assert (cache.nbytes, len(cache)) == (before, 1)


# --- a recurrent model ---


def test_a_state_serves_where_its_prompt_ended_and_there_alone() -> None:
    cache = PrefixCache(1 << 30, whole=True)
    system, longer = list(range(40)), [*range(40), *range(100, 120)]
    cache.put("base", longer, of(longer, Hybrid))
    assert cache.find("base", [*longer[:50], 7, 8]) == ([], 0), "its state has seen ten tokens more"
    other = [*system, 9, 9]
    cache.put("base", other, of(other, Hybrid))
    assert cache.find("base", [*system, 5, 5]) == ([], 0), "where two go on no prompt has ended"
    assert not cache.has("base", system)
    before = cache.nbytes
    cache.put("base", system, of(system, Hybrid))
    assert cache.nbytes - before == Hybrid.kv_sizes.state_bytes, "its keys and values are there"
    for tokens in (system, longer, other):
        pieces, length = cache.find("base", [*tokens, 7])
        assert length == len(tokens)
        assert_is(pieces, tokens)
    cache.put("base", longer[:50], of(longer[:50], Hybrid))
    assert cache.nbytes - before == 2 * Hybrid.kv_sizes.state_bytes
    for tokens in (longer[:50], longer):
        assert_is(cache.find("base", [*tokens, 7])[0], tokens)
    assert_sound(cache)


def test_keys_without_a_state_go_with_the_last_prompt_that_goes_on_from_them() -> None:
    cache = PrefixCache(1 << 30, whole=True)
    for tail in ([101, 1], [102, 1]):
        cache.put("base", [*range(40), *tail], of([*range(40), *tail], Hybrid))
    assert len(cache) == 3
    cache.evict()
    assert len(cache) == 2
    cache.evict()
    assert (len(cache), cache.nbytes) == (0, 0)


# --- what goes ---


def test_what_is_larger_than_the_whole_cache_makes_nothing_else_leave(tiny_llama: Llama) -> None:
    small, large = KeyValues(tiny_llama, 1, LENGTH), KeyValues(tiny_llama, 1, 2 * LENGTH)
    cache = PrefixCache(small.nbytes)
    cache.put("base", [1] * LENGTH, small)
    cache.put("base", [2] * 2 * LENGTH, large)
    assert [cache.has("base", [1] * LENGTH), len(cache)] == [True, 1]


def test_what_was_found_lately_stays_longest(tiny_llama: Llama) -> None:
    kept = [KeyValues(tiny_llama, 1, LENGTH) for _ in range(3)]
    prompts = [[index] * LENGTH for index in range(3)]
    cache = PrefixCache(2 * kept[0].nbytes)
    for prompt, kv in zip(prompts[:2], kept, strict=False):
        cache.put("base", prompt, kv)
    assert cache.find("base", [*prompts[0], 7])[1] == LENGTH
    cache.put("base", prompts[2], kept[2])
    assert [cache.has("base", prompt) for prompt in prompts] == [True, False, True]


def test_the_ends_of_prompts_go_first_and_what_they_share_last() -> None:
    cache, system = PrefixCache(1 << 30), list(range(40))
    prompts = [[*system, number, number] for number in (101, 102, 103)]
    for tokens in prompts:
        cache.put("base", tokens, of(tokens))
    cache.find("base", [*prompts[0], 7])
    left = []
    while cache.evict():
        left.append([cache.has("base", tokens) for tokens in (*prompts, system)])
    assert left == [
        [True, False, True, True], [True, False, False, True], [False, False, False, True], [False] * 4,
    ]  # fmt: skip


def test_a_prompt_that_begins_alike_makes_the_other_s_end_no_newer() -> None:
    """What it leaves behind in the middle goes before what was used since."""
    cache = PrefixCache(1 << 30)
    first, between, last = [*range(40), 101], [9] * LENGTH, [*range(40), 102]
    for tokens in (first, between, last):
        cache.put("base", tokens, of(tokens))
    cache.evict()
    assert [cache.has("base", tokens) for tokens in (first, between, last)] == [False, True, True]


def test_room_for_an_end_is_made_without_what_it_goes_on_from() -> None:
    system, other = list(range(40)), [9] * 40
    cache = PrefixCache(90 * Attending.kv_sizes.token_bytes)
    for tokens in (system, other):
        cache.put("base", tokens, of(tokens))
    cache.put("base", [*system, *range(100, 150)], of([*system, *range(100, 150)]))
    assert [cache.has("base", [*system, *range(100, 150)]), cache.shared("base", [*other, 7])] == [True, 0]
    cache.put("base", [*system, *range(200, 251)], of([*system, *range(200, 251)]))
    assert cache.has("base", [*system, *range(100, 150)]), "91 have no room"
    assert_sound(cache)


def test_room_is_made_of_the_other_end_of_what_is_split() -> None:
    cache = PrefixCache(100 * Attending.kv_sizes.token_bytes)
    first, second = [*range(40), *range(100, 160)], [*range(40), *range(200, 260)]
    for tokens in (first, second):
        cache.put("base", tokens, of(tokens))
    assert [cache.has("base", second), cache.shared("base", first), cache.nbytes] == [True, 40, cache.limit]
    assert_is(cache.find("base", [*second, 7])[0], second)


def test_what_left_leaves_nothing_behind() -> None:
    for whole in (False, True):
        cache = PrefixCache(1 << 20, whole=whole, shortest=3)
        for last in range(5):
            cache.put("base", (1, 2, 3, last), of((1, 2, 3, last), Hybrid))
        while cache.evict():
            pass
        assert vars(cache) == vars(PrefixCache(1 << 20, whole=whole, shortest=3))


# --- pins ---


def test_a_pin_inside_a_longer_prompt_stays_when_that_goes() -> None:
    prompt, pinned = list(range(LENGTH)), list(range(40))
    for first in (True, False):
        cache = PrefixCache(LENGTH * Attending.kv_sizes.token_bytes)
        if first:
            cache.pin([("base", pinned)])
        cache.put("base", prompt, of(prompt))
        if not first:
            cache.pin([("base", pinned)])
        cache.put("base", [9] * SHORTEST, of([9] * SHORTEST))
        assert cache.has("base", prompt), "next to a pin it has no room"
        cache.evict()
        assert [cache.has("base", prompt), cache.has("base", pinned), len(cache)] == [False, True, 1]
        assert_is(cache.find("base", [*pinned, 7])[0], pinned)
        cache.pin([])
        cache.put("base", [9] * SHORTEST, of([9] * SHORTEST))
        assert not cache.has("base", pinned)


def test_a_pin_that_a_longer_prompt_goes_on_from_is_kept_apart() -> None:
    cache, pinned = PrefixCache(1 << 30), list(range(40))
    cache.pin([("base", pinned)])
    cache.put("base", pinned, of(pinned))
    (before,) = cache.kept
    longer = [*pinned, *range(100, 200)]
    cache.put("base", longer, of(longer))
    assert [kv is before for kv in cache.kept] == [False, True]
    assert cache.evict()
    assert [cache.has("base", pinned), cache.has("base", longer)] == [True, False]


def test_pins_that_share_their_beginning_take_it_once() -> None:
    token = Attending.kv_sizes.token_bytes
    cache, pins = PrefixCache(100 * token), [[*range(40), *range(number, number + 20)] for number in (100, 200)]
    cache.pin(("base", pin) for pin in pins)
    for pin in pins:
        cache.put("base", pin, of(pin))
    cache.put("base", [9] * SHORTEST, of([9] * SHORTEST))
    assert [*(cache.has("base", pin) for pin in pins), cache.nbytes] == [True, True, 80 * token]
    behind = [*pins[0], *range(20)]
    cache.put("base", behind, of(behind))
    assert [cache.has("base", behind), cache.nbytes] == [True, 100 * token]


def test_both_halves_of_a_pin_stay_while_another_prompt_goes_on_from_its_middle() -> None:
    cache, pinned, other = PrefixCache(92 * Attending.kv_sizes.token_bytes), list(range(LENGTH)), [9] * SHORTEST
    cache.pin([("base", pinned)])
    for tokens in (pinned, other, [*range(40), *range(100, 110)]):
        cache.put("base", tokens, of(tokens))
    assert [cache.has("base", pinned), cache.has("base", other), len(cache)] == [True, False, 3]


def test_pins_make_way_one_after_the_other_the_ends_first() -> None:
    cache, pins = PrefixCache(1 << 30), [list(range(40)), list(range(LENGTH)), [9] * 40]
    cache.pin(("base", pin) for pin in pins)
    for pin in (pins[1], pins[2]):
        cache.put("base", pin, of(pin))
    left = []
    while cache.evict():
        left.append([cache.has("base", pin) for pin in pins])
        assert_sound(cache)
    assert left[0] == [True, False, True]
    assert left[-1] == [False, False, False]


def test_what_is_left_of_a_pin_takes_no_room_from_others() -> None:
    cache, pinned, branch = PrefixCache(70 * Attending.kv_sizes.token_bytes), list(range(LENGTH)), [*range(40), 101]
    cache.pin([("base", pinned)])
    for tokens in (pinned, branch):
        cache.put("base", tokens, of(tokens))
    for left in (2, 1):
        assert cache.evict()
        assert len(cache) == left
    cache.put("base", [9] * LENGTH, of([9] * LENGTH))
    assert [cache.has("base", [9] * LENGTH), len(cache)] == [True, 1]


# --- threads ---


def test_a_thread_that_looks_while_another_changes_it_sees_what_was_or_what_is() -> None:
    """A prompt that stays is always found whole, however its pieces are cut, joined and left by others."""
    cache, stays = PrefixCache(1 << 30, shortest=4), [1, 2] * 30
    cache.pin([("base", stays)])
    cache.put("base", stays, of(stays))
    wrong: list[tuple[int, bool]] = []
    looked, ended = threading.Event(), threading.Event()

    def look() -> None:
        while not ended.is_set():
            seen = cache.shared("base", [*stays, 7]), cache.has("base", stays)
            if seen != (len(stays), True):
                wrong.append(seen)
            cache.shared("base", [*stays[:30], 5, 5, 5, 5])
            looked.set()

    thread = threading.Thread(target=look)
    thread.start()
    random = np.random.default_rng(0)
    try:
        for turn in range(200):
            at = int(random.integers(4, 59))
            tokens = [*stays[:at], *random.integers(3, 6, 8).tolist()]
            cache.put("base", tokens, of(tokens))
            if turn % 3 == 0:
                cache.evict()
        assert looked.wait(10)
    finally:
        ended.set()
        thread.join()
    assert wrong == []
    assert_sound(cache)


def _shared(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    length = min(len(left), len(right))
    return next((at for at in range(length) if left[at] != right[at]), length)
