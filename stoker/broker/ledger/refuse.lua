-- ARGV: the result's record; if it is said, the seconds since its submission without which it goes on waiting. Ends a job that waits
-- and that nobody will run. Returns 0 for one that has an owner or has ended, and for one that is not known.
begin(KEYS, ARGV)
local record = look(id)
if ended(record) or not record.known or record.wrong or record.owned then return 0 end
if ARGV[7] and not (record.submitted and now - record.submitted >= tonumber(ARGV[7])) then return 0 end
strike_out(record)
finish(ARGV[6])
refill()
return 1
