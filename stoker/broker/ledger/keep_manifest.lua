-- KEYS[21]: the run's checkpoints. ARGV: token, the manifest, then the names of the parts that lie here and that it
-- needs. From now on a run resumes by this manifest; what no manifest needs goes. Returns 'kept', 'lost' if a part is not
-- there, and 'fenced' for an owner that was.
begin(KEYS, ARGV)
local checkpoints, token, manifest = KEYS[21], ARGV[6], ARGV[7]
if not owns(token) then return 'fenced' end
local needed, bytes = {manifest = true, bytes = true}, #manifest
for i = 8, #ARGV do
  if redis.call('HEXISTS', checkpoints, ARGV[i]) == 0 then return 'lost' end
  needed[ARGV[i]] = true
  bytes = bytes + tonumber(string.match(ARGV[i], '-(%d+)$'))
end
for _, name in ipairs(redis.call('HKEYS', checkpoints)) do
  if not needed[name] then redis.call('HDEL', checkpoints, name) end
end
local all, held = bytes_open(id)
local before = count_of(redis.call('HGET', checkpoints, 'bytes'))
redis.call('HSET', checkpoints, 'manifest', manifest, 'bytes', string.format('%.0f', bytes))
redis.call('EXPIRE', checkpoints, pending_ttl)
add_size(math.max(0, (tonumber(held) or 0) - before) + bytes, all, held)
return 'kept'
