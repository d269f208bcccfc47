-- ARGV: the result's record, prefix of workers' presences. KEYS[21]: the channel of cancels
if ended() then return 'ended' end
if not known(id) then return 'unknown' end
local owner = redis.call('HMGET', job, 'token', 'worker')
if owner[1] then
  if redis.call('EXISTS', ARGV[7] .. (owner[2] or '')) == 1 then
    redis.call('SET', mark, '1', 'EX', pending_ttl)
    redis.call('PUBLISH', KEYS[21], id)
    return 'asked'
  end
  -- Its owner is silent: if it comes back, it finds another token than its own, and leaves no trace.
  redis.call('HSET', job, 'token', 'cancelled')
end
strike_out()
finish(ARGV[6])
refill()
return 'cancelled'
