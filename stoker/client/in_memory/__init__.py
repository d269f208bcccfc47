"""What `stoker.testing` is made of: jobs that live in memory, and the answers that a test laid down for them."""
