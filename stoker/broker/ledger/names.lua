-- What every transition shares: the names, and what most of them do.

local job, result, mark, ready, open, dispatched, turns, pace, policy, sizes, backlogs
local id, job_prefix, prefix, pending_ttl, default_ttl, window
-- The rules of ageing and of results, and the priorities at which jobs wait, once they are known.
local ageing, results_live, occupied
local function begin(KEYS, ARGV)
  read_clock()
  job, result, mark, ready, open, dispatched, turns, pace, policy, sizes = unpack(KEYS, 1, 10)
  backlogs = {unpack(KEYS, 11, 20)}
  id, job_prefix, pending_ttl, default_ttl, window = unpack(ARGV, 1, 5)
  window, prefix = tonumber(window), string.sub(job_prefix, 1, -5)
  ageing, results_live, occupied = nil, nil, nil
end

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
local function own_input(blob, of)
  for _, kind in ipairs({'dataset', 'adapter'}) do
    local own = prefix .. 'blob:' .. kind .. ':' .. (of or id)
    if blob and (blob == own or string.sub(blob, 1, #own + 1) == own .. ':') then return blob end
  end
  return nil
end
