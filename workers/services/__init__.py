"""What a worker process does besides its jobs: threads that publish, listen, watch and mend, and what they share."""
