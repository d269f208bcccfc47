-- ARGV: token, the result's record
begin(KEYS, ARGV)
local record = look(id)
if record.wrong then return record.wrong end
-- Sent again, because the answer was lost: it has ended, once.
if record.completed == ARGV[6] then return 1 end
-- Each end of a job takes its message off the record: only without one its result has to be asked for.
if record.owned ~= ARGV[6] or (not record.message and ended(record)) then return 0 end
strike_out(record, ARGV[6])
finish(ARGV[7])
-- How fast jobs end here: what a full queue reports to the clients that it refuses.
local state = redis.call('HMGET', pace, 'last', 'interval')
local last = finite(state[1])
local since = now - (last or now)
local before = finite(state[2])
local interval = before and 0.9 * before + 0.1 * since or since
redis.call('HSET', pace, 'last', string.format('%.6f', now), 'interval', string.format('%.6f', interval))
-- Once a second is often enough for an expiry of minutes and more.
if math.floor(last or 0) ~= math.floor(now) then redis.call('EXPIRE', pace, result_ttl()) end
return 1
