-- ARGV: token, the field that counts the reason ('' for none). Returns how often it was given back for that reason.
if redis.call('HGET', job, 'token') ~= ARGV[6] then return 0 end
redis.call('HDEL', job, 'token', 'tag', 'worker')
-- Its message is on its way back to the front; if it is lost there, `recover` will see.
add(handed, now, id)
if ARGV[7] == '' then return 1 end
return redis.call('HINCRBY', job, ARGV[7], 1)
