-- ARGV: token. Returns 1, or 0 for an owner that was fenced.
begin(KEYS, ARGV)
if redis.call('HGET', job, 'token') ~= ARGV[6] then return 0 end
redis.call('HDEL', job, 'token', 'tag', 'worker', 'counted')
-- Its message is on its way back to the ready list; if it is lost there, `recover` will see.
add(dispatched, now, id)
return 1
