-- Where a job waits: backlog and ready list.
--
-- A job waits in the backlog, one sorted set a priority, by its client's turn. Before it stands the ready list,
-- from which Celery takes messages: it holds no more than `window`, so that a later job with a better
-- claim is not behind thousands. Each transition that takes from the ready list fills it up again (`refill`).

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

local function let_wait(priority, turn, of)
  add(backlog(priority), turn, of)
  for _, found in ipairs(occupied or {}) do
    if found == priority then return end
  end
  if occupied then
    table.insert(occupied, priority)
    table.sort(occupied)
  end
end

-- A job that was in front waits again, as one whose turn it is: turns begin anew where nobody waits, and by its own, which
-- may be of those before, it would stand behind all that came later.
local function wait_again(candidate)
  local turn = math.min(candidate.turn, count_of(redis.call('HGET', turns, 'now:' .. candidate.priority)))
  redis.call('HSET', job_prefix .. candidate.id, 'turn', turn)
  let_wait(candidate.priority, turn, candidate.id)
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
  redis.call('SET', result_of, outcome, 'EX', result_ttl())
  redis.call('PUBLISH', result_of, outcome)
  redis.call('EXPIRE', record, result_ttl())
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
    wait_again(last)
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

-- One more owner has crashed with it.
local function note_crash(of, worker, history, trouble)
  table.insert(history, {worker = worker, time = now, trouble = trouble or nil})
  redis.call('HSET', of, 'history', cjson.encode(history))
  redis.call('HDEL', of, 'trouble')
end
