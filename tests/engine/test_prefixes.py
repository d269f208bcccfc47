"""The prefix cache: what it finds is shared to the last token, and never the whole of what is asked."""

from __future__ import annotations

import numpy as np
import pytest

from engine.models.cache import KeyValues
from engine.models.llama import Llama
from engine.prefixes.memory import SHORTEST, PrefixCache

LENGTH = 60


@pytest.fixture
def cache(tiny_llama: Llama) -> PrefixCache:
    made = PrefixCache(1 << 20)
    made.put("base", list(range(LENGTH)), KeyValues(tiny_llama, 1, LENGTH))
    return made


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


def test_the_longest_of_several_is_found_and_only_its_owners(cache: PrefixCache, tiny_llama: Llama) -> None:
    longer = [*range(40), *range(500, 520)]
    kept = KeyValues(tiny_llama, 1, len(longer))
    cache.put("base", longer, kept)
    found, length = cache.find("base", [*longer, 7])
    assert found is kept
    assert length == len(longer)
    assert cache.find("other", [*longer, 7]) == (None, 0)


def test_bytes_are_counted_in_and_out(cache: PrefixCache, tiny_llama: Llama) -> None:
    random = np.random.default_rng(0)
    for _ in range(400):
        cache.put("base", random.integers(0, 9, LENGTH).tolist(), KeyValues(tiny_llama, 1, LENGTH))
        assert cache.nbytes == sum(kv.nbytes for kv in cache.kept) <= 1 << 20
    while cache.evict():
        pass
    assert cache.nbytes == 0


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


def test_an_entry_that_takes_the_place_of_its_like_is_counted_once(cache: PrefixCache, tiny_llama: Llama) -> None:
    before = cache.nbytes
    cache.put("base", list(range(LENGTH)), KeyValues(tiny_llama, 1, LENGTH))
    assert (cache.nbytes, len(cache)) == (before, 1)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_found_is_what_a_look_at_every_entry_finds(tiny_llama: Llama, seed: int, whole: bool) -> None:
    """Prompts of few tokens, so that many begin alike; old entries leave."""
    random, limit = np.random.default_rng(seed), 60
    kv = KeyValues(tiny_llama, 1, LENGTH)
    cache = PrefixCache(limit * kv.nbytes, whole=whole, shortest=3)
    kept: dict[tuple[str, tuple[int, ...]], KeyValues] = {}
    for _ in range(300):
        owner = str(random.choice(["base", "other"]))
        tokens = tuple(random.integers(0, 2, random.integers(1, 9)).tolist())
        begun = tokens[:-1]
        fits = [other for name, other in kept if name == owner and (not whole or other == begun[: len(other)])]
        longest = max((_shared(other, begun) for other in fits), default=0)
        found, length = cache.find(owner, tokens)
        assert length == (longest if longest >= 3 else 0)
        assert (found is None) == (length == 0)
        cache.put(owner, tokens, KeyValues(tiny_llama, 1, LENGTH))
        kept = {key: kv for key, kv in {**kept, (owner, tokens): kv}.items() if cache.has(*key)}
        assert len(cache) == len(kept)


def test_entries_that_left_leave_nothing_behind(tiny_llama: Llama) -> None:
    kv = KeyValues(tiny_llama, 1, LENGTH)
    cache = PrefixCache(2 * kv.nbytes, shortest=3)
    for last in range(5):
        cache.put("base", (1, 2, 3, last), kv)
    while cache.evict():
        pass
    assert vars(cache) == vars(PrefixCache(2 * kv.nbytes, shortest=3))


def _shared(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    length = min(len(left), len(right))
    return next((at for at in range(length) if left[at] != right[at]), length)
