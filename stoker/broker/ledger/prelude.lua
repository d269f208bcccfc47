-- What every transition shares: the names, and where a job waits: backlog and ready list.
--
-- A job waits in the backlog, one sorted set a priority, by its client's turn. Before it stands the ready list,
-- from which Celery takes messages: it holds no more than `window`, so that a later job with a better
-- claim is not behind thousands. Each transition that takes from the ready list fills it up again (`refill`).

local job, result, mark, ready, open, dispatched, turns, pace, policy, sizes = unpack(KEYS, 1, 10)
local backlogs = {unpack(KEYS, 11, 20)}
local id, job_prefix, pending_ttl, result_ttl, window = unpack(ARGV, 1, 5)
window = tonumber(window)
local prefix = string.sub(job_prefix, 1, -5)

local function setting(name, default) return decided(policy, name, default) end
result_ttl = lifetime_of_results(policy, result_ttl)

-- An object or list in JSON; an empty one for what is none.
local function decoded(text)
  local readable, value = pcall(cjson.decode, text)
  return readable and type(value) == 'table' and value or {}
end

-- A number that counts and orders can be made of; nil for what is none.
local function finite(text)
  local number = tonumber(text)
  return number and number > -2 ^ 53 and number < 2 ^ 53 and number or nil
end

-- A count; 0 for what is none.
local function count_of(text)
  return math.max(0, finite(text) or 0)
end

-- Fields of a record; none of them for what is no record.
local function fields_of(of, ...)
  return redis.pcall('HMGET', job_prefix .. of, ...)
end

-- Whether a record says of itself that its job has ended: a record may outlive the result, and has no message then.
local function is_over(of)
  local fields = fields_of(of, 'ended', 'message')
  return fields[1] == '1' and not fields[2]
end

-- Whether the job's result is there, or was. What is no result ends no job.
local function ended()
  local record = redis.pcall('GET', result)
  if not record then return is_over(id) end
  local status = decoded(record)['status']
  return status == 'SUCCESS' or status == 'FAILURE' or status == 'REVOKED'
end

-- Waiting lifts a job by one priority every `ageing` seconds, up to the best one.
local ageing
local function level(priority, submitted)
  ageing = ageing or setting('ageing', 300)
  return math.max(0, priority - math.floor((now - submitted) / ageing))
end

-- What a waiting job is ordered by; nil for one that has ended, and for one whose record no client wrote: it must not
-- stop the others.
local function rank(of)
  local fields = fields_of(of, 'priority', 'submitted', 'turn', 'token', 'message')
  local priority, submitted, turn = finite(fields[1]), finite(fields[2]), finite(fields[3])
  if not (submitted and priority and backlogs[priority + 1] and turn and fields[5]) then return nil end
  if not string.find(fields[5], '"delivery_tag": "', 1, true) then return nil end
  return {id = of, priority = priority, level = level(priority, submitted), turn = turn, owned = fields[4]}
end

-- Whether there is a record that says what was asked, or something else in its place.
local function known(of)
  local fields = fields_of(of, 'kind', 'submitted')
  return fields['err'] ~= nil or fields[1] or fields[2]
end

-- The job that a message names; nil for one that cannot be read: a worker will dead-letter it.
local function named(message)
  local headers = decoded(message)['headers']
  local of = type(headers) == 'table' and headers['id']
  return type(of) == 'string' and of or nil
end

local function backlog(priority) return backlogs[priority + 1] end

-- The job waits nowhere any more. All backlogs: a record that has expired, or was written over, does not say in which.
local function leave_backlogs(of)
  for _, waiting in ipairs(backlogs) do redis.call('ZREM', waiting, of) end
end

-- Every addition sets the key's expiry: the key may be new.
local function add(key, score, member)
  redis.call('ZADD', key, score, member)
  redis.call('EXPIRE', key, pending_ttl)
end

-- Take a turn for the job's client among those who wait at the same priority (start-time fair queueing, Goyal et al.
-- 1996, each job costing 1): a client that sends a thousand jobs stands a thousand times in the round, not before the others.
local function enter_backlog(priority, client)
  local of = 'next:' .. priority .. ':' .. client
  local state = redis.call('HMGET', turns, 'now:' .. priority, of)
  local turn = math.max(count_of(state[1]), count_of(state[2]))
  redis.call('HSET', turns, of, turn + 1)
  redis.call('EXPIRE', turns, pending_ttl)
  redis.call('HSET', job, 'turn', turn)
  -- A record of the same job that expired as it waited has left the id, perhaps at another priority.
  leave_backlogs(id)
  add(backlog(priority), turn, id)
end

-- The job will never run, because something else than Stoker wrote into its record: its client gets an error, where
-- no result is yet.
local function spoil(of)
  local record, result_of = job_prefix .. of, prefix .. 'celery-task-meta-' .. of
  if not known(of) or is_over(of) or redis.call('EXISTS', result_of) == 1 then return end
  local kind = redis.call('TYPE', record).ok
  local wrong = kind == 'hash' and 'has not the fields that its client wrote' or 'is a ' .. kind .. ', not a hash'
  local message = 'job ' .. of .. ': the key ' .. record .. ' ' .. wrong
    .. '. Something else than Stoker wrote there: send the job again, under another id.'
  local failure = {exc_type = 'JobFailed', exc_message = {message}, exc_module = 'stoker.errors'}
  local outcome = cjson.encode({status = 'FAILURE', result = failure, task_id = of})
  redis.call('SET', result_of, outcome, 'EX', result_ttl)
  redis.call('PUBLISH', result_of, outcome)
  redis.call('EXPIRE', record, result_ttl)
end

-- Which of the backlog is next: the best level first; priorities that ageing made equal take turns.
local function best()
  local found
  for priority = 0, 9 do
    local head = redis.call('ZRANGE', backlog(priority), 0, 0)[1]
    while head do
      local candidate = rank(head)
      if candidate and candidate.priority == priority then
        candidate.served = count_of(redis.call('HGET', turns, 'served:' .. priority))
        if not found or candidate.level < found.level
            or (candidate.level == found.level and candidate.served < found.served) then
          found = candidate
        end
        break
      end
      -- It has ended, or its record has expired or is spoiled. One whose record names another priority does not wait
      -- here: it would be sent again and again. `recover` finds it if it waits nowhere else.
      redis.call('ZREM', backlog(priority), head)
      if not candidate then spoil(head) end
      head = redis.call('ZRANGE', backlog(priority), 0, 0)[1]
    end
  end
  return found
end

local function ready_at(position)
  local message = redis.call('LINDEX', ready, position)
  if not message then return nil end
  local of = named(message)
  return message, of and rank(of) or {id = of, level = 0}
end

-- The job's message under a delivery tag of its own: its tag distinguishes a delivery that came back from a second one.
local function message_of(of)
  local key = job_prefix .. of
  local sent = string.format('%.0f', count_of(redis.call('HGET', key, 'sent')) + 1)
  local tag = of .. '#' .. sent
  local message = redis.call('HGET', key, 'message')
  -- In what stands for the old tag, % has a meaning.
  local field = '"delivery_tag": "' .. string.gsub(tag, '%%', '%%%%') .. '"'
  message = string.gsub(message, '"delivery_tag": "[^"]*"', field)
  redis.call('HSET', key, 'message', message, 'sent', sent)
  return message
end

-- Behind all that are as good: Celery takes from the right.
local function push(candidate)
  local message = message_of(candidate.id)
  local position, ahead = -1, nil
  local _, last = ready_at(0)
  if last and last.level > candidate.level then
    local other, standing = ready_at(position)
    while standing and standing.level <= candidate.level do
      ahead, position = other, position - 1
      other, standing = ready_at(position)
    end
    if ahead then redis.call('LINSERT', ready, 'BEFORE', ahead, message) else redis.call('RPUSH', ready, message) end
  else
    redis.call('LPUSH', ready, message)
  end
  redis.call('ZREM', backlog(candidate.priority), candidate.id)
  local served = count_of(redis.call('HGET', turns, 'served')) + 1
  redis.call('HSET', turns, 'served', served, 'served:' .. candidate.priority, served)
  redis.call('HSET', turns, 'now:' .. candidate.priority, candidate.turn)
  redis.call('EXPIRE', turns, pending_ttl)
  add(dispatched, now, candidate.id)
end

-- The last one of the ready list makes way for one of the backlog that is better. Not one that came back from a
-- silent owner: it is known by its delivery tag.
local function make_way()
  local candidate = best()
  if not candidate then return end
  local message, last = ready_at(0)
  if last.turn and not last.owned and candidate.level < last.level then
    redis.call('LREM', ready, 1, message)
    redis.call('ZREM', dispatched, last.id)
    add(backlog(last.priority), last.turn, last.id)
    push(candidate)
  end
end

local function refill()
  while redis.call('LLEN', ready) < window do
    local candidate = best()
    if not candidate then
      redis.call('DEL', turns)
      return
    end
    push(candidate)
  end
end

local function waiting()
  local count = redis.call('LLEN', ready)
  for priority = 0, 9 do count = count + redis.call('ZCARD', backlog(priority)) end
  return count
end

-- A record's `blob` if it is an input of this very job: another key that a record names is not the job's to touch.
local function own_input(blob)
  for _, kind in ipairs({'dataset', 'adapter'}) do
    local own = prefix .. 'blob:' .. kind .. ':' .. id
    if blob and (blob == own or string.sub(blob, 1, #own + 1) == own .. ':') then return blob end
  end
  return nil
end

-- The bytes of the queue's open jobs: one field a job, and their sum.
local sum = ':sum'
local function bytes_open()
  local bytes = tonumber(redis.call('HGET', sizes, sum))
  return bytes and bytes >= 0 and bytes < 2 ^ 53 and bytes or 0
end

local function set_size(of, bytes)
  local held = tonumber(redis.call('HGET', sizes, of)) or 0
  local all = math.max(0, bytes_open() - held + (bytes or 0))
  if bytes then redis.call('HSET', sizes, of, string.format('%.0f', bytes)) else redis.call('HDEL', sizes, of) end
  redis.call('HSET', sizes, sum, string.format('%.0f', all))
  if bytes then redis.call('EXPIRE', sizes, pending_ttl) end
  if redis.call('HLEN', sizes) == 1 then redis.call('DEL', sizes) end
end

-- The job has ended, or is to be: nobody waits for it any more, and its client may have another. Of what its record says
-- only that is used which can be true.
local function strike_out()
  local fields = fields_of(id, 'message', 'mine', 'blob')
  -- A key that another program wrote over stops the script here: a job that has left one order, and could not leave the
  -- next, would wait in none.
  redis.call('LLEN', ready)
  redis.call('HLEN', sizes)
  for _, key in ipairs({open, dispatched, unpack(backlogs)}) do redis.call('ZCARD', key) end
  if fields[1] then redis.call('LREM', ready, 1, fields[1]) end
  leave_backlogs(id)
  -- Another type than a client's jobs have is the next submission's to move aside.
  local mine = prefix .. 'client:'
  if fields[2] and string.sub(fields[2], 1, #mine) == mine then redis.pcall('ZREM', fields[2], id) end
  local input = own_input(fields[3])
  if input then redis.call('DEL', input) end
  set_size(id, nil)
  redis.call('ZREM', open, id)
  redis.call('ZREM', dispatched, id)
  redis.call('DEL', mark)
  if redis.call('TYPE', job).ok == 'hash' then
    redis.call('HDEL', job, 'request', 'message')
    redis.call('HSET', job, 'ended', '1')
  end
  redis.call('EXPIRE', job, result_ttl)
end

-- One more owner has crashed with it.
local function note_crash(of, worker, history, trouble)
  table.insert(history, {worker = worker, time = now, trouble = trouble or nil})
  redis.call('HSET', of, 'history', cjson.encode(history))
  redis.call('HDEL', of, 'trouble')
end

local function finish(record)
  -- After the deletions: a broker whose memory is full lets a script go on that has written already.
  redis.call('SET', result, record, 'EX', result_ttl)
  redis.call('PUBLISH', result, record)
end
