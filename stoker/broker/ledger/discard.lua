-- KEYS: the job's record, its vectors, policy, unfetched, fetched, sizes, its result, its stream
-- ARGV: id, prefix, seconds that the job is known yet, how the record of a success begins, what takes its place
read_clock()
local lifetime, begins = tonumber(ARGV[3]), ARGV[4]
local ended = string.sub(redis.call('GET', KEYS[7]) or '', 1, #begins) == begins
redis.call('DEL', KEYS[2])
begin_vectors(unpack(KEYS, 4, 6))
forget_vectors(ARGV[1])
note(KEYS[1], 'discarded')
-- A job that has not ended goes on, and its stream with it. An error is small, and others may ask for it.
if not ended then return 1 end
redis.call('DEL', KEYS[8])
redis.call('SET', KEYS[7], ARGV[5], 'KEEPTTL')
for _, key in ipairs({KEYS[1], KEYS[7]}) do
  if redis.call('TTL', key) > lifetime then redis.call('EXPIRE', key, lifetime) end
end
return 1
