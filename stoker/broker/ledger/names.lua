-- What every transition shares: the names, and what most of them do.

local job, result, mark, ready, open, dispatched, turns, pace, policy, sizes = unpack(KEYS, 1, 10)
local backlogs = {unpack(KEYS, 11, 20)}
local id, job_prefix, pending_ttl, result_ttl, window = unpack(ARGV, 1, 5)
window = tonumber(window)
local prefix = string.sub(job_prefix, 1, -5)

-- An object or list in JSON; an empty one for what is none.
local function decoded(text)
  local readable, value = pcall(cjson.decode, text)
  return readable and type(value) == 'table' and value or {}
end

-- A number that counts and orders can be made of; nil for what is none.
local function finite(text)
  local number = tonumber(text)
  return number and number > -2 ^ 53 and number < 2 ^ 53 and number or nil
end

-- A count; 0 for what is none.
local function count_of(text)
  return math.max(0, finite(text) or 0)
end

-- Every addition sets the key's expiry: the key may be new.
local function add(key, score, member)
  redis.call('ZADD', key, score, member)
  redis.call('EXPIRE', key, pending_ttl)
end

-- A record's `blob` if it is an input of this very job: another key that a record names is not the job's to touch.
local function own_input(blob)
  for _, kind in ipairs({'dataset', 'adapter'}) do
    local own = prefix .. 'blob:' .. kind .. ':' .. id
    if blob and (blob == own or string.sub(blob, 1, #own + 1) == own .. ':') then return blob end
  end
  return nil
end
