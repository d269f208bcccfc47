-- KEYS: the job's record. ARGV: a version of the adapter; seconds that a record lives which this makes anew. Returns the
-- version that the job uses from now on: the one that an owner before has pinned, if there was any.
redis.call('HSETNX', KEYS[1], 'version', ARGV[1])
if redis.call('TTL', KEYS[1]) < 0 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return redis.call('HGET', KEYS[1], 'version')
