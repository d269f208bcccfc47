-- ARGV: token, delivery tag, worker, deaths that are too many
local token, tag, worker, too_many = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9])
refill()
if ended(result) then
  strike_out()
  return {'ended', '0', '0', ''}
end
local state = redis.call('HMGET', job, 'token', 'tag', 'worker', 'submitted', 'history', 'began', 'request', 'trouble')
if not state[4] then return {'unknown', '0', '0', ''} end
local verdict = 'run'
if state[1] then
  if state[2] ~= tag then return {'duplicate', '0', '0', ''} end
  local history = state[5] and cjson.decode(state[5]) or {}
  table.insert(history, {worker = state[3], time = now, trouble = state[8] or nil})
  redis.call('HSET', job, 'history', cjson.encode(history))
  redis.call('HDEL', job, 'trouble')
  if #history >= too_many then verdict = 'dead' end
end
redis.call('HSET', job, 'token', token, 'tag', tag, 'worker', worker, 'began', '1')
redis.call('EXPIRE', job, pending_ttl)
return {verdict, string.format('%.6f', now - tonumber(state[4])), state[6] and '1' or '0', state[7] or ''}
