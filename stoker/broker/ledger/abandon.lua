-- ARGV: token, the result's record. Ends a job whose owner cannot end it as others are, because something else than Stoker
-- wrote where the job's record, result or input should be. Returns 0 for a job that has ended, or is another owner's.
begin(KEYS, ARGV)
local record = look(id)
if (record.owned and record.owned ~= ARGV[6]) or ended(record) then return 0 end
-- A whole record without an owner is that of a job which was taken from its owner, or sent again: it waits for another.
if not record.owned and ranked(record) then return 0 end
strike_out(record)
finish(ARGV[7])
return 1
