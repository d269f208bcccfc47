-- What is kept of vectors. `unfetched`, `fetched`: sorted sets, id of the job → when its vectors expire; `vector_sizes`:
-- hash, id → bytes, and their sum. An id stays there for a while after its vectors have expired: `prune`.
local unfetched, fetched, vector_sizes
local function begin_vectors(...) unfetched, fetched, vector_sizes = ... end

local function size_of(text)
  local number = tonumber(text)
  return number and number >= 0 and number < 2 ^ 53 and number or 0
end

-- The bytes of all, and what is noted of the job `of`.
local function vector_bytes(of)
  local stored = redis.call('HMGET', vector_sizes, ':sum', of or ':sum')
  return size_of(stored[1]), stored[2]
end

-- `bytes`: nil for vectors that are gone.
local function set_vector_size(of, bytes)
  local all, held = vector_bytes(of)
  if not bytes and not held then return end
  local left = string.format('%.0f', math.max(0, all - size_of(held) + (bytes or 0)))
  if not bytes then redis.call('HDEL', vector_sizes, of) end
  redis.call('HSET', vector_sizes, ':sum', left, unpack(bytes and {of, bytes} or {}))
end

local function forget_vectors(of)
  redis.call('ZREM', unfetched, of)
  redis.call('ZREM', fetched, of)
  set_vector_size(of, nil)
end

-- Forget some of those that have expired; return how many.
local function prune()
  local found = 0
  for _, key in ipairs({unfetched, fetched}) do
    for _, of in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, 1000)) do
      forget_vectors(of)
      found = found + 1
    end
  end
  return found
end

-- Delete the vectors that were fetched first until `bytes` more fit. Those that nobody has fetched stay. Returns how
-- many bytes are kept then, and how many may be.
local function make_room(prefix, policy, bytes, default)
  local most, all = decided(policy, 'vector_bytes', default), vector_bytes()
  if all + bytes <= most then return all, most end
  while vector_bytes() + bytes > most and prune() > 0 do end
  while vector_bytes() + bytes > most do
    local of = redis.call('ZRANGE', fetched, 0, 0)[1]
    if not of then break end
    redis.call('DEL', prefix .. 'blob:vectors:' .. of)
    forget_vectors(of)
  end
  -- Nothing is kept: what else the sum says, something else than Stoker wrote.
  if redis.call('EXISTS', unfetched, fetched) == 0 then redis.call('DEL', vector_sizes) end
  return vector_bytes(), most
end

local function note(job, what)
  if redis.call('TYPE', job).ok == 'hash' then redis.call('HSET', job, 'vectors', what) end
end
