-- KEYS: the dead letters. ARGV: seconds that a letter is kept, how many are looked at. Forgets those of them that are
-- older: each new letter lets the hash live on, with all that are in it. Returns how many went.
read_clock()
local dead, lifetime, most = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local names, gone = redis.call('HKEYS', dead), 0
-- From another one each time. Letters may be large, and nobody else is served meanwhile.
local from = math.floor(now * 1e6)
for i = 1, math.min(#names, most) do
  local name = names[(from + i) % #names + 1]
  local history = decoded(redis.call('HGET', dead, name))['history']
  local last = type(history) == 'table' and history[#history]
  local time = type(last) == 'table' and finite(last['time'])
  -- What has no time, another program wrote: people look at it.
  if time and time < now - lifetime then gone = gone + redis.call('HDEL', dead, name) end
end
return gone
