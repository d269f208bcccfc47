-- What is kept of vectors. `unfetched`, `fetched`: sorted sets, id of the job → when its vectors expire; `sizes`: hash,
-- id → bytes, and their sum. An id stays there for a while after its vectors have expired: `prune`.
local function vectors_kept(prefix, policy, unfetched, fetched, sizes)
  local kept, sum = {}, ':sum'

  local function count(text)
    local number = tonumber(text)
    return number and number >= 0 and number < 2 ^ 53 and number or 0
  end

  function kept.bytes() return count(redis.call('HGET', sizes, sum)) end

  -- `bytes`: nil for vectors that are gone.
  function kept.set_size(id, bytes)
    if not bytes and redis.call('HEXISTS', sizes, id) == 0 then return end
    local all = math.max(0, kept.bytes() - count(redis.call('HGET', sizes, id)) + (bytes or 0))
    if bytes then redis.call('HSET', sizes, id, bytes) else redis.call('HDEL', sizes, id) end
    redis.call('HSET', sizes, sum, string.format('%.0f', all))
  end

  function kept.forget(id)
    redis.call('ZREM', unfetched, id)
    redis.call('ZREM', fetched, id)
    kept.set_size(id, nil)
  end

  -- Forget some of those that have expired; return how many.
  local function prune()
    local found = 0
    for _, key in ipairs({unfetched, fetched}) do
      for _, id in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, 1000)) do
        kept.forget(id)
        found = found + 1
      end
    end
    return found
  end

  -- Delete the vectors that were fetched first until `bytes` more fit. Those that nobody has fetched stay. Returns how
  -- many bytes are kept then, and how many may be.
  function kept.make_room(bytes, default)
    local most = decided(policy, 'vector_bytes', default)
    while kept.bytes() + bytes > most and prune() > 0 do end
    while kept.bytes() + bytes > most do
      local id = redis.call('ZRANGE', fetched, 0, 0)[1]
      if not id then break end
      redis.call('DEL', prefix .. 'blob:vectors:' .. id)
      kept.forget(id)
    end
    -- Nothing is kept: what else the sum says, something else than Stoker wrote.
    if redis.call('EXISTS', unfetched, fetched) == 0 then redis.call('DEL', sizes) end
    return kept.bytes(), most
  end

  return kept
end

local function note(job, what)
  if redis.call('TYPE', job).ok == 'hash' then redis.call('HSET', job, 'vectors', what) end
end
