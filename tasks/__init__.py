"""What each kind of job means: a handler that prepares the request, loads its input and finishes the result."""
