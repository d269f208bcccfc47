-- KEYS: the job's record, its vectors, policy, unfetched, fetched, sizes
-- ARGV: id, prefix, seconds that they are kept from now on, seconds that any are kept
read_clock()
local id, lifetime = ARGV[1], tonumber(ARGV[3])
local data = redis.call('GET', KEYS[2])
if not data then
  -- What became of them; something else than a record says nothing.
  return {false, redis.pcall('HMGET', KEYS[1], 'vectors')[1] or false}
end
local left = redis.call('TTL', KEYS[2])
-- Not longer at each fetch: a program that asks again and again would keep them for ever.
if left < 0 or left > lifetime then redis.call('EXPIRE', KEYS[2], lifetime) end
if redis.call('ZREM', KEYS[4], id) == 1 then
  redis.call('ZADD', KEYS[5], now + lifetime, id)
  redis.call('EXPIRE', KEYS[5], ARGV[4])
end
note(KEYS[1], 'fetched')
return {data, false}
