"""The registry of adapters in the broker: which versions there are, and which one serves. Every worker asks it.

One hash an adapter: `next`, the last number given out; `serving`, the version that a bare name means ("" for none);
`history`, those that served before, newest last; `version:<n>`, what is known of each, as JSON; `unloaded:<n>`, when a
version was taken out, by the broker's clock. A hash whose versions are all gone stays, so that a number is never used
twice. One Lua script a transition: whole or not at all.

The functions take a blocking or an asyncio client, and return what it returns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stoker.broker import keys
from stoker.broker.ledger.record import Field
from stoker.broker.pipeline import of_another_type
from stoker.contract.base import parse_adapter
from stoker.contract.names import Rule, follows
from stoker.errors import InvalidRequest, UnknownAdapter

#: What the field of a version begins with; the scripts below have it as text.
VERSION = "version:"
#: What the field begins with that says when a version was taken out, and the seconds for which it is there: workers
#: delete the files meanwhile.
UNLOADED, UNLOADED_TTL = "unloaded:", 30 * 24 * 3600
#: What `change` can do.
Verb = Literal["promote", "rollback", "deactivate", "unload"]

#: Versions that served before, the newest of which are remembered: each worker reads them with each of its jobs.
MOST_HISTORY = 1000

_SERVE = (
    f"local MOST_HISTORY = {MOST_HISTORY}"
    """
-- The versions that served before. What another program wrote there is left out.
local function history_of(key)
  local readable, found = pcall(cjson.decode, redis.call('HGET', key, 'history') or '[]')
  local kept = {}
  for _, version in ipairs(readable and type(found) == 'table' and found or {}) do
    if string.match(tostring(version), '^%d+$') then table.insert(kept, tostring(version)) end
  end
  return kept
end

local function serve(key, version)
  local serving = redis.call('HGET', key, 'serving') or ''
  if serving == version then return end
  if serving ~= '' then
    local history = history_of(key)
    table.insert(history, serving)
    while #history > MOST_HISTORY do table.remove(history, 1) end
    redis.call('HSET', key, 'history', cjson.encode(history))
  end
  redis.call('HSET', key, 'serving', version)
end
"""
)

#: Whether the job whose record is `key` is that of the owner `token`, and has not ended; true if no
#: owner is named.
_OWNS = f"""
local function owns(key, token)
  if token == '' then return true end
  local state = redis.call('HMGET', key, '{Field.TOKEN}', '{Field.ENDED}')
  return state[1] == token and state[2] ~= '1'
end
"""

#: KEYS: the adapter's hash, the model's set of names, the record of the job that made it. ARGV: name, version, what is
#: known of it, whether it shall serve, the token of the job's owner or ''. Returns 0 for an owner that was fenced.
REGISTER = (
    _SERVE
    + _OWNS
    + """
if not owns(KEYS[3], ARGV[5]) then return 0 end
redis.call('SADD', KEYS[2], ARGV[1])
-- Said again, because the answer was lost or the worker died behind it: another version may have been chosen meanwhile.
local new = redis.call('HSET', KEYS[1], 'version:' .. ARGV[2], ARGV[3]) == 1
local last = tonumber(redis.call('HGET', KEYS[1], 'next')) or 0
if last < tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], 'next', ARGV[2]) end
if ARGV[4] == '1' and new then serve(KEYS[1], ARGV[2]) end
return 1
"""
)

#: KEYS: the artifact, the record of the job that made it. ARGV: the version's files, the token of the job's owner or
#: ''. One that is there stays. Returns 0 for an owner that was fenced.
KEEP = (
    _OWNS
    + """
if not owns(KEYS[2], ARGV[2]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'NX')
return 1
"""
)

#: KEYS: the adapter's hash, the version's artifact. ARGV: `promote`, `rollback`, `deactivate` or `unload`; version;
#: of a rollback, if it is said, the version that is to be left: another one that serves by then stays.
#: Returns the version that serves then, "" for none, or nil if it cannot be done.
CHANGE = (
    _SERVE
    + f"local UNLOADED_TTL = {UNLOADED_TTL}"
    + """
local key, verb, version, leaving = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local function known(version) return redis.call('HEXISTS', key, 'version:' .. version) == 1 end
if verb == 'promote' then
  if not known(version) then return false end
  serve(key, version)
elseif verb == 'deactivate' then
  serve(key, '')
elseif verb == 'rollback' then
  local serving = redis.call('HGET', key, 'serving') or ''
  if leaving and leaving ~= serving then return serving end
  local history = history_of(key)
  local found = false
  while #history > 0 and not found do
    local last = table.remove(history)
    if known(last) and last ~= serving then found = last end
  end
  if not found then return false end
  redis.call('HSET', key, 'serving', found, 'history', #history > 0 and cjson.encode(history) or '[]')
elseif verb == 'unload' then
  if not known(version) or redis.call('HGET', key, 'serving') == version then return false end
  redis.call('HDEL', key, 'version:' .. version)
  redis.call('DEL', KEYS[2])
  local now = tonumber(redis.call('TIME')[1])
  for _, field in ipairs(redis.call('HKEYS', key)) do
    local old = string.find(field, 'unloaded:', 1, true) == 1 and tonumber(redis.call('HGET', key, field))
    if old and old < now - UNLOADED_TTL then redis.call('HDEL', key, field) end
  end
  redis.call('HSET', key, 'unloaded:' .. version, now)
end
return redis.call('HGET', key, 'serving') or ''
"""
)

#: KEYS: the adapter's hash. ARGV: fields and values of a backup. Versions that are missing come back; which one serves,
#: and which ones did, where no version is left. Returns how many fields were missing.
RESTORE = """
local key, added, none = KEYS[1], 0, true
local function put(field, value)
  if redis.call('HGET', key, field) == value then return end
  redis.call('HSET', key, field, value)
  added = added + 1
end
for _, field in ipairs(redis.call('HKEYS', key)) do
  if string.find(field, 'version:', 1, true) == 1 then none = false end
end
for i = 1, #ARGV, 2 do
  local field, value = ARGV[i], ARGV[i + 1]
  if field == 'next' then
    -- A number that was given out since is not given out again.
    local last = tonumber(redis.call('HGET', key, 'next') or 0)
    if (last or 0) < (tonumber(value) or 0) then put(field, value) end
  elseif none then
    put(field, value)
  elseif string.find(field, 'version:', 1, true) == 1 then
    added = added + redis.call('HSETNX', key, field, value)
  end
end
return added
"""


@dataclass(frozen=True)
class AdapterEntry:
    """What the registry knows of one adapter. `versions`: number → rank, method, loss, time and so on."""

    model: str
    name: str
    serving: int | None
    history: tuple[int, ...]
    versions: Mapping[int, Mapping[str, Any]]

    def version(self, wanted: int | None) -> int:
        """The version that `name` (None) or `name@wanted` means. Raises `UnknownAdapter`."""
        if wanted is not None and wanted in self.versions:
            return wanted
        if wanted is None and self.serving is not None:
            return self.serving
        listed = ", ".join(map(str, sorted(self.versions))) or "none"
        if wanted is None:
            raise UnknownAdapter(
                f"adapter {self.name!r} given; none of its versions ({listed}) serves. "
                f"Name one with {self.name}@VERSION, or `stoker adapters promote {self.name}@VERSION`."
            )
        raise UnknownAdapter(f"adapter '{self.name}@{wanted}' given; the versions of {self.name}: {listed}.")


def parse(model: str, name: str, raw: Mapping[bytes, bytes]) -> AdapterEntry:
    """From the adapter's hash. What no release of Stoker wrote there is left out: the other versions serve on."""
    fields = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in raw.items()}
    numbered = {key.removeprefix(VERSION): _read(value) for key, value in fields.items() if key.startswith(VERSION)}
    versions = {
        int(number): known
        for number, known in numbered.items()
        if follows(Rule.VERSION, number) and isinstance(known, dict)
    }
    serving, history = fields.get("serving"), _list(fields.get("history", "[]"))
    served = tuple(int(number) for number in history if follows(Rule.VERSION, str(number)))
    serves = int(serving) if serving and follows(Rule.VERSION, serving) else None
    return AdapterEntry(model, name, serves, served, dict(sorted(versions.items())))


def unloaded(raw: Mapping[bytes, bytes]) -> dict[int, float]:
    """From the adapter's hash: the versions that were taken out lately, and are not there again, with the time."""
    found = {key.decode(errors="replace"): value for key, value in raw.items()}
    taken = {name.removeprefix(UNLOADED): value for name, value in found.items() if name.startswith(UNLOADED)}
    return {
        int(number): float(value)
        for number, value in taken.items()
        if follows(Rule.VERSION, number) and value.isdigit() and f"{VERSION}{number}" not in found
    }


def parse_all(model: str, names: Iterable[str], replies: Iterable[Any]) -> list[AdapterEntry]:
    """As `parse`, of several. A record that another program wrote over has no versions, and hides no other adapter; its
    own errors name it."""
    found = []
    for name, reply in zip(names, replies, strict=True):
        if isinstance(reply, Exception) and not of_another_type(reply):
            raise reply
        found.append(parse(model, name, {} if isinstance(reply, Exception) else reply))
    return found


def _list(value: str) -> list[Any]:
    found = _read(value)
    return found if isinstance(found, list) else []


def _read(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def names(raw: Iterable[bytes]) -> list[str]:
    """The valid names among `raw`, sorted. An invalid one is left out, because no client could ask for it."""
    return sorted(name for name in (entry.decode(errors="replace") for entry in raw) if follows(Rule.NAME, name))


@dataclass(frozen=True)
class Owner:
    """Who does something of a job, and may do it for as long as the job is theirs: the token of a delivery."""

    job_id: str
    token: str


#: No job has to be owned.
NO_OWNER = Owner("", "")


def register(
    redis: Any,
    model: str,
    name: str,
    version: int,
    known: Mapping[str, Any],
    *,
    promote: bool,
    owner: Owner = NO_OWNER,
) -> Any:
    """Say that a version is there, and let it serve. Saying it again changes nothing. 0 for an owner that was
    fenced."""
    names = keys.adapter(model, name), keys.adapters(model), keys.job(owner.job_id)
    return redis.eval(REGISTER, 3, *names, name, version, json.dumps(known), int(promote), owner.token)


def restore(redis: Any, key: str, fields: Mapping[bytes, bytes]) -> Any:
    """Put back what a backup knows of the adapter with this hash; see `RESTORE`."""
    return redis.eval(RESTORE, 1, key, *(part for item in fields.items() for part in item))


def keep(redis: Any, model: str, name: str, version: int, data: bytes, owner: Owner = NO_OWNER) -> bool:
    """Keep the files of a version in the broker. False for an owner that was fenced."""
    names = keys.artifact(model, name, version), keys.job(owner.job_id)
    return bool(redis.eval(KEEP, 2, *names, data, owner.token))


def maker(redis: Any, model: str, name: str, version: int) -> str | None:
    """The job that made a version; None where that is not said."""
    field = f"{VERSION}{version}".encode()
    raw = redis.hget(keys.adapter(model, name), field)
    job = parse(model, name, {} if raw is None else {field: raw}).versions.get(version, {}).get("job")
    return job if isinstance(job, str) else None


def serving(redis: Any, model: str, name: str) -> Any:
    """What the adapter's hash says of the version that serves, as it stands there."""
    return redis.hget(keys.adapter(model, name), "serving")


def change(redis: Any, model: str, verb: Verb, name: str, version: int | None, *, leaving: bytes | None = None) -> Any:
    """`promote`, `rollback`, `deactivate` or `unload`; see `CHANGE`."""
    names = keys.adapter(model, name), keys.artifact(model, name, version or 0)
    said = () if leaving is None else (leaving,)
    return redis.eval(CHANGE, 2, *names, verb, version or "", *said)


def wanted(adapter: str, *, version: bool) -> tuple[str, int | None]:
    """`name` or `name@version` as it was given to a command; `version`: whether it must name one, or none."""
    name, number = parse_adapter(adapter)
    if number is not None and not version:
        raise InvalidRequest(
            f"adapter: {adapter!r} given; name the adapter alone, as {name}. To serve a version, promote it."
        )
    if version and number is None:
        raise InvalidRequest(f"adapter: {adapter!r} given; name a version too, as {name}@1.")
    return name, number


def explain(entry: AdapterEntry, verb: Verb, version: int | None) -> InvalidRequest:
    """Why `change` could not do it."""
    if verb == "rollback":
        return InvalidRequest(
            f"adapter {entry.name!r}: no version served before {entry.serving}; nothing to go back to."
        )
    if verb == "unload" and version == entry.serving:
        return InvalidRequest(
            f"adapter '{entry.name}@{version}' serves now. Promote another version first, or let none serve: "
            f"`stoker adapters deactivate {entry.name}`."
        )
    try:
        entry.version(version)
    except UnknownAdapter as error:
        return error
    return InvalidRequest(f"adapter {entry.name!r}: {verb} is not possible now. Try again.")
