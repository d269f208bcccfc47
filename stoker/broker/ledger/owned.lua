-- Whether this token is that of the job's owner, and the job has not ended.
local function owns(token)
  local state = redis.call('HMGET', job, 'token', 'ended')
  return state[1] == token and state[2] ~= '1'
end
