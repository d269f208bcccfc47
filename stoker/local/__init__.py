"""All of Stoker on one machine: an embedded broker, a worker and Flower, started together and stopped together."""
