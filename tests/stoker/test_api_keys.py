"""Keys of the gateway: a bucket that fills up evenly within a minute, against a plain model of it under a set clock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.broker import api_keys, keys
from stoker.broker.api_keys import Admission, ApiKey
from stoker.errors import InvalidRequest
from tests.stoker.clocked import ASKS_THE_TIME, CLOCK, give_time, quick_broker

START = 1_800_000_000.0
SECRET, OTHER = f"{api_keys.BEGINNING}mine", f"{api_keys.BEGINNING}other"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of a broker of its own, which reads `CLOCK` for its time."""
    with quick_broker(tmp_path_factory.mktemp("quick")) as client, pytest.MonkeyPatch.context() as patch:
        for name in ("ADMIT", "SPEND"):
            text = getattr(api_keys, name)
            assert text.count(ASKS_THE_TIME) == 1
            patch.setattr(api_keys, name, text.replace(ASKS_THE_TIME, f"redis.call('LRANGE', '{CLOCK}', 0, 1)"))
        yield client


def bucket(secret: str = SECRET) -> str:
    return keys.rate(api_keys.digest(secret)[: api_keys.ID])


def add(redis: Any, secret: str = SECRET, **fields: Any) -> ApiKey:
    key = ApiKey(client="team", created=1.0, **fields)
    redis.hset(keys.API_KEYS, api_keys.digest(secret), key.model_dump_json())
    return key


@dataclass
class Bucket:
    """What a key may take yet, by the words of `docs`: a limit a minute, which comes back evenly."""

    limit: int
    level: float = field(init=False)
    at: float = START

    def __post_init__(self) -> None:
        self.level = float(self.limit)

    def look(self, now: float) -> float:
        """A clock that was set back takes nothing and gives nothing, and gives again from then on."""
        self.at = min(self.at, now)
        return min(float(self.limit), self.level + (now - self.at) * self.limit / 60)

    def take(self, now: float, amount: float) -> None:
        # The longest wait is what a bucket is remembered for.
        self.level = max(self.look(now) - amount, -self.limit * keys.RATE_TTL / 60)
        self.at = now


ASKED = st.tuples(st.just("ask"), st.just(0))
SPENT = st.tuples(st.just("spend"), st.sampled_from([0, 1, 7, 60, 700, 10_000_000]))
PASSED = st.tuples(st.just("pass"), st.sampled_from([0.0, 0.25, 1.0, 20.0, 60.0, 3599.0, -30.0]))


@settings(max_examples=120)
@given(
    requests=st.sampled_from([None, 1, 3, 90]),
    tokens=st.sampled_from([None, 1, 60, 6000]),
    steps=st.lists(ASKED | SPENT | PASSED, min_size=1, max_size=25),
)
def test_a_key_takes_what_its_bucket_has_and_waits_for_what_it_overdrew(
    redis: Any, requests: int | None, tokens: int | None, steps: list[tuple[str, float]]
) -> None:
    redis.flushall()
    key, now = add(redis, requests=requests, tokens=tokens), START
    give_time(redis, now)
    asks = Bucket(requests) if requests else None
    spends = Bucket(tokens) if tokens else None
    for what, amount in steps:
        if what == "pass":
            now += amount
            give_time(redis, now)
            redis.persist(bucket())
        elif what == "spend" and spends:
            api_keys.spending(SECRET, spends.limit, int(amount)).on(redis)
            spends.take(now, amount)
            assert keys.RATE_TTL - 5 <= redis.ttl(bucket()) <= keys.RATE_TTL
        elif what == "ask":
            found = api_keys.admission(SECRET).on(redis)
            assert (found.keys, found.key) == (1, key)
            expected = _expected(asks, spends, now)
            assert found.short_of == expected.short_of
            assert found.wait == pytest.approx(expected.wait, abs=0.002)
            if expected.wait == 0 and asks:
                asks.take(now, 1)
                assert keys.RATE_TTL - 5 <= redis.ttl(bucket()) <= keys.RATE_TTL


@pytest.mark.parametrize("limits", [{"requests": 1}, {"tokens": 60}])
def test_a_key_waits_as_long_as_it_hears_also_after_the_clock_was_set_back(redis: Any, limits: dict[str, Any]) -> None:
    redis.flushall()
    add(redis, **limits)
    give_time(redis, START)
    assert api_keys.admission(SECRET).on(redis).wait == 0
    api_keys.spending(SECRET, 60, 90).on(redis)
    give_time(redis, START - 3000)
    found = api_keys.admission(SECRET).on(redis)
    assert found.wait > 0
    give_time(redis, START - 3000 + found.wait)
    assert api_keys.admission(SECRET).on(redis).wait == 0


def _expected(asks: Bucket | None, spends: Bucket | None, now: float) -> Admission:
    """Tokens first: a request that is refused for them is not counted."""
    if spends and spends.look(now) <= 1e-9:
        return Admission(1, wait=(1 - spends.look(now)) * 60 / spends.limit, short_of="tokens")
    if asks and asks.look(now) < 1 - 1e-9:
        return Admission(1, wait=(1 - asks.look(now)) * 60 / asks.limit, short_of="requests")
    return Admission(1)


def test_the_buckets_of_two_keys_are_two_and_a_key_without_limits_has_none(redis: Any) -> None:
    redis.flushall()
    give_time(redis, START)
    add(redis, requests=1)
    add(redis, OTHER)
    assert [api_keys.admission(SECRET).on(redis).short_of for _ in range(2)] == ["", "requests"]
    for _ in range(3):
        found = api_keys.admission(OTHER).on(redis)
        assert (found.keys, found.wait, found.short_of) == (2, 0.0, "")
    assert redis.exists(bucket())
    assert not redis.exists(bucket(OTHER))


@pytest.mark.parametrize("stored", [b"nonsense", b'"text"', b"7", b"null", b"[1]", b"{}", b'{"client": 5}'])
def test_what_is_no_key_counts_as_one_and_lets_nobody_in(redis: Any, stored: bytes) -> None:
    redis.flushall()
    give_time(redis, START)
    redis.hset(keys.API_KEYS, api_keys.digest(SECRET), stored)
    assert api_keys.admission(SECRET).on(redis).key is None
    assert api_keys.admission(SECRET).on(redis).keys == 1
    assert api_keys.admission(OTHER).on(redis) == Admission(1)
    assert not redis.exists(bucket())
    assert api_keys.listed(redis) == {}


@pytest.mark.parametrize("spoiled", ["", "nonsense", "1,5"])
def test_a_bucket_that_another_program_wrote_into_is_a_full_one(redis: Any, spoiled: str) -> None:
    redis.flushall()
    give_time(redis, START)
    add(redis, requests=2)
    for name in ("requests", "requests:at"):
        redis.hset(bucket(), mapping={"requests": "0.0", "requests:at": f"{START:.6f}"} | {name: spoiled})
        assert api_keys.admission(SECRET).on(redis).wait == 0, name
        assert float(redis.hget(bucket(), "requests")) == 1.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"client": "a b"}, "client: 'a b' given"),
        ({"requests": 0}, "requests: 0 given; allowed: 1 to 1000000000"),
        ({"requests": api_keys.MOST + 1}, "requests: 1000000001 given"),
        ({"tokens": 0}, "tokens: 0 given"),
        ({"tokens": api_keys.MOST + 1}, "tokens: 1000000001 given"),
        ({"models": ("m", "a b")}, "model: 'a b' given"),
        ({"created": float("nan")}, "created: nan given"),
        ({"created": float("inf")}, "created: inf given"),
    ],
)
def test_a_key_that_cannot_be_is_refused_and_not_kept(redis: Any, fields: dict[str, Any], said: str) -> None:
    redis.flushall()
    with pytest.raises(InvalidRequest, match=said):
        api_keys.create(redis, ApiKey.model_construct(**{"client": "team", "created": 1.0, **fields}))
    assert not redis.exists(keys.API_KEYS)
    api_keys.create(redis, ApiKey(client="team", created=1.0, requests=1, tokens=api_keys.MOST))


def test_what_is_no_name_of_a_key_revokes_none(redis: Any) -> None:
    redis.flushall()
    api_keys.create(redis, ApiKey(client="team", created=1.0))
    (name,) = api_keys.listed(redis)
    for wrong in ("", name[:-1], f"{name}0", "x" * 99):
        with pytest.raises(InvalidRequest, match="there is none of that name"):
            api_keys.revoke(redis, wrong)
    assert list(api_keys.listed(redis)) == [name]


def test_a_new_key_is_known_by_its_digest_alone_and_a_revoked_one_by_nothing(redis: Any) -> None:
    redis.flushall()
    secrets = [
        api_keys.create(redis, ApiKey(client="team", created=created, requests=5, models=("m",)))
        for created in (3.0, 1.0, 2.0)
    ]
    assert len(set(secrets)) == 3
    assert all(secret.startswith(api_keys.BEGINNING) and len(secret) > 50 for secret in secrets)
    digests = [api_keys.digest(secret) for secret in secrets]
    assert set(redis.hkeys(keys.API_KEYS)) == {digest.encode() for digest in digests}
    assert redis.ttl(keys.API_KEYS) == -1
    oldest_first = [digests[place][: api_keys.ID] for place in (1, 2, 0)]
    assert list(api_keys.listed(redis)) == oldest_first
    assert json.loads(redis.hget(keys.API_KEYS, digests[0]))["models"] == ["m"]
    api_keys.revoke(redis, oldest_first[0])
    assert list(api_keys.listed(redis)) == oldest_first[1:]
