-- How a job ends.

-- The job has ended, or is to be: nobody waits for it any more, and its client may have another. Of what its record says
-- only that is used which can be true. `owner`: the token of the owner that ended it, if it had one.
local function strike_out(record, owner)
  look_around()
  result_ttl()
  local all, held = bytes_open(id)
  -- A key that another program wrote over stops the script here: a job that has left one order, and could not leave the
  -- next, would wait in none. One that its owner ends waits nowhere: stopped half-way, it is ended when it is asked again.
  if not owner then
    for _, key in ipairs({open, dispatched}) do redis.call('ZCARD', key) end
    for _, priority in ipairs(levels()) do redis.call('ZCARD', backlog(priority)) end
  end
  if record.message then redis.call('LREM', ready, 1, record.message) else redis.call('LLEN', ready) end
  leave_backlogs(id)
  -- Another type than a client's jobs have is the next submission's to move aside.
  local mine = prefix .. 'client:'
  if record.mine and string.sub(record.mine, 1, #mine) == mine then redis.pcall('ZREM', record.mine, id) end
  drop_size(id, all, held)
  redis.call('ZREM', open, id)
  redis.call('ZREM', dispatched, id)
  local left = {mark, own_input(record.blob)}
  -- A dead letter's input, and its run's checkpoints, stay for its retry.
  if record.lettered then left = {mark} else table.insert(left, prefix .. 'checkpoint:' .. id) end
  redis.call('UNLINK', unpack(left))
  if record.known and not record.wrong then
    redis.call('HDEL', job, 'request', 'message')
    redis.call('HSET', job, 'ended', '1', unpack(owner and {'completed', owner} or {}))
  end
  redis.call('EXPIRE', job, result_ttl())
  -- A day from its last entry is set already. No longer than the record: then the id may be that of another job. A client
  -- with the rights of an earlier release may not say so.
  if result_ttl() < tonumber(default_ttl) then redis.pcall('EXPIRE', prefix .. 'stream:' .. id, result_ttl()) end
end

local function finish(record)
  -- After the deletions: a broker whose memory is full lets a script go on that has written already.
  redis.call('SET', result, record, 'EX', result_ttl())
  redis.call('PUBLISH', result, record)
end
