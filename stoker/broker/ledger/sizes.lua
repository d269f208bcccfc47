-- The bytes of the queue's open jobs, one field a job and their sum: this sum, and the job's part of it.
local sum = ':sum'
local function bytes_open(of)
  local stored = redis.call('HMGET', sizes, sum, of)
  local bytes = tonumber(stored[1])
  return bytes and bytes >= 0 and bytes < 2 ^ 53 and bytes or 0, stored[2]
end

-- `all`, `held`: what `bytes_open` says of the job.
local function add_size(bytes, all, held)
  all = math.max(0, all - (tonumber(held) or 0)) + bytes
  redis.call('HSET', sizes, id, string.format('%.0f', bytes), sum, string.format('%.0f', all))
  redis.call('EXPIRE', sizes, pending_ttl)
end

local function drop_size(of, all, held)
  if not held then return end
  local left = math.max(0, all - (tonumber(held) or 0))
  if left == 0 then
    redis.call('DEL', sizes)
  else
    redis.call('HDEL', sizes, of)
    redis.call('HSET', sizes, sum, string.format('%.0f', left))
  end
end
