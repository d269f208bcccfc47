-- ARGV: token, delivery tag, worker, crashes that are too many
local token, tag, worker, too_many = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9])
refill()
if ended() then
  strike_out()
  return {'ended', '0', '0', ''}
end
if not known(id) then return {'unknown', '0', '0', ''} end
if not rank(id) then
  spoil(id)
  strike_out()
  return {'spoiled', '0', '0', ''}
end
local state = redis.call('HMGET', job, 'token', 'tag', 'worker', 'submitted', 'history', 'began', 'request', 'trouble')
local about = redis.call('HMGET', job, 'client', 'attempts', 'traceparent', 'tracestate')
local attempt = string.format('%.0f', count_of(about[2]) + 1)
if state[1] and state[2] ~= tag then return {'duplicate', '0', '0', ''} end
local history = decoded(state[5])
if state[1] then note_crash(job, state[3], history, state[8]) end
local verdict = #history >= setting('crashes', too_many) and 'dead' or 'run'
redis.call('HSET', job, 'token', token, 'tag', tag, 'worker', worker, 'began', '1', 'attempts', attempt)
redis.call('EXPIRE', job, pending_ttl)
return {
  verdict, string.format('%.6f', now - tonumber(state[4])), state[6] and '1' or '0', state[7] or '',
  tostring(redis.call('EXISTS', mark)), about[1] or '', attempt, about[3] or '', about[4] or '',
}
