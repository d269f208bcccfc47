-- KEYS: each entry's stream and channel. ARGV: the stream's expiry, then each entry's id, payload, and '1' to renew it.
-- One command for all entries of a step: a pipeline of two commands an entry costs the worker more than twice as much.
for i = 1, #KEYS / 2 do
  local stream, channel = KEYS[2 * i - 1], KEYS[2 * i]
  local entry, payload = ARGV[3 * i - 1], ARGV[3 * i]
  local reply = redis.pcall('XADD', stream, entry, 'entry', payload)
  -- An id that is there already: a job that runs again writes the same entries again.
  if type(reply) == 'table' and reply.err and not string.find(reply.err, 'equal or smaller', 1, true) then
    return redis.error_reply(reply.err)
  end
  redis.call('PUBLISH', channel, payload)
  if ARGV[3 * i + 1] == '1' then redis.call('EXPIRE', stream, ARGV[1]) end
end
