-- ARGV: the result's record, prefix of workers' presences. KEYS[21]: the channel of cancels
begin(KEYS, ARGV)
local record = look(id)
if ended(record) then return 'ended' end
if not record.known then return 'unknown' end
if record.wrong then return record.wrong end
if record.owned then
  if redis.call('EXISTS', ARGV[7] .. (redis.call('HGET', job, 'worker') or '')) == 1 then
    redis.call('SET', mark, '1', 'EX', pending_ttl)
    redis.call('PUBLISH', KEYS[21], id)
    return 'asked'
  end
  -- Its owner is silent: if it comes back, it finds another token than its own, and leaves no trace.
  redis.call('HSET', job, 'token', 'cancelled')
end
strike_out(record)
finish(ARGV[6])
refill()
return 'cancelled'
