"""A worker of several processes: rank 0 talks to the broker, the others train with it and do as it says."""
