-- KEYS: the job's record, its vectors, policy, unfetched, fetched, sizes
-- ARGV: id, prefix
read_clock()
redis.call('DEL', KEYS[2])
begin_vectors(unpack(KEYS, 4, 6))
forget_vectors(ARGV[1])
note(KEYS[1], 'discarded')
return 1
