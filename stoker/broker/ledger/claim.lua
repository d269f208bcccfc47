-- KEYS[21]: the dead letters. ARGV: token, delivery tag, worker, crashes that are too many
begin(KEYS, ARGV)
local token, tag, worker, too_many = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9])
refill()
local record = look(id, 'tag', 'worker', 'history', 'began', 'request', 'trouble', 'client', 'attempts', 'traceparent',
  'tracestate', 'passed')
if ended(record) then
  strike_out(record)
  return {'ended', '0', '0', ''}
end
if not record.known then return {'unknown', '0', '0', ''} end
if not ranked(record) then
  spoil(id)
  strike_out(record)
  return {'spoiled', '0', '0', ''}
end
local former_tag, former, crashes, began, request, trouble, client, attempts, trace, trace_state, passed
  = unpack(record.more, 1, 11)
-- Sent again, because the answer was lost: it is the same owner, which has not crashed.
local again = record.owned == token
local attempt = string.format('%.0f', again and count_of(attempts) or count_of(attempts) + 1)
if record.owned and former_tag ~= tag then return {'duplicate', '0', '0', ''} end
local history = decoded(crashes)
if record.owned and not again then note_crash(job, former, history, trouble) end
local verdict = #history >= setting('crashes', too_many) and 'dead' or 'run'
-- An owner wrote a dead letter, and could not end the job then: it runs on.
if verdict == 'run' and record.lettered and not again then
  redis.pcall('HDEL', KEYS[21], id)
  redis.call('HDEL', job, 'lettered')
end
redis.call('HSET', job, 'token', token, 'tag', tag, 'worker', worker, 'began', began or token, 'attempts', attempt)
redis.call('EXPIRE', job, pending_ttl)
return {
  verdict, string.format('%.6f', now - record.submitted), began and began ~= token and '1' or '0', request or '',
  tostring(redis.call('EXISTS', mark)), client or '', attempt, trace or '', trace_state or '',
  string.format('%.6f', record.submitted), passed and '1' or '0',
}
