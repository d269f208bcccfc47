-- KEYS: the job's record, the dead letters. ARGV: the job, the worker that gives it up ('' if it killed its owners),
-- for what, seconds that a letter is kept. Returns the job's history.
local time = redis.call('TIME')
local fields = redis.call('HMGET', KEYS[1], 'kind', 'model', 'request', 'client', 'history', 'blob')
local history = fields[5] and cjson.decode(fields[5]) or {}
if ARGV[2] ~= '' then
  local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
  table.insert(history, {worker = ARGV[2], time = now, trouble = ARGV[3]})
end
-- cjson writes an empty list as {}.
local told = #history > 0 and cjson.encode(history) or '[]'
local letter = cjson.encode({
  kind = fields[1] or '', model = fields[2] or '', request = fields[3] or '', client = fields[4] or '',
})
redis.call('HSET', KEYS[2], ARGV[1], '{"history":' .. told .. ',' .. string.sub(letter, 2))
redis.call('EXPIRE', KEYS[2], ARGV[4])
-- Its input stays for a retry, for as long as the letter: what the record does not name, no transition deletes.
redis.call('HDEL', KEYS[1], 'blob')
if fields[6] then redis.call('EXPIRE', fields[6], ARGV[4]) end
return told
