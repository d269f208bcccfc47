-- KEYS[21], [22]: the dead letters, the client's open jobs in this queue; [23] to [25]: which vectors are kept
-- ARGV: default limits of queue, client, bytes and vectors, revive?, seconds that a key of a wrong type is kept, bytes of the input
-- or '', then the record's fields and values
begin(KEYS, ARGV)
local dead, mine, revive, spoiled_ttl, data = KEYS[21], KEYS[22], ARGV[10] == '1', ARGV[11], ARGV[12]
local fields, record, size = {}, {}, #data
for i = 13, #ARGV, 2 do
  fields[ARGV[i]] = ARGV[i + 1]
  table.insert(record, ARGV[i])
  table.insert(record, ARGV[i + 1])
  size = size + #ARGV[i] + #ARGV[i + 1]
end
local input = own_input(fields['blob'])
-- What is no string there, its worker refuses.
if input and data == '' and redis.call('TYPE', input).ok == 'string' then size = size + redis.call('STRLEN', input) end
-- A retry goes on from the checkpoints of before.
size = size + count_of(redis.pcall('HGET', prefix .. 'checkpoint:' .. id, 'bytes'))
if revive then
  if redis.call('HEXISTS', dead, id) == 0 then return {'unknown', 0, 0, '0'} end
  -- Its client has sent the job anew meanwhile, and it waits or runs: the letter stays.
  if rank(id) then return {'known', 0, 0, '0'} end
elseif redis.call('EXISTS', job) == 1 then
  -- Sent again, because the answer was lost: each sending of an input has a name of its own. Where
  -- another job was first, the client deletes what it has uploaded.
  return {input and redis.pcall('HGET', job, 'blob') == input and 'new' or 'known', 0, 0, '0'}
end

-- Workers move aside what spoils the keys of a queue; which clients there are, they do not know.
local held = redis.pcall('ZCOUNT', mine, now - pending_ttl, '+inf')
if type(held) == 'table' then
  held = 0
  local aside = prefix .. 'spoiled:' .. string.sub(mine, #prefix + 1)
  redis.call('RENAME', mine, aside)
  redis.call('EXPIRE', aside, spoiled_ttl)
end

-- Seconds until `jobs` more have ended, by the pace at which jobs of this queue have ended.
local function wait_for(jobs)
  local interval = tonumber(redis.call('HGET', pace, 'interval')) or 1
  return string.format('%.1f', math.min(3600, math.max(1, interval * jobs)))
end

local depth, limit = waiting(), setting('queue_limit', tonumber(ARGV[6]))
if depth >= limit then
  -- Ids at the heads of the backlog that have no job do not count.
  best()
  depth = waiting()
end
if depth >= limit then return {'full', depth, limit, wait_for(depth - limit + 1)} end
local most = setting('client_limit:' .. fields['client'], setting('client_limit', tonumber(ARGV[7])))
if held >= most then return {'client_full', held, most, wait_for(math.max(1, depth / held))} end
local room, bytes, former = setting('queue_bytes', tonumber(ARGV[8])), bytes_open(id)
if size > room then return {'too_large', size, room, '0'} end
if bytes + size > room and redis.call('ZCARD', open) > 0 then
  return {'bytes_full', bytes, room, wait_for(redis.call('ZCARD', open) * math.min(1, size / bytes))}
end
if fields['kind'] == 'embed' then
  begin_vectors(unpack(KEYS, 23, 25))
  local kept, room = make_room(prefix, policy, 1, tonumber(ARGV[9]))
  -- How soon they are fetched, nobody knows.
  if kept + 1 > room then return {'vectors_full', kept, room, '5.0'} end
end

-- From where the job's messages are counted: a record that comes after another of the same job, which has expired or is
-- revived, makes messages with other tags. Those of the first may still be somewhere.
-- A dead letter that is sent again stays in its trace, and goes on to count its owners.
local kept = revive and redis.pcall('HMGET', job, 'attempts', 'traceparent', 'tracestate', 'sent', 'asked', 'lettered') or {}
local sent = math.max(now * 1e6, count_of(kept[4]))
local priority, client = tonumber(fields['priority']), fields['client']
local turn = next_turn(priority, client)
if revive then
  redis.call('DEL', job, result)
  -- Its tokens are made again, perhaps by another version of its adapter. A run goes on behind its reports.
  if fields['kind'] ~= 'train' then redis.call('DEL', prefix .. 'stream:' .. id) end
end
-- The first write of a new job, and one that a broker without memory refuses: then nothing was written.
local submitted = string.format('%.6f', now)
redis.call('HSET', job, 'submitted', submitted, 'sent', string.format('%.0f', sent), 'mine', mine, 'turn', turn, unpack(record))
for i, name in ipairs({'attempts', 'traceparent', 'tracestate'}) do
  if kept[i] then redis.call('HSETNX', job, name, kept[i]) end
end
-- What its client asked for is that of the letter's job, and not of one that was sent anew meanwhile.
if kept[5] and kept[6] then redis.call('HSETNX', job, 'asked', kept[5]) end
local accepted, trouble = pcall(function()
  redis.call('ZREMRANGEBYSCORE', mine, '-inf', now - pending_ttl)
  -- Ids of jobs that went with their record, or whose record was spoiled.
  local first = redis.call('ZRANGE', mine, 0, 1)
  local since = #first > 0 and redis.call('ZMSCORE', open, unpack(first))
  for i, of in ipairs(first) do
    if not since[i] then redis.call('ZREM', mine, of) end
  end
  redis.call('EXPIRE', job, pending_ttl)
  -- A cancel was of an earlier record: of the dead letter's, or of one that expired as its owner ran it.
  redis.call('DEL', mark)
  for _, key in ipairs({open, mine}) do
    add(key, now, id)
  end
  add_size(size, bytes, former)
  enter_backlog(priority, client, turn)
  refill()
  if redis.call('ZSCORE', backlog(priority), id) then make_way() end
  -- Last, because a job that is refused leaves no input, and a retry that fails the letter, and its input for as long.
  if input and data ~= '' then redis.call('SET', input, data, 'EX', pending_ttl)
  elseif input then redis.call('EXPIRE', input, pending_ttl) end
  if revive then redis.call('HDEL', dead, id) end
end)
if not accepted then
  -- A job that is known and does not wait would never run, however often its client sends it.
  redis.pcall('LREM', ready, 1, redis.call('HGET', job, 'message'))
  redis.call('DEL', job)
  for _, key in ipairs({open, mine}) do redis.pcall('ZREM', key, id) end
  return type(trouble) == 'table' and trouble or redis.error_reply(trouble)
end
return {'new', depth, limit, '0'}
