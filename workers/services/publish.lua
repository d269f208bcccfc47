-- KEYS: each entry's stream and channel. ARGV: the stream's expiry, then each entry's id, payload, '1' to renew it, and
-- '1' if the entry before it was taken from this very publisher.
-- Returns, in pairs, each stream that cannot take entries, and why: the others' entries are published all the same. Why
-- is 'GAP' and the index of the entry that is due, where a stream has lost what it had taken: a replica became the
-- primary before it had all, or a disk lost its last second.
-- One command for all entries of a step: a pipeline of two commands an entry costs the worker more than twice as much.
local refused, answer = {}, {}

-- The index of the entry that is due in a stream that lacks the one before `entry`; nil for one that has it.
local function due(stream, entry)
  local before = (tonumber(string.match(entry, '^%d+')) - 1) .. '-0'
  local found = redis.pcall('XRANGE', stream, before, before)
  if found.err then
    -- A key of another type has no entries; XADD will say so.
    if string.find(found.err, 'WRONGTYPE', 1, true) then return nil end
    error(found.err)
  end
  if #found > 0 then return nil end
  -- Once in a fail-over: all that is there.
  local rows = redis.call('XRANGE', stream, '-', '+')
  return #rows > 0 and tonumber(string.match(rows[#rows][1], '^%d+')) or 0
end

for i = 1, #KEYS / 2 do
  local stream, channel = KEYS[2 * i - 1], KEYS[2 * i]
  local entry, payload = ARGV[4 * i - 2], ARGV[4 * i - 1]
  if ARGV[4 * i + 1] == '1' and not refused[stream] then
    local index = due(stream, entry)
    if index then
      refused[stream] = true
      table.insert(answer, stream)
      table.insert(answer, 'GAP ' .. index)
    end
  end
  if not refused[stream] then
    local reply = redis.pcall('XADD', stream, entry, 'entry', payload)
    local failed = type(reply) == 'table' and reply.err
    if failed and string.find(failed, 'WRONGTYPE', 1, true) then
      refused[stream] = true
      table.insert(answer, stream)
      table.insert(answer, failed)
    else
      -- An id that is there already: a job that runs again writes the same entries again.
      if failed and not string.find(failed, 'equal or smaller', 1, true) then return redis.error_reply(failed) end
      redis.call('PUBLISH', channel, payload)
      -- A stream of one entry is new, though the job may not be: the earlier stream was deleted.
      if ARGV[4 * i] == '1' or redis.call('XLEN', stream) == 1 then redis.call('EXPIRE', stream, ARGV[1]) end
    end
  end
end
return answer
