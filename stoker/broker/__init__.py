"""What Stoker keeps in Redis, and how it talks to it: keys, messages, the ledger, what its records say."""
