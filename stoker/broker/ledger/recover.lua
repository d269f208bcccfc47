-- KEYS[21]: what Celery holds unacknowledged
-- ARGV: seconds since a job was dispatched, prefix of workers' presences. Returns the jobs that were put back.
local standing = {}
for _, message in ipairs(redis.call('LRANGE', ready, 0, -1)) do
  local of = named(message)
  if of then standing[of] = true end
end

-- A message is lost that is neither in the ready list nor held, and whose job no living worker runs: the worker that
-- took it died before it wrote that down. No worker need have run the job yet; or its owner died, and the message was
-- lost on the way back.
local function lost(of, token, tag, worker)
  if standing[of] then return false end
  if not token then return true end
  return redis.call('HEXISTS', KEYS[21], tag or '') == 0 and redis.call('EXISTS', ARGV[7] .. (worker or '')) == 0
end

-- Each open job has a record, and waits or is dispatched: where the numbers agree, the oldest need no look each.
local function all_in_order(oldest)
  local ordered, records = redis.call('ZCARD', dispatched), {}
  for _, waiting in ipairs(backlogs) do ordered = ordered + redis.call('ZCARD', waiting) end
  if ordered ~= redis.call('ZCARD', open) then return false end
  for position, of in ipairs(oldest) do records[position] = job_prefix .. of end
  return #oldest == 0 or redis.call('EXISTS', unpack(records)) == #oldest
end

-- A job whose record is spoiled is in no order any more. One that is in none, because another program wrote over the key
-- of an order, counts as dispatched now; so does one that was dispatched in the future.
local oldest = redis.call('ZRANGE', open, 0, 99)
for _, of in ipairs(all_in_order(oldest) and {} or oldest) do
  local job_there = rank(of)
  if not job_there then
    redis.call('ZREM', open, of)
    redis.call('ZREM', dispatched, of)
    leave_backlogs(of)
    spoil(of)
  elseif not redis.call('ZSCORE', dispatched, of) and not redis.call('ZSCORE', backlog(job_there.priority), of) then
    add(dispatched, now, of)
  end
end
for _, of in ipairs(redis.call('ZRANGEBYSCORE', dispatched, string.format('%.6f', now + 1), '+inf')) do
  add(dispatched, now, of)
end

local found = {}
for _, of in ipairs(redis.call('ZRANGEBYSCORE', dispatched, '-inf', now - tonumber(ARGV[6]), 'LIMIT', 0, 1000)) do
  local key = job_prefix .. of
  local fields = fields_of(of, 'message', 'priority', 'turn', 'token', 'tag', 'worker', 'history', 'trouble')
  if not rank(of) then
    redis.call('ZREM', dispatched, of)
    spoil(of)
  elseif lost(of, fields[4], fields[5], fields[6]) then
    if fields[4] then
      note_crash(key, fields[6], decoded(fields[7]), fields[8])
      redis.call('HDEL', key, 'token', 'tag', 'worker')
    end
    redis.call('ZREM', dispatched, of)
    add(backlog(tonumber(fields[2])), fields[3], of)
    table.insert(found, of)
  end
end
-- Jobs that waited until their record expired stand no longer between those that wait, nor count for the queue's limit.
for _, of in ipairs(redis.call('ZRANGEBYSCORE', open, '-inf', now - pending_ttl, 'LIMIT', 0, 1000)) do
  if not rank(of) then leave_backlogs(of) end
  redis.call('ZREM', open, of)
end
-- Jobs that went with their record have left their sizes.
if redis.call('ZCARD', open) == 0 then
  redis.call('DEL', sizes)
elseif redis.call('HLEN', sizes) ~= redis.call('ZCARD', open) + 1 then
  for _, of in ipairs(redis.call('HKEYS', sizes)) do
    if of ~= sum and not redis.call('ZSCORE', open, of) then set_size(of, nil) end
  end
end
refill()
return found
