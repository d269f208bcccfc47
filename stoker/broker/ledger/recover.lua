-- KEYS[21]: what Celery holds unacknowledged
-- ARGV: seconds since a job was dispatched, prefix of workers' presences, how many of those that were
-- dispatched longest ago are looked at. Returns the jobs that were put back.
begin(KEYS, ARGV)
local standing = {}
for _, message in ipairs(redis.call('LRANGE', ready, 0, -1)) do
  local of = named(message)
  if of then standing[of] = true end
end

-- A message that is not in the ready list counts as lost where nobody owns the job: the worker that took it died before it
-- wrote that down. One that is held, and was not claimed meanwhile, comes a second time, and `claim` drops one of both.
-- Of a job with an owner it is lost if it is not held and its worker is gone: it died, and the message on the way back.
local function lost(token, tag, worker)
  if not token then return true end
  return redis.call('HEXISTS', KEYS[21], tag or '') == 0 and redis.call('EXISTS', ARGV[7] .. (worker or '')) == 0
end

-- A worker that stops, or no longer has the model, takes no job of it.
local function takes(worker, model)
  local said = decoded(redis.pcall('GET', ARGV[7] .. worker))
  if said['stopping'] == true or type(said['models']) ~= 'table' then return false end
  for _, card in ipairs(said['models']) do
    if type(card) == 'table' and card['model'] == model then return true end
  end
  return false
end

local function placed(worker) return ready .. ':placed:' .. worker end

-- The messages that wait for a worker, while it takes any. Such a job is not lost, however long the worker is busy: no
-- other can run it, and would only send it back.
local waiting_for = {}
local function waits_for(worker, model, message)
  if not waiting_for[worker] then
    waiting_for[worker] = {}
    local messages = takes(worker, model) and redis.pcall('LRANGE', placed(worker), 0, -1) or {}
    for _, found in ipairs(messages) do waiting_for[worker][found] = true end
  end
  return waiting_for[worker][message]
end

-- Each open job has a record, and waits or is dispatched: where the numbers agree, and the oldest few have their records,
-- the oldest need no look each.
local function all_in_order(oldest)
  local ordered, records = redis.call('ZCARD', dispatched), {}
  for _, priority in ipairs(levels()) do ordered = ordered + redis.call('ZCARD', backlog(priority)) end
  if ordered ~= redis.call('ZCARD', open) then return false end
  for position, of in ipairs(oldest) do records[position] = job_prefix .. of end
  return #oldest == 0 or redis.call('EXISTS', unpack(records)) == #oldest
end

-- A job whose record is spoiled is in no order any more. One that is in none, because another program wrote over the key
-- of an order, counts as dispatched now; so does one that was dispatched in the future.
local in_order = all_in_order(redis.call('ZRANGE', open, 0, 9))
for _, of in ipairs(in_order and {} or redis.call('ZRANGE', open, 0, 99)) do
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

-- A run may take longer than a job may wait: without its record its owner would be fenced, and its work lost.
local function keep(running)
  if running.submitted > now - pending_ttl / 2 then return end
  local names = {job_prefix .. running.id, open, dispatched, sizes, own_input(running.blob, running.id)}
  for _, key in ipairs(names) do redis.call('EXPIRE', key, pending_ttl) end
end

local found, most = {}, tonumber(ARGV[8])
local oldest = redis.call('ZRANGEBYSCORE', dispatched, '-inf', now - tonumber(ARGV[6]), 'LIMIT', 0, most)
for _, of in ipairs(oldest) do
  local key = job_prefix .. of
  local waits = rank(of)
  if not waits then
    redis.call('ZREM', dispatched, of)
    spoil(of)
  elseif not standing[of] then
    local owner = redis.call('HMGET', key, 'tag', 'worker', 'history', 'trouble', 'needs', 'model')
    local needs = not waits.owned and owner[5]
    if not (needs and waits_for(needs, owner[6], waits.message)) and lost(waits.owned, owner[1], owner[2]) then
      if needs then redis.pcall('LREM', placed(needs), 0, waits.message) end
      if waits.owned then
        note_crash(key, owner[2], decoded(owner[3]), owner[4])
        redis.call('HDEL', key, 'token', 'tag', 'worker')
      end
      redis.call('ZREM', dispatched, of)
      wait_again(waits)
      table.insert(found, of)
    else
      keep(waits)
      -- Where there may be more, those that run make room for them at the next look.
      if #oldest == most then add(dispatched, now, of) end
    end
  end
end
-- Jobs that waited until their record expired stand no longer between those that wait, nor count for the queue's limit.
for _, of in ipairs(redis.call('ZRANGEBYSCORE', open, '-inf', now - pending_ttl, 'LIMIT', 0, 1000)) do
  if not rank(of) then
    leave_backlogs(of)
    redis.call('ZREM', open, of)
  end
end
-- Jobs that went with their record have left their sizes.
if redis.call('ZCARD', open) == 0 then
  redis.call('DEL', sizes)
elseif redis.call('HLEN', sizes) ~= redis.call('ZCARD', open) + 1 then
  for _, of in ipairs(redis.call('HKEYS', sizes)) do
    if of ~= sum and not redis.call('ZSCORE', open, of) then drop_size(of, bytes_open(of)) end
  end
end
refill()
return found
