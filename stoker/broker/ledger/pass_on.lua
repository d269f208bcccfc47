-- KEYS[21]: the messages that one worker alone takes
-- ARGV: token, seconds that those are kept, 1 for a job that this owner cannot run. Another is passed on once; both as if
-- this owner had not been.
begin(KEYS, ARGV)
local token, kept, needed = ARGV[6], ARGV[7], ARGV[8] == '1'
local record = look(id, 'passed', 'began', 'attempts')
local passed, began, attempts = unpack(record.more, 1, 3)
-- Sent again, because the answer was lost.
if passed == token then return 'passed' end
if record.owned ~= token or record.over then return 'fenced' end
if (passed and not needed) or not ranked(record) or redis.call('EXISTS', mark) == 1 then return 'stays' end
-- Another program's value may be in the list's place.
local message = message_of(record)
if type(redis.pcall('LPUSH', KEYS[21], message)) == 'table' then return 'stays' end
redis.call('EXPIRE', KEYS[21], kept)
redis.call('HDEL', job, 'token', 'tag', 'worker', 'counted', unpack(began == token and {'began'} or {}))
local former = string.format('%.0f', math.max(1, count_of(attempts)) - 1)
redis.call('HSET', job, 'passed', token, 'attempts', former)
-- If it is lost there, `recover` will see.
add(dispatched, now, id)
return 'passed'
