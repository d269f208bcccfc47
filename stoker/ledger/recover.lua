-- ARGV: seconds since a job was handed out. Returns the jobs that were put back into their rooms.
refill()
local standing = {}
for _, message in ipairs(redis.call('LRANGE', front, 0, -1)) do
  standing[cjson.decode(message)['headers']['id']] = true
end
local lost = {}
for _, of in ipairs(redis.call('ZRANGEBYSCORE', handed, '-inf', now - tonumber(ARGV[6]), 'LIMIT', 0, 1000)) do
  local fields = redis.call('HMGET', job_prefix .. of, 'token', 'message', 'priority', 'turn')
  if not fields[2] then
    redis.call('ZREM', handed, of)
    redis.call('ZREM', open, of)
  elseif not fields[1] and not standing[of] then
    redis.call('ZREM', handed, of)
    redis.call('ZADD', room(tonumber(fields[3])), fields[4], of)
    redis.call('EXPIRE', room(tonumber(fields[3])), pending_ttl)
    table.insert(lost, of)
  end
end
redis.call('ZREMRANGEBYSCORE', open, '-inf', now - pending_ttl)
refill()
return lost
