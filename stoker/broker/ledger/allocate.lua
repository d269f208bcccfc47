-- KEYS: the job's record, the adapter's hash. ARGV: the least number that is free on the caller's disk; seconds that a
-- record lives which this makes anew, because the job's own has expired. A job gets the same number whenever it asks.
local given = redis.call('HGET', KEYS[1], 'version')
if given then return given end
-- What another program wrote there counts for nothing.
local last = tonumber(string.match(redis.call('HGET', KEYS[2], 'next') or '', '^%d%d?%d?%d?%d?%d?%d?%d?%d?$')) or 0
local version = math.max(last + 1, tonumber(ARGV[1]))
redis.call('HSET', KEYS[2], 'next', version)
redis.call('HSET', KEYS[1], 'version', version)
if redis.call('TTL', KEYS[1]) < 0 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return tostring(version)
