"""What each kind of job means: decode the request, hand it to the warm engine, encode the result."""
