-- ARGV: token, delivery tag, worker, crashes that are too many
begin(KEYS, ARGV)
local token, tag, worker, too_many = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9])
refill()
local record = look(id)
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
local state = redis.call('HMGET', job, 'token', 'tag', 'worker', 'submitted', 'history', 'began', 'request', 'trouble',
  'client', 'attempts', 'traceparent', 'tracestate')
local attempt = string.format('%.0f', count_of(state[10]) + 1)
if state[1] and state[2] ~= tag then return {'duplicate', '0', '0', ''} end
local history = decoded(state[5])
if state[1] then note_crash(job, state[3], history, state[8]) end
local verdict = #history >= setting('crashes', too_many) and 'dead' or 'run'
redis.call('HSET', job, 'token', token, 'tag', tag, 'worker', worker, 'began', '1', 'attempts', attempt)
redis.call('EXPIRE', job, pending_ttl)
return {
  verdict, string.format('%.6f', now - tonumber(state[4])), state[6] and '1' or '0', state[7] or '',
  tostring(redis.call('EXISTS', mark)), state[9] or '', attempt, state[11] or '', state[12] or '',
}
