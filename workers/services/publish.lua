-- KEYS: each entry's stream and channel. ARGV: the stream's expiry, then each entry's id, payload, and '1' to renew it.
-- Returns, in pairs, each stream that cannot take entries, and why: the others' entries are published all the same.
-- One command for all entries of a step: a pipeline of two commands an entry costs the worker more than twice as much.
local refused, answer = {}, {}
for i = 1, #KEYS / 2 do
  local stream, channel = KEYS[2 * i - 1], KEYS[2 * i]
  local entry, payload = ARGV[3 * i - 1], ARGV[3 * i]
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
      if ARGV[3 * i + 1] == '1' or redis.call('XLEN', stream) == 1 then redis.call('EXPIRE', stream, ARGV[1]) end
    end
  end
end
return answer
