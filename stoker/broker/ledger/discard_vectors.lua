-- KEYS: the job's record, its vectors, policy, unfetched, fetched, sizes
-- ARGV: id, prefix
read_clock()
redis.call('DEL', KEYS[2])
vectors_kept(ARGV[2], unpack(KEYS, 3, 6)).forget(ARGV[1])
note(KEYS[1], 'discarded')
return 1
