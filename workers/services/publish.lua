-- KEYS: each entry's stream and channel. ARGV: the stream's expiry, then each entry's id, payload, '1' to renew it, and
-- '1' if the entry before it was taken from this very publisher.
-- Returns, in pairs, each stream that cannot take entries, and why: the others' entries are published all the same. Why
-- is 'GAP' and the index of the entry that is due, where a stream has lost what it had taken: a replica became the
-- primary before it had all, or a disk lost its last second.
-- One command for all entries of a step: a pipeline of two commands an entry costs the worker more than twice as much.
local refused, answer = {}, {}

-- The index of the entry that is due in a stream of so many entries, if it lacks the one before `index`; else nil.
local function due(stream, length, index)
  -- Streams begin at 0, except those whose beginning has expired: of these the entry itself is looked for.
  if length >= index or #redis.call('XRANGE', stream, index .. '-0', index .. '-0') > 0 then return nil end
  -- Once in a fail-over: all that is there.
  local rows = redis.call('XRANGE', stream, '-', '+')
  return #rows > 0 and tonumber(string.match(rows[#rows][1], '^%d+')) or 0
end

for i = 1, #KEYS / 2 do
  local stream, channel = KEYS[2 * i - 1], KEYS[2 * i]
  local entry, payload = ARGV[4 * i - 2], ARGV[4 * i - 1]
  -- A key of another type has no length; XADD will say so.
  local length = refused[stream] and 0 or redis.pcall('XLEN', stream)
  if ARGV[4 * i + 1] == '1' and type(length) == 'number' and not refused[stream] then
    local index = due(stream, length, tonumber(string.match(entry, '^%d+')) - 1)
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
      -- A stream that was empty is new, though the job may not be: the earlier stream was deleted.
      if ARGV[4 * i] == '1' or length == 0 then redis.call('EXPIRE', stream, ARGV[1]) end
    end
  end
end
return answer
