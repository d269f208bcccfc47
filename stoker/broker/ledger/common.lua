-- What every script shares: the clock, and what the policy decides.
--
-- A broker keeps what stands outside of functions from one call of a library to the next: each transition begins with
-- `begin`, or with `read_clock`, which sets all of it anew.

-- Redis' own clock: clients' and workers' clocks may differ. `undecided`: whether there is no policy, once it is known.
local now, undecided
local function read_clock()
  local time = redis.call('TIME')
  now, undecided = tonumber(time[1]) + tonumber(time[2]) / 1e6, nil
end

-- What is no whole number of at least 1, or more than `stoker jobs policy` takes, was not decided by it.
local most_of = {
  queue_limit = 1e6, client_limit = 1e6, queue_bytes = 2 ^ 40, vector_bytes = 2 ^ 40, result_seconds = 24 * 3600,
  crashes = 1000, ageing = 30 * 24 * 3600,
}
local function decided(policy, name, default)
  if undecided == nil then undecided = redis.call('EXISTS', policy) == 0 end
  if undecided then return default end
  local text = redis.call('HGET', policy, name)
  local value = text and string.match(text, '^[1-9]%d*$') and tonumber(text)
  return value and value <= most_of[string.match(name, '^[^:]+')] and value or default
end

-- Seconds that results are kept, with what belongs to them. Less than a minute, and a client might look too late.
local function lifetime_of_results(policy, default)
  local seconds = decided(policy, 'result_seconds', 0)
  return seconds >= 60 and seconds or tonumber(default)
end
