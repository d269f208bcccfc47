-- KEYS[21]: the dead letters. ARGV: token, the worker that gives the job up ('' if it crashed its owners), for what,
-- seconds that a letter is kept. Returns the job's history, or false for an owner that was fenced.
begin(KEYS, ARGV)
local dead, token, worker, trouble, dead_ttl = KEYS[21], unpack(ARGV, 6, 9)
local fields = redis.call('HMGET', job, 'kind', 'model', 'request', 'client', 'history', 'blob', 'token', 'lettered')
-- cjson writes an empty list as {}.
local function written(history) return type(history) == 'table' and #history > 0 and cjson.encode(history) or '[]' end
if fields[7] ~= token then return false end
-- Sent again, because the answer was lost: the letter stands as it is.
if fields[8] == token then return written(decoded(redis.call('HGET', dead, id) or '')['history'] or {}) end
local history = decoded(fields[5])
if worker ~= '' then table.insert(history, {worker = worker, time = now, trouble = trouble}) end
local letter = cjson.encode({
  kind = fields[1] or '', model = fields[2] or '', request = fields[3] or '', client = fields[4] or '',
})
redis.call('HSET', dead, id, '{"history":' .. written(history) .. ',' .. string.sub(letter, 2))
redis.call('EXPIRE', dead, dead_ttl)
redis.call('HSET', job, 'lettered', token)
-- Its input stays for a retry, for as long as the letter; the record names it on, for a submission that is sent again.
local input = own_input(fields[6])
if input then redis.call('EXPIRE', input, dead_ttl) end
redis.call('EXPIRE', prefix .. 'checkpoint:' .. id, dead_ttl)
return written(history)
