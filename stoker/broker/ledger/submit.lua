-- KEYS[20], [21]: the dead letters, the client's open jobs in this queue
-- ARGV: default limits of queue and client, revive?, bytes of the input or '', then the record's fields and values
local dead, mine, revive = KEYS[20], KEYS[21], ARGV[8] == '1'
local fields, record = {}, {}
for i = 10, #ARGV, 2 do
  fields[ARGV[i]] = ARGV[i + 1]
  table.insert(record, ARGV[i])
  table.insert(record, ARGV[i + 1])
end
if revive then
  if redis.call('HEXISTS', dead, id) == 0 then return {'unknown', 0, 0, '0'} end
elseif redis.call('EXISTS', job) == 1 then
  return {'known', 0, 0, '0'}
end

-- Seconds until `jobs` more have ended, by the pace at which jobs of this queue have ended.
local function wait_for(jobs)
  local interval = tonumber(redis.call('HGET', pace, 'interval')) or 1
  return string.format('%.1f', math.min(3600, math.max(1, interval * jobs)))
end

local depth, limit = waiting(), setting('queue_limit', tonumber(ARGV[6]))
if depth >= limit then return {'full', depth, limit, wait_for(depth - limit + 1)} end
local held = redis.call('ZCOUNT', mine, now - pending_ttl, '+inf')
local most = setting('client_limit:' .. fields['client'], setting('client_limit', tonumber(ARGV[7])))
if held >= most then return {'client_full', held, most, wait_for(math.max(1, depth / held))} end

-- From where the job's messages are counted: a record that comes after another of the same job, which has expired or is
-- revived, makes messages with other tags. Those of the first may still be somewhere.
local sent = math.max(now * 1e6, count_of(redis.pcall('HGET', job, 'sent')))
if revive then
  redis.call('HDEL', dead, id)
  redis.call('DEL', job, result, mark)
end
-- The first write of a new job, and one that a broker without memory refuses: then nothing was written.
local submitted = string.format('%.6f', now)
redis.call('HSET', job, 'submitted', submitted, 'sent', string.format('%.0f', sent), 'mine', mine, unpack(record))
redis.call('ZREMRANGEBYSCORE', mine, '-inf', now - pending_ttl)
redis.call('EXPIRE', job, pending_ttl)
for _, key in ipairs({open, mine}) do
  add(key, now, id)
end
if ARGV[9] ~= '' then redis.call('SET', fields['blob'], ARGV[9], 'EX', pending_ttl)
elseif fields['blob'] then redis.call('EXPIRE', fields['blob'], pending_ttl) end
enter_backlog(tonumber(fields['priority']), fields['client'])
refill()
if redis.call('ZSCORE', backlog(tonumber(fields['priority'])), id) then make_way() end
return {'new', depth, limit, '0'}
