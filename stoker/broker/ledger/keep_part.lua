-- KEYS[21]: the run's checkpoints. ARGV: token, the part's name, its bytes, the default limit of the queue's bytes. Keeps
-- one part of a checkpoint. Returns whether there was room (false: the caller is not the owner any more), the bytes of
-- the queue, and how many of them there may be with checkpoints.
begin(KEYS, ARGV)
local checkpoints, token, name, data = KEYS[21], unpack(ARGV, 6, 8)
if not owns(token) then return false end
local all, held = bytes_open(id)
-- The other half is for jobs that are sent meanwhile.
local room = math.floor(setting('queue_bytes', tonumber(ARGV[9])) / 2)
if redis.call('HEXISTS', checkpoints, name) == 1 then return {1, all, room} end
if all + #data > room then return {0, all, room} end
redis.call('HSET', checkpoints, name, data)
redis.call('HINCRBY', checkpoints, 'bytes', #data)
redis.call('EXPIRE', checkpoints, pending_ttl)
add_size((tonumber(held) or 0) + #data, all, held)
return {1, all + #data, room}
