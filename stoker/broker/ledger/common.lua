-- What every script shares: the clock, and what the policy decides.

-- Redis' own clock: clients' and workers' clocks may differ.
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6

-- What is no whole number of at least 1, or more than `stoker jobs policy` takes, was not decided by it.
local most_of = {
  queue_limit = 1e6, client_limit = 1e6, queue_bytes = 2 ^ 40, vector_bytes = 2 ^ 40, result_seconds = 24 * 3600,
  crashes = 1000, ageing = 30 * 24 * 3600,
}
local undecided
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
