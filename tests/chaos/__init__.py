"""Random mischief over several real workers: nothing lost, nothing twice, nothing wrong. `make chaos`."""
