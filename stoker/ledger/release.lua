-- ARGV: token. Returns 1, or 0 for an owner that was fenced.
if redis.call('HGET', job, 'token') ~= ARGV[6] then return 0 end
redis.call('HDEL', job, 'token', 'tag', 'worker', 'counted')
-- Its message is on its way back to the front; if it is lost there, `recover` will see.
add(handed, now, id)
return 1
