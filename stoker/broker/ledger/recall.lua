-- KEYS[21]: the messages that one worker alone takes. Returns 1 for a job that it did not take: any worker may, next.
begin(KEYS, ARGV)
local message, owner = unpack(redis.call('HMGET', job, 'message', 'token'))
if not message or redis.call('LREM', KEYS[21], 1, message) == 0 or owner then return 0 end
redis.call('RPUSH', ready, message)
add(dispatched, now, id)
return 1
