"""The policy: each rule has a least and a most value, and a default to go back to."""

from __future__ import annotations

import fakeredis
import pytest

from stoker.broker import keys, policy
from stoker.errors import InvalidRequest


@pytest.mark.parametrize("name", [*policy.RULES, f"{policy.OF_CLIENT}alice"])
def test_a_rule_takes_its_least_and_its_most_and_nothing_beyond(name: str) -> None:
    broker = fakeredis.FakeRedis()
    rule = policy.RULES[name.partition(":")[0]]
    least, most = rule.least, rule.most
    for value in (least, most):
        policy.decide(broker, name, value)
        assert policy.read(broker)[name] == value
    for value in (least - 1, most + 1, -1):
        with pytest.raises(InvalidRequest, match=f"{name}: {value} given; allowed: {least} to {most}"):
            policy.decide(broker, name, value)
    policy.decide(broker, f"{policy.OF_CLIENT}bob", 7)
    policy.decide(broker, name, None)
    others = {name: rule.default for name, rule in policy.RULES.items()} | {f"{policy.OF_CLIENT}bob": 7}
    assert policy.read(broker) == others, "what was decided of others holds"


@pytest.mark.parametrize("name", ["evil", "client_limit:", "client_limit:../x", "\udcff", *policy.RULES])
def test_what_was_never_decided_is_not_shown(name: str) -> None:
    broker = fakeredis.FakeRedis()
    for value in ("9999999999999", "0", "abc") if name in policy.RULES else ("7",):
        broker.hset(keys.POLICY, name.encode(errors="surrogateescape"), value)
        assert policy.read(broker) == {name: rule.default for name, rule in policy.RULES.items()}
