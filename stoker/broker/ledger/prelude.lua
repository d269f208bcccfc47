-- Where a job waits: backlog and ready list; and how it ends.
--
-- A job waits in the backlog, one sorted set a priority, by its client's turn. Before it stands the ready list,
-- from which Celery takes messages: it holds no more than `window`, so that a later job with a better
-- claim is not behind thousands. Each transition that takes from the ready list fills it up again (`refill`).

local function setting(name, default) return decided(policy, name, default) end
result_ttl = lifetime_of_results(policy, result_ttl)

-- What a record says of its job, in one command; `wrong`: the error, where something else is in the record's place.
-- `known`: whether there is either. `over`: the job has ended; a record may outlive the result, and has no message then.
local function look(of)
  local said = redis.pcall('HMGET', job_prefix .. of, 'kind', 'submitted', 'priority', 'turn', 'token', 'message', 'sent',
    'ended', 'completed', 'mine', 'blob')
  local wrong = said['err'] and said
  return {
    id = of, wrong = wrong, known = wrong or said[1] or said[2], submitted = finite(said[2]), priority = finite(said[3]),
    turn = finite(said[4]), owned = said[5], message = said[6], sent = said[7], over = said[8] == '1' and not said[6],
    completed = said[9], mine = said[10], blob = said[11],
  }
end

-- Whether the job's result is there, or was. What is no result ends no job.
local function ended(record)
  local stored = redis.pcall('GET', result)
  if not stored then return record.over end
  local status = decoded(stored)['status']
  return status == 'SUCCESS' or status == 'FAILURE' or status == 'REVOKED'
end

-- Waiting lifts a job by one priority every `ageing` seconds, up to the best one.
local ageing
local function level(priority, submitted)
  ageing = ageing or setting('ageing', 300)
  return math.max(0, priority - math.floor((now - submitted) / ageing))
end

-- Where the delivery tag of a message begins, and the quote behind it.
local function tag_in(message)
  local _, before = string.find(message, '"delivery_tag": "', 1, true)
  return before and before + 1, before and string.find(message, '"', before + 1, true) or #message + 1
end

-- A record with what its waiting job is ordered by; nil for one that has ended, and for one whose record no client
-- wrote: it must not stop the others.
local function ranked(record)
  if not (record.submitted and backlogs[(record.priority or -1) + 1] and record.turn and record.message) then return nil end
  if not tag_in(record.message) then return nil end
  record.level = level(record.priority, record.submitted)
  return record
end

local function rank(of) return ranked(look(of)) end

-- The job that a message names; nil for one that cannot be read: a worker will dead-letter it. Its delivery tag begins
-- with the job's id, and to find it there takes a fourth of the time.
local function named(message)
  local from, behind = tag_in(message)
  local tagged = from and string.match(string.sub(message, from, behind - 1), '^(.+)#%d+$')
  if tagged and string.find(message, '"id": "' .. tagged .. '"', 1, true) then return tagged end
  local headers = decoded(message)['headers']
  local of = type(headers) == 'table' and headers['id']
  return type(of) == 'string' and of or nil
end

local function backlog(priority) return backlogs[priority + 1] end

-- The priorities at which jobs may wait, best first: in most queues one or none. They are found by halves, once a script.
local occupied
local function there(from, to) return redis.call('EXISTS', unpack(backlogs, from + 1, to + 1)) end
local function find_backlogs(from, to, count)
  if count == to - from + 1 then
    for priority = from, to do table.insert(occupied, priority) end
  elseif count > 0 then
    local middle = math.floor((from + to) / 2)
    local better = there(from, middle)
    find_backlogs(from, middle, better)
    find_backlogs(middle + 1, to, count - better)
  end
end

local function levels()
  if not occupied then
    occupied = {}
    find_backlogs(0, 9, there(0, 9))
  end
  return occupied
end

-- The job waits nowhere any more. All backlogs: a record that has expired, or was written over, does not say in which.
local function leave_backlogs(of)
  for _, priority in ipairs(levels()) do redis.call('ZREM', backlog(priority), of) end
end

local function let_wait(priority, turn, of)
  add(backlog(priority), turn, of)
  for _, found in ipairs(occupied or {}) do
    if found == priority then return end
  end
  occupied = nil
end

-- The next turn of a client among those who wait at the same priority (start-time fair queueing, Goyal et al. 1996,
-- each job costing 1): a client that sends a thousand jobs stands a thousand times in the round, not before the others.
local function next_turn(priority, client)
  local state = redis.call('HMGET', turns, 'now:' .. priority, 'next:' .. priority .. ':' .. client)
  return math.max(count_of(state[1]), count_of(state[2]))
end

local function enter_backlog(priority, client, turn)
  redis.call('HSET', turns, 'next:' .. priority .. ':' .. client, turn + 1)
  redis.call('EXPIRE', turns, pending_ttl)
  -- A record of the same job that expired as it waited has left the id, perhaps at another priority.
  leave_backlogs(id)
  let_wait(priority, turn, id)
end

-- The job will never run, because something else than Stoker wrote into its record: its client gets an error, where
-- no result is yet.
local function spoil(of)
  local record, result_of, said = job_prefix .. of, prefix .. 'celery-task-meta-' .. of, look(of)
  if not said.known or said.over or redis.call('EXISTS', result_of) == 1 then return end
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
  for _, priority in ipairs(levels()) do
    local head = redis.call('ZRANGE', backlog(priority), 0, 0)[1]
    while head do
      local candidate = rank(head)
      if candidate and candidate.priority == priority then
        local served = redis.call('HMGET', turns, 'served:' .. priority, 'served')
        candidate.served, candidate.all_served = count_of(served[1]), count_of(served[2])
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
local function message_of(candidate)
  local sent = string.format('%.0f', count_of(candidate.sent) + 1)
  local from, behind = tag_in(candidate.message)
  local tag = candidate.id .. '#' .. sent
  local message = string.sub(candidate.message, 1, from - 1) .. tag .. string.sub(candidate.message, behind)
  local key = job_prefix .. candidate.id
  redis.call('HSET', key, 'message', message, 'sent', sent)
  return message
end

-- Behind all that are as good: Celery takes from the right.
local function push(candidate)
  local message = message_of(candidate)
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
  local served, at = candidate.all_served + 1, candidate.priority
  redis.call('HSET', turns, 'served', served, 'served:' .. at, served, 'now:' .. at, candidate.turn)
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
    let_wait(last.priority, last.turn, last.id)
    push(candidate)
  end
end

local function refill()
  for _ = redis.call('LLEN', ready) + 1, window do
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
  for _, priority in ipairs(levels()) do count = count + redis.call('ZCARD', backlog(priority)) end
  return count
end

-- The bytes of the queue's open jobs, one field a job and their sum: this sum, and the job's part of it.
local sum = ':sum'
local function bytes_open(of)
  local stored = redis.call('HMGET', sizes, sum, of)
  local bytes = tonumber(stored[1])
  return bytes and bytes >= 0 and bytes < 2 ^ 53 and bytes or 0, stored[2]
end

-- `all`, `held`: what `bytes_open` says of the job.
local function add_size(bytes, all, held)
  all = math.max(0, all - (tonumber(held) or 0)) + bytes
  redis.call('HSET', sizes, id, string.format('%.0f', bytes), sum, string.format('%.0f', all))
  redis.call('EXPIRE', sizes, pending_ttl)
end

local function drop_size(of, all, held)
  if not held then return end
  local left = math.max(0, all - (tonumber(held) or 0))
  if left == 0 then
    redis.call('DEL', sizes)
  else
    redis.call('HDEL', sizes, of)
    redis.call('HSET', sizes, sum, string.format('%.0f', left))
  end
end

-- The job has ended, or is to be: nobody waits for it any more, and its client may have another. Of what its record says
-- only that is used which can be true. `owner`: the token of the owner that ended it, if it had one.
local function strike_out(record, owner)
  -- A key that another program wrote over stops the script here: a job that has left one order, and could not leave the
  -- next, would wait in none.
  local all, held = bytes_open(id)
  for _, key in ipairs({open, dispatched}) do redis.call('ZCARD', key) end
  for _, priority in ipairs(levels()) do redis.call('ZCARD', backlog(priority)) end
  if record.message then redis.call('LREM', ready, 1, record.message) else redis.call('LLEN', ready) end
  leave_backlogs(id)
  -- Another type than a client's jobs have is the next submission's to move aside.
  local mine = prefix .. 'client:'
  if record.mine and string.sub(record.mine, 1, #mine) == mine then redis.pcall('ZREM', record.mine, id) end
  local input = own_input(record.blob)
  if input then redis.call('DEL', input) end
  drop_size(id, all, held)
  redis.call('ZREM', open, id)
  redis.call('ZREM', dispatched, id)
  redis.call('DEL', mark)
  if record.known and not record.wrong then
    redis.call('HDEL', job, 'request', 'message')
    redis.call('HSET', job, 'ended', '1', unpack(owner and {'completed', owner} or {}))
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
