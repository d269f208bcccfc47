-- KEYS: the job's record, its vectors, policy, unfetched, fetched, sizes
-- ARGV: id, prefix, seconds that any are kept, bytes that may be kept by default, the vectors
read_clock()
local id, lifetime, data = ARGV[1], lifetime_of_results(KEYS[3], ARGV[3]), ARGV[5]
begin_vectors(unpack(KEYS, 4, 6))
-- Sent again because the answer was lost, or made by another owner of the job: they take the place of those before.
local _, before = vector_bytes(id)
local _, most = make_room(ARGV[2], KEYS[3], #data - size_of(before), tonumber(ARGV[4]))
local all, held = vector_bytes(id)
local bytes = math.max(0, all - size_of(held))
-- The only ones there may be as large as they are.
if bytes > 0 and bytes + #data > most then return {0, bytes, most} end
redis.call('SET', KEYS[2], data, 'EX', lifetime)
redis.call('ZREM', KEYS[5], id)
redis.call('ZADD', KEYS[4], now + lifetime, id)
set_vector_size(id, #data)
-- Not by the lifetime of these: others may stay as long as any do, and have to be counted until then.
for _, key in ipairs({KEYS[4], KEYS[6]}) do redis.call('EXPIRE', key, ARGV[3]) end
return {1, bytes, most}
