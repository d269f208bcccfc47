-- What a job's record says, and the backlogs that there are.

local function setting(name, default) return decided(policy, name, default) end

-- Seconds that what a job leaves is kept.
local function result_ttl()
  results_live = results_live or lifetime_of_results(policy, default_ttl)
  return results_live
end

-- What a record says of its job, in one command; `wrong`: the error, where something else is in the record's place.
-- `known`: whether there is either. `over`: the job has ended; a record may outlive the result, and has no message then.
-- `more`: what the other fields hold that were asked for.
local function look(of, ...)
  local said = redis.pcall('HMGET', job_prefix .. of, 'kind', 'submitted', 'priority', 'turn', 'token', 'message', 'sent',
    'ended', 'completed', 'mine', 'blob', 'lettered', ...)
  local wrong = said['err'] and said
  return {
    id = of, wrong = wrong, known = wrong or said[1] or said[2], submitted = finite(said[2]), priority = finite(said[3]),
    turn = finite(said[4]), owned = said[5], message = said[6], sent = said[7], over = said[8] == '1' and not said[6],
    completed = said[9], mine = said[10], blob = said[11], lettered = said[12],
    more = ... and {unpack(said, 13)},
  }
end

-- Whether the job's result is there, or was. What is no result ends no job that has not ended; one that has may have a
-- result that is nothing to cjson, such as an error that names a file by bytes which are no text.
local function ended(record)
  if record.over then return true end
  local stored = redis.pcall('GET', result)
  if not stored then return false end
  local status = decoded(stored)['status']
  return status == 'SUCCESS' or status == 'FAILURE' or status == 'REVOKED'
end

-- Waiting lifts a job by one priority every `ageing` seconds, up to the best one.
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

local function backlog(priority) return backlogs[priority + 1] end

-- The priorities at which jobs may wait, best first: in most queues one or none. They are found by halves, once a call.
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
    local count = there(0, 9)
    -- Most jobs are of the default priority.
    if count == 1 and there(5, 5) == 1 then occupied = {5} else find_backlogs(0, 9, count) end
  end
  return occupied
end

-- Most queues have neither a policy nor a job that waits behind the ready list: one command says so.
local function look_around()
  if undecided ~= nil or occupied then return end
  if redis.call('EXISTS', policy, unpack(backlogs)) == 0 then undecided, occupied = true, {} end
end

-- The job waits nowhere any more. All backlogs: a record that has expired, or was written over, does not say in which.
local function leave_backlogs(of)
  for _, priority in ipairs(levels()) do redis.call('ZREM', backlog(priority), of) end
end
