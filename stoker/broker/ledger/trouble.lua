-- KEYS: the job's record. ARGV: what its owner is about to end of. A record that has expired is not made anew.
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'trouble', ARGV[1])
return 1
