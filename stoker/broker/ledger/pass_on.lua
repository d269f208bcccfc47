-- KEYS[21]: the messages that one worker alone takes
-- ARGV: token, seconds that those are kept which are recalled, that worker where it alone can run the job. Another is
-- passed on once; both as if this owner had not been.
begin(KEYS, ARGV)
local token, needs = ARGV[6], ARGV[8]
local needed = needs ~= ''
local kept = tonumber(needed and pending_ttl or ARGV[7])
local record = look(id, 'passed', 'began', 'attempts')
local passed, began, attempts = unpack(record.more, 1, 3)
-- Sent again, because the answer was lost.
if passed == token then return 'passed' end
if record.owned ~= token or record.over then return 'fenced' end
if (passed and not needed) or not ranked(record) or redis.call('EXISTS', mark) == 1 then return 'stays' end
-- Another program's value may be in the list's place.
local message = message_of(record)
if type(redis.pcall('LPUSH', KEYS[21], message)) == 'table' then return 'stays' end
if redis.call('TTL', KEYS[21]) < kept then redis.call('EXPIRE', KEYS[21], kept) end
redis.call('HDEL', job, 'token', 'tag', 'worker', 'counted', unpack(began == token and {'began'} or {}))
local former = string.format('%.0f', math.max(1, count_of(attempts)) - 1)
redis.call('HSET', job, 'passed', token, 'attempts', former, unpack(needed and {'needs', needs} or {}))
-- If it is lost there, `recover` will see.
add(dispatched, now, id)
return 'passed'
