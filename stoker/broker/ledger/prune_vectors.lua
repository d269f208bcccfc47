-- KEYS: unfetched, fetched, sizes. Forgets some of the vectors that have expired: only where there is no room any more
-- would the next ones do that. Returns how many.
read_clock()
begin_vectors(unpack(KEYS, 1, 3))
return prune()
