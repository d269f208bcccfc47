-- ARGV: token. Counts that the job ended for want of memory, once an owner. Returns how often it has by now, or 0 for
-- an owner that was fenced.
begin(KEYS, ARGV)
local state = redis.call('HMGET', job, 'token', 'counted', 'out_of_memory')
if state[1] ~= ARGV[6] then return 0 end
-- Sent again, because the answer was lost.
if state[2] == ARGV[6] then return tonumber(state[3]) end
redis.call('HSET', job, 'counted', ARGV[6])
return redis.call('HINCRBY', job, 'out_of_memory', 1)
